"""Do the tests see small mistakes in the core? Draws mutants of it and runs each against its module's tests.

`python -m scripts.stress.mutations [--number 300] [--seed 0] [--results FILE] [--workers 2]`: each mutant is written
into a copy of this tree, then the module's tests run until one fails, the fastest first. A mutant that no test sees
has survived; one whose tests take far longer than without it counts as killed ("timeout"). A process that has imported
torch once forks for each, so that no mutant pays for it. Results go to a file; a run that was stopped continues from
it. A mutant is run again when its module or the tests have changed (--trust_kills: only survivors are).

Exit code 1 when fewer than 85% are killed. Not counted: those in dev/equivalent_mutants.jsonl, {"id", "reason"} a line,
which change nothing that anybody could observe.
"""

import argparse
import hashlib
import importlib
import json
import os
import shutil
import signal
import sys
import tempfile
import time
import types
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from nanochat.runtime import run_script
from nanochat.system.environment import UserError
from scripts.stress.mutants import Mutant, draw

ROOT = Path(__file__).resolve().parents[2]
# The tests of each module, fast ones first.
TESTS = {
    "nanochat/training/guard.py": ["training/test_guard"],
    "nanochat/training/schedule.py": ["training/test_schedule"],
    "nanochat/optim.py": ["test_optim", "conversion/test_tying", "model/test_routing"],
    "nanochat/evaluation/bpb.py": ["evaluation/test_bpb", "data/test_packing", "scripts/test_base_eval"],
    "nanochat/evaluation/core.py": ["evaluation/test_core"],
    "nanochat/checkpoint_files.py": ["test_checkpoint_manager", "system/test_storage_errors", "system/test_temporary"],
    "nanochat/checkpoint_manager.py": [
        "test_checkpoint_manager",
        "system/test_storage_errors",
        "system/test_temporary",
        "upstream/test_eras",
    ],
    "scripts/base_train.py": [
        "test_updates",
        "test_going_on",
        "scripts/test_base_train",
        "test_recovery",
        "training/test_rank_agreement",
    ],
    "nanochat/training/step_saver.py": ["training/test_step_saver", "test_going_on"],
}
# Compiles whole models for a minute, which few mutants would be seen by alone.
DESELECTED = ("tests/scripts/test_base_train.py::test_compiled_runs_resume_to_the_bit_and_agree_with_eager",)
PRELOADED = (
    "torch",
    "torch._dynamo.testing",
    "torch._inductor.config",
    "torch.distributed.launcher.api",
    "numpy",
    "pyarrow.parquet",
    "tiktoken",
    "tokenizers",
    "safetensors.torch",
    "rich.progress",
    "hypothesis.strategies",
    "pytest",
)
SLOW_S = 2.0  # seconds; mostly tests that start processes
GOAL = 0.85
MARK = "NANOCHAT_MUTATION_RUN"  # an environment variable that every process of a run inherits
PATIENCE, PATIENCE_S = 3.0, 30.0  # a mutant's time limit: so many times what its tests took unchanged, and so long more


# ---------------------------------------------------------------------------------------------------------------------
# one run of tests in a forked process


class _Watch:
    """A pytest plugin: slow tests last, quick ones of a file first; notes what each took and which one failed."""

    def __init__(self, seconds: dict[str, float]):
        self.before, self.seconds, self.failed = seconds, {}, None

    def pytest_collection_modifyitems(self, items: list) -> None:
        files = list(dict.fromkeys(item.path for item in items))

        def place(item) -> tuple:
            seconds = self.before.get(item.nodeid, 0.0)
            return seconds > SLOW_S, files.index(item.path), seconds

        items.sort(key=place)

    def pytest_collectreport(self, report) -> None:
        if report.failed and self.failed is None:
            self.failed = f"collecting {report.nodeid}"

    def pytest_runtest_logreport(self, report) -> None:
        self.seconds[report.nodeid] = self.seconds.get(report.nodeid, 0.0) + report.duration
        if report.failed and self.failed is None:
            self.failed = report.nodeid


