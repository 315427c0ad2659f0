"""Never lose a run: stops, corruption, full disks, other world sizes, non-finite steps, out of memory, dead ranks."""

import errno
import json
import math
import os
import shutil
import signal
import textwrap
import time
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

import nanochat.gpt
from nanochat import checkpoint_files
from nanochat import checkpoint_manager as cm
from nanochat import data_pipeline as training_data
from nanochat.system.environment import UserError
from nanochat.training import guard
from scripts import base_train
from scripts.base_train import main
from tests.tiny_run import MODERN, TIED, TINY, exit_code, flags, losses, metrics, rows_of, start, state_hashes, tag_dir

# For ranks in processes; the learning rate does not depend on the horizon.
SMALLER = dict(max_seq_len=32, total_batch_size=384, depth=1, model_dim=32, head_dim=16, warmdown_ratio=0.0)
ODD = dict(vocab_size=293, num_iterations=16, save_every=8, weight_decay=0.1, log_rows=True)  # a prime vocabulary


@pytest.fixture
def stop_after(monkeypatch):
    """stop_after(step, signal): the process gets the signal as soon as that step is shown."""
    real = base_train.Progress.update

    def at(step: int, number: int = signal.SIGTERM) -> None:
        def update(self, shown, *rest):
            real(self, shown, *rest)
            if shown == step:
                os.kill(os.getpid(), number)
                time.sleep(0.1)  # until the thread that reads signals has seen it

        monkeypatch.setattr(base_train.Progress, "update", update)

    return at


def what_counts(tag: str, step: int, ranks: int = 1) -> list:
    """Everything in which an interrupted run must equal an uninterrupted one."""
    state = checkpoint_files.read_metadata(checkpoint_files.step_dir(tag_dir(tag), step))
    return [
        state_hashes(tag, step),
        losses(tag),
        rows_of(tag, ranks),
        state["loader"],
        state["rng"],
        metrics(tag, "lr"),
    ]


# ---------------------------------------------------------------------------------------------------------------------
# the same run


@pytest.mark.parametrize("variant", [{}, TIED, MODERN], ids=["untied", "tied-proj", "modern"])
def test_bit_exact_resume(train, variant):
    """3 micro-batches a step, across the end of an epoch, momentum and warmdown at work.

    Red when restore() leaves out the loader's cursor or the optimizer's state, or when the schedule restarts at 0.
    """
    train("bits", overwrite=True, **ODD, **variant)
    whole, epochs = what_counts("bits", 16), metrics("bits", "epoch")
    assert epochs[7] == 0
    assert epochs[15] == 1
    shutil.rmtree(tag_dir("bits") / "step_000016")
    main(["--model_tag=bits", "--resume"])
    assert what_counts("bits", 16) == whole
    assert metrics("bits", "event") == ["start", "save", "resume", "eval", "save", "done"]


def test_second_resume(train, stop_after):
    """Stopped by a signal after steps 1, 6, 7 and 14, each time in another process's place.

    Red when run.smooth_loss, the loader's cursor or the step counts of AdamW start anew at a resume.
    """
    train("straight", **ODD, **TIED)
    words = []
    for step in (1, 6, 7, 14):
        stop_after(step)
        assert exit_code(lambda words=words: train("stopped", *words, **ODD, **TIED)) == 85
        assert cm.newest_step(tag_dir("stopped")) == step
        words = ["--resume"]
    stop_after(-1)
    train("stopped", "--resume", **ODD, **TIED)
    assert what_counts("stopped", 16) == what_counts("straight", 16)
    both = [
        checkpoint_files.read_metadata(checkpoint_files.step_dir(tag_dir(tag), 16))["run"]
        for tag in ("straight", "stopped")
    ]
    assert both[0]["smooth_loss"] == both[1]["smooth_loss"]


