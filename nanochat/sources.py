"""Sources on this machine: the standard library, the installed packages, the user's files and folders.

A source is a plan, cheap to make, and a reader that yields (name, text) of every document in path order.
"""

import ast
import hashlib
import json
import os
import platform
import re
import sysconfig
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from nanochat.runtime import UserError, first_line
from nanochat.settings import Say, nearest_name, shown

TEXT_SUFFIXES = (".txt", ".md", ".py")
ROW_SUFFIXES = (".jsonl", ".parquet")
BLOCK_BYTES = 4096  # text of one document of a single text file
LARGEST_FILE = 1_000_000_000  # a file is one document, and one string of arrow ends at 2 GB
LEAST_BYTES = 10_000  # less is not even one batch of the smallest preset
LEAST_STDLIB_BYTES = 2_000_000

STDLIB_EXCLUDED = {
    "test", "tests", "ensurepip", "lib2to3", "idlelib", "tkinter", "distutils", "encodings", "pydoc_data",
    "site-packages", "dist-packages", "__pycache__",
}  # fmt: skip
PACKAGES_EXCLUDED = {"test", "tests", "_vendor", "__pycache__"}


class Corrupt(UserError):
    """A shard or file that cannot be read: left out instead when skip_corrupt is set."""


@dataclass
class Source:
    """What a source would give: cheap to make, so that an unchanged source costs only a look at its files."""

    name: str  # of the folder
    source: str  # for the fingerprint; the same on every machine
    version: str
    licence: str
    state: object  # JSON: as long as it stays the same, so do the documents
    read: Callable[[Counter], Iterator[tuple]]  # of dataset.Document's fields; counts files and what was left out
    least_bytes: int = LEAST_BYTES
    advice: str = "give a larger file or folder"
    manifest: dict = field(default_factory=dict)  # further keys of the manifest; complete when all was read


def stdlib() -> Source:
    """The standard library of the running interpreter, a file a document: about 7.7 MB without tests and tables."""
    return Source(
        "stdlib",
        "stdlib",
        platform.python_version(),
        "Python Software Foundation License (source of the running interpreter)",
        _stat_all(files := _stdlib_files()),
        lambda counts: _whole_files(files, counts, at_least=200),
        LEAST_STDLIB_BYTES,
        "this Python lacks its source files (zipped or frozen?): pass a folder of text files with --data=FOLDER",
    )


def _stdlib_files() -> list[tuple[str, Path]]:
    """The running interpreter's own .py files, as (relative posix path, file)."""

    def wanted(name: str) -> bool:
        return name.endswith(".py") and not name.rpartition("/")[2].startswith(("turtle", "_sysconfigdata"))

    def excluded(folder: str) -> bool:
        return folder in STDLIB_EXCLUDED or folder.startswith("turtle")

    return walk(Path(sysconfig.get_path("stdlib")), wanted, excluded)


def packages() -> Source:
    """The standard library and all our runtime requirements, each module's long docstrings as a further document."""
    installed = dict(_package_files())
    files = sorted((installed | dict(_stdlib_files())).items())
    return Source(
        "packages",
        "packages",
        platform.python_version(),
        "each package's own licence, beside its metadata in site-packages; the standard library's is the PSF License",
        _stat_all(files),
        lambda counts: _with_docstrings(_whole_files(files, counts, at_least=200, at_most=1_000_000), set(installed)),
        LEAST_STDLIB_BYTES,
        "pass a folder of text files with --data=FOLDER",
    )


def _package_files() -> Iterator[tuple[str, Path]]:
    """(path relative to site-packages, file) of every .py file that our runtime requirements brought, transitively."""
    from importlib import metadata

    try:
        own = metadata.distribution("nanochat")
    except metadata.PackageNotFoundError as error:
        raise UserError(
            "data=packages reads the requirements of the installed nanochat, which is not installed: run "
            "`pip install -c constraints.txt -e .` in the checkout, or use --data=stdlib"
        ) from error
    for distribution in _closure(own):
        for file in distribution.files or ():
            wanted = file.suffix == ".py" and ".." not in file.parts and not PACKAGES_EXCLUDED & set(file.parts)
            if (
                wanted
                and not file.name.startswith("test_")
                and (path := Path(distribution.locate_file(file))).is_file()
            ):
                yield file.as_posix(), path


