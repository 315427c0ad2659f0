"""The files of a checkpointed step: written, listed, verified, pruned. nanochat/checkpoint_manager.py saves and loads.

A step folder has model.safetensors, optimizer.safetensors, state.json, copies of tokenizer and codec, and manifest.json
with the size and sha256 of each file. It is complete when the manifest holds for all of them, and corrupt otherwise.
"""

import hashlib
import json
import logging
import os
import re
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from nanochat.data.tokenizer import Tokenizer
from nanochat.files import fsync, sha256_of
from nanochat.runtime import first_line
from nanochat.system.environment import UserError
from nanochat.system.storage_errors import naming_storage_errors
from nanochat.system.temporary import owner_suffix, remove_abandoned

logger = logging.getLogger(__name__)

STEP_NAME = re.compile(r"step_(\d{6,})")


def step_dir(checkpoint_dir: Path, step: int) -> Path:
    return Path(checkpoint_dir) / f"step_{step:06d}"


def step_of(folder: Path) -> int:
    """The inverse of step_dir."""
    return int(STEP_NAME.fullmatch(folder.name)[1])


def own_steps(checkpoint_dir: Path) -> list[int]:
    """Steps that have a folder, complete or not, in ascending order."""
    if not Path(checkpoint_dir).is_dir():
        return []
    matches = (STEP_NAME.fullmatch(path.name) for path in Path(checkpoint_dir).iterdir() if path.is_dir())
    return sorted(int(match[1]) for match in matches if match)


# ---------------------------------------------------------------------------------------------------------------------
# writing


def write_step(
    folder: Path,
    model_state: dict,
    optimizer_state: dict | None,
    metadata: dict,
    tokenizer: Tokenizer | None,
    codec: Path | None,
) -> None:
    """All files of a step into a new folder, the manifest last; everything is on the disk when this returns."""
    folder.mkdir(parents=True)
    _save_tensors(model_state, folder / "model.safetensors")
    if optimizer_state is not None:
        _save_tensors(optimizer_state, folder / "optimizer.safetensors")
    if tokenizer is not None:
        tokenizer.save(folder / "tokenizer")
    if codec is not None:
        (folder / "codec").mkdir()
        for file in sorted(codec.iterdir()):  # not copytree(), whose error does not say that the disk is full
            shutil.copyfile(file, folder / "codec" / file.name)
    (folder / "state.json").write_text(json.dumps(metadata, indent=1), encoding="utf-8")
    write_manifest(folder)


def _save_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    save_file({name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}, path)
    path.chmod(path.parent.stat().st_mode & 0o666)  # safetensors keeps them to their owner, unlike the files beside


def write_manifest(folder: Path) -> None:
    """Write manifest.json over all files of a step folder; everything is on the disk when this returns."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / "manifest.json")
    for path in files:
        fsync(path)
    manifest = {
        path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": sha256_of(path)} for path in files
    }
    temporary = folder / ".manifest.tmp"
    temporary.write_text(json.dumps({"files": manifest}, indent=1), encoding="utf-8")
    fsync(temporary)
    os.replace(temporary, folder / "manifest.json")
    for sub in {path.parent for path in files} | {folder}:
        fsync(sub)


def move_aside(folder: Path) -> None:
    """Rename a step folder to step_000123.bad-1, or the next number that is free."""
    for n in range(1, 10_000):
        aside = folder.with_name(f"{folder.name}.bad-{n}")
        if not aside.exists():
            os.rename(folder, aside)
            logger.info(f"{folder} exists already: moved to {aside.name}")
            return
    raise UserError(f"{folder}: too many corrupt copies beside it, remove some of {folder.name}.bad-*")


def remove_stale_temp_files(checkpoint_dir: Path) -> None:
    """Before a run: delete the files that a killed one left half-written, under temporary names of ours."""
    remove_abandoned(Path(checkpoint_dir), ".*.tmp")


def prune(checkpoint_dir: Path, keep_last: int | None) -> list[Path]:
    """Delete all but the newest `keep_last` complete steps, only after the newest verified; returns what was deleted.

    Corrupt steps neither count nor go: the user may still want to repair them.
    """
    folders = [step_dir(checkpoint_dir, step) for step in own_steps(checkpoint_dir)]
    if keep_last is None or len(folders) <= keep_last:
        return []
    old = [folder for folder in folders if _is_complete(folder)][:-keep_last]
    for folder in old:
        # a half-deleted step must not look like a corrupt one
        doomed = folder.with_name(f".{folder.name}.pruned-{owner_suffix()}")
        with naming_storage_errors(folder):
            os.rename(folder, doomed)
            shutil.rmtree(doomed)
    return old


# ---------------------------------------------------------------------------------------------------------------------
# reading


def find_corruption(folder: Path) -> str | None:
    """Why a step folder does not count, or None when its manifest holds for every file."""
    try:
        files = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["files"]
        for name, recorded in files.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != recorded["size"]:
                return f"{name} has {path.stat().st_size} bytes instead of {recorded['size']}"
            if sha256_of(path) != recorded["sha256"]:
                return f"{name} does not have the recorded sha256"
        required = {"model.safetensors", "state.json"}
        return None if required <= files.keys() else "model.safetensors or state.json is missing"
    except FileNotFoundError:
        return "manifest.json is missing"
    except (ValueError, KeyError, TypeError, AttributeError):
        return "manifest.json is not readable"


_verified: dict[Path, list] = {}  # step folder -> names, sizes and times of its files when their hashes held


def _is_complete(folder: Path) -> bool:
    """find_corruption(folder) is None; the files of a step that this process has hashed are not read again while
    unchanged."""
    stats = [(path, path.stat()) for path in sorted(folder.rglob("*")) if path.is_file()]
    identity = [(path, stat.st_size, stat.st_mtime_ns, stat.st_ino) for path, stat in stats]
    if _verified.get(folder) == identity:
        return True
    if find_corruption(folder) is not None:
        return False
    _verified[folder] = identity
    return True


def read_manifest(folder: Path) -> dict[str, str]:
    """sha256 by file name of a complete step."""
    files = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["files"]
    return {name: recorded["sha256"] for name, recorded in files.items()}


def read_metadata(folder: Path) -> dict:
    """state.json of a step, null counting as absent; UserError when it is not what we write."""
    path = folder / "state.json"
    try:
        metadata = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    if not isinstance(metadata, dict):
        raise UserError(f"{path} does not hold a JSON object")
    metadata = {name: value for name, value in metadata.items() if value is not None}
    for name in ("settings", "model_config", "derived", "data_fingerprint", "loader", "run"):
        if not isinstance(metadata.get(name, {}), dict):
            raise UserError(f"{path}: {name} is {metadata[name]!r}, expected a JSON object")
    return metadata


def read_tensors(path: Path, device: torch.device | str = "cpu") -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file by name; UserError when it is none."""
    try:
        return load_file(path, device=str(device))
    except (SafetensorError, OSError, TypeError) as error:  # TypeError: a size that no machine has
        raise UserError(f"{path} cannot be read: {first_line(error)}") from error


def weights_hash(state: dict[str, torch.Tensor]) -> str:
    """sha256 over the tensors' bytes in name order: safetensors files may differ in their header alone."""
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode())
        digest.update(state[name].reshape(-1).detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
