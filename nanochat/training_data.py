"""What a run reads: dataset and tokenizer, made where they are missing, the batches, and the held-out measurement."""

from collections.abc import Callable

from nanochat.checkpoint_manager import find_checkpoint, step_dir
from nanochat.dataloader import DataLoader, TokenStore
from nanochat.dataset import Dataset, prepare_for
from nanochat.loss_eval import bits_per_byte, packed_losses
from nanochat.modality import Vocabulary, modalities_of
from nanochat.packing import PackedLoader, Rows
from nanochat.runtime import Compute, UserError, print0
from nanochat.settings import Settings
from nanochat.tokenizer import Tokenizer, find_or_train


def prepare_data(settings: Settings, compute: Compute) -> tuple[Dataset, Tokenizer]:
    """Dataset and tokenizer; what is missing is made by rank 0, then found by all, or made once on nodes apart."""
    for turn in (compute.rank == 0, compute.local_rank == 0 and compute.rank != 0, compute.local_rank != 0):
        if turn:
            dataset = prepare_for(settings, say=print0)
            tokenizer = _tokenizer(settings, dataset)
        compute.barrier(patient=True)
    return dataset, tokenizer


def _tokenizer(settings: Settings, dataset: Dataset) -> Tokenizer:
    if settings.init_from and not settings.tokenizer:
        folder = step_dir(*find_checkpoint(settings.init_from, None)) / "tokenizer"
        if folder.is_dir():
            return Tokenizer.load(folder)
    return find_or_train(settings, dataset, say=print0)


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


def batches(settings: Settings, dataset: Dataset, tokenizer: Tokenizer, compute: Compute) -> DataLoader:
    """The training batches: a stream of text, or whole captioned sounds in rows."""
    store = TokenStore(dataset, tokenizer, "train", vocabulary=vocabulary_of(settings, tokenizer), say=print0)
    shape = (settings.rows, settings.max_seq_len, settings.seed, compute.rank, compute.world_size, compute.device)
    if dataset.codec is None:
        return DataLoader(store, *shape)
    return PackedLoader(Rows(store, settings.max_seq_len, print0), *shape, count=settings.counted_modalities)


def held_out_measure(settings: Settings, dataset: Dataset, tokenizer: Tokenizer, compute: Compute) -> Callable:
    """measure(model, stop) of the held-out split, as bits_per_byte() or, with sounds, packed_losses() returns it."""
    store = TokenStore(dataset, tokenizer, "val", vocabulary=vocabulary_of(settings, tokenizer), say=print0)
    how = dict(
        rows=settings.device_batch_size, max_tokens=settings.eval_tokens, rank=compute.rank,
        world_size=compute.world_size,
    )  # fmt: skip
    if dataset.codec is None:
        measure, scored, how["seq_len"] = bits_per_byte, store.stream(), settings.max_seq_len
    else:
        measure, scored = packed_losses, Rows(store, settings.max_seq_len, print0)
    return lambda model, stop: measure(model, scored, tokenizer.token_bytes, stop=stop, **how)
