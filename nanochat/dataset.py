"""Sources of documents: every source becomes parquet shards with a `text` column and a manifest.

`prepare` reads the standard library, the installed packages, files and folders, a dataset of the Hugging Face hub, or
climbmix, and leaves base_dir()/data/<source>/ with shard_00000.parquet ... (training), val_00000.parquet ... (held
out; climbmix keeps the hub's names) and manifest.json. A folder without a manifest does not count: everything is
written under a temporary name and renamed when whole. A source whose content changed is prepared into a new folder.

Held out is a document when int(sha256(name), 16) % 10 == 0: the relative posix path of a file, or "path#row" for a
block of a single text file, a line of jsonl, a row of parquet or of a hub dataset. Of climbmix it is the last shard.
"""

import ast
import errno
import hashlib
import json
import math
import os
import platform
import re
import shutil
import sys
import sysconfig
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from nanochat.runtime import UserError, base_dir, write_atomically
from nanochat.settings import Settings, nearest_name

Say = Callable[[str], None]
SPLITS = ("train", "val")
TEXT_SUFFIXES = (".txt", ".md", ".py")
ROW_SUFFIXES = (".jsonl", ".parquet")
SHARD_BYTES = 16_000_000  # text of one shard: enough to compress and to shuffle in, small enough to hold in memory
BLOCK_BYTES = 4096  # text of one document of a single text file
LEAST_BYTES = 10_000  # less is not even one batch of the smallest preset
LEAST_STDLIB_BYTES = 2_000_000
LARGEST_FILE = 1_000_000_000  # a file is one document, and one string of arrow ends at 2 GB
HUB_DOCUMENTS = 100_000  # documents taken of a hub dataset when no limit is given
FORMAT = 1  # part of the state: raise it when the same source would give other documents

STDLIB_EXCLUDED = {
    "test", "tests", "ensurepip", "lib2to3", "idlelib", "tkinter", "distutils", "encodings", "pydoc_data",
    "site-packages", "dist-packages", "__pycache__",
}  # fmt: skip
PACKAGES_EXCLUDED = {"test", "tests", "_vendor", "__pycache__"}

CLIMBMIX_REPO = "karpathy/climbmix-400b-shuffle"
CLIMBMIX_LAST = 6542  # the last shard, the one held out
CLIMBMIX_SHARDS = 8  # training shards when no limit is given: about 0.7 GB to download, 2 GB of text


class Unreachable(UserError):
    """The hub cannot be reached: the one failure for which a source that a preset chose may be replaced."""


class Corrupt(UserError):
    """A shard or file that cannot be read: left out instead when skip_corrupt is set."""


# ---------------------------------------------------------------------------------------------------------------------
# the prepared dataset


