"""The CORE bundle: its tasks, their files, and a safe download.

A bundle is a folder with core.yaml (icl_tasks: label, icl_task_type, dataset_uri, num_fewshot, continuation_delimiter),
eval_meta_data.csv ("Eval Task", "Random baseline" in percent) and eval_data/<dataset_uri>, one JSON object per line.
"""

import csv
import http.client
import json
import logging
import os
import ssl
import stat
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from nanochat.data.local_sources import path_errors_as_user_errors
from nanochat.files import sha256_of, write_atomically
from nanochat.runtime import shown
from nanochat.system.environment import UserError, base_dir
from nanochat.system.temporary import scratch_folder

logger = logging.getLogger(__name__)

BUNDLE_URL = "https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip"
DOWNLOAD_SECONDS = 30
LARGEST_DOWNLOAD = 2 * 2**30  # bytes of the zip
LARGEST_BUNDLE = 8 * 2**30  # bytes unpacked
LARGEST_RATIO = 100  # bytes unpacked per byte of the zip: text has 3 to 10, a bomb 1000
MOST_FILES = 10_000
KEYS = {
    "multiple_choice": ("query", "choices", "gold"),
    "schema": ("context_options", "continuation", "gold"),
    "language_modeling": ("context", "continuation"),
}


@dataclass(frozen=True)
class Task:
    """Items of one kind (a key of KEYS), few-shot count, the delimiter before a continuation, chance as a fraction."""

    label: str
    kind: str
    items: list[dict] = field(repr=False)
    num_fewshot: int = 0
    delimiter: str = " "
    chance: float = 0.0


# ---------------------------------------------------------------------------------------------------------------------
# reading


def load_bundle(directory: Path) -> list[Task]:
    """The tasks of a bundle folder in the order of core.yaml; UserError names the file, and the line of a bad item."""
    import yaml  # only CORE needs it

    table, chances = directory / "core.yaml", directory / "eval_meta_data.csv"
    try:
        entries = yaml.safe_load(_read(table))["icl_tasks"]
        baselines = {
            line["Eval Task"]: float(line["Random baseline"]) / 100
            for line in csv.DictReader(_read(chances).splitlines())
        }
        tasks = []
        for entry in entries:
            label, kind = entry["label"], entry["icl_task_type"]
            path = (directory / "eval_data" / entry["dataset_uri"]).resolve()
            if kind not in KEYS:
                raise UserError(f"{table}: {label} is of the unknown type {kind!r} (known: {', '.join(KEYS)})")
            if label not in baselines:
                raise UserError(f"{chances}: no random baseline for {label}")
            if not path.is_relative_to(directory.resolve()):
                raise UserError(f"{table}: {label} reads {path}, which lies outside the bundle")
            if not 0 <= baselines[label] < 1:
                raise UserError(f"{chances}: the random baseline of {label} is not a percentage below 100")
            shots, delimiter = entry["num_fewshot"][0], entry.get("continuation_delimiter", " ")
            tasks.append(Task(label, kind, read_items(path, kind), shots, delimiter, baselines[label]))
    except (yaml.YAMLError, KeyError, TypeError, IndexError, ValueError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"CORE bundle {directory} is damaged: {type(error).__name__}: {error}") from error
    if not tasks:
        raise UserError(f"{table} lists no task")
    return tasks


def write_bundle(tasks: list[Task], directory: Path) -> None:
    """Write tasks as a bundle folder that load_bundle reads back."""
    entries = [
        {
            "label": task.label,
            "icl_task_type": task.kind,
            "dataset_uri": f"{task.label}.jsonl",
            "num_fewshot": [task.num_fewshot],
            "continuation_delimiter": task.delimiter,
        }
        for task in tasks
    ]
    for task in tasks:
        lines = "".join(json.dumps(item) + "\n" for item in task.items)
        write_atomically(directory / "eval_data" / f"{task.label}.jsonl", lines)
    chances = "".join(f"{task.label},{100 * task.chance:g}\n" for task in tasks)
    write_atomically(directory / "eval_meta_data.csv", "Eval Task,Random baseline\n" + chances)
    write_atomically(directory / "core.yaml", json.dumps({"icl_tasks": entries}, indent=1))  # JSON is YAML


