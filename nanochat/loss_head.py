"""From features to the loss without ever holding all logits.

Rows are worked off in chunks. In training the gradients of a chunk are made right after its loss, while its logits
are still in the cache, so the backward pass only scales them (the idea of Liger and of "cut your losses",
arXiv 2411.09009). Softcapped logits are bounded, which saves the pass that looks for their maximum.
"""

import torch
import torch.nn.functional as F

from nanochat.attention import wide
from nanochat.modality import IGNORED

# Rows whose logits are alive at a time: on a CPU so few that they stay in the cache of the cores.
CHUNK_ROWS = {"cpu": 128}
CHUNK_ROWS_DEFAULT = 4096


def softcapped(logits: torch.Tensor, softcap: float = 15.0) -> torch.Tensor:
    """Squash logits smoothly into (-softcap, softcap) (Gemma 2, arXiv 2408.00118)."""
    return softcap * torch.tanh(logits / softcap)


def chunked_cross_entropy(
    x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, reduction: str = "mean", softcap: float = 15.0
) -> torch.Tensor:
    """Cross-entropy in nats of softcapped logits x @ weight.T, float32.

    x [N, C] features, weight [V, C] master weight, targets int64 [N], -100 ignored. "mean" divides by the number of
    valid targets and is 0 without any, "sum" does not; "none" returns [N] and has no gradient.
    """
    if reduction == "none" or not torch.is_grad_enabled():
        rows = CHUNK_ROWS.get(x.device.type, CHUNK_ROWS_DEFAULT)
        cast = weight.to(x.dtype)
        parts = [
            F.cross_entropy(softcapped(wide(F.linear(xs, cast)), softcap), ys, reduction="none")
            for xs, ys in zip(x.split(rows), targets.split(rows), strict=True)
        ]
        losses = torch.cat(parts)
        if reduction == "none":
            return losses
        total = losses.sum()
    else:
        total = _ChunkedSum.apply(x, weight, targets, softcap)
    return total if reduction == "sum" else total / (targets != IGNORED).sum().clamp(min=1)


def token_losses(x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, softcap: float = 15.0) -> torch.Tensor:
    """Cross-entropy in nats of each target, [N], with a gradient where one is wanted."""
    if not torch.is_grad_enabled():
        return chunked_cross_entropy(x, weight, targets, "none", softcap)
    return F.cross_entropy(softcapped(wide(F.linear(x, weight.to(x.dtype))), softcap), targets, reduction="none")


def _chunk_gradient(logits: torch.Tensor, targets: torch.Tensor, softcap: float) -> tuple[torch.Tensor, ...]:
    """logits [n, V] before the cap, targets [n] -> what is left of the gradient of the summed loss to them.

    Returns (softmax part of the gradient [n, V], target columns [n, 1], what to subtract there [n, 1], summed loss):
    the target's own term touches one entry a row, and is cheaper to subtract afterwards than to compare for.
    """
    squashed = 2 * torch.sigmoid(wide(logits) * (2 / softcap)) - 1  # tanh(logits / softcap), vectorised everywhere
    exps = torch.exp(squashed * softcap - softcap)
    total = exps.sum(dim=-1, keepdim=True)
    valid = (targets != IGNORED)[:, None]
    column = targets.clamp(min=0)[:, None]
    at_target = squashed.gather(1, column)
    losses = torch.where(valid, total.log() + softcap - at_target * softcap, 0.0)
    gradient = exps * torch.where(valid, 1 / total, 0.0) * (1 - squashed * squashed)
    own = torch.where(valid, 1 - at_target * at_target, 0.0)
    return gradient.to(logits.dtype), column, own.to(logits.dtype), losses.sum()


class _ChunkedSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, targets, softcap):
        rows = CHUNK_ROWS.get(x.device.type, CHUNK_ROWS_DEFAULT)
        cast = weight.to(x.dtype)
        dx = torch.empty_like(x)
        dw = torch.zeros(weight.shape, dtype=weight.dtype, device=x.device)
        total = torch.zeros((), dtype=weight.dtype, device=x.device)
        for start in range(0, x.size(0), rows):
            xs, ys = x[start : start + rows], targets[start : start + rows]
            count = xs.size(0)
            if count < rows and chunk_gradient is not _chunk_gradient:  # compiled: for one shape
                xs, ys = F.pad(xs, (0, 0, 0, rows - count)), F.pad(ys, (0, rows - count), value=IGNORED)
            gradient, column, own, loss = chunk_gradient(xs @ cast.t(), ys, softcap)
            gradient.scatter_add_(1, column, -own)
            total += loss
            dx[start : start + count] = (gradient @ cast)[:count]
            if gradient.dtype == dw.dtype:
                dw.addmm_(gradient.t(), xs)
            else:
                dw += gradient.t() @ xs
        ctx.save_for_backward(dx, dw)
        return total

    @staticmethod
    def backward(ctx, scale):
        dx, dw = ctx.saved_tensors
        return dx * scale.to(dx.dtype), dw * scale, None, None


chunk_gradient = _chunk_gradient  # base_train replaces it by a compiled one: see compile_loss_head


def compile_loss_head(on: bool) -> None:
    """Fuse the elementwise part of every chunk with torch.compile, or undo it; results change by rounding only."""
    global chunk_gradient
    chunk_gradient = torch.compile(_chunk_gradient, dynamic=False) if on else _chunk_gradient