def run_tests(tree: Path, tests: list[str], seconds: dict[str, float], report: Path, mark: str) -> None:
    """In a fork: pytest over the files `tests` of `tree` until one fails; writes {"failed", "seconds"} to `report`."""
    os.setsid()
    output = os.open(report.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for standard in (1, 2):
        os.dup2(output, standard)
    sys.stdout, sys.stderr = (os.fdopen(os.dup(number), "w") for number in (1, 2))
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for name in [name for name in sys.modules if name.partition(".")[0] in ("nanochat", "scripts", "tests")]:
        del sys.modules[name]  # they are this tree's, not the mutant's
    sys.modules["__main__"] = types.ModuleType("__main__")  # processes that the tests start must not import us
    sys.path[:] = [str(tree), *(path for path in sys.path if path not in ("", str(ROOT), str(tree)))]
    sys.argv = ["pytest"]
    os.environ |= {MARK: mark, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(tree), "TMPDIR": str(report.parent)}
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # looking for them takes longer than most mutants
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(tree.parent / "inductor")  # what is compiled alike is compiled once
    tempfile.tempdir = None
    os.chdir(tree)
    import pytest

    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
    watch = _Watch(seconds)
    words = ["-x", "-q", "-p", "no:cacheprovider", f"--rootdir={tree}", *tests]
    words += [f"--deselect={name}" for name in DESELECTED]
    code = pytest.main(words, plugins=[watch])
    if code and watch.failed is None:
        watch.failed = f"pytest ended with {int(code)}"
    report.write_text(json.dumps(dict(failed=watch.failed, seconds=watch.seconds)), encoding="utf-8")


def kill_all(mark: str, pid: int) -> None:
    """End what a run has started: its session, and processes with sessions of their own that inherited its mark."""
    with suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    wanted = f"{MARK}={mark}".encode()
    for place in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):
            if wanted in place.read_bytes().split(b"\0"):
                os.kill(int(place.parent.name), signal.SIGKILL)


@dataclass
class Task:
    """Tests to be run on a mutant, or on the module as it is (mutant None)."""

    file: str
    mutant: Mutant | None
    limit: float  # seconds


@dataclass
class Tree:
    """A copy of the checkout that one worker changes, and the fork that is at work in it."""

    folder: Path
    task: Task | None = None
    pid: int = 0
    mark: str = ""
    begun: float = 0.0
    scratch: Path = field(init=False)

    def __post_init__(self):
        self.scratch = self.folder.with_name(self.folder.name + "-scratch")

    def write(self, file: str, source: bytes) -> None:
        """Change a module; what Python compiled of it has to go, since its time stamp counts whole seconds."""
        path = self.folder / file
        for compiled in path.parent.glob(f"__pycache__/{path.stem}.*.pyc"):
            compiled.unlink()
        path.write_bytes(source)

    def start(self, task: Task, source: bytes, tests: list[str], seconds: dict[str, float]) -> None:
        self.write(task.file, task.mutant.apply(source) if task.mutant else source)
        shutil.rmtree(self.scratch, ignore_errors=True)
        self.scratch.mkdir()
        self.task, self.begun, self.mark = task, time.monotonic(), f"{os.getpid()}-{self.folder.name}-{time.time_ns()}"
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            code = 70
            try:
                run_tests(self.folder, tests, seconds, self.scratch / "report.json", self.mark)
                code = 0
            finally:
                os._exit(code)

    def poll(self) -> dict | None:
        """What became of the task, when it has ended or its time is over: {"failed", "seconds", "timeout", "took"}."""
        took = time.monotonic() - self.begun
        ended, _ = os.waitpid(self.pid, os.WNOHANG)
        if not ended and took < self.task.limit:
            return None
        kill_all(self.mark, self.pid)
        if not ended:
            os.waitpid(self.pid, 0)
        report = self.scratch / "report.json"
        try:
            found = json.loads(report.read_text(encoding="utf-8"))
        except FileNotFoundError:  # ended by the mutant itself, or by us
            found = dict(failed="the time limit" if not ended else "the process of the tests", seconds={})
        return found | dict(timeout=not ended, took=round(took, 1))


# ---------------------------------------------------------------------------------------------------------------------
# all runs


