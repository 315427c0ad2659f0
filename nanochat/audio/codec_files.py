"""A codec on disk: its description, its tensors, and whether codes fit it."""

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from nanochat.files import new_folder
from nanochat.system.environment import UserError

KINDS = ("frame", "pitch", "mdct")


def check_codes(codes: np.ndarray | torch.Tensor, codec) -> torch.Tensor:
    """Codes [B, Q, T] as int64; UserError when the codec has another Q, or a code lies outside 0 .. K-1."""
    codes = torch.from_numpy(np.array(codes, dtype=np.int64))  # a copy: codes of a file are often read-only
    if codes.ndim != 3 or codes.shape[1] != codec.codebooks or codes.shape[2] == 0:
        raise UserError(f"codes of shape {list(codes.shape[1:])}: {codec.name} takes [{codec.codebooks}, T], T >= 1")
    if len(codes) and not 0 <= int(codes.min()) <= int(codes.max()) < codec.codes:
        raise UserError(f"codes {int(codes.min())} .. {int(codes.max())} lie outside 0 .. {codec.codes - 1}")
    return codes


def save_codec(directory: Path, codec, tensors: dict[str, torch.Tensor] | None = None, **more) -> Path:
    """Write codec.json, which describes a codec, and codec.safetensors where it has tensors of its own.

    UserError when the folder already holds another codec; the same one is left as it is.
    """
    if (directory / "codec.json").exists():
        return _check_same(directory, codec)
    description = {"name": codec.name, "codebooks": codec.codebooks, "codes": codec.codes, "hash": codec.hash, **more}
    try:
        with new_folder(directory) as folder:
            if tensors is not None:
                save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "codec.safetensors")
                (folder / "codec.safetensors").chmod(folder.stat().st_mode & 0o666)  # readable like codec.json
            (folder / "codec.json").write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")
    except OSError:
        if not (directory / "codec.json").exists():  # otherwise another process was faster
            raise
        return _check_same(directory, codec)
    return directory


def _check_same(directory: Path, codec) -> Path:
    present = read_description(directory)["hash"]
    if present != codec.hash:
        raise UserError(
            f"{directory} holds another codec (hash {present[:8]}, this one is {codec.hash[:8]}): "
            "choose another folder or delete it"
        )
    return directory


def read_description(directory: Path) -> dict:
    try:
        found = json.loads((directory / "codec.json").read_text(encoding="utf-8"))
        return {
            "name": str(found["name"]),
            "codebooks": int(found["codebooks"]),
            "codes": int(found["codes"]),
            "hash": str(found["hash"]),
            "source": found.get("source"),
        }
    except OSError as error:
        raise UserError(f"codec {directory} cannot be read: {error.strerror} ({error.filename})") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"codec {directory} is damaged (codec.json: {error!r}): delete the folder, fit again"
        ) from error