def test_reshard_1_2_3_1(train, base):
    """8 float32 steps with 1 rank, then 2, 3 and 1 again: the 1-rank curve to 1e-4, and the same rows throughout.

    Red when the cursor counts a rank's own rows, or when the optimizer's state is saved in shards of the ranks.
    """
    shape = {"device_batch_size": 2, "log_rows": True, "muon_dtype": "float32", **SMALLER, **TIED}
    train("switched", num_iterations=8, **shape)
    for ranks, end in ((2, 16), (3, 24)):
        words = ("--model_tag=switched", "--resume", f"--num_iterations={end}")
        process = start(base, *words, ranks=ranks)
        output = process.communicate(timeout=120)[0]
        assert process.returncode == 0, output
        assert f"on {ranks} x cpu" in output
    main(["--model_tag=switched", "--resume", "--num_iterations=32"])
    train("alone", num_iterations=32, **shape)
    assert len(losses("alone")) == 32
    assert losses("switched") == pytest.approx(losses("alone"), rel=1e-4)
    assert rows_of("switched", 3) == rows_of("alone", 1)
    assert [line["world_size"] for line in metrics("switched") if "world_size" in line] == [1, 2, 3, 1]


# ---------------------------------------------------------------------------------------------------------------------
# signals


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_sigterm_save(train, stop_after, name, capsys):
    """The step is finished and saved, code 85; the same run goes on from there.

    Red when the loop looks at `signals` only where a save is due, or when finish() lets 85 pass for done.
    """
    stop_after(2, getattr(signal, name))
    assert exit_code(lambda: train(name, num_iterations=3)) == 85
    assert cm.list_steps(tag_dir(name)) == [2]
    assert metrics(name, "event") == ["start", "save", "preempted"]
    assert f"stopped by {name} at step 2: --resume continues" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL  # as before
    train(name, "--resume")
    assert metrics(name, "event")[-1] == "done"


def test_a_signal_cuts_an_evaluation_short_which_the_resumed_run_makes_up_for(train, monkeypatch):
    """Red when bits_per_byte does not ask `stop`, or when the resumed run takes the evaluation for done."""
    real = training_data.bits_per_byte

    def interrupted(*args, **options):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.1)
        return real(*args, **options)

    for tag, every, step in (("middle", 2, 2), ("end", None, 4)):
        monkeypatch.setattr(training_data, "bits_per_byte", interrupted)
        assert exit_code(lambda tag=tag, every=every: train(tag, eval_every=every)) == 85
        assert metrics(tag, "event") == ["start", "save", "preempted"]
        assert cm.list_steps(tag_dir(tag)) == [step]
        monkeypatch.setattr(training_data, "bits_per_byte", real)
        assert train(tag, "--resume", eval_every=every)["val_bpb"] > 0
        before = metrics(tag)
        main([f"--model_tag={tag}", "--resume"])
        assert metrics(tag) == before  # once is enough
        evaluated = [line["step"] for line in metrics(tag) if line.get("event") == "eval"]
        assert evaluated == ([2, 4] if every else [4])
        assert metrics(tag, "event")[-1] == "done"


def children(process) -> dict[int, int]:
    """rank -> process of a launcher's forked workers, as the kernel tells."""
    pids = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    names = {pid: Path(f"/proc/{pid}/comm").read_text().split() for pid in pids}
    return {int(name[1]): int(pid) for pid, name in names.items() if name[0] == "rank"}


def wait_for(condition, process) -> None:
    """Until condition() is true, while the process runs."""
    deadline = time.monotonic() + 90
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "nothing after 90 s"
        time.sleep(0.01)


def wait_for_step(tag: str, step: int, process) -> None:
    wait_for(checkpoint_files.step_dir(tag_dir(tag), step).is_dir, process)


def test_signals_to_the_launcher_or_to_one_rank_stop_all_at_one_step(train, base):
    """SIGUSR1 to torchrun, which has to be told to pass it on, and SIGTERM to rank 1 alone: code 0, event preempted.

    Red when each rank follows its own `signals.requested` (the other one hangs in the next collective).
    """
    train("warm")  # data and tokenizer are ready
    long = {**TINY, **SMALLER, "num_iterations": 100_000, "save_every": 5, "keep_last": 2, "device_batch_size": 3}
    for tag, forwarded in (("launcher", True), ("rank", False)):
        words = flags(
            long
            | {
                "data": checkpoint_files.read_metadata(checkpoint_files.step_dir(tag_dir("warm"), 4))["settings"][
                    "data"
                ]
            }
        )
        told = dict(PET_SIGNALS_TO_HANDLE="SIGTERM,SIGINT,SIGUSR1")
        process = start(base, *words, f"--model_tag={tag}", ranks=2, **told)
        wait_for_step(tag, 5, process)
        if forwarded:
            process.send_signal(signal.SIGUSR1)
        else:
            os.kill(children(process)[1], signal.SIGTERM)
        output = process.communicate(timeout=60)[0]
        assert (process.returncode == 0) == (not forwarded), output  # torchrun itself calls a signal a failure
        assert metrics(tag, "event")[-1] == "preempted", output
        assert cm.newest_step(tag_dir(tag)) == metrics(tag, "step")[-1]