@dataclass
class Dataset:
    """Parquet shards on disk with their manifest.

    manifest keys: name, source, licence, fingerprint, left_out (reason -> count) and files, one entry a shard:
    name, split, size (bytes on disk), sha256 (of the file), documents, text_bytes (UTF-8), text_sha256.
    """

    directory: Path
    manifest: dict
    skip_corrupt: bool = False
    say: Say = print
    skipped: dict[str, str] = field(default_factory=dict)  # shard name -> why it is left out

    @property
    def name(self) -> str:
        return self.manifest["name"]

    @property
    def fingerprint(self) -> dict:
        """source, version, files, bytes (of text) and sha256 (of names and texts): equal for equal documents."""
        return self.manifest["fingerprint"]

    def entries(self, split: str) -> list[dict]:
        """The manifest's entries of one split, without shards known to be damaged; Corrupt names a damaged one."""
        assert split in SPLITS, split
        for entry in self.manifest["files"]:
            if entry["split"] == split and entry["name"] not in self.skipped:
                path = self.directory / entry["name"]
                size = path.stat().st_size if path.is_file() else None
                if size is None:
                    self._damaged(path, "is missing")
                elif size != entry["size"]:
                    self._damaged(path, f"has {size} bytes, the manifest says {entry['size']}")
        return [e for e in self.manifest["files"] if e["split"] == split and e["name"] not in self.skipped]

    def shards(self, split: str) -> list[Path]:
        """Paths of the shards of "train" or "val", in order; sizes are checked."""
        return [self.directory / entry["name"] for entry in self.entries(split)]

    def text_bytes(self, split: str) -> int:
        """UTF-8 bytes of the split's documents."""
        return sum(entry["text_bytes"] for entry in self.entries(split))

    def num_documents(self, split: str) -> int:
        return sum(entry["documents"] for entry in self.entries(split))

    def documents(self, split: str) -> Iterator[tuple[str, str]]:
        """(name, text) of every document of a split, in path order."""
        for shard in self.shards(split):
            yield from self.read(shard)

    def read(self, shard: Path) -> Iterator[tuple[str, str]]:
        """(name, text) of one shard's documents, a row group at a time.

        A corrupt shard raises Corrupt with its name. Under skip_corrupt it is read through first, so that it gives
        all of its documents or none, and is then told, counted in `skipped` and left out from now on.
        """
        try:
            if self.skip_corrupt:
                for _ in read_shard(shard):
                    pass
            yield from read_shard(shard)
        except Corrupt as error:
            self._damaged(shard, str(error).removeprefix(f"{shard} "))

    def verify(self) -> int:
        """Hash every shard again and return their number; Corrupt names the shards that differ from the manifest."""
        paths = [path for split in SPLITS for path in self.shards(split)]
        recorded = {entry["name"]: entry["sha256"] for entry in self.manifest["files"]}
        for path in paths:
            if _sha256(path) != recorded[path.name]:
                self._damaged(path, "does not have the sha256 of its manifest")
        return sum(path.name not in self.skipped for path in paths)

    def _damaged(self, path: Path, why: str) -> None:
        if not self.skip_corrupt:
            remedy = f"delete {path if self.manifest['source'] == 'climbmix' else self.directory} and prepare it again"
            raise Corrupt(f"{path} {why}: {remedy}, or leave the shard out with --skip_corrupt=True")
        if path.name not in self.skipped:
            self.skipped[path.name] = why
            self.say(f"data: {path.name} {why}: left out ({len(self.skipped)} so far)")


def held_out(name: str) -> bool:
    """True for the tenth of all document names that is never trained on; a docstring document follows its file."""
    key = name.removesuffix("#docstrings")
    return int(hashlib.sha256(key.encode("utf-8")).hexdigest(), 16) % 10 == 0


def read_shard(shard: Path) -> Iterator[tuple[str, str]]:
    """(name, text) of a parquet shard; without a `name` column documents are called file#row. Corrupt if unreadable."""
    with _reading(shard):
        file = pq.ParquetFile(shard, page_checksum_verification=True)
        columns = [column for column in ("name", "text") if column in file.schema_arrow.names]
        row = 0
        for group in range(file.num_row_groups):
            table = file.read_row_group(group, columns=columns)
            texts = table["text"].to_pylist()
            if "name" in columns:
                yield from zip(table["name"].to_pylist(), texts, strict=True)
            else:
                yield from ((f"{shard.name}#{row + i}", text or "") for i, text in enumerate(texts))
            row += len(texts)


# ---------------------------------------------------------------------------------------------------------------------
# preparing


def prepare_for(settings: Settings, *, fallback: bool = False, say: Say = print) -> Dataset:
    """The dataset that the data* settings name, prepared if need be.

    fallback: a preset, not the user, chose the source, so that climbmix without network becomes `packages`.
    """
    options = dict(workers=4, skip_corrupt=settings.skip_corrupt, say=say)
    try:
        return prepare(
            settings.data,
            column=settings.data_column,
            split=settings.data_split,
            config=settings.data_config,
            limit=settings.data_limit,
            **options,
        )
    except Unreachable as error:
        if not (fallback and settings.data == "climbmix"):
            raise
        say(f"data: {error}; going on with data=packages")
        return prepare("packages", **options)


