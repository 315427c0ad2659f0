"""The metrics log, always written, and the tracker, which follows it in its own process and cannot stop the run.

wandb leaves exit hooks behind that wait for its service for ever, and its start can wait minutes for a network: a
thread inside the training process could not be ended. A process can be killed.
"""

import json
import logging
import math
import os
import re
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from nanochat.files import write_atomically
from nanochat.system import streams
from nanochat.system.environment import rank_from_env
from nanochat.system.storage_errors import naming_storage_errors

logger = logging.getLogger(__name__)

FINISH_SECONDS = 30  # how long the end of a run waits for the tracker
HURRIED_SECONDS = 5  # and that of a preempted one, whose scheduler gives it about half a minute in all


class MetricsLog:
    """metrics.jsonl, one JSON object a line, always written; a tracker may follow the file. Main thread only.

    path: the file, appended to. tracker: what open_tracker() gave. keep_below: on resume, lines with a larger step are
    dropped, so that the file describes one run; drop_evals_of: a step whose evaluation was interrupted and is repeated.
    A line that a kill tore is dropped in any case.
    """

    def __init__(
        self,
        path: Path | None,
        tracker: "Tracker | None" = None,
        keep_below: int | None = None,
        drop_evals_of: int | None = None,
    ):
        self.path, self.tracker = path, tracker
        self.file = None
        self.noted: dict[str, str] = {}  # streams that are lost, as this file already notes
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            before, last = path.read_bytes(), math.inf if keep_below is None else keep_below
            kept = [(line, entry) for line, entry in _entries(path) if entry["step"] <= last]
            repeated = (drop_evals_of, "eval")
            after = b"".join(line + b"\n" for line, e in kept if (e["step"], e.get("event")) != repeated)
            if after != before:
                write_atomically(path, after.decode())
        self.file = open(path, "ab", buffering=0)  # noqa: SIM115  (lives as long as the run)
        if tracker is not None:
            tracker.follow(path)

    def write(self, step: int, **values) -> None:
        """Append one line: {"step": step, "time": seconds since the epoch, ...}; NaN and infinities become strings."""
        if self.file is None:
            return
        line = {"step": step, "time": round(time.time(), 3), **values}
        if news := {name: why for name, why in streams.lost.items() if name not in self.noted}:
            self.noted |= news
            line["lost"] = news  # explains why the printed lines end
        rest = f"{json.dumps({k: _plain(v) for k, v in line.items()})}\n".encode()
        with naming_storage_errors(self.path):
            while rest:  # one system call for the whole line, so that a kill leaves at most the last one torn
                rest = rest[self.file.write(rest) :]
        if self.tracker is not None:
            self.tracker.check()

    def close(self, hurry: bool = False) -> None:
        """hurry: the scheduler will kill this process soon."""
        if self.file is not None:
            self.file.close()
            self.file = None
            if self.tracker is not None:
                self.tracker.finish(HURRIED_SECONDS if hurry else FINISH_SECONDS)


def read_metrics(path: Path) -> list[dict]:
    """The lines of a metrics.jsonl, [] without the file. Lines that are incomplete or have no step are skipped."""
    return [entry for _, entry in _entries(path)]


def last_event(path: Path) -> tuple[int, str] | None:
    """(step, event) of the last line of a metrics.jsonl that has an event; None without."""
    return next(((entry["step"], entry["event"]) for entry in reversed(read_metrics(path)) if "event" in entry), None)


def _entries(path: Path) -> Iterator[tuple[bytes, dict]]:
    """Each complete line of a metrics.jsonl, as it is in the file and parsed; a kill may have torn the last one."""
    for line in path.read_bytes().split(b"\n") if path.is_file() else ():
        with suppress(ValueError):
            entry = json.loads(line)
            if isinstance(entry, dict) and isinstance(entry.get("step"), (int, float)):
                yield line, entry


def _plain(value):
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return round(value, 7) if isinstance(value, float) and abs(value) > 1e-3 else value