# ---------------------------------------------------------------------------------------------------------------------
# disks


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_enospc(train, monkeypatch, code, capsys):
    """The disk is full in the middle of the second save's optimizer file, or read-only from then on.

    One line and code 2, the earlier step stays, nothing half-written does, and with space again the run goes on to
    the same weights. Red when the saver's thread keeps its error, or leaves its temporary folder.
    """
    if not tag_dir("roomy").is_dir():
        train("roomy", save_every=2, num_iterations=6)
    real, calls = checkpoint_files.save_file, []

    def full(tensors, path):
        calls.append(path)
        if len(calls) < 4:
            return real(tensors, path)
        path.write_bytes(b"\0" * 1000)
        if code == errno.ENOSPC:
            raise SafetensorError("I/O error: No space left on device (os error 28)")
        raise OSError(code, os.strerror(code), str(path))

    monkeypatch.setattr(checkpoint_files, "save_file", full)
    assert exit_code(lambda: train("full", save_every=2, num_iterations=6, overwrite=True)) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert os.strerror(code) in err
    assert [path.name for path in tag_dir("full").iterdir() if path.is_dir()] == ["step_000002"]
    # It surfaced at a step after the save, or at the next one. The last line may be step 2's "save", noted late.
    assert 4 <= max(metrics("full", "step")) <= 6
    monkeypatch.setattr(checkpoint_files, "save_file", real)
    main(["--model_tag=full", "--resume"])
    assert state_hashes("full", 6) == state_hashes("roomy", 6)


def resumed_over(train, tag: str, capsys, damage) -> str:
    """Damage the newest step of a copy of a run, resume: it ends as before, and the corrupt folder is still there."""
    if not tag_dir("intact").is_dir():
        train("intact", save_every=2)
    shutil.copytree(tag_dir("intact"), tag_dir(tag))
    step = checkpoint_files.step_dir(tag_dir(tag), 4)
    damage(step)
    left = sorted((path.name, path.stat().st_size) for path in step.iterdir())
    main([f"--model_tag={tag}", "--resume"])
    output = capsys.readouterr().out
    assert f"skipping {step}" in output
    assert f"resuming from {checkpoint_files.step_dir(tag_dir(tag), 2)}" in output
    assert state_hashes(tag, 4) == state_hashes("intact", 4)
    aside = tag_dir(tag) / "step_000004.bad-1"
    assert sorted((path.name, path.stat().st_size) for path in aside.iterdir()) == left
    return output


