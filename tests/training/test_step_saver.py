"""Between two steps: the checkpoint comes before whatever can fail, and what a failure cost is made up."""

import errno
import json
import os
import textwrap
import types

import pytest
import torch

from nanochat import checkpoint_files
from nanochat import checkpoint_manager as cm
from nanochat import data_pipeline as training_data
from nanochat.evaluation.core_bundle import Task, write_bundle
from nanochat.system.environment import SharedError, UserError
from nanochat.training import step_saver
from nanochat.training.step_saver import NonFiniteWeights, StepSaver
from scripts import base_train
from scripts.base_train import main
from tests.tiny_run import TINY, exit_code, flags, losses, metrics, start, state_hashes, tag_dir


def evaluations(tag: str, key: str) -> list[tuple]:
    return [(line["step"], line[key]) for line in metrics(tag) if line.get("event") == "eval" and key in line]


def fake_state(**parts) -> types.SimpleNamespace:
    """What save_if_due() and evaluate_if_due() need of a TrainState, without a run."""
    state = types.SimpleNamespace(
        **{"settings": None, "steps": 9, "is_last": False, "model": torch.nn.Linear(1, 1), **parts},
        guard=types.SimpleNamespace(bad=[]),
        log=None,
    )
    state.step_saver = StepSaver(state)
    return state


def test_an_evaluation_that_fails_costs_no_step_and_is_made_up(train, monkeypatch, capsys):
    """No save is due, and the suite fails at step 2 of 4: that step is saved all the same, and --resume goes on there.

    Red when evaluate_if_due() lets the error pass without save_before_error().
    """
    monkeypatch.setattr(base_train, "evaluate_suite", lambda *_, **__: {"offline": 0.25})
    train("smooth", core_metric_every=2)

    def broken(*_, **__):
        raise UserError("the bundle is gone")

    monkeypatch.setattr(base_train, "evaluate_suite", broken)
    assert exit_code(lambda: train("rough", core_metric_every=2)) == 2
    assert capsys.readouterr().err == ("error: the bundle is gone; step 2 is saved: --resume continues from there\n")
    assert cm.list_steps(tag_dir("rough")) == [2]
    assert metrics("rough", "event") == ["start", "save"]
    monkeypatch.setattr(base_train, "evaluate_suite", lambda *_, **__: {"offline": 0.25})
    main(["--model_tag=rough", "--resume"])
    assert evaluations("rough", "offline") == evaluations("smooth", "offline") == [(2, 0.25), (4, 0.25)]
    assert losses("rough") == losses("smooth")
    assert state_hashes("rough", 4) == state_hashes("smooth", 4)


@pytest.mark.parametrize("end", [ZeroDivisionError, SystemExit])
def test_a_due_checkpoint_is_written_before_the_evaluation_of_its_step(train, monkeypatch, end):
    """The evaluation of step 2, where a save is due, has a bug, or the process ends there without another word.

    Red when training_loop() calls evaluate_if_due() before save_if_due(): step 2 would not be there after the second.
    """

    def ended(*_, **__):
        raise end

    monkeypatch.setattr(training_data, "bits_per_byte", ended)
    with pytest.raises(end):
        train(f"ends-{end.__name__}", eval_every=2, save_every=2)
    run = checkpoint_files.read_metadata(checkpoint_files.step_dir(tag_dir(f"ends-{end.__name__}"), 2))["run"]
    assert (run["step"], run["evaluated"], run["val_bpb"]) == (2, 1, None)


