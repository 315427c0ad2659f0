"""What a run reads: dataset and tokenizer, made where they are missing, the batches, and the held-out measurement."""

import itertools
import json
import logging
import re
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from nanochat.checkpoint_manager import tokenizer_of
from nanochat.config.declaration import fields_of
from nanochat.config.settings import RunSettings, Settings
from nanochat.data.dataloader import DataLoader
from nanochat.data.dataset import SPLITS, Dataset
from nanochat.data.encodings import Undecodable, decode_text
from nanochat.data.local_sources import Source
from nanochat.data.packing import PackedLoader, Rows
from nanochat.data.prepare import (
    CLIMBMIX_SHARDS,
    find_version,
    open_climbmix,
    open_or_prepare,
    plan_text_source,
    prepare,
    state_of,
)
from nanochat.data.token_store import TokenStore
from nanochat.data.tokenizer import Tokenizer
from nanochat.data.trained_data import (
    COMPARED_DOCUMENTS,
    LOCATION_SETTINGS,
    check_same,
    describe,
    find_prepared,
    is_same,
)
from nanochat.evaluation.bpb import bits_per_byte, packed_losses
from nanochat.modality import Vocabulary, modalities_of
from nanochat.runtime import Compute, first_line, rank0_first
from nanochat.system import logs
from nanochat.system.environment import UserError, base_dir
from nanochat.training.resume import Origin
from nanochat.upstream.named_tokenizer import find_folders, load_named

logger = logging.getLogger(__name__)


def prepare_data(settings: Settings, compute: Compute, origin: Origin | None = None) -> tuple[Dataset, Tokenizer]:
    """Dataset and tokenizer; what is missing is made by rank 0, then found by all, or made once on nodes apart.

    origin: the checkpoint that gives the run its weights, and so its tokenizer; where the run resumes, its data is
    found again by its fingerprint. UserError when that is not to be had.
    """

    def make() -> tuple[Dataset, Tokenizer]:
        if origin and origin.resumed:
            dataset = open_run_data(settings, origin)
            if own := tokenizer_of(origin.folder, origin.step):
                return dataset, load_named_or_own_tokenizer(settings, own)
        else:
            dataset = prepare_for(settings)
        if origin is None or settings.tokenizer:
            return dataset, find_or_train(settings, dataset)
        own = tokenizer_of(origin.folder, origin.step)
        if own is None:
            raise UserError(f"{origin.path} holds no tokenizer: name the one of its training with --tokenizer")
        return dataset, own

    return rank0_first(compute, make)


def load_named_or_own_tokenizer(settings: Settings, own: Tokenizer) -> Tokenizer:
    """The tokenizer that the settings of a resumed run name, to be compared; the checkpoint's own where it is gone."""
    if settings.tokenizer is None:
        return own
    try:
        return load_named(settings.tokenizer)
    except UserError as error:
        logger.info(f"{error} (taking the checkpoint's own, which is the same)")
        return own


def open_run_data(settings: RunSettings, origin: Origin) -> Dataset:
    """The data of a run that resumes from this checkpoint; UserError when what is there is another."""
    fingerprint, trained_with = (origin.metadata.get(name) for name in ("data_fingerprint", "settings"))
    return open_resumed_data(settings, fingerprint, trained_with or {}, origin.path)


def build_vocabulary(settings: Settings, tokenizer: Tokenizer) -> Vocabulary:
    """The ids of the run's model; UserError for a tokenizer without reserved ids to start the modalities with."""
    modalities = modalities_of(settings, tokenizer.vocab_size)
    for number, modality in enumerate(modalities):
        token = f"<|reserved_{number}|>"
        if token not in tokenizer.specials or tokenizer.special_id(token) != modality.start:
            raise UserError(
                f"tokenizer {tokenizer.name} has no {token} at id {modality.start} to start {modality.name} with: take "
                "one that this repository trained (--tokenizer=None trains it)"
            )
    return Vocabulary(tokenizer.vocab_size, modalities)


def warn_unused_modalities(settings: Settings, dataset: Dataset) -> None:
    """Modalities that the data holds nothing of have parameters all the same."""
    if idle := [name for name in settings.modality_codes() if name != "audio" or dataset.codec is None]:
        logger.warning(f"{dataset.name} has no {' or '.join(idle)} data; its parameters keep their initial values")


def warn_repeated_rows(settings: RunSettings, loader: DataLoader) -> None:
    """Say so when a step takes more rows than an epoch has: the larger batch holds copies, not more text."""
    rows, name = loader.epoch_rows(), loader.store.dataset.name
    if rows is not None and rows < settings.rows:
        logger.warning(
            f"a step takes {settings.rows:,} rows and an epoch of {name} has {rows:,}: each row comes "
            f"{settings.rows / rows:.1f} times in one step; total_batch_size={rows * settings.max_seq_len} or more "
            "data avoids it"
        )


