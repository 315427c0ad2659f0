"""What the wizard predicts, against what a run then takes: time of a step and memory, for 12 configurations.

`python -m scripts.bench predictions [--seconds 4] [--dtype float32]`: prediction and steps alternate in a process for
each configuration. Memory is that of scripts.base_train: on a GPU what torch allocates there, else the resident set
above what the imports take, which is taken off the prediction too.
"""

import argparse
import contextlib
import io
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile

import torch

from nanochat.config.config_file import as_dict
from nanochat.config.settings import Settings
from nanochat.training.estimate import MEASURE_SECONDS, estimate, find_hardware, measure
from scripts import base_train
from scripts.bench.memory import resident_bytes
from scripts.bench.timing import settled, table
from scripts.bench.train import Contender

BASE = dict(
    data="stdlib",
    vocab_size=4096,
    depth=4,
    model_dim=128,
    head_dim=64,
    max_seq_len=256,
    tie_weights=True,
    device_batch_size=8,
    total_batch_size=2048,
)
MODERN = dict(value_embeddings=True, smear=True, residual_scalars=True, window_pattern="S", short_window=64)
CONFIGURATIONS: dict[str, dict] = {
    "base": {},
    "depth 2": dict(depth=2),
    "depth 8": dict(depth=8),
    "width 256": dict(model_dim=256),
    "width 512": dict(model_dim=512, total_batch_size=1024, device_batch_size=4),
    "context 64": dict(max_seq_len=64, device_batch_size=32),
    "context 1024": dict(max_seq_len=1024, device_batch_size=2),
    "vocabulary 1024": dict(vocab_size=1024),
    "vocabulary 16384": dict(vocab_size=16384),
    "untied, two micro-batches": dict(tie_weights=False, device_batch_size=4),
    "large batch": dict(total_batch_size=8192, device_batch_size=16),
    "modern, bigrams": dict(MODERN, bigram_rows=16384),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seconds", type=float, default=MEASURE_SECONDS, help="that each of the wizard's probes takes")
    parser.add_argument("--only", help="one of the configurations")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the activations; None: as training would")


def run(args: argparse.Namespace) -> dict:
    """Print the table; returns {configuration: {"seconds": [measured, predicted], "bytes": [measured, predicted]}}."""
    results: dict[str, dict] = {}
    sizes = set()
    with tempfile.TemporaryDirectory(prefix="predictions-") as base:
        for name in [args.only] if args.only else CONFIGURATIONS:
            results[name] = in_a_process(name, "seconds", args, base)
            vocab_size = results[name]["settings"]["vocab_size"]
            if vocab_size not in sizes:  # training its tokenizer takes memory too, once
                in_a_process(name, "bytes", args, base)
                sizes.add(vocab_size)
            results[name] |= in_a_process(name, "bytes", args, base)
    rows = []
    for name, found in results.items():
        (taken, told), (held, wanted) = found["seconds"], map(float, found["bytes"])
        held = held or math.nan  # a process that was larger before
        rows.append((name, 1e3 * taken, 1e3 * told, told / taken, held / 2**20, wanted / 2**20, wanted / held))
    print(table(("configuration", "ms a step", "predicted", "ratio", "MiB", "predicted", "ratio"), rows))
    return results


def in_a_process(name: str, what: str, args: argparse.Namespace, base: str) -> dict:
    """MEASURES[what] of a configuration, with its own base directory."""
    command = [sys.executable, "-m", "scripts.bench.predictions", what, name, args.dtype or ""]
    done = subprocess.run(
        [*command, str(args.seconds), str(args.rounds)],
        env={**os.environ, "NANOCHAT_BASE_DIR": base},
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def settings_of(name: str, dtype: str) -> Settings:
    return Settings(**{**BASE, **CONFIGURATIONS[name], "dtype": dtype or None})


def step_seconds(settings: Settings, seconds: float, rounds: int) -> dict:
    """Seconds of a step, measured and predicted in turn."""
    hardware, contender = find_hardware(), Contender(settings)
    contender.step()
    predicted, taken = [], []
    for _ in range(max(2, min(rounds, 5))):
        probe = estimate(settings, hardware, measure(settings, hardware, seconds))
        predicted.append(probe.seconds / probe.steps)
        start = settled()
        for _ in range(3):
            contender.step()
        taken.append((settled() - start) / 3)
    return dict(
        settings=as_dict(settings),
        threads=os.environ.get("OMP_NUM_THREADS"),
        seconds=[statistics.median(taken), statistics.median(predicted)],
    )


def run_bytes(settings: Settings, *_) -> dict:
    """Memory of a run of four steps, measured and predicted."""
    before, hardware = resident_bytes("VmRSS") or 0, find_hardware()
    changes = dict(
        model_tag="predictions", overwrite=True, num_iterations=4, eval_every=None, sample_every=None, save_every=None
    )
    flags = {**as_dict(settings), **changes, "eval_tokens": settings.total_batch_size}
    with contextlib.redirect_stdout(io.StringIO()):
        base_train.main([f"--{key}={value}" for key, value in flags.items()])
    predicted = estimate(settings, hardware).peak_memory
    if hardware.device_type == "cuda":
        return dict(bytes=[torch.cuda.max_memory_allocated(), predicted])
    return dict(bytes=[(resident_bytes("VmHWM") or 0) - before, predicted - before])


MEASURES = {"seconds": step_seconds, "bytes": run_bytes}

if __name__ == "__main__":
    what, name, dtype, seconds, rounds = sys.argv[1:]
    print(json.dumps(MEASURES[what](settings_of(name, dtype), float(seconds), int(rounds)), default=str))
