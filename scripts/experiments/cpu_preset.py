"""Choose the cpu preset without looking at the held-out split: each trial trains on nine tenths of the training split
and is judged on the last tenth.

`python -m scripts.experiments.cpu_preset [--trial NAME ...] [--results FILE]` appends one JSON line a trial: bits per
byte of that tenth, steps, seconds of training and compilation, peak. Trials that are in the file are not repeated;
without --trial it prints the table.
"""

import argparse
import json
from pathlib import Path

from nanochat.checkpoint_manager import checkpoints_dir
from nanochat.config.config_file import render_config
from nanochat.config.presets import PRESETS
from nanochat.config.settings import FIELDS, Settings
from nanochat.files import write_atomically
from nanochat.runtime import run_script
from nanochat.system.environment import UserError, base_dir
from scripts import base_train
from scripts.experiments.validation_part import training_part

MODERN = dict(value_embeddings=True, smear=True, residual_scalars=True, backout=True, qk_scale=1.2, rope_base=100_000.0)
WINDOWS = dict(window_pattern="S", short_window=64, bigram_rows=16_384)
CLASSIC = {name: FIELDS[name].default for name in (*MODERN, *WINDOWS)}
COMMON = dict(depth=4, model_dim=192, total_batch_size=2048, tied_weights_lr=0.005, matrix_lr=0.02)
SHORT = {
    **COMMON,
    "max_seq_len": 256,
    "device_batch_size": 8,
    "vocab_size": 4096,
    "num_iterations": 1000,
    "warmdown_ratio": 0.4,
}
LONG = {**COMMON, "max_seq_len": 512, "device_batch_size": 4, "warmdown_ratio": 0.7}
# Each is the preset with these changes.
TRIALS: dict[str, dict] = {
    "t256": {**SHORT, **CLASSIC},
    "t256-warmdown": {**SHORT, **CLASSIC, "warmdown_ratio": 0.7},
    "t512": {**LONG, **CLASSIC, "vocab_size": 4096, "num_iterations": 900},
    "t512-v2048": {**LONG, **CLASSIC, "vocab_size": 2048, "num_iterations": 1000},
    "t256-ve-smear": {**SHORT, **CLASSIC, "value_embeddings": True, "smear": True},
    "t256-modern": {**SHORT, **CLASSIC, **MODERN},
    "t256-modern-800": {**SHORT, **CLASSIC, **MODERN, "num_iterations": 800},
    # The second choice: with windows, and as much work as 500 steps of width 192.
    "w192": {**SHORT, **MODERN, **WINDOWS, "bigram_rows": None, "num_iterations": 500},
    "w192-bigrams": {**SHORT, **MODERN, **WINDOWS, "num_iterations": 500},
    "w128": {**SHORT, **MODERN, **WINDOWS, "model_dim": 128, "num_iterations": 1000},
    "w128-d6": {**SHORT, **MODERN, **WINDOWS, "model_dim": 128, "depth": 6, "num_iterations": 720},
    "w128-d8": {**SHORT, **MODERN, **WINDOWS, "model_dim": 128, "depth": 8, "num_iterations": 580},
    "w96": {**SHORT, **MODERN, **WINDOWS, "model_dim": 96, "head_dim": 32, "num_iterations": 1400},
    "w128-1200": {
        **SHORT,
        **MODERN,
        **WINDOWS,
        "model_dim": 128,
        "num_iterations": 1200,
        "backout": False,
        "rope_base": FIELDS["rope_base"].default,
    },
    "t512-w192": {},  # the preset as it is since it has contexts of 512
}


def run_trial(name: str) -> dict:
    """Train one trial and return its line."""
    values = {
        **PRESETS["cpu"],
        **TRIALS[name],
        "data": str(training_part({"data": "stdlib"})),
        "save_every": None,
        "eval_every": 100,
    }
    tag = f"cpu-trial-{name}"
    config = base_dir() / "check_cpu_preset" / f"{name}.py"
    write_atomically(config, render_config(Settings(**values, model_tag=tag, overwrite=True)))
    result = base_train.main([str(config)])
    lines = [json.loads(line) for line in (checkpoints_dir() / tag / "metrics.jsonl").read_text().splitlines()]
    curve = [(line["step"], round(line["val_bpb"], 4)) for line in lines if line.get("event") == "eval"]
    done = lines[-1]
    return dict(
        trial=name,
        changes=TRIALS[name],
        dev_bpb=result["val_bpb"],
        curve=curve,
        steps=result["step"],
        train_seconds=round(result["train_seconds"], 1),
        compile_seconds=round(done["compile_seconds"], 1),
        peak_gflops=round(done["peak_flops"] / 1e9, 1),
    )


def main(argv: list[str] | None = None) -> list[dict]:
    """Run the named trials that are missing, print the table of all."""
    parser = argparse.ArgumentParser(prog="scripts.experiments.cpu_preset", description=__doc__.splitlines()[0])
    parser.add_argument("--trial", action="append", default=[], help=f"one of {', '.join(TRIALS)}; repeatable")
    parser.add_argument("--results", type=Path, default=Path("dev/cpu_preset.jsonl"))
    arguments = parser.parse_args(argv)
    for name in arguments.trial:
        if name not in TRIALS:
            raise UserError(f"unknown trial {name!r}: one of {', '.join(TRIALS)}")
        if name not in {line["trial"] for line in read(arguments.results)}:
            line = run_trial(name)
            with open(arguments.results, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
    for line in read(arguments.results):
        best = min(bpb for _, bpb in line["curve"])
        print(
            f"{line['trial']:24s} bpb {line['dev_bpb']:.4f} (best {best:.4f}) {line['steps']} steps "
            f"{line['train_seconds']:.0f} s + {line['compile_seconds']:.0f} s compile, {line['peak_gflops']} GFLOP/s"
        )
    return read(arguments.results)


def read(results: Path) -> list[dict]:
    return [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()] if results.exists() else []


if __name__ == "__main__":
    run_script(main)
