"""Milliseconds of the parts of a training step, for variants of a preset that alternate in one process.

`python -m scripts.bench_step [--preset cpu] [--rounds 12] [--variant name:key=value,... ...]`: random tokens, one
micro-batch; the first variant is the baseline and runs a second time as the control. Medians, spread, ratio of sums.
"""

import argparse
import statistics
import time
from itertools import pairwise

import torch

from nanochat.config_file import parse_value
from nanochat.gpt import GPT, GPTConfig
from nanochat.optim import build_optimizer
from nanochat.runtime import UserError, import_compiler, pick_device_type, pick_dtype, run_script
from nanochat.settings import FIELDS, checked, nearest_name, preset, validate

FEATURES = ("value_embeddings", "smear", "residual_scalars", "backout")
DEFAULT = ("classic:" + ",".join(f"{f}=False" for f in FEATURES), "modern:" + ",".join(f"{f}=True" for f in FEATURES))
PARTS = ("forward", "backward", "reduce", "step")


def parse_variant(text: str) -> tuple[str, dict]:
    """'name:key=value,...' -> (name, changes); UserError for an unknown key."""
    name, _, pairs = text.partition(":")
    changes = {}
    for pair in filter(None, pairs.split(",")):
        key, equals, value = pair.partition("=")
        if not equals or key not in FIELDS:
            raise UserError(f"--variant {text!r}: {pair!r} is not a setting=value{nearest_name(key, FIELDS)}")
        changes[key] = checked(key, parse_value(key, value))
    return name, changes


class Variant:
    """A compiled model and its optimizer, ready to be timed."""

    def __init__(self, preset_name: str, changes: dict):
        settings = validate(preset(preset_name, **changes))
        device = torch.device(pick_device_type(settings.device_type))
        torch.manual_seed(settings.seed)
        self.model = GPT(GPTConfig(**settings.model_arguments())).to(device)
        self.model.init_weights(settings.tied_init_std)
        self.model.route = settings.route
        self.model.compute_dtype = pick_dtype(settings.dtype, device.type)
        self.optimizer = build_optimizer(self.model, settings, self.model.compute_dtype)
        rows, length = settings.batch_plan()[0], settings.max_seq_len + 1
        tokens = torch.randint(settings.vocab_size, (rows, length), device=device)
        place = torch.arange(length, device=device)
        for number, (first, end) in enumerate(self.model.vocabulary.ranges[1:], 1):  # captions of different lengths
            begin = length * number / (number + 3) + torch.randint(0, length // 8, (rows, 1), device=device)
            tokens = torch.where(place < begin, tokens, torch.randint(first, end, (rows, length), device=device))
        self.ids, self.targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        import_compiler()
        self.model.compile()
        self.step()

    def step(self) -> list[float]:
        """One step; returns the milliseconds of each of PARTS."""
        marks = [self.now()]
        loss = self.model(self.ids, self.targets)
        marks.append(self.now())
        loss.backward()
        marks.append(self.now())
        self.optimizer.reduce_gradients()
        marks.append(self.now())
        self.optimizer.step()
        self.model.zero_grad(set_to_none=True)
        marks.append(self.now())
        return [1000 * (b - a) for a, b in pairwise(marks)]

    def now(self) -> float:
        if self.ids.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def main(argv: list[str] | None = None) -> dict[str, list[list[float]]]:
    """Print the table; returns the milliseconds of every step by variant."""
    parser = argparse.ArgumentParser(prog="scripts.bench_step", description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="cpu")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--variant", action="append", help="name:key=value,... (repeatable; the first is the baseline)")
    arguments = parser.parse_args(argv)
    if arguments.rounds < 1:
        raise UserError(f"--rounds {arguments.rounds} is too small: at least 1")
    pairs = [parse_variant(text) for text in arguments.variant or DEFAULT]
    named = dict(pairs)
    if len(named) < len(pairs) or "control" in named:
        raise UserError("--variant: names must differ, and 'control' is taken")
    torch._dynamo.config.recompile_limit = max(8, 2 * len(named) + 1)  # all variants share one compiled block
    variants = {name: Variant(arguments.preset, changes) for name, changes in named.items()}
    baseline = next(iter(variants))
    variants["control"] = variants[baseline]
    times: dict[str, list[list[float]]] = {name: [] for name in variants}
    for _ in range(arguments.rounds):
        for name, variant in variants.items():
            times[name].append(variant.step())
    print(f"ms, medians of {arguments.rounds} rounds; ratio of the sums to {baseline}'s, median of the rounds")
    print(f"{'variant':<16}" + "".join(f"{part:>10}" for part in (*PARTS, "sum", "min", "max", "ratio")))
    for name, steps in times.items():
        sums = [sum(step) for step in steps]
        ratio = statistics.median(a / sum(b) for a, b in zip(sums, times[baseline], strict=True))
        parts = [statistics.median(column) for column in zip(*steps, strict=True)]
        cells = (*parts, statistics.median(sums), min(sums), max(sums))
        print(f"{name:<16}" + "".join(f"{cell:>10.1f}" for cell in cells) + f"{ratio:>10.3f}")
    return times


if __name__ == "__main__":
    run_script(main)
