"""Atomic, checksummed checkpoints: a step is either complete or ignored.

A step is written under a temporary name: every file, then manifest.json with sizes and hashes, each fsynced, then the
folder. Renaming the folder is the commit, after which the parent is fsynced. Loading checks the manifest. The files
themselves are checkpoint_files.py's.

Folders with nanochat's own files (model_000123.pt, ...) are found and loaded alike, through nanochat/upstream/, and
only read.
"""

import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch

from nanochat.checkpoint_files import (
    STEP_NAME,
    find_corruption,
    move_aside,
    own_steps,
    read_manifest,
    read_metadata,
    read_tensors,
    step_dir,
    write_step,
)
from nanochat.config.settings import RunSettings
from nanochat.data.tokenizer import Tokenizer
from nanochat.files import fsync, sha256_of
from nanochat.gpt import GPT, GPTConfig
from nanochat.model.parameters import find_non_finite
from nanochat.runtime import nearest_name
from nanochat.system.environment import UserError, base_dir, expand_user
from nanochat.system.storage_errors import naming_storage_errors
from nanochat.system.temporary import owner_suffix, remove_abandoned
from nanochat.upstream import checkpoints as upstream
from nanochat.upstream.optimizer import load_optimizer as load_upstream_optimizer

logger = logging.getLogger(__name__)

# load_model()'s sources, and where nanochat keeps the checkpoints of each stage.
SOURCES = {
    "base": "base_checkpoints",
    "mid": "mid_checkpoints",
    "sft": "chatsft_checkpoints",
    "rl": "chatrl_checkpoints",
}


def checkpoints_dir() -> Path:
    return base_dir() / "base_checkpoints"


def tag_dir(settings: RunSettings) -> Path:
    """The folder of a run's checkpoints and logs."""
    return base_dir() / settings.checkpoints / settings.tag


def step_path(checkpoint_dir: Path, step: int) -> Path:
    """What holds a step's weights: our folder, or where only nanochat has that step its model_000123.pt."""
    theirs = upstream.model_file(checkpoint_dir, step)
    return theirs if is_upstream(checkpoint_dir, step) else step_dir(checkpoint_dir, step)


def is_upstream(checkpoint_dir: Path, step: int) -> bool:
    """Whether a step is nanochat's own; ours comes first where both have that number."""
    return not step_dir(checkpoint_dir, step).is_dir() and upstream.model_file(checkpoint_dir, step).is_file()


# ---------------------------------------------------------------------------------------------------------------------
# saving


def save_checkpoint(
    checkpoint_dir: Path,
    step: int,
    model_state: dict[str, torch.Tensor],
    optimizer_state: dict[str, torch.Tensor] | None,
    metadata: dict,
    rank: int = 0,
    tokenizer: Tokenizer | None = None,
    codec: Path | None = None,
) -> Path | None:
    """Write one step atomically; only rank 0 writes. Returns its folder.

    model_state and optimizer_state: full tensors by name. metadata: JSON values (step, settings, model_config, ...).
    The tokenizer and the codec's folder are copied into it.
    A folder of this name that is already there is moved aside, never deleted. Raises OSError with errno and path (full
    disk, quota, file-size limit, ...), leaving nothing behind but the earlier steps.
    """
    if rank != 0:
        return None
    final = step_dir(checkpoint_dir, step)
    temporary = final.with_name(f".{final.name}.tmp-{owner_suffix()}")
    remove_abandoned(final.parent, ".step_*", own=True)  # what a killed process left half-written or half-deleted
    try:
        with naming_storage_errors(temporary):
            write_step(temporary, model_state, optimizer_state, {**metadata, "step": step}, tokenizer, codec)
            if final.exists():
                move_aside(final)
            os.rename(temporary, final)
            fsync(final.parent)
            fsync(final.parent.parent)  # which learnt of the tag's folder with its first step
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return final


# ---------------------------------------------------------------------------------------------------------------------
# finding


