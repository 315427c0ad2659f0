"""Causal attention, forward and backward, over contexts and windows: ours against torch's fused kernel.

`python -m scripts.bench attention [--lengths 256,512,1024,2048,4096] [--shares 16,4,1] [--heads 4] [--head_dim 64]`
A share of 16 is a window of T / 16, 1 is none. Every call has the same number of tokens.
"""

import argparse
import statistics

import torch
import torch.nn.functional as F

from nanochat.gpt import norm
from nanochat.model.attention import causal_attention
from nanochat.system.environment import UserError, import_compiler
from scripts.bench.memory import peak_bytes
from scripts.bench.timing import alternate, matmul_peak, summary, table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--lengths", default="256,512,1024,2048,4096", help="contexts T")
    parser.add_argument("--shares", default="16,4,1", help="of T that the windows are: T / 16, T / 4, all")
    parser.add_argument("--tokens", type=int, default=4096, help="a call; T where that is more")
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--head_dim", type=int, default=64)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--eager", action="store_true", help="without torch.compile")


def run(args: argparse.Namespace) -> dict:
    """Print the table; returns contenders by "T <length>, window <w>, ours|torch" and peak_flops."""
    device, dtype = args.compute.device, getattr(torch, args.dtype)
    try:
        lengths, shares = ([int(n) for n in text.split(",")] for text in (args.lengths, args.shares))
    except ValueError:
        raise UserError(f"--lengths {args.lengths} --shares {args.shares}: not lists of numbers") from None
    kinds = {"torch": fused, "ours": ours}
    if not args.eager:
        import_compiler()
        torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
        kinds = {name: torch.compile(kind, dynamic=False) for name, kind in kinds.items()}
    peaks: list[float] = []
    found: dict[str, dict] = {}
    rows = []
    for length in lengths:
        batch = max(1, args.tokens // length)
        shape = (batch, length, args.heads, args.head_dim)
        generator = torch.Generator().manual_seed(0)
        q, k, v = (norm(torch.randn(shape, generator=generator)).to(device, dtype).requires_grad_() for _ in range(3))

        def both(kind, window, q=q, k=k, v=v):
            def work():
                q.grad = k.grad = v.grad = None
                kind(q, k, v, window).sum().backward()

            return work

        windows = {share: None if share == 1 else length // share for share in sorted({1, *shares})}
        label = {
            (share, kind): f"T {length}, {'all' if window is None else f'window {window}'}, {kind}"
            for share, window in windows.items()
            for kind in kinds
        }
        contenders = {name: both(kinds[kind], windows[share]) for (share, kind), name in label.items()}
        times = alternate(contenders, args.rounds, between=lambda: peaks.append(matmul_peak(device, dtype)))
        found |= summary(times, label[1, "ours"])
        for (share, kind), name in label.items():
            one, rival, whole = found[name], found[label[share, "torch"]], found[label[1, kind]]
            q.grad = k.grad = v.grad = None
            one.update(bytes=peak_bytes(contenders[name]), dtype=args.dtype)
            seen = length if share == 1 else min(length, windows[share] + 1)  # as GPT.flops_per_token counts it
            rate = 12 * batch * length * seen * args.heads * args.head_dim / one["seconds"]
            rows.append(
                (
                    name,
                    1000 * one["seconds"],
                    rival["seconds"] / one["seconds"],
                    one["seconds"] / whole["seconds"],
                    rate / 1e9,
                    one["bytes"] / 2**20,
                    one["bytes"] / whole["bytes"],
                )
            )
    peak = statistics.median(peaks)
    print(f"{args.heads} heads of {args.head_dim}, {args.dtype}, peak {peak / 1e9:,.0f} GFLOP/s")
    print(table(("attention", "ms", "times torch's speed", "time / all", "GFLOP/s", "MiB", "MiB / all"), rows))
    return dict(contenders=found, peak_flops={args.dtype: peak})


def ours(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int | None = None) -> torch.Tensor:
    """As the model calls it: queries and keys are normalised, so that their scores are bounded."""
    return causal_attention(q, k, v, window, bound=q.size(-1) ** 0.5)


def fused(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int | None = None) -> torch.Tensor:
    """torch's kernel on [B, T, H, D]; a window is a mask, which it computes with but does not skip."""
    mask, T = None, q.size(1)
    if window is not None:
        mask = torch.ones(T, T, dtype=torch.bool, device=q.device).tril().triu(-window)
    q, k, v = (z.transpose(1, 2) for z in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None).transpose(1, 2)
