"""Spikes and bad steps, on made-up curves."""

import json
import math

import pytest

from nanochat.training.guard import MAX_BAD_STEPS, StepGuard


def check(guard: StepGuard, step: int, loss: float, norm: float = 1.0) -> bool:
    return guard.check(step, loss, norm, {"matrix": norm})


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (1.0, math.inf), (-math.inf, math.nan)])
def test_what_is_not_finite_is_bad(loss, norm):
    """Red when the gradient's norm is not looked at."""
    guard = StepGuard()
    assert check(guard, 1, 1.0)
    assert not check(guard, 2, loss, norm)


def test_only_bad_steps_in_a_row_end_the_run_and_the_report_is_json(tmp_path):
    guard = StepGuard()
    for step in range(1, MAX_BAD_STEPS):
        check(guard, step, math.nan, math.inf)
        assert not guard.record_skipped([{"row": step}])
    check(guard, 10, 2.0)
    guard.find_spikes()
    for step in range(11, 11 + MAX_BAD_STEPS):
        check(guard, step, math.nan, math.inf)
        assert guard.record_skipped([{"row": step}]) == (step == 10 + MAX_BAD_STEPS)
    guard.write_report(tmp_path / "bad_batch.json")
    report = json.loads((tmp_path / "bad_batch.json").read_text(), parse_constant=lambda word: pytest.fail(word))
    assert report["step"] == 20
    assert report["norms"] == {"matrix": "inf"}
    assert report["rows"] == [{"row": 20}]
    assert [earlier["step"] for earlier in report["earlier"]] == list(range(11, 20))


def test_bad_steps_before_a_resume_count():
    """Red when a run that is preempted often never reaches the end of its patience."""
    guard = StepGuard(MAX_BAD_STEPS - 2)
    check(guard, 9, math.nan)
    assert not guard.record_skipped([])
    check(guard, 10, math.nan)
    assert guard.record_skipped([])
    check(guard, 11, 1.0)
    guard.find_spikes()
    check(guard, 12, math.nan)
    assert not guard.record_skipped([])


def test_a_spike_stands_out_of_a_falling_and_of_a_noisy_curve():
    """Red when the spread is taken around the median of a falling curve, or when any rise counts."""
    for curve in (lambda i: 8 * 0.97**i, lambda i: 3 + 0.1 * math.sin(7.3 * i), lambda i: 2.0):
        guard, found = StepGuard(), {}
        for i in range(100):
            check(guard, i, curve(i) + (4 if i == 80 else 0), 30.0 if i == 60 else 1 + 0.1 * math.cos(i))
            if spikes := guard.find_spikes():
                found[i] = sorted(spikes)
        assert found == {60: ["grad_norm"], 80: ["loss"]}


def spikes_of(curve: list[float]) -> dict[int, float]:
    """What the guard finds in the losses of good steps: {index: median that it names}."""
    guard, found = StepGuard(), {}
    for i, loss in enumerate(curve):
        check(guard, i, loss)
        if spikes := guard.find_spikes():
            found[i] = spikes["loss"]
    return found


def test_a_spike_is_a_tenth_above_the_median_and_eight_deviations():
    """Both, by hand: a flat curve has no deviations; one that goes from 1 to 3 and back has 1.4826 / sqrt(2) times 2.

    Red when SPIKE_RATIO is not asked for (2.19 would be a spike), or the deviations are not.
    """
    flat, wide = [2.0] * 40, [1.0, 3.0] * 20
    assert spikes_of([*flat, 2.19]) == {}
    assert spikes_of([*flat, 2.21]) == {40: 2.0}
    limit = 2.0 + 8 * 1.4826 / math.sqrt(2) * 2
    assert spikes_of([*wide, limit - 0.01]) == {}
    assert spikes_of([*wide, limit + 0.01]) == {40: 2.0}


def test_a_spike_is_compared_with_at_least_25_and_at_most_50_good_steps():
    """Red when the guard begins a step earlier or later, or remembers more or less."""
    assert spikes_of([2.0] * 24 + [9.0]) == {}
    assert spikes_of([2.0] * 25 + [9.0]) == {25: 2.0}
    # 25 steps at 1.08 are half of the last 50, whatever came before: the median lies between
    assert spikes_of([1.0] * 100 + [1.08] * 25 + [9.0]) == {125: pytest.approx(1.04)}


def test_a_good_step_forgives_the_bad_ones_before_it():
    """Red when spikes() does not clear what record_skipped() has kept: nine and one would end the run."""
    guard = StepGuard()
    for step in range(MAX_BAD_STEPS - 1):
        check(guard, step, math.nan)
        assert not guard.record_skipped([])
    check(guard, 9, 1.0)
    guard.find_spikes()
    check(guard, 10, math.nan)
    assert not guard.record_skipped([])
