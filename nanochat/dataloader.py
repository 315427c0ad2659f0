"""Documents to batches: a token store on disk, and a loader whose rows depend only on (seed, epoch, cursor).

An epoch's stream: shards in an order drawn from (seed, epoch), the documents of a shard in an order drawn from
(seed, epoch, shard), each as BOS + its ids. Row r is stream[r*T : r*T + T + 1]; what is left after the last row is
dropped. Rows are handed out in an order drawn within blocks of 8192, so that a batch is not one long document.
The cursor counts rows over all ranks since the start of training, and is all that a resume needs.
"""

import io
import itertools
import json
import os
import threading
import time
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from nanochat.dataset import Dataset
from nanochat.modality import Vocabulary
from nanochat.runtime import UserError, replacing, write_atomically
from nanochat.settings import Say
from nanochat.temporary import file_lock, remove_abandoned
from nanochat.tokenizer import Tokenizer

BLOCK = 8192  # rows among which the order is drawn
CHUNK_CHARACTERS = 1_000_000  # text tokenised between two looks at whether to stop
SHARDS, DOCUMENTS, ROWS = range(3)  # what an order is drawn for


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
        maker: bool | None = None,
        workers: int | None = None,
        patience_s: float = 1800,
        say: Say = print,
    ):
        """vocabulary: the model's, None for text alone. maker: whether this process tokenises (None: local rank 0
        does). workers: its threads (None: one a core, at most 8). patience_s: how long the others wait for one shard.
        UserError: the split has no shards, or its sounds are not in the vocabulary."""
        self.dataset, self.tokenizer, self.split, self.say = dataset, tokenizer, split, say
        self.paths = dataset.shards(split)
        if not self.paths:
            raise UserError(f"data {dataset.name} has no {split} shards: give more documents")
        self.vocabulary = vocabulary or Vocabulary(tokenizer.vocab_size)
        _check_sounds(dataset, self.vocabulary)
        self.maker = os.environ.get("LOCAL_RANK", "0") == "0" if maker is None else maker
        self.workers = workers or min(8, os.cpu_count() or 1)
        self.patience_s = patience_s
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
        """Ids in the shard of this number; waits until it is tokenised. 0 for one that was left out as damaged."""
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
            if (not self.maker or shard in self._elsewhere) and time.monotonic() - start > self.patience_s:
                maker = "another process" if self.maker else "the first process of this node"
                raise UserError(
                    f"no tokens of {self.paths[shard]} after {self.patience_s:g} s of waiting for {maker} to make "
                    f"{self._file(shard, '.json')}: see its messages, or start again with one process"
                )
            time.sleep(0.02)
        self._entries[shard] = index
        return index

    # -- making -------------------------------------------------------------------------------------------------------

    def require(self, shards: Iterable[int]) -> None:
        """Have these shards tokenised in the background, in this order; returns at once."""
        if not self.maker:
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
            self.say(f"tokenising {self.dataset.name} ({self.split}) into {self.directory}")
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
            self.say(f"tokenised {name}: {tokens:,} tokens in {self._seconds:.1f} s")

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
        with replacing(self._file(shard, ".bin"), keep_equal=True) as file:
            for texts, sounds in _chunks((text, codes) for _, text, codes, _ in self.dataset.read_clips(path)):
                if not self._running():
                    raise RuntimeError("tokenising was stopped")
                documents = [[self.tokenizer.bos_id, *ids] for ids in self.tokenizer.encode_batch(texts, self.workers)]
                for document, codes in zip(documents, sounds, strict=True):
                    if codes is not None:
                        document.extend(sound_ids(self.vocabulary, codes))
                # not tofile(): it says nothing of a full disk
                file.write(np.fromiter(itertools.chain.from_iterable(documents), self.dtype).tobytes())
                lengths.extend(map(len, documents))
        with replacing(self._file(shard, ".npy"), keep_equal=True) as file:
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
            if last > start:  # else a shard that was left out as damaged
                parts.append(self.store.shard(shard)[0][start - first : last - first])
                start = last
        return parts[0] if len(parts) == 1 else np.concatenate([np.zeros(0, self.dtype), *parts])

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return np.asarray(self[:], dtype=dtype)

    def tolist(self) -> list[int]:
        return self[:].tolist()


def _chunks(documents: Iterable[tuple]) -> Iterator[tuple[tuple, tuple]]:
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


def sound_ids(vocabulary: Vocabulary, codes: np.ndarray) -> list[int]:
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


# ---------------------------------------------------------------------------------------------------------------------
# batches