class Tracker:
    """wandb in a child process (wandb_process.py beside this file) that follows metrics.jsonl until we close its input.

    Nothing here blocks, but finish() for its seconds. Whatever fails gives one warning and ends the tracker. When
    the training process is killed, the child sees its input end, sends what it has and leaves.
    """

    def __init__(self, directory: Path, init: dict):
        self.directory, self.init = directory, init
        self.process: subprocess.Popen | None = None

    def follow(self, path: Path) -> None:
        """Start the child; it sends the lines that are appended to the file from now on."""
        facts = dict(init=self.init, path=str(path), offset=path.stat().st_size)
        try:
            with open(self.directory / "tracker.log", "ab") as messages:
                self.process = subprocess.Popen(
                    [sys.executable, "-P", str(Path(__file__).with_name("wandb_process.py")), json.dumps(facts)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=messages,
                    bufsize=0,
                    start_new_session=True,  # Ctrl-C is the run's: the child ends when its input does
                    env=_environment(self.directory),
                )
        except OSError as error:
            self._give_up(str(error))
            return
        os.set_blocking(self.process.stdout.fileno(), False)

    def check(self) -> None:
        """Log the child's messages; when it has failed, warn once and continue without it."""
        if self.process is not None and self._listen() == b"":
            self._give_up("its process ended")

    def finish(self, seconds: float) -> None:
        """Let the child send the rest; kill it after `seconds`."""
        if self.process is None:
            return
        self.process.stdin.close()
        try:
            code = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return self._give_up(f"it did not finish within {seconds} s")
        self._listen()
        if self.process is not None and code != 0:
            self._give_up(f"exit code {code}")
        self._release()

    def _listen(self) -> bytes | None:
        """Log or act on the child's messages; returns them, None for nothing new, b"" when it has ended."""
        output = self.process.stdout.read()
        for line in (output or b"").decode(errors="replace").splitlines():
            if line.startswith("error: "):
                self._give_up(line.removeprefix("error: "))
                break
            logger.info(f"wandb: {line}")
        return output

    def _give_up(self, reason: str) -> None:
        logger.warning(
            f"wandb stopped ({reason}): the run continues without it and metrics.jsonl is complete; "
            f"see {self.directory / 'tracker.log'}"
        )
        self._release()

    def _release(self) -> None:
        if self.process is not None:
            self.process.kill()
            with suppress(subprocess.TimeoutExpired):  # a process that waits for a lost disk dies later
                self.process.wait(1)
            self.process.stdin.close()
            self.process.stdout.close()
            self.process = None


def _environment(directory: Path) -> dict[str, str]:
    """Ours, and folders for what wandb would put into the home directory (those that the user named stay) and /tmp.

    Its settings and the API key are only read, and stay where `wandb login` put them.
    """
    folders = {"WANDB_CACHE_DIR": "cache", "WANDB_DATA_DIR": "data", "WANDB_ARTIFACT_DIR": "artifacts"}
    scratch = (directory / "wandb" / "tmp").absolute()
    scratch.mkdir(parents=True, exist_ok=True)
    return {
        **{name: str(directory.absolute() / "wandb" / folder) for name, folder in folders.items()},
        "WANDB_PROGRAM": sys.argv[0],
        "WANDB_X_STATS_PID": str(os.getpid()),  # system metrics of the training process, not of the child
        **os.environ,
        "TMPDIR": str(scratch),  # what a killed child leaves behind
    }


def open_tracker(mode: str, run: str, config: dict, directory: Path) -> Tracker | None:
    """A wandb run ('online' or 'offline') for MetricsLog, or None ('disabled', or any rank but the first).

    directory: the run's own folder. It takes all that wandb writes, and keeps the run's id, so that a resumed run
    continues there; `wandb sync` sends the offline runs later, several of one id in their order.
    """
    if mode == "disabled" or rank_from_env() != 0:
        return None
    try:
        directory.mkdir(parents=True, exist_ok=True)
        run_id = _run_id(directory)
    except OSError as error:
        logger.warning(f"no tracker ({error}); metrics.jsonl is written as always")
        return None
    where = dict(mode=mode, dir=str(directory), id=run_id, resume="allow")
    return Tracker(directory, dict(project="nanochat", name=run, config=config, **where))


def _run_id(directory: Path) -> str:
    """The id of this run at wandb: the one in the folder, or a new one that is written there."""
    path = directory / "wandb_run_id"
    known = path.read_text(encoding="utf-8", errors="replace").strip() if path.exists() else ""
    if re.fullmatch("[0-9a-f]{16}", known):
        return known
    new = secrets.token_hex(8)  # not from the run's seed: two runs must differ
    write_atomically(path, f"{new}\n")
    return new