def test_bitflip(train, capsys):
    """Red when find_corruption() compares sizes alone."""

    def flip(step: Path) -> None:
        data = bytearray((step / "optimizer.safetensors").read_bytes())
        data[len(data) // 2] ^= 1
        (step / "optimizer.safetensors").write_bytes(data)

    assert "optimizer.safetensors does not have the recorded sha256" in resumed_over(train, "flip", capsys, flip)


def test_truncation(train, capsys):
    """Red when a step counts as soon as its folder is there."""

    def truncate(step: Path) -> None:
        os.truncate(step / "model.safetensors", 1000)

    assert "model.safetensors has 1000 bytes instead of" in resumed_over(train, "truncated", capsys, truncate)


def test_a_missing_manifest_or_an_empty_folder_is_no_step(train, capsys):
    output = resumed_over(train, "no-manifest", capsys, lambda step: (step / "manifest.json").unlink())
    assert "manifest.json is missing" in output
    output = resumed_over(train, "empty", capsys, lambda step: [shutil.rmtree(step), step.mkdir()])
    assert "manifest.json is missing" in output


def test_a_run_that_ended_before_its_first_step_starts_again_with_its_own_settings(train, capsys):
    """`--resume` and a tag are enough. Red when resolve_run() takes the command line's defaults for its settings."""
    train("early", num_iterations=2, seed=7, save_every=1)
    wanted = state_hashes("early", 2)
    for step in (1, 2):
        shutil.rmtree(checkpoint_files.step_dir(tag_dir("early"), step))
    with pytest.raises(UserError, match="cannot change seed=8"):
        main(["--model_tag=early", "--resume", "--seed=8"])
    main(["--model_tag=early", "--resume"])
    assert "holds no step yet: starting its run again" in capsys.readouterr().out
    assert state_hashes("early", 2) == wanted
    assert len(losses("early")) == 2


# ---------------------------------------------------------------------------------------------------------------------
# bad numbers


@pytest.fixture
def spoil(monkeypatch):
    """spoil(steps, factor): the training losses of these steps are multiplied; 3 micro-batches a step."""
    real = nanochat.gpt.chunked_cross_entropy

    def at(steps: set[int], factor: float = math.nan) -> None:
        calls = iter(range(3 * 10**6))

        def loss(x, weight, targets, *rest):
            value = real(x, weight, targets, *rest)
            return value * factor if torch.is_grad_enabled() and next(calls) // 3 + 1 in steps else value

        monkeypatch.setattr(nanochat.gpt, "chunked_cross_entropy", loss)

    return at


def test_nan_guard(train, spoil, monkeypatch, capsys):
    """Single bad steps are skipped and counted; ten in a row end the run with code 3 and a report.

    Red when the guard lets the update through (one NaN would spoil every weight), or when the count is never reset.
    """
    spoil({2, 4} | set(range(5, 14)) | set(range(15, 99)))
    assert exit_code(lambda: train("nan", num_iterations=99, save_every=1)) == 3
    skipped = [line for line in metrics("nan") if line.get("event") == "skip"]
    assert [line["step"] for line in skipped] == [2, *range(4, 14), *range(15, 25)][: len(skipped)]
    assert [line["skipped"] for line in skipped] == list(range(1, len(skipped) + 1))
    assert "step 2: loss nan, gradient norm nan: step skipped" in capsys.readouterr().out
    # 4 to 13 are ten in a row: nothing unproven was saved, the last good step is whole
    assert cm.list_steps(tag_dir("nan")) == [1, 3]
    report = json.loads((tag_dir("nan") / "bad_batch.json").read_text())
    assert (report["step"], report["loss"], report["grad_norm"]) == (13, "nan", "nan")
    assert set(report["norms"]) == {"embedding", "unembedding", "matrix"}
    assert len(report["rows"]) == 12  # of the whole batch
    assert all(row.keys() == {"epoch", "row", "documents"} for row in report["rows"])
    assert [earlier["step"] for earlier in report["earlier"]] == list(range(4, 13))
    assert metrics("nan")[-1]["event"] == "nonfinite"
    assert all(p.isfinite().all() for p in cm.load_model("base", "cpu", "eval", "nan")[0].parameters())

    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "here")  # a launcher would restart it on any code but 0
    spoil(set(range(1, 99)))
    assert train("nan2", num_iterations=99)["stopped"] == "nonfinite"


def test_an_update_that_ruins_the_weights_is_not_saved(train, capsys):
    """Finite loss and gradient, infinite rate of the embedding. Red when save() does not look at the weights."""
    train("ruined", num_iterations=1, save_every=1)
    words = {"num_iterations": 3, "save_every": 1, "embedding_lr": 1e38, "warmup_steps": 0, "model_dim": 64}
    assert exit_code(lambda: train("ruin", **words)) == 3
    assert cm.list_steps(tag_dir("ruin")) == []
    assert json.loads((tag_dir("ruin") / "bad_batch.json").read_text())["step"] == 1
    assert "weights that are not finite; not saved" in capsys.readouterr().out


def test_spikes_are_logged_and_change_nothing(train, spoil, monkeypatch):
    """Red when spikes() compares with the mean that the spike itself moves, or when a spike is skipped as bad."""
    monkeypatch.setattr(guard, "WINDOW", 8)
    spoil({12}, 3.0)
    train("spike", num_iterations=14)
    spikes = [line for line in metrics("spike") if line.get("event") == "spike"]
    assert [line["step"] for line in spikes] == [12]
    assert spikes[0]["usual"]["loss"] < spikes[0]["loss"] / 2
    assert metrics("spike")[-1]["event"] == "done"


