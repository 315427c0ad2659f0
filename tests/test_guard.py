"""Spikes and bad steps, on made-up curves."""

import json
import math

import pytest

from nanochat.guard import MAX_BAD_STEPS, StepGuard


def look(guard: StepGuard, step: int, loss: float, norm: float = 1.0) -> bool:
    return guard.look(step, loss, norm, {"matrix": norm})


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (1.0, math.inf), (-math.inf, math.nan)])
def test_what_is_not_finite_is_bad(loss, norm):
    """Red when the gradient's norm is not looked at."""
    guard = StepGuard()
    assert look(guard, 1, 1.0)
    assert not look(guard, 2, loss, norm)


def test_only_bad_steps_in_a_row_end_the_run_and_the_report_is_json(tmp_path):
    guard = StepGuard()
    for step in range(1, MAX_BAD_STEPS):
        look(guard, step, math.nan, math.inf)
        assert not guard.leave_out([{"row": step}])
    look(guard, 10, 2.0)
    guard.spikes()
    for step in range(11, 11 + MAX_BAD_STEPS):
        look(guard, step, math.nan, math.inf)
        assert guard.leave_out([{"row": step}]) == (step == 10 + MAX_BAD_STEPS)
    guard.write_report(tmp_path / "bad_batch.json")
    report = json.loads((tmp_path / "bad_batch.json").read_text(), parse_constant=lambda word: pytest.fail(word))
    assert report["step"] == 20
    assert report["norms"] == {"matrix": "inf"}
    assert report["rows"] == [{"row": 20}]
    assert [earlier["step"] for earlier in report["earlier"]] == list(range(11, 20))


def test_bad_steps_before_a_resume_count():
    """Red when a run that is preempted often never reaches the end of its patience."""
    guard = StepGuard(MAX_BAD_STEPS - 2)
    look(guard, 9, math.nan)
    assert not guard.leave_out([])
    look(guard, 10, math.nan)
    assert guard.leave_out([])
    look(guard, 11, 1.0)
    guard.spikes()
    look(guard, 12, math.nan)
    assert not guard.leave_out([])


def test_a_spike_stands_out_of_a_falling_and_of_a_noisy_curve():
    """Red when the spread is taken around the median of a falling curve, or when any rise counts."""
    for curve in (lambda i: 8 * 0.97**i, lambda i: 3 + 0.1 * math.sin(7.3 * i), lambda i: 2.0):
        guard, found = StepGuard(), {}
        for i in range(100):
            look(guard, i, curve(i) + (4 if i == 80 else 0), 30.0 if i == 60 else 1 + 0.1 * math.cos(i))
            if spikes := guard.spikes():
                found[i] = sorted(spikes)
        assert found == {60: ["grad_norm"], 80: ["loss"]}
