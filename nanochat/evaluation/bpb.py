"""Bits per byte of a model on a token stream, and what a compressor needs for the same bytes.

Bits per byte (bpb) does not depend on the tokenizer: nats over the bytes that the scored tokens stand for.
"""

import json
import logging
import lzma
import math
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress

import numpy as np
import torch
import torch.distributed as dist

from nanochat.data.packing import split_packed_rows
from nanochat.files import write_atomically
from nanochat.modality import IGNORED
from nanochat.system.environment import UserError
from nanochat.training.stop_signals import EvaluationInterrupted

logger = logging.getLogger(__name__)

LARGEST_COMPRESSED = 200_000_000  # bytes; xz -9e takes about a second for each megabyte


@contextmanager
def eval_mode(model) -> Iterator[None]:
    """The model in eval mode, and afterwards in the mode that it was in."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@torch.no_grad()
def bits_per_byte(
    model,
    stream,
    token_bytes: np.ndarray,
    *,
    rows: int,
    seq_len: int,
    max_tokens: int | None = None,
    rank: int = 0,
    world_size: int = 1,
    stop: Callable[[], bool] | None = None,
) -> dict:
    """Score one stream (BOS + document, BOS + document, ...) so that every byte counts exactly once.

    model: called as model(idx, targets, loss_reduction="none") with int64 [rows, seq_len] on model.device; gives nats.
    stream: integer array [N]; its first token is only context (a BOS). Windows of seq_len inputs lie side by side
    (stride seq_len); the last one is padded with ignored targets. Tokens of 0 bytes (specials) are not scored.
    token_bytes: bytes of each id [V]. rows: windows in one forward. max_tokens: number of targets to score, from the
    start. Ranks take windows round-robin; each gets the sums over all of them, added in float64.
    Returns bpb, nats, bytes, tokens (scored ones). UserError when there is not one byte to score.
    stop: called before every forward; if it returns True on any rank, all ranks raise EvaluationInterrupted.
    """
    num_targets = max(0, len(stream) - 1)
    num_targets = num_targets if max_tokens is None else min(num_targets, max_tokens)
    windows = range(rank, math.ceil(num_targets / seq_len), world_size)
    byte_table = np.asarray(token_bytes, dtype=np.int64)
    nats, num_bytes, num_tokens = 0.0, 0, 0

    with eval_mode(model):
        for first in range(0, len(windows), rows):
            if stop is not None and stop():
                break

            # One shape always, so that a compiled model compiles once.
            inputs = np.full((rows, seq_len), int(stream[0]), dtype=np.int64)
            targets = np.full((rows, seq_len), IGNORED, dtype=np.int64)
            for row, window in enumerate(windows[first : first + rows]):
                start = window * seq_len
                end = min(start + seq_len, num_targets)
                inputs[row, : end - start] = stream[start:end]
                targets[row, : end - start] = stream[start + 1 : end + 1]
            lengths = np.where(targets >= 0, byte_table[targets.clip(min=0)], 0)
            targets[lengths == 0] = IGNORED

            nats += _losses(model, inputs, targets).sum().item()
            num_bytes += int(lengths.sum())
            num_tokens += int((lengths > 0).sum())

    return _bits_per_byte(*sum_over_ranks([nats, num_bytes, num_tokens], model.device, world_size, stop))


@torch.no_grad()
def packed_losses(
    model,
    packed,
    token_bytes: np.ndarray,
    *,
    rows: int,
    max_tokens: int | None = None,
    rank: int = 0,
    world_size: int = 1,
    stop: Callable[[], bool] | None = None,
) -> dict:
    """Score captioned sounds, row by row: bpb, bytes and tokens of all text, losses {modality: {"nats", "tokens"}}.

    packed: nanochat.data.packing.Rows, in their order, so that each sound has its caption before it. nats: mean over
    the targets of that modality, its `end` included. The rest as in bits_per_byte; max_tokens counts positions.
    """
    vocabulary = packed.store.vocabulary
    names, modality_of_id = vocabulary.names, vocabulary.table(by_expert=False).numpy()
    byte_table = np.zeros(vocabulary.size, np.int64)
    byte_table[: len(token_bytes)] = token_bytes
    seq_len = packed.capacity - 1
    num_rows = len(packed) if max_tokens is None else min(len(packed), -(-max_tokens // seq_len))
    local_rows = range(rank, num_rows, world_size)
    nats, tokens = np.zeros((2, len(names)))
    text_nats = num_bytes = num_tokens = 0

    with eval_mode(model):
        for first in range(0, len(local_rows), rows):
            if stop is not None and stop():
                break

            ids = np.full((rows, packed.capacity), -1, dtype=np.int64)
            for place, row in enumerate(local_rows[first : first + rows]):
                packed.read(row, ids[place])
            inputs, targets = split_packed_rows(ids, packed.store)
            valid = targets >= 0
            loss = _losses(model, inputs, targets).numpy()[valid]

            modality, lengths = modality_of_id[targets[valid]], byte_table[targets[valid]]
            nats += np.bincount(modality, loss, len(names))
            tokens += np.bincount(modality, minlength=len(names))
            text_nats += loss[lengths > 0].sum()
            num_bytes += lengths.sum()
            num_tokens += (lengths > 0).sum()

    sums = sum_over_ranks([*nats, *tokens, text_nats, num_bytes, num_tokens], model.device, world_size, stop)
    by_modality = zip(names, sums[: len(names)], sums[len(names) : -3], strict=True)
    losses = {name: dict(nats=total / count, tokens=int(count)) for name, total, count in by_modality if count}
    return _bits_per_byte(*sums[-3:]) | dict(losses=losses)


def _losses(model, inputs: np.ndarray, targets: np.ndarray) -> torch.Tensor:
    """Nats of each target, float64 [rows, seq_len] on the CPU, for mps has no float64."""
    inputs, targets = (torch.from_numpy(array).to(model.device) for array in (inputs, targets))
    return model(inputs, targets, loss_reduction="none").cpu().double()


def _bits_per_byte(nats: float, num_bytes: float, num_tokens: float) -> dict:
    if num_bytes == 0:
        raise UserError("nothing to score: the held-out tokens hold no byte of text")
    bpb = nats / (math.log(2) * num_bytes)
    return dict(bpb=bpb, nats=nats, bytes=int(num_bytes), tokens=int(num_tokens))


def sum_over_ranks(
    values: Iterable[float], device, world_size: int, stop: Callable[[], bool] | None = None
) -> list[float]:
    """Element-wise float64 sums over all ranks. EvaluationInterrupted on all of them if stop() is True on any."""
    total = torch.tensor([stop is not None and stop(), *values], dtype=torch.float64)
    if world_size > 1:
        total = total.to(device)
        dist.all_reduce(total)
    interrupted, *sums = total.tolist()
    if interrupted:
        raise EvaluationInterrupted
    return sums


# ---------------------------------------------------------------------------------------------------------------------
# compressor baselines


def compressor_baselines(dataset) -> dict[str, float | None]:
    """Bits per byte of `xz -9e` on the held-out documents in path order, alone and primed with the training split.

    primed: len(xz(train + val)) - len(xz(train)). Splits over 200 MB are not compressed: None, with a message.
    xz looks back 64 MB, so a larger training split primes only with its end. Cached beside the dataset by fingerprint.
    """
    cache = dataset.directory / "compressors.json"
    fingerprint = dataset.fingerprint["sha256"]
    with suppress(OSError, ValueError, KeyError):  # absent, corrupt or of another fingerprint: compute it
        cached = json.loads(cache.read_text(encoding="utf-8"))
        if cached["fingerprint"] == fingerprint:
            return {name: cached[name] for name in ("xz", "xz_primed")}

    result = _compress(dataset)

    if absent := [name for name, value in result.items() if value is None]:
        limit = f"{LARGEST_COMPRESSED // 10**6} MB"
        logger.info(f"compressor baseline not computed ({', '.join(absent)}): the text is empty or more than {limit}")
    try:
        write_atomically(cache, json.dumps({"fingerprint": fingerprint, **result}))
    except OSError as error:  # the cache saves the next evaluation a minute; this one has its figures
        logger.info(f"compressor baselines are not cached for the next evaluation ({error.strerror}: {cache})")
    return result


def _compress(dataset) -> dict[str, float | None]:
    result: dict[str, float | None] = {"xz": None, "xz_primed": None}
    held_out = dataset.text_bytes("val")
    if not 0 < held_out <= LARGEST_COMPRESSED:
        return result

    with ThreadPoolExecutor(2) as pool:  # liblzma works outside the interpreter lock, in up to 0.7 GB each
        val = pool.submit(xz_size, dataset, "val")
        if dataset.text_bytes("train") <= LARGEST_COMPRESSED:
            both, train = pool.submit(xz_size, dataset, "train", "val"), pool.submit(xz_size, dataset, "train")
            result["xz_primed"] = 8 * (both.result() - train.result()) / held_out
        result["xz"] = 8 * val.result() / held_out
    return result


def xz_size(dataset, *splits: str) -> int:
    """Bytes of the .xz file (preset 9e) over the documents of the splits, one after the other."""
    compressor = lzma.LZMACompressor(preset=9 | lzma.PRESET_EXTREME)
    size = 0
    for split in splits:
        size += sum(len(compressor.compress(text.encode("utf-8"))) for _, text in dataset.documents(split))
    return size + len(compressor.flush())
