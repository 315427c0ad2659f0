"""What the wizard predicts, against what a run then takes: time of a step and resident memory, for 12 configurations.

`python -m scripts.bench predictions [--seconds 4] [--dtype float32]`: prediction and steps alternate; a configuration
has a process of its own. Resident memory counts above the imports, on both sides: what is predicted for the process
holds them, and what the compiler needs. On a GPU it is what torch allocates there.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys

import torch

from nanochat.config_file import as_dict
from nanochat.estimate import MEASURE_SECONDS, estimate, find_hardware, measure
from nanochat.settings import Settings
from scripts.bench.memory import resident_bytes
from scripts.bench.timing import settled, table
from scripts.bench.train import Contender

BASE = dict(
    data="stdlib", vocab_size=4096, depth=4, model_dim=128, head_dim=64, max_seq_len=256, tie_weights=True,
    device_batch_size=8, total_batch_size=2048,
)  # fmt: skip
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
    results = {}
    for name in [args.only] if args.only else CONFIGURATIONS:
        command = [
            sys.executable,
            "-m",
            "scripts.bench.predictions",
            name,
            str(args.seconds),
            str(args.rounds),
            args.dtype or "",
        ]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        results[name] = json.loads(done.stdout.splitlines()[-1])
    rows = []
    for name, found in results.items():
        (taken, told), (held, wanted) = found["seconds"], map(float, found["bytes"])
        held = held or math.nan  # a process that was larger before
        rows.append((name, 1e3 * taken, 1e3 * told, told / taken, held / 2**20, wanted / 2**20, wanted / held))
    print(table(("configuration", "ms a step", "predicted", "ratio", "MiB", "predicted", "ratio"), rows))
    return results


def one(name: str, seconds: float, rounds: int, dtype: str = "") -> dict:
    """Both figures of one configuration, measured here."""
    before = resident_bytes("VmRSS") or 0
    settings = Settings(**{**BASE, **CONFIGURATIONS[name], "dtype": dtype or None})
    hardware = find_hardware()
    contender = Contender(settings)
    contender.step()
    contender.step()  # the first had no state of the optimizer yet
    allocated = torch.cuda.max_memory_allocated() if hardware.device_type == "cuda" else None
    predicted, taken = [], []
    for _ in range(max(2, min(rounds, 5))):
        predicted.append(estimate(settings, hardware, measure(settings, hardware, seconds)))
        start = settled()
        for _ in range(3):
            contender.step()
        taken.append((settled() - start) / 3)
    told = [each.seconds / each.steps for each in predicted]
    held, wanted = allocated, predicted[0].peak_memory
    if held is None:
        held = (resident_bytes("VmHWM") or 0) - before
        wanted -= predicted[0].memory.get("saving", 0) + before  # nothing is saved here
    return dict(
        settings=as_dict(settings), threads=os.environ.get("OMP_NUM_THREADS"),
        seconds=[statistics.median(taken), statistics.median(told)], bytes=[held, wanted],
    )  # fmt: skip


if __name__ == "__main__":
    print(json.dumps(one(sys.argv[1], float(sys.argv[2]), int(sys.argv[3]), sys.argv[4]), default=str))