def list_steps(checkpoint_dir: Path) -> list[int]:
    """Steps of ours and of nanochat's, complete or not, in ascending order."""
    return sorted({*own_steps(checkpoint_dir), *upstream.list_steps(checkpoint_dir)})


def newest_step(checkpoint_dir: Path) -> int | None:
    """The newest complete step, skipping corrupt ones with a message; None when there is none."""
    mixed = own_steps(checkpoint_dir) and upstream.list_steps(checkpoint_dir)
    for step in reversed(list_steps(checkpoint_dir)):
        path = step_path(checkpoint_dir, step)
        theirs = is_upstream(checkpoint_dir, step)
        reason = upstream.find_corruption(checkpoint_dir, step) if theirs else find_corruption(path)
        if reason is None:
            if mixed:
                logger.info(f"{checkpoint_dir} holds steps of ours and of nanochat's: taking {path.name}")
            return step
        logger.info(f"skipping {path}: {reason}")
    return None


def _tags(root: Path) -> list[Path]:
    """Folders of runs; those that --overwrite moved aside begin with a dot and do not count."""
    return sorted(path for path in root.glob("[!.]*") if path.is_dir())


def _hint(root: Path) -> str:
    """How a folder of checkpoints comes to hold some: nanochat's later stages have no script here."""
    stage = root.name.split("_")[0]
    trained = f"train with `python -m scripts.{stage}_train`"
    return trained if stage in ("base", "adapter") else "bring nanochat's model_*.pt and meta_*.json there"


def newest_tag(root: Path) -> str:
    """The tag whose newest step is the youngest; UserError when there is no checkpoint at all."""
    tags = [path for path in _tags(root) if list_steps(path)]
    if not tags:
        raise UserError(f"no checkpoint in {root}: {_hint(root)}")
    return max(tags, key=lambda tag: step_path(tag, list_steps(tag)[-1]).stat().st_mtime).name


# ---------------------------------------------------------------------------------------------------------------------
# loading


def load_checkpoint(
    checkpoint_dir: Path,
    step: int,
    device: torch.device | str = "cpu",
    load_optimizer: bool = False,
    era: str | None = None,
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor] | None, dict]:
    """(model state, optimizer state or None, metadata) of a step that must be complete; UserError otherwise.

    Of nanochat's own files all three are translated, with {"era": ...} in the metadata's `upstream`; era: the one that
    counts instead of what the files indicate. Where their optimizer state is incomplete, None comes back and why is
    logged.
    """
    if is_upstream(checkpoint_dir, step):
        state, metadata = upstream.load(checkpoint_dir, step, era)
        for note in metadata["upstream"]["notes"]:
            _log_once(note)
        optimizer_state = None
        if load_optimizer:
            optimizer_state = load_upstream_optimizer(checkpoint_dir, step, model_config(metadata))
        return {name: tensor.to(device) for name, tensor in state.items()}, optimizer_state, metadata
    folder = step_dir(checkpoint_dir, step)
    if not folder.is_dir():
        have = ", ".join(map(str, list_steps(checkpoint_dir))) or "none"
        raise UserError(f"step {step} is not in {checkpoint_dir}: steps there are {have}")
    if era is not None:
        raise UserError(f"era={era!r} is for nanochat's own files; {folder} records its own configuration: drop --era")
    if reason := find_corruption(folder):
        raise UserError(
            f"{folder} is corrupt: {reason}. Take another step, or after editing it by hand reseal it with "
            f"`python -m scripts.inspect_checkpoint {folder} --reseal`"
        )
    metadata = read_metadata(folder)
    model_state = read_tensors(folder / "model.safetensors", device)
    optimizer_file = folder / "optimizer.safetensors"
    if load_optimizer and not optimizer_file.exists():
        raise UserError(f"{folder} has no optimizer state: training cannot be resumed from it")
    return model_state, read_tensors(optimizer_file) if load_optimizer else None, {**metadata, "step": step}


