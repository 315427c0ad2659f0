"""What the code logs, as the lines that a person sees."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from nanochat.system.logs import LineFormatter, from_rank0_or_error


class _Recorder(logging.Handler):
    def __init__(self, lines: list[str]):
        super().__init__()
        self.lines = lines
        self.setFormatter(LineFormatter())
        self.addFilter(from_rank0_or_error)

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(self.format(record))


@contextmanager
def no_messages() -> Iterator[None]:
    """Fail when anything is logged inside."""
    with record_messages() as lines:
        yield
    assert lines == []


@contextmanager
def record_messages(lines: list[str] | None = None) -> Iterator[list[str]]:
    """Append the messages logged inside to lines (a new list without one), each as it is printed; yields the list."""
    handler = _Recorder([] if lines is None else lines)
    logger = logging.getLogger("nanochat")
    logger.addHandler(handler)
    try:
        yield handler.lines
    finally:
        logger.removeHandler(handler)
