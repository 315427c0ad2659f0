"""The harness of all benchmarks: contenders take turns in one process, and the machine's own peak is measured beside.

Machines drift and have company, so a figure is a ratio: of contenders within a round (median over the rounds), or of a
rate to the matmul peak that was measured between the same rounds.
"""

import statistics
import time
from collections.abc import Callable, Iterable, Sequence

import torch

now = time.perf_counter  # tests put a clock of their own here


def settled() -> float:
    """The time in seconds once the GPU, if one is in use, has done all it was asked."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    elif torch.backends.mps.is_available():
        torch.mps.synchronize()
    return now()


def alternate(
    contenders: dict[str, Callable[[], object]],
    rounds: int,
    warmup: int = 2,
    between: Callable[[], object] | None = None,
) -> dict[str, list[float]]:
    """Seconds of each contender in every round: {name: [rounds]}.

    All run in turn in each round, in reverse order every other round, so that neither a drift nor what the one before
    left in the caches favours anybody. `warmup` rounds before do not count; `between` runs, untimed, after each that
    does.
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(-warmup, rounds):
        order = list(contenders) if number % 2 == 0 else list(reversed(contenders))
        for name in order:
            start = settled()
            contenders[name]()
            if number >= 0:
                times[name].append(settled() - start)
        if between is not None and number >= 0:
            between()
    return times


def median_ratio(times: dict[str, list[float]], name: str, base: str) -> float:
    """Seconds of `name` over those of `base`: the median of the rounds' ratios; under 1 is faster."""
    return statistics.median(a / b for a, b in zip(times[name], times[base], strict=True))


PEAK_SECONDS = 0.2  # that looking for the peak may take
SQUARES = ((1024, 1024, 1024), (2048, 1024, 1024))  # (rows, inner, columns); on a GPU all sides are 8 times as long


def matmul_peak(device: torch.device, dtype: torch.dtype, shapes: Iterable[tuple[int, int, int]] = ()) -> float:
    """The best rate of a matmul here and now in FLOP/s, over SQUARES and the (rows, inner, columns) of `shapes`.

    A moment later it may be another: call it between the rounds, and take the median.
    """
    scale = 8 if device.type == "cuda" else 1
    sizes = [tuple(scale * side for side in square) for square in SQUARES] + list(shapes)
    generator = torch.Generator(device).manual_seed(0)  # what is timed beside keeps its random numbers
    best = 0.0
    for rows, inner, columns in sizes:
        a = torch.randn(rows, inner, device=device, generator=generator).to(dtype)
        b = torch.randn(inner, columns, device=device, generator=generator).to(dtype)
        tries, deadline = 0, now() + PEAK_SECONDS / len(sizes)
        while tries < 3 or now() < deadline:
            start = settled()
            torch.mm(a, b)
            best = max(best, 2 * rows * inner * columns / (settled() - start))
            tries += 1
    return best


def summary(times: dict[str, list[float]], base: str) -> dict[str, dict]:
    """{name: median, min and max seconds and the ratio to `base`}, what a part's result holds as "contenders"."""
    return {
        name: dict(
            seconds=statistics.median(found),
            fastest=min(found),
            slowest=max(found),
            rounds=len(found),
            ratio=median_ratio(times, name, base),
        )
        for name, found in times.items()
    }


def against(result: dict, reference: dict) -> dict[str, float]:
    """Time of each contender over an earlier run's, {name: ratio}: both in units of the matmul peak measured beside.

    Contenders are those of summary(), with a "dtype" where "peak_flops" ({dtype: FLOP/s}) has more than float32.
    """
    ratios = {}
    for name, found in result.get("contenders", {}).items():
        if earlier := reference.get("contenders", {}).get(name):
            dtype = found.get("dtype", "float32")
            faster_machine = result["peak_flops"][dtype] / reference["peak_flops"][earlier.get("dtype", dtype)]
            ratios[name] = found["seconds"] * faster_machine / earlier["seconds"]
    return ratios


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table with aligned columns: text left, numbers right with four digits that matter or separators."""
    cells = [list(header), *([_cell(value) for value in row] for row in rows)]
    widths = [max(3, *(len(row[i]) for row in cells)) for i in range(len(header))]
    lines = []
    for number, row in enumerate(cells):
        padded = [row[0].ljust(widths[0]), *(text.rjust(w) for text, w in zip(row[1:], widths[1:], strict=True))]
        lines.append(f"| {' | '.join(padded)} |")
        if number == 0:
            lines.append("|".join(["", "-" * (widths[0] + 2), *("-" * (w + 1) + ":" for w in widths[1:]), ""]))
    return "\n".join(lines)


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
