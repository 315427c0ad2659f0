"""Sources on this machine: the standard library, the installed packages, the user's files and folders.

A source is a plan, cheap to make, and a reader that yields (name, text) of every document in path order.
"""

import ast
import hashlib
import logging
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

from nanochat.data.encodings import Corrupt
from nanochat.data.folders import Found, escape_undecodable, find_files, list_first
from nanochat.data.splits import find_mixed_parts, find_own_split
from nanochat.data.text_files import (
    COMPRESSIONS,
    ROW_SUFFIXES,
    TABLE_SUFFIXES,
    TEXT_SUFFIXES,
    Rows,
    content_suffix,
    file_documents,
    is_read,
)
from nanochat.runtime import first_line, nearest_name, shown
from nanochat.system import logs
from nanochat.system.environment import UserError

logger = logging.getLogger(__name__)

KINDS = (
    f"{' '.join(TEXT_SUFFIXES + ROW_SUFFIXES)}, and where there are none of them {' '.join(TABLE_SUFFIXES)} and "
    f"compressed ones, as in .txt{COMPRESSIONS[0]}"
)
READING = 2  # part of the state of the user's files: raise it when the same files would give other documents
LEAST_BYTES = 10_000  # less is not even one batch of the smallest preset
LEAST_STDLIB_BYTES = 2_000_000

STDLIB_EXCLUDED = (
    "test tests ensurepip lib2to3 idlelib tkinter distutils encodings pydoc_data site-packages dist-packages "
    "__pycache__"
).split()
PACKAGES_EXCLUDED = {"test", "tests", "_vendor", "__pycache__"}


@dataclass
class Source:
    """What a source would give: cheap to make, so that an unchanged source costs only a look at its files."""

    name: str  # of the folder
    source: str  # for the fingerprint; the same on every machine
    version: str
    licence: str
    state: object  # JSON: as long as it stays the same, so do the documents
    read: Callable[[Counter], Iterator[tuple]]  # of dataset.Document's fields; counts files and what was skipped
    least_bytes: int = LEAST_BYTES
    advice: str = "give a larger file or folder"
    manifest: dict = field(default_factory=dict)  # further keys of the manifest; complete when all was read
    drop_copies: bool = False  # leave held-out documents out that are equal to one of training
    undecodable: list[str] = field(default_factory=list)  # the first documents that are no text, and why


def plan_stdlib() -> Source:
    """The standard library of the running interpreter, a file a document: about 7.7 MB without tests and tables."""
    return Source(
        "stdlib",
        "stdlib",
        platform.python_version(),
        "Python Software Foundation License (source of the running interpreter)",
        stat_all(files := _stdlib_files()),
        lambda counts: _read_whole_files(files, counts, at_least=200),
        LEAST_STDLIB_BYTES,
        "this Python lacks its source files (zipped or frozen?): pass a folder of text files with --data=FOLDER",
    )


def _stdlib_files() -> list[tuple[str, Path]]:
    """The running interpreter's own .py files, as (relative posix path, file)."""

    def wanted(name: str) -> bool:
        return name.endswith(".py") and not name.rpartition("/")[2].startswith(("turtle", "_sysconfigdata"))

    def excluded(folder: str) -> bool:
        return folder in STDLIB_EXCLUDED or folder.startswith("turtle")

    return list_files(Path(sysconfig.get_path("stdlib")), wanted, excluded)


