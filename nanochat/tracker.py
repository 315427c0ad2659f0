"""The metrics log, always written, and the tracker beside it, which may fail without the run noticing."""

import json
import time
from pathlib import Path

import numpy as np

from nanochat.runtime import print0, rank_from_env, write_atomically


class MetricsLog:
    """metrics.jsonl, one JSON object a line, always written; the same numbers go to wandb when it is switched on.

    path: the file, appended to. keep_below: on resume, lines with a larger step are dropped, so that the
    file tells one run. tracker: object with log(dict, step=int) and finish(), or None. Its errors never stop a run.
    """

    def __init__(self, path: Path | None, tracker=None, keep_below: int | None = None):
        self.path, self.tracker = path, tracker
        self.file = None
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        if keep_below is not None and path.exists():
            lines = [line for line in path.read_text(encoding="utf-8").splitlines() if _step_of(line) <= keep_below]
            write_atomically(path, "".join(line + "\n" for line in lines))
        self.file = open(path, "a", encoding="utf-8", buffering=1)  # noqa: SIM115  (lives as long as the run)

    def write(self, step: int, **values) -> None:
        """Append one line: {"step": step, "time": seconds since the epoch, ...}; NaN and infinities become strings."""
        if self.file is None:
            return
        line = {"step": step, "time": round(time.time(), 3), **values}
        self.file.write(json.dumps({k: _plain(v) for k, v in line.items()}) + "\n")
        if self.tracker is not None:
            numbers = {k: v for k, v in values.items() if isinstance(v, (int, float))}
            try:
                self.tracker.log(numbers, step=step)
            except Exception as error:  # whatever a tracker throws, the run goes on without it
                print0(f"tracker stopped working ({type(error).__name__}: {error}); metrics.jsonl goes on")
                self.tracker = None

    def close(self) -> None:
        if self.file is not None:
            self.file.close()
            self.file = None
        if self.tracker is not None:
            try:
                self.tracker.finish()
            except Exception as error:  # as above
                print0(f"tracker did not finish ({type(error).__name__}: {error})")
            self.tracker = None


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")  # a torn last line: drop it


def _plain(value):
    if isinstance(value, float) and not np.isfinite(value):
        return str(value)
    return round(value, 7) if isinstance(value, float) and abs(value) > 1e-3 else value


def open_tracker(mode: str, run: str, config: dict, directory: Path):
    """A wandb run ('online' or 'offline') or None ('disabled'); a failing wandb is said once and left out."""
    if mode == "disabled" or rank_from_env() != 0:
        return None
    try:
        import wandb  # heavy: only when asked for

        directory.mkdir(parents=True, exist_ok=True)
        return wandb.init(project="nanochat", name=run, config=config, mode=mode, dir=str(directory))
    except Exception as error:  # no account, no network, broken install: training does not depend on it
        print0(f"wandb is not available ({type(error).__name__}: {error}); metrics.jsonl is written as always")
        return None
