"""Sources on the Hugging Face hub: any dataset, streamed, and the shards of climbmix, downloaded."""

import json
import logging
import math
import os
import re
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path

from nanochat.data.encodings import Corrupt
from nanochat.data.folders import find_files
from nanochat.data.local_sources import Source, digest, path_errors_as_user_errors, slugify, stat_all
from nanochat.data.text_files import get_text
from nanochat.files import sha256_of
from nanochat.runtime import first_line
from nanochat.system.environment import UserError, base_dir
from nanochat.system.storage_errors import NEEDS_PATH, find_storage_error
from nanochat.system.temporary import file_lock

logger = logging.getLogger(__name__)

HUB_DOCUMENTS = 100_000  # documents taken of a hub dataset when no limit is given
LARGEST_MEAN = 1_000_000  # characters that a hub dataset may have per document of its limit
CLIMBMIX_REPO = "karpathy/climbmix-400b-shuffle"
# the first that a dataset has beside train is held out
HELD_OUT_SPLITS = tuple("validation valid val dev heldout test testing eval evaluation".split())
ADVICE = "raise --data_limit or choose another dataset"
LARGEST_SHARD = 1 << 30  # bytes; climbmix's have about 90 MB


class Unreachable(UserError):
    """The hub cannot be reached: the one failure for which a source that a preset chose may be replaced."""


def endpoint() -> str:
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def probe(what: str) -> None:
    """Unreachable at once when the hub does not answer: its own clients would try again for minutes."""
    import urllib.error
    import urllib.request  # knows the proxies of the environment

    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        raise Unreachable(f"{what} is not here and HF_HUB_OFFLINE forbids the network")
    try:
        urllib.request.urlopen(urllib.request.Request(endpoint(), method="HEAD"), timeout=8).close()
    except urllib.error.HTTPError:
        pass  # an answer, though not a page: the hub is there
    except (OSError, ValueError) as error:  # URLError and timeouts are OSErrors; an endpoint that is no URL
        reason = getattr(error, "reason", error)
        raise Unreachable(f"{what} is not here and {endpoint()} cannot be reached ({reason})") from error


def place_caches() -> None:
    """Before the hub's clients are imported: their caches belong below base_dir(), unless the user has placed them.

    A token that `hf auth login` has stored is read from where it lies.
    """
    if "HF_HOME" not in os.environ:
        home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")  # which needs no home
        os.environ.setdefault("HF_TOKEN_PATH", str(Path(home, "huggingface", "token")))
        os.environ["HF_HOME"] = str(base_dir() / "huggingface")


def hub_errors() -> tuple[type[Exception], ...]:
    """What the hub's clients raise: their own errors, and those of whichever HTTP library they were built on."""
    from http.client import HTTPException

    from huggingface_hub.errors import HfHubHTTPError

    return (OSError, ValueError, RuntimeError, HTTPException, HfHubHTTPError.__bases__[0])


def plan_hub_dataset(name: str, column: str, split: str, config: str | None, limit: int | None) -> Source:
    """Rows of a dataset of the hub, or of a local folder that `datasets` reads; at most `limit`, by default 100,000.

    Beside a training split, the dataset's own validation split is held out, or its test split; at most a tenth of the
    limit. A dataset that was prepared before stays as it is.
    """
    if not name:
        raise UserError("data=hf: lacks the dataset's name, as in hf:roneneldan/TinyStories")
    options = dict(column=column, split=split, config=config, limit=limit or HUB_DOCUMENTS)
    manifest: dict = {}
    return Source(
        *describe_source(name, options),
        lambda counts: _hub_documents(name, options, manifest, counts),
        advice=ADVICE,
        manifest=manifest,
    )


def describe_source(name: str, options: dict, *more) -> tuple[str, str, str, str, list]:
    """name, source, version, licence and state of a Source of the hub; more: what else its state depends on."""
    files = stat_local_dataset(name)
    return (
        f"hf-{slugify(name)}-{digest(json.dumps([name, options]))[:8]}",
        f"hf:{name}",
        ", ".join(f"{key} {value}" for key, value in options.items() if value is not None),
        f"see the dataset card of {name} on the hub",
        [name, options, *more, *([] if files is None else [files])],
    )


