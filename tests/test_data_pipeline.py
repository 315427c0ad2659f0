"""What a run reads: validation that looks at no more than it measures."""

import numpy as np
import pytest
import torch

from nanochat import data_pipeline as training_data
from nanochat.config.settings import Settings
from nanochat.data import dataset as datasets
from nanochat.data import prepare as prepare_module
from nanochat.data.packing import Rows
from nanochat.data.prepare import prepare
from nanochat.data.token_store import TokenStore
from nanochat.data.tokenizer import Tokenizer
from nanochat.data_pipeline import prepare_for
from nanochat.evaluation.bpb import bits_per_byte, packed_losses
from nanochat.evaluation.suite import draw_samples
from nanochat.gpt import GPT, GPTConfig
from nanochat.runtime import Compute

CPU = Compute(torch.device("cpu"), torch.float32)
BYTES = Tokenizer([bytes([i]) for i in range(256)])
TINY = dict(depth=1, model_dim=32, head_dim=16, max_seq_len=64, device_batch_size=4, tie_weights=True)


@pytest.fixture
def small_shards(monkeypatch, base):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(base))
    monkeypatch.setattr(prepare_module, "SHARD_BYTES", 3000)


def model_of(settings: Settings) -> GPT:
    torch.manual_seed(0)
    model = GPT(GPTConfig.from_settings(settings, BYTES.vocab_size))
    model.init_weights()
    return model


def test_validation_tokenises_no_more_than_it_measures(small_shards, tiny_corpus, tmp_path):
    """eval_tokens=1000 takes the first of many val shards, and the bpb of the same ids in one array, bit for bit.

    Red when make_validation() calls store.stream() without eval_tokens.
    """
    settings = Settings(data=str(tiny_corpus), eval_tokens=1000, **TINY)
    dataset, model = prepare_for(settings), model_of(settings)
    measured = training_data.make_validation(settings, dataset, BYTES, CPU)(model)
    store = TokenStore(dataset, BYTES, "val")
    assert [path.stem for path in store.directory.glob("val*.json")] == ["val_00000"]
    assert len(store.paths) > 4
    ids = np.concatenate([store.shard(shard)[0] for shard in range(len(store.paths))])
    how = dict(rows=4, seq_len=64, max_tokens=1000)
    assert measured == bits_per_byte(model, ids, BYTES.token_bytes, **how)
    whole = training_data.make_validation(Settings(**{**vars(settings), "eval_tokens": None}), dataset, BYTES, CPU)
    assert whole(model) == bits_per_byte(model, ids, BYTES.token_bytes, rows=4, seq_len=64)


def test_validation_of_sounds_looks_at_the_first_shards(monkeypatch, base):
    """As many rows as eval_tokens asks for, out of the first val shards; those of a single shard stay the same ones.

    Red when Rows() ignores max_tokens, or stops at as many ids as targets, which too few rows may hold.
    """
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(base))
    shape = dict(TINY, max_seq_len=240, modalities="audio:64", codebooks=2, codec="pitch")
    settings = Settings(data="synth", data_limit=60, clip_seconds=0.3, **shape)
    one = prepare_for(settings)
    monkeypatch.setattr(prepare_module, "SHARD_BYTES", 500)
    many = prepare_for(Settings(**{**vars(settings), "data_limit": 61}))
    vocabulary = training_data.build_vocabulary(settings, BYTES)
    store = TokenStore(many, BYTES, "val", vocabulary=vocabulary)
    assert len(Rows(store, 240, max_tokens=700)) >= 3
    made = len(list(store.directory.glob("val*.json")))
    assert sum(map(store.tokens, range(made))) >= 700
    assert made < len(store.paths)
    store = TokenStore(one, BYTES, "val", vocabulary=vocabulary)
    whole, model = Rows(store, 240), model_of(settings)
    how = dict(rows=4, max_tokens=700)
    bounded = Rows(store, 240, max_tokens=700)
    found, expected = (packed_losses(model, rows, BYTES.token_bytes, **how) for rows in (bounded, whole))
    assert found == expected


def test_samples_are_prompted_from_at_most_four_shards(small_shards, tiny_corpus, monkeypatch):
    """The prompts are the documents at 0, 1/4, 2/4 and 3/4 of the split; the other shards are not read.

    Red when documents_at() reads every shard, or counts the documents of one wrongly.
    """
    dataset = prepare(str(tiny_corpus))
    texts = [text for _, text in dataset.documents("val")]
    read, opened = datasets.read_shard, []
    monkeypatch.setattr(datasets, "read_shard", lambda shard: (opened.append(shard.name), read(shard))[1])
    settings = Settings(data=str(tiny_corpus), **TINY)
    samples = draw_samples(model_of(settings), BYTES, dataset, seed=1)
    for place, sample in enumerate(samples[:4]):
        assert texts[len(texts) * place // 4].replace("\n\n", "\n").startswith(sample["prompt"])
        assert sample["prompt"]
    assert len(opened) == len(set(opened)) <= 4 < len(dataset.shards("val"))