def read_items(path: Path, kind: str) -> list[dict]:
    """The items of a JSONL file; UserError names the line that is not an item of this kind."""
    items = []
    # Not splitlines(): JSON strings may hold raw U+2028, which ends a line for Python but not for JSONL.
    for number, line in enumerate(_read(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            item = json.loads(line)
            reason = find_rejection_reason(item, kind)
        except (ValueError, RecursionError) as error:
            reason = str(error)
        if reason:
            raise UserError(f"{path}, line {number}: not a {kind} item: {reason}")
        items.append(item)
    if not items:
        raise UserError(f"{path} holds no item")
    return items


def find_rejection_reason(item: object, kind: str) -> str | None:
    """Why a JSON value is no item of this kind, or None."""
    if not isinstance(item, dict):
        return "not an object"
    for key in KEYS[kind]:
        if key not in item:
            return f"no key {key!r}"
        value, wanted = item[key], {"gold": int, "choices": list, "context_options": list}.get(key, str)
        if not isinstance(value, wanted) or (wanted is list and not all(isinstance(part, str) for part in value)):
            return f"{key} is {value!r}"
    options = item.get("choices", item.get("context_options"))
    if kind != "language_modeling" and not 0 <= item["gold"] < len(options):
        return f"gold {item['gold']} is not one of its {len(options)} options"
    return None


def _read(path: Path) -> str:
    if not path.is_file():
        raise UserError(f"CORE bundle: {path} is missing")
    return path.read_text(encoding="utf-8")


# ---------------------------------------------------------------------------------------------------------------------
# finding and downloading the bundle


class _NotAvailable(Exception):
    """Why there is no bundle, in one line."""


def find_bundle(path: str | Path | None = None, download: bool = True) -> Path | None:
    """The folder of the CORE bundle: the named one, else base_dir()/eval_bundle, else downloaded into it if allowed.

    The download is tried once, for at most DOWNLOAD_SECONDS; the sizes and hashes of the zip and of its files are
    recorded in base_dir()/eval_bundle.json and verified whenever the bundle is used. NANOCHAT_EVAL_BUNDLE_URL names
    another address. None where no bundle can be had, after one line that says why. UserError for a named folder
    that is no bundle and for a bundle that changed since it was downloaded.
    """
    if path is not None:
        with path_errors_as_user_errors("--bundle", path):
            folder = Path(path).expanduser()
            exists = (folder / "core.yaml").is_file()
        if not exists:
            raise UserError(f"--bundle {path}: no CORE bundle there (looked for {folder / 'core.yaml'})")
        return folder
    folder, record = base_dir() / "eval_bundle", base_dir() / "eval_bundle.json"
    if (folder / "core.yaml").is_file():
        _verify(folder, record)
        return folder
    if not download:
        return None
    try:
        _download(os.environ.get("NANOCHAT_EVAL_BUNDLE_URL") or BUNDLE_URL, folder, record)
    except _NotAvailable as reason:
        logger.info(
            f"CORE bundle not available ({reason}); scoring the OFFLINE suite instead (not comparable with CORE)"
        )
        return None
    return folder


def _verify(folder: Path, record: Path) -> None:
    """UserError when a recorded file is missing or changed. Without a record the user put the folder there."""
    for name, known in _recorded(record).get("files", {}).items():
        path = folder / name
        if not path.is_file() or [path.stat().st_size, sha256_of(path)] != known:
            raise UserError(
                f"CORE bundle: {path} is not the file that was downloaded (size or sha256 differs): "
                f"delete {folder} to download it again"
            )


def _recorded(record: Path) -> dict:
    if not record.is_file():
        return {}
    try:
        return dict(json.loads(record.read_text(encoding="utf-8")))
    except ValueError as error:
        raise UserError(f"{record} is damaged ({error}): delete it together with eval_bundle to start over") from error


def _download(url: str, folder: Path, record: Path) -> None:
    """Fetch, verify and unpack the zip, then rename it into place; _NotAvailable with the reason otherwise."""
    if folder.exists():
        raise _NotAvailable(f"{folder} exists but holds no core.yaml")
    logger.info(f"downloading the CORE bundle from {url}")
    base_dir().mkdir(parents=True, exist_ok=True)
    with scratch_folder(base_dir() / "eval_bundle") as temporary:
        archive = temporary / "eval_bundle.zip"
        _fetch(url, archive)
        download = {"url": url, "size": archive.stat().st_size, "sha256": sha256_of(archive)}
        known = _recorded(record)
        if known.get("url") == url and known.get("sha256") != download["sha256"]:
            raise _NotAvailable(
                f"the download has sha256 {download['sha256'][:16]}, {record} recorded {str(known.get('sha256'))[:16]}"
            )
        _unpack(archive, temporary / "unpacked")
        found = sorted((temporary / "unpacked").rglob("core.yaml"), key=lambda p: (len(p.parts), p))
        if not found:
            raise _NotAvailable("the downloaded zip holds no core.yaml")
        root = found[0].parent
        files = {
            p.relative_to(root).as_posix(): [p.stat().st_size, sha256_of(p)]
            for p in sorted(root.rglob("*"))
            if p.is_file()
        }
        write_atomically(record, json.dumps({**download, "files": files}, indent=1))
        try:
            root.rename(folder)
        except OSError:
            if not (folder / "core.yaml").is_file():  # otherwise another process was faster
                raise


def _fetch(url: str, path: Path) -> None:
    deadline = time.monotonic() + DOWNLOAD_SECONDS
    try:
        with urllib.request.urlopen(url, timeout=DOWNLOAD_SECONDS) as reply, open(path, "wb") as file:
            while block := reply.read1(2**20):
                file.write(block)
                if time.monotonic() > deadline:
                    raise _NotAvailable(
                        f"the download takes more than {DOWNLOAD_SECONDS} s: unzip it by hand, then --bundle DIR"
                    )
                if file.tell() > LARGEST_DOWNLOAD:
                    raise _NotAvailable(f"the download is larger than {LARGEST_DOWNLOAD / 2**30:g} GB")
            if reply.length:
                raise _NotAvailable(f"the download stopped {reply.length} bytes early")
    except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError, ssl.SSLError) as error:
        raise _NotAvailable(f"{url}: {getattr(error, 'reason', None) or error or type(error).__name__}") from error
    except ValueError as error:  # not a URL
        raise UserError(f"NANOCHAT_EVAL_BUNDLE_URL={url!r}: {error}") from error


def _unpack(archive: Path, folder: Path) -> None:
    """Unpack a zip that may be hostile: regular files inside folder only, no more bytes or files than allowed."""
    room = min(LARGEST_BUNDLE, LARGEST_RATIO * archive.stat().st_size)
    try:
        with open(archive, "rb") as file:  # zipfile would hold all entries in memory before it says how many there are
            entries = sum(block.count(b"PK\1\2") for block in iter(lambda: file.read(2**20), b""))
        if entries > 2 * MOST_FILES:
            raise _NotAvailable(f"the zip holds {entries} files: more than {MOST_FILES}")
        with zipfile.ZipFile(archive) as bundle:
            members = [m for m in bundle.infolist() if not m.is_dir()]
            if len(members) > MOST_FILES:
                raise _NotAvailable(f"the zip holds {len(members)} files: more than {MOST_FILES}")
            if unsafe := next((member.filename for member in members if not _is_safe(member)), None):
                raise _NotAvailable(f"the zip holds an unsafe name: {shown(unsafe)}")
            names = Counter(member.filename for member in members)
            if repeated := [name for name, count in names.items() if count > 1]:
                raise _NotAvailable(f"the zip holds a name twice: {shown(repeated[0])}")
            # zipfile reads no more of a member than its header says.
            if sum(member.file_size for member in members) > room:
                limit = f"{LARGEST_BUNDLE / 2**30:g} GB or {LARGEST_RATIO} times its size"
                raise _NotAvailable(f"the zip unpacks to more than {limit}")
            bundle.extractall(folder, members)
    except (FileExistsError, NotADirectoryError, IsADirectoryError) as error:
        raise _NotAvailable(f"the zip holds a name twice: {shown(Path(error.filename).name)}") from error
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError) as error:
        raise _NotAvailable(f"the downloaded zip is damaged: {error}") from error


def _is_safe(member: zipfile.ZipInfo) -> bool:
    """A regular file, stored or deflated, whose name means the same on every system."""
    kind = stat.S_IFMT(member.external_attr >> 16)  # 0 where the zip was not made on Unix
    regular = kind in (0, stat.S_IFREG) and member.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
    parts = member.filename.split("/")
    return regular and not any(part in ("", ".", "..") or len(part) > 200 or set(part) & set("\\:\0") for part in parts)