def stat_local_dataset(name: str) -> list | None:
    """[path, size, time of change] of every file below a local folder that stands for a hub dataset; None without."""
    with path_errors_as_user_errors("data", f"hf:{name}"):
        folder = Path(name).expanduser()
        if not folder.is_dir():
            return None
    return stat_all(find_files(folder, skip_corrupt=True).files)


def _hub_documents(name: str, options: dict, manifest: dict, counts: Counter) -> Iterator[tuple]:
    """The text of each row; a dataset with more than LARGEST_MEAN characters a document is refused."""
    column = options["column"]
    room = options["limit"] * LARGEST_MEAN

    def select(stream):
        known = column in (stream.column_names or ())
        return stream.select_columns([column]) if known else stream  # the others may be pictures to decode

    for done, (place, split, held, record) in enumerate(stream_rows(name, options, "documents", select), 1):
        counts["files"] += 1
        text = get_text(record, column, f"hf:{name}")
        room -= len(text)
        if room < 0:
            allowed = f"{options['limit'] * LARGEST_MEAN:,} characters in {done} documents"
            raise UserError(f"data=hf:{name} has over {allowed}: lower --data_limit")
        if held == "val":
            manifest["split_rule"] = f"its own split {split!r} is held out"
        yield place, text, None, None, held