# ---------------------------------------------------------------------------------------------------------------------
# no memory


@pytest.fixture
def no_memory_above(monkeypatch):
    """no_memory_above(rows, from_call): forward passes of more rows find no memory, from the n-th training one on."""
    real = nanochat.gpt.chunked_cross_entropy

    def limit(rows: int, from_call: int = 0, error: Exception | None = None) -> None:
        calls = iter(range(10**6))

        def loss(x, weight, targets, *rest):
            if torch.is_grad_enabled() and next(calls) >= from_call and len(x) > rows * TINY["max_seq_len"]:
                raise error or torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            return real(x, weight, targets, *rest)

        monkeypatch.setattr(nanochat.gpt, "chunked_cross_entropy", loss)

    return limit


def test_oom_halving(train, no_memory_above, capsys):
    """12 rows, then 6, then 3: bit for bit the run that had 3 from the start.

    Red when the gradients of the failed try are kept, when the loader moves on to the next batch, or when only the
    failing half is taken again.
    """
    train("small", device_batch_size=3, num_iterations=6)
    for tag, error in (("gpu", None), ("cpu", RuntimeError("DefaultCPUAllocator: can't allocate memory"))):
        no_memory_above(4, error=error)
        train(tag, device_batch_size=12, num_iterations=6)
        assert state_hashes(tag, 6) == state_hashes("small", 6)
        assert losses(tag) == losses("small")
        halved = [line["device_batch_size"] for line in metrics(tag) if line.get("event") == "oom"]
        assert halved == [6, 3]
        assert (
            checkpoint_files.read_metadata(checkpoint_files.step_dir(tag_dir(tag), 6))["settings"]["device_batch_size"]
            == 3
        )
    assert "out of memory: continuing with 3 rows x 4 micro-batches" in capsys.readouterr().out

    no_memory_above(4, from_call=5)  # in the middle of step 3, 2 micro-batches a step
    train("late", device_batch_size=6, num_iterations=6)
    assert losses("late") == pytest.approx(losses("small"), rel=1e-5)
    assert [line["step"] for line in metrics("late") if line.get("event") == "oom"] == [2]

    no_memory_above(0)
    with pytest.raises(UserError, match="out of memory with a single row of max_seq_len=64"):
        train("never", num_iterations=2)
    no_memory_above(10**6)


def test_no_memory_outside_of_forward_and_backward_names_the_batch_that_fits(train, monkeypatch):
    """Red when the optimizer's step is tried again: half of the weights would be updated twice."""

    def starved(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(base_train.schedule, "clip_scale", starved)
    with pytest.raises(UserError, match=r"device_batch_size=4, .*--resume --device_batch_size=2 \(CUDA out of memory"):
        train("optimizer")


# ---------------------------------------------------------------------------------------------------------------------
# several ranks

# Rank 1 alone has no memory for 4 rows at its third step, and a NaN at its fifth.
UNLUCKY = """
import os, torch, nanochat.gpt
from nanochat.runtime import run_script
from scripts.base_train import main

real, calls = nanochat.gpt.chunked_cross_entropy, iter(range(10**6))

def loss(x, weight, targets, *rest):
    value = real(x, weight, targets, *rest)
    if not torch.is_grad_enabled() or os.environ["RANK"] != "1":
        return value
    call = next(calls)
    if call == 2:
        raise torch.OutOfMemoryError("CUDA out of memory.")
    return value * float("nan") if call == 6 else value

nanochat.gpt.chunked_cross_entropy = loss
run_script(main)
"""


def test_what_one_rank_meets_all_ranks_agree_on(train, base, corpus, tmp_path, spoil):
    """One of two ranks runs out of memory, later it meets a NaN: both halve, both leave the step out.

    Red when `compute.any_rank` is left out (the ranks wait in different collectives), or when a rank looks at its own
    loss only (their weights would drift apart).
    """
    shape = {"num_iterations": 8, "device_batch_size": 6, "muon_dtype": "float32"}
    calls = {"one": 0}
    real = nanochat.gpt.chunked_cross_entropy  # of one rank: 2 micro-batches of 6 a step

    def loss(x, weight, targets, *rest):
        value = real(x, weight, targets, *rest)
        if torch.is_grad_enabled():
            calls["one"] += 1
            return value * math.nan if calls["one"] in (7, 8) else value  # step 4
        return value

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nanochat.gpt, "chunked_cross_entropy", loss)
        train("lucky", **shape)
    script = tmp_path / "unlucky.py"
    script.write_text(textwrap.dedent(UNLUCKY))
    words = flags({"data": corpus, **TINY, **shape, "model_tag": "unlucky"})
    process = start(base, *words, ranks=2, script=script)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 0, output
    events = [(line["step"], line["event"]) for line in metrics("unlucky") if line.get("event") in ("oom", "skip")]
    assert events == [(2, "oom"), (4, "skip")]
    assert [x for x in losses("unlucky") if x != "nan"] == pytest.approx(
        [x for x in losses("lucky") if x != "nan"], rel=1e-5
    )


