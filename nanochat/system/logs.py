"""Messages: the standard library's logging, as plain lines on standard output and in a run's run.log.

Every module logs to `logging.getLogger(__name__)`, below the logger "nanochat". Rank 0 speaks for all ranks: the
others' messages are dropped, apart from errors.
"""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from nanochat.system import streams
from nanochat.system.environment import UserError, rank_from_env

ROOT = logging.getLogger("nanochat")
logger = logging.getLogger(__name__)
LEVELS = ("debug", "info", "warning", "error")
TO_STDERR = {"to_stderr": True}  # extra=TO_STDERR: for tools whose result is their standard output


def from_rank0_or_error(record: logging.LogRecord) -> bool:
    """Filter: all that rank 0 logs, and the errors of any rank."""
    return rank_from_env() == 0 or record.levelno >= logging.ERROR


class LineFormatter(logging.Formatter):
    """The message alone; from warnings on, with the level in front, as compilers write it."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        if record.levelno >= logging.WARNING:
            record.message = f"{record.levelname.lower()}: {record.message}"
        return super().formatMessage(record)


class ConsoleHandler(logging.Handler):
    """Prints to whatever sys.stdout is at that moment; a stream that fails ends no run (streams.py)."""

    def emit(self, record: logging.LogRecord) -> None:
        options = {"file": sys.stderr} if getattr(record, "to_stderr", False) else {}
        streams.emit(self.format(record), flush=True, **options)


class RunLogHandler(logging.FileHandler):
    """Appends to run.log, as soon as its folder exists: a run that is refused leaves none.

    A file that cannot be written is given up with one warning: training continues without it.
    """

    def __init__(self, path: Path):
        super().__init__(path, encoding="utf-8", errors="backslashreplace", delay=True)
        self.folder, self.pending = path.parent, []
        self.setFormatter(LineFormatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
        self.addFilter(from_rank0_or_error)

    def emit(self, record: logging.LogRecord) -> None:
        self.pending.append(record)
        if not self.folder.is_dir():
            return
        waiting, self.pending = self.pending, []
        try:
            for earlier in waiting:
                super().emit(earlier)
        except OSError:  # from opening the file
            self.handleError(record)

    def handleError(self, record: logging.LogRecord) -> None:
        reason = sys.exc_info()[1]
        ROOT.removeHandler(self)
        logger.warning(f"{self.baseFilename} cannot be written ({reason}): continuing without it")


CONSOLE = ConsoleHandler()


def set_up_logging() -> None:
    """Attach the console to the logger "nanochat". Done once, when this module is imported."""
    CONSOLE.setFormatter(LineFormatter())
    CONSOLE.addFilter(from_rank0_or_error)
    ROOT.addHandler(CONSOLE)
    ROOT.setLevel(logging.DEBUG)  # the handlers decide
    ROOT.propagate = False
    set_log_level("info")


def set_log_level(level: str) -> None:
    """level: the least that the console shows, one of LEVELS."""
    CONSOLE.setLevel(level.upper())


@contextmanager
def run_log(path: Path, level: str = "info") -> Iterator[None]:
    """Append what is logged inside to the file, with the time: at least from level info on, whatever the console shows.

    An exception that ends the block is its last entry.
    """
    handler = RunLogHandler(path)
    handler.setLevel(min(logging.INFO, logging.getLevelName(level.upper())))
    ROOT.addHandler(handler)
    try:
        yield
    except Exception as error:
        unexpected = None if isinstance(error, UserError) else sys.exc_info()
        handler.handle(ROOT.makeRecord(__name__, logging.ERROR, __file__, 0, str(error), (), unexpected))
        raise
    finally:
        ROOT.removeHandler(handler)
        with suppress(OSError):  # what its buffer still holds, on a full disk
            handler.close()


@contextmanager
def muted() -> Iterator[None]:
    """Drop the messages below errors inside: work that is repeated, whose messages were logged the first time."""
    before = ROOT.level
    ROOT.setLevel(logging.ERROR)
    try:
        yield
    finally:
        ROOT.setLevel(before)


set_up_logging()
