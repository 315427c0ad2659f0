"""From one checkpoint to another: where a model comes from, settings to train it on, what a change costs in loss."""

import dataclasses
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from nanochat.checkpoint_manager import (
    check_codec,
    check_state,
    check_tokenizer,
    checkpoints_dir,
    find_checkpoint,
    is_upstream,
    load_checkpoint,
    model_config,
    model_from_state,
    save_checkpoint,
    step_path,
    tokenizer_of,
)
from nanochat.config.config_file import as_dict, render_config
from nanochat.config.settings import FIELDS, Settings, checked, validate
from nanochat.conversion.tying import KEEP, State, tied, untied
from nanochat.data.prepare import climbmix_is_here
from nanochat.data.tokenizer import Tokenizer
from nanochat.data.trained_data import find_prepared, replace_data
from nanochat.data_pipeline import make_validation, open_trained_data
from nanochat.files import write_atomically
from nanochat.gpt import GPT, GPTConfig
from nanochat.runtime import Compute
from nanochat.system.environment import UserError, expand_user
from nanochat.upstream.foreign_weights import describe_nonfinite

logger = logging.getLogger(__name__)

MEASURED_TOKENS = 16_384  # held-out tokens of a comparison: a few batches


@dataclasses.dataclass(frozen=True)
class Source:
    """A model to convert, with what else its files hold."""

    name: str  # of its folder
    step: int
    config: GPTConfig
    state: State
    optimizer_state: State | None
    tokenizer: Tokenizer | None
    metadata: dict
    foreign: bool  # not in our format
    codec: Path | None = None  # of its sounds, a folder


def open_source(model_tag: str | None, step: int | None, era: str | None, with_optimizer: bool) -> Source:
    """A checkpoint of ours or nanochat's own, by its tag or folder; UserError where the parts do not fit together.

    with_optimizer: read the state of nanochat's optimizer too, where its files hold it whole.
    """
    folder, step = find_checkpoint(model_tag, step)
    foreign = is_upstream(folder, step)
    state, optimizer_state, metadata = load_checkpoint(folder, step, "cpu", foreign and with_optimizer, era=era)
    tokenizer = tokenizer_of(folder, step)
    if tokenizer is not None:
        check_tokenizer(tokenizer, metadata, step_path(folder, step))
    name, config = folder.resolve().name, model_config(metadata)
    codec = None if foreign or not (own := step_path(folder, step) / "codec").is_dir() else own
    return _checked(Source(name, step, config, state, optimizer_state, tokenizer, metadata, foreign, codec))


def open_hugging_face(folder: str) -> Source:
    """A model in Hugging Face's format, by its folder."""
    from nanochat.conversion.huggingface import read_hf

    path = expand_user(folder, "--from-hf")
    config, state, tokenizer = read_hf(path)
    return _checked(Source(path.resolve().name, 0, config, state, None, tokenizer, {}, True))


def _checked(source: Source) -> Source:
    with torch.device("meta"):
        check_state(GPT(source.config), source.state, source.name)
    return source


