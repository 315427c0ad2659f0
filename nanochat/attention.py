"""Causal attention behind one signature: blocked matmuls on a CPU, what attention_kernels chose on a GPU, or SDPA."""

import torch
import torch.nn.functional as F

from nanochat.attention_kernels import Mask, chosen, visible

CPU_BLOCK = 128  # queries a block; smaller blocks skip more of the masked half, larger ones make better matmuls


def wide(x: torch.Tensor) -> torch.Tensor:
    """float32 where it was narrower: what sums and exponentials are computed in."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def causal_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int | None = None, mask: Mask = None
) -> torch.Tensor:
    """q [B, T, H, D], k and v [B, S, H_kv, D] with S >= T -> [B, T, H, D].

    The queries are the last T of the S positions, each sees its own position and everything before, or only `window`
    positions before. H_kv divides H. mask: that of document_masks() for this window, where T = S.
    """
    if torch.is_grad_enabled() and k.size(1) == q.size(1):  # training
        kernel = chosen.get((q.device.type, window is not None))
        if kernel is not None:
            return kernel(q, k, v, window, mask)
        if q.device.type == "cpu" and mask is None:
            return blocked_causal_attention(q, k, v, window)
    return sdpa(q, k, v, window, mask)


def sdpa(q, k, v, window: int | None = None, mask: torch.Tensor | None = None) -> torch.Tensor:
    """causal_attention() by torch's kernels for scaled dot products, in memory proportional to the window."""
    T, S = q.size(1), k.size(1)
    if window is not None and mask is None:
        step = max(window, CPU_BLOCK)
        if step < T:
            out, end = [], S - T
            for part in q.split(step, dim=1):
                end += part.size(1)
                out.append(sdpa(part, k[:, :end], v[:, :end], window))
            return torch.cat(out, dim=1)
        k, v = (z[:, -(T + window) :] for z in (k, v))  # no query sees what lies further back than the first one does
        S = k.size(1)
    q, k, v = (z.transpose(1, 2) for z in (q, k, v))
    causal = T == S > 1 and mask is None and (window is None or window >= S - 1)
    if not causal and mask is None and T > 1:  # several new tokens behind a cache, or a window; one sees all there is
        place = torch.arange(S, device=q.device)
        mask = visible(place[S - T :, None], place, window)
    out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=q.size(1) != k.size(1))
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
