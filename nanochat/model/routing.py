"""Tokens to the experts of their modalities: planned once a forward from the ids, used by all layers.

Four ways with the same results. sort: tokens of a modality side by side, each expert on its own (the default).
where: every expert on every token, static shapes. slice: all rows have the same layout, as captions of one length have;
nothing moves. grouped: as sort, all experts in one kernel, torch's grouped_mm, without asking the device for counts.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from nanochat.modality import IGNORED
from nanochat.system.environment import UserError

ROUTES = ("sort", "where", "slice", "grouped")
Expert = Callable[[torch.Tensor], torch.Tensor]  # [..., C] -> [..., C']
# Rows of zeros behind the tokens of each expert in training: no expert is without rows, so that all have gradients,
# and no size is 0 or 1, for which torch.compile would compile anew.
PADDING = 2


class Sorted(NamedTuple):
    """perm int64 [N + padding]: tokens by modality. inverse undoes it. counts: tensors [n_e] whose lengths count."""

    perm: torch.Tensor
    inverse: torch.Tensor
    counts: tuple[torch.Tensor, ...]
    padding: int


class Masks(NamedTuple):
    modality: torch.Tensor  # [B, T]


class Slices(NamedTuple):
    segments: tuple[tuple[int, int, int], ...]  # (expert, start, end) along T


class Grouped(NamedTuple):
    perm: torch.Tensor  # int64 [N]
    inverse: torch.Tensor
    ends: torch.Tensor  # int32 [E], on the device


Plan = Sorted | Masks | Slices | Grouped


def plan_route(kind: str, modality: torch.Tensor, experts: int, compiled: bool = False, multiple: int = 1) -> Plan:
    """How the tokens of modality [B, T] (0 .. experts - 1) get to their experts; `slice` may raise UserError.

    compiled: the plan is for a compiled block, which should not be compiled anew for other numbers of tokens.
    multiple: of which the rows of each expert are one in training under `sort`, as FP8 wants it.
    """
    assert kind in ROUTES, kind
    training = torch.is_grad_enabled()
    if kind == "where":
        return Masks(modality)
    if kind == "slice":
        return Slices(_segments(modality, experts))
    flat = modality.flatten()
    if kind == "grouped":
        perm, inverse = sorted_by(flat)
        of_each = (flat[:, None] == torch.arange(experts, device=flat.device)).sum(0)  # bincount would ask the device
        return Grouped(perm, inverse, of_each.cumsum(0).to(torch.int32))
    counts = torch.bincount(flat, minlength=experts).tolist()  # the one look at the device
    added = [0] * experts
    if training:
        added = [PADDING] * experts if multiple == 1 else _padding_to(multiple, counts)
        numbers, repeats = torch.arange(experts, device=flat.device), torch.tensor(added, device=flat.device)
        flat = torch.cat([flat, numbers.repeat_interleave(repeats, output_size=sum(added)).to(flat.dtype)])
    perm, inverse = sorted_by(flat)
    counts = [count + more for count, more in zip(counts, added, strict=True)]
    rows = tuple(perm.new_empty(count) for count in counts)
    if compiled:
        for row in rows:
            torch._dynamo.mark_dynamic(row, 0)
    return Sorted(perm, inverse, rows, sum(added))


def _padding_to(multiple: int, counts: list[int]) -> list[int]:
    """Rows to add to each expert's, at least PADDING, so that all have multiples; their sum depends on that of the
    counts alone, so that batches of one size keep one size, for which a compiled block was compiled."""
    added = [PADDING + -(count + PADDING) % multiple for count in counts[:-1]]
    total = (len(counts) + len(counts) // multiple + 1) * multiple + -sum(counts) % multiple
    return [*added, total - sum(added)]


def sorted_by(flat: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The stable permutation that sorts flat [N], and the one that undoes it."""
    perm = flat.argsort(stable=True)
    inverse = torch.empty_like(perm).scatter_(0, perm, torch.arange(len(perm), device=perm.device))
    return perm, inverse