def prepare(
    source: str,
    *,
    column: str = "text",
    split: str = "train",
    config: str | None = None,
    limit: int | None = None,
    skip_corrupt: bool = False,
    workers: int = 4,
    say: Say = print,
) -> Dataset:
    """Make base_dir()/data/<source>/ when it is missing or the source changed; otherwise only open it.

    source: stdlib, packages, climbmix, hf:<dataset>, or the path of a file or folder (.txt .md .py .jsonl .parquet,
    recursively, hidden ones left out). column: of jsonl, parquet and hub rows. split, config: of a hub dataset.
    limit: climbmix training shards, or hub documents. workers: parallel downloads of climbmix.
    Raises UserError for a missing, empty or too small source, Corrupt for an unreadable one, Unreachable for the hub.
    """
    if source == "climbmix":
        return _climbmix(limit or CLIMBMIX_SHARDS, workers, skip_corrupt, say)
    if source.startswith("hf:"):
        options = dict(column=column, split=split, config=config, limit=limit or HUB_DOCUMENTS)
        plan = _plan_hub(source.removeprefix("hf:"), options, say)
    elif source in ("stdlib", "packages"):
        plan = _plan_stdlib() if source == "stdlib" else _plan_packages()
    else:
        plan = _plan_path(source, column, skip_corrupt, say)
    return _materialise(plan, skip_corrupt, say)


@dataclass
class _Plan:
    """What a source would give: cheap to make, so that an unchanged source costs only a look at its files."""

    name: str  # of the folder
    source: str  # for the fingerprint; the same on every machine
    version: str
    licence: str
    state: object  # JSON: as long as it stays the same, so do the documents
    read: Callable[[Counter], Iterator[tuple[str, str | bytes]]]  # counts files and what was left out
    least_bytes: int = LEAST_BYTES
    advice: str = "give a larger file or folder"


def _materialise(plan: _Plan, skip_corrupt: bool, say: Say) -> Dataset:
    """Open the version of this source that was prepared from this state, or make it."""
    data = base_dir() / "data"
    state = _digest(json.dumps([FORMAT, plan.state]))
    known = _versions(data, plan.name)
    for directory, manifest in known:
        if manifest["state"] == state:
            return Dataset(directory, manifest, skip_corrupt, say)
    why = f"{plan.name} changed since it was prepared" if known else f"preparing {plan.name}"
    say(f"data: {why}, writing shards")
    with _scratch(data, plan.name) as scratch:
        counts: Counter = Counter()
        entries = _write_shards(plan.read(counts), scratch, counts)
        _check_enough(plan, entries, counts)
        manifest = {
            "name": plan.name,
            "source": plan.source,
            "licence": plan.licence,
            "fingerprint": _fingerprint(plan.source, plan.version, counts["files"], entries),
            "state": state,
            "left_out": {reason: n for reason, n in sorted(counts.items()) if reason != "files"},
            "files": entries,
        }
        same = [d for d, m in known if m["fingerprint"]["sha256"] == manifest["fingerprint"]["sha256"]]
        if same:  # touched, not changed
            target, manifest["name"] = same[0], same[0].name
            _write_manifest(target, manifest | {"files": _read_manifest(target)["files"]})
        else:
            target = data / plan.name
            if target.exists():
                target = data / f"{plan.name}-{manifest['fingerprint']['sha256'][:8]}"
                manifest["name"] = target.name
            _write_manifest(scratch, manifest)
            _commit(scratch, target)
    manifest = _read_manifest(target)
    left = ", ".join(f"{n} {reason}" for reason, n in manifest["left_out"].items())
    say(
        f"data: {manifest['fingerprint']['files']} files, {manifest['fingerprint']['bytes'] / 1e6:.2f} MB of text"
        f"{f' (left out: {left})' if left else ''} -> {target}"
    )
    return Dataset(target, manifest, skip_corrupt, say)


