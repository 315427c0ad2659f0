"""Ranks that would train different things end together, in one line that names rank, host and values."""

import platform
import shutil
import textwrap
import threading

import pytest
import torch

from nanochat import checkpoint_manager as cm
from nanochat.system.environment import SharedError
from nanochat.training.rank_agreement import Meeting, refuse_differences, source_hashes, weights_checksum
from tests.tiny_run import TINY, flags, start

APART = """
import os, sys
from nanochat.runtime import run_script
from scripts.base_train import main
rank = os.environ["RANK"]
os.environ["NANOCHAT_BASE_DIR"] += rank
run_script(lambda: main([word.replace("RANK", rank) for word in sys.argv[1:]]))
"""


@pytest.fixture(scope="module")
def apart(tmp_path_factory, corpus):
    """Two base folders, of rank 0 and rank 1, with the same run of 8 steps, saved at 4 and 8; and its script."""
    folder = tmp_path_factory.mktemp("apart")
    script = folder / "apart.py"
    script.write_text(textwrap.dedent(APART))
    words = flags({"data": corpus, **TINY, "num_iterations": 8, "save_every": 4, "device_batch_size": 3})
    process = start(folder / "base0", *words, "--model_tag=m")
    assert process.wait(120) == 0, process.communicate()[0]
    shutil.copytree(folder / "base0", folder / "base1")
    return folder, script


def together(apart, *words: str) -> tuple[int, str, list[str]]:
    """(exit code, all output, its lines that begin with error:) of both ranks, each with its base folder."""
    folder, script = apart
    process = start(folder / "base", "--model_tag=m", *words, ranks=2, script=script)
    output = process.communicate(timeout=170)[0]
    return process.returncode, output, [line for line in output.splitlines() if line.startswith("error: ")]


def test_a_rank_without_rank_0s_step_is_refused(apart):
    """Rank 1 lacks the newest step, or has another of that number; with that very step it trains.

    Red when launch() lets each rank resolve_run() for itself (8 against 4), or check_step() compares no manifests.
    """
    folder, _ = apart
    run = [folder / f"base{rank}" / "base_checkpoints" / "m" for rank in (0, 1)]
    run[1].joinpath("step_000008").rename(run[1] / "aside")
    code, output, errors = together(apart, "--resume", "--num_iterations=10")
    assert code != 0
    assert len(errors) == 1, output
    assert errors[0].startswith(f"error: rank 1 on {platform.node()}: rank 0 resumes from step 8, {run[1]}"), output
    assert "manifest.json is missing (steps there: [4])" in errors[0]
    assert metrics_of(run[0])[-1]["event"] == "done"  # nothing was trained

    shutil.copytree(run[1] / "step_000004", run[1] / "step_000008")
    code, output, errors = together(apart, "--resume", "--num_iterations=10")
    assert code != 0
    assert len(errors) == 1, output
    assert (
        "is not the step that rank 0 resumes from: model.safetensors, optimizer.safetensors, state.json differ"
        in errors[0]
    )

    shutil.rmtree(run[1] / "step_000008")
    run[1].joinpath("aside").rename(run[1] / "step_000008")
    shutil.copytree(run[1] / "step_000008", run[1] / "step_000009")  # its own newest is another
    code, output, _ = together(apart, "--resume", "--num_iterations=10")
    assert code == 0, output
    assert cm.newest_step(run[0]) == 10


def metrics_of(folder) -> list[dict]:
    import json

    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_other_settings_and_other_data_of_a_rank_are_refused(apart, corpus, tmp_path):
    """Red when begin() does not compare the settings, or loop() not the data."""
    words = flags({**TINY, "data": corpus, "device_batch_size": 3, "warmup_steps": "RANK", "model_tag": "other"})
    code, output, errors = together(apart, *[word for word in words if "model_tag" not in word], "--overwrite=True")
    assert code != 0
    assert len(errors) == 1, output
    assert f"warmup_steps is 0 on rank 0 and 1 on rank 1 ({platform.node()})" in errors[0]

    for rank in (0, 1):
        shutil.copytree(corpus, tmp_path / f"r{rank}" / "texts")
    story = tmp_path / "r1" / "texts" / "story 3.txt"
    story.write_text(story.read_text() + "\nthe cat runs then\n")
    folder, script = apart
    script.with_name("cd.py").write_text(
        script.read_text().replace("import os, sys", f"import os, sys\nos.chdir('{tmp_path}/r' + os.environ['RANK'])")
    )
    words = flags({**TINY, "data": "texts", "device_batch_size": 3})
    code, output, errors = together((folder, script.with_name("cd.py")), *words, "--overwrite=True")
    assert code != 0
    assert len(errors) == 1, output
    assert "the ranks do not agree on what to train: data_sha256" in errors[0]


def test_any_error_of_a_rank_reaches_the_others():
    """A bug on rank 0 keeps its type there, and the other rank ends at once; nobody waits for the time limit.

    Red when share() lets errors other than UserError pass before gather(): rank 1 would time out.
    """
    store, caught = torch.distributed.HashStore(), {}

    def run(rank: int, make) -> None:
        meeting = Meeting(20)
        meeting.rank, meeting.world_size, meeting.store = rank, 2, store
        try:
            meeting.share(make)
        except Exception as error:
            caught[rank] = error

    ranks = [threading.Thread(target=run, args=pair) for pair in enumerate((lambda: {}["lost"], lambda: None))]
    for thread in ranks:
        thread.start()
    for thread in ranks:
        thread.join()
    assert type(caught[0]) is KeyError
    assert type(caught[1]) is SharedError
    assert str(caught[1]) == "KeyError: 'lost'"


def test_differences_are_named_by_rank_and_cut_when_many():
    """Red when a name that one rank lacks is not compared."""
    reports = [{"host": "a", "facts": {"x": 1, "y": [1, 2]}}, {"host": "b", "facts": {"x": 1, "y": [1, 2]}}]
    refuse_differences("it", reports)
    reports[1]["facts"] = {"x": 1}
    with pytest.raises(SharedError, match=r"y is \[1, 2\] on rank 0 and None on rank 1 \(b\)"):
        refuse_differences("it", reports)
    reports[1]["facts"] = {str(n): n for n in range(99)}
    with pytest.raises(SharedError, match="97 more differ on rank 1") as caught:
        refuse_differences("it", reports)
    assert len(str(caught.value)) < 1000


def test_a_checksum_of_weights_sees_any_bit_and_any_order():
    """Red when only the sums of rows are taken (values exchanged within a row)."""
    weight = torch.arange(24.0).view(4, 6)
    whole = weights_checksum([("a", weight)])
    assert whole == weights_checksum([("a", weight.clone())])
    swapped = weight.clone()
    swapped[2, 1], swapped[2, 3] = weight[2, 3], weight[2, 1]
    flipped = weight.clone()
    flipped.view(torch.int32)[3, 3] ^= 1
    others = [weights_checksum([(name, t)]) for name, t in (("a", swapped), ("a", flipped), ("b", weight))]
    assert weights_checksum([("a", torch.tensor(1.0))]) != weights_checksum([("a", torch.tensor([2.0]))])
    assert len({whole, *others}) == 4
    assert {"nanochat/gpt.py", "scripts/base_train.py"} <= source_hashes().keys()
