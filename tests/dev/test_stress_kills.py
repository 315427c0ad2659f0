"""Kills of the real training script at the worst moments, and the checker's own eyes: it must see what is broken."""

import copy
import random
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

from scripts.stress import kills
from scripts.stress.kills import BEFORE_RENAME, Bench, Plan, PromiseBroken, Tally, dealt, planned, steps_in, table
from tests.forked import Forked

CHILD = """
import sys
from nanochat import checkpoint_files
from nanochat import checkpoint_manager as checkpoints
{harm}
from scripts.stress.kills import child
child(sys.argv[1:])
"""
IN_PLACE = """
checkpoints.os.rename = lambda old, new: None
plain = checkpoints.Path.with_name
checkpoints.Path.with_name = lambda path, name: path if ".tmp-" in name else plain(path, name)
"""
PRUNES_FIRST = """
save, prune = checkpoints.save_checkpoint, checkpoint_files.prune
def save_checkpoint(folder, *args, **kwargs):
    prune(folder, 1)
    return save(folder, *args, **kwargs)
checkpoints.save_checkpoint = save_checkpoint
"""


def child(path: Path, harm: str = "") -> tuple[str, ...]:
    """The command of a watched start, of code that was harmed."""
    path.write_text(CHILD.format(harm=harm))
    return sys.executable, str(path)


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> Iterator[Bench]:
    """12 steps, a save every 2, in forks: the reference has run, undisturbed."""
    folder = tmp_path_factory.mktemp("kills").resolve()
    with pytest.MonkeyPatch.context() as patch:
        forks = SimpleNamespace(Popen=Forked, STDOUT=subprocess.STDOUT, TimeoutExpired=subprocess.TimeoutExpired)
        patch.setattr(kills, "subprocess", forks)
        yield Bench(folder, steps=12, save_every=2, child=child(folder / "child.py"))


@pytest.fixture
def finished(bench, tmp_path) -> Path:
    """A copy of the reference's folder."""
    return shutil.copytree(bench.folder("reference"), tmp_path / "run")


def test_kill9(bench):
    """Killed in the very first save, around the rename, inside a prune, in half a line, the run ends as if it had not.

    Red with `os.rename(temporary, final)` before write_manifest() in save_checkpoint, with `shutil.rmtree(folder)`
    instead of the renamed `doomed` in prune, and with `if True` for the condition on lines in MetricsLog.
    """
    hands = [
        {"save write model.safetensors middle": 1, "save rename step_ after": 1, "main write metrics.jsonl middle": 2},
        {BEFORE_RENAME: 1, "save unlink optimizer.safetensors before": 1, "prune unlink manifest.json after": 1},
    ]
    plans = [[Plan(point, nth) for point, nth in hand.items()] for hand in hands]
    with ThreadPoolExecutor(2) as pool:
        tallies = list(pool.map(bench.run, ("run0", "run1"), plans))
    assert [tally.failure for tally in tallies] == ["", ""]
    assert [[plan for _, plan in tally.kills] for tally in tallies] == plans
    assert [phase for phase, _ in tallies[0].kills + tallies[1].kills] == [
        "save",
        "save",
        "training",
        "save",
        "save",
        "prune",
    ]
    assert [(tally.starts, tally.lost, tally.damaged, tally.equal) for tally in tallies] == [(4, 0, 0, True)] * 2


def test_a_checkpoint_manager_that_breaks_the_promise_is_seen(bench, tmp_path):
    """Red when check_disk looks at no damage, or counts no lost steps."""
    cases = {
        "in place": (IN_PLACE, Plan("save write model.safetensors middle"), "damaged steps 2: manifest.json is missi"),
        "prunes first": (PRUNES_FIRST, Plan(BEFORE_RENAME, nth=3), "steps [2] are lost: [2, 4] were there, now [4]"),
    }

    def run(number: int, harm: str, plan: Plan) -> Tally:
        harmed = copy.copy(bench)
        harmed.child = child(tmp_path / f"child{number}.py", harm)
        return harmed.run(f"harmed{number}", [plan])

    with ThreadPoolExecutor(2) as pool:
        tallies = list(pool.map(run, range(2), *list(zip(*cases.values(), strict=True))[:2]))
    for (_, plan, told), tally in zip(cases.values(), tallies, strict=True):
        assert told in tally.failure
        assert f"kill 1, {plan}" in tally.failure
    assert [(tally.damaged, tally.lost, tally.equal) for tally in tallies] == [(1, 0, False), (0, 1, False)]