def test_a_final_evaluation_that_was_killed_is_made_up_once(train, monkeypatch):
    """The process ends inside the evaluation of the last step: the step is there, and --resume measures it.

    Red when record_evaluated() is not called, or agree_where_run_is() does not read it: the third start would evaluate
    again; and when a half-done evaluation's line stays in metrics.jsonl.
    """
    whole = train("whole-end")
    real = training_data.bits_per_byte

    def killed(*_, **__):
        raise SystemExit(9)

    monkeypatch.setattr(training_data, "bits_per_byte", killed)
    with pytest.raises(SystemExit):
        train("cut-end")
    assert cm.list_steps(tag_dir("cut-end")) == [4]
    assert metrics("cut-end", "event") == ["start"]
    with open(tag_dir("cut-end") / "metrics.jsonl", "a") as file:  # the bpb was logged, the suite had not ended
        file.write(json.dumps({"step": 4, "time": 0.0, "event": "eval", "val_bpb": 99.0}) + "\n")
    monkeypatch.setattr(training_data, "bits_per_byte", real)
    assert main(["--model_tag=cut-end", "--resume"])["val_bpb"] == whole["val_bpb"]
    assert metrics("cut-end", "event") == ["start", "resume", "eval", "done"]
    assert evaluations("cut-end", "val_bpb") == evaluations("whole-end", "val_bpb")
    before = metrics("cut-end")
    monkeypatch.setattr(training_data, "bits_per_byte", killed)
    for tag in ("cut-end", "whole-end"):
        again = main([f"--model_tag={tag}", "--resume"])
        assert (again["stopped"], again["val_bpb"]) == ("done", whole["val_bpb"])
    assert metrics("cut-end") == before
    assert state_hashes("cut-end", 4) == state_hashes("whole-end", 4)


def test_figures_stay_in_the_log_when_the_resumed_run_does_not_measure_them_again(train, monkeypatch):
    """The suite fails after val bpb was logged; --resume switches evaluation off.

    Red when the lines of a step are dropped wherever its evaluation did not end, due or not.
    """

    def broken(*_, **__):
        raise UserError("the bundle is gone")

    monkeypatch.setattr(base_train, "evaluate_suite", broken)
    assert exit_code(lambda: train("half", eval_every=2, core_metric_every=2)) == 2
    [(step, bpb)] = evaluations("half", "val_bpb")
    assert main(["--model_tag=half", "--resume", "--eval_every=None", "--core_metric_every=None"])["stopped"] == "done"
    assert [step for step, _ in evaluations("half", "val_bpb")] == [2, 4]
    assert (step, bpb) == evaluations("half", "val_bpb")[0]


def test_figures_that_cannot_be_written_beside_the_steps_go_into_one(train, monkeypatch, capsys):
    """No save is due at step 2, and evaluated.json cannot be written there: the step is saved, with its figures.

    Red when record_evaluated() is called outside of what save_before_error() guards.
    """

    def full(*_):
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT), "evaluated.json")

    real = base_train.record_evaluated
    monkeypatch.setattr(base_train, "record_evaluated", full)
    assert exit_code(lambda: train("noted", eval_every=2)) == 2
    assert capsys.readouterr().err.startswith("error: Disk quota exceeded: evaluated.json (")
    run = checkpoint_files.read_metadata(checkpoint_files.step_dir(tag_dir("noted"), 2))["run"]
    assert (run["step"], run["evaluated"]) == (2, 2)
    monkeypatch.setattr(base_train, "record_evaluated", real)
    assert main(["--model_tag=noted", "--resume"])["stopped"] == "done"
    assert [step for step, _ in evaluations("noted", "val_bpb")] == [2, 4]


def test_ranks_that_share_an_error_wait_until_rank_0_has_saved(monkeypatch):
    """A launcher ends all ranks soon after the first one has left, however long the save takes.

    Red without the barrier in save_before_error().
    """
    order = []
    compute = types.SimpleNamespace(
        world_size=2,
        rank=1,
        any_rank=lambda flag: False,
        barrier=lambda patient=False: order.append(("barrier", patient)),
    )

    def evaluate(*_):
        raise SharedError("the bundle is gone")

    settings = types.SimpleNamespace(save_every=None, eval_every=1)
    run = types.SimpleNamespace(step=1, evaluated=0)
    saver = types.SimpleNamespace(is_writing=lambda: False, wait=lambda: None, copy=lambda *_: order.append("copy"))
    state = fake_state(settings=settings, compute=compute, run=run, saver=saver, evaluate=evaluate)
    state.step_saver.newest_step = 0
    monkeypatch.setattr(StepSaver, "_contents", lambda self: ())
    with pytest.raises(SharedError, match="the bundle is gone; rank 0 saves step 1"):
        base_train.evaluate_if_due(state)
    assert order == ["copy", ("barrier", True)]