def _write_shards(documents: Iterable[tuple[str, str | bytes]], directory: Path, counts: Counter) -> list[dict]:
    """Write documents as shards of about SHARD_BYTES in both splits; returns the manifest's entries, train first."""
    entries: list[dict] = []
    pending: dict[str, list[tuple[str, str]]] = {split: [] for split in SPLITS}
    sizes = dict.fromkeys(SPLITS, 0)

    def flush(split: str) -> None:
        number = sum(entry["split"] == split for entry in entries)
        path = directory / f"{'shard' if split == 'train' else 'val'}_{number:05d}.parquet"
        names, texts = zip(*pending[split], strict=True)
        table = pa.table({"name": pa.array(names, pa.string()), "text": pa.array(texts, pa.string())})
        pq.write_table(table, path, compression="zstd", row_group_size=1024, write_page_checksum=True)
        entries.append(_describe(path, split))
        pending[split], sizes[split] = [], 0

    for name, raw in documents:
        try:
            text = raw.decode("utf-8") if isinstance(raw, bytes) else raw
            size = len(text.encode("utf-8"))  # fails for the lone surrogates that JSON may hold
        except UnicodeError:
            counts["undecodable"] += 1
            continue
        if not text.strip():
            counts["empty"] += 1
            continue
        split = "val" if held_out(name) else "train"
        pending[split].append((name, text))
        sizes[split] += size
        if sizes[split] >= SHARD_BYTES:
            flush(split)
    for split in SPLITS:
        if pending[split]:
            flush(split)
    return sorted(entries, key=lambda entry: (SPLITS.index(entry["split"]), entry["name"]))


def _describe(path: Path, split: str) -> dict:
    """A shard's manifest entry, from reading it whole: what is recorded is what can be read back."""
    documents, text_bytes, digest = 0, 0, hashlib.sha256()
    for name, text in read_shard(path):
        raw = text.encode("utf-8")
        digest.update(f"{name}\0{len(raw)}\0".encode() + raw)
        documents, text_bytes = documents + 1, text_bytes + len(raw)
    return {
        "name": path.name,
        "split": split,
        "size": path.stat().st_size,
        "sha256": _sha256(path),
        "documents": documents,
        "text_bytes": text_bytes,
        "text_sha256": digest.hexdigest(),
    }


def _fingerprint(source: str, version: str, files: int, entries: list[dict]) -> dict:
    """The dataset's identity, from its texts alone: parquet bytes differ between versions of pyarrow."""
    total = sum(entry["text_bytes"] for entry in entries)
    sha256 = _digest("".join(f"{entry['split']} {entry['text_sha256']}\n" for entry in entries))
    return {"source": source, "version": version, "files": files, "bytes": total, "sha256": sha256}


def _check_enough(plan: _Plan, entries: list[dict], counts: Counter) -> None:
    sums = {s: [sum(e[k] for e in entries if e["split"] == s) for k in ("documents", "text_bytes")] for s in SPLITS}
    total = sum(size for _, size in sums.values())
    found = f"{counts['files']} files with {total} bytes of text"
    left = ", ".join(f"{n} {reason}" for reason, n in sorted(counts.items()) if reason != "files")
    found += f" (left out: {left})" if left else ""
    if total < plan.least_bytes:
        raise UserError(
            f"data={plan.source}: too little text: {found}, at least {plan.least_bytes} needed: {plan.advice}"
        )
    for split, meaning in (("train", "to train on"), ("val", "held out")):
        if not sums[split][0]:
            documents = sum(n for n, _ in sums.values())
            raise UserError(
                f"data={plan.source}: no document is {meaning} among {documents} ({found}; about one name in ten is "
                "held out): give more files, or put all text into one .txt or .jsonl file, which is split within"
            )


# ---------------------------------------------------------------------------------------------------------------------
# local sources


