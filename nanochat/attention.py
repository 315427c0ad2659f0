"""Causal attention behind one signature: blocked matmuls on the CPU, torch's fused kernels elsewhere."""

import torch
import torch.nn.functional as F

CPU_BLOCK = 128  # queries a block; smaller blocks skip more of the masked half, larger ones make better matmuls


def wide(x: torch.Tensor) -> torch.Tensor:
    """float32 where it was narrower: what sums and exponentials are computed in."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def causal_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int | None = None) -> torch.Tensor:
    """q [B, T, H, D], k and v [B, S, H_kv, D] with S >= T -> [B, T, H, D].

    The queries are the last T of the S positions, each sees its own position and everything before, or only `window`
    positions before. H_kv divides H.
    """
    if q.device.type == "cpu" and torch.is_grad_enabled() and k.size(1) == q.size(1):
        return blocked_causal_attention(q, k, v, window)
    if window is not None:  # no query sees what lies further back than the first one does
        k, v = (z[:, -(q.size(1) + window) :] for z in (k, v))
    q, k, v = (z.transpose(1, 2) for z in (q, k, v))
    T, S = q.size(2), k.size(2)
    gqa = q.size(1) != k.size(1)
    if T == 1:  # one new token sees the whole cache
        out = F.scaled_dot_product_attention(q, k, v, enable_gqa=gqa)
    elif T == S and (window is None or window >= S - 1):
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa)
    else:  # several new tokens behind a cache, or a window
        mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
        mask = mask if window is None else mask.triu(S - T - window)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=gqa)
    return out.transpose(1, 2)


def blocked_causal_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int | None = None
) -> torch.Tensor:
    """The same for S = T from plain matmuls: a block of queries multiplies only the keys that one of them sees.

    On CPUs the backward of the fused kernel is slow, and this skips nearly half of the square (measured in dev/LOG.md).
    """
    B, T, H, D = q.shape
    if k.size(2) != H:
        k, v = (z.repeat_interleave(H // z.size(2), dim=2) for z in (k, v))
    q, k, v = (z.transpose(1, 2).reshape(B * H, T, D) for z in (q, k, v))
    out = []
    for start in range(0, T, CPU_BLOCK):
        end = min(start + CPU_BLOCK, T)
        first = 0 if window is None else max(0, start - window)
        scores = wide(torch.bmm(q[:, start:end], k[:, first:end].transpose(1, 2))) * D**-0.5
        square = torch.ones(end - start, end - first, dtype=torch.bool, device=q.device)
        hidden = square.triu(start - first + 1)
        if window is not None:
            hidden = hidden | square.tril(start - first - window - 1)
        weights = scores.masked_fill(hidden, -float("inf")).softmax(dim=-1)
        out.append(torch.bmm(weights.to(v.dtype), v[:, first:end]))
    return torch.cat(out, dim=1).view(B, H, T, D).transpose(1, 2)