def test_samples_that_fail_end_no_run(train, monkeypatch, capsys):
    """Red when sample_if_due() lets the error pass."""

    def broken(*_):
        raise RuntimeError("probability tensor contains either inf, nan or element < 0")

    monkeypatch.setattr(base_train, "print_samples", broken)
    assert train("mute", sample_every=2)["stopped"] == "done"
    out = capsys.readouterr().out
    assert [f"warning: no sample at step {step} (RuntimeError: probability tensor" in out for step in (2, 4)] == [
        True
    ] * 2


def test_no_memory_in_the_evaluation_says_how_to_resume_and_that_works(train, monkeypatch, capsys):
    """Red when the message comes without a saved step: --resume would start again at step 0."""
    real = training_data.bits_per_byte

    def starved(model, *args, rows, **options):
        if rows > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(model, *args, rows=rows, **options)

    monkeypatch.setattr(training_data, "bits_per_byte", starved)
    assert exit_code(lambda: train("starved", eval_every=2)) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "--resume --device_batch_size=2" in err
    assert "step 2 is saved" in err
    assert main(["--model_tag=starved", "--resume", "--device_batch_size=2"])["stopped"] == "done"
    assert [step for step, _ in evaluations("starved", "val_bpb")] == [2, 4]


def test_a_damaged_bundle_is_refused_before_the_first_step(train, base, capsys):
    """Red when train() does not call check_suite()."""
    bundle = base / "eval_bundle"
    items = [{"query": "a", "choices": ["b", "c"], "gold": 0}]
    write_bundle([Task("one", "multiple_choice", items)], bundle)
    try:
        (base / "eval_bundle.json").write_text(json.dumps({"files": {"core.yaml": [1, "0" * 64]}}))
        assert exit_code(lambda: train("bundle", core_metric_every=2)) == 2
        (base / "eval_bundle.json").unlink()
        (bundle / "eval_data" / "one.jsonl").write_text("{\n")
        assert exit_code(lambda: train("bundle", core_metric_every=2)) == 2
        err = capsys.readouterr().err.splitlines()
        assert "core.yaml is not the file that was downloaded" in err[0]
        assert "one.jsonl, line 1: not a multiple_choice item" in err[1]
        assert not tag_dir("bundle").exists()
    finally:
        (bundle / "core.yaml").unlink()


# ---------------------------------------------------------------------------------------------------------------------
# slow saves


class Writer:
    """A saver of rank 0 whose save takes as long as `busy` says."""

    def __init__(self):
        self.busy, self.patience, self.saved, self.waits = False, [], [], 0

    def is_writing(self, patience: float = 0.0) -> bool:
        self.patience.append(patience)
        return self.busy

    def wait(self):
        self.waits += 1

    def save(self, step, *_):
        self.saved.append(step)


def test_a_save_that_is_due_while_one_is_written_is_postponed_but_not_the_last(monkeypatch, capsys):
    """Red when save_if_due() saves though rank 0 is busy, waits each time, or postpones the end.

    The others wait for the last one in the group that waits for hours.
    """
    barriers, saver = [], Writer()
    settings = types.SimpleNamespace(save_every=2, rank_timeout=40, eval_every=None)
    compute = types.SimpleNamespace(
        world_size=2, rank=0, any_rank=lambda flag: flag, barrier=lambda patient=False: barriers.append(patient)
    )
    run = types.SimpleNamespace(step=0, evaluated=0)
    state = fake_state(settings=settings, compute=compute, run=run, saver=saver)
    monkeypatch.setattr(StepSaver, "_contents", lambda self: (self.state.run.step,))
    for step, busy in [
        (1, False),
        (2, False),
        (3, True),
        (4, True),
        (5, True),
        (6, True),
        (7, False),
        (8, True),
        (9, True),
    ]:
        run.step, saver.busy = step, busy
        base_train.save_if_due(state, ending=step == 9)
    assert saver.saved == [2, 7, 9]  # 4 was due, and followed when the disk was done; 8 is covered by the end
    assert saver.patience == [10.0, 10.0, 0.0, 0.0, 0.0, 10.0]
    assert (barriers, saver.waits) == ([True], 1)
    assert capsys.readouterr().out.count("the save before is still being written") == 2
    state.model.weight.data.fill_(float("nan"))
    run.step, state.step_saver.newest_step = 9, 8
    with pytest.raises(NonFiniteWeights):
        base_train.save_if_due(state, ending=True)


