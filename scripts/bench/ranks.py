"""Ranks with one thread each against one process with as many threads: scripts.base_train itself, job after job.

`python -m scripts.bench ranks [--ranks 2] [--steps 12] [--total_batch_size 32768] [--rounds 3]`
The third contender sums the gradients after the backward pass instead of during it. All train in fp32 from one seed
on stdlib, in the shape that nanochat was measured at; what counts of a job is the median of its steps' seconds but for
the first two. Their losses are compared step by step.
"""

import argparse
import statistics

from nanochat.optim import MuonAdamW
from nanochat.runtime import run_script
from nanochat.system.environment import UserError
from scripts import base_train
from scripts.bench.timing import alternate, matmul_peak, summary, table
from scripts.bench.train import SHAPE
from scripts.experiments import common as experiments

LEFT_OUT = 2  # steps at the start of a job
BASE = "one process"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(rounds=3)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=12, help=f"of each job; the first {LEFT_OUT} do not count")
    parser.add_argument("--total_batch_size", type=int, default=32_768, help="tokens a step")


def run(args: argparse.Namespace) -> dict:
    """Print the table; returns contenders (seconds, tok_per_sec), peak_flops and loss_difference (relative)."""
    if args.steps <= LEFT_OUT or args.ranks < 2:
        raise UserError(f"--steps {args.steps} --ranks {args.ranks}: at least {LEFT_OUT + 1} steps and 2 ranks")
    shape = dict(
        SHAPE,
        total_batch_size=args.total_batch_size,
        num_iterations=args.steps,
        data="stdlib",
        dtype="float32",
        device_type="cpu",
        eval_every=None,
        eval_tokens=SHAPE["max_seq_len"],
        sample_every=None,
    )
    ways = {
        BASE: dict(threads=args.ranks),
        f"{args.ranks} ranks": dict(ranks=args.ranks),
        f"{args.ranks} ranks, sums afterwards": dict(ranks=args.ranks, module="scripts.bench.ranks"),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    losses: dict[str, list[float]] = {}
    peaks: list[float] = []

    def job(name: str, way: dict) -> None:
        steps = [line for line in experiments.base_train(f"bench-{name}", shape, **way) if "tokens" in line]
        losses[name] = [line["loss"] for line in steps]
        times[name].append(statistics.median(args.total_batch_size / line["tok_per_sec"] for line in steps[LEFT_OUT:]))

    alternate(
        {name: lambda name=name, way=way: job(name, way) for name, way in ways.items()},
        args.rounds,
        warmup=0,
        between=lambda: peaks.append(matmul_peak(args.compute.device, args.compute.dtype)),
    )
    found, rows = summary(times, BASE), []
    for name, one in found.items():
        one["tok_per_sec"] = args.total_batch_size / one["seconds"]
        ratios = sorted(b / a for a, b in zip(times[name], times[BASE], strict=True))
        off = max(abs(a - b) / b for a, b in zip(losses[name], losses[BASE], strict=True))
        one["loss_difference"] = off
        speed = f"{1 / one['ratio']:.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f})"
        rows.append((name, one["tok_per_sec"], one["seconds"], speed, losses[name][-1], f"{off:.1e}"))
    print(f"{args.rounds} rounds of jobs of {args.steps} steps of {args.total_batch_size:,} tokens, medians")
    print(table(("job", "tok/s", "s/step", f"speed / {BASE}", "last loss", "largest difference"), rows))
    return dict(contenders=found, peak_flops={str(args.compute.dtype)[6:]: statistics.median(peaks)})


if __name__ == "__main__":  # a rank of the third contender
    MuonAdamW.overlap_gradient_reduction = lambda self: None
    run_script(base_train.main)
