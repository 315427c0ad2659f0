"""Bits per byte of a model on a token stream, and what a compressor needs for the same bytes.

Bits per byte (bpb) does not depend on the tokenizer: nats over the bytes that the scored tokens stand for.
"""

import json
import logging
import lzma
import math
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import numpy as np
import torch
import torch.distributed as dist

from nanochat.data.packing import inputs_and_targets
from nanochat.files import write_atomically
from nanochat.modality import IGNORED
from nanochat.system.environment import UserError
from nanochat.training.stop_signals import CutShort

logger = logging.getLogger(__name__)

LARGEST_COMPRESSED = 200_000_000  # bytes; xz -9e takes about a second for each megabyte


def never() -> bool:
    return False


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
    stop: Callable[[], bool] = never,
) -> dict:
    """Score one stream (BOS + document, BOS + document, ...) so that every byte counts exactly once.

    model: called as model(idx, targets, loss_reduction="none") with int64 [rows, seq_len] on model.device; gives nats.
    stream: integer array [N]; its first token is only context (a BOS). Windows of seq_len inputs lie side by side
    (stride seq_len); the last one is padded with ignored targets. Tokens of 0 bytes (specials) are not scored.
    token_bytes: bytes of each id [V]. rows: windows in one forward. max_tokens: score at most so many targets from
    the start. Ranks take windows round-robin; each gets the sums over all of them, added in float64.
    Returns bpb, nats, bytes, tokens (scored ones). UserError when there is not one byte to score.
    stop: asked before every forward; when it says yes on any rank, CutShort is raised on all.
    """
    targets = max(0, len(stream) - 1)
    targets = targets if max_tokens is None else min(targets, max_tokens)
    windows = range(rank, math.ceil(targets / seq_len), world_size)
    byte_table = np.asarray(token_bytes, dtype=np.int64)
    nats, num_bytes, num_tokens = 0.0, 0, 0
    was_training = model.training
    model.eval()
    for first in range(0, len(windows), rows):
        if stop():
            break
        inputs = np.full((rows, seq_len), int(stream[0]), dtype=np.int64)
        labels = np.full((rows, seq_len), IGNORED, dtype=np.int64)  # one shape always: a compiled model compiles once
        for row, window in enumerate(windows[first : first + rows]):
            start = window * seq_len
            end = min(start + seq_len, targets)
            inputs[row, : end - start] = stream[start:end]
            labels[row, : end - start] = stream[start + 1 : end + 1]
        lengths = np.where(labels >= 0, byte_table[labels.clip(min=0)], 0)
        labels[lengths == 0] = IGNORED
        device = model.device
        loss = model(torch.from_numpy(inputs).to(device), torch.from_numpy(labels).to(device), loss_reduction="none")
        nats += loss.cpu().double().sum().item()  # on the CPU: mps has no float64
        num_bytes += int(lengths.sum())
        num_tokens += int((lengths > 0).sum())
    model.train(was_training)
    nats, num_bytes, num_tokens = sum_over_ranks([nats, num_bytes, num_tokens], model.device, world_size, stop())
    if num_bytes == 0:
        raise UserError(f"nothing to score: {len(stream)} tokens hold no byte of text")
    return dict(bpb=nats / (math.log(2) * num_bytes), nats=nats, bytes=int(num_bytes), tokens=int(num_tokens))


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
    stop: Callable[[], bool] = never,
) -> dict:
    """Score captioned sounds, row by row: bpb, bytes and tokens of all text, losses {modality: {"nats", "tokens"}}.

    packed: nanochat.data.packing.Rows, in their order, so that each sound has its caption before it. nats: the mean
    of a target of that modality, its `end` included. The rest as in bits_per_byte; max_tokens counts positions.
    """
    device, names = model.device, packed.store.vocabulary.names
    seq_len = packed.capacity - 1
    total = len(packed) if max_tokens is None else min(len(packed), -(-max_tokens // seq_len))
    mine = range(rank, total, world_size)
    byte_table = np.zeros(packed.store.vocabulary.size, np.int64)
    byte_table[: len(token_bytes)] = token_bytes
    of_id = packed.store.vocabulary.table(by_expert=False).numpy()
    nats, tokens = np.zeros((2, len(names)))
    text_nats = num_bytes = num_tokens = 0
    was_training = model.training
    model.eval()
    for first in range(0, len(mine), rows):
        if stop():
            break
        ids = np.full((rows, packed.capacity), -1, dtype=np.int64)
        for place, row in enumerate(mine[first : first + rows]):
            packed.read(row, ids[place])
        inputs, targets = inputs_and_targets(ids, packed.store)
        loss = model(torch.from_numpy(inputs).to(device), torch.from_numpy(targets).to(device), loss_reduction="none")
        loss, valid = loss.cpu().double().numpy(), targets >= 0
        modality, lengths = of_id[targets[valid]], byte_table[targets[valid]]
        nats += np.bincount(modality, loss[valid], len(names))
        tokens += np.bincount(modality, minlength=len(names))
        text_nats += loss[valid][lengths > 0].sum()
        num_bytes += lengths.sum()
        num_tokens += (lengths > 0).sum()
    model.train(was_training)
    sums = sum_over_ranks([*nats, *tokens, text_nats, num_bytes, num_tokens], device, world_size, stop())
    *both, text_nats, num_bytes, num_tokens = sums
    if num_bytes == 0:
        raise UserError("nothing to score: the rows hold no byte of text")
    pairs = zip(names, both[: len(names)], both[len(names) :], strict=True)
    losses = {name: dict(nats=total / count, tokens=int(count)) for name, total, count in pairs if count}
    bpb = text_nats / (math.log(2) * num_bytes)
    return dict(bpb=bpb, nats=text_nats, bytes=int(num_bytes), tokens=int(num_tokens), losses=losses)


def sum_over_ranks(values: Iterable[float], device, world_size: int, cut: bool = False) -> list[float]:
    """Element-wise float64 sums over all ranks; the values themselves for one rank. CutShort when any rank is cut."""
    total = torch.tensor([float(cut), *values], dtype=torch.float64)
    if world_size > 1:
        total = total.to(device)
        dist.all_reduce(total)
    cuts, *sums = total.tolist()
    if cuts:
        raise CutShort
    return sums


# ---------------------------------------------------------------------------------------------------------------------
# what a compressor makes of the same bytes


def compressor_baselines(dataset) -> dict[str, float | None]:
    """Bits per byte of `xz -9e` on the held-out documents in path order, alone and primed with the training split.

    primed: len(xz(train + val)) - len(xz(train)). Splits of more than 200 MB are not compressed: None, and said.
    xz looks back 64 MB, so a larger training split primes only with its end. Kept beside the dataset by fingerprint.
    """
    cache = dataset.directory / "compressors.json"
    fingerprint = dataset.fingerprint["sha256"]
    with suppress(OSError, ValueError, KeyError):  # absent, damaged or of another fingerprint: compute it
        kept = json.loads(cache.read_text(encoding="utf-8"))
        if kept["fingerprint"] == fingerprint:
            return {name: kept[name] for name in ("xz", "xz_primed")}
    held_out = dataset.text_bytes("val")
    result: dict[str, float | None] = {"xz": None, "xz_primed": None}
    jobs = {}
    with ThreadPoolExecutor(2) as pool:  # liblzma works outside the interpreter lock, in up to 0.7 GB each
        if 0 < held_out <= LARGEST_COMPRESSED:
            jobs["val"] = pool.submit(xz_size, dataset, "val")
            if dataset.text_bytes("train") <= LARGEST_COMPRESSED:
                jobs["both"] = pool.submit(xz_size, dataset, "train", "val")
                jobs["train"] = pool.submit(xz_size, dataset, "train")
    sizes = {name: job.result() for name, job in jobs.items()}
    if "val" in sizes:
        result["xz"] = 8 * sizes["val"] / held_out
    if "both" in sizes:
        result["xz_primed"] = 8 * (sizes["both"] - sizes["train"]) / held_out
    if absent := [name for name, value in result.items() if value is None]:
        limit = f"{LARGEST_COMPRESSED // 10**6} MB"
        logger.info(f"compressor baseline not computed ({', '.join(absent)}): the text is empty or more than {limit}")
    try:
        write_atomically(cache, json.dumps({"fingerprint": fingerprint, **result}))
    except OSError as error:  # they save the next evaluation a minute; this one has them
        logger.info(f"compressor baselines are not kept for the next evaluation ({error.strerror}: {cache})")
    return result


def xz_size(dataset, *splits: str) -> int:
    """Bytes of the .xz file (preset 9e) over the documents of the splits, one after the other."""
    compressor = lzma.LZMACompressor(preset=9 | lzma.PRESET_EXTREME)
    size = 0
    for split in splits:
        size += sum(len(compressor.compress(text.encode("utf-8"))) for _, text in dataset.documents(split))
    return size + len(compressor.flush())
