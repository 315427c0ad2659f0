"""SIGKILL the training script again and again: does every next start go on where the disk says, to the same weights?

`python -m scripts.stress.kills [--kills 200] [--evaluation 20] [--seed 0] [--workers 2] [--steps N] [--mode
phases|random|evaluation]` trains a tiny model on a made-up corpus, with evaluation, CORE (a bundle of three items) and
samples: once undisturbed, then in runs that are killed and resumed until they are done.

phases: most kills strike right before, in the middle of or right after a file operation of a save, a prune, the logs,
config.py or the lock; the others at a random time; --evaluation further ones strike inside an evaluation, before one
of its forwards or a sample.  random: one long run, kills at random times only.  evaluation: those --evaluation alone.

After every kill the checker looks at the disk by itself: each step folder was put there by a rename and is whole, and
none is lost. The next start has to go on at the newest one. Losses, rows, figures of every evaluation, weights and
optimizer are those of the undisturbed run. Exit code 1 when any of this fails.
"""

import argparse
import builtins
import contextlib
import functools
import io
import json
import os
import platform
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from safetensors.torch import load_file

from nanochat import checkpoint_files
from nanochat import checkpoint_manager as checkpoints
from nanochat import data_pipeline as training_data
from nanochat.config.config_file import read_config
from nanochat.evaluation.core_bundle import Task, write_bundle
from nanochat.runtime import run_script
from nanochat.system.environment import UserError, base_dir
from scripts import base_train

KEEP_LAST = 2
SETTINGS = dict(
    vocab_size=300,
    depth=1,
    model_dim=32,
    head_dim=16,
    max_seq_len=32,
    total_batch_size=256,
    device_batch_size=8,
    compile=False,
    device_type="cpu",
    dtype="float32",
    eval_tokens=256,
    log_rows=True,
)
MODES = {
    "phases": dict(steps=40, save_every=2),
    "random": dict(steps=2000, save_every=20),
    "evaluation": dict(steps=40, save_every=2),
}
KILLS_PER_RUN = 12  # phases: of a run with 20 saves
ROUNDS = {"phases": 8, "random": 1, "evaluation": 8}  # more runs for kills whose run was done before they could strike
PHASES = ("start-up", "training", "save", "prune", "evaluate")
BEFORE_RENAME = "save rename step_ before"  # leaves all files of a step under a temporary name
HANGS = 600.0  # seconds after which a start counts as hung


# ---------------------------------------------------------------------------------------------------------------------
# in the child: the training script, its file operations logged, one of them deadly


def child(argv: list[str]) -> None:
    """Run scripts.base_train under a Watch. argv: log file, point ("" for none), its number, base_train's words."""
    log, point, nth, *words = argv
    Watch(log, point, int(nth)).install()
    run_script(lambda: base_train.main(words))


