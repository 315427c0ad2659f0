"""Generation with the static cache and the compiled step against eager cached decoding, without speculation.

`python -m scripts.bench generate [--batches 1,16] [--new 128] [--prompt 128] [--dtypes float32,bfloat16]`: random
prompts and a random model in the shape that nanochat was measured at; drawn from the 50 best. Both contenders cast the
weights once and draw alike; the clock runs from the first new token to the last. Bytes a second: of the matrices, and
of the keys and values that there are half way, beside copies of as many bytes as the matrices have (which a cache may
hold) and of 256 MB (which it does not). In the end greedy text is compared: compiled, eager, and without a cache.
"""

import argparse
import statistics
from functools import partial

import torch

from nanochat.engine import decode
from nanochat.gpt import GPT
from nanochat.hardware import compiler_problem
from nanochat.model.parameters import num_matmul_parameters
from nanochat.system.environment import UserError
from scripts.bench.evaluate import random_model
from scripts.bench.timing import alternate, matmul_peak, settled, summary, table
from scripts.bench.train import chosen_dtypes

EAGER, COMPILED = "eager", "compiled"
COPY_BYTES = 1 << 28


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--batches", default="1,16", help="rows that are continued together")
    parser.add_argument("--prompt", type=int, default=128, help="tokens of each prompt")
    parser.add_argument("--new", type=int, default=128, help="tokens that are generated behind it")
    parser.add_argument("--dtypes", help="comma-separated; None: float32, and bfloat16 where the hardware has it")


def run(args: argparse.Namespace) -> dict:
    """Print the table; returns contenders (seconds, tok_per_sec, bytes_per_sec, ratio...), peak_flops, copies, same."""
    try:
        batches = [int(rows) for rows in args.batches.split(",")]
    except ValueError:
        raise UserError(f"--batches {args.batches!r} is not a list of numbers such as 1,16") from None
    if min(*batches, args.prompt, args.new - 1) < 1:
        raise UserError(f"--batches {args.batches} --prompt {args.prompt} --new {args.new}: at least 1, 1 and 2")
    device = args.compute.device
    model, found, rows, steps = random_model(0, device), {}, [], args.new - 1
    if args.prompt + args.new > model.rotary_length:
        raise UserError(f"--prompt {args.prompt} --new {args.new}: together at most {model.rotary_length}")
    if problem := compiler_problem() if device.type == "cpu" else None:
        raise UserError(f"nothing can be compiled here: {problem}")
    peaks: dict[str, list[float]] = {}
    copies: dict[str, list[float]] = {"of the matrices": [], "of 256 MB": []}
    for dtype in chosen_dtypes(args):
        model.compute_dtype = getattr(torch, dtype)
        peaks[dtype] = []

        def between(dtype=dtype) -> None:
            peaks[dtype].append(matmul_peak(device, getattr(torch, dtype)))
            own = num_matmul_parameters(model) * model.compute_dtype.itemsize
            for found, size in zip(copies.values(), (own, COPY_BYTES), strict=True):
                found.append(copy_rate(device, size))

        for batch in batches:
            prompts = random_prompts(model, batch, args.prompt)
            ways = {f"{name} {dtype} x {batch}": name == COMPILED for name in (EAGER, COMPILED)}
            times: dict[str, list[float]] = {name: [] for name in ways}

            def turn(name: str, prompts=prompts, ways=ways, times=times) -> None:
                times[name].append(seconds_of_steps(model, prompts, args.new, ways[name]))

            alternate({name: partial(turn, name) for name in ways}, args.rounds, warmup=1, between=between)
            times = {name: found[1:] for name, found in times.items()}  # without the warm-up
            for name, one in summary(times, next(iter(ways))).items():
                one.update(
                    dtype=dtype,
                    tok_per_sec=batch * steps / one["seconds"],
                    bytes_per_sec=steps * bytes_of_a_step(model, batch, args.prompt + steps / 2) / one["seconds"],
                )
                found[name] = one
                rows.append(
                    (
                        name,
                        one["tok_per_sec"],
                        1000 * one["seconds"] / steps,
                        one["bytes_per_sec"] / 1e9,
                        f"{1000 * one['fastest'] / steps:.2f} to {1000 * one['slowest'] / steps:.2f}",
                        1 / one["ratio"],
                    )
                )
    result = dict(
        contenders=found,
        peak_flops={dtype: statistics.median(peak) for dtype, peak in peaks.items()},
        copies={name: statistics.median(rates) for name, rates in copies.items()},
        same={batch: same_text(model, batch, args.prompt, args.new) for batch in batches},
    )
    told = ", ".join(f"{name} {rate / 1e9:.1f}" for name, rate in result["copies"].items())
    print(
        f"{args.new} new tokens behind {args.prompt}, {args.rounds} rounds, medians of the steps; copies, read and "
        f"written, GB/s: {told}"
    )
    print(table(("contender", "tok/s", "ms a token", "GB/s", "min to max", "times faster"), rows))
    print(f"greedy text in float32, compiled = eager = without a cache, by rows: {result['same']}")
    return result


def seconds_of_steps(model: GPT, prompts: torch.Tensor, new: int, compiled: bool) -> float:
    """From the first drawn token of every row to the last: new - 1 steps."""
    tokens = decode(model, prompts, new, top_k=50, compiled=compiled)
    next(tokens)
    start = settled()
    assert sum(1 for _ in tokens) == new - 1
    return settled() - start


def random_prompts(model: GPT, rows: int, length: int) -> torch.Tensor:
    return torch.randint(model.config.vocab_size, (rows, length), generator=torch.Generator().manual_seed(1))


def bytes_of_a_step(model: GPT, batch: int, length: float) -> float:
    """What a step has to read: every matrix, and `length` positions of keys and values."""
    config = model.config
    numbers = num_matmul_parameters(model) + batch * config.n_layer * 2 * length * config.n_kv_head * config.head_dim
    return numbers * model.compute_dtype.itemsize


def copy_rate(device: torch.device, size: int) -> float:
    """Bytes a second, read and written, of the best of five copies of so many bytes."""
    source = torch.ones(size // 4, device=device)
    target, seconds = torch.empty_like(source), []
    for _ in range(5):
        start = settled()
        target.copy_(source)
        seconds.append(settled() - start)
    return 2 * size / min(seconds)


@torch.inference_mode()
def same_text(model: GPT, batch: int, prompt: int, new: int) -> bool:
    """Whether three ways of greedy decoding give the same ids in float32."""
    model.compute_dtype = torch.float32
    prompts = random_prompts(model, batch, prompt).to(model.device)
    texts = [
        torch.stack(list(decode(model, prompts, new, temperature=0, compiled=compiled)), dim=1)
        for compiled in (False, True)
    ]
    ids = prompts
    for _ in range(new):
        ids = torch.cat([ids, model(ids)[:, -1:].argmax(-1)], dim=1)
    return all(torch.equal(text, ids[:, prompt:]) for text in texts)