SLOW = """
import time
from nanochat import checkpoint_manager as cm
from nanochat.runtime import run_script
from scripts.base_train import main
real = cm.save_checkpoint

def save(*args, **options):
    cm.save_checkpoint = real
    time.sleep(6)
    return real(*args, **options)

cm.save_checkpoint = save
run_script(main)
"""


def test_a_save_slower_than_the_ranks_patience_ends_no_run(train, base, corpus, tmp_path):
    """Two ranks, a first save of 6 s, rank_timeout 4 s, another save due meanwhile and at the end.

    Red when save() waits for the save before while the other rank is in a collective.
    """
    train("warm", num_iterations=1)
    script = tmp_path / "slow.py"
    script.write_text(textwrap.dedent(SLOW))
    shape = {**TINY, "num_iterations": 6, "save_every": 2, "rank_timeout": 4, "device_batch_size": 3}
    process = start(base, *flags(shape | {"data": corpus, "model_tag": "slow"}), ranks=2, script=script)
    output = process.communicate(timeout=170)[0]
    assert process.returncode == 0, output
    steps = cm.list_steps(tag_dir("slow"))
    assert (steps[0], steps[-1]) == (2, 6), output
    assert metrics("slow", "event")[-1] == "done"


@pytest.mark.parametrize(
    ("world_size", "weights", "words"),
    [
        (2, 1.0, "the newest step on the disk is 4: --resume continues from there"),
        (1, float("nan"), "the weights of step 5 are not finite and were not saved"),
    ],
)
def test_an_error_says_which_step_it_leaves_on_the_disk(world_size, weights, words):
    """Without a copy, ranks that no longer answer cannot give theirs. Red when save_before_error() says nothing."""
    model = torch.nn.Linear(1, 1)
    model.weight.data.fill_(weights)
    compute = types.SimpleNamespace(world_size=world_size, rank=0)
    state = fake_state(compute=compute, model=model, saver=Writer(), run=types.SimpleNamespace(step=4, evaluated=4))
    state.saver.copied_step = None
    state.run.step = 5
    with pytest.raises(UserError, match=f"^the data is gone; {words}$"):
        state.step_saver.save_before_error(UserError("the data is gone."))


def test_ranks_with_other_weights_do_not_begin(tmp_path, monkeypatch):
    """A damaged copy on one node. Red when the checksum is not compared, or only where there is one rank."""
    seen = []
    monkeypatch.setattr(step_saver, "agree_before_first_step", lambda compute, facts: seen.append(facts["weights"]))
    monkeypatch.setattr(step_saver, "tag_dir", lambda settings: tmp_path)
    for world_size in (1, 2):
        state = types.SimpleNamespace(
            compute=types.SimpleNamespace(world_size=world_size, rank=0, gather=lambda value: [value]),
            settings=None,
            trained=lambda: [("w", torch.ones(3))],
            metadata={},
            run=types.SimpleNamespace(step=0),
            steps=9,
        )
        monkeypatch.setattr(step_saver, "evaluated_after_save", lambda folder, run: {})
        assert step_saver.agree_where_run_is(state) is False
    assert seen[0] is None
    assert seen[1] == step_saver.weights_checksum([("w", torch.ones(3))])
