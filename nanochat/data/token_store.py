"""Token ids of a dataset on disk: each shard is tokenised once and mapped into memory."""

import io
import itertools
import json
import logging
import os
import threading
import time
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np

from nanochat.data.dataset import Dataset
from nanochat.data.tokenizer import Tokenizer
from nanochat.files import open_atomic, write_atomically
from nanochat.modality import Vocabulary
from nanochat.system.environment import UserError
from nanochat.system.temporary import file_lock, remove_abandoned

logger = logging.getLogger(__name__)

CHUNK_CHARACTERS = 1_000_000  # text tokenised between two looks at whether to stop


class TokenStore:
    """One split of a dataset as token ids: <dataset>/tokens-<tokenizer hash8>/<shard>.bin, .npy and .json.

    .bin: ids, uint16 or uint32, every document as BOS + its ids, behind the caption of a sound its `start`, codes and
    `end`. .npy: offsets of the documents, int64 [documents + 1].
    .json: the index, written last: only with it, and only while sizes and the shard's hash agree, do the others count.
    The first process of each node makes what is missing, in a background thread, in the order it is required. Where
    nodes share the folder they share the work: a lock makes each shard one process's, and files that count stay.
    """

    def __init__(
        self,
        dataset: Dataset,
        tokenizer: Tokenizer,
        split: str = "train",
        *,
        vocabulary: Vocabulary | None = None,
        is_writer: bool | None = None,
        workers: int | None = None,
        timeout_s: float = 1800,
    ):
        """vocabulary: the model's, None for text alone. is_writer: whether this process tokenises (None: local rank 0
        does). workers: its threads (None: one a core, at most 8). timeout_s: how long the others wait for one shard.
        UserError: the split has no shards, or its sounds are not in the vocabulary."""
        self.dataset, self.tokenizer, self.split = dataset, tokenizer, split
        self.paths = dataset.shards(split)
        if not self.paths:
            raise UserError(f"data {dataset.name} has no {split} shards: give more documents")
        self.vocabulary = vocabulary or Vocabulary(tokenizer.vocab_size)
        _check_sounds(dataset, self.vocabulary)
        self.is_writer = os.environ.get("LOCAL_RANK", "0") == "0" if is_writer is None else is_writer
        self.workers = workers or min(8, os.cpu_count() or 1)
        self.timeout_s = timeout_s
        self.directory = dataset.directory / f"tokens-{tokenizer.hash[:8]}{self._layout()}"
        self.dtype = np.dtype(np.uint16 if self.vocabulary.input_size <= 2**16 else np.uint32)
        self._sha256 = {entry["name"]: entry["sha256"] for entry in dataset.manifest["files"]}
        self._entries: dict[int, dict] = {}
        self._queue: list[int] = []
        self._elsewhere: set[int] = set()  # shards that another process was making when we looked
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._seconds = 0.0  # spent on tokenising
        self._stop = threading.Event()
        self.shard = lru_cache(64)(self._open)

    def _layout(self) -> str:
        """What the ids of sounds depend on beside the tokenizer, for the folder's name."""
        if self.dataset.codec is None:
            return ""
        start = self.vocabulary.modality("audio").start
        beside = "-codes" if start is None else "" if start < self.vocabulary.text_size else "-rows"
        return f"-{self.vocabulary.first('audio')}{beside}"

    # -- reading ------------------------------------------------------------------------------------------------------

    def tokens(self, shard: int) -> int:
        """Ids in the shard of this number; waits until it is tokenised. 0 for a corrupt one that was skipped."""
        return self._wait(shard)["tokens"]

    def _open(self, shard: int) -> tuple[np.ndarray, np.ndarray]:
        """(ids, memory-mapped; offsets int64 [documents + 1]) of a shard; waits until it is tokenised."""
        if self.tokens(shard) == 0:  # an empty file cannot be mapped
            return np.zeros(0, self.dtype), np.zeros(1, np.int64)
        ids = np.memmap(self._file(shard, ".bin"), dtype=self.dtype, mode="r")
        return np.asarray(ids), np.load(self._file(shard, ".npy"))

    def stream(self, max_tokens: int | None = None) -> "Stream":
        """The first max_tokens ids (None: all) of the split in path order: BOS + document, BOS + document, ...

        Only the shards that it takes are tokenised; its slices are read from the memory-mapped files.
        """
        if max_tokens is None:
            self.require(range(len(self.paths)))
        ends = [0]
        for shard in range(len(self.paths)):
            if max_tokens is not None and ends[-1] >= max_tokens:
                break
            ends.append(ends[-1] + self.tokens(shard))
        return Stream(self, ends, ends[-1] if max_tokens is None else min(max_tokens, ends[-1]))

    def _file(self, shard: int, suffix: str) -> Path:
        return self.directory / (self.paths[shard].stem + suffix)

    def _index(self, shard: int) -> dict | None:
        """The index of a shard if it and its files count, else None."""
        try:
            index = json.loads(self._file(shard, ".json").read_text(encoding="utf-8"))
            whole = (
                index["shard"] == self._stamp(shard, index["skipped"])
                and (index["skipped"] is None or self.dataset.skip_corrupt)
                and index["dtype"] == self.dtype.name
                and self._file(shard, ".bin").stat().st_size == index["tokens"] * self.dtype.itemsize
                and self._file(shard, ".npy").stat().st_size == index["offsets_size"]
            )
        except (OSError, ValueError, KeyError, TypeError):  # absent, torn or foreign: it is made anew
            return None
        return index if whole else None

    def _stamp(self, shard: int, skipped: str | None) -> dict:
        """What the ids were made from. A damaged shard counts as damaged only until somebody touches it."""
        path = self.paths[shard]
        stamp = {"sha256": self._sha256[path.name], "size": path.stat().st_size}
        if self.dataset.codec is not None:
            stamp["audio"] = [self.vocabulary.first("audio"), self.vocabulary.modality("audio").start]
        return stamp if skipped is None else stamp | {"mtime_ns": path.stat().st_mtime_ns}

    def _wait(self, shard: int) -> dict:
        if shard in self._entries:
            return self._entries[shard]
        self.require([shard])
        start = time.monotonic()
        while (index := self._index(shard)) is None:
            if self._failure is not None:
                raise self._failure
            if not self._running():
                raise RuntimeError(f"stopped while waiting for the tokens of {self.paths[shard].name}")
            if (not self.is_writer or shard in self._elsewhere) and time.monotonic() - start > self.timeout_s:
                writer = "another process" if self.is_writer else "the first process of this node"
                raise UserError(
                    f"no tokens of {self.paths[shard]} after {self.timeout_s:g} s of waiting for {writer} to make "
                    f"{self._file(shard, '.json')}: see its messages, or start again with one process"
                )
            time.sleep(0.02)
        self._entries[shard] = index
        return index

    # -- making -------------------------------------------------------------------------------------------------------

    def require(self, shards: Iterable[int]) -> None:
        """Have these shards tokenised in the background, in this order; returns at once."""
        if not self.is_writer:
            return
        with self._lock:
            self._queue.extend(s for s in shards if s not in self._entries and s not in self._queue)
            if self._queue and self._thread is None and self._failure is None:
                self._thread = threading.Thread(target=self._work, name="tokenise")
                self._thread.start()

    def close(self) -> None:
        """Stop tokenising; an unfinished shard leaves nothing behind."""
        self._stop.set()
        thread = self._thread
        if thread is not None:
            thread.join()

    def _running(self) -> bool:
        # A plain thread keeps the interpreter alive at exit, so it has to notice for itself that the program is over.
        return not self._stop.is_set() and threading.main_thread().is_alive()

    def _work(self) -> None:
        try:
            self._remove_leftovers()
            while (shard := self._next()) is not None:
                if self._index(shard) is not None:
                    continue
                with file_lock(self.directory / f".{self.paths[shard].stem}.lock", wait=False) as mine:
                    if mine:
                        self._make_alone(shard)
                    else:
                        self._put_off(shard)
        except BaseException as error:  # whoever waits for a shard raises it; tiktoken's panics are BaseExceptions
            self._failure = error

    def _make_alone(self, shard: int) -> None:
        """Tokenise a shard that nobody else is tokenising, unless somebody just did."""
        self._elsewhere.discard(shard)
        if self._index(shard) is not None:
            return
        if not self._seconds:
            logger.info(f"tokenising {self.dataset.name} ({self.split}) into {self.directory}")
        start = time.perf_counter()
        self._make(shard)
        self._seconds += time.perf_counter() - start
        self._tell_when_done()

    def _put_off(self, shard: int) -> None:
        """Look at a shard that another process makes again when the others are done."""
        self._elsewhere.add(shard)
        with self._lock:
            self._queue.append(shard)
            idle = self._elsewhere.issuperset(self._queue)
        if idle:
            self._stop.wait(0.05)

    def _tell_when_done(self) -> None:
        if self._queue:
            return
        indices = [self._index(shard) for shard in range(len(self.paths))]
        if all(indices):
            tokens = sum(index["tokens"] for index in indices)
            name = f"{self.dataset.name} ({self.split})"
            logger.info(f"tokenised {name}: {tokens:,} tokens in {self._seconds:.1f} s")

    def _remove_leftovers(self) -> None:
        """Delete what dead processes left half-written."""
        self.directory.mkdir(parents=True, exist_ok=True)
        remove_abandoned(self.directory, ".*.tmp")

    def _next(self) -> int | None:
        with self._lock:
            if self._queue and self._running():
                return self._queue.pop(0)
            self._thread = None
            return None

    def _make(self, shard: int) -> None:
        """Tokenise one shard and write its files, the index last."""
        path = self.paths[shard]
        self._file(shard, ".json").unlink(missing_ok=True)  # from here on the old files do not count
        lengths = [0]
        with open_atomic(self._file(shard, ".bin"), keep_equal=True) as file:
            for texts, sounds in _group_documents((text, codes) for _, text, codes, _ in self.dataset.read_clips(path)):
                if not self._running():
                    raise RuntimeError("tokenising was stopped")
                documents = [[self.tokenizer.bos_id, *ids] for ids in self.tokenizer.encode_batch(texts, self.workers)]
                for document, codes in zip(documents, sounds, strict=True):
                    if codes is not None:
                        document.extend(encode_sound(self.vocabulary, codes))
                # not tofile(): it says nothing of a full disk
                file.write(np.fromiter(itertools.chain.from_iterable(documents), self.dtype).tobytes())
                lengths.extend(map(len, documents))
        with open_atomic(self._file(shard, ".npy"), keep_equal=True) as file:
            offsets = io.BytesIO()
            np.save(offsets, np.cumsum(lengths, dtype=np.int64))
            file.write(offsets.getvalue())
        skipped = self.dataset.skipped.get(path.name)
        index = {
            "shard": self._stamp(shard, skipped),
            "skipped": skipped,
            "tokens": sum(lengths),
            "dtype": self.dtype.name,
            "offsets_size": self._file(shard, ".npy").stat().st_size,
        }
        write_atomically(self._file(shard, ".json"), json.dumps(index) + "\n")