class Watch:
    """Logs "time step phase operation name spot" around each file operation of the run, and kills at a given one.

    phase: save, prune or evaluate, as the calling thread is in it, else main. name: the file's, without digits and
    host. spot: before, middle (half of the bytes are written) or after. The process dies right after the nth line that
    ends with `point`, which is "phase operation name spot".
    """

    def __init__(self, log: str, point: str, nth: int):
        self.log = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        self.point, self.left = point, nth
        self.thread = threading.local()

    def install(self) -> None:
        for name in ("mkdir", "unlink", "remove", "rmdir", "fsync", "ftruncate"):
            setattr(os, name, self.around(name, getattr(os, name)))
        for name in ("rename", "replace"):
            setattr(os, name, self.around("rename", getattr(os, name), path_at=1))
        os.pwrite = self.in_halves(os.pwrite)
        builtins.open = io.open = self.opening(open)
        checkpoint_files.save_file = self.saving(checkpoint_files.save_file)
        checkpoints.save_checkpoint = self.within("save", checkpoints.save_checkpoint)
        checkpoint_files.prune = self.within("prune", checkpoint_files.prune)
        training_data.bits_per_byte = self.evaluating(training_data.bits_per_byte)
        base_train.evaluate_suite = self.evaluating(base_train.evaluate_suite)
        base_train.print_samples = self.evaluating(base_train.print_samples)

    def note(self, operation: str, path, spot: str) -> None:
        path = os.path.realpath(f"/proc/self/fd/{path}") if isinstance(path, int) else str(path)
        phase = getattr(self.thread, "phase", "main")
        if phase == "main" and not path.startswith(str(base_dir())):
            return
        name = re.sub(r"\d+", "", os.path.basename(path).replace(platform.node(), ""))
        line = f"{phase} {operation} {name} {spot}"
        os.write(self.log, f"{time.time():.3f} {getattr(self.thread, 'step', 0)} {line}\n".encode())
        if line == self.point:
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    def around(self, operation: str, function, path_at: int = 0):
        @functools.wraps(function)
        def noted(*args, **kwargs):
            self.note(operation, args[path_at], "before")
            result = function(*args, **kwargs)
            self.note(operation, args[path_at], "after")
            return result

        return noted

    def within(self, phase: str, function):
        @functools.wraps(function)
        def noted(folder, step, *args, **kwargs):
            if phase == "save":
                self.thread.step = step
            self.thread.phase = phase
            try:
                return self.around("call", function)(folder, step, *args, **kwargs)
            finally:
                self.thread.phase = "main"

        return noted

    def evaluating(self, function):
        """The phase evaluate, with a point before each forward, where an evaluation asks whether to stop."""

        @functools.wraps(function)
        def noted(*args, **options):
            name = function.__name__
            if "stop" in options:
                stop = options["stop"]
                options["stop"] = lambda: (self.note("forward", name, "before"), stop())[1]
            self.thread.phase = "evaluate"
            self.note("call", name, "before")
            try:
                return function(*args, **options)
            finally:
                self.note("call", name, "after")
                self.thread.phase = "main"

        return noted

    def in_halves(self, pwrite):
        def noted(handle: int, data: bytes, offset: int) -> int:
            half = len(data) // 2
            self.note("write", handle, "before")
            written = pwrite(handle, data[:half], offset)
            self.note("write", handle, "middle")
            written += pwrite(handle, data[half:], offset + half)
            self.note("write", handle, "after")
            return written

        return noted

    def opening(self, opener):
        @functools.wraps(opener)
        def opened(path, mode="r", *args, **kwargs):
            file = opener(path, mode, *args, **kwargs)
            return InHalves(self, file, path) if set(mode) & set("wax+") else file

        return opened

    def saving(self, save_file):
        """The real save_file; then its file is cut to the half and completed again."""

        def noted(tensors, path: Path) -> None:
            self.note("write", path, "before")
            save_file(tensors, path)
            whole = path.read_bytes()
            os.truncate(path, len(whole) // 2)
            self.note("write", path, "middle")
            with io.FileIO(path, "a") as file:
                file.write(whole[len(whole) // 2 :])
            self.note("write", path, "after")

        return noted


class InHalves:
    """A file opened for writing whose writes reach the system in two halves."""

    def __init__(self, watch: Watch, file, path):
        self.watch, self.file, self.path = watch, file, path

    def write(self, data) -> int:
        half = len(data) // 2
        self.watch.note("write", self.path, "before")
        written = self.file.write(data[:half])
        self.file.flush()
        self.watch.note("write", self.path, "middle")
        written += self.file.write(data[half:])
        self.file.flush()
        self.watch.note("write", self.path, "after")
        return written

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        self.file.close()

    def __getattr__(self, name: str):
        return getattr(self.file, name)


# ---------------------------------------------------------------------------------------------------------------------
# one run and its kills


@dataclass
class Plan:
    """One kill: at the nth passage of a point, or `delay` seconds after the first metrics line (training), or at most
    `delay` seconds after the start and not later than that line."""

    point: str = ""
    nth: int = 1
    training: bool = False
    delay: float = 0.0

    def __str__(self) -> str:
        since = "in training" if self.training else "after the start"
        return f"{self.point!r} number {self.nth}" if self.point else f"{self.delay:.3f} s {since}"


@dataclass
class Tally:
    """What happened in one run."""

    kills: list[tuple[str, Plan]] = field(default_factory=list)  # phase at the kill, as the log has it
    starts: int = 0
    resumed: int = 0  # starts that said where they begin, which was right
    lost: int = 0  # steps that were on the disk and went
    damaged: int = 0
    litter: int = 0  # temporary names in the folder of the finished run
    equal: bool = False
    unused: list[Plan] = field(default_factory=list)
    failure: str = ""


class PromiseBroken(Exception):
    pass


@dataclass
class Bench:
    """Where the runs live, and what the undisturbed one did. child: the command of a watched start."""

    work: Path
    steps: int
    save_every: int
    child: tuple[str, ...] = (sys.executable, "-m", "scripts.stress.kills", "--child")

    def __post_init__(self):
        """Make the corpus, and the reference: the script itself, alone, keeping every step."""
        rng = random.Random(0)
        words = "the a cat dog tree house runs sleeps under over behind quickly and then never 1 22 333".split()
        (self.work / "corpus").mkdir()
        for number in range(20):
            text = "\n".join(" ".join(rng.choices(words, k=9)) for _ in range(12))
            (self.work / "corpus" / f"story {number}.txt").write_text(text)
        items = [{"query": "the cat", "choices": [" runs", " sleeps"], "gold": number % 2} for number in range(3)]
        write_bundle([Task("cats", "multiple_choice", items)], self.work / "base" / "eval_bundle")
        code = self.start("reference", (sys.executable, "-m", "scripts.base_train"), keep_last=None)
        if code != 0:
            raise UserError(f"the undisturbed run ended with code {code}: {self.output('reference')}")
        folder = self.folder("reference")
        self.reference = story(folder, self.steps)
        self.hashes = {step: hashes(folder, step) for step in steps_in(folder)}

    def folder(self, tag: str) -> Path:
        return self.work / "base" / "base_checkpoints" / tag

    def output(self, tag: str) -> str:
        return (self.work / f"{tag}.out").read_text(errors="replace")[-3000:]

    def start(self, tag: str, command: tuple[str, ...], plan: Plan | None = None, keep_last=KEEP_LAST) -> int:
        """One start, with --resume and perhaps a kill; its exit code, negative for a signal."""
        settings = dict(
            SETTINGS,
            data=self.work / "corpus",
            model_tag=tag,
            num_iterations=self.steps,
            save_every=self.save_every,
            eval_every=self.steps // 4,
            core_metric_every=self.steps // 2,
            sample_every=self.steps // 2,
            keep_last=keep_last,
        )
        flags = [f"--{name}={value}" for name, value in settings.items()]
        # the number of threads is part of bit equality
        env = {**os.environ, "OMP_NUM_THREADS": "1", "NANOCHAT_BASE_DIR": str(self.work / "base")}
        with open(self.work / f"{tag}.out", "wb") as output:
            process = subprocess.Popen(
                [*command, *flags, "--resume"], cwd=self.work, env=env, stdout=output, stderr=subprocess.STDOUT
            )
        try:
            if plan is not None and not plan.point:
                trains = time.monotonic() + (HANGS if plan.training else plan.delay)
                while time.monotonic() < trains and process.poll() is None and not in_training(self.log(tag)):
                    time.sleep(0.005)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(plan.delay if plan.training else 0)
                process.kill()
            return process.wait(HANGS)
        except subprocess.TimeoutExpired:
            raise PromiseBroken(f"a start did not end within {HANGS:.0f} s: {self.output(tag)}") from None
        finally:
            process.kill()

    def watched(self, tag: str, plan: Plan | None) -> int:
        """start() with a fresh phase log."""
        log = self.work / f"{tag}.log"
        log.unlink(missing_ok=True)
        point, nth = (plan.point, plan.nth) if plan else ("", 1)
        return self.start(tag, (*self.child, str(log), point, str(nth)), plan)

    def log(self, tag: str) -> list[list[str]]:
        """The lines of the phase log of the latest start, in fields."""
        path = self.work / f"{tag}.log"
        return [line.split() for line in path.read_text().splitlines()] if path.exists() else []

    def run(self, tag: str, plans: list[Plan]) -> Tally:
        """Start the run until it is done, killed as planned; check the disk after every start, and the end."""
        tally, todo, code = Tally(), list(plans), None
        folder = self.folder(tag)
        steps: set[int] = set()  # on the disk
        try:
            while code != 0:
                plan = todo.pop(0) if todo else None
                begun = beginnings(folder)
                code = self.watched(tag, plan)
                log = self.log(tag)
                tally.starts += 1
                if code == -signal.SIGKILL and plan is not None:
                    tally.kills.append((phase_at_end(log, plan), plan))
                    if sum(spelled(line) == plan.point for line in log) < plan.nth and plan.point:
                        raise PromiseBroken("killed somewhere else")
                elif code != 0:
                    raise PromiseBroken(f"a start ended with code {code}: {self.output(tag)}")
                elif plan is not None:
                    tally.unused = [plan, *todo]
                self.check_beginning(begun, beginnings(folder), max(steps, default=0), code, tally)
                steps = self.check_disk(folder, steps, log, tally)
            self.check_end(folder)
            tally.equal = True
            tally.litter = len([path for path in folder.iterdir() if path.name.startswith(".")])
        except PromiseBroken as broken:
            tally.failure = f"{tag}, kill {len(tally.kills)}, {plan or 'none planned'}: {broken}"
        return tally

    def check_beginning(self, before: list, now: list, newest: int, code: int, tally: Tally) -> None:
        """The start went on at the newest step; one that was killed early may not have said where."""
        if now != before:
            if now != [*before, ("resume", newest) if newest else ("start", 0)]:
                raise PromiseBroken(f"the newest step was {newest}, but the starts began so: {now}")
            tally.resumed += 1
        elif code == 0 and newest != self.steps:
            raise PromiseBroken("the start does not say where it began")

    def check_disk(self, folder: Path, before: set[int], log: list[list[str]], tally: Tally) -> set[int]:
        """Every step on the disk was renamed, is whole and is the reference's, and none is lost; returns the steps."""
        now = steps_in(folder)
        renames = [(line[-1], int(line[1])) for line in log if line[2:5] == ["save", "rename", "step_"]]
        renamed = before | {step for spot, step in renames if spot == "after"}
        if damaged := [
            f"{step}: {reason}"
            for step in now
            if (reason := checkpoint_files.find_corruption(checkpoint_files.step_dir(folder, step)))
        ]:
            tally.damaged += len(damaged)
            raise PromiseBroken(f"damaged steps {'; '.join(damaged)}")
        if aside := [path.name for path in folder.glob("*.bad-*")]:
            tally.damaged += len(aside)
            raise PromiseBroken(f"taken for damaged: {', '.join(aside)}")
        if lost := set(sorted(renamed | now)[-KEEP_LAST:]) - now:
            tally.lost += len(lost)
            raise PromiseBroken(f"steps {sorted(lost)} are lost: {sorted(renamed)} were there, now {sorted(now)}")
        if strange := now - before - {step for _, step in renames}:
            raise PromiseBroken(f"steps {sorted(strange)} came otherwise than by a rename")
        for step in now - before:
            if hashes(folder, step) != self.hashes[step]:
                raise PromiseBroken(f"step {step} differs from the undisturbed run's")
        try:
            if (folder / "config.py").exists():
                read_config(folder / "config.py")
        except UserError as error:
            raise PromiseBroken(f"half a config.py: {error}") from error
        for name in ("metrics.jsonl", "rows_rank0.jsonl"):
            torn = [n for n, line in enumerate(lines_of(folder / name)) if line is None]
            if torn and torn != [len(lines_of(folder / name)) - 1]:
                raise PromiseBroken(f"{name}: lines {torn} are torn and not the last one")
        return now

    def check_end(self, folder: Path) -> None:
        """Weights, optimizer, loader, losses and rows are the reference's."""
        for name, value in story(folder, self.steps).items():
            if value != self.reference[name]:
                pairs = zip(value, self.reference[name], strict=False) if isinstance(value, list) else ()
                first = next((pair for pair in pairs if pair[0] != pair[1]), (value, self.reference[name]))
                raise PromiseBroken(f"{name} differ from the undisturbed run's: {first[0]} and {first[1]}"[:1000])


def steps_in(folder: Path) -> set[int]:
    found = (re.fullmatch(r"step_(\d{6,})", path.name) for path in folder.glob("*"))
    return {int(match[1]) for match in found if match}


def hashes(folder: Path, step: int) -> list[str]:
    """Of the weights and of the optimizer's state."""
    where = checkpoint_files.step_dir(folder, step)
    return [checkpoint_files.weights_hash(load_file(where / f"{name}.safetensors")) for name in ("model", "optimizer")]


def lines_of(path: Path) -> list[dict | None]:
    """The lines of a .jsonl file; None for one that is torn."""

    def parsed(line: bytes) -> dict | None:
        try:
            return json.loads(line)
        except ValueError:
            return None

    text = path.read_bytes() if path.exists() else b""
    return [parsed(line) for line in text.removesuffix(b"\n").split(b"\n")] if text else []


def beginnings(folder: Path) -> list[tuple[str, int]]:
    """Where the starts of a run said that they begin."""
    lines = [line for line in lines_of(folder / "metrics.jsonl") if line]
    return [(line["event"], line["step"]) for line in lines if line.get("event") in ("start", "resume")]


def story(folder: Path, step: int) -> dict:
    """All of a finished run that must not depend on kills: each value by a name for messages."""
    lines = [line for line in lines_of(folder / "metrics.jsonl") if line]
    keys = ("step", "loss", "grad_norm", "lr", "tokens", "epoch")
    metadata = checkpoint_files.read_metadata(checkpoint_files.step_dir(folder, step))
    return {
        "losses": [[line[key] for key in keys] for line in lines if "lr" in line],
        "evaluations": [{**line, "time": None} for line in lines if line.get("event") == "eval"],
        "ends": lines[-1].get("event"),
        "rows": [(line["step"], line["rows"]) for line in lines_of(folder / "rows_rank0.jsonl")],
        "weights and optimizer": hashes(folder, step),
        "loader states": metadata["loader"],
        "random states": metadata["rng"],
        "run states": {**metadata["run"], "train_seconds": None},
    }


def spelled(line: list[str]) -> str:
    """The part of a line of the phase log that names a point."""
    return " ".join(line[2:])


def in_training(log: list[list[str]]) -> bool:
    return any(spelled(line) == "main write metrics.jsonl after" for line in log)


def phase_at_end(log: list[list[str]], plan: Plan) -> str:
    """The phase in which a kill struck. One at a point of the main thread counts as training, also during a save."""
    if plan.point and (phase := plan.point.split()[0]) != "main":
        return phase
    calls = [line for line in log if line[3] == "call"]
    if not plan.point and calls and calls[-1][-1] == "before":
        return calls[-1][2]
    return "training" if in_training(log) else "start-up"


# ---------------------------------------------------------------------------------------------------------------------
# many runs


def timed(rng: random.Random, startup: float, window: float) -> Plan:
    """A kill at a random time: a third of them before the training begins, the others within `window` s of it."""
    if rng.random() < 1 / 3:
        return Plan(delay=rng.uniform(0, startup))
    return Plan(training=True, delay=rng.uniform(0, window))


def planned(
    rng: random.Random, kills: int, points: Counter, startup: float, window: float, evaluation: int = 0
) -> list[Plan]:
    """60% at the points of save and prune, each in its turn, 10% at the others, 30% at random times; shuffled.

    evaluation: so many further ones at the points of an evaluation, each in its turn.
    """
    inner = sorted(name for name in points if name.startswith("evaluate "))
    points = Counter({name: count for name, count in points.items() if name not in inner})
    plans = [timed(rng, startup, window) for _ in range(kills * 3 // 10)]
    for inside, share in ((True, kills * 6 // 10), (False, kills - kills * 3 // 10 - kills * 6 // 10)):
        names = sorted(name for name in points if name.startswith("main ") != inside)
        rng.shuffle(names)
        for number in range(share):
            name = names[number % len(names)]
            plans.append(Plan(name, nth=rng.randint(1, min(3 if inside else 8, points[name]))))
    for number in range(evaluation):
        name = inner[number % len(inner)]
        plans.append(Plan(name, nth=rng.randint(1, 2)))
    rng.shuffle(plans)
    return plans


def dealt(plans: list[Plan], size: int, again: bool = False) -> list[list[Plan]]:
    """Plans of about `size` kills a run. What is cleared away must have been left there by the kill before.

    again: the plans did not strike in another run, so any of their points may be one of clearing away.
    """
    hands: list[list[Plan]] = [[]]
    for plan in plans:
        if len(hands[-1]) >= size:
            hands.append([])
        clears = plan.point.startswith(("save unlink", "save rmdir")) or (again and plan.point)
        hands[-1] += [Plan(BEFORE_RENAME), plan] if clears else [plan]
    return hands


def control(bench: Bench) -> tuple[Counter, float, float]:
    """A watched run with one kill: how often a start passes each point, and the seconds of start-up and training."""
    points: Counter = Counter()
    tag = "run"  # the names of points hold no digits
    for plan in (Plan(BEFORE_RENAME), None):
        began = time.time()
        code = bench.watched(tag, plan)
        log = bench.log(tag)
        points |= Counter(map(spelled, log))  # the larger count of each
    if code != 0:
        raise UserError(f"the watched run ended with code {code}: {bench.output(tag)}")
    bench.check_end(bench.folder(tag))
    first = next(float(line[0]) for line in log if in_training([line]))
    return points, first - began, float(log[-1][0]) - first


def kill_all(
    bench: Bench, mode: str, kills: int, seed: int, workers: int, evaluation: int = 0
) -> tuple[list[Tally], Counter]:
    """Runs until all planned kills have struck, `workers` at a time; their tallies, and all points there are."""
    points, startup, training = control(bench)
    print(f"{len(points)} points, {startup:.1f} s of start-up, {training:.1f} s of training", flush=True)
    rng = random.Random(seed)
    if mode == "random":
        # on average 4/9 of what it takes to be done before the last kill; half of that goes again with each kill
        plans = [timed(rng, startup, 4 / 3 * training / kills) for _ in range(kills)]
    else:
        plans = planned(rng, kills, points, startup, 1.5 * training / KILLS_PER_RUN, evaluation)
    tallies: list[Tally] = []
    with ThreadPoolExecutor(workers) as pool:
        for turn in range(ROUNDS[mode]):
            hands = [plans] if mode == "random" else dealt(plans, KILLS_PER_RUN, again=turn > 0)
            tags = [f"run{len(tallies) + number}" for number in range(len(hands))]
            new = []
            for tag, tally in zip(tags, pool.map(bench.run, tags, hands), strict=True):
                print(tally.failure or f"{tag}: {len(tally.kills)} kills, {tally.starts} starts, equal", flush=True)
                new.append(tally)
            tallies += new
            plans = [plan for tally in new for plan in tally.unused]  # their run was done before
            if not plans or any(tally.failure for tally in new):
                break
    return tallies, points


def table(tallies: list[Tally], points: Counter) -> list[str]:
    """Kills by phase and by kind, and the counts of what must hold."""
    kills = [kill for tally in tallies for kill in tally.kills]
    count = Counter((phase, bool(plan.point)) for phase, plan in kills)
    lines = [f"{'killed during':14s}{'at a point':>12s}{'at a time':>12s}{'together':>12s}"]
    for phase in PHASES:
        at = count[phase, True], count[phase, False]
        lines.append(f"{phase:14s}{at[0]:12d}{at[1]:12d}{sum(at):12d}")
    inside = sum(phase in ("save", "prune") for phase, _ in kills)
    lines.append(f"inside a save or prune: {inside} of {len(kills)} ({100 * inside / max(1, len(kills)):.0f}%)")
    struck = Counter(plan.point for _, plan in kills if plan.point)
    lines.append(f"points struck: {len(struck)} different ones of {len(points)}")
    spots = ("before", "middle", "after")
    lines.append(f"{'operation':14s}" + "".join(f"{spot:>12s}" for spot in spots))
    by_spot = Counter((point.split()[1], point.split()[3]) for point in struck.elements())
    for operation in sorted({operation for operation, _ in by_spot}):
        lines.append(f"{operation:14s}" + "".join(f"{by_spot[operation, spot]:12d}" for spot in spots))
    total = {name: sum(getattr(t, name) for t in tallies) for name in ("starts", "resumed", "lost", "damaged", "equal")}
    lines += [
        f"starts: {total['starts']}; of those that came to training, began at the right step: {total['resumed']}",
        f"steps lost: {total['lost']}; damaged folders: {total['damaged']}",
        f"final weights, optimizer, loader, losses and rows equal the undisturbed run's: "
        f"{'yes' if total['equal'] == len(tallies) else 'NO'} ({total['equal']} of {len(tallies)} runs)",
        f"temporary names left in finished runs: {sum(tally.litter for tally in tallies)}",
    ]
    return lines


def main(argv: list[str] | None = None) -> list[Tally]:
    """Run the check and print its table; exit code 1 when a promise is broken, and the files stay."""
    parser = argparse.ArgumentParser(prog="scripts.stress.kills", description=__doc__.splitlines()[0])
    parser.add_argument("--mode", choices=tuple(MODES), default="phases")
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--evaluation", type=int, default=20, help="further kills inside an evaluation")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--steps", type=int, help="of each run")
    arguments = parser.parse_args(argv)
    shape = MODES[arguments.mode]
    began = time.monotonic()
    base_dir().mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix="kills-", dir=base_dir())).resolve()
    bench = Bench(work, arguments.steps or shape["steps"], shape["save_every"])
    kills = arguments.kills if arguments.mode != "evaluation" else 0
    evaluation = arguments.evaluation if arguments.mode != "random" else 0
    tallies, points = kill_all(bench, arguments.mode, kills, arguments.seed, arguments.workers, evaluation)
    lines = table(tallies, points)
    lines.append(f"{len(tallies)} runs of {bench.steps} steps, seed {arguments.seed}, {time.monotonic() - began:.0f} s")
    failures = [tally.failure for tally in tallies if tally.failure]
    struck = [phase for tally in tallies for phase, _ in tally.kills]
    if len(struck) < kills + evaluation:
        failures.append(f"only {len(struck)} of {kills + evaluation} kills struck")
    if struck.count("evaluate") < evaluation:
        failures.append(f"only {struck.count('evaluate')} of {evaluation} kills struck inside an evaluation")
    if arguments.mode == "phases" and 2 * sum(phase in ("save", "prune") for phase in struck) < kills:
        failures.append("less than half of the kills struck inside a save or prune")
    print("\n".join(lines))
    if failures:
        print("\n".join([f"FAILED with seed {arguments.seed} (files in {work}):", *failures]))
        sys.exit(1)
    shutil.rmtree(work)
    return tallies


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2:])
    else:
        run_script(main)
