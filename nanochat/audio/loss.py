"""How well a model predicts codes: nats and bits a code, bits a second, beside baselines that need no model.

Every sound is scored behind its own caption, alone in its row; then behind another sound's caption: the difference is
what the model takes from the caption. Uniform, unigram and bigram know the codebook whose turn it is, as the model's
grammar does, and the last code; they are counted on the training split.
"""

import math
from collections.abc import Callable, Iterator

import numpy as np
import torch

from nanochat.data.dataset import Dataset
from nanochat.data.token_store import encode_sound
from nanochat.data.tokenizer import Tokenizer
from nanochat.evaluation.bpb import eval_mode, sum_over_ranks
from nanochat.modality import IGNORED, Vocabulary
from nanochat.model.attention import kernels_for
from nanochat.system.environment import UserError

PRIOR = 0.5  # added to every unigram count
BACKING = 4.0  # pseudo-counts of the unigram behind each code of the bigram


def iterate_clips(dataset: Dataset, split: str) -> Iterator[tuple[str, np.ndarray, dict]]:
    """(caption, codes [T, Q], attributes) of the sounds of a split."""
    for shard in dataset.shards(split):
        for _, caption, codes, attributes in dataset.read_clips(shard):
            if codes is not None:
                yield caption, codes, attributes or {}


def evaluate_audio(
    model,
    tokenizer: Tokenizer,
    dataset: Dataset,
    *,
    rows: int,
    max_clips: int | None = None,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
    stop: Callable[[], bool] | None = None,
    counted: dict | None = None,
) -> dict:
    """{"nats", "bits", "bits_per_second", "clips", "codes", "baselines": {...}, "splits": {...}} of held-out sounds.

    nats and bits: of a code, `end` included. baselines: nats of uniform, unigram, bigram, and shuffled_captions.
    splits: nats by "seen" and "unseen" where the attributes say. max_clips: of at most this many sounds, at least 2.
    UserError: fewer than 2 sounds fit a row. counted: the baselines of an earlier call, so that they are not counted
    again.
    """
    vocabulary = model.vocabulary
    room, start = model.config.sequence_len, vocabulary.modality("audio").start
    begin = [] if start is None else [start]
    found, too_long = [], 0
    for caption, codes, attributes in iterate_clips(dataset, "val"):
        if max_clips is not None and len(found) >= max(2, max_clips):
            break  # the rest of the split is not read
        sound = encode_sound(vocabulary, codes)[len(begin) :]
        caption_ids = tokenizer.encode(caption, bos=True)
        if len(caption_ids) + len(begin) + len(sound) > room + 1:
            too_long += 1
        else:
            found.append((caption_ids, sound, attributes))
    if len(found) < 2:
        raise UserError(f"data {dataset.name}: {len(found)} held-out sounds fit a row of {room}: at least 2 are needed")
    captions = [caption for caption, _, _ in found]
    others = [captions[i] for i in derangement(captions, seed)]
    how = dict(rows=rows, rank=rank, world_size=world_size, stop=stop)
    true = _nats(model, [(c + begin, sound) for c, sound, _ in found], **how)
    pairs = [(other, sound) for other, (_, sound, _) in zip(others, found, strict=True)]
    shuffled = _nats(model, [(c[: room + 1 - len(begin + sound)] + begin, sound) for c, sound in pairs], **how)
    counts = np.array([len(sound) for _, sound, _ in found])
    unseen = np.array([attributes.get("unseen") for _, _, attributes in found])
    per_second = dataset.codec["frame_rate"] * dataset.codec["codebooks"] / math.log(2)
    nats = float(true.sum() / counts.sum())
    baselines = dict(counted or count_baselines(dataset, vocabulary, [sound for _, sound, _ in found]))
    baselines["shuffled_captions"] = float(shuffled.sum() / counts.sum())
    splits = {name: unseen == value for name, value in (("seen", False), ("unseen", True))}
    return dict(
        nats=nats,
        bits=nats / math.log(2),
        bits_per_second=nats * per_second,
        clips=len(found),
        too_long=too_long,
        codes=int(counts.sum()),
        baselines=baselines,
        splits={k: float(true[mask].sum() / counts[mask].sum()) for k, mask in splits.items() if mask.any()},
    )


