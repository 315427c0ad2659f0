"""What weights of other programs may bring along: names that a wrapper made longer, values that are not finite."""

import torch

from nanochat.system.environment import UserError

# A module that one of these wraps gets one more part in its name. No model has parts of these names itself ...
WRAPPERS = {
    "_orig_mod": "torch.compile",
    "_fsdp_wrapped_module": "FSDP",
    "_checkpoint_wrapped_module": "activation checkpointing",
    "_forward_module": "Lightning",
}
OUTER = {"module": "DataParallel, DDP or DeepSpeed"}  # ... but this is an ordinary word, so only before all names


def strip_wrappers(tensors: dict[str, torch.Tensor], where: str) -> tuple[dict[str, torch.Tensor], list[str]]:
    """(the tensors by the names that they had before any wrapping, a phrase for each wrapper that was found).

    UserError, beginning with `where`: two tensors would have one name.
    """
    names = {name: name.split(".") for name in tensors}
    found = dict.fromkeys(part for parts in names.values() for part in parts[:-1] if part in WRAPPERS)
    names = {name: [part for part in parts if part not in found] for name, parts in names.items()}
    for outer in OUTER:
        while names and all(len(parts) > 1 and parts[0] == outer for parts in names.values()):
            found[outer] = None
            names = {name: parts[1:] for name, parts in names.items()}
    stripped: dict[str, torch.Tensor] = {}
    for name, parts in names.items():
        if (short := ".".join(parts)) in stripped:
            raise UserError(f"{where}: {short} is there twice, with and without a wrapper's name: keep one of them")
        stripped[short] = tensors[name]
    reasons = WRAPPERS | OUTER
    phrases = []
    for part in found:
        count = sum(part in name.split(".") for name in tensors)
        phrases.append(
            f"{count} of {len(tensors)} tensors are named with `{part}.` of {reasons[part]}, read without it"
        )
    return stripped, phrases


def describe_nonfinite(tensors: dict[str, torch.Tensor]) -> str | None:
    """Where values are NaN or infinite: "lm_head.weight (3 of 4,096) and 2 more tensors"; None where none is."""
    counts = {}
    for name, tensor in tensors.items():
        if not (finite := tensor.isfinite()).all():
            counts[name] = f"{name} ({tensor.numel() - int(finite.sum()):,} of {tensor.numel():,})"
    if not counts:
        return None
    more = len(counts) - 3
    return ", ".join(list(counts.values())[:3]) + (f" and {more} more tensor{'s' * (more > 1)}" if more > 0 else "")
