"""One run at a time for each model_tag: a lock file beside the tag's folder, with process and host.

The operating system's lock (flock) ends with its process, whatever kills it; whoever finds it held is refused. Some
shared file systems do not pass it on to other hosts: there the file holds process, host and, by its age, whether
somebody is still at work.
"""

import contextlib
import json
import logging
import os
import platform
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from nanochat.system.environment import UserError, restarts_from_env
from nanochat.system.temporary import names_file, open_locked, process_state

logger = logging.getLogger(__name__)

BEAT = 30.0  # seconds between two touches of the file by its owner
STALE = 600.0  # seconds without one after which the owner on another host counts as gone


@contextlib.contextmanager
def run_lock(folder: Path, ignore: bool = False) -> Iterator[None]:
    """Hold the lock of a run's folder; UserError names process and host of the one who has it.

    ignore: take it although somebody has it. A stale lock (its process is gone) is taken over, and that is said.
    """
    path = folder.with_name(f".{folder.name}.lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = open_locked(path, log_unlocked=True)
    try:
        owner = _owner(path)
        if handle is not None and owner is not None and (reason := _gone(owner, path)):
            logger.info(f"{_spelled(owner)} left its lock on {folder.name} behind ({reason}): taken over")
        elif (handle is None or owner is not None) and not ignore:
            raise UserError(
                f"model_tag={folder.name!r} is being trained by {_spelled(owner)}: stop it, or take another name with "
                f"--model_tag=NAME; if it is gone for sure, --ignore_lock=True takes over ({path})"
            )
        if handle is None:  # the user knows better: a file of our own
            path.unlink(missing_ok=True)
            if (handle := open_locked(path, log_unlocked=True)) is None:
                raise UserError(f"model_tag={folder.name!r} is just being taken by another process ({path}): try again")
        os.ftruncate(handle, 0)
        os.pwrite(handle, json.dumps(_myself()).encode(), 0)
        done = threading.Event()
        threading.Thread(target=_beat, args=(path, done), name="lock", daemon=True).start()
        try:
            yield
        finally:
            done.set()
            if names_file(path, handle):  # not one taken from us
                path.unlink()
    finally:
        if handle is not None:
            os.close(handle)


def _myself() -> dict:
    return {
        "pid": os.getpid(),
        "host": platform.node(),
        "started": process_state(os.getpid())[1],
        "launch": os.environ.get("TORCHELASTIC_RUN_ID"),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
    }


def _owner(path: Path) -> dict | None:
    """What the file says; None when it is empty (just made) or torn (its writer was killed)."""
    try:
        owner = json.loads(path.read_text(encoding="utf-8"))
        return owner if isinstance(owner, dict) and isinstance(owner["pid"], int) else None
    except (FileNotFoundError, ValueError, KeyError):
        return None


def _gone(owner: dict, path: Path) -> str | None:
    """Why the owner, whose file is not locked, is no longer at work, or None when it may well be."""
    if owner.get("host") == platform.node():
        state, started = process_state(owner["pid"])
        if state is None:
            return "that process is gone"
        return "the number belongs to another process now" if started != owner.get("started") else None
    if restarts_from_env() and owner.get("launch") == os.environ.get("TORCHELASTIC_RUN_ID"):
        return "its launcher has started the ranks anew, the first one on another host"
    age = time.time() - path.stat().st_mtime
    return f"no sign of life for {age:.0f} s" if age > STALE else None


def _spelled(owner: dict | None) -> str:
    if owner is None:
        return "another process, which has just started"
    return f"process {owner['pid']} on {owner.get('host')} (since {owner.get('since')})"


def _beat(path: Path, done: threading.Event) -> None:
    while not done.wait(BEAT):
        with contextlib.suppress(OSError):  # the folder may be gone, and the run will find that out itself
            os.utime(path)
