"""Look into a checkpoint: `python -m scripts.inspect_checkpoint [folder of a step] [--reseal]`.

Without a folder: the newest step. Prints whether it is whole, its metadata, its tensors and the hash of the weights.
--reseal rewrites manifest.json after a step was edited by hand.
"""

import argparse
import json
from pathlib import Path

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


def main(argv: list[str] | None = None) -> dict:
    """Print the report; returns {"folder", "damage", "metadata", "weights_hash"}."""
    parser = argparse.ArgumentParser(prog="scripts.inspect_checkpoint", description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, help="a step's folder; default: the newest whole step")
    parser.add_argument("--reseal", action="store_true", help="rewrite manifest.json of a step that was edited by hand")
    arguments = parser.parse_args(argv)
    folder = arguments.folder or step_dir(*find_checkpoint(None, None))
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
        state = read_tensors(folder / "model.safetensors")
        report["metadata"] = read_metadata(folder)
        report["weights_hash"] = weights_hash(state)
        print(json.dumps({k: v for k, v in report["metadata"].items() if k != "rng"}, indent=1))
        for name, tensor in state.items():
            print(f"  {name:48s} {str(tensor.dtype)[6:]:10s} {list(tensor.shape)}")
        print(f"weights hash {report['weights_hash']}")
    return report


if __name__ == "__main__":
    run_script(main)
