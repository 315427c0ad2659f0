"""Documents to batches: a token store on disk, and a loader whose rows depend only on (seed, epoch, cursor).

An epoch's stream: shards in an order drawn from (seed, epoch), the documents of a shard in an order drawn from
(seed, epoch, shard), each as BOS + its ids. Row r is stream[r*T : r*T + T + 1]; what is left after the last row is
dropped. Rows are handed out in an order drawn within blocks of 8192, so that a batch is not one long document.
The cursor counts rows over all ranks since the start of training, and is all that a resume needs.
"""

import itertools
import threading
from bisect import bisect_right
from collections.abc import Iterator
from concurrent.futures import Future
from functools import lru_cache

import numpy as np
import torch

from nanochat.data.token_store import TokenStore
from nanochat.system.environment import UserError

BLOCK = 8192  # rows among which the order is drawn
SHARDS, DOCUMENTS, ROWS = range(3)  # what an order is drawn for


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
        assert rows % world_size == 0, (rows, world_size)
        assert 0 <= rank < world_size, (rank, world_size)
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
    def local_rows(self) -> range:
        """This rank's rows of a batch."""
        return range(self.rank * self.rows // self.world_size, (self.rank + 1) * self.rows // self.world_size)

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
        places = [
            self._locate_row(self.cursor - self.rows + i) for i in (range(self.rows) if whole else self.local_rows)
        ]
        return [{"epoch": e, "row": r, "documents": list(self._documents(e, r))} for e, r in places]

    def epoch_rows(self) -> int | None:
        """Rows of an epoch; None where the first batch does not reach its end, which looks at no more shards."""
        self._position(self.rows - 1)
        tokens = self._tokens_per_epoch()
        return None if tokens is None else (tokens - 1) // self.seq_len

    def state_dict(self) -> dict:
        """JSON-ready position and what it refers to; the same on every rank."""
        position = {"cursor": self.cursor, "epoch": self.epoch, "row": self.row, "tokens": self.tokens}
        return position | self._identity()

    def load_state_dict(self, state: dict) -> None:
        """Go on where the state was taken; UserError names what differs (seed, seq_len, data, tokenizer).

        Another number of tokens (a corrupt shard skipped then or now) is found, and raised, by next().
        """
        for name, here in self._identity().items():
            if here != state[name]:
                raise UserError(
                    f"the data order cannot continue: {name}={here} here, {state[name]} in the checkpoint; "
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
        ids = np.empty((len(self.local_rows), self.seq_len + 1), dtype=np.int64)
        for i, row in enumerate(self.local_rows):
            self._read(*self._locate_row(cursor + row), out=ids[i])
        # Copied by numpy: torch would start a second team of threads here, beside the one that trains.
        halves = [torch.from_numpy(np.ascontiguousarray(half)) for half in self._split_inputs_targets(ids)]
        if self.device.type == "cuda":
            halves = [half.pin_memory() for half in halves]
        inputs, targets = (half.to(self.device, non_blocking=True) for half in halves)
        epoch, place, _ = self._position(cursor + self.rows - 1)
        return inputs, targets, (epoch, place, self._tokens_per_epoch())

    def _tokens_per_epoch(self) -> int | None:
        """Tokens of an epoch, once all shards had to be looked at."""
        return self._first_ends[-1] if len(self._first_ends) > len(self.store.paths) else None

    def _split_inputs_targets(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
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
                f"the data order cannot continue: an epoch of {self.store.dataset.name} has {ends[-1]} tokens here, "
                f"{self.tokens} in the checkpoint; has a corrupt shard been skipped, or repaired?"
            )
        rows = (ends[-1] - 1) // self.seq_len
        if rows < 1:
            raise UserError(
                f"data {self.store.dataset.name} has {ends[-1]} {self.store.split} tokens, less than one row of "
                f"max_seq_len={self.seq_len} and its target: give more text or max_seq_len={max(2, ends[-1] - 1)}"
            )
        epoch, place = divmod(cursor, rows)
        return epoch, place, min(BLOCK, rows - place // BLOCK * BLOCK)

    def _locate_row(self, cursor: int) -> tuple[int, int]:
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
            shown = _find_overlapping(ends, start, stop)
            lengths = np.minimum(ends[1:][shown], stop) - np.maximum(ends[shown], start)
            shift = offsets[order[shown]] - ends[shown]  # from the stream to the file, for each document
            out[filled : filled + stop - start] = ids[np.arange(start, stop) + np.repeat(shift, lengths)]
            filled += stop - start

    def _documents(self, epoch: int, row: int) -> Iterator[str]:
        for shard, start, stop in self._spans(epoch, row):
            order, ends = self._document_order(epoch, shard)
            for document in order[_find_overlapping(ends, start, stop)].tolist():
                yield f"{self.store.paths[shard].stem}:{document}"


def _find_overlapping(ends: np.ndarray, start: int, stop: int) -> slice:
    """The documents (by their place in the order) that [start, stop) touches."""
    return slice(int(np.searchsorted(ends, start, "right")) - 1, int(np.searchsorted(ends, stop, "left")))
