"""Does attention that ends at documents pay? The cpu preset with one change, seed by seed.

`python -m scripts.experiments.schedules [--results FILE] [--workers 2]`: the preset's model and rates, 1,228,800 tokens
(300 steps of 4,096), 3 seeds, val bpb on 524,288 held-out tokens, processes of one thread each. Every way sees the same
tokens in the same order. A run that is in the results file is not repeated. Batches that grow were compared here until
version 0.1.0: nothing gained (dev/LOG.md).
"""

import argparse
import os
from pathlib import Path

from nanochat.config.presets import PRESETS
from nanochat.runtime import run_script
from scripts.experiments.common import against, base_train, run_missing

CONSTANT = "as the preset"
WAYS = {CONSTANT: {}, "document_mask": dict(document_mask=True)}
SEEDS = (1, 2, 3)


def runs() -> dict[str, dict]:
    """Settings of each run by key. Micro-batches have 4 rows."""
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
