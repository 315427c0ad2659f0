"""nanochat's optimizer files, translated to our names where they hold the state of all parameters, else skipped.

Three layouts, by age (github.com/karpathy/nanochat): optim_000123.pt, a list [AdamW, Muon] of rank 0's state; one file
a rank, optim_000123_rank0.pt and so on; and from January 2026 one optimizer of both kinds. In time Muon's buffers moved
from one a matrix, on the rank that owns it, to stacks of a shape, kept with the first matrix, a chunk of it a rank.
"""

import logging
import re
from collections.abc import Iterator
from pathlib import Path

import torch

from nanochat.gpt import GPT, GPTConfig
from nanochat.model.parameters import is_scalar
from nanochat.runtime import first_line, shown
from nanochat.system.environment import UserError
from nanochat.upstream.pickles import read_pt_tree

logger = logging.getLogger(__name__)

ADAMW = {"exp_avg", "exp_avg_sq"}
MUON = {"momentum_buffer": "momentum", "second_momentum_buffer": "neuron_sq"}  # theirs: ours
# In the order of nanochat's groups; the rest of a model is Muon's, in the order of its modules.
BY_ADAMW = "lm_head. transformer.wte. value_embeds. resid_lambdas x0_lambdas smear_gate. smear_lambda backout_lambda"

States = list[dict]  # of one parameter: what each rank's file holds


class _UnfitError(ValueError):
    """Why a state cannot be taken over."""


def load_optimizer(folder: Path, step: int, config: GPTConfig) -> dict[str, torch.Tensor] | None:
    """The state of read_optimizer(); its message is logged."""
    state, outcome = read_optimizer(folder, step, config)
    logger.info(
        f"{folder}: optimizer state {outcome}" + (", so training would begin with a fresh one" if state is None else "")
    )
    return state


def read_optimizer(folder: Path, step: int, config: GPTConfig) -> tuple[dict[str, torch.Tensor] | None, str]:
    """(full float32 tensors '<parameter>.<quantity>', as MuonAdamW.load_state_dict() takes them; a message about them).

    None, and why, where nanochat's files do not hold the state of all parameters of this model.
    """
    try:
        files = _find_files(Path(folder), step)
        state = _translate([read_pt_tree(file) for file in files], config)
        gates = sum(name.endswith("ve_gate.weight.step") for name in state)
        anew = f"; that of {gates} gates starts from zero, since they are AdamW's here" if gates else ""
        return state, f"complete, in {', '.join(file.name for file in files)}{anew}"
    except (UserError, _UnfitError) as error:
        return None, f"none: {error}"
    except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError, RuntimeError) as error:
        return None, f"none: not laid out as nanochat's ({type(error).__name__}: {first_line(error)})"


def _find_files(folder: Path, step: int) -> list[Path]:
    """The files of all ranks, in their order."""
    found = folder.glob(f"optim_{step:06d}_rank*.pt")
    ranks = {int(match[1]): path for path in found if (match := re.search(r"_rank(\d+)\.pt$", path.name))}
    if sorted(ranks) != list(range(len(ranks))):
        raise _UnfitError(f"of the ranks' files only those of {', '.join(map(str, sorted(ranks)))} are there")
    files = [ranks[rank] for rank in sorted(ranks)] or [folder / f"optim_{step:06d}.pt"]
    if not files[0].is_file():
        raise _UnfitError(f"there is no {files[0].name}")
    return files


def _translate(trees: list, config: GPTConfig) -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        shapes = {name: tuple(p.shape) for name, p in GPT(config).named_parameters()}
    adamw = [name for prefix in BY_ADAMW.split() for name in shapes if name.startswith(prefix)]
    muon = [name for name in shapes if name not in adamw]
    taken: dict[str, dict[str, torch.Tensor]] = {}
    groups = [list(_read_groups(tree)) for tree in trees]
    ours = iter(adamw)
    for ranks in zip(*groups, strict=True):
        (kind, *others), states = zip(*ranks, strict=True)
        if kind not in ("adamw", "muon") or set(others) - {kind}:
            raise _UnfitError(f"a group is of kind {shown(kind)}")
        per_parameter = [list(found) for found in zip(*states, strict=True)]
        if kind == "adamw":
            for found in per_parameter:
                if (name := next(ours, None)) is None:
                    raise _UnfitError(f"AdamW has more parameters than the {len(adamw)} of the model")
                taken[name] = _translate_adamw(name, shapes[name], found)
        else:
            for name, quantities in _translate_muon(shapes, muon, per_parameter):
                if name in taken:
                    raise _UnfitError(f"{name} has two states")
                taken[name] = quantities
    if missing := [name for name in shapes if name not in taken]:
        raise _UnfitError(f"nothing for {missing[0]} ({len(missing)} parameters in all)")
    for name, shape in shapes.items():
        if name in muon and is_scalar(name):  # gates are Muon's there, AdamW's here: from zero
            taken[name] = {quantity: torch.zeros(shape) for quantity in ADAMW} | {"step": torch.tensor(0)}
    return {f"{name}.{quantity}": value for name in shapes for quantity, value in taken[name].items()}


