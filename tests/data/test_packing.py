"""Whole documents in rows, against brute force: nothing is lost, nothing is cut that must not be."""

import itertools
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nanochat.data.packing import EMPTY, PackedLoader, Rows, pack, split_packed_rows
from nanochat.evaluation import bpb as loss_eval
from nanochat.evaluation.bpb import packed_losses
from nanochat.modality import Modality, Vocabulary
from nanochat.system.environment import UserError
from tests.messages import record_messages

AUDIO = Modality("audio", codebooks=2, codes=5, start=13)
VOCABULARY = Vocabulary(20, (AUDIO,))  # audio 20..29, end 30
BOS = 4


def sound(number: int, caption: int, frames: int) -> list[int]:
    """A captioned sound whose ids tell it from all others of its length."""
    codes = [[(number + t) % 5, (number * 2 + t) % 5] for t in range(frames)]
    return [BOS, *[number % 12] * caption, 13, *VOCABULARY.ids_of("audio", np.array(codes)).tolist(), 30]


def text(number: int, length: int) -> list[int]:
    return [BOS, *((number + np.arange(length - 1)) % 4).tolist()]


class Store:
    """A token store of documents that are ids already."""

    def __init__(self, *shards: list[list[int]]):
        self.vocabulary, self.split = VOCABULARY, "train"
        self.tokenizer = SimpleNamespace(bos_id=BOS, hash="t")
        self.dataset = SimpleNamespace(name="sounds", fingerprint={"sha256": "d"})
        self.paths = [SimpleNamespace(stem=f"shard_{i}", name=f"shard_{i}.parquet") for i in range(len(shards))]
        self._shards = [
            (np.array([t for d in docs for t in d], np.uint16), np.cumsum([0, *map(len, docs)])) for docs in shards
        ]

    def require(self, shards) -> None:
        pass

    def shard(self, number: int):
        return self._shards[number]


DOCUMENTS = [sound(i, 1 + i % 4, 2 + i % 3) for i in range(17)] + [text(i, 3 + 5 * i) for i in range(9)]
STORE = Store(DOCUMENTS[:10], DOCUMENTS[10:])


@given(st.lists(st.integers(1, 40), max_size=60))
def test_pack_puts_every_piece_into_one_row_with_room(lengths):
    """And wastes less than half: two rows that together fit one cannot be. Red when a full row stays in the list."""
    order, ends = pack(np.array(lengths, dtype=np.int64), 40)
    assert sorted(order.tolist()) == list(range(len(lengths)))
    filled = [sum(lengths[p] for p in order[a:b]) for a, b in itertools.pairwise(ends)]
    assert all(0 < size <= 40 for size in filled)
    assert all(a + b > 40 for i, a in enumerate(filled) for b in filled[i + 1 :])


def test_rows_hold_whole_sounds_and_every_text_target_once():
    """Red when a cut text loses the id at the cut, a sound is cut like a text, or a piece behind another document does
    not begin with BOS."""
    said: list[str] = []
    with record_messages(said):
        rows = Rows(STORE, 15)
    found = np.full((len(rows), 16), 99)
    for row in range(len(rows)):
        rows.read(row, found[row])
    streams = [[t for t in row if t != EMPTY] for row in found.tolist()]
    together = [",".join(map(str, stream)) for stream in streams]
    for document in DOCUMENTS[:17]:
        assert sum(f",{','.join(map(str, document))}," in f",{stream}," for stream in together) == 1
    inputs, targets = split_packed_rows(found, STORE)
    assert (inputs >= 0).all()
    assert ((targets == -100) == (found[:, 1:] == EMPTY)).all()
    # Each id but a document's first is a target once; a document behind another in its row is one more, its BOS.
    more = Counter(targets[targets != -100].tolist())
    more.subtract(itertools.chain.from_iterable(document[1:] for document in DOCUMENTS))
    assert +more == {BOS: sum(len(rows.documents(row)) - 1 for row in range(len(rows)))}
    assert not -more
    shown = {name for row in range(len(rows)) for name in rows.documents(row)}
    assert shown == {f"shard_0:{i}" for i in range(10)} | {f"shard_1:{i}" for i in range(len(DOCUMENTS) - 10)}
    assert f"{len(rows)} rows of 15" in said[0]
    longest = max(range(len(DOCUMENTS)), key=lambda i: len(DOCUMENTS[i])) - 10
    assert f"shard_1:{longest}" not in rows.documents(0)  # packed longest first; a part of them is like the whole


