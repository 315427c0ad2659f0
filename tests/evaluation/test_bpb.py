"""Bits per byte against sums over the stream written out by hand, and the compressor baselines."""

import errno
import heapq
import json
import lzma
import math
import os
import shlex
import textwrap
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from nanochat.evaluation import bpb as loss_eval
from nanochat.evaluation.bpb import bits_per_byte, compressor_baselines
from nanochat.system.environment import UserError
from nanochat.training.stop_signals import EvaluationInterrupted
from tests.forked import spawn
from tests.messages import record_messages

VOCAB = 7
BYTES = np.array([1, 2, 3, 1, 4, 2, 0], dtype=np.int32)  # the last id is a special


class Bigram(torch.nn.Module):
    """Logits that depend on the last token only: every loss can be looked up."""

    def __init__(self, vocab: int = VOCAB, sequence_len: int = 16):
        super().__init__()
        self.config = SimpleNamespace(sequence_len=sequence_len, vocab_size=vocab)
        self.device = torch.device("cpu")
        self.register_buffer("table", torch.randn(vocab, vocab, generator=torch.Generator().manual_seed(0)))

    def forward(self, idx, targets=None, kv_cache=None, loss_reduction="mean"):
        logits = self.table[idx]
        if targets is None:
            return logits
        return F.cross_entropy(logits.transpose(1, 2), targets, ignore_index=-100, reduction=loss_reduction)


def by_hand(stream, last: int) -> tuple[float, int, int]:
    """(nats, bytes, tokens) of the targets 1..last of the stream, one after the other."""
    table = Bigram().table.double()
    nats = num_bytes = tokens = 0
    for position in range(1, last + 1):
        length = int(BYTES[stream[position]])
        if length:
            nats -= table[stream[position - 1]].log_softmax(0)[stream[position]].item()
            num_bytes, tokens = num_bytes + length, tokens + 1
    return nats, num_bytes, tokens


@given(
    stream=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=60),
    rows=st.integers(1, 5),
    seq_len=st.integers(1, 20),
    max_tokens=st.none() | st.integers(1, 70),
)
def test_every_target_is_scored_once(stream, rows, seq_len, max_tokens):
    """Whatever the windows, nats, bytes and tokens are those of the stream read token by token.

    Red when the stride is not seq_len (start = window * (seq_len - 1)), or when the last partial window is dropped.
    """
    last = min(len(stream) - 1, max_tokens or len(stream))
    nats, num_bytes, tokens = by_hand(stream, last)
    arguments = dict(rows=rows, seq_len=seq_len, max_tokens=max_tokens)
    if num_bytes == 0:
        with pytest.raises(UserError, match="no byte of text"):
            bits_per_byte(Bigram(), np.array(stream, dtype=np.uint16), BYTES, **arguments)
        return
    found = bits_per_byte(Bigram(), np.array(stream, dtype=np.uint16), BYTES, **arguments)
    assert (found["bytes"], found["tokens"]) == (num_bytes, tokens)
    assert found["nats"] == pytest.approx(nats, rel=1e-5)
    assert found["bpb"] == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-5)


def test_specials_are_not_scored():
    """A model certain of everything but specials has 0 bpb. Red without the line that ignores labels of 0 bytes."""
    model = Bigram()
    stream = np.array([6, 0, 6, 1, 6, 2])
    model.table = torch.full((VOCAB, VOCAB), -100.0)
    model.table[6, :3] = 0.0  # after a special: one of three, so log2(3) bits each
    found = bits_per_byte(model, stream, BYTES, rows=2, seq_len=3)
    assert found["bpb"] == pytest.approx(3 * math.log2(3) / 6, rel=1e-5)
    assert found["tokens"] == 3


def test_the_stream_may_be_a_memory_map_and_the_mode_is_restored(tmp_path):
    ids = np.array([6, 1, 2, 3, 4, 0, 5, 6, 1], dtype=np.uint16)
    ids.tofile(tmp_path / "ids.bin")
    model = Bigram().train()
    mapped = np.memmap(tmp_path / "ids.bin", dtype=np.uint16, mode="r")
    assert bits_per_byte(model, mapped, BYTES, rows=2, seq_len=4) == bits_per_byte(
        model, ids.astype(np.int64), BYTES, rows=3, seq_len=4
    )
    assert model.training


