"""The data that a checkpoint was trained on, found again by its fingerprint, and other data in its place.

What counts is the sha256 of names and texts: the prepared shards that have it are the data, whatever became of the
source; a source that was moved, or is read by another release of Python, is the same data where that is equal.
"""

import dataclasses
import itertools
from collections import Counter
from pathlib import Path

from nanochat.dataset import (
    CLIMBMIX_LAST,
    SPLITS,
    Dataset,
    codec_is_here,
    open_climbmix,
    prepare_for,
    read_manifest,
    source_of,
    state_of,
)
from nanochat.encodings import Undecodable, decode_text
from nanochat.runtime import UserError, base_dir, first_line
from nanochat.settings import RunSettings, Say, Settings, fields_of

LOOK = 50  # documents of a look at other data
# What says where the data lies and which part of it is taken. A resumed run may name another place of the same data.
PLACE = ("data", "data_column", "data_split", "data_config", "data_limit")
# Further settings of the training's own data, which mean nothing to other data.
OWN = (*PLACE, "data_audio_column", "skip_corrupt", "text_data", "text_share")


def find_prepared(fingerprint: dict | None, skip_corrupt: bool = False, say: Say = print) -> Dataset | None:
    """The prepared dataset with this fingerprint's sha256, one that is tokenised first; None where there is none."""
    sha256 = (fingerprint or {}).get("sha256")
    if not sha256:
        return None
    found = []
    for path in sorted((base_dir() / "data").glob("[!.]*/manifest.json")):
        try:
            manifest = read_manifest(path.parent)
        except UserError as error:  # of another source, perhaps: whoever needs it is told when it is prepared
            say(f"data: passing over {error}")
            continue
        if (manifest or {}).get("fingerprint", {}).get("sha256") == sha256 and codec_is_here(manifest):
            found.append(Dataset(path.parent, manifest, skip_corrupt, say))
    found.sort(key=lambda dataset: not any(dataset.directory.glob("tokens-*")))
    return found[0] if found else _find_climbmix(fingerprint, skip_corrupt, say)


def _find_climbmix(fingerprint: dict, skip_corrupt: bool, say: Say) -> Dataset | None:
    """Its manifest counts all shards that are here, a run's fingerprint those of its limit."""
    limit = fingerprint.get("files", 0) - 1 if fingerprint.get("source") == "climbmix" else 0
    dataset = open_climbmix(limit, skip_corrupt, say) if 0 < limit <= CLIMBMIX_LAST else None
    return dataset if dataset and dataset.fingerprint["sha256"] == fingerprint["sha256"] else None


def open_trained_data(settings: RunSettings, trained_on: dict | None, *, say: Say = print) -> Dataset:
    """The dataset with the fingerprint that a checkpoint has; where no prepared one has it, what the settings name.

    Says it when the source can no longer be found, or has changed since. The fingerprint of what is returned may be
    another one: that is for the caller to judge.
    """
    dataset = find_prepared(trained_on, settings.skip_corrupt, say)
    if dataset is None:
        return prepare_for(settings, say=say)
    if change := _change(settings, dataset):
        sha256 = dataset.fingerprint["sha256"][:8]
        say(f"data: {settings.data} {change}: taking the shards that were prepared from it, {sha256} in "
            f"{dataset.directory}")  # fmt: skip
    return dataset


def _change(settings: RunSettings, dataset: Dataset) -> str | None:
    """What became of a dataset's source since it was prepared, from a look at its files; None: nothing."""
    if settings.data == "climbmix":
        return None
    try:
        source = source_of(settings, say=lambda line: None)
    except (UserError, OSError) as error:
        return f"cannot be read now ({first_line(error).partition(';')[0]})"
    if source is None or state_of(source) != dataset.manifest.get("state"):
        return "has changed since, or is read in another way now"
    return None


def open_resumed_data(
    settings: RunSettings, trained_on: dict | None, trained_with: dict, where: Path, *, say: Say = print
) -> Dataset:
    """The data of a run that resumes from the step folder `where`; UserError, in one line, where it is not that.

    trained_with: the checkpoint's settings. A run that now names another place of its data is to find the same there.
    """
    kind = type(settings)
    defaults = {name: field.default for name, field in fields_of(kind).items()}
    moved = any(getattr(settings, name) != trained_with.get(name, defaults[name]) for name in PLACE)
    if not moved:
        try:
            dataset = open_trained_data(settings, trained_on, say=say)
        except UserError as error:
            if not trained_on:
                raise
            raise UserError(
                f"{error} (no shards prepared from {describe(trained_on)}, on which {where} was trained, are in "
                f"{base_dir() / 'data'}: name where it lies now with --data=PATH)"
            ) from error
    else:
        known = find_prepared(trained_on, settings.skip_corrupt, say)
        if known and _begins_differently(settings, known):  # seen before hours of preparing
            raise UserError(
                f"{where} was trained on {describe(trained_on)}, data={settings.data} begins with other documents: "
                "name where the same data lies with --data=PATH, or start a new run with --model_tag=NAME"
            )
        dataset = prepare_for(settings, say=say)
        if is_same(trained_on, dataset.fingerprint):  # its tokens are at hand under the earlier name
            dataset = known or dataset
    check_same(trained_on, dataset, where, settings.data)
    return dataset


def _begins_differently(settings: RunSettings, known: Dataset) -> bool:
    """Whether the first documents of what the settings name are others than the first that were prepared.

    Of text alone: a look at sounds would encode them. Equal beginnings say nothing: that takes all documents.
    """
    if known.codec is not None or "audio" in settings.modality_codes():
        return False
    prepared = {}
    for split in SPLITS:
        prepared |= dict(itertools.islice(known.documents(split), LOOK))
    first = {}
    for document in itertools.islice(source_of(settings, say=lambda line: None).read(Counter()), LOOK):
        name, text = document[:2]
        try:
            first[name] = decode_text(text) if isinstance(text, bytes) else text
        except Undecodable:
            continue  # counted when all is read
    first = {name: text for name, text in first.items() if text.strip()}
    common = first.keys() & prepared.keys()
    return bool(first) and (not common or any(first[name] != prepared[name] for name in common))


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
    """A fingerprint in words: source, version and the first digits of the sha256."""
    source, version = (fingerprint.get(key) or "unknown" for key in ("source", "version"))
    return f"{source} ({version}, sha256 {str(fingerprint.get('sha256'))[:8]})"


def with_other_data(settings: Settings, data: str, **given) -> Settings:
    """The settings of a training with other data in the place of its own; nothing else of that data's remains.

    given: what is said of the other data (data_limit, data_column, ...); None means the default.
    """
    fields = fields_of(type(settings))
    plain = {name: fields[name].default for name in OWN if name in fields}
    return dataclasses.replace(settings, **plain | {n: v for n, v in given.items() if v is not None} | {"data": data})