def settings_for(config: GPTConfig, saved: dict | None = None) -> Settings:
    """Settings to train the model on with: the saved ones (unknown names ignored), else made from its config.

    Tables that were tied, or untied, since then keep their size and so their rate. What no setting decides (the gates
    of value embeddings) a run takes over with the weights. UserError for a model that no settings describe.
    """
    known = {name: checked(name, value) for name, value in (saved or {}).items() if name in FIELDS}
    if "vocab_size" not in known:
        known["vocab_size"] = max(config.vocab_size, FIELDS["vocab_size"].metadata["ge"])
    if "total_batch_size" not in known:
        rows = max(1, Settings.total_batch_size // config.sequence_len)
        rows -= rows % Settings.device_batch_size if rows > Settings.device_batch_size else 0
        known["total_batch_size"] = rows * config.sequence_len
    before, after = Settings(**known), Settings(**known | Settings.of_model(config))
    if before.tie_weights and not after.tie_weights:
        rate = before.tied_weights_lr
        after = dataclasses.replace(after, embedding_lr=rate, unembedding_lr=rate, untie_at=None)
    elif saved and after.tie_weights and not before.tie_weights:
        after = dataclasses.replace(after, tied_weights_lr=before.unembedding_lr, untie_at=None)
    return validate(after)


def write(
    source: Source, tag: str, step: int, config: GPTConfig, state: State, settings: Settings, optimizer_state=None
) -> Path:
    """Write one step of a new tag, and beside it a config.py to train on with; returns the step's folder.

    Values that are NaN or infinite are written as they are, after a warning.
    """
    validate(dataclasses.replace(settings, model_tag=tag))
    folder = checkpoints_dir() / tag
    # config.py and hidden files are what a conversion that was cut off leaves.
    if folder.exists() and any(path.name[0] != "." and path.name != "config.py" for path in folder.iterdir()):
        raise UserError(f"{folder} is there already: name another tag with --output-tag")
    settings = dataclasses.replace(settings, model_tag=None, init_from=tag)
    origin = dict(model_tag=source.name, step=source.step)
    if "upstream" in source.metadata:
        origin["era"] = source.metadata["upstream"]["era"]
    metadata = dict(
        settings=as_dict(settings),
        model_config=dataclasses.asdict(config),
        converted_from=origin,
        tokenizer_hash=source.tokenizer and source.tokenizer.hash,
        versions=dict(torch=torch.__version__),
        **{name: source.metadata.get(name) for name in ("codec", "data_fingerprint")},
    )
    if nonfinite := describe_nonfinite(state):
        logger.warning(
            f"the weights of {source.name} hold NaN or infinite values: {nonfinite}; the new model has them "
            "too, and can neither generate nor train"
        )
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        write_atomically(folder / "config.py", render_config(settings))
        return save_checkpoint(folder, step, state, optimizer_state, metadata, 0, source.tokenizer, source.codec)
    except BaseException:
        if is_new:  # no tag without a step
            shutil.rmtree(folder, ignore_errors=True)
        raise


# ---------------------------------------------------------------------------------------------------------------------
# what a change costs

Loss = Callable[[GPTConfig, State], float]


def held_out_loss(source: Source, settings: Settings, data: str | None) -> Loss | None:
    """loss(config, state): nats per token of a model made from the source, over a few held-out batches, on the CPU.

    Of the data that the settings name, or of `data`. None, with the reason printed, where there is none at hand:
    nothing is downloaded unasked. UserError for a `data` that cannot be used.
    """
    if data:
        settings = replace_data(settings, data)
    try:
        if source.tokenizer is None:
            raise UserError("the model has no tokenizer")
        trained_on = None if data else source.metadata.get("data_fingerprint")
        here = find_prepared(trained_on, settings.skip_corrupt) is not None
        remote = settings.data == "climbmix" and not climbmix_is_here(settings.data_limit)
        if not data and not here and (remote or settings.data.startswith("hf:")):
            raise UserError(f"data={settings.data} may need a download: name a text with --data, such as --data=stdlib")
        dataset = open_trained_data(settings, trained_on)
        check_codec(dataset, source.metadata, source.name)
        few = dataclasses.replace(settings, device_batch_size=1, eval_tokens=MEASURED_TOKENS)
        measure = make_validation(few, dataset, source.tokenizer, Compute(torch.device("cpu"), torch.float32))
    except UserError as error:
        if data:
            raise
        logger.info(f"the change in loss was not measured: {error}")
        return None

    def loss(config: GPTConfig, state: State) -> float:
        found = measure(model_from_state(config, state, "cpu", source.name))
        parts = found.get("losses", {"text": dict(nats=found["nats"] / found["tokens"], tokens=found["tokens"])})
        return sum(p["nats"] * p["tokens"] for p in parts.values()) / sum(p["tokens"] for p in parts.values())

    logger.info(f"loss in nats per token over up to {MEASURED_TOKENS:,} held-out tokens of {dataset.name}:")
    return loss


def untied_source(source: Source, loss: Loss | None) -> tuple[GPTConfig, State]:
    """The source with an output matrix of its own; the change in loss is printed."""
    config, state, _ = untied(source.config, source.state)
    if loss is not None:
        compare("untied", loss(source.config, source.state), loss(config, state))
    return config, state


def tied_source(source: Source, loss: Loss | None, keep: str | None) -> tuple[GPTConfig, State]:
    """The source with one table, tied as `keep` says, or by default in the way that costs least; all are printed."""
    if loss is not None:
        before = loss(source.config, source.state)
        losses = {}
        for way in [keep] if keep else KEEP:
            losses[way] = loss(*tied(source.config, source.state, way))
            compare(f"keeping {way:<10}", before, losses[way])
        keep = min(losses, key=losses.get)
    keep = keep or "output"
    logger.info(f"tied, keeping {keep}: {KEEP[keep]}")
    return tied(source.config, source.state, keep)


def compare(name: str, before: float, after: float) -> None:
    logger.info(f"  {name} {before:.4f} -> {after:.4f} ({after - before:+.4f})")
