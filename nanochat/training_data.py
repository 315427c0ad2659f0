"""What a run reads: dataset and tokenizer, made where they are missing, the batches, and the held-out measurement."""

import json
from collections.abc import Callable
from pathlib import Path

from nanochat.checkpoint_manager import read_metadata, step_path, tokenizer_of
from nanochat.dataloader import DataLoader, TokenStore
from nanochat.dataset import Dataset, prepare_for
from nanochat.loss_eval import bits_per_byte, packed_losses
from nanochat.modality import Vocabulary, modalities_of
from nanochat.packing import PackedLoader, Rows
from nanochat.runtime import Compute, UserError, print0
from nanochat.settings import RunSettings, Settings
from nanochat.tokenizer import Tokenizer, find_or_train, load_named
from nanochat.trained_data import open_resumed_data


def prepare_data(
    settings: Settings, compute: Compute, begun: tuple[Path, int] | None = None, resumed: bool = False
) -> tuple[Dataset, Tokenizer]:
    """Dataset and tokenizer; what is missing is made by rank 0, then found by all, or made once on nodes apart.

    begun: tag folder and step of the checkpoint that gives the run its weights, and so its tokenizer. resumed: it is
    the run's own, whose data is found again by its fingerprint. UserError when that is not to be had.
    """

    def make() -> tuple[Dataset, Tokenizer]:
        if resumed:
            dataset = resumed_data(settings, *begun)
            if own := tokenizer_of(*begun):
                return dataset, named_or_own(settings, own)
        else:
            dataset = prepare_for(settings, say=print0)
        if begun is None or settings.tokenizer:
            return dataset, find_or_train(settings, dataset, say=print0)
        own = tokenizer_of(*begun)
        if own is None:
            raise UserError(f"{step_path(*begun)} holds no tokenizer: name the one of its training with --tokenizer")
        return dataset, own

    return in_turns(compute, make)


def named_or_own(settings: Settings, own: Tokenizer) -> Tokenizer:
    """The tokenizer that the settings of a resumed run name, to be compared; the checkpoint's own where it is gone."""
    if settings.tokenizer is None:
        return own
    try:
        return load_named(settings.tokenizer)
    except UserError as error:
        print0(f"{error} (taking the checkpoint's own, which is the same)")
        return own


def resumed_data(settings: RunSettings, tag_dir: Path, step: int) -> Dataset:
    """The data of a run that resumes from this step; UserError when what is there is another."""
    where = step_path(tag_dir, step)
    metadata = read_metadata(where)
    return open_resumed_data(
        settings, metadata.get("data_fingerprint"), metadata.get("settings", {}), where, say=print0
    )


def in_turns(compute: Compute, make: Callable):
    """What make() returns, on every rank: rank 0 makes it, then the others find what it left on disk."""
    for turn in (compute.rank == 0, compute.local_rank == 0 and compute.rank != 0, compute.local_rank != 0):
        if turn:
            made = make()
        compute.barrier(patient=True)
    return made


def vocabulary_of(settings: Settings, tokenizer: Tokenizer) -> Vocabulary:
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


def say_what_is_idle(settings: Settings, dataset: Dataset) -> None:
    """Modalities that the data holds nothing of have parameters all the same."""
    if idle := [name for name in settings.modality_codes() if name != "audio" or dataset.codec is None]:
        print0(f"{dataset.name} holds nothing of {', '.join(idle)}: what is theirs in the model stays as it begins")


def warn_repeated_rows(settings: RunSettings, loader: DataLoader) -> None:
    """Say so when a step takes more rows than an epoch has: the larger batch holds copies, not more text."""
    rows, name = loader.epoch_rows(), loader.store.dataset.name
    if rows is not None and rows < settings.rows:
        print0(
            f"warning: a step takes {settings.rows:,} rows and an epoch of {name} has {rows:,}: each row comes "
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


def batches(settings: Settings, dataset: Dataset, tokenizer: Tokenizer, compute: Compute) -> DataLoader:
    """The training batches: a stream of text, or whole captioned sounds in rows."""
    store = TokenStore(dataset, tokenizer, "train", vocabulary=vocabulary_of(settings, tokenizer), say=print0)
    shape = (settings.rows, settings.max_seq_len, settings.seed, compute.rank, compute.world_size, compute.device)
    if dataset.codec is None:
        return DataLoader(store, *shape)
    sliced = settings.route == "slice" and settings.untie != "none"
    rows = Rows(store, settings.max_seq_len, print0, one_layout=sliced)
    return PackedLoader(rows, *shape, count=settings.counted_modalities)


def held_out_measure(settings: Settings, dataset: Dataset, tokenizer: Tokenizer, compute: Compute) -> Callable:
    """measure(model, stop) of the held-out split, as bits_per_byte() or, with sounds, packed_losses() returns it."""
    store = TokenStore(dataset, tokenizer, "val", vocabulary=vocabulary_of(settings, tokenizer), say=print0)
    rows, _ = settings.batch_plan(compute.world_size)  # the training's shape, and no more than a step has
    how = dict(rows=rows, max_tokens=settings.eval_tokens, rank=compute.rank, world_size=compute.world_size)
    if dataset.codec is None:
        most = settings.eval_tokens and settings.eval_tokens + 1  # a target more than inputs
        measure, scored, how["seq_len"] = bits_per_byte, store.stream(most), settings.max_seq_len
    else:
        rows = Rows(store, settings.max_seq_len, print0, max_tokens=settings.eval_tokens)
        measure, scored = packed_losses, rows
    return lambda model, stop: measure(model, scored, tokenizer.token_bytes, stop=stop, **how)
