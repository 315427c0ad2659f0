"""What a tokenizer is trained on: chunks of the texts within limits of time and memory, and word of how far it is."""

import logging
import re
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

logger = logging.getLogger(__name__)

TRAINING_CHARACTERS = 2_000_000_000  # enough for any vocabulary, and a bound on time for web-sized sources
# The trainer keeps about 130 bytes for each byte of each distinct piece: at most 2.1 GB. Web text has that many
# distinct words only after gigabytes; random letters are all distinct.
DISTINCT_BYTES = 16_000_000
CHUNK = 2**18  # characters handed to the trainer at once: it needs some 50 bytes for each while it splits them
REPORT_SECONDS = 10

# Between a newline and what is no white space, and behind a letter before a space, every version of SPLIT_PATTERN
# splits, and what stands on the other side changes nothing.
_BOUNDARY = re.compile(r"(?<=\n)(?=\S)|(?<=[A-Za-z])(?= )")
_PIECE = re.compile(r" ?(?:[^\W\d_]{1,128}|(?:[^\w\s]|_){1,128})")  # nearly SPLIT_PATTERN's


class TrainingSample:
    """What the trainer reads of the texts: chunks that bound its memory, and counts for the progress line."""

    def __init__(self, texts: Iterable[str]):
        self.texts = texts
        self.documents = self.characters = 0
        self.merging_since: float | None = None
        self._distinct = 0  # bytes of distinct pieces, estimated from a sixteenth of them
        self._seen: set[int] = set()

    def chunks(self) -> Iterator[str]:
        """The texts in order, in chunks of at most CHUNK characters, until a limit is reached."""
        for text in self.texts:
            self.documents += 1
            for chunk in cut_at_boundaries(text, CHUNK):
                chunk = replace_surrogates(chunk[: TRAINING_CHARACTERS - self.characters])
                self._count_distinct(chunk)
                self.characters += len(chunk)
                yield chunk
                if self.characters >= TRAINING_CHARACTERS or self._distinct >= DISTINCT_BYTES:
                    return self._finish(stopped=True)
        return self._finish(stopped=False)

    def _finish(self, stopped: bool) -> None:
        self.merging_since = time.monotonic()
        if stopped:
            logger.info(
                f"the tokenizer learns from the first {self.characters:,} characters, which hold "
                f"{self._distinct / 1e6:.1f} MB of distinct pieces"
            )

    def _count_distinct(self, chunk: str) -> None:
        for piece in set(_PIECE.findall(chunk)):
            raw = piece.encode("utf-8")
            key = zlib.crc32(raw)  # the same in every process, unlike hash()
            if key % 16 == 0 and key not in self._seen:
                self._seen.add(key)
                self._distinct += 16 * len(raw)

    def progress(self) -> str:
        """One line on how far the training is."""
        read = f"training the tokenizer: {self.documents:,} documents, {self.characters / 1e6:,.1f} M characters read"
        if self.merging_since is None:
            return read
        return f"{read}, merging for {time.monotonic() - self.merging_since:.0f} s"


def replace_surrogates(text: str) -> str:
    """The text with U+FFFD for each lone surrogate and one character for each pair, as tiktoken encodes it."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def cut_at_boundaries(text: str, longest: int) -> Iterator[str]:
    """The text in parts of at most `longest` characters that together have the pieces of the whole, wherever there is
    a boundary of pieces in the second half of each part; else the part is cut at `longest`."""
    start = 0
    while len(text) - start > longest:
        end = start + longest
        for match in _BOUNDARY.finditer(text, start + longest // 2, end):
            end = match.start()
        yield text[start:end]
        start = end
    yield text[start:] if start else text


@contextmanager
def log_progress(line: Callable[[], str]) -> Iterator[None]:
    """Log line() every REPORT_SECONDS, from a thread of its own."""
    done = threading.Event()

    def report() -> None:
        while not done.wait(REPORT_SECONDS):
            logger.info(line())

    thread = threading.Thread(target=report, name="tokenizer progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
