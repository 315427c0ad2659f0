"""Tokens to the experts of their modalities: planned once a forward from the ids, used by all layers.

Three kinds of routes with the same results. sort: the tokens of a modality are gathered and go through its expert (the
default). where: every expert on every token, static shapes. grouped: as sort, with all experts in one kernel, torch's
grouped_mm, without asking the device for counts.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from nanochat.modality import IGNORED

ROUTES = ("sort", "where", "grouped")
Expert = Callable[[torch.Tensor], torch.Tensor]  # [..., C] -> [..., C']
# Rows of zeros behind the tokens of each expert in training: no expert is without rows, so that all have gradients,
# and no size is 0 or 1, for which torch.compile would recompile.
PADDING = 2


class Sorted(NamedTuple):
    """perm int64 [N + padding] sorts tokens by modality, inverse undoes it.

    counts: a tensor for each expert whose length is its number of rows, which the compiler can take as dynamic.
    """

    perm: torch.Tensor
    inverse: torch.Tensor
    counts: tuple[torch.Tensor, ...]
    padding: int


class Masks(NamedTuple):
    modality: torch.Tensor  # [B, T]


class Grouped(NamedTuple):
    perm: torch.Tensor  # int64 [N]
    inverse: torch.Tensor
    ends: torch.Tensor  # int32 [E], on the device


Plan = Sorted | Masks | Grouped


def plan_route(kind: str, modality: torch.Tensor, experts: int, compiled: bool = False, multiple: int = 1) -> Plan:
    """How the tokens of modality [B, T] (0 .. experts - 1) get to their experts.

    compiled: the plan is for a compiled block, which should not be compiled anew for other numbers of tokens.
    multiple: in training under `sort` the number of rows of each expert is padded to a multiple of it, for FP8.
    """
    assert kind in ROUTES, kind
    if kind == "where":
        return Masks(modality)

    flat = modality.flatten()
    if kind == "grouped":
        perm, inverse = sorted_by(flat)
        counts = (flat[:, None] == torch.arange(experts, device=flat.device)).sum(0)  # bincount would ask the device
        return Grouped(perm, inverse, counts.cumsum(0).to(torch.int32))

    counts = torch.bincount(flat, minlength=experts).tolist()  # the only synchronisation with the device
    added = [0] * experts
    if torch.is_grad_enabled():
        added = [PADDING] * experts if multiple == 1 else _padding_to(multiple, counts)
        numbers, repeats = torch.arange(experts, device=flat.device), torch.tensor(added, device=flat.device)
        flat = torch.cat([flat, numbers.repeat_interleave(repeats, output_size=sum(added)).to(flat.dtype)])

    perm, inverse = sorted_by(flat)
    rows = tuple(perm.new_empty(count + more) for count, more in zip(counts, added, strict=True))
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
    """x [N, C], targets [N] -> for each head (its targets' features, its matrix, the targets' rows in that matrix).

    heads: (first id, output matrix) of each modality. Second result: the permutation that brings the concatenated parts
    back in order; ignored targets come behind all parts.
    """
    modality = head_of_id[targets.clamp(min=0)].long().masked_fill(targets == IGNORED, len(heads))
    perm, inverse = sorted_by(modality)
    sizes = torch.bincount(modality, minlength=len(heads) + 1).tolist()
    features, wanted = permute(x, perm, inverse).split(sizes), targets[perm].split(sizes)
    return [(features[i], matrix, wanted[i] - first) for i, (first, matrix) in enumerate(heads)], inverse


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


def route_grouped(
    x: torch.Tensor, plan: Grouped, matrices: Iterable[Sequence[torch.Tensor]], then: Expert = lambda y: y
) -> list[torch.Tensor]:
    """x [B, T, C] sorted by expert, times each of `matrices` (a weight for each expert), `then`, and back in order."""
    flat = permute(x.flatten(0, 1), plan.perm, plan.inverse)
    outs = [then(grouped_linear(flat, weights, plan.ends)) for weights in matrices]
    return [permute(out, plan.inverse, plan.perm).view(*x.shape[:-1], out.size(-1)) for out in outs]


def route_linears(
    x: torch.Tensor, plan: Plan | None, branches: Sequence[Sequence[nn.Linear]]
) -> Sequence[torch.Tensor]:
    """x [B, T, C] times several matrices, each token with those of its modality; a result [B, T, C'] for each matrix.

    branches: for each expert its matrices, in one order. With one expert the plan does not matter.
    """
    if len(branches) == 1:
        return [matrix(x) for matrix in branches[0]]
    if isinstance(plan, Grouped):
        weights = ([matrix.weight for matrix in same] for same in zip(*branches, strict=True))
        return route_grouped(x, plan, weights)

    def expert(matrices: Sequence[nn.Linear]) -> Expert:
        if len(matrices) == 1:
            return matrices[0]
        return lambda part: torch.cat([matrix(part) for matrix in matrices], dim=-1)  # tokens move once for all of them

    out = route(x, plan, [expert(matrices) for matrices in branches])
    return out.split([matrix.out_features for matrix in branches[0]], dim=-1)