def _read_groups(tree) -> Iterator[tuple[str, list[dict]]]:
    """(kind, state of each parameter) of every group of one file."""
    for number, optimizer in enumerate(tree if isinstance(tree, list) else [tree]):
        for group in optimizer["param_groups"]:
            kind = group["kind"] if "kind" in group else ("adamw", "muon")[number]
            yield kind, [optimizer["state"].get(index, {}) for index in group["params"]]


def _translate_adamw(name: str, shape: tuple, states: States) -> dict[str, torch.Tensor]:
    """Moments of one parameter, which each rank has in full or for its shard of the rows."""
    if strange := {key for state in states for key in state} ^ (ADAMW | {"step"}):
        raise _UnfitError(f"{name} has AdamW's state without or beyond {shown(min(map(str, strange)))}")
    steps = {int(state["step"]) for state in states}
    if len(steps) > 1:
        raise _UnfitError(f"the ranks are {min(steps)} and {max(steps)} steps old")
    result = {"step": torch.tensor(steps.pop())}
    for quantity in sorted(ADAMW):
        parts = [state[quantity].detach().float() for state in states]
        tensor = parts[0] if tuple(parts[0].shape) == shape else torch.cat(parts)
        if tuple(tensor.shape) != shape:
            raise _UnfitError(
                f"{name} has {quantity} of {list(tensor.shape)}, not {list(shape)}: some ranks' or another model's"
            )
        result[quantity] = tensor
    return result


def _translate_muon(
    shapes: dict, muon: list[str], states: list[States]
) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    """(parameter, its buffers) of one group: all matrices of a shape, or, in the oldest files, of a size."""
    buffers = [state["momentum_buffer"] for found in states for state in found if "momentum_buffer" in state]
    if not buffers:
        raise _UnfitError("a group of Muon's has no momentum: the share of one of several ranks")
    if strange := {key for found in states for state in found for key in state} - MUON.keys():
        raise _UnfitError(f"Muon's state holds {shown(min(map(str, strange)))}")
    stacked = buffers[0].ndim == 3
    shape = tuple(buffers[0].shape[-2:])
    same_shape = [name for name in muon if shapes[name] == shape]
    same_size = [name for name in muon if shapes[name][0] * shapes[name][1] == shape[0] * shape[1]]
    names = same_size if len(states) == len(same_size) and not stacked else same_shape
    if len(names) != len(states):
        raise _UnfitError(f"Muon has {len(states)} matrices of {list(shape)}, the model {len(same_shape)}")
    if stacked:
        if any(state for found in states[1:] for state in found):
            raise _UnfitError(f"{names[0]} has a stack for its group, whose others have states too")
        yield from _unstack_muon(names, shape, states[0])
        return
    for name, found in zip(names, states, strict=True):
        owners = [state for state in found if "momentum_buffer" in state]
        if len(owners) != 1 or set(owners[0]) != {"momentum_buffer"}:
            raise _UnfitError(f"{name} has its momentum in {len(owners)} files: those of some ranks are missing")
        if tuple(owners[0]["momentum_buffer"].shape) != shapes[name]:
            raise _UnfitError(f"{name} has a momentum of {list(owners[0]['momentum_buffer'].shape)}")
        yield name, {"momentum": owners[0]["momentum_buffer"].detach().float()}


def _unstack_muon(names: list[str], shape: tuple, states: States) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    """The matrices of a group, which are stacked in the state of its first: a chunk a rank, the last one padded."""
    rows, columns = shape
    chunk = -(-len(names) // len(states))
    each = {"momentum_buffer": shape, "second_momentum_buffer": (rows, 1) if rows >= columns else (1, columns)}
    stacks = {}
    for theirs, quantity in MUON.items():
        held = [theirs in state for state in states]
        if theirs == "second_momentum_buffer" and not any(held):
            continue
        parts = [state[theirs].detach().float() for state in states if theirs in state]
        fit = all(tuple(part.shape) == (chunk, *each[theirs]) for part in parts)
        # Only the last ranks may be without a matrix, and so without a stack.
        if not fit or held != sorted(held, reverse=True) or len(parts) * chunk < len(names):
            raise _UnfitError(
                f"{theirs} of {names[0]} is {[list(part.shape) for part in parts]}, not {len(names)} of "
                f"{list(each[theirs])}: the files of some ranks are missing"
            )
        stacks[quantity] = torch.cat(parts)
    for number, name in enumerate(names):
        yield name, {quantity: stack[number] for quantity, stack in stacks.items()}
