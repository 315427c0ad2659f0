"""Does the fast path learn as well as the plain one? The default (fast kernels, bfloat16 where the CPU has it) against
the plain path in float32, seed by seed.

`python -m scripts.experiments.quality [--tokens 8192] [--ways NAMES] [--results FILE] [--workers 2]`: depth 4, width
256, context 512, vocabulary 8192 on the `packages` corpus, 600 steps of --tokens, 5 seeds, val bpb on 524,288 held-out
tokens as the run itself measures it, in its own dtype; processes of one thread each. plain: full logits, torch's
attention, float32, compiled whole (scripts/bench/plain.py). "fast float32", on request, tells the kernels' part from
bfloat16's. A run that is in the results file is not repeated, so the script continues where it stopped. Prints
differences of the seeds with their 95% interval (Student's t).
"""

import argparse
import math
import os
from pathlib import Path

from nanochat.runtime import pick_dtype, run_script
from nanochat.system.environment import UserError
from scripts.bench.train import SHAPE
from scripts.experiments.common import against, base_train, run_missing

STEPS = 600
SEEDS = (1, 2, 3, 4, 5)
PLAIN = "plain float32"
WAYS = {
    PLAIN: dict(module="scripts.bench.plain", dtype="float32"),
    "fast float32": dict(dtype="float32"),
    "fast bfloat16": dict(dtype="bfloat16"),
}


def runs(tokens: int, ways: list[str]) -> dict[str, dict]:
    """Settings of each run by key, and under "module" what to run where that is not base_train."""
    if unknown := [way for way in ways if way not in WAYS]:
        raise UserError(f"--ways: {unknown[0]!r} is not one of {', '.join(WAYS)}")
    if tokens < 1 or tokens % SHAPE["max_seq_len"]:
        raise UserError(f"--tokens {tokens} is not a multiple of the context of {SHAPE['max_seq_len']}")
    rows = math.gcd(SHAPE["device_batch_size"], tokens // SHAPE["max_seq_len"])
    shape = dict(
        SHAPE,
        data="packages",
        total_batch_size=tokens,
        num_iterations=STEPS,
        device_batch_size=rows,
        eval_tokens=524_288,
        eval_every=None,
        sample_every=None,
    )
    return {f"{tokens}/{way}/{seed}": {**shape, **WAYS[way], "seed": seed} for seed in SEEDS for way in ways}


def train(key: str, settings: dict) -> dict:
    """One run; returns its line for the results file."""
    flags = {name: value for name, value in settings.items() if name != "module"}
    lines = base_train(f"quality-{key}", flags, module=settings.get("module"))
    return dict(key=key, settings=settings, val_bpb=lines[-1]["val_bpb"], seconds=lines[-1]["train_seconds"])


def report(lines: dict[str, dict], tokens: int) -> list[str]:
    title = f"{STEPS} steps of {tokens:,} tokens"
    return against(PLAIN, WAYS, SEEDS, lines, title, f"{tokens}/{{way}}/{{seed}}")


def main(argv: list[str] | None = None) -> dict[str, dict]:
    """Do the runs that are missing and print the table; returns the result lines by key."""
    parser = argparse.ArgumentParser(prog="scripts.experiments.quality", description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=SHAPE["total_batch_size"], help="a step")
    default = f"fast {str(pick_dtype(None, 'cpu')).removeprefix('torch.')}"
    parser.add_argument("--ways", default=f"{PLAIN},{default}", help=f"comma-separated, of {', '.join(WAYS)}")
    parser.add_argument("--results", type=Path, default=Path("dev/quality.jsonl"))
    parser.add_argument("--workers", type=int, default=max(1, os.cpu_count() or 1))
    arguments = parser.parse_args(argv)
    print(f"the default of this machine is {default}", flush=True)
    wanted = runs(arguments.tokens, arguments.ways.split(","))
    lines = run_missing(wanted, arguments.results, arguments.workers, train, "val_bpb")
    print("\n".join(report(lines, arguments.tokens)))
    return lines


if __name__ == "__main__":
    run_script(main)
