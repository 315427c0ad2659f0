"""Do the newer features of the family pay? Classic, each feature alone, and together, at equal tokens and equal time.

`python -m scripts.experiments.features [--stage seeds|time|goal|report] [--results FILE] [--workers 2]` trains small
models (depth 4, width 128, tied weights) on the standard library, one process with one thread each, all at the same
rates and 400 steps of 2,048 tokens. A run that is in the results file is not repeated.

seeds: 3 seeds of every variant, and classic for 60 steps more: between its two ends lies what classic reaches in the
time that a feature costs.  time: what a step of each variant costs, alternating in one process (run it on a quiet
machine).  goal: depth 4, width 256, context 512, 300 steps of 8,192 tokens, where nanochat's recipe reaches 1.405.
report: val bpb minus classic's, paired by seed, with 95% intervals, at equal tokens and at equal time.
"""

import argparse
import json
import os
from pathlib import Path

from nanochat.runtime import run_script
from scripts.bench import __main__ as bench
from scripts.experiments.common import base_train, paired, read, run_missing

SHAPE = dict(
    data="stdlib",
    vocab_size=2048,
    depth=4,
    model_dim=128,
    head_dim=32,
    max_seq_len=256,
    tie_weights=True,
    total_batch_size=2048,
    device_batch_size=8,
    eval_tokens=262_144,
    eval_every=None,
    sample_every=None,
)
FEATURES = {
    "rope_base 1e5": dict(rope_base=100_000.0),
    "qk_scale 1.2": dict(qk_scale=1.2),
    "softcap 20": dict(softcap=20.0),
    "value embeddings": dict(value_embeddings=True),
    "smear": dict(smear=True),
    "residual scalars": dict(residual_scalars=True),
    "backout": dict(backout=True),
    "windows SSSL, 64": dict(window_pattern="SSSL", short_window=64),
}
APART = ("softcap 20", "windows SSSL, 64")  # nanochat went back on the first; windows save time in long contexts
MODERN = {k: v for name, changes in FEATURES.items() if name not in APART for k, v in changes.items()}
VARIANTS = {"classic": {}, **FEATURES, "modern": MODERN, "modern, windows": MODERN | FEATURES["windows SSSL, 64"]}
STEPS, LONGER = 400, 460
SEEDS = (1, 2, 3)
GOAL = dict(
    vocab_size=4096,
    model_dim=256,
    head_dim=64,
    max_seq_len=512,
    total_batch_size=8192,
    eval_tokens=None,
    num_iterations=300,
)


def train(key: str, settings: dict) -> dict:
    """One run; returns its line for the results file."""
    lines = base_train(f"features-{key}", {**SHAPE, **settings})
    return dict(
        key=key,
        settings=settings,
        val_bpb=lines[-1]["val_bpb"],
        seconds=lines[-1]["train_seconds"],
        parameters=lines[0]["parameters"],
    )


def seed_runs() -> dict[str, dict]:
    runs = {
        f"seeds/{name}/{seed}": {**changes, "num_iterations": STEPS, "seed": seed}
        for seed in SEEDS
        for name, changes in VARIANTS.items()
    }
    return runs | {f"seeds/longer/{seed}": {"num_iterations": LONGER, "seed": seed} for seed in SEEDS}


def goal_runs() -> dict[str, dict]:
    return {
        f"goal/{name}/{seed}": {**GOAL, **VARIANTS[name], "seed": seed}
        for name in ("modern, windows", "classic")
        for seed in SEEDS
    }


def measure_time(results: Path, rounds: int) -> None:
    """Add a line with the time of a step over classic's for every variant; the control is classic once more."""
    shape = ",".join(f"{name}={value}" for name, value in SHAPE.items())
    flags = []
    for name, changes in VARIANTS.items():
        flags += ["--variant", f"{name}:{shape}" + "".join(f",{k}={v}" for k, v in changes.items())]
    measured = bench.main(["train", "--preset=cpu", f"--rounds={rounds}", *flags])["train"]["contenders"]
    with open(results, "a", encoding="utf-8") as file:
        for name, found in measured.items():
            file.write(json.dumps(dict(key=f"time/{name}", ratio=found["ratio"], rounds=rounds)) + "\n")


def at_equal_time(short: float, longer: float, ratio: float) -> float:
    """What classic reaches in `ratio` times its time: between (or beyond) its ends after STEPS and LONGER steps."""
    return short + (longer - short) * (ratio - 1) * STEPS / (LONGER - STEPS)


def report(lines: dict[str, dict]) -> list[str]:
    """Markdown tables of the stages that have results."""
    out = []
    runs = {name: [lines.get(f"seeds/{name}/{seed}") for seed in SEEDS] for name in (*VARIANTS, "longer")}
    if all(run for found in runs.values() for run in found):
        bpb = {name: [run["val_bpb"] for run in found] for name, found in runs.items()}
        out += [
            "| variant | parameters | val bpb by seed | minus classic, paired, 95% (n=3) | time | at equal time |",
            "| --- " * 6 + "|",
        ]
        for name, found in bpb.items():
            cells = ["", "", ""]
            if name not in ("classic", "longer"):
                cells[0] = "{:+.4f} +- {:.4f}".format(
                    *paired([a - b for a, b in zip(found, bpb["classic"], strict=True)])
                )
                if timed := lines.get(f"time/{name}"):
                    ends = zip(bpb["classic"], bpb["longer"], strict=True)
                    rival = [at_equal_time(*pair, timed["ratio"]) for pair in ends]
                    differences = [a - b for a, b in zip(found, rival, strict=True)]
                    cells[1:] = f"{timed['ratio']:.3f}", "{:+.4f} +- {:.4f}".format(*paired(differences))
            count = runs[name][0]["parameters"]
            label = f"classic, {LONGER} steps" if name == "longer" else name
            out.append(f"| {label} | {count:,} | {', '.join(f'{x:.4f}' for x in found)} | {' | '.join(cells)} |")
        if control := lines.get("time/control"):
            out += ["", f"time: control {control['ratio']:.3f}, {control['rounds']} rounds"]
    for name in ("modern, windows", "classic"):
        found = [lines[f"goal/{name}/{s}"] for s in SEEDS if f"goal/{name}/{s}" in lines]
        if found:
            out += ["", f"goal, {name}: val bpb {', '.join('{:.4f}'.format(run['val_bpb']) for run in found)}"]
    return out


def main(argv: list[str] | None = None) -> dict[str, dict]:
    """Run a stage and print the report; returns the result lines by key."""
    parser = argparse.ArgumentParser(prog="scripts.experiments.features", description=__doc__.splitlines()[0])
    parser.add_argument("--stage", choices=("seeds", "time", "goal", "report"), default="report")
    parser.add_argument("--results", type=Path, default=Path("dev/features.jsonl"))
    parser.add_argument("--workers", type=int, default=max(1, os.cpu_count() or 1))
    parser.add_argument("--rounds", type=int, default=15, help="of the stage time")
    arguments = parser.parse_args(argv)
    if arguments.stage == "time":
        measure_time(arguments.results, arguments.rounds)
    if arguments.stage in ("seeds", "goal"):
        runs = seed_runs() if arguments.stage == "seeds" else goal_runs()
        run_missing(runs, arguments.results, arguments.workers, train, "val_bpb")
    lines = read(arguments.results)
    print("\n".join(report(lines)))
    return lines


if __name__ == "__main__":
    run_script(main)
