"""Does a batch that grows pay, or attention that ends at documents? The cpu preset with one change, seed by seed.

`python -m scripts.experiments.schedules [--results FILE] [--workers 2]`: the preset's model and rates, 1,228,800 tokens
(300 steps of 4,096), 3 seeds, val bpb on 524,288 held-out tokens, processes of one thread each. Every way sees the same
tokens in the same order. "always" tells a growing batch from a small one: its rates are times the root of its part of
4,096, as --batch_start has them (Muon's momentum warms up by steps in all). A run that is in the results file is not
repeated.
"""

import argparse
import os
from pathlib import Path

from nanochat.config.presets import PRESETS
from nanochat.config.settings import FIELDS, preset
from nanochat.runtime import run_script
from scripts.experiments.common import against, base_train, run_missing

TOKENS = 300 * 4096
CONSTANT = "as the preset"
RATES = [name for name in FIELDS if name.endswith("_lr") and not preset("cpu").inert(name)]


def always(batch: int) -> dict:
    """A constant batch of so many tokens."""
    rates = {name: getattr(preset("cpu"), name) * (batch / 4096) ** 0.5 for name in RATES}
    return dict(total_batch_size=batch, num_iterations=TOKENS // batch, **rates)


WAYS = {
    CONSTANT: {},
    "always 2,048": always(2048),
    "2,048, then 4,096": dict(batch_start=2048, num_iterations=450),
    "1,024, 2,048, 4,096": dict(batch_start=1024, num_iterations=700),
    "document_mask": dict(document_mask=True),
}
SEEDS = (1, 2, 3)


def runs() -> dict[str, dict]:
    """Settings of each run by key. Micro-batches have 4 rows, 2 where the batch begins with them."""
    shape = dict(PRESETS["cpu"], num_iterations=300, eval_every=None, save_every=None, eval_tokens=524_288)
    return {
        f"{way}/{seed}": {**shape, "device_batch_size": 4, **changes, "seed": seed}
        for seed in SEEDS
        for way, changes in WAYS.items()
    }


def train(key: str, settings: dict) -> dict:
    """One run; returns its line for the results file."""
    lines = base_train(f"schedule-{key}", settings)
    return dict(key=key, settings=settings, val_bpb=lines[-1]["val_bpb"], seconds=lines[-1]["train_seconds"])


def main(argv: list[str] | None = None) -> dict[str, dict]:
    """Do the runs that are missing and print the table; returns the result lines by key."""
    parser = argparse.ArgumentParser(prog="scripts.experiments.schedules", description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=Path("dev/schedules.jsonl"))
    parser.add_argument("--workers", type=int, default=max(1, os.cpu_count() or 1))
    arguments = parser.parse_args(argv)
    lines = run_missing(runs(), arguments.results, arguments.workers, train, "val_bpb")
    print("\n".join(against(CONSTANT, WAYS, SEEDS, lines, "way", "{way}/{seed}", times=True)))
    return lines


if __name__ == "__main__":
    run_script(main)