def by_target(
    x: torch.Tensor, targets: torch.Tensor, head_of_id: torch.Tensor, heads: list[tuple[int, torch.Tensor]]
) -> tuple[list[tuple], torch.Tensor]:
    """x [N, C], targets [N] -> for each head (its targets' features, its matrix, the targets within that).

    heads: (first id, output matrix) of each modality. And what brings the parts, one behind the other, back in order.
    """
    modality = head_of_id[targets.clamp(min=0)].long().masked_fill(targets == IGNORED, len(heads))
    perm, inverse = sorted_by(modality)
    sizes = torch.bincount(modality, minlength=len(heads) + 1).tolist()
    features, wanted = permute(x, perm, inverse).split(sizes), targets[perm].split(sizes)
    return [(features[i], matrix, wanted[i] - first) for i, (first, matrix) in enumerate(heads)], inverse


def _segments(modality: torch.Tensor, experts: int) -> tuple[tuple[int, int, int], ...]:
    rows = modality.tolist() or [[0] * modality.size(1)]
    for number, row in enumerate(rows):
        if row != rows[0]:
            place = next(i for i, (a, b) in enumerate(zip(row, rows[0], strict=True)) if a != b)
            raise UserError(
                f"route=slice needs rows of one layout: row {number} differs from row 0 at position {place}; "
                "use --route=sort (the loader of base_train takes rows of one layout only)"
            )
    segments, start = [], 0
    for end in range(1, len(rows[0]) + 1):
        if end == len(rows[0]) or rows[0][end] != rows[0][start]:
            segments.append((rows[0][start], start, end))
            start = end
    absent = set(range(experts)) - {expert for expert, _, _ in segments}
    return (*segments, *((expert, 0, 0) for expert in sorted(absent)))  # they run on nothing, for their zero gradient


class _Permute(torch.autograd.Function):
    """x[perm], whose backward is a gather too, not a scatter that adds."""

    @staticmethod
    def forward(ctx, x, perm, inverse):
        ctx.save_for_backward(inverse)
        return x.index_select(0, perm)

    @staticmethod
    def backward(ctx, gradient):
        return gradient.index_select(0, ctx.saved_tensors[0]), None, None


def permute(x: torch.Tensor, perm: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
    """x [N, C] in the order of a permutation; inverse: the permutation that undoes it."""
    return _Permute.apply(x, perm, inverse)


def route(x: torch.Tensor, plan: Plan, experts: Sequence[Expert]) -> torch.Tensor:
    """x [B, T, C] -> [B, T, C'], each token through the expert of its modality."""
    if isinstance(plan, Masks):
        out = experts[0](x)
        for number, expert in enumerate(experts[1:], 1):
            out = torch.where((plan.modality == number)[..., None], expert(x), out)
        return out
    if isinstance(plan, Slices):
        return torch.cat([experts[number](x[:, start:end]) for number, start, end in plan.segments], dim=1)
    assert isinstance(plan, Sorted), plan  # Grouped has kernels instead of experts
    flat = x.flatten(0, 1)
    if plan.padding:
        flat = F.pad(flat, (0, 0, 0, plan.padding))
    parts = permute(flat, plan.perm, plan.inverse).split([count.size(0) for count in plan.counts])
    used = [expert(part) for expert, part in zip(experts, parts, strict=True) if plan.padding or part.size(0)]
    out = permute(torch.cat(used or [experts[0](flat)]), plan.inverse, plan.perm)
    return out[: x.size(0) * x.size(1)].view(*x.shape[:-1], out.size(-1))


def grouped_linear(x: torch.Tensor, weights: Sequence[torch.Tensor], ends: torch.Tensor) -> torch.Tensor:
    """x [N, C] sorted by expert, weights of [C', C] each, ends int32 [E] -> [N, C'] in one kernel."""
    stacked = torch.stack([weight.to(x.dtype) for weight in weights]).transpose(1, 2)
    if x.dtype in (torch.float32, torch.bfloat16, torch.float16):
        return F.grouped_mm(x, stacked, offs=ends)
    parts = x.split(ends.diff(prepend=ends.new_zeros(1)).tolist())  # float64, which only proofs use, has no such kernel
    return torch.cat([part @ weight for part, weight in zip(parts, stacked, strict=True)])


def grouped(x: torch.Tensor, plan: Grouped, matrices: list, then=lambda y: y) -> list[torch.Tensor]:
    """x [B, T, C] sorted by expert, times each of `matrices` (one weight an expert), `then`, and back in order."""
    flat = permute(x.flatten(0, 1), plan.perm, plan.inverse)
    outs = [then(grouped_linear(flat, weights, plan.ends)) for weights in matrices]
    return [permute(out, plan.inverse, plan.perm).view(*x.shape[:-1], out.size(-1)) for out in outs]
