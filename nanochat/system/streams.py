"""Standard streams that take any text, and whose failure costs no work.

A run is worth more than what it prints: where the terminal cannot spell a character it gets its escape, and where the
output cannot be written (full disk, closed descriptor, reader gone) the run continues without it. A tool whose result
is its output calls require_output() and gets OutputError instead.
"""

import errno
import io
import os
import select
import sys
from contextlib import suppress

LENIENT = {"backslashreplace", "replace", "ignore", "xmlcharrefreplace", "namereplace"}
PATIENCE = 10.0  # seconds for the reader of a non-blocking pipe to make room
lost: dict[str, str] = {}  # why a stream cannot be written, by its name, in the order in which it was found out


class OutputError(Exception):
    """Standard output cannot be written, in a tool whose result it is. Not an OSError: no disk of ours is concerned."""

    def __init__(self, cause: OSError):
        super().__init__(f"standard output cannot be written ({cause.strerror or cause})")
        self.errno = cause.errno


def open_streams() -> None:
    """Make sys.stdin, sys.stdout and sys.stderr safe to use. Streams that somebody captures keep their place.

    What cannot be written ends in one line on standard error and an entry of `lost`.
    """
    if sys.stdin is None:
        sys.stdin = open(_reserve(0, os.O_RDONLY), closefd=False)  # noqa: SIM115 (as long as the process)
    elif hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="surrogateescape")  # bytes of file names survive input()
    # Standard error first: it takes the message about the other.
    sys.stderr = _wrap(sys.stderr, sys.__stderr__, 2, "standard error")
    sys.stdout = _wrap(sys.stdout, sys.__stdout__, 1, "standard output")


def require_output() -> None:
    """From now on standard output is the result of this process: OutputError as soon as it cannot be written."""
    if isinstance(file := _descriptor(sys.stdout), _Descriptor):
        file.strict = True
        file.check()


def close_streams() -> None:
    """Write what is still buffered; OutputError where standard output is required and did not take everything."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(file := _descriptor(stream), _Descriptor):
            stream.flush()
            file.check()


def emit(*values, **options) -> None:
    """print(), also where open_streams() was not called: main() inside another program, with streams of its own."""
    try:
        try:
            print(*values, **options)
        except UnicodeEncodeError:
            encoding = getattr(options.get("file") or sys.stdout, "encoding", None) or "ascii"
            plain = (str(value).encode(encoding, "backslashreplace").decode(encoding) for value in values)
            print(*plain, **options)
    except (OSError, ValueError) as error:
        if isinstance(error, ValueError):
            if not getattr(options.get("file") or sys.stdout, "closed", False):
                raise
            error = OSError(errno.EBADF, "it is closed")
        _record_lost("standard output", error)
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (as long as the process)


def on_terminal() -> bool:
    """Whether standard output is a terminal; a closed one is none."""
    with suppress(ValueError, AttributeError):
        return sys.stdout.isatty()
    return False


def _wrap(stream, original, number: int, name: str):
    """The stream in a form that takes any text and, where it is the process's own, survives every error of writing."""
    if stream is not original:  # captured, by a test or a notebook
        if getattr(stream, "errors", None) not in LENIENT and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
        return stream
    encoding, errors, per_line, problem = "utf-8", "backslashreplace", number == 2, None
    if stream is None:
        problem = OSError(errno.EBADF, "it is closed")
        _reserve(number, os.O_WRONLY)
    else:
        encoding, per_line = stream.encoding, stream.line_buffering
        errors = stream.errors if stream.errors in LENIENT else errors
    if stream is not None:
        try:
            stream.flush()
        except OSError as error:
            problem = error
    file = _Descriptor(number, name, problem)
    return io.TextIOWrapper(io.BufferedWriter(file), encoding, errors, line_buffering=per_line)


def _reserve(number: int, mode: int) -> int:
    """Put the null device on a standard descriptor that is closed.

    Else the next file that is opened would get its number, and with it what libraries and child processes print.
    """
    try:
        os.fstat(number)
    except OSError:
        handle = os.open(os.devnull, mode)
        if handle != number:
            os.dup2(handle, number)
            os.close(handle)
    return number


def _descriptor(stream):
    return getattr(getattr(stream, "buffer", None), "raw", None)


def _record_lost(name: str, error: OSError) -> None:
    """Record and say, once, that a stream is lost."""
    if name in lost:
        return
    lost[name] = error.strerror or str(error)
    reason = "nobody reads it any more" if error.errno == errno.EPIPE else lost[name]
    if name != "standard error" and sys.stderr is not None:
        with suppress(OSError, ValueError):
            print(f"{name} cannot be written ({reason}): continuing without it", file=sys.stderr, flush=True)


class _Descriptor(io.FileIO):
    """A standard descriptor for writing; see open_streams()."""

    def __init__(self, number: int, name: str, problem: OSError | None):
        super().__init__(number, "w", closefd=False)
        self.title, self.strict, self.problem, self.raised = name, False, problem, False

    def write(self, data) -> int:
        try:
            if self.problem is not None and not self.strict:
                raise self.problem  # it was closed from the start
            return len(data) if self.raised else self._write(data)
        except OSError as error:
            if self.strict:
                self.problem = error
                self.check()
            _record_lost(self.title, error)
            return len(data)

    def _write(self, data) -> int:
        while (written := super().write(data)) is None:  # a non-blocking pipe is full
            if not select.select([], [self], [], PATIENCE)[1]:
                raise BlockingIOError(errno.EAGAIN, "its reader takes nothing any more")
        return written

    def check(self) -> None:
        """OutputError, once, when the stream is strict and has failed: flushing at exit must not raise it again."""
        if self.strict and self.problem is not None and not self.raised:
            self.raised = True
            raise OutputError(self.problem)