def stream_rows(name: str, options: dict, unit: str, rows: Callable) -> Iterator[tuple]:
    """(row name, dataset split, "train", "val" or None for the usual rule, row) of a streamed dataset of the hub.

    Beside a training split the dataset's own validation or test split is held out, at most a tenth of the limit. Rows
    are called <name>#<row>, and <name>/<split>#<row> where they are held out. unit: what a row is, in messages.
    rows(stream): the rows of a split as the caller wants them.
    """
    limit, done = options["limit"], [0]
    with hub_errors_as_user_errors(name, done, unit):
        logger.info(f"data: streaming hf:{name}, at most {limit} {unit}")
        streams = open_splits(name, options)
        for part, (split, stream) in enumerate(streams.items()):
            most = max(1, limit // 10) if part else limit
            held = ("val" if part else "train") if len(streams) > 1 else None
            for row, record in enumerate(rows(stream)):
                if row >= most:
                    logger.info(f"data: stopped after {most} {unit} of hf:{name} {split} (--data_limit takes more)")
                    break
                done[0] += 1
                yield f"{name}/{split}#{row}" if part else f"{name}#{row}", split, held, record


def open_splits(name: str, options: dict) -> dict:
    """The split to read, and after it the one to hold out if the dataset has any, as streams by name."""
    with path_errors_as_user_errors("data", f"hf:{name}"):
        folder = Path(name).expanduser()
        local = folder.is_dir()
    if not local:
        probe(f"hf:{name}")
    place_caches()
    try:
        import datasets  # heavy
    except ImportError as error:
        raise UserError(f"data=hf:{name} needs the datasets package: pip install datasets ({error})") from error
    datasets.config.STREAMING_READ_MAX_RETRIES = 3  # 20 by default: minutes of silence on a dead network
    split = options["split"]
    if local and ((folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()):
        saved = datasets.load_from_disk(str(folder))  # what Dataset.save_to_disk and DatasetDict.save_to_disk write
        found = dict(saved) if isinstance(saved, datasets.DatasetDict) else {str(saved.split or split): saved}
    elif not re.fullmatch(r"\w+", split):  # a sum or a slice of splits
        return {split: datasets.load_dataset(name, options["config"], split=split, streaming=True)}
    else:
        found = dict(datasets.load_dataset(name, options["config"], streaming=True))
    if split not in found:
        raise UserError(f"data=hf:{name} has no split {split!r}: choose one with --data_split ({', '.join(found)})")
    held = next((other for other in HELD_OUT_SPLITS if other in found), None)
    chosen = [split, held] if split == "train" and held else [split]
    return {part: found[part] for part in chosen}


@contextmanager
def hub_errors_as_user_errors(name: str, done: list[int], unit: str = "documents") -> Iterator[None]:
    """Turn what the hub's clients raise into UserError, or Unreachable; done[0]: the documents read so far."""
    try:
        yield
    except UserError:
        raise
    except hub_errors() as error:
        if find_storage_error(error):
            raise
        kind = Unreachable if isinstance(error, ConnectionError) else UserError
        way_out = "choose a part of one kind with --data_config or --data_split"
        if Path(name).expanduser().is_dir():
            way_out = f"pass --data={name} without hf:, which reads each row by itself, or keep files of one kind in it"
        unlike = "cast" in str(error).lower() or "schema" in str(error).lower()
        advice = f"; its rows have unlike columns or types: {way_out}" if unlike else ""
        raise kind(f"data=hf:{name}: {first_line(error)} (after {done[0]} {unit}){advice}") from error


def download_climbmix(names: list[str], directory: Path, workers: int, recorded: dict[str, str]) -> Iterator[Path]:
    """Fetch shards into a folder, in parallel, and yield their paths as they arrive; interrupted downloads resume.

    recorded: shard name -> sha256 of its first download; new shards are compared with what the hub announces.
    Raises Unreachable when the hub does not answer or the connection ends, Corrupt for other bytes than announced.
    """
    probe("climbmix")
    place_caches()
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    directory.mkdir(parents=True, exist_ok=True)
    logger.info(f"data: downloading {len(names)} climbmix shards from {endpoint()} to {directory}")
    stop = threading.Event()

    def fetch(name: str) -> Path:
        while not stop.is_set():
            with file_lock(directory / f".{name}.lock", wait=False) as mine:
                if mine:
                    return fetch_alone(name)
            stop.wait(0.5)  # another process writes to the same partial file: what it leaves is taken
        raise ConnectionError(f"{name}: stopped while another process downloads it")

    def fetch_alone(name: str) -> Path:
        url = hf_hub_url(CLIMBMIX_REPO, name, repo_type="dataset", endpoint=endpoint())
        announced = get_hf_file_metadata(url, timeout=10)
        path = directory / name
        if announced.size is not None and announced.size > LARGEST_SHARD:
            raise Corrupt(f"{name}: the hub announces {announced.size:,} bytes, more than any shard of climbmix has")
        if not (path.exists() and path.stat().st_size == announced.size):
            _download(url, path, announced.size, stop, moved)
        sha256, etag = sha256_of(path), announced.etag or ""
        wanted = recorded.get(name) or (etag if re.fullmatch("[0-9a-f]{64}", etag) else sha256)
        if sha256 != wanted:
            path.unlink()
            origin = "its first download" if name in recorded else "the hub"
            raise Corrupt(
                f"{name}: downloaded sha256 {sha256[:12]}, {origin} says {wanted[:12]}: run again to fetch it"
            )
        return path

    with ThreadPoolExecutor(max(1, workers)) as pool, _progress(len(names)) as moved:
        try:
            for count, done in enumerate(as_completed([pool.submit(fetch, name) for name in names]), 1):
                yield (path := done.result())
                logger.info(f"data: {count}/{len(names)} {path.name} {path.stat().st_size / 1e6:.1f} MB")
        except UserError:
            raise
        except hub_errors() as error:
            if (failed := find_storage_error(error, directory)) and failed.errno not in NEEDS_PATH:
                raise failed from error  # the disk, not the hub
            raise Unreachable(f"climbmix: the download stopped ({first_line(error)}); run again to resume") from error
        finally:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)


def _download(url: str, path: Path, size: int | None, stop: threading.Event, moved: Callable[[float], None]) -> None:
    """Download into a hidden partial file, from which an interrupted download resumes, then rename it.

    huggingface_hub (2.4) writes to a file of each process's own and deletes it at the end, so an interrupted download
    would start over; nor does it limit what a server may send. A lost connection is retried as long as bytes arrive.
    A server that sends more than it announced is Corrupt as soon as it does.
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
                if file.tell() + len(chunk) > (LARGEST_SHARD if size is None else size):
                    partial.unlink()
                    raise Corrupt(f"{path.name}: the hub sends more than the {size or LARGEST_SHARD:,} bytes allowed")
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
