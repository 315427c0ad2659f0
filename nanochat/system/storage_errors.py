"""Storage failures in one form: an OSError with errno and path, and one line for the user.

A full disk, a quota, a file-size limit or a broken connection reaches us as OSError with or without a path, or in a
type of the library's own (safetensors and tokenizers: "... (os error 122)", pyarrow: "[errno 28]", numpy: "1000
requested and 10 written"). Every writer goes through find_storage_error(), and run_script() prints describe().
"""

import contextlib
import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path

ELSEWHERE = "point NANOCHAT_BASE_DIR elsewhere"
HINTS = {
    errno.ENOSPC: f"free some space or {ELSEWHERE}",
    errno.EDQUOT: f"a quota of this user or project: delete files of yours, raise it, or {ELSEWHERE}",
    errno.EFBIG: f"`ulimit -f` or the file system, as FAT32's 4 GB: raise the limit or {ELSEWHERE}",
    errno.EROFS: f"remount it writable or {ELSEWHERE}",
    errno.EACCES: f"change its permissions or {ELSEWHERE}",
    errno.EPERM: f"change its permissions or {ELSEWHERE}",
    errno.EIO: f"the disk or the connection to it fails: check it, or {ELSEWHERE}",
    errno.ENAMETOOLONG: f"take a shorter name or {ELSEWHERE}",
    errno.ENOTDIR: f"a file lies where a folder is needed: {ELSEWHERE}",
    errno.EISDIR: f"a folder lies where a file is needed: {ELSEWHERE}",
    errno.ELOOP: f"its links lead in a circle: {ELSEWHERE}",
    errno.EMFILE: "raise `ulimit -n`",
    errno.ENFILE: "close other programs",
}
for _name in ("ESTALE", "EREMOTEIO", "ENOTCONN", "ETIMEDOUT", "EHOSTDOWN", "ENODEV", "ENXIO", "ENOLINK"):
    if hasattr(errno, _name):  # network and removable disks that went away
        HINTS[getattr(errno, _name)] = f"the file system is gone: mount it again or {ELSEWHERE}"
# Sockets and signals know these too, so without a path they are not ours to explain.
NEEDS_PATH = {getattr(errno, name, None) for name in ("EPERM", "EACCES", "ENOTCONN", "ETIMEDOUT", "EHOSTDOWN")}
SHORT_WRITE = re.compile(r"\d+ requested and \d+ written")
NUMBER = re.compile(r"\((?:os error) (\d+)\)|\[errno (\d+)\]", re.IGNORECASE)
UNMISTAKABLE = {os.strerror(code): code for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)}


def find_storage_error(error: BaseException, path: Path | None = None) -> OSError | None:
    """The storage failure behind an exception as OSError(errno, text, path); None where it is something else.

    path: what was being written, for the libraries that do not say it.
    """
    seen = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        code, text, named = _read(error)
        where = named or path
        if code in HINTS and (where is not None or code not in NEEDS_PATH):
            if isinstance(error, OSError) and error.filename == where and error.strerror == text:
                return error
            return OSError(code, text, str(where)) if where is not None else OSError(code, text)
        error = error.__cause__
    return None


def _read(error: BaseException) -> tuple[int | None, str, str | None]:
    """(errno or None, text, path or None) of one exception."""
    said = str(error)
    if isinstance(error, OSError) and error.errno is not None:
        named = error.filename2 or error.filename  # of a copy the destination
        return error.errno, os.strerror(error.errno), None if isinstance(named, int) else named
    if isinstance(error, OSError) and SHORT_WRITE.search(said):  # numpy drops the reason
        return errno.ENOSPC, "disk full, over quota or beyond a file-size limit", None
    if match := NUMBER.search(said):
        code = int(match[1] or match[2])
        return code, os.strerror(code), None
    code = next((code for text, code in UNMISTAKABLE.items() if text in said), None)
    return code, os.strerror(code) if code else "", None


def describe(error: OSError, default: Path) -> str:
    """One line: what failed, the path, the way out. default: the base folder, meant when the error names none."""
    path, hint = error.filename or default, HINTS[error.errno]
    if not Path(os.path.abspath(path)).is_relative_to(default):  # moving the base folder would not help
        hint = hint.replace(ELSEWHERE, "name another place")
    return f"{error.strerror}: {path} ({hint})"


@contextlib.contextmanager
def naming_storage_errors(path: Path) -> Iterator[None]:
    """Raise any storage failure in the block as an OSError that has its errno and a path, by default this one."""
    try:
        yield
    except Exception as error:
        if (failed := find_storage_error(error, path)) is None or failed is error:
            raise
        raise failed from error
