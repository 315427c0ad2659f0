"""Captions of a folder's sounds: from tables (csv, tsv, jsonl; with a header or without) and from x.txt beside x.wav.

Tables of other people are rarely what RFC 4180 says: stray quotes, commas in unquoted captions, ids for file names. Of
all readings of a table the one counts under which the most sounds of the folder have a row. Rows that fit no sound, or
have too few or too many cells, are named and counted.
"""

import csv
import io
import json
import logging
import posixpath
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from nanochat.data.encodings import Corrupt, Undecodable, decode_text
from nanochat.data.text_files import get_text, io_errors_as_corrupt
from nanochat.runtime import first_line, nearest_name
from nanochat.system.environment import UserError

logger = logging.getLogger(__name__)

SUFFIXES = (".csv", ".tsv", ".jsonl")
TABLES = tuple(f"{stem}{suffix}" for stem in ("metadata", "captions") for suffix in SUFFIXES)
DELIMITERS = ",\t;|"
DEFAULT_COLUMN = "text"
SPLIT_COLUMN = "split"  # its values, where all are known, are the split
LARGEST_CELL = 2**31 - 1
LONGEST_NAME = 1024
MOST_LINES = 50  # that a quoted cell may have in a table with stray quotes
Skip = Callable[..., object]  # of a kind, a name and a detail: audio_sources.Log.skip


class SoundNames:
    """The files of a folder, found by what a table calls them: a path, an id without suffix, a name without folder.

    Names are compared in Unicode's composed form (macOS decomposes umlauts), then without regard to case. What fits
    several files is ambiguous and finds none.
    """

    def __init__(self, files: Iterable[str], sounds: Iterable[str], root: Path | None = None):
        self.root = None if root is None else root.as_posix()
        files, sounds = list(files), list(sounds)
        self.indexes: list[tuple[Callable[[str], str], bool, dict[str, list[str]]]] = []  # the strictest first
        for tails in (False, True):
            for normalise in (_composed, _folded):
                for names, key in ((files, str), (sounds, _without_suffix)):
                    index: dict[str, list[str]] = {}
                    for name in names:
                        whole = normalise(key(name))
                        for part in _tails(whole) if tails else [whole]:
                            index.setdefault(part, []).append(name)
                    self.indexes.append((normalise, tails, index))

    def find(self, given: str, folder: str, anywhere: bool = True) -> tuple[str | None, str]:
        """(name, "") of the file that a table in `folder` calls `given`, or (None, why there is none).

        anywhere: a file in another folder than the table's will do when it alone ends in that name.
        """
        path = given.strip().replace("\\", "/")
        if self.root and path.startswith(f"{self.root}/"):
            path, folder = path[len(self.root) + 1 :], ""
        near = posixpath.normpath(posixpath.join(folder, path))
        if near.startswith(("/", "../")) or near == ".." or re.match("[A-Za-z]:/", path):
            return None, "path outside the folder"
        for normalise, tails, index in self.indexes if path else ():
            for way in (near, posixpath.normpath(path)):
                names = index.get(normalise(way), ())
                if tails and not anywhere:
                    names = [name for name in names if name.startswith(f"{folder}/")]
                if len(names) == 1 or given in names:
                    return (given if given in names else names[0]), ""
                if names:
                    return None, f"name of several sounds ({', '.join(names[:3])})"
        return None, "caption without its sound"


