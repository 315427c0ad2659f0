"""What feeds the step: tokens/s of the loader and of tokenisation, and the tokens that packing loses.

`python -m scripts.bench load [--data stdlib] [--seq_len 2048] [--batch_tokens 524288]`: the loader reads made-up
documents of two shards, tokenisation and packing take the documents of --data.
"""

import argparse
import os
from bisect import bisect_right, insort
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path

import numpy as np

from nanochat.config.settings import preset
from nanochat.data.dataloader import DataLoader
from nanochat.data_pipeline import prepare_data
from scripts.bench.timing import alternate, matmul_peak, summary, table

NEEDED = 1_000_000  # tokens/s that a node with 8 GPUs may take
LOADS = 8  # batches that are taken in a row: the first was made while others had their turn, and does not count
BUFFER = 1000  # documents among which nanochat's loader looks for the one that fits best


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", default="stdlib", help="source of the documents; climbmix and files as in training")
    parser.add_argument("--seq_len", type=int, default=2048)
    parser.add_argument("--batch_tokens", type=int, default=524_288, help="of a step")
    parser.add_argument("--characters", type=int, default=5_000_000, help="of the documents that are taken")


def run(args: argparse.Namespace) -> dict:
    """Print the tables; returns contenders (seconds, tok_per_sec), peak_flops and {"wasted": {packing: share}}."""
    settings = preset("cpu", data=args.data)
    dataset, tokenizer = prepare_data(settings, args.compute)
    texts = list(up_to((text for _, text in dataset.documents("train")), args.characters))
    lengths = [len(ids) + 1 for ids in tokenizer.encode_batch(texts)]  # with BOS
    loader = DataLoader(MadeUpStore(lengths), args.batch_tokens // args.seq_len, args.seq_len, seed=0)
    threads = sorted({1, os.cpu_count() or 1})
    contenders: dict[str, Callable[[], object]] = {"loader": lambda: [loader.next() for _ in range(LOADS)]}
    contenders |= {
        f"tokenising, {n} thread{'s' * (n > 1)}": lambda n=n: tokenizer.encode_batch(texts, n) for n in threads
    }
    peaks: list[float] = []
    device, dtype = args.compute.device, args.compute.dtype
    times = alternate(contenders, args.rounds, between=lambda: peaks.append(matmul_peak(device, dtype)))
    found = summary(times, "loader")
    rows = []
    for name, one in found.items():
        tokens = (LOADS - 1) * loader.rows * loader.seq_len if name == "loader" else sum(lengths)
        one.update(tok_per_sec=tokens / one["seconds"], dtype=str(dtype).removeprefix("torch."))
        rows.append((name, one["tok_per_sec"], one["tok_per_sec"] / NEEDED))
    print(table(("what", "tok/s", f"of {NEEDED:,}"), rows))
    print(f"one thread tokenises; a node of {os.cpu_count()} threads does it ahead of the step, once for all runs")
    row = args.seq_len + 1
    wasted = {"our stream": stream_waste(lengths, args.seq_len), "best fit, cropped": best_fit_waste(lengths, row)}
    print(f"{len(lengths):,} documents of {sum(lengths) / len(lengths):,.0f} tokens on average, T {args.seq_len}:")
    print(table(("packing", "tokens lost"), [(name, f"{share:.2%}") for name, share in wasted.items()]))
    peak = sorted(peaks)[len(peaks) // 2]
    return dict(contenders=found, peak_flops={str(dtype).removeprefix("torch."): peak}, wasted=wasted)


def up_to(texts: Iterable[str], characters: int) -> Iterable[str]:
    """The first texts that have so many characters together."""
    for text in texts:
        yield text
        characters -= len(text)
        if characters <= 0:
            return


def stream_waste(lengths: list[int], seq_len: int) -> float:
    """Share of the tokens of an epoch that no row of seq_len shows: what is left behind the last row."""
    total = sum(lengths)
    return 1 - (total - 1) // seq_len * seq_len / total if total else 0.0


def best_fit_waste(lengths: Iterable[int], row: int, buffer: int = BUFFER) -> float:
    """Share of the tokens read that rows of `row` tokens lose when every row begins with a document, as in nanochat.

    From a buffer of documents a row takes the longest one that still fits; when none does, the shortest one, cropped
    to what is missing. Rows that the end leaves incomplete do not count.
    """
    source = iter(lengths)
    waiting = sorted(islice(source, buffer))
    lost = shown = 0
    while waiting:
        missing, lost_here = row, 0
        while missing and waiting:
            place = bisect_right(waiting, missing) - 1
            length = waiting.pop(max(place, 0))
            if place < 0:
                lost_here += length - missing
            missing -= min(length, missing)
            for following in islice(source, 1):
                insort(waiting, following)
        if missing:
            break
        lost, shown = lost + lost_here, shown + row
    return lost / (lost + shown) if shown else 0.0


class MadeUpStore:
    """A store of random ids in memory with documents of the given lengths, which two shards share, repeated until an
    epoch has 8 M tokens."""

    def __init__(self, lengths: list[int], tokens: int = 8_000_000):
        repeats = -(-tokens // (2 * sum(lengths)))
        offsets = np.concatenate([[0], np.cumsum(np.tile(np.array(lengths, dtype=np.int64), repeats))])
        ids = np.random.default_rng(0).integers(0, 4096, offsets[-1], dtype=np.uint16)
        self._shard = ids, offsets
        self.paths = [Path("0"), Path("1")]

    def require(self, shards: Iterable[int]) -> None:
        """All are there."""

    def tokens(self, shard: int) -> int:
        return len(self._shard[0])

    def shard(self, shard: int) -> tuple[np.ndarray, np.ndarray]:
        return self._shard
