"""Causal attention behind one signature: a chosen GPU kernel, blocked matmuls on a CPU, or torch's SDPA."""

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from nanochat.model.cpu_attention import blocked_causal_attention
from nanochat.model.gpu_attention import Kernel, Mask, visible

SDPA_BLOCK = 128  # the fewest queries that are computed at a time in a layer with a window


def causal_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    window: int | None = None,
    mask: Mask = None,
    bound: float = float("inf"),
    kernel: Kernel | None = None,
) -> torch.Tensor:
    """q [B, T, H, D], k and v [B, S, H_kv, D] with S >= T -> [B, T, H, D].

    The queries are the last T of the S positions; each sees its own position and all before, or only `window` positions
    before. H_kv divides H. mask: from document_masks(), for this window. bound: the largest |q k / sqrt(D)|, where it
    is known. kernel: trains such layers, see Kernels.attention.
    """
    if torch.is_grad_enabled() and k.size(1) == q.size(1):  # training
        if kernel is not None:
            return kernel(q, k, v, window, mask)
        if q.device.type == "cpu":
            return blocked_causal_attention(q, k, v, window, bound, mask)
    return sdpa(q, k, v, window, mask)


def sdpa(q, k, v, window: int | None = None, begins: torch.Tensor | None = None) -> torch.Tensor:
    """causal_attention() by torch's scaled_dot_product_attention, in memory proportional to the window.

    begins: int [B, T], where each query's document begins among the S positions; without a window its mask takes
    B T S bytes.
    """
    T, S = q.size(1), k.size(1)
    first = 0  # position of the first key
    if window is not None:
        step = max(window, SDPA_BLOCK)
        if step < T:
            out, end = [], S - T
            for n, part in enumerate(q.split(step, dim=1)):
                end += part.size(1)
                own = None if begins is None else begins[:, n * step : n * step + part.size(1)]
                out.append(sdpa(part, k[:, :end], v[:, :end], window, own))
            return torch.cat(out, dim=1)
        first = max(0, S - T - window)  # the first query sees furthest back
        k, v = k[:, first:], v[:, first:]

    q, k, v = (z.transpose(1, 2) for z in (q, k, v))
    causal, mask = T == S > 1 and begins is None and (window is None or window >= S - 1), None
    # A mask is for several new tokens behind a cache, for windows and documents; a single token sees all keys.
    if begins is not None or (T > 1 and not causal):
        place = torch.arange(first, S, device=q.device)
        mask = visible(place[-T:, None], place, window, None if begins is None else begins[:, None, :, None])

    grouped = q.size(1) != k.size(1)
    if grouped and mask is not None and q.device.type == "cuda":  # torch has no kernel for it that saves memory
        k, v = (z.repeat_interleave(q.size(1) // z.size(1), dim=1) for z in (k, v))
        grouped = False

    with kernels_for(q.device, many_shapes=k.size(2) != T):
        out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=grouped)
    return out.transpose(1, 2)


def kernels_for(device: torch.device, many_shapes: bool) -> AbstractContextManager:
    """Context that allows all of torch's kernels, but on a GPU with many shapes not cuDNN's.

    cuDNN makes a plan for every new shape, which took 50 ms on an H200. many_shapes: each call has another shape, as
    tokens behind a cache have, and batches of prompts or sounds that are scored.
    """
    if device.type != "cuda" or not many_shapes:
        return nullcontext()
    return sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])