def _plan_stdlib() -> _Plan:
    return _Plan(
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
    def source(name: str) -> bool:
        return name.endswith(".py") and not name.rpartition("/")[2].startswith(("turtle", "_sysconfigdata"))

    excluded = lambda folder: folder in STDLIB_EXCLUDED or folder.startswith("turtle")  # noqa: E731
    return _walk(Path(sysconfig.get_path("stdlib")), source, excluded)


def _plan_packages() -> _Plan:
    packages = dict(_package_files())
    files = sorted((packages | dict(_stdlib_files())).items())
    return _Plan(
        "packages",
        "packages",
        platform.python_version(),
        "each package's own licence, beside its metadata in site-packages; the standard library's is the PSF License",
        _stat_all(files),
        lambda counts: _with_docstrings(_whole_files(files, counts, at_least=200, at_most=1_000_000), set(packages)),
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


def _plan_path(source: str, column: str, skip_corrupt: bool, say: Say) -> _Plan:
    path = Path(source).expanduser()
    suffixes = TEXT_SUFFIXES + ROW_SUFFIXES
    kinds = " ".join(suffixes)
    if path.is_dir():
        files = _walk(path, lambda name: name.lower().endswith(suffixes) and not _hidden(Path(name).name), _hidden)
        if not files:
            seen = sum(len(names) for _, _, names in os.walk(path))
            raise UserError(f"data={source}: no text found: {seen} files, none of them {kinds}")
    elif path.is_file():
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
    slug = re.sub(r"[^A-Za-z0-9._-]+", "-", absolute.name).strip(".-") or "root"
    return _Plan(
        f"{slug}-{_digest(str(absolute))[:8]}",
        _printable(absolute.name),
        f"column {column}" if any(name.lower().endswith(ROW_SUFFIXES) for name, _ in files) else "text",
        "not known: your own files",
        [column, skip_corrupt, path.is_dir(), _stat_all(files)],
        lambda counts: _read_files(files, column, path.is_file(), skip_corrupt, say, counts),
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
    with _reading(path):
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
            yield _text_of(row, column, f"{path} line {number}")


def _parquet_rows(path: Path, column: str) -> Iterator[str]:
    file = pq.ParquetFile(path, page_checksum_verification=True)
    if column not in file.schema_arrow.names:
        raise UserError(
            f"{path} has no column {column!r}: choose one with --data_column ({_listed(file.schema_arrow.names)})"
        )
    for group in range(file.num_row_groups):
        for text in file.read_row_group(group, columns=[column])[column].to_pylist():
            yield _text_of({column: text}, column, str(path))


def _text_of(row: dict, column: str, where: str) -> str:
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


def _hidden(name: str) -> bool:
    return name.startswith(".")


def _walk(root: Path, wanted: Callable[[str], bool], excluded: Callable[[str], bool]) -> list[tuple[str, Path]]:
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


# ---------------------------------------------------------------------------------------------------------------------
# the Hugging Face hub


def _endpoint() -> str:
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def _probe(what: str) -> None:
    """Unreachable at once when the hub does not answer: its own clients would try again for minutes."""
    import urllib.error
    import urllib.request  # knows the proxies of the environment

    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        raise Unreachable(f"{what} is not here and HF_HUB_OFFLINE forbids the network")
    try:
        urllib.request.urlopen(urllib.request.Request(_endpoint(), method="HEAD"), timeout=8).close()
    except urllib.error.HTTPError:
        pass  # an answer, though not a page: the hub is there
    except (OSError, ValueError) as error:  # URLError and timeouts are OSErrors; an endpoint that is no URL
        reason = getattr(error, "reason", error)
        raise Unreachable(f"{what} is not here and {_endpoint()} cannot be reached ({reason})") from error


def _hub_errors() -> tuple[type[Exception], ...]:
    """What the hub's clients raise: their own errors, and those of whichever HTTP library they were built on."""
    from http.client import HTTPException

    from huggingface_hub.errors import HfHubHTTPError

    return (OSError, ValueError, RuntimeError, HTTPException, HfHubHTTPError.__bases__[0])


def _plan_hub(name: str, options: dict, say: Say) -> _Plan:
    if not name:
        raise UserError("data=hf: lacks the dataset's name, as in hf:roneneldan/TinyStories")
    slug = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip(".-") or "dataset"
    return _Plan(
        f"hf-{slug}-{_digest(json.dumps([name, options]))[:8]}",
        f"hf:{name}",
        ", ".join(f"{key} {value}" for key, value in options.items() if value is not None),
        f"see the dataset card of {name} on the hub",
        [name, options],
        lambda counts: _hub_documents(name, options, counts, say),
        advice="raise --data_limit or choose another dataset",
    )


def _hub_documents(name: str, options: dict, counts: Counter, say: Say) -> Iterator[tuple[str, str]]:
    """Rows of a streamed hub dataset (or of a local folder that `datasets` reads), called <name>#<row>."""
    column, limit = options["column"], options["limit"]
    if not Path(name).expanduser().is_dir():
        _probe(f"hf:{name}")
    try:
        import datasets  # heavy
    except ImportError as error:
        raise UserError(f"data=hf:{name} needs the datasets package: pip install datasets ({error})") from error
    datasets.config.STREAMING_READ_MAX_RETRIES = 3  # 20 by default: minutes of silence on a dead network
    say(f"data: streaming hf:{name}, at most {limit} documents")
    row = -1
    try:
        stream = datasets.load_dataset(name, options["config"], split=options["split"], streaming=True)
        for row, record in enumerate(stream):
            if row >= limit:
                say(f"data: stopped after {limit} documents of hf:{name} (--data_limit takes more)")
                return
            counts["files"] += 1
            yield f"{name}#{row}", _text_of(record, column, f"hf:{name}")
    except UserError:
        raise
    except _hub_errors() as error:
        kind = Unreachable if isinstance(error, ConnectionError) else UserError
        raise kind(f"data=hf:{name}: {_first_line(error)} (after {row + 1} documents)") from error


def _shard_name(number: int) -> str:
    return f"shard_{number:05d}.parquet"


def _climbmix(limit: int, workers: int, skip_corrupt: bool, say: Say) -> Dataset:
    """The first `limit` training shards and the held-out last one, downloaded where missing.

    One folder serves every limit: its manifest records size and sha256 of all shards at their first download, the
    returned dataset and fingerprint cover only the shards asked for.
    """
    if limit > CLIMBMIX_LAST:
        raise UserError(f"data_limit={limit}: climbmix has {CLIMBMIX_LAST} training shards")
    directory = base_dir() / "data" / "climbmix"
    names = [_shard_name(number) for number in (*range(limit), CLIMBMIX_LAST)]
    manifest = _read_manifest(directory) or {
        "name": "climbmix",
        "source": "climbmix",
        "licence": f"see the dataset card of {CLIMBMIX_REPO} on the hub",
        "left_out": {},
        "files": [],
    }
    known = {entry["name"]: entry for entry in manifest["files"]}
    if missing := [name for name in names if name not in known or not (directory / name).exists()]:
        _probe("climbmix")
        directory.mkdir(parents=True, exist_ok=True)
        say(f"data: downloading {len(missing)} of {len(names)} climbmix shards from {_endpoint()} to {directory}")
        for entry in _download(missing, directory, workers, known, say):
            known[entry["name"]] = entry
            manifest["files"] = [known[name] for name in sorted(known)]
            manifest["fingerprint"] = _fingerprint("climbmix", CLIMBMIX_REPO, len(known), manifest["files"])
            _write_manifest(directory, manifest)
    entries = [known[name] for name in names]
    chosen = {"files": entries, "fingerprint": _fingerprint("climbmix", CLIMBMIX_REPO, len(entries), entries)}
    return Dataset(directory, manifest | chosen, skip_corrupt, say)


def _download(names: list[str], directory: Path, workers: int, known: dict[str, dict], say: Say) -> Iterator[dict]:
    """Fetch shards in parallel and yield their manifest entries as they arrive; a broken download goes on later."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    stop = threading.Event()

    def fetch(name: str) -> dict:
        url = hf_hub_url(CLIMBMIX_REPO, name, repo_type="dataset", endpoint=_endpoint())
        announced = get_hf_file_metadata(url, timeout=10)
        path = directory / name
        if not (path.exists() and path.stat().st_size == announced.size):
            _fetch(url, path, announced.size, stop, moved)
        sha256, etag = _sha256(path), announced.etag or ""
        wanted = known[name]["sha256"] if name in known else etag if re.fullmatch("[0-9a-f]{64}", etag) else sha256
        if sha256 != wanted:
            path.unlink()
            origin = "its first download" if name in known else "the hub"
            raise Corrupt(
                f"{name}: downloaded sha256 {sha256[:12]}, {origin} says {wanted[:12]}: run again to fetch it"
            )
        return _describe(path, "val" if name == _shard_name(CLIMBMIX_LAST) else "train")

    with ThreadPoolExecutor(max(1, workers)) as pool, _progress(len(names)) as moved:
        try:
            for count, done in enumerate(as_completed([pool.submit(fetch, name) for name in names]), 1):
                yield (entry := done.result())
                say(f"data: {count}/{len(names)} {entry['name']} {entry['size'] / 1e6:.1f} MB")
        except UserError:
            raise
        except _hub_errors() as error:
            if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
                raise  # the disk, not the hub
            raise Unreachable(f"climbmix: the download stopped ({_first_line(error)}); run again to go on") from error
        finally:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)


def _fetch(url: str, path: Path, size: int | None, stop: threading.Event, moved: Callable[[float], None]) -> None:
    """Download into a hidden partial file, which a cut or killed download leaves to go on from, then rename it.

    huggingface_hub throws partial files away. A cut connection is taken up again as long as bytes arrive.
    """
    from urllib.request import Request, urlopen

    partial = path.with_name(f".{path.name}.partial")
    while True:
        start = partial.stat().st_size if partial.exists() else 0
        if size is not None and start >= size:
            break
        request = Request(url, headers={"Range": f"bytes={start}-"} if start else {})
        with urlopen(request, timeout=20) as response, open(partial, "ab" if response.status == 206 else "wb") as file:
            while not stop.is_set() and (chunk := response.read(1 << 20)):
                file.write(chunk)
                moved(len(chunk) / (size or math.inf))
        now = partial.stat().st_size
        if stop.is_set() or (size is not None and now <= start):
            raise ConnectionError(f"{path.name} ended after {now} of {size} bytes")
        if size is None:
            break
    os.replace(partial, path)


@contextmanager
def _progress(total: int) -> Iterator[Callable[[float], None]]:
    """A function to call with fractions of a shard as they arrive: it moves a bar on a terminal, nothing elsewhere."""
    if not sys.stdout.isatty():
        yield lambda fraction: None
        return
    from rich.progress import BarColumn, Progress, TimeRemainingColumn

    with Progress(BarColumn(), "{task.completed:.1f}/{task.total} shards", TimeRemainingColumn()) as bar:
        task = bar.add_task("climbmix", total=total)
        yield lambda fraction: bar.advance(task, fraction)


# ---------------------------------------------------------------------------------------------------------------------
# files


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn what pyarrow and the disk raise about an unreadable file into Corrupt with its name."""
    try:
        yield
    except UserError:
        raise
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        raise Corrupt(f"{path} cannot be read ({_first_line(error)})") from error


def _read_manifest(directory: Path) -> dict | None:
    """The manifest, or None where there is none that counts."""
    try:
        manifest = json.loads((directory / "manifest.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{directory / 'manifest.json'} cannot be read ({error}): delete {directory}") from error
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), list):
        raise UserError(f"{directory / 'manifest.json'} is not a manifest of ours: delete {directory}")
    return manifest


def _write_manifest(directory: Path, manifest: dict) -> None:
    write_atomically(directory / "manifest.json", json.dumps(manifest, indent=1) + "\n")


def _versions(data: Path, name: str) -> list[tuple[Path, dict]]:
    """The prepared versions of a source: the folder of its name, and later ones with the content's hash behind it."""
    folders = sorted(data.iterdir()) if data.is_dir() else []
    ours = [d for d in folders if re.fullmatch(re.escape(name) + "(-[0-9a-f]{8})?", d.name)]
    found = [(d, _read_manifest(d)) for d in ours]
    return [(d, manifest) for d, manifest in found if manifest is not None and "state" in manifest]


@contextmanager
def _scratch(data: Path, name: str) -> Iterator[Path]:
    """A temporary folder beside the target; removed on the way out, and what a killed run left behind after an hour."""
    data.mkdir(parents=True, exist_ok=True)
    for stale in data.glob(".*.tmp"):
        if time.time() - stale.stat().st_mtime > 3600:
            shutil.rmtree(stale, ignore_errors=True)
    scratch = data / f".{name}.{os.getpid()}.tmp"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _commit(scratch: Path, target: Path) -> None:
    """Make the finished folder count: everything on disk first, then the rename, then the parent."""
    for path in (*scratch.iterdir(), scratch):
        _fsync(path)
    try:
        os.rename(scratch, target)
    except OSError:
        if _read_manifest(target) is None:  # otherwise another process was faster, with the same documents
            raise
    _fsync(target.parent)


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()


def _printable(path: str) -> str:
    """A file name as valid text: bytes that are no UTF-8 are written as escapes."""
    return path.encode("utf-8", "backslashreplace").decode("utf-8")


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(map(str, names))[:20]) or "it has none"


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
