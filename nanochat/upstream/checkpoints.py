"""nanochat's own checkpoints, of any age: found, dated, translated. They are only read, never written.

A folder holds model_000123.pt, meta_000123.json and perhaps optim_000123*.pt for each step. The
metadata lacks nanochat's constants, so the era of a file is inferred from its tensors and keys; the dates are those of
nanochat's public history (github.com/karpathy/nanochat).
"""

import logging
import re
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch

from nanochat.data.tokenizer import Tokenizer
from nanochat.gpt import GPT, GPTConfig
from nanochat.runtime import nearest_name, shown
from nanochat.system.environment import UserError, base_dir
from nanochat.upstream.foreign_weights import read_json, strip_wrappers
from nanochat.upstream.pickles import find_broken_part, read_pt, read_tokenizer_pickle

logger = logging.getLogger(__name__)

# ---------------------------------------------------------------------------------------------------------------------
# the eras


def half_context(context: int) -> int:
    return context // 2


def third_of_context(context: int) -> int:
    return -(-context // (3 * 128)) * 128  # rounded up to the tile of FlashAttention-3


def quarter_of_context(context: int) -> int:
    return -(-context // (4 * 128)) * 128


class Era(NamedTuple):
    """What nanochat did from a day on, beyond the six sizes that its metadata always had."""

    vocab_multiple: int  # rows of the tables are rounded up to it
    short_window: Callable[[int], int] | None  # tokens that an S layer looks back, from the context; with lambdas
    gate: tuple[int, float] | None  # of value embeddings: the channels that it reads, its range
    softcap: float
    rope_base: float
    qk_scale: float
    smear: bool  # and backout


#                    multiple  window   gate       softcap rope base  q, k  smear
ERAS = {
    "2025-10-13": Era(1, None, None, 15.0, 10_000.0, 1.0, False),
    "2025-12-09": Era(64, None, None, 15.0, 10_000.0, 1.0, False),
    "2026-01-11": Era(64, half_context, None, 15.0, 10_000.0, 1.0, False),
    "2026-01-16": Era(64, half_context, (32, 2.0), 15.0, 10_000.0, 1.0, False),
    "2026-03-02": Era(64, half_context, (32, 2.0), 20.0, 10_000.0, 1.0, False),
    "2026-03-09": Era(64, third_of_context, (12, 3.0), 15.0, 100_000.0, 1.15, False),
    "2026-03-14": Era(64, quarter_of_context, (12, 3.0), 15.0, 100_000.0, 1.2, True),
}
MODEL_NAME = re.compile(r"model_([0-9]{6}|[1-9][0-9]{6,})\.pt")
SIZES = ("sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd")
RESIDUAL = {"resid_lambdas": torch.ones, "x0_lambdas": torch.zeros}  # what an absent one means
SMEAR = ("smear_gate.weight", "smear_lambda", "backout_lambda")
ELSEWHERE = "update this repository, or open it with the commit of nanochat that wrote it"


def infer_era(sizes: dict, state: dict[str, torch.Tensor]) -> tuple[str, str]:
    """(era, the evidence for it) from nanochat's model_config and its tensors by name."""
    gates = [name for name in sorted(state) if name.endswith(".ve_gate.weight")]
    values = [name for name in sorted(state) if name.startswith("value_embeds.")]
    evidence = {"2026-03-14": next((name for name in SMEAR if name in state), None)}
    if gates and state[gates[0]].shape[-1:] == (12,):
        evidence["2026-03-09"] = f"{gates[0]} reads 12 channels"
    evidence["2026-01-16"] = next(iter(gates + values), None)
    newer = (*RESIDUAL, "window_pattern")
    evidence["2026-01-11"] = next((name for name in newer if name in state or name in sizes), None)
    if (rows := _rows(state)) > sizes["vocab_size"]:
        evidence["2025-12-09"] = f"{rows} rows of transformer.wte.weight for {sizes['vocab_size']} ids"
    evidence["2025-10-13"] = "nothing newer in it"
    return next((era, why) for era, why in evidence.items() if why)


def _rows(state: dict[str, torch.Tensor]) -> int:
    """Rows of the embedding; 0 without one."""
    table = state.get("transformer.wte.weight")
    return 0 if table is None or table.ndim == 0 else len(table)


def gpt_config(era: str, sizes: dict, state: dict[str, torch.Tensor]) -> GPTConfig:
    """Our config for a model of that era; sizes: nanochat's model_config."""
    rules = ERAS[era]
    pattern = sizes.get("window_pattern", "L").upper()
    if "window_pattern" in sizes and rules.short_window is None:
        raise UserError(f"era={era!r} had no window_pattern, which the metadata holds: leave --era out")
    config = dict(
        {name: sizes[name] for name in SIZES if name in sizes},
        softcap=rules.softcap,
        rope_base=rules.rope_base,
        qk_scale=rules.qk_scale,
        window_pattern=pattern,
        smear=rules.smear,
        backout=rules.smear,
        residual_scalars=rules.short_window is not None and any(name in state for name in RESIDUAL),
    )
    # nanochat's L layers look sequence_len tokens back, ours at everything: the same up to the training's context.
    if "S" in pattern:
        config["short_window"] = rules.short_window(config.get("sequence_len", GPTConfig.sequence_len))
    if rules.gate:
        channels, most = rules.gate
        config |= dict(value_embeddings=True, value_gate_channels=channels, value_gate_range=most)
    if _rows(state) > config.get("vocab_size", GPTConfig.vocab_size):
        config["vocab_multiple"] = rules.vocab_multiple
    try:
        return GPTConfig(**config)
    except AssertionError as error:
        raise UserError(f"model_config describes no model that can be: {error}") from error


def _check_fit(config: GPTConfig, era: str, evidence: str, state: dict[str, torch.Tensor]) -> None:
    """UserError that names the first tensor that is unexpected, missing or misshapen for this model of this era."""
    if config.n_layer > len(state):  # before it is built
        raise UserError(f"model_config says {config.n_layer} layers, the file has {len(state)} tensors in all")
    with torch.device("meta"):
        wanted = {name: tuple(tensor.shape) for name, tensor in GPT(config).state_dict().items()}
    source = f"nanochat's era {era} ({evidence})"
    if strange := sorted(state.keys() - wanted.keys()):
        hint = f"nor by any that is known up to {max(ERAS)}: {ELSEWHERE}" if evidence != "--era" else "drop --era"
        raise UserError(f"{shown(strange[0])} ({len(strange)} tensors in all) is not explained by {source}, {hint}")
    if missing := sorted(wanted.keys() - state.keys()):
        raise UserError(
            f"{missing[0]} ({len(missing)} tensors in all) is missing, which {source} has: take the complete file; "
            f"where it is one of nanochat's trials between two eras, {ELSEWHERE}"
        )
    for name, tensor in state.items():
        if tuple(tensor.shape) != wanted[name]:
            raise UserError(f"{name} has shape {list(tensor.shape)}, metadata and {source} say {list(wanted[name])}")


# ---------------------------------------------------------------------------------------------------------------------
# the folder


def model_file(folder: Path, step: int) -> Path:
    return Path(folder) / f"model_{step:06d}.pt"


def meta_file(folder: Path, step: int) -> Path:
    return Path(folder) / f"meta_{step:06d}.json"


def list_steps(folder: Path) -> list[int]:
    """Steps of nanochat's own in the folder, complete or not, in ascending order."""
    matches = (MODEL_NAME.fullmatch(path.name) for path in Path(folder).glob("model_*.pt"))
    return sorted(int(match[1]) for match in matches if match)


def read_meta(folder: Path, step: int) -> dict:
    """meta_000123.json with a checked model_config; UserError that names what is wrong or missing."""
    path = meta_file(folder, step)
    meta = read_json(path, f"it describes the model in {model_file(folder, step).name}: put the two side by side")
    sizes = meta.get("model_config")
    if not isinstance(sizes, dict):
        raise UserError(f"{path} holds no model_config, so it is not the metadata that nanochat writes")
    for name, value in sizes.items():
        if name == "window_pattern":
            if not isinstance(value, str) or not value or set(value.upper()) - set("SL"):
                raise UserError(f"{path}: window_pattern={shown(value)} is not made of the letters S and L")
        elif name not in SIZES:
            near = nearest_name(name, (*SIZES, "window_pattern"))
            raise UserError(f"{path}: model_config holds {shown(name)}, which no era of nanochat had{near}")
        elif type(value) is not int or not 0 < value < 2**24:
            raise UserError(f"{path}: model_config: {name}={shown(value)} is not a whole number from 1 to {2**24 - 1}")
    return meta


def find_corruption(folder: Path, step: int) -> str | None:
    """Why a step of nanochat's cannot be read, or None; a file that was cut off is seen, a changed byte is not."""
    try:
        read_meta(folder, step)
        read_pt(model_file(folder, step))
    except UserError as error:
        return str(error)
    return None


def load(folder: Path, step: int, era: str | None = None) -> tuple[dict[str, torch.Tensor], dict]:
    """(float32 tensors by our names, metadata in our shape) of nanochat's model_000123.pt, on the CPU.

    era: one of ERAS instead of the inferred one. UserError: a corrupt file, one changed byte included, an unknown era,
    a key or tensor that no era explains or that the era lacks.
    """
    path = model_file(folder, step)
    state, metadata = _read_checkpoint(folder, step, era)
    if part := find_broken_part(path):
        raise UserError(f"{path} is damaged: the checksum of its part {part} does not hold: copy it again")
    return {name: tensor.float() for name, tensor in state.items()}, metadata


def describe(folder: Path, step: int, era: str | None = None) -> dict:
    """load()'s metadata alone, without reading the tensors.

    Its `upstream` holds the era, the evidence for it ("told_by"), messages ("notes") and nanochat's own metadata.
    """
    return _read_checkpoint(folder, step, era)[1]


def _read_checkpoint(folder: Path, step: int, era: str | None) -> tuple[dict[str, torch.Tensor], dict]:
    """The tensors of the file, mapped, and the metadata."""
    if era is not None and era not in ERAS:
        raise UserError(f"era={era!r} is unknown{nearest_name(era, ERAS)}: one of {', '.join(ERAS)}")
    meta, path = read_meta(folder, step), model_file(folder, step)
    sizes = meta["model_config"]
    raw, _ = strip_wrappers({name: tensor.detach() for name, tensor in read_pt(path).items()}, str(path))
    state = {name: tensor for name, tensor in raw.items() if name not in ("cos", "sin")}  # which follow from sizes
    notes = []
    if absent := [f"{name}={getattr(GPTConfig, name)}" for name in SIZES if name not in sizes]:
        notes.append(f"{meta_file(folder, step)} lacks sizes: taking nanochat's defaults, {', '.join(absent)}")
    found, evidence = infer_era({"vocab_size": GPTConfig.vocab_size} | sizes, state)
    if era is not None:
        found, evidence = era, "--era"
    elif found == "2026-01-16":
        notes.append(
            f"{path}: era {found}; a model of the first week of March 2026 looks the same, but its logits were capped "
            "at 20 instead of 15: say --era 2026-03-02 (base_train: --init_era) if it is one"
        )
    try:
        config = gpt_config(found, sizes, state)
        if config.residual_scalars:
            for name, absent_value in RESIDUAL.items():
                state.setdefault(name, absent_value(config.n_layer))
        _check_fit(config, found, evidence, state)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    own_metadata = {name: value for name, value in meta.items() if name not in ("step", "model_config")}
    origin = {"era": found, "told_by": evidence, "file": path.name, "notes": notes, "metadata": own_metadata}
    described = asdict(config) | {"modalities": []}  # as JSON would have it
    return state, {"step": step, "model_config": described, "upstream": origin}


def find_tokenizer(folder: Path, vocab_size: int) -> Tokenizer | None:
    """The tokenizer of a folder of nanochat's: from it or its tokenizer/, else from where nanochat keeps the one of all
    models, tokenizer/ two folders up or in NANOCHAT_BASE_DIR, if it has as many ids as the model. None: nowhere."""
    folder = Path(folder).absolute()
    own = (folder, folder / "tokenizer")
    for place in dict.fromkeys((*own, folder.parent.parent / "tokenizer", base_dir() / "tokenizer")):
        if (path := place / "tokenizer.pkl").is_file():
            tokenizer = read_tokenizer_pickle(path)
            if place in own or tokenizer.vocab_size == vocab_size:
                return tokenizer
            logger.info(f"{path} has {tokenizer.vocab_size} ids, the model {vocab_size}: not its tokenizer")
    logger.info(f"{folder} has no tokenizer: put nanochat's tokenizer.pkl into it to read and write text")
    return None