class Check:
    """Runs mutants of the files in `tests` (test files by module) on copies of `root`."""

    def __init__(self, root: Path, tests: dict[str, list[str]], results: Path, workers: int, work: Path):
        self.root, self.tests, self.results = root, tests, results
        self.sources = {file: (root / file).read_bytes() for file in tests}
        for name in (name for names in tests.values() for name in names if not (root / name).is_file()):
            raise UserError(f"there is no {name} in {root}")
        self.seconds: dict[str, dict[str, float]] = {}  # of each test, by module, unchanged
        self.limits: dict[str, float] = {}
        self.trees = [Tree(work / f"tree{number}") for number in range(workers)]
        ignored = shutil.ignore_patterns(".git", ".venv*", "__pycache__", ".*_cache", "*.egg-info")
        for tree in self.trees:
            shutil.copytree(root, tree.folder, ignore=ignored, symlinks=True)

    def state(self, file: str) -> str:
        """A hash of a module and its tests: results of another state do not count."""
        parts = [self.sources[file], *((self.root / name).read_bytes() for name in self.tests[file])]
        return hashlib.sha256(b"\0".join(parts)).hexdigest()[:12]

    def have(self, drawn: list[Mutant], trust_kills: bool) -> dict[str, dict]:
        """The results that still hold, by the mutant's id."""
        if not self.results.exists():
            return {}
        states = {file: self.state(file) for file in self.sources}
        lines = map(json.loads, self.results.read_text(encoding="utf-8").splitlines())
        ids = {mutant.id for mutant in drawn}
        latest = {line["id"]: line for line in lines if line["id"] in ids}
        return {
            name: line
            for name, line in latest.items()
            if line["state"] == states[line["file"]] or (trust_kills and line["outcome"] != "survived")
        }

    def run(self, drawn: list[Mutant], trust_kills: bool = False) -> dict[str, dict]:
        """Do what is missing; returns the result of each mutant by id."""
        found = self.have(drawn, trust_kills)
        missing = [mutant for mutant in drawn if mutant.id not in found]
        print(f"{len(drawn)} mutants, {len(found)} there already", flush=True)
        baselines = [Task(file, None, 3600.0) for file in self.tests if any(m.file == file for m in missing)]
        for task, result in self._work(baselines):
            if result["failed"]:
                log = self._log(task)
                raise UserError(f"{task.file} unchanged: {result['failed']} fails, so its tests cannot tell:\n{log}")
            self.seconds[task.file] = result["seconds"]
            self.limits[task.file] = PATIENCE * result["took"] + PATIENCE_S
            print(f"{task.file} unchanged: {len(result['seconds'])} tests, {result['took']:.0f} s", flush=True)
        number = len(found)
        for task, result in self._work([Task(m.file, m, self.limits[m.file]) for m in missing]):
            mutant, number = task.mutant, number + 1
            outcome = "timeout" if result["timeout"] else "killed" if result["failed"] else "survived"
            line = dict(
                id=mutant.id,
                file=mutant.file,
                line=mutant.line,
                kind=mutant.kind,
                old=mutant.old,
                new=mutant.new,
                outcome=outcome,
                by=result["failed"],
                seconds=result["took"],
                state=self.state(mutant.file),
            )
            with open(self.results, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            found[mutant.id] = line
            where = f"{mutant.file}:{mutant.line}"
            print(f"{number}/{len(drawn)} {outcome} {result['took']:.0f} s {where} {mutant.kind}", flush=True)
        return found

    def _log(self, task: Task) -> str:
        tree = next(tree for tree in self.trees if tree.task is task)
        return (tree.scratch / "report.log").read_text(encoding="utf-8", errors="replace")[-2000:]

    def _work(self, tasks: list[Task]) -> Iterator[tuple[Task, dict]]:
        """Each task with its result, as they end; one at a time in each tree."""
        waiting, busy = deque(tasks), []
        try:
            while waiting or busy:
                for tree in self.trees:
                    if waiting and tree not in busy:
                        task = waiting.popleft()
                        seconds = self.seconds.get(task.file, {})
                        tree.start(task, self.sources[task.file], self.tests[task.file], seconds)
                        busy.append(tree)
                time.sleep(0.02)
                for tree in [*busy]:
                    result = tree.poll()
                    if result is not None:
                        busy.remove(tree)
                        tree.write(tree.task.file, self.sources[tree.task.file])
                        yield tree.task, result
        finally:
            for tree in busy:
                kill_all(tree.mark, tree.pid)


# ---------------------------------------------------------------------------------------------------------------------
# the report


def equivalents(path: Path) -> dict[str, str]:
    """The reason by mutant's id; UserError where a line lacks one."""
    if not path.exists():
        return {}
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    for line in lines:
        if not line.get("id") or not str(line.get("reason", "")).strip():
            raise UserError(f"{path}: each line needs an id and a reason, not {json.dumps(line)[:80]}")
    return {line["id"]: line["reason"] for line in lines}


def share_killed(drawn: list[Mutant], found: dict[str, dict], reasons: dict[str, str]) -> float:
    """Killed or timed out, of all that are not equivalent."""
    counted = [found[m.id]["outcome"] != "survived" for m in drawn if m.id not in reasons]
    return sum(counted) / max(1, len(counted))


def report(drawn: list[Mutant], found: dict[str, dict], reasons: dict[str, str], sources: dict) -> list[str]:
    """A table by module, the survivors with what they change, and the equivalent ones with the reason."""
    heads = ("module", "drawn", "killed", "timeout", "survived", "equivalent", "killed of the rest")
    out = ["", f"| {' | '.join(heads)} |", "| --- " * len(heads) + "|"]
    for file in [*dict.fromkeys(sorted(m.file for m in drawn)), None]:
        some = [m for m in drawn if file in (None, m.file)]
        counts = Counter("equivalent" if m.id in reasons else found[m.id]["outcome"] for m in some)
        cells = [len(some), *(counts[head] for head in heads[2:6]), f"{share_killed(some, found, reasons):.1%}"]
        out.append(f"| {file or 'all'} | {' | '.join(map(str, cells))} |")
    for title, wanted in (("survived", False), ("equivalent", True)):
        for m in drawn:
            if (m.id in reasons) == wanted and (wanted or found[m.id]["outcome"] == "survived"):
                why = f" ({reasons[m.id]})" if wanted else ""
                out += ["", f"{title}: {m.id} {m.file}:{m.line} in {m.function}, {m.kind}{why}"]
                out += m.diff(sources[m.file])
    if wrong := [m.id for m in drawn if m.id in reasons and found[m.id]["outcome"] != "survived"]:
        out += ["", f"called equivalent, but a test sees them: {', '.join(wrong)}"]
    return out


def parsed(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts.stress.mutations", description=__doc__.splitlines()[0])
    parser.add_argument("--number", type=int, default=300, help="mutants to draw; fewer are the first of more")
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    parser.add_argument("--results", type=Path, default=Path("dev/mutations.jsonl"))
    parser.add_argument("--equivalent", type=Path, default=ROOT / "dev" / "equivalent_mutants.jsonl")
    parser.add_argument("--workers", type=int, default=max(1, os.cpu_count() or 1))
    parser.add_argument("--trust_kills", action="store_true", help="run again only what has survived so far")
    parser.add_argument("--only", action="append", default=[], help="of the draw, these modules alone; repeatable")
    parser.add_argument("--root", type=Path, default=ROOT, help="the tree that is copied")
    parser.add_argument("--module", action="append", default=[], help="FILE:TEST,TEST in place of the core; repeatable")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> dict[str, dict]:
    """Run the mutants that are missing, print the report; exit code 1 under the goal."""
    arguments = parsed(argv)
    if arguments.number < 1 or arguments.workers < 1:
        raise UserError("--number and --workers are 1 or more")
    if arguments.module:
        pairs = [word.partition(":") for word in arguments.module]
        tests = {file: names.split(",") for file, _, names in pairs}
    else:
        tests = {file: [f"tests/{name}.py" for name in names] for file, names in TESTS.items()}
    if missing := [file for file in [*tests, *arguments.only] if not (arguments.root / file).is_file()]:
        raise UserError(f"there is no {missing[0]} in {arguments.root}")
    drawn = draw({file: (arguments.root / file).read_bytes() for file in tests}, arguments.number, arguments.seed)
    drawn = [mutant for mutant in drawn if not arguments.only or mutant.file in arguments.only]
    reasons = equivalents(arguments.equivalent)
    for name in PRELOADED if not arguments.module else ("pytest",):
        importlib.import_module(name)
    work = Path(tempfile.mkdtemp(prefix="nanochat-mutants-"))
    try:
        check = Check(arguments.root.resolve(), tests, arguments.results.resolve(), arguments.workers, work)
        found = check.run(drawn, arguments.trust_kills)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    print("\n".join(report(drawn, found, reasons, check.sources)))
    if share_killed(drawn, found, reasons) < GOAL:
        print(f"fewer than {GOAL:.0%} are killed")
        sys.exit(1)
    return found


if __name__ == "__main__":
    os.environ |= {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}  # before torch: no threads to fork
    run_script(main)