def codec_files(dataset: Dataset) -> Path | None:
    """The folder of the codec of the data's sounds; UserError when it is not the one that coded them."""
    if dataset.codec is None:
        return None
    folder = Path(dataset.codec["directory"])
    try:
        there = json.loads((folder / "codec.json").read_text(encoding="utf-8"))["hash"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"codec {folder} cannot be read ({error}): delete {dataset.directory} to prepare anew"
        ) from error
    if there != dataset.codec["hash"]:
        raise UserError(
            f"codec {folder} has hash {str(there)[:8]}, {dataset.name} was coded with {dataset.codec['hash'][:8]}: "
            f"bring that one back, or delete {dataset.directory} to prepare anew"
        )
    return folder


def make_train_loader(settings: Settings, dataset: Dataset, tokenizer: Tokenizer, compute: Compute) -> DataLoader:
    """The training batches: a stream of text, or whole captioned sounds in rows."""
    store = TokenStore(dataset, tokenizer, "train", vocabulary=build_vocabulary(settings, tokenizer))
    shape = (settings.rows, settings.max_seq_len, settings.seed, compute.rank, compute.world_size, compute.device)
    if dataset.codec is None:
        return DataLoader(store, *shape)
    rows = Rows(store, settings.max_seq_len)
    return PackedLoader(rows, *shape, count=settings.counted_modalities)


def make_validation(settings: Settings, dataset: Dataset, tokenizer: Tokenizer, compute: Compute) -> Callable:
    """measure(model, stop=None) of the held-out split: bits_per_byte() or, with sounds, packed_losses()."""
    store = TokenStore(dataset, tokenizer, "val", vocabulary=build_vocabulary(settings, tokenizer))
    rows, _ = settings.batch_plan(compute.world_size)  # the training's shape, and no more than a step has
    how = dict(rows=rows, max_tokens=settings.eval_tokens, rank=compute.rank, world_size=compute.world_size)
    if dataset.codec is None:
        most = settings.eval_tokens and settings.eval_tokens + 1  # a target more than inputs
        measure, scored, how["seq_len"] = bits_per_byte, store.stream(most), settings.max_seq_len
    else:
        rows = Rows(store, settings.max_seq_len, max_tokens=settings.eval_tokens)
        measure, scored = packed_losses, rows
    return lambda model, stop=None: measure(model, scored, tokenizer.token_bytes, stop=stop, **how)


def prepare_for(settings: Settings) -> Dataset:
    """The dataset that the data* settings name, prepared if need be; of captioned sounds when modalities has audio."""
    if "audio" in settings.modality_codes():
        from nanochat.audio.dataset import plan_audio  # needs this module in turn

        text = settings.text_data and prepare(settings.text_data, skip_corrupt=settings.skip_corrupt)
        return open_or_prepare(plan_audio(settings, text or None), settings.skip_corrupt)
    return prepare(settings.data, **_text_options(settings))


def _text_options(settings: Settings) -> dict:
    names = ("column", "split", "config", "limit")
    return {name: getattr(settings, f"data_{name}") for name in names} | {"skip_corrupt": settings.skip_corrupt}


def plan_source(settings: Settings) -> Source | None:
    """What prepare_for() would read, from a look at the files; None where the text to mix in is not prepared.

    UserError when it is not there. Of anything but climbmix.
    """
    if "audio" not in settings.modality_codes():
        return plan_text_source(settings.data, **_text_options(settings))
    from nanochat.audio.dataset import plan_audio

    if settings.text_data is None:
        return plan_audio(settings, None)
    if settings.text_data == "climbmix":
        text = open_climbmix(CLIMBMIX_SHARDS, settings.skip_corrupt)
    else:
        plan = plan_text_source(settings.text_data, skip_corrupt=settings.skip_corrupt)
        text = find_version(plan, settings.skip_corrupt)
    return text and plan_audio(settings, text)


