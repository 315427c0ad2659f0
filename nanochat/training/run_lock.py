"""One run at a time for each model_tag: a lock file beside the tag's folder that names process and host.

The operating system's lock (flock) ends with its process, whatever kills it; a second run is refused while it is held.
Some shared file systems do not pass it on to other hosts: there the file names its owner, and its age tells whether the
owner is alive.
"""

import contextlib
import json
import logging
import os
import platform
import time
from collections.abc import Iterator
from pathlib import Path

from nanochat.system.environment import UserError, restarts_from_env
from nanochat.system.temporary import heartbeat, names_file, open_locked, process_state

logger = logging.getLogger(__name__)

STALE = 600.0  # seconds without a heartbeat after which the owner on another host counts as gone


@contextlib.contextmanager
def run_lock(folder: Path, ignore: bool = False) -> Iterator[None]:
    """Hold the lock of a run's folder; UserError names process and host of its owner.

    ignore: take it although another process has it. A stale lock, whose process is gone, is taken over with a message.
    """
    path = folder.with_name(f".{folder.name}.lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = open_locked(path, log_unlocked=True)
    try:
        owner = _owner(path)
        if handle is not None and owner is not None and (reason := _stale_reason(owner, path)):
            logger.info(f"{_describe(owner)} left its lock on {folder.name} behind ({reason}): taken over")
        elif (handle is None or owner is not None) and not ignore:
            raise UserError(
                f"model_tag={folder.name!r} is being trained by {_describe(owner)}: stop it, or take another name with "
                f"--model_tag=NAME; if it is gone for sure, --ignore_lock=True takes over ({path})"
            )
        if handle is None:  # --ignore_lock: a file of our own
            path.unlink(missing_ok=True)
            if (handle := open_locked(path, log_unlocked=True)) is None:
                raise UserError(f"model_tag={folder.name!r} is just being taken by another process ({path}): try again")
        os.ftruncate(handle, 0)
        os.pwrite(handle, json.dumps(_this_process()).encode(), 0)
        try:
            with heartbeat(path):
                yield
        finally:
            if names_file(path, handle):  # not one taken from us
                path.unlink()
    finally:
        if handle is not None:
            os.close(handle)


def _this_process() -> dict:
    return {
        "pid": os.getpid(),
        "host": platform.node(),
        "started": process_state(os.getpid())[1],
        "launch": os.environ.get("TORCHELASTIC_RUN_ID"),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
    }


def _owner(path: Path) -> dict | None:
    """The owner that the file names; None when it is empty (just made) or torn (its writer was killed)."""
    try:
        owner = json.loads(path.read_text(encoding="utf-8"))
        return owner if isinstance(owner, dict) and isinstance(owner["pid"], int) else None
    except (FileNotFoundError, ValueError, KeyError):
        return None


def _stale_reason(owner: dict, path: Path) -> str | None:
    """Why the owner, whose file is not locked, is no longer running; None when it may be."""
    if owner.get("host") == platform.node():
        state, started = process_state(owner["pid"])
        if state is None:
            return "its process is gone"
        return "its process id belongs to another process now" if started != owner.get("started") else None
    if restarts_from_env() and owner.get("launch") == os.environ.get("TORCHELASTIC_RUN_ID"):
        return "its launcher has restarted the ranks, the first one on another host"
    age = time.time() - path.stat().st_mtime
    return f"no heartbeat for {age:.0f} s" if age > STALE else None


def _describe(owner: dict | None) -> str:
    if owner is None:
        return "another process, which has just started"
    return f"process {owner['pid']} on {owner.get('host')} (since {owner.get('since')})"
