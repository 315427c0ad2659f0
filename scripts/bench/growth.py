"""How the cost of training grows: time and memory over depth, context and vocabulary, one at a time.

`python -m scripts.bench growth [--output growth.png]`: from SHAPE, one micro-batch of --tokens. The exponent e of
cost ~ size^e is fitted by least squares in logarithms. The cost is that of the same number of tokens: over the context
it is attention alone that makes it grow, and nothing should have an exponent above 1.
"""

import argparse
import math
import statistics
from pathlib import Path

from nanochat.system.environment import UserError
from scripts.bench.memory import peak_bytes
from scripts.bench.timing import alternate, matmul_peak, summary, table
from scripts.bench.train import Contender, settings_of

DIMENSIONS = {
    "depth": (2, 4, 8, 12),
    "max_seq_len": (256, 512, 1024, 2048, 4096),
    "vocab_size": (4096, 8192, 16_384, 32_768, 65_536),
}
MARGIN = 0.05  # of an exponent: what a fit over noisy times may be off


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dimensions", default=",".join(DIMENSIONS), help="which of them")
    parser.add_argument("--tokens", type=int, default=4096, help="of a step")
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    parser.add_argument("--output", type=Path, help="file for the plot, .png")


def run(args: argparse.Namespace) -> dict:
    """Print the table; returns {"growth": {dimension: {sizes, seconds, bytes, exponents}}} and what `against` needs."""
    names = args.dimensions.split(",")
    if unknown := [name for name in names if name not in DIMENSIONS]:
        raise UserError(f"--dimensions {args.dimensions}: {unknown[0]!r} is not one of {', '.join(DIMENSIONS)}")
    growth, found, peaks, dtype = {}, {}, [], args.compute.dtype
    rows = []
    for name in names:
        steps, memory = {}, []
        for size in DIMENSIONS[name]:
            contender = Contender(settings_for(name, size, args), compiled=not args.eager)
            contender.step()
            memory.append(peak_bytes(contender.step))
            steps[f"{name} {size}"] = contender.step
        times = alternate(
            steps, args.rounds, warmup=1, between=lambda: peaks.append(matmul_peak(args.compute.device, dtype))
        )
        measured = summary(times, next(iter(steps)))
        found |= measured
        seconds = [one["seconds"] for one in measured.values()]
        exponents = {
            kind: exponent(DIMENSIONS[name], values) for kind, values in (("time", seconds), ("memory", memory))
        }
        growth[name] = dict(sizes=DIMENSIONS[name], seconds=seconds, bytes=memory, **exponents)
        for size, time, most in zip(DIMENSIONS[name], seconds, memory, strict=True):
            rows.append((f"{name} {size:,}", 1e6 * time / args.tokens, args.tokens / time, most / 2**20))
    for one in found.values():
        one["dtype"] = str(dtype).removeprefix("torch.")
    print(f"{args.tokens:,} tokens a step, {args.rounds} rounds")
    print(table(("shape", "us a token", "tok/s", "MiB of a step"), rows))
    verdicts = [
        (
            name,
            f"{one['time']:.2f}",
            f"{one['memory']:.2f}",
            "no" if max(one["time"], one["memory"]) > 1 + MARGIN else "yes",
        )
        for name, one in growth.items()
    ]
    print(table(("dimension", "e of time", "e of memory", "linear or better"), verdicts))
    if args.output:
        plot(growth, args.tokens, args.output)
    peak = {str(dtype).removeprefix("torch."): statistics.median(peaks)}
    return dict(contenders=found, peak_flops=peak, growth=growth)


def settings_for(name: str, size: int, args: argparse.Namespace):
    """The settings with one dimension changed, one micro-batch of args.tokens; at least a row."""
    length = size if name == "max_seq_len" else settings_of(None).max_seq_len
    rows = max(1, args.tokens // length)
    return settings_of(
        None, **{name: size}, device_batch_size=rows, total_batch_size=rows * length, device_type=args.device_type
    )


def exponent(sizes, values) -> float:
    """The slope of log(values) over log(sizes) by least squares: 1 is proportional."""
    return statistics.linear_regression([math.log(s) for s in sizes], [math.log(v) for v in values]).slope


def plot(growth: dict, tokens: int, path: Path) -> None:
    """Time a token and memory of a step over each dimension, with a line that is proportional to the size."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import NullLocator

    figure, axes = plt.subplots(2, len(growth), figsize=(4 * len(growth), 6), squeeze=False, layout="constrained")
    for column, (name, one) in enumerate(growth.items()):
        kinds = ((one["seconds"], "us a token", 1e6 / tokens), (one["bytes"], "MiB of a step", 2**-20))
        for row, (values, label, unit) in enumerate(kinds):
            panel, sizes = axes[row][column], one["sizes"]
            panel.loglog(sizes, [unit * value for value in values], "o-", label="measured")
            panel.loglog(sizes, [unit * values[0] * size / sizes[0] for size in sizes], ":", label="proportional")
            panel.set(xlabel=name, ylabel=label)
            panel.set_xticks(sizes, [str(size) for size in sizes], minor=False)
            panel.xaxis.set_minor_locator(NullLocator())
            panel.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)
    print(f"plot: {path}")