def find_or_train(settings: Settings, dataset) -> Tokenizer:
    """The tokenizer that the settings name (a folder, or a name under tokenizers/), else one trained on this data.

    A named folder may also hold nanochat's own tokenizer.pkl, which is read where there is no ranks.tiktoken.

    dataset: nanochat.data.dataset.Dataset; only its train split is learnt from. The same data and vocab_size
    find the tokenizer of an earlier run. UserError: nothing of that name (saying what exists), or too little text.
    """
    root = base_dir() / "tokenizers"
    if settings.tokenizer is not None:
        return load_named(settings.tokenizer)
    source = re.sub(r"[^A-Za-z0-9._]+", "-", dataset.name).strip("-.") or "data"
    name = f"{source}-{settings.vocab_size}-{dataset.fingerprint['sha256'][:8]}"
    for directory in find_folders(root, name):
        return Tokenizer.load(directory)
    logger.info(f"training a tokenizer of {settings.vocab_size} ids on {dataset.name}")
    start = time.perf_counter()
    tokenizer = Tokenizer.train((text for _, text in dataset.documents("train")), settings.vocab_size)
    tokenizer.name = f"{name}-{tokenizer.hash[:8]}"
    directory = tokenizer.save(root / tokenizer.name)
    logger.info(f"tokenizer ready in {time.perf_counter() - start:.1f} s: {directory}")
    return tokenizer


def open_trained_data(settings: RunSettings, trained_on: dict | None) -> Dataset:
    """The dataset with the fingerprint that a checkpoint has; where no prepared one has it, what the settings name.

    Says it when the source can no longer be found, or has changed since. The fingerprint of what is returned may be
    another one: that is for the caller to judge.
    """
    dataset = find_prepared(trained_on, settings.skip_corrupt)
    if dataset is None:
        return prepare_for(settings)
    if change := _describe_change(settings, dataset):
        sha256 = dataset.fingerprint["sha256"][:8]
        logger.info(
            f"data: {settings.data} {change}: taking the shards that were prepared from it, {sha256} in "
            f"{dataset.directory}"
        )
    return dataset


def _describe_change(settings: RunSettings, dataset: Dataset) -> str | None:
    """What became of a dataset's source since it was prepared, from a look at its files; None: nothing."""
    if settings.data == "climbmix":
        return None
    try:
        with logs.muted():
            source = plan_source(settings)
    except (UserError, OSError) as error:
        return f"cannot be read now ({first_line(error).partition(';')[0]})"
    if source is None or state_of(source) != dataset.manifest.get("state"):
        return "has changed since, or is read in another way now"
    return None


def open_resumed_data(settings: RunSettings, trained_on: dict | None, trained_with: dict, where: Path) -> Dataset:
    """The data of a run that resumes from the step folder `where`; UserError, in one line, where it is not that.

    trained_with: the checkpoint's settings. A run that now names another place of its data is to find the same there.
    """
    kind = type(settings)
    defaults = {name: field.default for name, field in fields_of(kind).items()}
    moved = any(getattr(settings, name) != trained_with.get(name, defaults[name]) for name in LOCATION_SETTINGS)
    if not moved:
        try:
            dataset = open_trained_data(settings, trained_on)
        except UserError as error:
            if not trained_on:
                raise
            raise UserError(
                f"{error} (no shards prepared from {describe(trained_on)}, on which {where} was trained, are in "
                f"{base_dir() / 'data'}: name where it lies now with --data=PATH)"
            ) from error
    else:
        known = find_prepared(trained_on, settings.skip_corrupt)
        if known and _starts_with_other_documents(settings, known):  # seen before hours of preparing
            raise UserError(
                f"{where} was trained on {describe(trained_on)}, data={settings.data} begins with other documents: "
                "name where the same data lies with --data=PATH, or start a new run with --model_tag=NAME"
            )
        dataset = prepare_for(settings)
        if is_same(trained_on, dataset.fingerprint):  # its tokens are at hand under the earlier name
            dataset = known or dataset
    check_same(trained_on, dataset, where, settings.data)
    return dataset


def _starts_with_other_documents(settings: RunSettings, known: Dataset) -> bool:
    """Whether the first documents of what the settings name are others than the first that were prepared.

    Of text alone: a look at sounds would encode them. Equal beginnings say nothing: that takes all documents.
    """
    if known.codec is not None or "audio" in settings.modality_codes():
        return False
    prepared = {}
    for split in SPLITS:
        prepared |= dict(itertools.islice(known.documents(split), COMPARED_DOCUMENTS))
    first = {}
    with logs.muted():
        documents = list(itertools.islice(plan_source(settings).read(Counter()), COMPARED_DOCUMENTS))
    for document in documents:
        name, text = document[:2]
        try:
            first[name] = decode_text(text) if isinstance(text, bytes) else text
        except Undecodable:
            continue  # counted when all is read
    first = {name: text for name, text in first.items() if text.strip()}
    common = first.keys() & prepared.keys()
    return bool(first) and (not common or any(first[name] != prepared[name] for name in common))
