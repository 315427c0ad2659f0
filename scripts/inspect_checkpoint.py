"""Look into a checkpoint: `python -m scripts.inspect_checkpoint [folder of a step | model.pt] [--reseal]`.

Without a folder: the newest step. Prints whether it is whole, its metadata, its tensors and the hash of the weights.
--reseal rewrites manifest.json after a step was edited by hand. Of a .pt file, nanochat's own, it lists the tensors.
"""

import argparse
import json
from pathlib import Path

import torch

from nanochat.checkpoint_manager import (
    damage,
    find_checkpoint,
    read_metadata,
    read_tensors,
    seal,
    step_dir,
    weights_hash,
)
from nanochat.runtime import UserError, run_script
from nanochat.upstream import read_pt


def main(argv: list[str] | None = None) -> dict:
    """Print the report; returns {"folder", "damage", "metadata", "weights_hash"}, of a .pt file its path and hash."""
    parser = argparse.ArgumentParser(prog="scripts.inspect_checkpoint", description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, help="a step's folder, or a .pt file; default: the newest")
    parser.add_argument("--reseal", action="store_true", help="rewrite manifest.json of a step that was edited by hand")
    arguments = parser.parse_args(argv)
    folder = arguments.folder or step_dir(*find_checkpoint(None, None))
    if folder.suffix == ".pt" and not arguments.reseal:
        return {"folder": str(folder), "weights_hash": list_tensors(read_pt(folder))}
    if not (folder / "state.json").is_file():
        raise UserError(f"{folder} is not the folder of a step: it has no state.json")
    if arguments.reseal:
        read_metadata(folder)  # what cannot be loaded is mended before it is sealed
        read_tensors(folder / "model.safetensors")
        seal(folder)
        print(f"resealed {folder}")
    reason = damage(folder)
    print(f"{folder}: {reason or 'whole'}")
    report = {"folder": str(folder), "damage": reason}
    if reason is None:
        report["metadata"] = read_metadata(folder)
        print(json.dumps({k: v for k, v in report["metadata"].items() if k != "rng"}, indent=1))
        report["weights_hash"] = list_tensors(read_tensors(folder / "model.safetensors"))
    return report


def list_tensors(state: dict[str, torch.Tensor]) -> str:
    """Print name, dtype and shape of every tensor, and the weights' hash, which is returned."""
    for name, tensor in state.items():
        # ascii(): a stranger's file may name its tensors with a terminal's control characters.
        print(f"  {ascii(name)[1:-1]:48s} {str(tensor.dtype)[6:]:10s} {list(tensor.shape)}")
    print(f"weights hash {(found := weights_hash(state))}")
    return found


if __name__ == "__main__":
    run_script(main)