def _composed(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _folded(name: str) -> str:
    return _composed(name).casefold()


def _without_suffix(name: str) -> str:
    return posixpath.splitext(name)[0]


def _tails(name: str) -> list[str]:
    """The ends of a path after each of its slashes: of a/b/c these are b/c and c."""
    parts = name.split("/")
    return ["/".join(parts[i:]) for i in range(1, len(parts))]


# ---------------------------------------------------------------------------------------------------------------------
# a folder's captions


@dataclass(frozen=True)
class Caption:
    """split: what the table's column `split` says of the sound; None without one."""

    text: str
    split: str | None = None


def find_captions(
    data: str, files: dict[str, Path], sounds: list[str], column: str, skip: Skip, root: Path | None = None
) -> dict[str, Caption | None]:
    """name of a sound -> its caption (None: skipped by name already); files: relative name -> path, of a folder `data`.

    Captions are in the tables called metadata or captions, else in the one table at the top, and in text files beside
    the sounds. skip is called for each row and each text file whose caption no sound takes. UserError: several tables
    to choose from, or one that cannot be read or lacks the column.
    """
    names, known = SoundNames(files, sounds, root), set(sounds)
    beside = _texts_beside([name for name in files if name.lower().endswith(".txt")], sounds)
    every = [name for name in files if name.lower().endswith(SUFFIXES)]
    tables = [name for name in every if posixpath.basename(name).lower() in TABLES]
    if not tables and not beside:
        tables = [name for name in every if "/" not in name]
        if len(tables) > 1:
            raise UserError(
                f"data={data}: captions in which of {', '.join(tables)}? Call that one captions.csv or .jsonl"
            )
    found: dict[str, Caption | None] = {}
    for table in tables:
        find = _Finder(names, posixpath.dirname(table), anywhere=len(tables) == 1)
        for given, caption in _table_captions(files[table], table, column, find, skip):
            name, why = find(given)
            if name is None:
                skip(why, given)
            elif name not in known:
                skip("caption of a file that is no sound", name)
            elif name in found:
                skip("second caption of a sound", name)
            else:
                found[name] = caption
    _add_texts(found, files, beside, skip)
    for name in every:
        if name not in tables:
            skip("table beside the captions", name)
    return found


@dataclass(frozen=True)
class _Finder:
    """SoundNames.find() for one table."""

    names: SoundNames
    folder: str
    anywhere: bool
    known: dict[str, tuple[str | None, str]] = field(default_factory=dict)  # a table is read in several ways

    def __call__(self, given: str) -> tuple[str | None, str]:
        if given not in self.known:
            self.known[given] = self.names.find(given, self.folder, self.anywhere)
        return self.known[given]


def _texts_beside(texts: list[str], sounds: list[str]) -> dict[str, str]:
    """name of a sound -> that of the text file beside it, which has the same name but for the suffix."""
    found = {}
    ways = [(way, {way(_without_suffix(text)): text for text in reversed(texts)}) for way in (str, _composed, _folded)]
    for name in sounds:
        stem = _without_suffix(name)
        if text := next((index[way(stem)] for way, index in ways if way(stem) in index), None):
            found[name] = text
    return found


def _add_texts(found: dict[str, Caption | None], files: dict[str, Path], beside: dict[str, str], skip: Skip) -> None:
    """Captions from text files, for sounds that no table has; the text files without a sound are skipped by name."""
    for name, text in beside.items():
        if name in found:
            skip("second caption of a sound", text)
            continue
        found[name] = None
        try:
            with io_errors_as_corrupt(files[text]):
                raw = files[text].read_bytes()
            found[name] = Caption(decode_text(raw))
        except Undecodable as error:
            skip("caption that is not UTF-8", name, first_line(error))
        except Corrupt as error:
            skip("caption that cannot be read", name, first_line(error))
    used = set(beside.values())
    for name in files:
        if name.lower().endswith(".txt") and name not in used:
            skip("text file without its sound", name)


# ---------------------------------------------------------------------------------------------------------------------
# one table

Row = tuple[int, dict[str, object]]  # its line (of csv: the last one), and the cells by column


@dataclass
class _Reading:
    """A table read in one way. columns: in their order; without a header they are called 1, 2, ...

    uneven: (line, cells) of the rows that have another number of cells than the first. name_column: the one whose
    values call the most sounds by name; found: how many. likely: rows whose value there ends as those do.
    """

    columns: list[str]
    rows: list[Row]
    uneven: list[tuple[int, list[str]]]
    headless: bool = False
    name_column: str = ""
    found: int = 0
    likely: int = 0

    def rank(self, column: str) -> tuple:
        """The larger, the likelier the reading; a wrong one loses sounds, the column, or rows to what quotes hold."""
        return self.found, self.headless or column in self.columns, -len(self.uneven), self.likely


def _table_captions(path: Path, table: str, column: str, find: _Finder, skip: Skip) -> Iterator[tuple[str, Caption]]:
    """(what a row calls its sound, its caption) of every row that has both."""
    read = _read_jsonl if path.suffix.lower() == ".jsonl" else _read_csv
    with io_errors_as_corrupt(path):
        raw = path.read_bytes()
    try:
        text = decode_text(raw)
    except Undecodable as error:
        raise UserError(f"{path} is {error}" if str(error).startswith("not UTF-8") else f"{path}: {error}") from error
    found = read(path, text, column, find)
    column = _caption_column(found, path, table, column)
    for line, cells in found.uneven:
        skip("row with too few or too many cells", f"{table} line {line}", f"{len(cells)}, not {len(found.columns)}")
    for line, row in found.rows:
        name = _as_name(row.get(found.name_column))
        if column in row:
            yield name, Caption(get_text(row, column, f"{path} line {line}"), _split_of(row))
        else:
            skip("row without a caption", f"{table} line {line}")


def _as_name(value: object) -> str:
    if isinstance(value, dict):  # as the hub's own tables have sounds
        value = value.get("path")
    return "" if value is None else str(value)


def _split_of(row: dict) -> str | None:
    value = row.get(SPLIT_COLUMN)
    return value.strip().lower() if isinstance(value, str) else None


def _caption_column(found: _Reading, path: Path, table: str, column: str) -> str:
    """The column of the captions; UserError where the table has none of that name."""
    if not found.headless:
        if found.columns.count(column) > 1:
            raise UserError(f"{path} has {found.columns.count(column)} columns {column!r}: rename all but one of them")
        if found.rows and column not in found.columns:
            raise UserError(
                f"{path} has no column {column!r}{nearest_name(column, found.columns)}: choose with --data_column"
            )
        return column
    others = [name for name in found.columns if name != found.name_column]
    if column in others:
        return column
    if column != DEFAULT_COLUMN or not others:
        raise UserError(
            f"{path} has no header, so its columns have numbers, and no column {column!r}: choose with --data_column "
            f"({', '.join(others) or 'it has none but the names'})"
        )
    lengths = {name: sum(len(str(row.get(name, ""))) for _, row in found.rows) for name in others}
    chosen = max(others, key=lengths.__getitem__)
    logger.info(
        f"data: {table} has no header: names in column {found.name_column}, captions in column {chosen}"
        f"{' (--data_column takes another)' if len(others) > 1 else ''}"
    )
    return chosen


def _choose_names(rows: list[Row], columns: list[str], find: _Finder) -> tuple[str, int, int]:
    """name_column, found and likely of a reading; `file_name` and then the first column wins a tie."""
    found: dict[str, set] = {column: set() for column in columns}
    ends: dict[str, set] = {column: set() for column in columns}
    exact = dict.fromkeys(columns, 0)
    for _, row in rows:
        for column, value in row.items():
            given = _as_name(value)
            if 0 < len(given) < LONGEST_NAME and (name := find(given)[0]) is not None:
                found[column].add(name)
                ends[column].add(posixpath.splitext(given)[1].lower())
                exact[column] += given == name
    if not columns:
        return "", 0, 0
    chosen = min(columns, key=lambda name: (-len(found[name]), name != "file_name", -exact[name]))
    values = (_as_name(row.get(chosen)) for _, row in rows)
    likely = sum(bool(value) and posixpath.splitext(value)[1].lower() in ends[chosen] for value in values)
    return chosen, len(found[chosen]), likely


def _read_jsonl(path: Path, text: str, column: str, find: _Finder) -> _Reading:
    rows: list[Row] = []
    columns: dict[str, None] = {}
    for number, line in enumerate(_lines(text), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise Corrupt(f"{path} line {number} is not JSON ({error})") from error
        if not isinstance(row, dict) or not row:
            raise Corrupt(f"{path} line {number} is not a JSON object with keys")
        row = {key.strip(): value for key, value in row.items()}
        columns.update(dict.fromkeys(row))
        rows.append((number, row))
    return _Reading(list(columns), rows, [], False, *_choose_names(rows, list(columns), find))


def _read_csv(path: Path, text: str, column: str, find: _Finder) -> _Reading:
    """A table of cells in the likeliest of all readings: every delimiter, quotes as marks or as letters."""
    readings = []
    delimiters = [mark for mark in DELIMITERS if mark in text] or [","]
    if said := re.match(r"sep=(.)(?=\r?\n)", text, re.IGNORECASE):  # a line for Excel
        delimiters, text = [said[1]], text[said.end() :]
    for delimiter in delimiters:
        ways = [_strict, _escaped, _tolerant, _unquoted]
        if delimiter == "\t" and not _quotes_are_marks(text, delimiter):
            ways.insert(0, ways.pop())
        for way in ways:
            if rows := way(text, delimiter):
                readings.append(_interpret(rows, delimiter, column, find))
    if not readings:
        return _Reading([], [], [])
    return max(readings, key=lambda found: found.rank(column))  # the first of equals


def _quotes_are_marks(text: str, delimiter: str) -> bool:
    """Whether the quotes around cells are there for the table: all cells that have them need them, or most have them.

    Most programs write tabs between texts as they are; then a caption may well be a quotation.
    """
    lines = _lines(text)
    if 2 * sum(line.startswith('"') or f'{delimiter}"' in line for line in lines) >= len(lines):
        return True
    quoted = re.findall(rf'(?m)(?:^|{delimiter})"((?:[^"]|"")*)"(?={delimiter}|$)', "\n".join(lines))
    return all(re.search(rf'["\n{delimiter}]', cell) for cell in quoted)


def _strict(text: str, delimiter: str) -> list[tuple[int, list[str]]] | None:
    """As RFC 4180 says; None for a text that breaks its rules."""
    return _by_csv(text, delimiter=delimiter)


def _escaped(text: str, delimiter: str) -> list[tuple[int, list[str]]] | None:
    """With backslashes before what would be a mark."""
    return _by_csv(text, delimiter=delimiter, escapechar="\\", doublequote=False) if "\\" in text else None


def _unquoted(text: str, delimiter: str) -> list[tuple[int, list[str]]] | None:
    """Quotes are letters."""
    return _by_csv(text, delimiter=delimiter, quoting=csv.QUOTE_NONE) if '"' in text else None


def _by_csv(text: str, **dialect) -> list[tuple[int, list[str]]] | None:
    csv.field_size_limit(LARGEST_CELL)
    table = csv.reader(io.StringIO(text, newline=""), strict=True, **dialect)
    try:
        return [(table.line_num, row) for row in table if row]
    except csv.Error:
        return None


def _tolerant(text: str, delimiter: str) -> list[tuple[int, list[str]]] | None:
    """Line by line: a quote that opens a cell counts when another one closes it, or else it is a letter.

    A cell continues over several lines when only that gives the row its cells.
    """
    if '"' not in text:
        return None
    mark = re.escape(delimiter)
    cell = re.compile(rf'(?:"((?:[^"]|"")*)"|([^{mark}\n]*))({mark}|\Z)')

    def cells(line: str) -> list[str]:
        """Of a row, or [] where a line ends within a cell."""
        row, place = [], 0
        while match := cell.match(line, place):
            row.append(match[2] if match[1] is None else match[1].replace('""', '"'))
            place = match.end()
            if not match[3]:
                return row
        return []

    lines = [line for line in enumerate(_lines(text), 1) if line[1]]
    rows, place, width = [], 0, 0
    while place < len(lines):
        (number, line), end = lines[place], place + 1
        row = cells(line)
        width = width or len(row)
        if len(row) != width or any(part.startswith('"') for part in row):  # a quote that is not closed, or a letter
            for last in range(place + 1, min(len(lines), place + MOST_LINES)):
                if len(cells(lines[last][1])) == width:
                    break  # a row by itself
                more = cells("\n".join(lines[i][1] for i in range(place, last + 1)))
                if len(more) == width:
                    row, number, end = more, lines[last][0], last + 1
                    break
        rows.append((number, row))
        place = end
    return rows


def _lines(text: str) -> list[str]:
    return re.split(r"\r\n|\n|\r", text)


def _interpret(lines: list[tuple[int, list[str]]], delimiter: str, column: str, find: _Finder) -> _Reading:
    """Rows of cells as a table: which column has the names, and whether the first row is a header."""
    first = [cell.strip() for cell in lines[0][1]]
    width = len(first)
    rows, uneven = [], []
    numbered = [str(number + 1) for number in range(width)]
    for line, cells in lines:
        if len(cells) > width > 1 and first[-1] == column and not any('"' in cell for cell in cells):
            cells = [*cells[: width - 1], delimiter.join(cells[width - 1 :])]  # an unquoted caption with commas
        if len(cells) == width:
            rows.append((line, dict(zip(numbered, cells, strict=True))))
        else:
            uneven.append((line, cells))
    names, *_ = _choose_names(rows, numbered, find)
    head = rows[0][1][names]
    headless = column not in first and (find(head)[0] is not None or any(letter.isdigit() for letter in head))
    if headless:
        return _Reading(numbered, rows, uneven, True, *_choose_names(rows, numbered, find))
    rows = [(line, dict(zip(first, row.values(), strict=True))) for line, row in rows[1:]]
    return _Reading(first, rows, uneven, False, *_choose_names(rows, first, find))
