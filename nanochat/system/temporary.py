"""Temporary files and folders that name their owner, so that only those of dead processes are ever deleted.

A name ends in <process>-<its start time>-<machine>. On the owner's machine the process table says whether it lives. On
another machine, which may share the folder, only its heartbeat does: the time of change, which scratch_folder() renews
and every write to a file does.

Locks are flock's, not the package filelock's: that one leaves its files behind, raises on network file systems without
locks other than ENOSYS, and polls. Ours are removed with their work, and where no lock is to be had work is done twice.
"""

import contextlib
import fcntl
import functools
import hashlib
import itertools
import logging
import os
import platform
import re
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path

logger = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 30.0  # seconds between two heartbeats
STALE_SECONDS = 3600.0  # seconds without one after which an owner on another machine counts as dead
OWNER = re.compile(r"(\d+)-(\d+)-([0-9a-f]{8})(?:-\d+)*(?:\.[a-z]+)?$")
_numbers = itertools.count()


def process_state(pid: int) -> tuple[str | None, str | None]:
    """(state, start time) of a process here: the letters of ps, None when it is gone; the start time tells namesakes
    apart and is None where there is no /proc."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (None if fields[0] in "ZX" else fields[0]), fields[19]  # a zombie waits only to be noticed
    except FileNotFoundError:
        pass
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None, None
    except PermissionError:
        pass  # somebody else's, so it is there
    return (None, None) if Path("/proc/self/stat").exists() else ("?", None)


@functools.cache
def machine_id() -> str:
    """8 hex digits of what has one process table: containers and hosts may share a name, or a process number."""
    parts = [platform.node()]
    with contextlib.suppress(OSError):  # no /proc: the name has to do
        parts += [Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.readlink("/proc/self/ns/pid")]
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()[:8]


def owner_suffix() -> str:
    """The end of a temporary name of this process, another one at every call."""
    pid = os.getpid()
    return f"{pid}-{process_state(pid)[1] or 0}-{machine_id()}-{next(_numbers)}"


def is_abandoned(path: Path) -> bool:
    """Whether the owner of a temporary file or folder is dead; names of an unknown form are judged by their age."""
    found = OWNER.search(path.name)
    if found and found[3] == machine_id():
        state, started = process_state(int(found[1]))
        return state is None or (started or "0") != found[2]
    try:
        return time.time() - path.stat().st_mtime > STALE_SECONDS
    except FileNotFoundError:
        return False  # its owner has just finished


def remove_abandoned(folder: Path, pattern: str, own: bool = False) -> None:
    """Delete temporary files and folders in `folder` that match the pattern and whose owner is dead.

    own: this process's too, which has nothing under way there.
    """
    mine = OWNER.search(owner_suffix())
    for path in folder.glob(pattern):
        found = OWNER.search(path.name)
        if is_abandoned(path) or (own and found and found.groups() == mine.groups()):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


@contextlib.contextmanager
def scratch_folder(target: Path) -> Iterator[Path]:
    """A new temporary folder beside `target`, to be filled and renamed; what is left of it goes on the way out.

    Its heartbeat continues however long nothing is written. Folders that dead processes left for this target go first.
    """
    remove_abandoned(target.parent, f".{glob_escape(target.name)}.*.tmp")
    scratch = target.with_name(f".{target.name}.{owner_suffix()}.tmp")
    scratch.mkdir()
    try:
        with heartbeat(scratch):
            yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def glob_escape(name: str) -> str:
    """The name as a pattern of glob() that matches nothing else."""
    return re.sub(r"([*?[])", r"[\1]", name)


@contextlib.contextmanager
def heartbeat(path: Path) -> Iterator[None]:
    """Renew a path's time of change every BEAT seconds: other hosts see that its owner is alive."""
    done = threading.Event()

    def beat() -> None:
        while not done.wait(HEARTBEAT_SECONDS):
            with contextlib.suppress(OSError):  # renamed just now, or a disk that is gone: the owner will find out
                os.utime(path)

    threading.Thread(target=beat, name="heartbeat", daemon=True).start()
    try:
        yield
    finally:
        done.set()


def open_locked(path: Path, wait: bool = False, log_unlocked: bool = False) -> int | None:
    """A descriptor that holds the lock of the file of this name, made when missing; None when another process does.

    The lock is the operating system's (flock): it ends with its process, whatever kills that. wait: until it is free.
    log_unlocked: log where the file system knows no locks, in which case everybody gets in.
    """
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            os.close(handle)
            return None
        except OSError as error:
            if log_unlocked:
                logger.warning(
                    f"{path.parent} knows no locks ({error.strerror}): two starts in one moment would both get in"
                )
        if names_file(path, handle):
            return handle
        os.close(handle)  # its owner removed it between our open and our lock


def names_file(path: Path, handle: int) -> bool:
    """Whether the path is still the name of the file that this descriptor is of."""
    try:
        return os.stat(path).st_ino == os.fstat(handle).st_ino
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def file_lock(path: Path, wait: bool = True) -> Iterator[bool]:
    """Hold the lock of a file, made for it and removed with it; yields whether that worked.

    False only without wait, when another process or thread has it. On a file system without locks nobody is kept out:
    what is done under the lock has to bear that, at the price of doing it twice.
    """
    handle = open_locked(path, wait)
    if handle is None:
        yield False
        return
    try:
        yield True
    finally:
        if names_file(path, handle):
            path.unlink()  # while it is locked: whoever waits for this very file sees that, and starts over
        os.close(handle)
