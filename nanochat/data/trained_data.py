"""The data that a checkpoint was trained on, found again by its fingerprint, and other data in its place.

What counts is the sha256 of names and texts: the prepared shards that have it are the data, whatever became of the
source; a source that was moved, or is read by another release of Python, is the same data where that is equal.
"""

import dataclasses
import logging
from pathlib import Path

from nanochat.config.declaration import fields_of
from nanochat.config.settings import Settings
from nanochat.data.dataset import Dataset, read_manifest
from nanochat.data.prepare import CLIMBMIX_LAST, codec_is_here, open_climbmix
from nanochat.system.environment import UserError, base_dir

logger = logging.getLogger(__name__)

COMPARED_DOCUMENTS = 50  # documents of a look at other data


# What says where the data lies and which part of it is taken. A resumed run may name another place of the same data.
LOCATION_SETTINGS = ("data", "data_column", "data_split", "data_config", "data_limit")


# Further settings of the training's own data, which mean nothing to other data.
DATA_SETTINGS = (*LOCATION_SETTINGS, "data_audio_column", "skip_corrupt", "text_data", "text_share")


def find_prepared(fingerprint: dict | None, skip_corrupt: bool = False) -> Dataset | None:
    """The prepared dataset with this fingerprint's sha256, one that is tokenised first; None where there is none."""
    sha256 = (fingerprint or {}).get("sha256")
    if not sha256:
        return None
    found = []
    for path in sorted((base_dir() / "data").glob("[!.]*/manifest.json")):
        try:
            manifest = read_manifest(path.parent)
        except UserError as error:  # of another source, perhaps: it is an error when it is prepared
            logger.info(f"data: passing over {error}")
            continue
        if (manifest or {}).get("fingerprint", {}).get("sha256") == sha256 and codec_is_here(manifest):
            found.append(Dataset(path.parent, manifest, skip_corrupt))
    found.sort(key=lambda dataset: not any(dataset.directory.glob("tokens-*")))
    return found[0] if found else _find_climbmix(fingerprint, skip_corrupt)


def _find_climbmix(fingerprint: dict, skip_corrupt: bool) -> Dataset | None:
    """Its manifest counts all shards that are here, a run's fingerprint those of its limit."""
    limit = fingerprint.get("files", 0) - 1 if fingerprint.get("source") == "climbmix" else 0
    dataset = open_climbmix(limit, skip_corrupt) if 0 < limit <= CLIMBMIX_LAST else None
    return dataset if dataset and dataset.fingerprint["sha256"] == fingerprint["sha256"] else None


def is_local(data: str | None) -> bool:
    """Whether `data` is a path, where moved files may be found again: a named source is what it is."""
    return data is not None and data not in ("stdlib", "packages", "climbmix", "synth") and not data.startswith("hf:")


def is_same(trained_on: dict | None, fingerprint: dict) -> bool:
    """Whether documents are equal; a checkpoint that is too old to have a fingerprint is believed."""
    return not trained_on or trained_on.get("sha256") == fingerprint["sha256"]


def check_same(trained_on: dict | None, dataset: Dataset, where: Path, data: str) -> None:
    """Refuse other data than a run was trained on, before anything is made of it."""
    if not is_same(trained_on, dataset.fingerprint):
        raise UserError(
            f"{where} was trained on {describe(trained_on)}, data={data} now is {describe(dataset.fingerprint)}: bring "
            "the old data back or name where it lies with --data=PATH, or start a new run with --model_tag=NAME"
        )


def describe(fingerprint: dict) -> str:
    """A fingerprint as text: source, version and the first digits of the sha256."""
    source, version = (fingerprint.get(key) or "unknown" for key in ("source", "version"))
    return f"{source} ({version}, sha256 {str(fingerprint.get('sha256'))[:8]})"


def replace_data(settings: Settings, data: str, **given) -> Settings:
    """The settings of a training with other data in the place of its own; nothing else of that data's remains.

    given: what is said of the other data (data_limit, data_column, ...); None means the default.
    """
    fields = fields_of(type(settings))
    plain = {name: fields[name].default for name in DATA_SETTINGS if name in fields}
    return dataclasses.replace(settings, **plain | {n: v for n, v in given.items() if v is not None} | {"data": data})