def test_rank_death(train, base, corpus):
    """SIGKILL of one of two ranks: with --max_restarts the same run resumes by itself; without, the job ends and names
    the rank.

    Red when run_script lets gloo's error speak alone, or when a restart does not imply --resume.
    """
    shape = {**SMALLER, "device_batch_size": 3, "muon_dtype": "float32", "save_every": 5}
    train("whole", **shape, num_iterations=20)
    long = {**TINY, **shape, "data": corpus, "num_iterations": 100_000, "model_tag": "dies"}
    process = start(base, *flags(long), ranks=2, restarts=1)
    wait_for_step("dies", 5, process)
    first = children(process)[1]
    os.kill(first, signal.SIGKILL)
    wait_for(lambda: "resume" in metrics("dies", "event"), process)
    resumed = metrics("dies")[-1]["step"]
    wait_for_step("dies", 5 * (resumed // 5 + 3), process)
    second = children(process)[1]
    os.kill(second, signal.SIGKILL)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 1
    assert first != second
    assert f"error: rank 1 (process {second} on " in output
    assert "died: rank 0 cannot continue" in output
    assert losses("dies")[:20] == pytest.approx(losses("whole"), rel=1e-4)


def test_double_start(train, base, corpus):
    """A second start of the same tag is refused with process and host; a killed one's lock is recognised as stale.

    Red when main() takes no lock, or when the lock file alone counts as somebody at work.
    """
    words = flags({"data": corpus, **TINY, "num_iterations": 100_000, "save_every": 5, "keep_last": 2})
    train("warm3", num_iterations=1)
    first = start(base, *words, "--model_tag=twice")
    wait_for_step("twice", 5, first)
    with pytest.raises(UserError, match=rf"'twice' is being trained by process {first.pid} on .*--ignore_lock=True"):
        main(["--model_tag=twice", "--resume"])
    with pytest.raises(UserError, match="is being trained by"):
        train("twice", overwrite=True)  # would move the folder from under it
    assert first.poll() is None
    first.kill()
    first.wait()
    step = cm.newest_step(tag_dir("twice"))
    assert main(["--model_tag=twice", "--resume", f"--num_iterations={step + 2}"])["step"] == step + 2
    assert not list(cm.checkpoints_dir().glob(".twice.lock"))


def test_a_model_that_does_not_fit_is_one_line(train, monkeypatch, capsys):
    """Red when an OutOfMemoryError before the first step leaves main() as a traceback."""

    def starved(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 90 GiB")

    monkeypatch.setattr(base_train, "build_optimizer", starved)
    assert exit_code(lambda: train("large")) == 2
    assert "a smaller model fits (CUDA out of memory" in capsys.readouterr().err


def test_a_second_copy_of_a_signal_does_not_cut_the_end_off(train, stop_after, monkeypatch):
    """The launcher's copy comes after the save. Red when the signals' handlers go before the last line is written."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job")
    stop_after(2)
    real, sent = base_train.peak_flops, []

    def late(compute):
        if sent or metrics("late-copy"):
            os.kill(os.getpid(), signal.SIGTERM)
            sent.append(1)
        return real(compute)

    train("late-copy-warm", num_iterations=1)
    (tag_dir("late-copy")).mkdir(parents=True)
    (tag_dir("late-copy") / "metrics.jsonl").touch()
    monkeypatch.setattr(base_train, "peak_flops", late)
    assert train("late-copy", "--resume", num_iterations=4)["stopped"] == "preempted"
    assert sent
    assert metrics("late-copy", "event")[-1] == "preempted"
