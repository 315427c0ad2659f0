"""Documents of one file: a text whole or in blocks, the rows of jsonl, json, csv, tsv and parquet; compressed or not.

A row is called path#number, by its line in jsonl and its place in the others, counted from 0.
"""

import bz2
import csv
import gzip
import io
import json
import logging
import lzma
import os
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from nanochat.data.encodings import SAMPLE, Corrupt, Undecodable, check_encodable, decode_text, detect_encoding
from nanochat.data.folders import NAMED, escape_control, get_suffix
from nanochat.runtime import first_line
from nanochat.system.environment import UserError

logger = logging.getLogger(__name__)

TEXT_SUFFIXES = (".txt", ".md", ".py")
ROW_SUFFIXES = (".jsonl", ".parquet")
TABLE_SUFFIXES = (".csv", ".tsv", ".json", ".ndjson")  # read alone, or in a folder without any of the above
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
BLOCK_BYTES = 4096  # text of one document of a single text file
LONGEST_LINE = 1 << 20  # bytes of a line of a single text file that stay together: memory has an end
LARGEST_FILE = 1_000_000_000  # a file is one document, and one string of arrow ends at 2 GB


class Rows:
    """What to do with a row that cannot be used: an error, or with skip_corrupt named, counted and skipped."""

    def __init__(self, skip_corrupt: bool, counts: Counter):
        self.skip_corrupt, self.counts = skip_corrupt, counts

    def refuse(self, message: str) -> None:
        """Raise Corrupt, unless rows may be skipped."""
        if not self.skip_corrupt:
            raise Corrupt(f"{message}; or skip such rows with --skip_corrupt=True")
        self.counts["corrupt rows"] += 1
        if self.counts["corrupt rows"] <= NAMED:
            logger.info(f"data: {message}: skipped")

    def close(self) -> None:
        """Say how many were not named."""
        if (number := self.counts["corrupt rows"]) > NAMED:
            logger.info(f"data: ... and {number - NAMED} more rows that cannot be used")


def content_suffix(name: str) -> tuple[str, str]:
    """(suffix of the content, of the compression or ""): book.txt.gz gives .txt and .gz."""
    suffix = get_suffix(name)
    for compression in COMPRESSIONS:
        if suffix.endswith(compression):
            return suffix.removesuffix(compression), compression
    return suffix, ""


def is_read(name: str, further: bool) -> bool:
    """Whether a file is read for its suffix; further: also tables and compressed files."""
    suffix, compression = content_suffix(name)
    if suffix in TEXT_SUFFIXES or (suffix in ROW_SUFFIXES and not (compression and suffix == ".parquet")):
        return further or not compression
    return further and suffix in TABLE_SUFFIXES


def file_documents(name: str, path: Path, column: str, single: bool, rows: Rows) -> Iterator[tuple[str, str | bytes]]:
    """(document name, text) of one file; a text file of a folder is one document, all else is called path#row."""
    suffix, compression = content_suffix(path.name)
    with io_errors_as_corrupt(path):
        if suffix in TEXT_SUFFIXES and not single:
            yield name, _read_whole(path, compression)
            return
        readers: dict[str, Callable] = {
            ".parquet": _parquet_rows,
            ".jsonl": _jsonl_rows,
            ".ndjson": _jsonl_rows,
            ".json": _json_rows,
            ".csv": _csv_rows,
            ".tsv": _csv_rows,
        }
        texts = readers[suffix](path, column, rows) if suffix in readers else read_blocks(path)
        for row, text in enumerate(texts):
            if text is not None:
                yield f"{name}#{row}", text


# ---------------------------------------------------------------------------------------------------------------------
# bytes and lines


def open_bytes(path: Path, compression: str | None = None) -> BinaryIO:
    """A file to read, decompressed as its suffix says."""
    kind = content_suffix(path.name)[1] if compression is None else compression
    if kind == ".zst":
        return io.BufferedReader(pa.input_stream(str(path), compression="zstd"))
    openers: dict[str, Callable] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
    return openers[kind](path, "rb") if kind else open(path, "rb")


def _read_whole(path: Path, compression: str = "") -> bytes:
    """All bytes of a file that is one document."""
    if path.stat().st_size <= LARGEST_FILE:
        with open_bytes(path, compression) as file:
            raw = file.read(LARGEST_FILE + 1)
        if len(raw) <= LARGEST_FILE:
            return raw
    raise UserError(f"{path} has over {LARGEST_FILE:,} bytes: pass it alone, a single file is read in blocks")


