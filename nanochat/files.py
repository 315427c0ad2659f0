"""Files that are either complete or absent: fsync, hashes, atomic replacement."""

import filecmp
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from nanochat.system.environment import UserError
from nanochat.system.storage_errors import naming_storage_errors
from nanochat.system.temporary import owner_suffix, scratch_folder


def fsync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256_of(path: Path) -> str:
    """Hash of a file's bytes, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _temporary_name(path: Path) -> Path:
    """Where a file lies until it is complete: no other process and no other thread uses this name."""
    return path.with_name(f".{path.name}.{owner_suffix()}.tmp")


@contextmanager
def open_atomic(path: Path, keep_equal: bool = False) -> Iterator[BinaryIO]:
    """A file to write that takes the path's place when all went well, and leaves nothing behind otherwise.

    keep_equal: a file of the same content stays: on a network file system, one that another host has mapped must not
    be replaced.
    """
    temporary = _temporary_name(path)
    try:
        with naming_storage_errors(path):
            with open(temporary, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            if keep_equal and path.is_file() and filecmp.cmp(temporary, path, shallow=False):
                return
            os.replace(temporary, path)
            fsync(path.parent)
    except OSError as error:
        if error.filename == str(temporary):  # the user knows the file by its own name
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside path to write flat files into; renamed to path, all on the disk, when all went well.

    Parent folders are made. Otherwise nothing is left behind. OSError where path is there already and not empty.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with scratch_folder(path) as scratch:
        yield scratch
        commit_folder(scratch, path)


def commit_folder(scratch: Path, path: Path) -> None:
    """Give a folder of flat files its final name: everything on the disk first, then the rename, then the parent."""
    for written in (*scratch.iterdir(), scratch):
        fsync(written)
    os.rename(scratch, path)
    fsync(path.parent)


def check_output(
    path: Path, flag: str | None = None, suffix: str | None = None, way_out: str = "point NANOCHAT_BASE_DIR elsewhere"
) -> None:
    """UserError unless open_atomic(path) could write: asked before the work, whose result the file is to take.

    flag: what named the path, as "--out"; None: it lies below the base folder, and way_out says what helps then.
    suffix: what its name must end in.
    """
    said = f"{flag}={path}" if flag else str(path)
    if suffix and path.suffix.lower() != suffix:
        raise UserError(f"{said}: only {suffix} files are written")
    elsewhere = "name another place" if flag else way_out
    try:
        if path.is_dir():
            raise UserError(f"{said} is a folder: name a file" if flag else f"{said} is a folder: move it away")
        if path.exists() and not path.is_file():
            raise UserError(f"{said} is a device or a pipe: name a file")
        path.parent.mkdir(parents=True, exist_ok=True)
        trial = _temporary_name(path)
        try:
            trial.write_bytes(bytes(4096))  # a full disk takes empty files
        finally:
            trial.unlink(missing_ok=True)
    except OSError as error:
        reason = f"{error.filename} is no folder" if isinstance(error, FileExistsError) else error.strerror
        raise UserError(f"{said} cannot be written ({reason}): {elsewhere}") from error


def write_atomically(path: Path, text: str) -> None:
    """Write a text file so that a reader sees the old one or the new one, never half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open_atomic(path) as file:
        file.write(text.encode("utf-8", "backslashreplace"))  # file names may hold what UTF-8 cannot
