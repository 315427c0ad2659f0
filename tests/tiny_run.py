"""A run of a tiny model, and looks at what it left: for the tests of the training script."""

import json
import os
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from nanochat import checkpoint_files
from nanochat.runtime import run_script
from nanochat.system.environment import base_dir
from scripts import base_train
from tests.forked import Forked

TINY = dict(
    vocab_size=300,
    depth=2,
    model_dim=64,
    head_dim=32,
    max_seq_len=64,
    total_batch_size=768,
    device_batch_size=4,
    num_iterations=4,
    compile=False,
    device_type="cpu",
    dtype="float32",
    eval_every=None,
    eval_tokens=256,
)
TIED = dict(tie_weights=True, use_output_projection=True)
MODERN = dict(value_embeddings=True, smear=True, residual_scalars=True, backout=True, qk_scale=1.2, rope_base=100_000.0)
CHECKOUT = Path(base_train.__file__).parents[1]
started: list[Forked] = []  # by start(); the `train` fixture ends what a failed test leaves running


def flags(settings: dict) -> list[str]:
    return [f"--{name}={value}" for name, value in settings.items()]


def tag_dir(tag: str, stage: str = "base") -> Path:
    return base_dir() / f"{stage}_checkpoints" / tag


def metrics(tag: str, key: str | None = None, stage: str = "base") -> list:
    """The lines of metrics.jsonl, or the values of one key in their order."""
    lines = [json.loads(line) for line in (tag_dir(tag, stage) / "metrics.jsonl").read_text().splitlines()]
    return lines if key is None else [line[key] for line in lines if key in line]


def losses(tag: str, stage: str = "base") -> list[float]:
    """Of every step, in order; the events repeat some of them."""
    return [line["loss"] for line in metrics(tag, stage=stage) if "tokens" in line]


def state_hashes(tag: str, step: int, stage: str = "base") -> list[str]:
    """Of the weights and of the optimizer's state."""
    folder = checkpoint_files.step_dir(tag_dir(tag, stage), step)
    return [checkpoint_files.weights_hash(load_file(folder / f"{name}.safetensors")) for name in ("model", "optimizer")]


def exit_code(run) -> int:
    with pytest.raises(SystemExit) as caught:
        run_script(run)
    return caught.value.code


def rows_of(tag: str, ranks: int, stage: str = "base") -> dict[int, list]:
    """The rows of each step, the ranks' shares one behind the other."""
    steps: dict[int, list] = {}
    for rank in range(ranks):
        for line in (tag_dir(tag, stage) / f"rows_rank{rank}.jsonl").read_text().splitlines():
            record = json.loads(line)
            steps.setdefault(record["step"], []).append([(row["epoch"], row["row"]) for row in record["rows"]])
    for shares in steps.values():
        assert len({len(share) for share in shares}) == 1
    return {step: [row for share in shares for row in share] for step, shares in sorted(steps.items())}


def start(
    base: Path,
    *words: str,
    ranks: int = 1,
    restarts: int = 0,
    script: Path | None = None,
    module: str = "scripts.base_train",
    **environment: str,
) -> Forked:
    """The training script (or another) in a process of its own; with ranks under torchrun, gloo, one thread a rank."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("TORCHELASTIC")}
    inherited |= dict(NANOCHAT_BASE_DIR=str(base), PYTHONPATH=str(CHECKOUT), OMP_NUM_THREADS="1")
    command = [sys.executable]
    if ranks > 1:
        command += ["-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc_per_node={ranks}", f"--max_restarts={restarts}"]
    command += [str(script)] if script else ["-m", module]
    process = Forked([*command, *words], env=inherited | environment)
    started.append(process)
    return process