def _detect_file_encoding(path: Path) -> tuple[str, int]:
    """Encoding of a file, by its beginning, and the bytes of its mark; Undecodable names the file."""
    with open_bytes(path) as file:
        head = file.read(SAMPLE)
    try:
        return detect_encoding(head, complete=len(head) < SAMPLE)
    except Undecodable as error:
        raise Undecodable(f"{path}: {error}") from error


def open_text(path: Path) -> io.TextIOWrapper:
    """A file to read by lines, which end with \\n, \\r or \\r\\n and keep their ends; its mark is removed.

    Bytes that are no UTF-8 become lone surrogates.
    """
    encoding, mark = _detect_file_encoding(path)
    file = open_bytes(path)
    file.read(mark)
    errors = "surrogateescape" if encoding == "utf-8" else "strict"
    return io.TextIOWrapper(file, encoding=encoding, errors=errors, newline="")


def _read_lines(path: Path) -> Iterator[bytes]:
    """A text file's lines, which end with \\n, as UTF-8 without a mark; longer ones than LONGEST_LINE in pieces."""
    encoding, mark = _detect_file_encoding(path)
    with open_bytes(path) as file:
        file.read(mark)
        if encoding == "utf-8":
            yield from _move_split_characters(iter(lambda: file.readline(LONGEST_LINE), b""))
            return
        with io.TextIOWrapper(file, encoding=encoding, newline="\n") as text:
            try:
                yield from (line.encode() for line in iter(lambda: text.readline(LONGEST_LINE // 4), ""))
            except UnicodeDecodeError as error:
                raise Undecodable(f"{path}: {encoding}, but damaged ({error.reason}): save it as UTF-8") from error


def _move_split_characters(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """Pieces of UTF-8 that end where a character does."""
    rest = b""
    for piece in pieces:
        piece, rest = rest + piece, b""
        if not piece.endswith(b"\n"):
            cut = next((i for i in (1, 2, 3) if piece[-i : len(piece) - i + 1] >= b"\xc0"), 0)
            if cut and cut < (2 if piece[-cut] < 0xE0 else 3 if piece[-cut] < 0xF0 else 4):
                piece, rest = piece[:-cut], piece[-cut:]
        if piece:
            yield piece
    if rest:
        yield rest


def read_blocks(path: Path) -> Iterator[bytes]:
    """A text file in pieces of about 4 KB that end at a blank line, or at any line when none comes for 16 KB."""
    block, size = [], 0
    for line in _read_lines(path):
        block.append(line)
        size += len(line)
        if size >= BLOCK_BYTES and (not line.strip() or size >= 4 * BLOCK_BYTES):
            yield b"".join(block)
            block, size = [], 0
    if block:
        yield b"".join(block)


# ---------------------------------------------------------------------------------------------------------------------
# rows


def _jsonl_rows(path: Path, column: str, rows: Rows) -> Iterator[str | None]:
    """The column of every line, in order: "" for no text (null, a blank line), None for a row that is skipped."""
    with open_text(path) as file:
        yield from _json_lines(file, path, column, rows)


def _json_lines(lines: Iterable[str], path: Path, column: str, rows: Rows) -> Iterator[str | None]:
    for number, line in enumerate(lines, 1):
        where = f"{path} line {number}"
        line = line.removeprefix("\ufeff")  # a mark within: files with marks, put behind each other
        if not line.strip():
            yield ""
            continue
        if broken := _find_decoding_error(line):
            yield rows.refuse(f"{where} is {broken}")
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            yield rows.refuse(f"{where} is not JSON ({first_line(error)})")
        else:
            yield _get_row_text(row, column, where, rows)


def _json_rows(path: Path, column: str, rows: Rows) -> Iterator[str | None]:
    """Rows of a JSON array, or of the one array in an object; a file that holds a value a line is read as jsonl."""
    try:
        text = decode_text(_read_whole(path, content_suffix(path.name)[1]))
    except Undecodable as error:
        raise Undecodable(f"{path}: {error}") from error
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        if not str(error).startswith("Extra data"):
            raise Corrupt(f"{path} is not JSON ({first_line(error)})") from error
        yield from _json_lines(io.StringIO(text), path, column, rows)
        return
    if isinstance(found, dict) and column not in found:
        arrays = [value for value in found.values() if isinstance(value, list)]
        found = arrays[0] if len(arrays) == 1 else found
    for number, row in enumerate(found if isinstance(found, list) else [found]):
        yield row if isinstance(row, str) else _get_row_text(row, column, f"{path} row {number}", rows)


def _csv_rows(path: Path, column: str, rows: Rows) -> Iterator[str | None]:
    """The column of every row below the header; quoted as RFC 4180 says, tab-separated files also without quotes."""
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    with open_text(path) as file:
        head = file.readline()
    tabs = content_suffix(path.name)[0] == ".tsv"
    delimiter = "\t" if tabs else max(",;\t|", key=head.count)
    quoting = csv.QUOTE_NONE if tabs and not _is_quoted(path, delimiter) else csv.QUOTE_MINIMAL
    with open_text(path) as file:
        table = csv.reader(file, delimiter=delimiter, quoting=quoting, strict=True)
        try:
            names = [name.strip() for name in next(table, [])]
            if names and names.count(column) != 1:
                raise Corrupt(_describe_header_fault(f"{path} line 1", column, names))
            for row in table:
                where = f"{path} line {table.line_num}"
                if broken := _find_decoding_error("".join(row)):
                    yield rows.refuse(f"{where} is {broken}")
                elif not row:
                    yield ""
                elif len(row) != len(names):
                    yield rows.refuse(f"{where} has {len(row)} columns, the header has {len(names)}")
                else:
                    yield _get_row_text(dict(zip(names, row, strict=True)), column, where, rows)
        except csv.Error as error:
            raise Corrupt(f"{path} line {table.line_num} is not csv ({error}): mend its quotes") from error


def _find_decoding_error(line: str) -> Undecodable | None:
    """What is wrong with a line of a file that open_text() opened, if it is no UTF-8."""
    try:
        check_encodable(line)
    except Undecodable as error:
        return error
    return None


def _is_quoted(path: Path, delimiter: str) -> bool:
    """Whether the whole file keeps to the rules of quotes: some programs write tabs between texts as they are."""
    with open_text(path) as file:
        try:
            return len({len(row) for row in csv.reader(file, delimiter=delimiter, strict=True) if row}) <= 1
        except csv.Error:
            return False


def open_parquet(path: Path) -> pq.ParquetFile:
    """A parquet file with its checksums verified. By the bytes of its path, which need not be UTF-8."""
    return pq.ParquetFile(pa.OSFile(os.fsencode(path)), page_checksum_verification=True)


def _parquet_rows(path: Path, column: str, rows: Rows) -> Iterator[str | None]:
    file = open_parquet(path)
    if column not in file.schema_arrow.names:
        raise Corrupt(_describe_missing_column(str(path), column, file.schema_arrow.names))
    for group in range(file.num_row_groups):
        for text in file.read_row_group(group, columns=[column])[column].to_pylist():
            yield _get_row_text({column: text}, column, str(path), rows)


def _get_row_text(row: object, column: str, where: str, rows: Rows) -> str | None:
    """The text of a row, or None for one that is refused and skipped."""
    if not isinstance(row, dict):
        hint = ": a file that is one array is read when called .json" if isinstance(row, list) else ""
        return rows.refuse(f"{where} is not a JSON object{hint}")
    try:
        return get_text(row, column, where)
    except UserError as error:
        return rows.refuse(str(error))


def get_text(row: dict, column: str, where: str) -> str:
    """The text of a row; null is no text; UserError for an absent column or one that holds something else."""
    if column not in row:
        raise UserError(_describe_missing_column(where, column, row))
    text = row[column]
    if isinstance(text, bytes):
        try:
            return decode_text(text)
        except Undecodable as error:
            raise Undecodable(f"{where}: column {column!r} is {error}") from error
    if text is not None and not isinstance(text, str):
        kind = type(text).__name__
        raise UserError(f"{where}: column {column!r} holds {kind}, not text: choose another with --data_column")
    return text or ""


def _describe_missing_column(where: str, column: str, names: Iterable) -> str:
    listed = ", ".join(escape_control(str(name))[:40] for name in sorted(map(str, names))[:20]) or "it has none"
    return f"{where} has no column {column!r}: choose one with --data_column ({listed})"


def _describe_header_fault(where: str, column: str, names: list[str]) -> str:
    """What is wrong with the header of a table: no such column, or several."""
    if number := names.count(column):
        return f"{where} has {number} columns {column!r}: rename all but one of them"
    return _describe_missing_column(where, column, names)


@contextmanager
def io_errors_as_corrupt(path: Path) -> Iterator[None]:
    """Turn what pyarrow, decompression and the disk raise about an unreadable file into Corrupt with its name."""
    try:
        yield
    except UserError:
        raise
    except (pa.ArrowException, OSError, ValueError, KeyError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise Corrupt(f"{path} cannot be read ({first_line(error)})") from error