class Stream:
    """Shards of a store end to end, as one array [len] of ids that is never in memory as a whole.

    Indexed by a number or a slice without a step; a slice within one shard is a view of its mapped file.
    """

    def __init__(self, store: TokenStore, ends: list[int], length: int):
        """ends: where each shard ends in the stream, 0 in front."""
        self.store, self.ends, self.length, self.dtype = store, ends, length, store.dtype

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, place: int | slice) -> np.ndarray | np.integer:
        if not isinstance(place, slice):
            if not -self.length <= place < self.length:
                raise IndexError(f"{place} is outside a stream of {self.length} ids")
            return self[place % self.length : place % self.length + 1][0]
        start, stop, step = place.indices(self.length)
        assert step == 1, place
        parts = []
        for shard in range(bisect_right(self.ends, start) - 1, len(self.ends) - 1):
            first, last = self.ends[shard], min(self.ends[shard + 1], stop)
            if first >= stop:
                break
            if last > start:  # else a corrupt shard that was skipped
                parts.append(self.store.shard(shard)[0][start - first : last - first])
                start = last
        return parts[0] if len(parts) == 1 else np.concatenate([np.zeros(0, self.dtype), *parts])

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return np.asarray(self[:], dtype=dtype)

    def tolist(self) -> list[int]:
        return self[:].tolist()


