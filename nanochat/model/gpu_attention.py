"""Kernels that train attention on a GPU: training/kernel_selection.py chooses among them.

All take q [B, T, H, D], k and v [B, T, H_kv, D] with H_kv dividing H, the window (None: all previous positions) and the
documents' mask (None: no boundaries), and return [B, T, H, D]. They raise for what they do not support. FlashAttention
(arXiv 2307.08691, 2407.08608) is used where it is installed; FlexAttention (arXiv 2412.05496) is torch's.
"""

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

Kernel = Callable[..., torch.Tensor]
Mask = "torch.Tensor | BlockMask | None"  # of the documents, as document_masks() makes it
BLOCK = 128  # queries, and keys, of a block of FlexAttention
block_masks: dict[tuple, "BlockMask"] = {}  # cache of FlexAttention's masks, by length, window and device


def visible(query: torch.Tensor, key: torch.Tensor, window: int | None, begin=None) -> torch.Tensor:
    """Whether the query at one position sees the key at another; begin: the first position of the query's document."""
    seen = key <= query if window is None else (key <= query) & (query - key <= window)
    return seen if begin is None else seen & (key >= begin)


def flash_attention_3(q, k, v, window: int | None, mask: Mask = None) -> torch.Tensor:
    """Of the package flash_attn_interface."""
    from flash_attn_interface import flash_attn_func

    return _flash(flash_attn_func, q, k, v, window, mask)


def flash_attention_2(q, k, v, window: int | None, mask: Mask = None) -> torch.Tensor:
    """Of the package flash_attn."""
    from flash_attn import flash_attn_func

    return _flash(flash_attn_func, q, k, v, window, mask)


def _flash(function: Callable, q, k, v, window: int | None, mask: Mask) -> torch.Tensor:
    if mask is not None:
        raise NotImplementedError("it has no document boundaries")
    out = function(
        q,
        k,
        v,
        causal=True,
        window_size=(-1 if window is None else window, 0),
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    return out[0] if isinstance(out, tuple) else out  # older versions return the log-sum-exp too


def cudnn(q, k, v, window: int | None, mask: Mask = None) -> torch.Tensor:
    from torch.nn.attention import SDPBackend

    return _sdpa(SDPBackend.CUDNN_ATTENTION, q, k, v, window, mask)


def torch_flash(q, k, v, window: int | None, mask: Mask = None) -> torch.Tensor:
    from torch.nn.attention import SDPBackend

    if window is None or mask is not None:
        return _sdpa(SDPBackend.FLASH_ATTENTION, q, k, v, window, mask)
    # The kernel's windows are not documented by torch: if they change, the trial of kernel_selection notices.
    length = q.size(1)
    return torch.ops.aten._flash_attention_forward(
        q, k, v, None, None, length, length, 0.0, True, False, window_size_left=window, window_size_right=0
    )[0]


def _sdpa(backend, q, k, v, window: int | None, mask: Mask) -> torch.Tensor:
    from torch.nn.attention import sdpa_kernel

    if window is not None or mask is not None:
        raise NotImplementedError("it has neither windows nor document boundaries")
    q, k, v = (z.transpose(1, 2) for z in (q, k, v))
    with sdpa_kernel(backend):
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.size(1) != k.size(1))
    return out.transpose(1, 2)


def flex(q, k, v, window: int | None, mask: Mask = None) -> torch.Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    if mask is None:
        mask = block_mask(q.size(1), window, q.device)
    run = flex_attention if torch.compiler.is_compiling() else compiled_flex()
    q, k, v = (z.transpose(1, 2) for z in (q, k, v))
    return run(q, k, v, block_mask=mask, enable_gqa=q.size(1) != k.size(1)).transpose(1, 2)


@cache
def compiled_flex() -> Callable:
    """For callers outside a compiled block: uncompiled, flex_attention would hold all scores."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def block_mask(length: int, window: int | None, device: torch.device) -> "BlockMask":
    """The blocks of 128 x 128 scores that FlexAttention computes; cached, unless a compiled graph is building it."""
    from torch.nn.attention.flex_attention import create_block_mask

    if (length, window, device) in block_masks:
        return block_masks[length, window, device]
    mask = create_block_mask(lambda b, h, q, k: visible(q, k, window), None, None, length, length, device=device)
    if not torch.compiler.is_compiling():
        block_masks[length, window, device] = mask
    return mask
