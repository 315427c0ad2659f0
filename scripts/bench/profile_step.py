"""Where a training step goes: `python -m scripts.bench.profile_step [--preset NAME] [--dtype ...] [--eager] [--output
FILE]`.

A readable table of the parts of the step: seconds, share, FLOP/s of the matmuls. torch's profiler slows the step down,
so shares come from it and seconds are shares of the median step without it.
"""

import argparse
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from nanochat.data.dataloader import DataLoader
from nanochat.files import check_output, write_atomically
from nanochat.hardware import device_name
from nanochat.optim import MuonAdamW
from nanochat.runtime import init_compute, run_script
from nanochat.system.environment import UserError
from nanochat.training.grad_accumulation import forward_backward
from scripts.bench.load import MadeUpStore
from scripts.bench.timing import alternate, matmul_peak, table
from scripts.bench.train import Contender, settings_of

MARK = "part: "  # in front of the names of ranges that are a part whatever runs in them
PARTS = (
    "data",
    "embedding",
    "norms, rotary, residuals",
    "attention matrices",
    "attention itself",
    "MLP matrices",
    "MLP between",
    "loss head",
    "gradient sums",
    "Muon",
    "AdamW",
    "other",
)
MATMULS = ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::baddbmm", "aten::_scaled_mm")


@dataclass(frozen=True)
class Sizes:
    """The model's sizes, by which a matmul is known: tokens of a micro-batch, hidden units, rows of the tables."""

    tokens: int
    hidden: int
    vocab: int


def main(argv: list[str] | None = None) -> dict[str, dict]:
    """Print the table (and write it to --output); returns {part: {seconds, share, flops}}."""
    parser = argparse.ArgumentParser(prog="scripts.bench.profile_step", description=__doc__.splitlines()[0])
    parser.add_argument("--preset", help="settings to profile; None: the shape that nanochat was measured at")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="None takes what training would")
    parser.add_argument("--path", choices=("default", "plain"), default="default", help="plain: that of the benchmarks")
    parser.add_argument("--device_type", help="cuda, mps or cpu; the best one here")
    parser.add_argument("--device_batch_size", type=int, help="rows of a micro-batch; None takes the settings'")
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    parser.add_argument("--steps", type=int, default=5, help="steps that are timed, and as many that are profiled")
    parser.add_argument("--output", type=Path, help="Markdown file for the table")
    args = parser.parse_args(argv)
    if args.steps < 1:
        raise UserError(f"--steps {args.steps} is too small: at least 1")
    if args.output:
        check_output(args.output, "--output")
    compute = init_compute(args.device_type, args.dtype, seed=1)
    changes = dict(dtype=args.dtype, device_type=args.device_type)
    if args.device_batch_size:
        changes["device_batch_size"] = args.device_batch_size
    if compute.device_type == "cpu" and not args.eager:
        import torch._inductor.config

        torch._inductor.config.cpp.enable_kernel_profile = True  # compiled kernels tell their names
    contender = Contender(settings_of(args.preset, **changes), args.path, compiled=not args.eager)
    step = marked_step(contender)
    peaks: list[float] = []
    shapes = contender.matmuls()
    times = alternate(
        {"step": step}, args.steps, between=lambda: peaks.append(matmul_peak(compute.device, compute.dtype, shapes))
    )
    seconds, peak = statistics.median(times["step"]), statistics.median(peaks)
    config = contender.model.config
    sizes = Sizes(
        contender.rows * config.sequence_len, round(config.mlp_ratio * config.n_embd), contender.model.table_size
    )
    parts = by_part(profiled(step, args.steps, compute.device_type), sizes, compute.device_type == "cuda")
    whole = sum(part["seconds"] for part in parts.values())
    for part in parts.values():
        part["share"] = part["seconds"] / whole
        part["seconds"] = part["share"] * seconds
        part["flops"] //= args.steps
    report = "\n".join(lines(parts, contender, seconds, peak, f"{device_name(compute)}, {contender.dtype}"))
    print(report)
    if args.output:
        write_atomically(args.output, report + "\n")
    return parts


def marked_step(contender: Contender):
    """The step of training with a loader, as a function; its parts outside of the model are marked."""
    settings = contender.settings
    loader = DataLoader(MadeUpStore([500] * 16), settings.rows, settings.max_seq_len, 0, device=contender.ids.device)
    groups = contender.optimizer.param_groups
    optimizers = {
        name: MuonAdamW([dict(group) for group in groups if group["kind"] == kind])
        for name, kind in (("Muon", "muon"), ("AdamW", "adamw"))
    }
    optimizers["Muon"].muon_update = contender.optimizer.muon_update  # which may be compiled
    mark = torch.profiler.record_function

    def step() -> None:
        with mark(MARK + "data"):
            inputs, targets = loader.next()
            if not contender.model.config.modalities:  # those keep their mixed batch; the loader works all the same
                inputs, targets = inputs % settings.vocab_size, targets % settings.vocab_size
            else:
                inputs, targets = contender.ids, contender.targets
        forward_backward(contender.model, inputs, targets, contender.rows, contender.valid)
        with mark(MARK + "gradient sums"):
            for optimizer in optimizers.values():
                optimizer.reduce_gradients()
        for name, optimizer in optimizers.items():
            with mark(MARK + name):
                optimizer.step()
        contender.model.zero_grad(set_to_none=True)

    return step


