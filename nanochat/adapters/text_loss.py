"""The host's loss on held-out text; a frozen host's must not change in training."""

import logging
from collections.abc import Callable

import torch

from nanochat.adapters.model import AdapterModel
from nanochat.config.adapter_settings import AdapterSettings
from nanochat.data.dataset import Dataset
from nanochat.data.prepare import prepare
from nanochat.data.token_store import TokenStore
from nanochat.data.trained_data import describe, find_prepared, is_same
from nanochat.evaluation.bpb import bits_per_byte
from nanochat.runtime import Compute, rank0_first

logger = logging.getLogger(__name__)


def make_text_loss(
    settings: AdapterSettings, model: AdapterModel, compute: Compute, known: dict | None = None
) -> tuple[Callable | None, dict | None]:
    """(measure(model, stop=None) -> nats per token of held-out text, of at most check_tokens; the text's fingerprint).

    None without check_text. known: the fingerprint in a checkpoint, by which the prepared text is found again.
    """
    if settings.check_text is None:
        return None, None

    def open_text() -> Dataset:
        options = dict(skip_corrupt=settings.skip_corrupt)
        return find_prepared(known, **options) or prepare(settings.check_text, **options)

    dataset = rank0_first(compute, open_text)
    if not is_same(known, dataset.fingerprint):
        logger.warning(
            f"check_text={settings.check_text} is {describe(dataset.fingerprint)} now, {describe(known)} when "
            "the training began: the text's losses before and after are not comparable"
        )
    tokenizer = model.host.tokenizer
    stream = TokenStore(dataset, tokenizer, "val").stream(settings.check_tokens + 1)
    counts = torch.ones(model.config.vocab_size, dtype=torch.int64).numpy()
    counts[tokenizer.bos_id] = 0  # nothing predicts the beginning of a document

    def measure(scored, stop: Callable[[], bool] | None = None) -> float:
        found = bits_per_byte(
            scored,
            stream,
            counts,
            rows=settings.batch_plan(compute.world_size)[0],
            seq_len=settings.max_seq_len,
            max_tokens=settings.check_tokens,
            rank=compute.rank,
            world_size=compute.world_size,
            stop=stop,
        )
        return found["nats"] / found["tokens"]

    return measure, dataset.fingerprint