def derangement(captions: list, seed: int) -> list[int]:
    """For each caption the number of another one: shuffled, then turned until as few as can be got their own words."""
    order = np.argsort(np.random.PCG64(seed).random_raw(len(captions)), kind="stable")
    turns = range(1, min(len(captions), 64))

    def alike(turn: int) -> int:
        return sum(captions[a] == captions[b] for a, b in zip(order, np.roll(order, turn), strict=True))

    best = min(turns, key=alike)
    other = np.empty(len(captions), dtype=np.int64)
    other[order] = np.roll(order, best)
    return other.tolist()


@torch.no_grad()
def _nats(model, documents: list[tuple[list, list]], rows: int, rank: int, world_size: int, stop) -> np.ndarray:
    """Summed nats of the codes and `end` of each (ids before them, their ids), float64 [n]."""
    result = np.zeros(len(documents))
    order = sorted(range(len(documents)), key=lambda i: len(documents[i][0]) + len(documents[i][1]))
    groups = [order[i : i + rows] for i in range(0, len(order), rows)]
    with eval_mode(model):
        for group in groups[rank::world_size]:
            if stop is not None and stop():
                break
            longest = max(len(documents[i][0]) + len(documents[i][1]) for i in group)
            ids = np.zeros((len(group), longest), np.int64)
            targets = np.full((len(group), longest), IGNORED, np.int64)
            for place, i in enumerate(group):
                before, sound = documents[i]
                ids[place, : len(before) + len(sound)] = before + sound
                targets[place, len(before) - 1 : len(before) - 1 + len(sound)] = sound
            inputs, wanted = (torch.from_numpy(array).to(model.device) for array in (ids[:, :-1], targets[:, :-1]))
            with kernels_for(model.device, many_shapes=True):
                losses = model(inputs, wanted, loss_reduction="none").double().sum(dim=1).tolist()
            for i, loss in zip(group, losses, strict=True):
                result[i] = loss
    return np.array(sum_over_ranks(result, model.device, world_size, stop))


def count_baselines(dataset: Dataset, vocabulary: Vocabulary, sounds: list[list[int]]) -> dict[str, float]:
    """Nats a code of the uniform, unigram and bigram predictions for these sounds (ids behind `start`)."""
    audio = vocabulary.modality("audio")
    size = audio.size + 1  # codes, end, and the beginning as a code to come from
    begin = int(audio.start is not None)
    trained = [
        _symbols(vocabulary, encode_sound(vocabulary, codes)[begin:]) for _, codes, _ in iterate_clips(dataset, "train")
    ]
    keys = np.concatenate([row[:-1] * size + row[1:] for row in trained])
    pairs, times = np.unique(keys, return_counts=True)  # most pairs never occur
    seen = np.bincount(pairs // size, times, size)
    followed = np.bincount(pairs % size, times, size)
    legal = np.zeros((audio.codebooks, size), bool)  # by the codebook whose turn it is
    for book in range(audio.codebooks):
        legal[book, book * audio.codes : (book + 1) * audio.codes] = True
    if audio.start is not None:
        legal[0, audio.size - 1] = True  # end
    unigram = np.where(legal, followed + PRIOR, 0)
    unigram /= unigram.sum(axis=1, keepdims=True)
    totals = dict.fromkeys(("uniform", "unigram", "bigram"), 0.0)
    count = 0
    for sound in sounds:
        row = _symbols(vocabulary, sound)
        before, after = row[:-1], row[1:]
        book = np.arange(len(after)) % audio.codebooks
        place = np.searchsorted(pairs, before * size + after).clip(max=len(pairs) - 1)
        together = np.where(pairs[place] == before * size + after, times[place], 0)
        chances = dict(
            uniform=1 / legal.sum(axis=1)[book],
            unigram=unigram[book, after],
            bigram=(together + BACKING * unigram[book, after]) / (seen[before] + BACKING),
        )
        for name, chance in chances.items():
            totals[name] -= float(np.log(chance).sum())
        count += len(after)
    return {name: total / count for name, total in totals.items()}


def _symbols(vocabulary: Vocabulary, sound: list[int]) -> np.ndarray:
    """ids behind `start` as 0 .. size - 1: the beginning, then codes and `end`."""
    ids = np.array(sound, dtype=np.int64)
    return np.concatenate([[vocabulary.modality("audio").size], ids - vocabulary.first("audio")])