def metadata_of(checkpoint_dir: Path, step: int, era: str | None = None) -> dict:
    """The metadata of a step, ours or nanochat's, as load_checkpoint() gives it."""
    if is_upstream(checkpoint_dir, step):
        return upstream.describe(checkpoint_dir, step, era)
    return read_metadata(step_dir(checkpoint_dir, step))


_logged: set[str] = set()


def _log_once(line: str) -> None:
    if line not in _logged:
        _logged.add(line)
        logger.info(line)


def model_config(metadata: dict) -> GPTConfig:
    """GPTConfig from metadata; an absent key means the classic model, which is logged where it changes the shape."""
    saved = metadata.get("model_config")
    if not isinstance(saved, dict):
        raise UserError("the checkpoint's state.json has no model_config, which describes the model")
    config = GPTConfig.from_dict(saved)
    if "tie_weights" not in saved:
        _log_once("model_config has no tie_weights: taken as untied")
    elif saved["tie_weights"] and "use_output_projection" not in saved:
        _log_once("model_config has no use_output_projection: taken as False")
    return config


def build_model(
    checkpoint_dir: Path, step: int, device: torch.device | str, phase: str, era: str | None = None
) -> tuple[GPT, Tokenizer | None, dict]:
    """The model of one step on the device, in phase "train" or "eval", with its tokenizer (None without) and metadata.

    era: as in load_checkpoint(). Raises UserError when the weights do not fit the metadata, or the tokenizer is not the
    one of the training.
    """
    assert phase in ("train", "eval"), phase
    model_state, _, metadata = load_checkpoint(checkpoint_dir, step, device, era=era)
    where = step_path(checkpoint_dir, step)
    model = model_from_state(model_config(metadata), model_state, device, where=where)
    model.train(phase == "train")
    tokenizer = tokenizer_of(checkpoint_dir, step)
    if tokenizer is not None:
        check_tokenizer(tokenizer, metadata, where)
    return model, tokenizer, metadata


def tokenizer_of(checkpoint_dir: Path, step: int) -> Tokenizer | None:
    """The tokenizer that lies with a step, ours or nanochat's; None where there is none."""
    if is_upstream(checkpoint_dir, step):
        sizes = upstream.read_meta(checkpoint_dir, step)["model_config"]
        return upstream.find_tokenizer(checkpoint_dir, sizes.get("vocab_size", GPTConfig.vocab_size))
    folder = step_dir(checkpoint_dir, step) / "tokenizer"
    return Tokenizer.load(folder) if folder.is_dir() else None


def model_from_state(config: GPTConfig, state: dict[str, torch.Tensor], device, where) -> GPT:
    """Build GPT and load the state strictly: a missing, extra or misshapen tensor is a UserError that names it."""
    with torch.device("meta"):
        model = GPT(config)
    model.to_empty(device=device)
    model.init_weights()
    check_state(model, state, where)
    model.load_state_dict(state, strict=True)
    return model


def check_state(model: GPT, state: dict[str, torch.Tensor], where) -> None:
    """UserError that names a tensor which the model lacks, the state lacks, or which has another shape."""
    config = model.config
    expected = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    for name in sorted(expected.keys() | state.keys()):
        if name not in state or name not in expected:
            side = "lacks" if name in expected else "holds"
            raise UserError(
                f"{where}: the weights do not fit model_config, model.safetensors {side} {name} "
                f"(tie_weights={config.tie_weights}, use_output_projection={config.use_output_projection})"
            )
        if tuple(state[name].shape) != expected[name]:
            raise UserError(f"{where}: {name} has shape {tuple(state[name].shape)}, model_config says {expected[name]}")


def check_finite(state: Mapping[str, torch.Tensor], where) -> None:
    """UserError that names the first tensor with NaN or infinities: nothing can be trained from it."""
    if (found := find_non_finite(state)) is not None:
        raise UserError(f"{where}: {found}: take an earlier step or another copy of the model")