def plan_packages() -> Source:
    """The standard library and all our runtime requirements, each module's long docstrings as a further document."""
    installed = dict(_package_files())
    files = sorted((installed | dict(_stdlib_files())).items())
    return Source(
        "packages",
        "packages",
        platform.python_version(),
        "each package's own licence, beside its metadata in site-packages; the standard library's is the PSF License",
        ["without copies", stat_all(files)],
        lambda counts: _add_docstrings(
            _read_whole_files(files, counts, at_least=200, at_most=1_000_000), set(installed)
        ),
        LEAST_STDLIB_BYTES,
        "pass a folder of text files with --data=FOLDER",
        drop_copies=True,  # packages that hold each other's modules
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
            with suppress(metadata.PackageNotFoundError):  # not installed on purpose, as GPU libraries on a CPU machine
                found[name] = metadata.distribution(name)
                todo.append(found[name])
    return [found[name] for name in sorted(found)]


def _add_docstrings(files: Iterable[tuple[str, bytes]], packages: set[str]) -> Iterator[tuple[str, str | bytes]]:
    """Every file, and after a package's file one document with its docstrings over 200 characters, repeats skipped."""
    seen: set[str] = set()
    for name, raw in files:
        yield name, raw
        if name in packages and (new := [doc for doc in _extract_docstrings(raw) if doc not in seen]):
            new = list(dict.fromkeys(new))
            seen.update(new)
            yield f"{name}#docstrings", "\n\n".join(new) + "\n"


def _extract_docstrings(source: bytes) -> list[str]:
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


def plan_path(source: str, column: str, skip_corrupt: bool) -> Source:
    """The documents of a file or of all files below a folder; what a folder holds besides is named and counted."""
    with path_errors_as_user_errors("data", source):
        path = Path(source).expanduser()
        is_folder, is_file = path.is_dir(), path.is_file()
    found = Found()
    if is_folder:
        found = find_files(path, skip_corrupt=skip_corrupt)
        found.report_own_output()
        further = not any(is_read(name, further=False) for name, _ in found.files)
        alone = [] if further else [name for name, _ in found.files if is_read(name, True) and not is_read(name, False)]
        files = found.choose(lambda name: is_read(name, further))
        if alone:
            logger.info(
                f"data: {len(alone)} tables and compressed files ({list_first(alone)}) are not read beside "
                f"{' '.join(TEXT_SUFFIXES + ROW_SUFFIXES)}: pass one alone, or move the others away"
            )
        if not files:
            seen = "; ".join(found.describe()) or "0 files"
            raise UserError(f"data={source}: no text found: {seen}; what is read: {KINDS}")
    elif is_file:
        if not is_read(path.name, further=True):
            kind = path.suffix or "a file without suffix"
            raise UserError(f"data={source}: cannot read {kind}: one of {KINDS}")
        files = [(escape_undecodable(path.name), path)]
    else:
        hint = nearest_name(source, ("stdlib", "packages", "climbmix"))
        hint = hint if "did you mean" in hint else ""
        raise UserError(
            f"data={source}: no such file or folder{hint}; one of stdlib, packages, climbmix, hf:<dataset>, or a path"
        )
    parts = find_own_split(name for name, _ in files) if is_folder else None
    if not parts and is_folder and (mixed := find_mixed_parts(name for name, _ in files)):
        named, others = mixed
        logger.info(
            f"data: note: {list_first(named)} are called as parts of a split, {list_first(others)} "
            "not: all are read, and what is held out is drawn anew (move the others away to keep it)"
        )
    if parts:
        for name, _ in files:
            if parts[name] is None:
                found.skip("a test part beside the validation part that is held out", name)
        files = [(name, file) for name, file in files if parts[name]]
    absolute = path.resolve()
    columns = any(content_suffix(name)[0] not in TEXT_SUFFIXES for name, _ in files)
    if is_folder and not columns and column != "text":
        logger.info(f"data: note: data_column={column!r} has no effect: none of the {len(files)} files has columns")
    return Source(
        name_of_path(absolute),
        escape_undecodable(absolute.name),
        f"column {column}" if columns else "text",
        "not known: your own files",
        [column, skip_corrupt, is_folder, READING, stat_all(files)],
        lambda counts: _read_files(files, found, parts or {}, column, is_file, skip_corrupt, counts),
        manifest={"split_rule": "its own validation or test part is held out"} if parts else {},
    )


def _read_files(
    files, found: Found, parts: dict, column: str, single: bool, skip_corrupt: bool, counts: Counter
) -> Iterator[tuple]:
    """Documents of the user's files; an unreadable file is an error, or under skip_corrupt skipped as a whole.

    parts: file -> split, where the folder has a split of its own.
    """
    found.report(counts)
    rows = Rows(skip_corrupt, counts)
    for name, path in files:
        counts["files"] += 1
        try:
            if skip_corrupt:
                with logs.muted():  # the second pass logs what it skips
                    for _ in file_documents(name, path, column, single, Rows(True, Counter())):
                        pass
            for document, text in file_documents(name, path, column, single, rows):
                yield document, text, None, None, parts.get(name)
        except Corrupt as error:
            if not skip_corrupt:
                raise
            counts["corrupt"] += 1
            logger.info(f"data: {error}: skipped")
    rows.close()


def _read_whole_files(files, counts: Counter, at_least: int, at_most: int | None = None) -> Iterator[tuple[str, bytes]]:
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


def list_files(root: Path, wanted: Callable[[str], bool], excluded: Callable[[str], bool]) -> list[tuple[str, Path]]:
    """(relative posix path, file) below root of wanted paths, sorted; excluded folders, by name, are not entered."""
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if not excluded(name)]
        for path in (Path(folder, name) for name in names):
            relative = escape_undecodable(path.relative_to(root).as_posix())
            if wanted(relative) and path.is_file():
                found.append((relative, path))
    return sorted(found)


def stat_all(files: Iterable[tuple[str, Path]]) -> list:
    """Name, size and time of change of every file: cheap, and different when a content is."""
    stats = ((name, path.stat()) for name, path in files)
    return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]


@contextmanager
def path_errors_as_user_errors(name: str, value: str | Path) -> Iterator[None]:
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


def name_of_path(path: Path) -> str:
    """Folder name of what is prepared from an absolute path."""
    return f"{slugify(path.name)}-{digest(str(path))[:8]}"


def slugify(name: str) -> str:
    """A readable part of a folder's name."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip(".-")[:80] or "data"
