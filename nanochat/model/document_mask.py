"""Documents in rows of ids: where each begins, and what keeps them apart in a model that is told to.

start: the id that begins a document, GPTConfig.document_start; None where the model knows no documents.
"""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import torch

from nanochat.model.gpu_attention import BLOCK, Kernel, Mask, flex, visible

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


def document_begins(idx: torch.Tensor, start: int | None, kv_cache=None) -> torch.Tensor | None:
    """idx int64 [B, T] -> int64 [B, T], the position at which each token's document begins, 0 if that is not known."""
    if start is None:
        return None
    place = torch.arange(idx.size(1), device=idx.device) + (0 if kv_cache is None else kv_cache.position)
    begun = 0 if kv_cache is None else kv_cache.begun
    return torch.where(idx == start, place, begun).cummax(dim=1).values


def previous(
    x: torch.Tensor, last: torch.Tensor | None, idx: torch.Tensor, start: int | None, nothing: int
) -> torch.Tensor:
    """x [B, T, ...] of the tokens idx [B, T] -> that of the token before each, `nothing` where there is none.

    last: that of the token before the first [B, 1, ...]. A token of another document is none.
    """
    first = torch.full_like(x[:, :1], nothing) if last is None else last
    before = torch.cat([first, x[:, :-1]], dim=1)
    if start is None:
        return before
    starts = idx == start
    return before.masked_fill(starts if x.ndim == 2 else starts[..., None], nothing)


def document_masks(
    begins: torch.Tensor | None,
    windows: Iterable[int | None],
    attention: Mapping[bool, Kernel] | None = None,
    cached: bool = False,
) -> dict[int | None, Mask]:
    """{window: mask} that the layers of one forward pass share, so that tokens see only their own document.

    begins int [B, T]: position of the first token of each token's document; None: there are no boundaries. Kernels take
    begins itself as the mask, except FlexAttention, which trains with a BlockMask. attention: Kernels.attention of the
    model. cached: keys come from a cache.
    """
    masks = {}
    training = torch.is_grad_enabled() and not cached
    for window in set(windows):
        kernel = attention.get(window is not None) if attention and training else None
        masks[window] = document_block_mask(begins, window) if kernel is flex and begins is not None else begins
    return masks


def document_block_mask(begins: torch.Tensor, window: int | None) -> "BlockMask":
    """begins int [B, T], which never decreases along a row -> which blocks FlexAttention computes, and which of them
    without looking at each score.

    What create_block_mask would find after computing all T x T scores' masks, in memory for the blocks alone.
    """
    from torch.nn.attention.flex_attention import BlockMask

    T = begins.size(1)
    first = torch.arange(0, T, BLOCK, device=begins.device)  # position of each block
    last = (first + BLOCK - 1).clamp(max=T - 1)
    query, key = first[:, None], last[None]  # the pair of a block that sees best: least begin, least distance
    seen = (first[None] <= last[:, None]) & (key >= begins[:, first, None])
    whole = (last[None] < query) & (first[None] >= begins[:, last, None])  # the pair that sees worst
    if window is not None:
        seen = seen & (query - key <= window)
        whole = whole & (last[:, None] - first[None] <= window)
    whole = whole & (last - first == BLOCK - 1)[:, None]  # rows that end within a block are looked at
    blocks = []
    for some in (seen & ~whole, whole):
        order = some.int().argsort(dim=-1, descending=True, stable=True)
        blocks += [some.sum(-1, dtype=torch.int32)[:, None], order.int()[:, None]]
    return BlockMask.from_kv_blocks(
        *blocks,
        BLOCK_SIZE=BLOCK,
        seq_lengths=(T, T),
        mask_mod=lambda b, h, query, key: visible(query, key, window, begins[b, query]),
    )
