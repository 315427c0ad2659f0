"""The parts of an evaluation that training and base_eval share: bits per byte, CORE or OFFLINE, samples."""

import logging
import time
from collections.abc import Callable

from nanochat.config.settings import FIELDS, Settings, checked
from nanochat.data.dataset import Dataset
from nanochat.data.packing import Rows
from nanochat.data.token_store import TokenStore
from nanochat.data.tokenizer import Tokenizer
from nanochat.engine import generate
from nanochat.evaluation.bpb import bits_per_byte, packed_losses
from nanochat.evaluation.core import evaluate_core
from nanochat.evaluation.core_bundle import find_bundle, load_bundle
from nanochat.evaluation.offline import build_tasks, cached_tasks, evaluate_offline
from nanochat.runtime import Compute, from_rank0

logger = logging.getLogger(__name__)

SAMPLE_TOKENS = 64


def settings_of(metadata: dict) -> Settings:
    """The settings of the training; unknown names are ignored, absent ones take their default."""
    saved = metadata.get("settings")
    if not isinstance(saved, dict):
        logger.info(f"the checkpoint holds no settings: assuming the defaults, data={Settings().data}")
        saved = {}
    return Settings(**{name: checked(name, value) for name, value in saved.items() if name in FIELDS})


def warn_of_other_data(dataset: Dataset, trained: dict | None) -> None:
    """Warn when the documents are not those of the training: bits per byte are not comparable then."""
    now = dataset.fingerprint
    if not trained:
        logger.info("the checkpoint has no data fingerprint: its training data is unknown and may differ from this")
    elif trained.get("sha256") != now["sha256"]:
        logger.warning(
            f"trained on {describe_data(trained)}, evaluated on {describe_data(now)}: the numbers are not comparable, "
            "and documents held out here may have been trained on"
        )


def describe_data(fingerprint: dict) -> str:
    """'source version (hash)' of a data fingerprint."""
    parts = [str(fingerprint.get(key)) for key in ("source", "version")]
    return f"{' '.join(parts)} ({str(fingerprint.get('sha256'))[:8]})"


def evaluate_bpb(
    model, tokenizer: Tokenizer, dataset: Dataset, settings: Settings, rows: int, compute: Compute
) -> dict:
    """Bits per byte of the complete val split, and of the first eval_tokens of train, by default as many as val has."""
    ranks = dict(rank=compute.rank, world_size=compute.world_size)
    result = {}
    limit = settings.eval_tokens
    seq_len = model.config.sequence_len
    for split in ("val", "train"):
        started = time.perf_counter()
        store = TokenStore(dataset, tokenizer, split, vocabulary=model.vocabulary)
        if dataset.codec is None:
            stream = store.stream(None if split == "val" else limit + 1)
            limit = limit or len(stream)
            found = bits_per_byte(model, stream, tokenizer.token_bytes, rows=rows, seq_len=seq_len, **ranks)
        else:
            max_tokens = None if split == "val" else limit
            packed = Rows(store, seq_len, max_tokens=max_tokens)
            limit = limit or len(packed) * seq_len
            found = packed_losses(model, packed, tokenizer.token_bytes, rows=rows, max_tokens=max_tokens, **ranks)
        store.close()
        result |= {split: found["bpb"], f"{split}_bytes": found["bytes"], f"{split}_tokens": found["tokens"]}
        result[f"{split}_seconds"] = time.perf_counter() - started
        if "losses" in found:
            result[f"{split}_losses"] = found["losses"]
    if result["val_bytes"] != dataset.text_bytes("val"):
        logger.warning(f"scored {result['val_bytes']} of {dataset.text_bytes('val')} held-out bytes")
    return result


def check_suite(compute: Compute) -> None:
    """Called before a training that will score CORE: a corrupt bundle is a UserError on every rank."""

    def check() -> None:
        if (bundle := find_bundle(download=False)) is not None:
            load_bundle(bundle)

    from_rank0(check, compute.rank, compute.world_size, compute.device)


def evaluate_suite(
    model,
    tokenizer: Tokenizer,
    dataset: Dataset,
    max_per_task: int | None = None,
    *,
    rank: int = 0,
    world_size: int = 1,
    stop: Callable[[], bool] | None = None,
) -> dict[str, float]:
    """{"core": score} where the CORE bundle lies in the base folder, else {"offline": score}; {} without any task.

    For use during training: nothing is downloaded, no cheap baselines, and rank 0 makes OFFLINE's items once. All ranks
    call it together.
    stop: called before every forward; if it returns True on any rank, all ranks raise EvaluationInterrupted.
    """
    options = dict(max_per_task=max_per_task, rank=rank, world_size=world_size, stop=stop)
    bundle = from_rank0(lambda: find_bundle(download=False), rank, world_size, model.device)
    if bundle is not None:
        return {"core": evaluate_core(model, tokenizer, bundle, **options)["score"]}
    tasks = cached_tasks(dataset, lambda: from_rank0(lambda: build_tasks(dataset), rank, world_size, model.device))
    score = evaluate_offline(model, tokenizer, dataset, baselines=False, tasks=tasks, **options)["score"]
    return {} if score is None else {"offline": score}


def draw_samples(model, tokenizer: Tokenizer, dataset: Dataset, seed: int) -> list[dict]:
    """Continuations of the first lines of four held-out documents, then two unconditional samples (after BOS)."""
    count = dataset.num_documents("val")
    prompts = []
    for _, text in dataset.documents_at("val", {count * n // 4 for n in range(4)}):
        lines = [line for line in text[:2000].split("\n") if line.strip()]
        prompts.append("\n".join(lines[:2])[:160].rstrip())
    samples = []
    for prompt in [*dict.fromkeys(filter(None, prompts)), "", ""]:
        ids = tokenizer.encode(prompt, bos=True)
        stop = (tokenizer.bos_id, *(m.start for m in model.config.modalities))
        options = dict(temperature=0.8, top_k=50, seed=seed + len(samples), stop=stop)
        new = generate(model, ids, SAMPLE_TOKENS, **options)[0]
        samples.append({"prompt": prompt, "text": tokenizer.decode(new)})
    return samples