class DataLoader:
    """Endless batches of one rank: (inputs, targets), int64 [rows / world_size, seq_len], targets one token ahead.

    Rank k of N takes rows [k*G/N, (k+1)*G/N) of each global batch of G = rows, so N ranks together see what one would.
    The next batch is assembled, and moved to the device, in the background; its errors are raised by next().
    """

    def __init__(
        self,
        store: TokenStore,
        rows: int,
        seq_len: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        device: str | torch.device = "cpu",
    ):
        assert rows % world_size == 0 and 0 <= rank < world_size, (rows, rank, world_size)
        self.store, self.rows, self.seq_len, self.seed = store, rows, seq_len, seed
        self.device = torch.device(device)
        self.rank, self.world_size = rank, world_size
        self.cursor = 0  # rows handed out so far, over all ranks
        self.epoch, self.row = 0, 0  # where the last row handed out lies: its epoch, its place in the epoch's order
        self.tokens: int | None = None  # of a whole epoch, once the rows handed out took a look at all shards
        self._first_ends = [0]  # where the shards of epoch 0 end, as far as they had to be looked at
        self._extending = threading.Lock()
        self._ahead: Future | None = None
        # Blocks reach over several shards, and rows come from all over a block.
        self._shard_order = lru_cache(4)(self._order_of_shards)
        self._shard_ends = lru_cache(4)(self._ends_of_shards)
        self._document_order = lru_cache(64)(self._order_of_documents)
        self._row_order = lru_cache(4)(lambda epoch, block, size: self._permutation(ROWS, epoch, block, size))

    @property
    def mine(self) -> range:
        """This rank's rows of a batch."""
        return range(self.rank * self.rows // self.world_size, (self.rank + 1) * self.rows // self.world_size)

    def resize(self, rows: int) -> None:
        """Batches of so many rows from now on, which go on where the last one ended."""
        if rows != self.rows:
            assert rows % self.world_size == 0, (rows, self.world_size)
            self.rows, self._ahead = rows, None

    def next(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The next batch of this rank; waits for tokens that are not ready yet."""
        ahead, self._ahead = self._ahead or self._start(self.cursor), None
        inputs, targets, (self.epoch, self.row, self.tokens) = ahead.result()
        self.cursor += self.rows
        self._ahead = self._start(self.cursor)
        return inputs, targets

    def last_rows(self, whole: bool = False) -> list[dict]:
        """For each row of this rank's last batch: its epoch, its row of the stream, and the documents it shows.

        whole: the rows of all ranks.
        A document is "shard:row of the shard". Equal (epoch, row) mean the same tokens under the same seed.
        """
        assert self.cursor, "next() comes first"
        places = [self._place(self.cursor - self.rows + i) for i in (range(self.rows) if whole else self.mine)]
        return [{"epoch": e, "row": r, "documents": list(self._documents(e, r))} for e, r in places]

    def epoch_rows(self) -> int | None:
        """Rows of an epoch; None where the first batch does not reach its end, which looks at no more shards."""
        self._position(self.rows - 1)
        tokens = self._seen()
        return None if tokens is None else (tokens - 1) // self.seq_len

    def state_dict(self) -> dict:
        """JSON-ready position and what it refers to; the same on every rank."""
        position = {"cursor": self.cursor, "epoch": self.epoch, "row": self.row, "tokens": self.tokens}
        return position | self._identity()

    def load_state_dict(self, state: dict) -> None:
        """Go on where the state was taken; UserError names what differs (seed, seq_len, data, tokenizer).

        Another number of tokens (a shard left out then or now) is found, and raised, by next().
        """
        for name, mine in self._identity().items():
            if mine != state[name]:
                raise UserError(
                    f"the data order cannot go on: {name}={mine} here, {state[name]} in the checkpoint; "
                    "use the checkpoint's, or start a new run"
                )
        self.cursor, self.epoch, self.row, self.tokens = (state[key] for key in ("cursor", "epoch", "row", "tokens"))
        self._ahead = None

    def _identity(self) -> dict:
        store = self.store
        data, tokenizer = store.dataset.fingerprint["sha256"], store.tokenizer.hash
        return {"seed": self.seed, "seq_len": self.seq_len, "data": data, "tokenizer": tokenizer}

    # -- the background -----------------------------------------------------------------------------------------------

    def _start(self, cursor: int) -> Future:
        future: Future = Future()

        def work():
            try:
                future.set_result(self._batch(cursor))
            except BaseException as error:  # next() raises it
                future.set_exception(error)

        threading.Thread(target=work, name="batch").start()
        return future

    def _batch(self, cursor: int) -> tuple[torch.Tensor, torch.Tensor, tuple[int, int, int | None]]:
        ids = np.empty((len(self.mine), self.seq_len + 1), dtype=np.int64)
        for i, row in enumerate(self.mine):
            self._read(*self._place(cursor + row), out=ids[i])
        # Copied by numpy: torch would start a second team of threads here, beside the one that trains.
        halves = [torch.from_numpy(np.ascontiguousarray(half)) for half in self._halves(ids)]
        if self.device.type == "cuda":
            halves = [half.pin_memory() for half in halves]
        inputs, targets = (half.to(self.device, non_blocking=True) for half in halves)
        epoch, place, _ = self._position(cursor + self.rows - 1)
        return inputs, targets, (epoch, place, self._seen())

    def _seen(self) -> int | None:
        """Tokens of an epoch, once all shards had to be looked at."""
        return self._first_ends[-1] if len(self._first_ends) > len(self.store.paths) else None

    def _halves(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Rows of ids [rows, seq_len + 1] -> inputs and targets [rows, seq_len]."""
        return ids[:, :-1], ids[:, 1:]

    # -- the order: pure functions of the seed and the numbers of tokens ----------------------------------------------

    def _permutation(self, kind: int, epoch: int, index: int, size: int) -> np.ndarray:
        # Raw bits and a stable sort: numpy keeps these the same for ever, its own shuffles it may change.
        bits = np.random.PCG64(np.random.SeedSequence(self.seed, spawn_key=(kind, epoch, index))).random_raw(size)
        return np.argsort(bits, kind="stable")

    def _order_of_shards(self, epoch: int) -> list[int]:
        return self._permutation(SHARDS, epoch, 0, len(self.store.paths)).tolist()

    def _order_of_documents(self, epoch: int, shard: int) -> tuple[np.ndarray, np.ndarray]:
        """(documents in their order; where each ends in the shard's part of the stream, 0 in front)."""
        offsets = self.store.shard(shard)[1]
        order = self._permutation(DOCUMENTS, epoch, shard, len(offsets) - 1)
        return order, np.concatenate([offsets[:1], np.cumsum(np.diff(offsets)[order])])

    def _ends_of_shards(self, epoch: int) -> list[int]:
        """Where each shard ends in the epoch's stream, 0 in front; of epoch 0 perhaps only the first shards."""
        if epoch == 0:
            return self._first_ends
        return list(itertools.accumulate(map(self.store.tokens, self._shard_order(epoch)), initial=0))

    def _position(self, cursor: int) -> tuple[int, int, int]:
        """(epoch, place among its rows, rows of the block there); looks at no more shards than that takes."""
        order, ends = self._shard_order(0), self._first_ends
        block_end = (cursor // BLOCK + 1) * BLOCK

        def too_few() -> bool:
            return len(ends) <= len(order) and (ends[-1] - 1) // self.seq_len < block_end

        if too_few():
            self.store.require(order)
        while too_few():
            with self._extending:
                if too_few():
                    ends.append(ends[-1] + self.store.tokens(order[len(ends) - 1]))
        if len(ends) <= len(order):
            return 0, cursor, BLOCK
        if self.tokens not in (None, ends[-1]):
            raise UserError(
                f"the data order cannot go on: an epoch of {self.store.dataset.name} has {ends[-1]} tokens here, "
                f"{self.tokens} in the checkpoint; has a shard been left out as damaged, or repaired?"
            )
        rows = (ends[-1] - 1) // self.seq_len
        if rows < 1:
            raise UserError(
                f"data {self.store.dataset.name} has {ends[-1]} {self.store.split} tokens, less than one row of "
                f"max_seq_len={self.seq_len} and its target: give more text or max_seq_len={max(2, ends[-1] - 1)}"
            )
        epoch, place = divmod(cursor, rows)
        return epoch, place, min(BLOCK, rows - place // BLOCK * BLOCK)

    def _place(self, cursor: int) -> tuple[int, int]:
        """(epoch, row of its stream) of the cursor-th row since the start."""
        epoch, place, size = self._position(cursor)
        block, within = divmod(place, BLOCK)
        return epoch, block * BLOCK + int(self._row_order(epoch, block, size)[within])

    def _spans(self, epoch: int, row: int) -> Iterator[tuple[int, int, int]]:
        """(shard, start, stop) of the parts of a row, as positions in that shard's part of the stream."""
        order, ends = self._shard_order(epoch), self._shard_ends(epoch)
        start, stop = row * self.seq_len, (row + 1) * self.seq_len + 1
        number = bisect_right(ends, start) - 1
        while start < stop:
            end = min(stop, ends[number + 1])
            if end > start:
                yield order[number], start - ends[number], end - ends[number]
            start, number = end, number + 1

    def _read(self, epoch: int, row: int, out: np.ndarray) -> None:
        """Copy the seq_len + 1 ids of a row."""
        filled = 0
        for shard, start, stop in self._spans(epoch, row):
            ids, offsets = self.store.shard(shard)
            order, ends = self._document_order(epoch, shard)
            shown = _overlapping(ends, start, stop)
            lengths = np.minimum(ends[1:][shown], stop) - np.maximum(ends[shown], start)
            shift = offsets[order[shown]] - ends[shown]  # from the stream to the file, for each document
            out[filled : filled + stop - start] = ids[np.arange(start, stop) + np.repeat(shift, lengths)]
            filled += stop - start

    def _documents(self, epoch: int, row: int) -> Iterator[str]:
        for shard, start, stop in self._spans(epoch, row):
            order, ends = self._document_order(epoch, shard)
            for document in order[_overlapping(ends, start, stop)].tolist():
                yield f"{self.store.paths[shard].stem}:{document}"


def _overlapping(ends: np.ndarray, start: int, stop: int) -> slice:
    """The documents (by their place in the order) that [start, stop) touches."""
    return slice(int(np.searchsorted(ends, start, "right")) - 1, int(np.searchsorted(ends, stop, "left")))
