"""Causal attention for training on a CPU: matmuls of blocks of queries with all keys that any of them sees.

torch's fused kernel has a slow backward pass there, and blocks skip what would be masked: nearly half of the square, or
all but the window (measured in dev/LOG.md). Each direction makes one pass over the scores: normalised queries and keys
have bounded scores, so their exponentials need no row maximum, and the outputs are divided instead of the weights.
"""

import torch
import torch.nn.functional as F

SAFE_BOUND = 60.0  # exp(60) times a million keys is finite in float32, and exp(-60) not yet denormal


def upcast(x: torch.Tensor) -> torch.Tensor:
    """x in float32 if its dtype is narrower, for sums and exponentials."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def blocks(length: int, window: int | None = None) -> list[tuple[int, int, int]]:
    """(first query, end, first key that any of them sees) of each block of queries; the keys end with the queries.

    At most eight blocks, so that they compile in seconds, of at least 64 queries each, for efficient matmuls.
    """
    size = max(64, -(-length // 512) * 64)
    starts = range(0, length, size)
    return [(s, min(s + size, length), 0 if window is None else max(0, s - window)) for s in starts]


def blocked_causal_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    window: int | None = None,
    bound: float = float("inf"),
    begins: torch.Tensor | None = None,
) -> torch.Tensor:
    """q [B, T, H, D], k and v [B, T, H_kv, D] -> [B, T, H, D]; each position sees itself and what comes before.

    window: number of positions before its own that a query sees. bound: the largest |q k / sqrt(D)|, if that is known.
    begins: int [B, T], the first position that each query sees.
    """
    B, T, H, D = q.shape
    if begins is not None:
        begins = begins[:, None].expand(B, H, T).reshape(B * H, T)
    if k.size(2) != H:
        k, v = (z.repeat_interleave(H // z.size(2), dim=2) for z in (k, v))
    q, k, v = (z.transpose(1, 2).reshape(B * H, T, D) for z in (q, k, v))
    return _Blocked.apply(q, k, v, window, bound, begins).view(B, H, T, D).transpose(1, 2)


class _Blocked(torch.autograd.Function):
    """q, k, v [N, T, D] -> [N, T, D]. Saves the weights from before the division by their sums."""

    @staticmethod
    def forward(ctx, q, k, v, window, bound, begins):
        outputs, weights, sums = [], [], []
        for start, end, first in blocks(q.size(1), window):
            scores = upcast(torch.bmm(q[:, start:end], k[:, first:end].transpose(1, 2))) * q.size(2) ** -0.5

            square = torch.ones(end - start, end - first, dtype=torch.bool, device=q.device)
            hidden = square.triu(start - first + 1)
            if window is not None:
                hidden = hidden | square.tril(start - first - window - 1)
            if begins is not None:
                hidden = hidden | (torch.arange(first, end, device=q.device) < begins[:, start:end, None])

            if bound > SAFE_BOUND:
                scores = scores - scores.masked_fill(hidden, -float("inf")).amax(dim=-1, keepdim=True)
            w = torch.exp(scores).masked_fill(hidden, 0.0)
            sums.append(w.sum(dim=-1, keepdim=True))
            weights.append(w.to(v.dtype))
            outputs.append(upcast(torch.bmm(weights[-1], v[:, first:end])) / sums[-1])

        out, total = torch.cat(outputs, dim=1).to(v.dtype), torch.cat(sums, dim=1)
        ctx.save_for_backward(q, k, v, out, total, *weights)
        ctx.window = window
        return out

    @staticmethod
    def backward(ctx, grad):
        """With P = W / total: dV = P^T g, dS = P (g V^T - rowsum(g out)), and g / total takes the division for both."""
        q, k, v, out, total, *weights = ctx.saved_tensors
        T = q.size(1)
        grad = upcast(grad) / total
        mean = (grad * upcast(out)).sum(dim=-1, keepdim=True)
        grad = grad.to(v.dtype)

        dq, dk, dv = [], 0.0, 0.0
        for (start, end, first), w in zip(blocks(T, ctx.window), weights, strict=True):
            g, place = grad[:, start:end], (0, 0, first, T - end)
            ds = upcast(torch.bmm(g, v[:, first:end].transpose(1, 2))) - mean[:, start:end]
            ds = (upcast(w) * ds * q.size(2) ** -0.5).to(q.dtype)
            dq.append(torch.bmm(ds, k[:, first:end]))
            dk = dk + F.pad(torch.bmm(ds.transpose(1, 2), q[:, start:end]), place)
            dv = dv + F.pad(torch.bmm(w.transpose(1, 2), g), place)
        return torch.cat(dq, dim=1), dk, dv, None, None, None