def _group_documents(documents: Iterable[tuple]) -> Iterator[tuple[tuple, tuple]]:
    """(texts, codes) of documents of about CHUNK_CHARACTERS together."""
    chunk, size = [], 0
    for text, codes in documents:
        chunk.append((text, codes))
        size += len(text) + (0 if codes is None else codes.size)
        if size >= CHUNK_CHARACTERS:
            yield tuple(zip(*chunk, strict=True))
            chunk, size = [], 0
    if chunk:
        yield tuple(zip(*chunk, strict=True))


def encode_sound(vocabulary: Vocabulary, codes: np.ndarray) -> list[int]:
    """`start`, the codes [T, Q] frame by frame, `end`; the codes alone where the vocabulary has no markers."""
    ids, start = vocabulary.ids_of("audio", codes).tolist(), vocabulary.modality("audio").start
    return ids if start is None else [start, *ids, vocabulary.end("audio")]


def _check_sounds(dataset: Dataset, vocabulary: Vocabulary) -> None:
    codec = dataset.codec
    if codec is None:
        return
    wanted = f"--modalities=audio:{codec['codes']} --codebooks={codec['codebooks']}"
    if "audio" not in vocabulary.names:
        raise UserError(f"data {dataset.name} holds sounds, the model has no audio: set {wanted}")
    audio = vocabulary.modality("audio")
    if (audio.codebooks, audio.codes) != (codec["codebooks"], codec["codes"]):
        raise UserError(
            f"data {dataset.name} was coded with {codec['codebooks']} x {codec['codes']} codes, the model has "
            f"{audio.codebooks} x {audio.codes}: set {wanted}"
        )
