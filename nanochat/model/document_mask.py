"""Documents in rows of ids: where each begins, and the masks that keep attention within a document.

start: the id that begins a document, GPTConfig.document_start; None in a model without document boundaries.
"""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import torch

from nanochat.model.gpu_attention import BLOCK, Kernel, Mask, flex, visible

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


def document_begins(idx: torch.Tensor, start: int | None, kv_cache=None) -> torch.Tensor | None:
    """idx int64 [B, T] -> int64 [B, T], the position at which each token's document begins, 0 where it is unknown."""
    if start is None:
        return None
    place = torch.arange(idx.size(1), device=idx.device) + (0 if kv_cache is None else kv_cache.position)
    before = 0 if kv_cache is None else kv_cache.document_begin
    return torch.where(idx == start, place, before).cummax(dim=1).values


def previous(
    x: torch.Tensor, last: torch.Tensor | None, idx: torch.Tensor, start: int | None, nothing: int
) -> torch.Tensor:
    """x [B, T, ...] of the tokens idx [B, T] -> x of the token before each, `nothing` at the start of a document.

    last: x of the token before the first [B, 1, ...]; None: there is none.
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
    """begins int [B, T], never decreasing along a row -> the blocks that FlexAttention computes, and those of them that
    need no mask.

    The result of torch's create_block_mask(), which would compute the mask of all T x T scores; here the memory is that
    of the blocks.
    """
    from torch.nn.attention.flex_attention import BlockMask

    T = begins.size(1)
    first = torch.arange(0, T, BLOCK, device=begins.device)  # position of each block
    last = (first + BLOCK - 1).clamp(max=T - 1)

    # A block is needed if its most favourable pair is visible (first query, last key: least begin, least distance), and
    # needs no mask if its least favourable pair is (last query, first key).
    query, key = first[:, None], last[None]
    needed = (first[None] <= last[:, None]) & (key >= begins[:, first, None])
    full = (last[None] < query) & (first[None] >= begins[:, last, None])
    if window is not None:
        needed = needed & (query - key <= window)
        full = full & (last[:, None] - first[None] <= window)
    full = full & (last - first == BLOCK - 1)[:, None]  # a block beyond the end of the rows is masked

    blocks = []
    for kind in (needed & ~full, full):
        order = kind.int().argsort(dim=-1, descending=True, stable=True)
        blocks += [kind.sum(-1, dtype=torch.int32)[:, None], order.int()[:, None]]
    return BlockMask.from_kv_blocks(
        *blocks,
        BLOCK_SIZE=BLOCK,
        seq_lengths=(T, T),
        mask_mod=lambda b, h, query, key: visible(query, key, window, begins[b, query]),
    )