def _closure(own) -> list:
    """The installed distributions that `own` requires, directly or not; optional extras are not followed."""
    from importlib import metadata

    from packaging.requirements import Requirement  # a requirement of huggingface_hub

    found: dict[str, object] = {}
    todo = [own]
    while todo:
        for line in todo.pop().requires or ():
            requirement = Requirement(line)
            name = re.sub(r"[-_.]+", "-", requirement.name).lower()
            if name in found or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
                continue
            with suppress(metadata.PackageNotFoundError):  # left out on purpose, as GPU libraries on a CPU machine
                found[name] = metadata.distribution(name)
                todo.append(found[name])
    return [found[name] for name in sorted(found)]


def _with_docstrings(files: Iterable[tuple[str, bytes]], packages: set[str]) -> Iterator[tuple[str, str | bytes]]:
    """Every file, and after a package's file one document with its docstrings over 200 characters, repeats left out."""
    seen: set[str] = set()
    for name, raw in files:
        yield name, raw
        if name in packages and (new := [doc for doc in _docstrings(raw) if doc not in seen]):
            new = list(dict.fromkeys(new))
            seen.update(new)
            yield f"{name}#docstrings", "\n\n".join(new) + "\n"


def _docstrings(source: bytes) -> list[str]:
    """Cleaned docstrings of more than 200 characters, in the order of the tree; none for what does not parse."""
    if b'"""' not in source and b"'''" not in source:
        return []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's source
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):  # templates, other Pythons' syntax, null bytes
        return []
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds))
    return [text for text in found if text and len(text) > 200]


def path(source: str, column: str, skip_corrupt: bool, say: Say) -> Source:
    suffixes = TEXT_SUFFIXES + ROW_SUFFIXES
    kinds = " ".join(suffixes)
    with looking_up("data", source):
        path = Path(source).expanduser()
        is_folder, is_file = path.is_dir(), path.is_file()
    if is_folder:
        files = walk(path, lambda name: name.lower().endswith(suffixes) and not hidden(Path(name).name), hidden)
        if not files:
            seen = sum(len(names) for _, _, names in os.walk(path))
            raise UserError(f"data={source}: no text found: {seen} files, none of them {kinds}")
    elif is_file:
        if path.suffix.lower() not in suffixes:
            raise UserError(f"data={source}: cannot read {path.suffix or 'a file without suffix'}: one of {kinds}")
        files = [(_printable(path.name), path)]
    else:
        hint = nearest_name(source, ("stdlib", "packages", "climbmix"))
        hint = hint if "did you mean" in hint else ""
        raise UserError(
            f"data={source}: no such file or folder{hint}; one of stdlib, packages, climbmix, hf:<dataset>, or a path"
        )
    absolute = path.resolve()
    return Source(
        f"{slug_of(absolute.name)}-{digest(str(absolute))[:8]}",
        _printable(absolute.name),
        f"column {column}" if any(name.lower().endswith(ROW_SUFFIXES) for name, _ in files) else "text",
        "not known: your own files",
        [column, skip_corrupt, is_folder, _stat_all(files)],
        lambda counts: _read_files(files, column, is_file, skip_corrupt, say, counts),
    )


def _read_files(files, column: str, single: bool, skip_corrupt: bool, say: Say, counts: Counter):
    """Documents of the user's files; an unreadable file is an error, or under skip_corrupt named and left out whole."""
    for name, path in files:
        counts["files"] += 1
        try:
            if skip_corrupt:
                for _ in _file_documents(name, path, column, single):
                    pass
            yield from _file_documents(name, path, column, single)
        except Corrupt as error:
            if not skip_corrupt:
                raise
            counts["corrupt"] += 1
            say(f"data: {error}: left out")


def _file_documents(name: str, path: Path, column: str, single: bool) -> Iterator[tuple[str, str | bytes]]:
    """(document name, text) of one file; a text file of a folder is one document, all else is called path#row."""
    suffix = path.suffix.lower()
    with reading(path):
        if suffix in TEXT_SUFFIXES and not single:
            if path.stat().st_size > LARGEST_FILE:
                raise UserError(
                    f"{path} has over {LARGEST_FILE:,} bytes: pass it alone, a single file is read in blocks"
                )
            yield name, path.read_bytes()
            return
        rows = {".parquet": _parquet_rows, ".jsonl": _jsonl_rows}.get(suffix, _blocks)(path, column)
        for row, text in enumerate(rows):
            yield f"{name}#{row}", text