def profiled(step, steps: int, device_type: str) -> list:
    """The profiler's events of so many steps."""
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if device_type == "cuda":
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=kinds, record_shapes=True, with_flops=True, acc_events=True) as profiler:
        for _ in range(steps):
            step()
        if device_type == "cuda":
            torch.cuda.synchronize()
    return profiler.events()


def by_part(events: list, sizes: Sizes, cuda: bool = False) -> dict[str, dict]:
    """{part: {"seconds", "flops"}} of profiler events, in the order of PARTS; a GPU's time is that of its kernels."""
    found: dict[str, dict] = {part: dict(seconds=0.0, flops=0) for part in PARTS}
    for event in events:
        if cuda:
            micro = sum(kernel.duration for kernel in event.kernels)
        else:
            micro = event.self_cpu_time_total
        part = found[part_of(list(lineage(event)), event.input_shapes or [], sizes)]
        part["seconds"] += micro / 1e6
        if event.name in MATMULS:
            part["flops"] += event.flops or matmul_flops(event.input_shapes)
    return {name: part for name, part in found.items() if part["seconds"] > 0}


def lineage(event) -> Iterator[str]:
    """The event's name, then those of the events that it ran in, innermost first."""
    while event is not None:
        yield event.name
        event = event.cpu_parent


def part_of(names: list[str], shapes: list, sizes: Sizes) -> str:
    """The part of the step for an event: its name and those around it, innermost first, and its inputs' shapes."""
    for name in reversed(names):  # the outermost mark
        if name.startswith(MARK):
            return name.removeprefix(MARK)
    own, around = names[0], " ".join(names)
    if "ChunkedSum" in around or "cross_entropy" in own or "nll_loss" in around or "log_softmax" in around:
        return "loss head"
    if own in MATMULS and len(shape := matmul_shape(shapes)) == 3:
        batched = any(len(s) == 3 for s in shapes)
        matrix = list(shape)
        if sizes.tokens in matrix:
            matrix.remove(sizes.tokens)
        if sizes.vocab in matrix:
            return "loss head"
        return "attention itself" if batched else "MLP matrices" if sizes.hidden in matrix else "attention matrices"
    if "embedding" in around:
        return "embedding"
    words = own.lower()
    if any(word in words for word in ("softmax", "attention", "masked_fill", "flex", "flash")):
        return "attention itself"
    if "relu" in words or "threshold" in words:
        return "MLP between"
    if "rms_norm" in around or "fused" in words:
        return "norms, rotary, residuals"
    return "other"


def matmul_shape(shapes: list) -> tuple[int, ...]:
    """(rows, inner, columns) of the last two matrices among an op's inputs; () for something else."""
    matrices = [shape for shape in shapes if len(shape) in (2, 3)][-2:]
    if len(matrices) < 2:
        return ()
    return matrices[0][-2], matrices[0][-1], matrices[1][-1]


def matmul_flops(shapes: list) -> int:
    """2 x batch x rows x inner x columns, for ops that the profiler does not count."""
    shape = matmul_shape(shapes)
    if not shape:
        return 0
    batch = next((s[0] for s in shapes if len(s) == 3), 1)
    return 2 * batch * shape[0] * shape[1] * shape[2]


def lines(parts: dict[str, dict], contender: Contender, seconds: float, peak: float, where: str) -> Iterator[str]:
    """The report: what was measured, then the table, largest part first."""
    tokens = contender.ids.numel()
    share = f"MFU {contender.flops / seconds / peak:.1%} of {peak / 1e9:,.0f} GFLOP/s measured"
    yield f"# A step of {tokens:,} tokens on {where}"
    yield ""
    yield f"{1000 * seconds:,.0f} ms, {tokens / seconds:,.0f} tok/s, {share}"
    yield ""
    rows = []
    for name, part in sorted(parts.items(), key=lambda pair: -pair[1]["seconds"]):
        rate = part["flops"] / part["seconds"] / 1e9 if part["flops"] else None
        rows.append((name, 1000 * part["seconds"], f"{part['share']:.1%}", rate))
    yield table(("part", "ms", "share", "GFLOP/s"), rows)


if __name__ == "__main__":
    run_script(main)