def test_sounds_longer_than_a_row_are_left_out_and_said():
    said: list[str] = []
    store = Store([sound(1, 2, 3), sound(2, 2, 9), sound(3, 2, 20), text(0, 50)])
    with record_messages(said):
        rows = Rows(store, 12)
    assert "2 of 3 sounds are longer than max_seq_len=12 (the longest takes 44)" in said[0]
    assert "document 1 of shard_0.parquet" in said[0]
    assert "--clip_seconds" in said[0]
    assert {name for row in range(len(rows)) for name in rows.documents(row)} == {"shard_0:0", "shard_0:3"}
    assert len(sound(1, 1, 3)) == 10  # one that fills a row, and one that is too long by one
    with record_messages(said):
        Rows(Store([sound(1, 1, 3)]), 9)
    with pytest.raises(UserError, match="none of its 1"), record_messages(said):
        Rows(Store([sound(1, 1, 3)]), 8)
    with pytest.raises(UserError, match=r"none of its 1 train documents fits a row of max_seq_len=12"):
        Rows(Store([sound(2, 2, 9)]), 12)


def test_a_split_that_changed_cannot_be_resumed():
    """Red when the tokens of the checkpoint are not compared: the run would see other rows."""
    before = PackedLoader(Rows(Store([sound(i, 2, 4) for i in range(6)]), 15), 2, 15, seed=3)
    before.next()
    after = PackedLoader(Rows(Store([sound(i, 2, 4) for i in range(5)]), 15), 2, 15, seed=3)
    after.load_state_dict(before.state_dict())
    with pytest.raises(UserError, match="the data order cannot continue"):
        after.next()


def loader(rank: int = 0, world_size: int = 1, count=None, rows: int = 4) -> PackedLoader:
    packed = Rows(STORE, 15)
    return PackedLoader(packed, rows, 15, seed=3, rank=rank, world_size=world_size, count=count)


def test_an_epoch_shows_every_row_once_and_ranks_share_it():
    """Red when the rows of an epoch are drawn with the same order as those of the last."""
    whole, halves = loader(rows=2), [loader(rank, 2, rows=2) for rank in range(2)]
    count = len(whole.packed)
    orders, epoch = [], []
    for _ in range(2 * count):
        inputs, targets = whole.next()
        parts = [half.next() for half in halves]
        assert torch.equal(inputs, torch.cat([part[0] for part in parts]))
        assert torch.equal(targets, torch.cat([part[1] for part in parts]))
        for row in whole.last_rows():
            epoch.append(row["row"])
            if len(epoch) == count:
                orders.append(epoch)
                epoch = []
    assert [sorted(order) for order in orders] == [list(range(count))] * 4
    assert len({tuple(order) for order in orders}) == 4


def test_resume_and_the_wanted_modalities():
    """Red when the state keeps no cursor; when text targets count in an audio-only loss."""
    one = loader()
    for _ in range(3):
        one.next()
    two = loader(count=("audio",))
    two.load_state_dict(one.state_dict())
    (inputs, targets), (same, audio) = one.next(), two.next()
    assert torch.equal(inputs, same)
    assert torch.equal(audio, torch.where(targets >= 20, targets, -100))
    assert (audio >= 20).any()
    state = one.state_dict() | {"tokens": 7}
    two.load_state_dict(state)
    with pytest.raises(UserError, match="7 in the checkpoint"):
        two.next()


class Guess:
    """A model that gives each target the loss 1 + its id / 100."""

    device, training = torch.device("cpu"), True

    def __call__(self, idx, targets, loss_reduction):
        assert loss_reduction == "none"
        return torch.where(targets == -100, 0.0, 1 + targets.float() / 100)

    def train(self, mode: bool = True):
        return self

    def eval(self):
        return self


@pytest.mark.parametrize("rows", [1, 3, 50])
def test_held_out_losses_by_hand(rows):
    """Red when `end` is not counted as audio, or ids of no bytes as text."""
    packed = Rows(STORE, 15)
    token_bytes = np.array([1, 2, 0, 3] + [0] * 16)
    found = packed_losses(Guess(), packed, token_bytes, rows=rows)
    ids = np.full((len(packed), 16), EMPTY)
    for row in range(len(packed)):
        packed.read(row, ids[row])
    targets = ids[:, 1:][ids[:, 1:] != EMPTY]
    losses = 1 + targets / 100
    of_bytes = np.where(targets < 20, token_bytes[targets.clip(max=19)], 0)
    assert found["bpb"] == pytest.approx(losses[of_bytes > 0].sum() / np.log(2) / of_bytes.sum())
    assert found["bytes"] == of_bytes.sum()
    assert found["tokens"] == (of_bytes > 0).sum()
    with pytest.MonkeyPatch.context() as patch:  # two ranks, one after the other
        patch.setattr(loss_eval, "sum_over_ranks", lambda values, *_: list(values))
        halves = [packed_losses(Guess(), packed, token_bytes, rows=rows, rank=r, world_size=2) for r in range(2)]
    assert sum(half["nats"] for half in halves) == pytest.approx(found["nats"])
    assert sum(half["tokens"] for half in halves) == found["tokens"]
    for name, mine in (("text", targets < 20), ("audio", targets >= 20)):
        assert found["losses"][name] == dict(nats=pytest.approx(losses[mine].mean()), tokens=mine.sum())
