"""From features to the loss without ever holding all logits.

Rows are worked off in chunks. In training the gradients of a chunk are made right after its loss, while its logits
are still in the cache, so the backward pass only scales them (the idea of Liger and of "cut your losses",
arXiv 2411.09009). Softcapped logits are bounded, which saves the pass that looks for their maximum.
"""

import torch
import torch.nn.functional as F

SOFTCAP = 15.0
CHUNK_ROWS = {"cpu": 512}  # rows whose logits are alive at a time
CHUNK_ROWS_DEFAULT = 4096


def softcapped(logits: torch.Tensor) -> torch.Tensor:
    """Squash logits smoothly into (-15, 15) (Gemma 2, arXiv 2408.00118)."""
    return SOFTCAP * torch.tanh(logits / SOFTCAP)


def chunked_cross_entropy(
    x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, reduction: str = "mean"
) -> torch.Tensor:
    """Cross-entropy in nats of softcapped logits x @ weight.T, float32.

    x [N, C] features, weight [V, C] master weight, targets int64 [N], -100 ignored. "mean" divides by the number of
    valid targets and is 0 without any, "sum" does not; "none" returns [N] and has no gradient.
    """
    if reduction == "none" or not torch.is_grad_enabled():
        rows = CHUNK_ROWS.get(x.device.type, CHUNK_ROWS_DEFAULT)
        cast = weight.to(x.dtype)
        parts = [
            F.cross_entropy(softcapped(F.linear(xs, cast).float()), ys, reduction="none")
            for xs, ys in zip(x.split(rows), targets.split(rows), strict=True)
        ]
        losses = torch.cat(parts)
        if reduction == "none":
            return losses
        total = losses.sum()
    else:
        total = _ChunkedSum.apply(x, weight, targets)
    return total if reduction == "sum" else total / (targets != -100).sum().clamp(min=1)


def _chunk_gradient(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """logits [n, V] before the cap, targets [n] -> (gradient of the summed loss to them, summed loss float32)."""
    squashed = torch.tanh(logits.float() / SOFTCAP)
    capped = squashed * SOFTCAP
    exps = torch.exp(capped - SOFTCAP)
    total = exps.sum(dim=-1, keepdim=True)
    valid = (targets != -100)[:, None]
    column = targets.clamp(min=0)[:, None]
    losses = torch.where(valid, total.log() + SOFTCAP - capped.gather(1, column), 0.0)
    hit = torch.arange(logits.size(1), device=logits.device)[None] == column
    gradient = (exps / total - hit.float()) * (1 - squashed * squashed)
    return torch.where(valid, gradient, 0.0).to(logits.dtype), losses.sum()


class _ChunkedSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, targets):
        rows = CHUNK_ROWS.get(x.device.type, CHUNK_ROWS_DEFAULT)
        cast = weight.to(x.dtype)
        dx = torch.empty_like(x)
        dw = torch.zeros(weight.shape, dtype=torch.float32, device=x.device)
        total = torch.zeros((), dtype=torch.float32, device=x.device)
        for start in range(0, x.size(0), rows):
            part = slice(start, start + rows)
            gradient, loss = chunk_gradient(x[part] @ cast.t(), targets[part])
            total += loss
            torch.mm(gradient, cast, out=dx[part])
            if gradient.dtype == torch.float32:
                dw.addmm_(gradient.t(), x[part])
            else:
                dw += gradient.t() @ x[part]
        ctx.save_for_backward(dx, dw)
        return total

    @staticmethod
    def backward(ctx, scale):
        dx, dw = ctx.saved_tensors
        return dx * scale.to(dx.dtype), dw * scale, None


chunk_gradient = _chunk_gradient  # base_train replaces it by a compiled one: see compile_loss_head


def compile_loss_head(on: bool) -> None:
    """Fuse the elementwise part of every chunk with torch.compile, or undo it; results change by rounding only."""
    global chunk_gradient
    chunk_gradient = torch.compile(_chunk_gradient, dynamic=False) if on else _chunk_gradient
