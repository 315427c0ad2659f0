"""The loss head, forward and backward: chunks of several sizes against all logits at once. Time and memory.

`python -m scripts.bench head [--tokens 4096] [--width 256] [--vocab 8192] [--chunks 64,128,256,512,1024]`
"""

import argparse
import statistics

import torch
import torch.nn.functional as F

from nanochat.model import loss_head
from nanochat.system.environment import UserError, import_compiler
from scripts.bench.memory import peak_bytes
from scripts.bench.timing import alternate, matmul_peak, summary, table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tokens", type=int, default=4096, help="of a micro-batch")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--chunks", default="64,128,256,512,1024", help="rows of logits that are alive at a time")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--eager", action="store_true", help="without torch.compile")


def run(args: argparse.Namespace) -> dict:
    """Print the table; returns contenders (seconds, ratio to all logits, bytes, mfu) and peak_flops."""
    device, dtype = args.compute.device, getattr(torch, args.dtype)
    try:
        sizes = [int(rows) for rows in args.chunks.split(",")]
    except ValueError:
        raise UserError(f"--chunks {args.chunks!r} is not a list of numbers such as 128,512") from None
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(args.tokens, args.width, generator=generator).to(device, dtype).requires_grad_()
    weight = (0.05 * torch.randn(args.vocab, args.width, generator=generator)).to(device).requires_grad_()
    targets = torch.randint(args.vocab, (args.tokens,), generator=generator).to(device)
    if not args.eager:
        import_compiler()
    whole = all_logits if args.eager else torch.compile(all_logits, dynamic=False)
    if not args.eager:
        torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)

    def chunked(rows: int):
        def loss() -> torch.Tensor:
            loss_head.chunk_rows = lambda *where, **how: rows
            return loss_head.chunked_cross_entropy(x, weight, targets, "sum", kernel=kernel)

        return lambda: backward(loss)

    def backward(loss) -> torch.Tensor:
        x.grad = weight.grad = None
        value = loss()
        value.backward()
        return value.detach()

    contenders = {"all logits": lambda: backward(lambda: whole(x, weight, targets))}
    contenders |= {f"chunks of {rows}": chunked(rows) for rows in sizes}
    before = loss_head.chunk_rows
    kernel = loss_head.chunk_gradient if args.eager else loss_head.compile_chunk_gradient()
    peaks: list[float] = []
    shapes = [(args.tokens, args.width, args.vocab), *((rows, args.width, args.vocab) for rows in sizes)]
    try:
        losses = {name: work().item() for name, work in contenders.items()}
        times = alternate(contenders, args.rounds, between=lambda: peaks.append(matmul_peak(device, dtype, shapes)))
        found = summary(times, "all logits")
        for name, work in contenders.items():
            x.grad = weight.grad = None
            found[name].update(bytes=peak_bytes(work), loss=losses[name], dtype=args.dtype)
    finally:
        loss_head.chunk_rows = before
    flops = 6 * args.tokens * args.width * args.vocab
    peak = statistics.median(peaks)
    rows = []
    for name, one in found.items():
        one["mfu"] = statistics.median(flops / t / p for t, p in zip(times[name], peaks, strict=True))
        rows.append((name, 1000 * one["seconds"], one["ratio"], f"{one['mfu']:.1%}", one["bytes"] / 2**20, one["loss"]))
    print(f"{args.tokens} x {args.width} against {args.vocab}, {args.dtype}; peak {peak / 1e9:,.0f} GFLOP/s")
    print(table(("head", "ms", "time / all logits", "MFU", "MiB", "loss"), rows))
    return dict(contenders=found, peak_flops={args.dtype: peak})


def all_logits(x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, softcap: float = 15.0) -> torch.Tensor:
    """x [N, C], weight [V, C], targets [N] -> the summed cross-entropy, with [N, V] logits."""
    logits = F.linear(x, weight.to(x.dtype)).float()
    return F.cross_entropy(softcap * torch.tanh(logits / softcap), targets, reduction="sum")