def test_an_evaluation_stops_before_its_next_forward():
    """Red when the loop does not ask, or when half of the sums are returned."""
    model, answers = Bigram(), iter([False, False, True, True])
    forwards = []
    model.register_forward_hook(lambda *_: forwards.append(1))
    stream = np.random.default_rng(0).integers(0, VOCAB, 101)
    with pytest.raises(EvaluationInterrupted):
        bits_per_byte(model.train(), stream, BYTES, rows=2, seq_len=8, stop=lambda: next(answers))
    assert len(forwards) == 2
    assert model.training


def _rank(rank: int, world_size: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world_size)
    stream = np.random.default_rng(0).integers(0, VOCAB, 101)
    with pytest.raises(EvaluationInterrupted):  # on both, though only one was asked to
        bits_per_byte(
            Bigram(), stream, BYTES, rows=2, seq_len=8, rank=rank, world_size=world_size, stop=lambda: rank == 1
        )
    found = bits_per_byte(Bigram(), stream, BYTES, rows=2, seq_len=8, rank=rank, world_size=world_size)
    (Path(folder) / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def test_ranks_share_the_windows(tmp_path):
    """2 ranks with 7 and 6 windows both get the 1-rank sums. Red without the all_reduce."""
    spawn(_rank, (2, str(tmp_path)), ranks=2)
    one = bits_per_byte(Bigram(), np.random.default_rng(0).integers(0, VOCAB, 101), BYTES, rows=2, seq_len=8)
    for rank in range(2):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert found == pytest.approx(one, rel=1e-9)


# ---------------------------------------------------------------------------------------------------------------------


class Corpus:
    """A dataset of a few documents in memory."""

    def __init__(self, directory: Path, train: list[str], val: list[str], sha256: str = "a"):
        self.directory, self.texts, self.fingerprint = directory, {"train": train, "val": val}, {"sha256": sha256}

    def documents(self, split):
        return ((f"{i}.txt", text) for i, text in enumerate(self.texts[split]))

    def text_bytes(self, split):
        return sum(len(text.encode()) for text in self.texts[split])


TRAIN, VAL = ["def f(x): return x\n" * 40, "naïve café\n" * 30], ["def f(y): return y\n", "naïve tea, naïve café\n" * 3]


def test_compressors_see_exactly_the_held_out_bytes(tmp_path):
    """xz alone and primed, against lzma on the joined bytes. Red when PRESET_EXTREME is dropped or val comes first."""
    texts = [Path(module.__file__).read_text(encoding="utf-8") for module in (heapq, shlex, textwrap)]
    train, val = (TRAIN[0] + texts[0]).encode(), (texts[1] + texts[2] + VAL[1]).encode()

    def size(raw: bytes) -> int:
        return len(lzma.compress(raw, preset=9 | lzma.PRESET_EXTREME))

    assert size(val) != len(lzma.compress(val, preset=9))
    found = compressor_baselines(Corpus(tmp_path, [TRAIN[0], texts[0]], [texts[1], texts[2], VAL[1]]))
    assert found["xz"] == pytest.approx(8 * size(val) / len(val))
    assert found["xz_primed"] == pytest.approx(8 * (size(train + val) - size(train)) / len(val))


def test_compressors_are_kept_by_fingerprint(tmp_path, monkeypatch):
    """The second call computes nothing; other documents and a damaged file are computed anew."""
    first = compressor_baselines(Corpus(tmp_path, TRAIN, VAL))
    with monkeypatch.context() as patch:
        patch.setattr(loss_eval, "xz_size", None)
        assert compressor_baselines(Corpus(tmp_path, TRAIN, VAL)) == first
    assert compressor_baselines(Corpus(tmp_path, TRAIN, ["other words"], sha256="b")) != first
    (tmp_path / "compressors.json").write_text("{")
    assert compressor_baselines(Corpus(tmp_path, TRAIN, VAL)) == first


def test_large_splits_are_not_compressed(tmp_path, monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(loss_eval, "LARGEST_COMPRESSED", 500)
    with record_messages(said):
        found = compressor_baselines(Corpus(tmp_path, TRAIN, VAL))
    assert found["xz"] is not None
    assert found["xz_primed"] is None
    assert "xz_primed" in said[0]


def test_compressors_that_cannot_be_kept_are_told_all_the_same(tmp_path, monkeypatch):
    """On a read-only disk. Red when the write's error ends the evaluation."""
    said = []

    def read_only(path, text):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr("nanochat.evaluation.bpb.write_atomically", read_only)
    with record_messages(said):
        assert compressor_baselines(Corpus(tmp_path, TRAIN, VAL))["xz"] > 0
    assert len(said) == 1
    assert "Read-only file system" in said[0]