def check_tokenizer(tokenizer: Tokenizer, metadata: dict, where) -> None:
    """Refuse a tokenizer that is not the one the model was trained with (hash) or that has another size."""
    trained = metadata.get("tokenizer_hash")
    if trained is not None and trained != tokenizer.hash:
        raise UserError(f"{where}: the tokenizer has hash {tokenizer.hash}, the model was trained with {trained}")
    if tokenizer.vocab_size > (size := model_config(metadata).vocab_size):
        raise UserError(f"{where}: the tokenizer has {tokenizer.vocab_size} ids, the model only {size}")


def check_codec(dataset, metadata: dict, where) -> None:
    """Refuse sounds encoded with another codec than the training's: equal codes would mean other sounds."""
    trained, here = metadata.get("codec") or {}, dataset.codec or {}
    if trained and here and trained.get("hash") != here["hash"]:
        raise UserError(
            f"{where}: data {dataset.name} is encoded with codec {here['hash'][:8]}, the model was trained with "
            f"{str(trained.get('hash'))[:8]}: use the model's with --codec={Path(where) / 'codec'}"
        )


def load_model(
    source: str,
    device: torch.device | str,
    phase: str,
    model_tag: str | None = None,
    step: int | None = None,
    era: str | None = None,
) -> tuple[GPT, Tokenizer | None, dict]:
    """Open a checkpoint, ours or nanochat's: the newest tag and the newest complete step unless they are named.

    source: "base", or nanochat's later stages "mid", "sft", "rl". era: as in load_checkpoint().
    UserError names what was looked for and what exists, or the weights that are not finite.
    """
    if source not in SOURCES:
        raise UserError(f"source={source!r} is unknown{nearest_name(source, SOURCES)}")
    checkpoint_dir, step = find_checkpoint(model_tag, step, base_dir() / SOURCES[source])
    logger.info(f"loading {step_path(checkpoint_dir, step)}")
    model, tokenizer, metadata = build_model(checkpoint_dir, step, device, phase, era)
    check_finite(model.state_dict(), step_path(checkpoint_dir, step))
    return model, tokenizer, metadata


def find_checkpoint(model_tag: str | None, step: int | None, root: Path | None = None) -> tuple[Path, int]:
    """(tag folder, step) below root (None: base_checkpoints): the named ones, else the newest.

    A model_tag with a slash is a path: of such a folder anywhere, ours or nanochat's, of a step_000123 or of a
    model_000123.pt in it. UserError names what was looked for and what exists.
    """
    root = root or checkpoints_dir()
    tag = model_tag or newest_tag(root)
    checkpoint_dir = expand_user(tag, "model_tag") if "/" in tag else root / tag
    if found := STEP_NAME.fullmatch(checkpoint_dir.name) or upstream.MODEL_NAME.fullmatch(checkpoint_dir.name):
        if step not in (None, int(found[1])):
            raise UserError(f"model_tag={tag!r} is of step {int(found[1])}, not {step}: name one or the other")
        checkpoint_dir, step = checkpoint_dir.parent, int(found[1])
    if not checkpoint_dir.is_dir():
        have = "" if "/" in tag else f" (tags there: {', '.join(path.name for path in _tags(root)) or 'none'})"
        have += f"; for the folder here write ./{tag}" if "/" not in tag and Path(tag).is_dir() else ""
        raise UserError(f"model_tag={tag!r}: there is no {checkpoint_dir}{have}")
    if step is None:
        step = newest_step(checkpoint_dir)
        if step is None:
            hint = _hint(root)
            if (checkpoint_dir / "config.json").is_file():
                hint = "a Hugging Face folder is imported with `python -m scripts.convert --from-hf`"
            raise UserError(f"{checkpoint_dir} holds no complete step: {hint}")
    return checkpoint_dir, step


def model_file_hash(checkpoint_dir: Path, step: int) -> str:
    """sha256 of the file that holds a step's weights."""
    if is_upstream(checkpoint_dir, step):
        return sha256_of(upstream.model_file(checkpoint_dir, step))
    return read_manifest(step_dir(checkpoint_dir, step))["model.safetensors"]
