"""Files of other programs: JSON and weight indexes, tensor names with a wrapper's prefix, non-finite values."""

import json
from pathlib import Path

import torch

from nanochat.system.environment import UserError

# What a wrapper adds to the names of the modules in it; no model has parts of these names itself ...
WRAPPERS = {
    "_orig_mod": "torch.compile",
    "_fsdp_wrapped_module": "FSDP",
    "_checkpoint_wrapped_module": "activation checkpointing",
    "_forward_module": "Lightning",
}
OUTER = {"module": "DataParallel, DDP or DeepSpeed"}  # ... but this is an ordinary word, so only before all names


def read_json(path: Path, hint: str = "fetch it again") -> dict:
    """The object in a JSON file; UserError where it cannot be read (with a hint), or holds something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): {hint}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON ({error}): fetch it again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} does not hold a JSON object: fetch it again")
    return content


def read_weight_map(index: Path) -> dict[str, str]:
    """{tensor: name of the file beside it that holds it} of model.safetensors.index.json."""
    files = read_json(index).get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(f, str) and Path(f).name == f for f in files.values()):
        raise UserError(f"{index}: weight_map does not name files beside it: fetch it again")
    return files


def strip_wrappers(tensors: dict[str, torch.Tensor], where: str) -> tuple[dict[str, torch.Tensor], list[str]]:
    """(the tensors by their names without wrappers, a phrase for each wrapper that was found).

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
    found = []
    for name, tensor in tensors.items():
        if not (finite := tensor.isfinite()).all():
            found.append(f"{name} ({tensor.numel() - int(finite.sum()):,} of {tensor.numel():,})")
    more = len(found) - 3
    return ", ".join(found[:3]) + (f" and {more} more tensor{'s' * (more > 1)}" if more > 0 else "") or None
