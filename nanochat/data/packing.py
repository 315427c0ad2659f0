"""Captioned sounds in rows: whole documents side by side, so that no sound is without its caption.

Text alone may be cut anywhere; a sound whose caption lies in another row is noise to learn from. Documents are placed
once, best fit first (longest first, each into the fullest row that has room), and the rows are drawn anew each epoch.
What stays empty at the end of a row is ignored. Text that is longer than a row is cut into rows.
"""

import logging
import math
from bisect import bisect_left
from collections.abc import Callable

import numpy as np
import torch

from nanochat.data.dataloader import BLOCK, DataLoader
from nanochat.data.token_store import TokenStore
from nanochat.modality import IGNORED
from nanochat.system.environment import UserError

logger = logging.getLogger(__name__)

EMPTY = -1
CAPTIONS = 3  # what a draw is for, beside the loader's orders


class Rows:
    """The rows of one split: row i is ids [seq_len + 1], EMPTY behind its documents."""

    def __init__(self, store: TokenStore, seq_len: int, max_tokens: int | None = None):
        """Waits until the split is tokenised. UserError: no document fits a row.

        max_tokens: take the first shards whose rows hold this many positions, and open no others (None: all).
        """
        self.store, self.capacity = store, seq_len + 1
        pieces = self._first_pieces(math.inf if max_tokens is None else -(-max_tokens // seq_len) * self.capacity)
        too_long = self._too_long(pieces)
        self._say_too_long(pieces, too_long, seq_len)
        pieces = pieces[~too_long]
        if not len(pieces):
            raise UserError(
                f"data {store.dataset.name}: none of its {len(too_long)} {store.split} documents fits a row of "
                f"max_seq_len={seq_len}: raise it, or cut the sounds with --clip_seconds"
            )
        order, self.ends = pack(pieces[:, 3], self.capacity)
        self.pieces = pieces[order]
        # The packing sorted the rows by length: a part of them should be like the whole.
        self._order = np.argsort(np.random.PCG64(0).random_raw(len(self.ends) - 1), kind="stable")
        self.tokens = sum(count for row in range(len(self)) for *_, count, _ in self._of(row))
        filled = self.tokens / (len(self) * self.capacity)
        logger.info(f"{store.split}: {len(pieces)} documents, {len(self)} rows of {seq_len}, {filled:.0%} full")

    def __len__(self) -> int:
        return len(self._order)

    def read(self, row: int, out: np.ndarray) -> None:
        """Copy the ids of a row into out [seq_len + 1].

        Behind another document a later piece of a long text begins with BOS too, in place of the id that it has in
        common with the piece before, where that is a target.
        """
        filled = 0
        for shard, _, start, count, _ in self._of(row):
            out[filled : filled + count] = self.store.shard(shard)[0][start : start + count]
            if filled:
                out[filled] = self.store.tokenizer.bos_id
            filled += count
        out[filled:] = EMPTY

    def without_captions(self, row: int, ids: np.ndarray, drop: Callable[[], bool]) -> np.ndarray:
        """The ids of a row without the captions of those sounds for which drop() says so; BOS stays."""
        kept, begin = [], 0
        sounds = self.store.vocabulary.table(by_expert=True).numpy() > 0
        for *_, count, sound in self._of(row):
            document = ids[begin : begin + count]
            if sound and drop():
                document = np.delete(document, range(1, int(np.argmax(sounds[document]))))
            kept.append(document)
            begin += count
        return np.concatenate(kept)

    def documents(self, row: int) -> list[str]:
        return [f"{self.store.paths[shard].stem}:{document}" for shard, document, *_ in self._of(row)]

    def _of(self, row: int) -> list[list[int]]:
        place = self._order[row]
        return self.pieces[self.ends[place] : self.ends[place + 1]].tolist()

    def _first_pieces(self, wanted: float) -> np.ndarray:
        """The pieces of the first shards that have `wanted` ids which fit into rows: as many rows are full at least.

        int64 [pieces, 5]: shard, document, first id, number of ids, whether it is part of a sound.
        """
        if wanted == math.inf:
            self.store.require(range(len(self.store.paths)))
        found = []
        for shard in range(len(self.store.paths)):
            if wanted <= 0:
                break
            found.append(self._pieces(shard))
            wanted -= found[-1][~self._too_long(found[-1]), 3].sum()
        return np.concatenate(found)

    def _too_long(self, pieces: np.ndarray) -> np.ndarray:
        return (pieces[:, 3] > self.capacity) & (pieces[:, 4] == 1)

    def _pieces(self, shard: int) -> np.ndarray:
        ids, offsets = self.store.shard(shard)
        lengths = np.diff(offsets)
        sound = np.zeros(len(lengths), bool)
        sound[lengths > 0] = ids[offsets[1:][lengths > 0] - 1] >= self.store.vocabulary.text_size
        # A long text gives rows that overlap by one id, so that each id is a target once.
        step = self.capacity - 1
        cuts = np.where(sound, 1, np.maximum(1, -(-(lengths - 1) // step)))
        document = np.repeat(np.arange(len(lengths)), cuts)
        number = np.arange(len(document)) - np.repeat(np.cumsum(cuts) - cuts, cuts)
        start = offsets[document] + number * step
        count = np.where(sound[document], lengths[document], np.minimum(offsets[document + 1] - start, self.capacity))
        columns = (np.full(len(document), shard), document, start, count, sound[document])
        return np.stack([column.astype(np.int64) for column in columns], axis=1)

    def _say_too_long(self, pieces: np.ndarray, too_long: np.ndarray, seq_len: int) -> None:
        if not too_long.any():
            return
        shard, document, *_ = pieces[too_long][0].tolist()
        logger.info(
            f"{self.store.split}: {too_long.sum()} of {(pieces[:, 4] == 1).sum()} sounds are longer than "
            f"max_seq_len={seq_len} (the longest takes {pieces[too_long][:, 3].max() - 1}) and skipped, the first is "
            f"document {document} of {self.store.paths[shard].name}: raise max_seq_len or cut them with --clip_seconds"
        )


def pack(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Best-fit decreasing: (pieces in the order of their rows, where each row ends among them, 0 in front).

    lengths int64 [n], each at most capacity. Deterministic; equal lengths keep their order.
    """
    rows: list[list[int]] = []
    with_room: dict[int, list[int]] = {}  # rows by what is left in them
    rooms: list[int] = []  # the keys of it, ascending
    for piece in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[piece])
        place = bisect_left(rooms, length)
        if place == len(rooms):
            row, room = len(rows), capacity
            rows.append([])
        else:
            room = rooms[place]
            row = with_room[room].pop()
            if not with_room[room]:
                del with_room[room], rooms[place]
        rows[row].append(piece)
        if room > length:
            left = room - length
            if left not in with_room:
                with_room[left] = []
                rooms.insert(bisect_left(rooms, left), left)
            with_room[left].append(row)
    ends = np.cumsum([0, *map(len, rows)])
    return np.array([piece for row in rows for piece in row], dtype=np.int64), ends


class PackedLoader(DataLoader):
    """The DataLoader of captioned sounds: batches of packed rows, ignored targets where they are empty.

    count: modalities whose targets count in the loss, None for all. caption_dropout: the share of sounds whose caption
    is dropped, for classifier-free guidance (arXiv 2207.12598). Everything else as the DataLoader has it.
    """

    def __init__(self, rows: Rows, *args, count: tuple[str, ...] | None = None, caption_dropout: float = 0.0, **kwargs):
        super().__init__(rows.store, *args, **kwargs)
        self.packed, self.count, self.caption_dropout = rows, count, caption_dropout

    def _position(self, cursor: int) -> tuple[int, int, int]:
        if self.tokens not in (None, self.packed.tokens):
            raise UserError(
                f"the data order cannot continue: {self.store.dataset.name} has {self.packed.tokens} tokens here, "
                f"{self.tokens} in the checkpoint; has a shard been skipped as corrupt, or repaired?"
            )
        epoch, place = divmod(cursor, len(self.packed))
        return epoch, place, min(BLOCK, len(self.packed) - place // BLOCK * BLOCK)

    def _read(self, epoch: int, row: int, out: np.ndarray) -> None:
        self.packed.read(row, out)
        if self.caption_dropout:
            bits = np.random.PCG64(np.random.SeedSequence(self.seed, spawn_key=(CAPTIONS, epoch, row)))
            kept = self.packed.without_captions(row, out, lambda: bits.random_raw() < self.caption_dropout * 2**64)
            out[:] = np.pad(kept, (0, len(out) - len(kept)), constant_values=EMPTY)

    def _documents(self, epoch: int, row: int) -> list[str]:
        return self.packed.documents(row)

    def epoch_rows(self) -> int:
        return len(self.packed)

    def _tokens_per_epoch(self) -> int:
        return self.packed.tokens

    def _split_inputs_targets(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return split_packed_rows(ids, self.store, self.count)


def split_packed_rows(ids: np.ndarray, store: TokenStore, count: tuple | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Rows [n, seq_len + 1] with EMPTY -> inputs (BOS there) and targets (ignored there), [n, seq_len]."""
    inputs, targets = ids[:, :-1], ids[:, 1:]
    inputs = np.where(inputs == EMPTY, store.tokenizer.bos_id, inputs)
    targets = np.where(targets == EMPTY, IGNORED, targets)
    return inputs, store.vocabulary.mask_targets(torch.from_numpy(targets), count).numpy()
