"""Does a batch that grows pay, or attention that ends at documents? The cpu preset with one change, seed by seed.

`python -m scripts.check_schedules [--results FILE] [--workers 2]`: the preset with 300 steps of 4,096 tokens, 3 seeds,
val bpb on 524,288 held-out tokens, processes of one thread each. Every way sees the same 1,228,800 tokens in the same
order. A growing batch is 2,048 tokens for the first half of them and 4,096 for the rest, or 2,048, 4,096 and 8,192 for
a third each (arXiv 1711.00489, 2505.23971); rates and decay follow the tokens seen, and rates are times the root of
batch / 4,096. "always 2,048" tells a growing batch from a small one. A run that is in the results file is not repeated.
"""

import argparse
import os
import statistics
import sys
from pathlib import Path

import torch

from nanochat import schedule
from nanochat.dataloader import DataLoader
from nanochat.runtime import run_script
from nanochat.settings import PRESETS
from scripts import base_train as training
from scripts.experiments import base_train, paired, run_missing

STEPS, BATCH, UNIT = 300, 4096, 2048  # UNIT: tokens that the loader hands out at once
CONSTANT = "as the preset"
# (parts of all tokens, tokens a step) one after the other, or settings
WAYS: dict[str, list[tuple[float, int]] | dict] = {
    CONSTANT: {},
    "always 2,048": [(1.0, 2048)],
    "2,048, then 4,096": [(0.5, 2048), (0.5, 4096)],
    "2,048, 4,096, 8,192": [(1 / 3, 2048), (1 / 3, 4096), (1 / 3, 8192)],
    "document_mask": dict(document_mask=True),
}
SEEDS = (1, 2, 3)


def batches(stages: list[tuple[float, int]]) -> list[int]:
    """Tokens of each step: STEPS * BATCH together, as nearly as whole steps allow, and never more."""
    return [size for part, size in stages for _ in range(int(part * STEPS * BATCH / size + 1e-9))]


def grow(sizes: list[int]) -> None:
    """Let base_train in this process take so many tokens at each step, of the units that the loader hands out."""
    hand_out, rate, decay = DataLoader.next, schedule.lr_multiplier, schedule.weight_decay
    asked = iter(sizes)

    def next_batch(self):
        parts = [hand_out(self) for _ in range(next(asked) // UNIT)]
        return tuple(torch.cat(halves) for halves in zip(*parts, strict=True))

    def seen(step: int) -> float:
        """The step of a constant batch at which as many tokens were seen."""
        return sum(sizes[:step]) / sum(sizes) * len(sizes)

    DataLoader.next = next_batch
    schedule.lr_multiplier = lambda s, step, n: rate(s, seen(step), n) * (sizes[step] / BATCH) ** 0.5
    schedule.weight_decay = lambda s, step, n: decay(s, seen(step), n)


def runs() -> dict[str, dict]:
    """Settings of each run by key; "way" is for train()."""
    shape = dict(
        PRESETS["cpu"], num_iterations=STEPS, eval_every=None, save_every=None, eval_tokens=524_288,
        device_batch_size=UNIT // PRESETS["cpu"]["max_seq_len"],
    )  # fmt: skip
    return {f"{way}/{seed}": {**shape, "seed": seed, "way": way} for seed in SEEDS for way in WAYS}


def train(key: str, settings: dict) -> dict:
    """One run; returns its line for the results file."""
    way = WAYS[settings["way"]]
    flags, module = {name: value for name, value in settings.items() if name != "way"}, None
    if isinstance(way, dict):
        flags |= way
    else:
        flags |= dict(total_batch_size=UNIT, num_iterations=len(batches(way)), grow=settings["way"])
        module = "scripts.check_schedules"  # base_train, told what `grow` says
    lines = base_train(f"schedule-{key}", flags, module=module)
    return dict(key=key, settings=settings, val_bpb=lines[-1]["val_bpb"], seconds=lines[-1]["train_seconds"])


def report(lines: dict[str, dict]) -> list[str]:
    """The table, over the seeds that a way and the preset have in common."""
    out = [f"| way | val bpb by seed | minus {CONSTANT}, paired, 95% | time, of {CONSTANT} | n |", "| --- " * 5 + "|"]
    for way in WAYS:
        seeds = [seed for seed in SEEDS if {f"{way}/{seed}", f"{CONSTANT}/{seed}"} <= set(lines)]
        if seeds:
            pairs = [(lines[f"{way}/{seed}"], lines[f"{CONSTANT}/{seed}"]) for seed in seeds]
            difference, time = "", ""
            if way != CONSTANT:
                time = f"{statistics.median(a['seconds'] / b['seconds'] for a, b in pairs):.3f}"
                if len(seeds) > 1:
                    difference = "{:+.4f} +- {:.4f}".format(*paired([a["val_bpb"] - b["val_bpb"] for a, b in pairs]))
            shown = ", ".join(f"{a['val_bpb']:.4f}" for a, _ in pairs)
            out.append(f"| {way} | {shown} | {difference} | {time} | {len(seeds)} |")
    return out


def main(argv: list[str] | None = None) -> dict[str, dict]:
    """Do the runs that are missing and print the table; returns the result lines by key."""
    parser = argparse.ArgumentParser(prog="scripts.check_schedules", description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=Path("dev/schedules.jsonl"))
    parser.add_argument("--workers", type=int, default=max(1, os.cpu_count() or 1))
    arguments = parser.parse_args(argv)
    lines = run_missing(runs(), arguments.results, arguments.workers, train, "val_bpb")
    print("\n".join(report(lines)))
    return lines


def start(argv: list[str]) -> dict:
    """main(), or with --grow=WAY among base_train's own arguments a run whose batch grows."""
    grown = [flag for flag in argv if flag.startswith("--grow=")]
    if not grown:
        return main(argv)
    grow(batches(WAYS[grown[0].removeprefix("--grow=")]))
    return training.main([flag for flag in argv if flag not in grown])


if __name__ == "__main__":
    run_script(lambda: start(sys.argv[1:]))