def _blocks(path: Path, column: str) -> Iterator[bytes]:
    """A text file in pieces of about 4 KB that end at a blank line, or at any line when none comes for 16 KB."""
    block, size = [], 0
    with open(path, "rb") as file:
        for line in file:
            block.append(line)
            size += len(line)
            if size >= BLOCK_BYTES and (not line.strip() or size >= 4 * BLOCK_BYTES):
                yield b"".join(block)
                block, size = [], 0
    if block:
        yield b"".join(block)


def _jsonl_rows(path: Path, column: str) -> Iterator[str]:
    """The column of every line, in order; an absent text (null, a blank line) is an empty one, to keep row numbers."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                yield ""
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise Corrupt(f"{path} line {number} is not JSON ({error})") from error
            if not isinstance(row, dict):
                raise Corrupt(f"{path} line {number} is not a JSON object")
            yield text_of(row, column, f"{path} line {number}")


def _parquet_rows(path: Path, column: str) -> Iterator[str]:
    file = pq.ParquetFile(path, page_checksum_verification=True)
    if column not in file.schema_arrow.names:
        raise UserError(
            f"{path} has no column {column!r}: choose one with --data_column ({_listed(file.schema_arrow.names)})"
        )
    for group in range(file.num_row_groups):
        for text in file.read_row_group(group, columns=[column])[column].to_pylist():
            yield text_of({column: text}, column, str(path))


def text_of(row: dict, column: str, where: str) -> str:
    """The text of a row; null is no text; UserError for an absent column or one that holds something else."""
    if column not in row:
        raise UserError(f"{where} has no column {column!r}: choose one with --data_column ({_listed(row)})")
    if row[column] is not None and not isinstance(row[column], str):
        kind = type(row[column]).__name__
        raise UserError(f"{where}: column {column!r} holds {kind}, not text: choose another with --data_column")
    return row[column] or ""


def _whole_files(files, counts: Counter, at_least: int, at_most: int | None = None) -> Iterator[tuple[str, bytes]]:
    """Each file as one document, without those of other sizes (bytes)."""
    for name, path in files:
        raw = path.read_bytes()
        if len(raw) < at_least:
            counts["too small"] += 1
        elif at_most is not None and len(raw) > at_most:
            counts["too large"] += 1
        else:
            counts["files"] += 1
            yield name, raw


def hidden(name: str) -> bool:
    return name.startswith(".")


def walk(root: Path, wanted: Callable[[str], bool], excluded: Callable[[str], bool]) -> list[tuple[str, Path]]:
    """(relative posix path, file) below root of wanted paths, sorted; excluded folders, by name, are not entered."""
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if not excluded(name)]
        for path in (Path(folder, name) for name in names):
            relative = _printable(path.relative_to(root).as_posix())
            if wanted(relative) and path.is_file():
                found.append((relative, path))
    return sorted(found)


def _stat_all(files: Iterable[tuple[str, Path]]) -> list:
    """Name, size and time of change of every file: cheap, and different when a content is."""
    stats = ((name, path.stat()) for name, path in files)
    return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn what pyarrow and the disk raise about an unreadable file into Corrupt with its name."""
    try:
        yield
    except UserError:
        raise
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        raise Corrupt(f"{path} cannot be read ({first_line(error)})") from error


@contextmanager
def looking_up(name: str, value: str | Path) -> Iterator[None]:
    """Turn what expanduser() and a look at a path raise (no such home, a name too long, no access) into UserError."""
    try:
        yield
    except UserError:
        raise
    except (OSError, RuntimeError, ValueError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise UserError(f"{name}={shown(str(value))} cannot be looked up ({reason}): name one that exists") from error


def digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()


def slug_of(name: str) -> str:
    """A readable part of a folder's name."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip(".-")[:80] or "data"


def _printable(path: str) -> str:
    """A file name as valid text: bytes that are no UTF-8 are written as escapes."""
    return path.encode("utf-8", "backslashreplace").decode("utf-8")


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(map(str, names))[:20]) or "it has none"
