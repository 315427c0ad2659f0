"""From features to the loss without ever holding all logits.

Rows are processed in chunks. In training the gradients of a chunk are computed right after its loss, while its logits
are still in the cache, so the backward pass only scales them (the idea of Liger and of "cut your losses",
arXiv 2411.09009). Softcapped logits are bounded, which saves the pass that finds their maximum.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from nanochat.modality import IGNORED
from nanochat.model.cpu_attention import upcast

# logits [n, V], softcap, divide -> see chunk_gradient()
ChunkGradient = Callable[[torch.Tensor, float, bool], tuple[torch.Tensor, torch.Tensor]]


def chunk_rows(device: str, ids: int, compiled: bool = True) -> int:
    """Rows of features whose logits of `ids` ids are in memory at a time, on a type of device.

    Enough for efficient matmuls (measured in dev/LOG.md), fewer where a large vocabulary would make the logits too
    large; without the compiler several arrays of their size are in memory.
    """
    rows, logits = 4096, 1 << 28
    if device == "cpu":
        rows, logits = 1024, 1 << 23
    elif device == "cuda" and compiled:
        rows, logits = 16384, 1 << 29
    return min(max(128, logits // ids), rows)


def softcapped(logits: torch.Tensor, softcap: float = 15.0) -> torch.Tensor:
    """Squash logits smoothly into (-softcap, softcap) (Gemma 2, arXiv 2408.00118)."""
    return softcap * torch.tanh(logits / softcap)


def chunk_gradient(logits: torch.Tensor, softcap: float, divide: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """logits [n, V] before the cap -> (gradient [n, V] of their log-sum-exp, sums [n, 1] of exp(capped - softcap)).

    Without `divide` the gradient is the true one times that sum: then each logit is read only once. The target's own
    term touches one entry per row, and is subtracted by the caller.
    """
    squashed = 2 * torch.sigmoid(upcast(logits) * (2 / softcap)) - 1  # tanh(logits / softcap), vectorised everywhere
    exps = torch.exp(squashed * softcap - softcap)
    total = exps.sum(dim=-1, keepdim=True)
    gradient = exps * (1 - squashed * squashed)
    return (gradient / total if divide else gradient).to(logits.dtype), total


def compile_chunk_gradient() -> ChunkGradient:
    """chunk_gradient() fused by torch.compile, at its first call; results differ by rounding only."""
    compiled = torch.compile(chunk_gradient)

    def run(logits: torch.Tensor, softcap: float, divide: bool) -> tuple[torch.Tensor, torch.Tensor]:
        torch._dynamo.maybe_mark_dynamic(logits, 0)  # one graph for every number of rows
        torch._dynamo.mark_static(logits, 1)
        return compiled(logits, softcap, divide)

    return run


def chunked_cross_entropy(
    x: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    reduction: str = "mean",
    softcap: float = 15.0,
    kernel: ChunkGradient = chunk_gradient,
) -> torch.Tensor:
    """Cross-entropy in nats of softcapped logits x @ weight.T, float32.

    x [N, C] features, weight [V, C] master weight, targets int64 [N], -100 ignored. "mean" divides by the number of
    valid targets and is 0 without any, "sum" does not; "none" returns [N] and has no gradient. kernel: what computes
    the gradient of a chunk's logits in training, chunk_gradient() or a compiled one.
    """
    if reduction == "none" or not torch.is_grad_enabled():
        rows = chunk_rows(x.device.type, len(weight), compiled=False)
        cast = weight.to(x.dtype)
        parts = [
            F.cross_entropy(softcapped(upcast(F.linear(xs, cast)), softcap), ys, reduction="none")
            for xs, ys in zip(x.split(rows), targets.split(rows), strict=True)
        ]
        losses = torch.cat(parts)
        if reduction == "none":
            return losses
        total = losses.sum()
    else:
        total = _ChunkedSum.apply(x, weight, targets, softcap, kernel)
    return total if reduction == "sum" else total / (targets != IGNORED).sum().clamp(min=1)


def token_losses(x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, softcap: float = 15.0) -> torch.Tensor:
    """Cross-entropy in nats of each target, [N], with a gradient where one is wanted."""
    if not torch.is_grad_enabled():
        return chunked_cross_entropy(x, weight, targets, "none", softcap)
    return F.cross_entropy(softcapped(upcast(F.linear(x, weight.to(x.dtype))), softcap), targets, reduction="none")


def rounds(x: torch.Tensor) -> bool:
    """Whether products of such factors are rounded to their dtype: NVIDIA's GPUs can return the float32 sums."""
    return x.dtype != torch.float32 and not (x.is_cuda and torch.version.cuda is not None)


def _product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return a @ b if a.dtype == torch.float32 or rounds(a) else torch.mm(a, b, out_dtype=torch.float32)


class _ChunkedSum(torch.autograd.Function):
    """x [N, C], weight [V, C], targets [N] -> the sum of the cross-entropies; the gradients are made in forward()."""

    @staticmethod
    def forward(ctx, x, weight, targets, softcap, kernel):
        rows = chunk_rows(x.device.type, len(weight), kernel is not chunk_gradient)
        divide = rounds(x)  # dividing the products instead saves a pass over the logits, but rounds once more
        cast = weight.to(x.dtype)
        dx = torch.empty_like(x)
        dw = torch.zeros(weight.shape, dtype=weight.dtype, device=x.device)
        loss = torch.zeros((), dtype=weight.dtype, device=x.device)
        memory = x.new_empty(min(len(x), rows), len(weight))  # reused by every chunk for its logits

        for start in range(0, x.size(0), rows):
            xs, ys = x[start : start + rows], targets[start : start + rows]
            logits = torch.mm(xs, cast.t(), out=memory[: len(xs)])

            valid, column = (ys != IGNORED)[:, None], ys.clamp(min=0)[:, None]
            own = torch.tanh(upcast(logits.gather(1, column)) / softcap)
            gradient, total = kernel(logits, softcap, divide)
            loss += torch.where(valid, total.log() + softcap - own * softcap, 0.0).sum()

            size = torch.ones_like(total) if divide else total  # the factor that the gradient still has
            place = torch.arange(len(ys), device=ys.device), column[:, 0]  # a bfloat16 scatter would copy the chunk
            gradient[place] += ((own * own - 1) * size)[:, 0].to(gradient.dtype)

            scale = torch.where(valid, 1 / size, 0.0)
            dx[start : start + rows] = _product(gradient, cast) * scale
            scaled = (xs * scale).to(xs.dtype)
            if scaled.dtype == dw.dtype:
                dw.addmm_(gradient.t(), scaled)
            else:
                dw += _product(gradient.t(), scaled)
            del gradient

        ctx.save_for_backward(dx, dw)
        return loss

    @staticmethod
    def backward(ctx, scale):
        dx, dw = ctx.saved_tensors
        return dx * scale.to(dx.dtype), dw * scale, None, None, None