def test_a_disk_that_is_not_as_it_must_be_is_told(bench, finished):
    """Red for each of the checks of check_disk that is left out."""
    steps, tally = steps_in(finished), Tally()
    assert bench.check_disk(finished, steps, [], tally) == steps == {2, 4, 6, 8, 10, 12}
    renamed = [["0.0", "12", "save", "rename", "step_", spot] for spot in ("before", "after")]
    assert bench.check_disk(finished, steps - {12}, renamed, tally) == steps
    newest, second = finished / "step_000012", finished / "step_000010"

    def told(match: str, before: set[int] = steps, log: list = renamed) -> None:
        with pytest.raises(PromiseBroken, match=match):
            bench.check_disk(finished, before, log, tally)

    told(r"steps \[12\] came otherwise", steps - {12}, [])
    for name, half, match in (("config.py", b"depth = ", "half a config.py"), ("metrics.jsonl", b'{"st', "torn")):
        whole = (finished / name).read_bytes()
        (finished / name).write_bytes(half + b"\n" + whole)
        told(match)
        (finished / name).write_bytes(whole + half * (name == "metrics.jsonl"))  # a torn last line is no fault
    assert bench.check_disk(finished, steps, [], tally) == steps
    (finished / "step_000008.bad-1").mkdir()
    told("taken for damaged: step_000008.bad-1")
    (finished / "step_000008.bad-1").rmdir()
    shutil.rmtree(newest)
    told(r"steps \[12\] are lost", steps - {12})
    shutil.copytree(second, newest)
    told("step 12 differs from the undisturbed run's", steps - {12})
    assert (tally.damaged, tally.lost) == (1, 1)


def test_a_start_that_goes_on_elsewhere_is_told(bench):
    """Red when check_beginning compares the number of starts alone."""
    tally = Tally()
    bench.check_beginning([], [("start", 0)], 0, -9, tally)
    bench.check_beginning([("start", 0)], [("start", 0), ("resume", 4)], 4, -9, tally)
    bench.check_beginning([("start", 0)], [("start", 0)], 4, -9, tally)  # killed before it said so
    bench.check_beginning([("start", 0)], [("start", 0)], 12, 0, tally)  # finished already
    assert tally.resumed == 2
    for now, newest, code in (([("resume", 2)], 4, -9), ([("start", 0)], 2, -9), ([], 4, 0)):
        with pytest.raises(PromiseBroken, match=r"the newest step was|where it began"):
            bench.check_beginning([], now, newest, code, tally)


def test_an_end_that_differs_is_told(bench, finished):
    """Red when story() leaves out the losses, or the optimizer."""
    bench.check_end(finished)
    whole = (finished / "metrics.jsonl").read_text()
    (finished / "metrics.jsonl").write_text(whole.replace('"tokens": 512,', '"tokens": 513,'))
    with pytest.raises(PromiseBroken, match="losses differ"):
        bench.check_end(finished)
    (finished / "metrics.jsonl").write_text(whole)
    shutil.copy(finished / "step_000010" / "optimizer.safetensors", finished / "step_000012" / "optimizer.safetensors")
    with pytest.raises(PromiseBroken, match="weights and optimizer differ"):
        bench.check_end(finished)


def test_plans_come_from_the_seed_and_most_strike_inside_a_save_or_prune():
    """Red when fewer than half of the kills are planned there, or a point is never visited."""
    names = [
        f"{phase} write file{n} {spot}"
        for phase in ("save", "prune", "main")
        for n in range(9)
        for spot in ("before", "middle")
    ]
    points = Counter(dict.fromkeys(names, 5))
    plans, again, other = (planned(random.Random(seed), 200, points, 3.0, 0.5) for seed in (7, 7, 8))
    assert plans == again != other
    assert len(plans) == 200
    inside = [plan.point for plan in plans if plan.point.startswith(("save", "prune"))]
    assert len(inside) == 120
    assert set(inside) == {name for name in names if not name.startswith("main")}
    clearing = Plan("save rmdir tokenizer before")
    hands = dealt([*plans, clearing], 12)
    assert [plan for hand in hands for plan in hand] == [*plans, Plan(BEFORE_RENAME), clearing]
    assert max(map(len, hands)) <= 13
    assert dealt([plans[0], Plan("main rename metrics.jsonl before")], 12, again=True)[0][-2] == Plan(BEFORE_RENAME)


def test_the_table_counts_by_phase_and_kind():
    kills = [("save", Plan("save write model.safetensors middle")), ("prune", Plan(delay=1.0)), ("training", Plan())]
    out = "\n".join(table([Tally(kills, starts=4, resumed=3, equal=True), Tally(lost=2)], Counter("abcd")))
    for line in (
        "save                     1           0           1",
        "prune                    0           1           1",
        "inside a save or prune: 2 of 3 (67%)",
        "points struck: 1 different ones of 4",
        "write                    0           1           0",
        "steps lost: 2; damaged folders: 0",
        "NO (1 of 2 runs)",
    ):
        assert line in out
