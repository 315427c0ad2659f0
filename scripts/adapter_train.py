"""Teach a frozen language model to emit audio codes: `python -m scripts.adapter_train [config.py] [--key=value ...]`.

Settings come from `python -m scripts.configure --stage adapters`; --resume and torchrun as in scripts.base_train, whose
loop this is. Trained are the adapters around the experts, the audio rows, and what else the settings ask for.
"""

import logging
import math
from collections.abc import Callable

import torch

from nanochat import checkpoint_files
from nanochat import checkpoint_manager as checkpoints
from nanochat.adapters.checkpoint import AdapterRun, build, check_facts, load_trained
from nanochat.adapters.hosts import state_hash
from nanochat.adapters.model import AdapterModel, FrozenHostBaseline
from nanochat.adapters.text_loss import text_measure
from nanochat.audio.loss import evaluate_audio
from nanochat.config.adapter_settings import AdapterSettings
from nanochat.config.config_file import from_command_line
from nanochat.data.packing import PackedLoader, Rows
from nanochat.data.token_store import TokenStore
from nanochat.data_pipeline import codec_files, prepare_for, resumed_data, warn_repeated_rows
from nanochat.hardware import device_name
from nanochat.optim import MuonAdamW
from nanochat.runtime import Compute, rank0_first, run_script
from nanochat.training import schedule
from nanochat.training.background_saver import BackgroundSaver
from nanochat.training.launch import launch
from nanochat.training.rank_agreement import agree_before_first_step
from nanochat.training.resume import restore_progress
from nanochat.training.tracker import MetricsLog
from scripts.base_train import Training, loop

logger = logging.getLogger("nanochat")


def main(argv: list[str] | None = None) -> dict:
    """Train; returns {"model_tag", "step", "val_loss/audio", "val_loss/text", "train_seconds", "stopped"}."""
    usage = "python -m scripts.adapter_train [config.py]"
    return launch(lambda: from_command_line(argv, usage=usage, kind=AdapterSettings), train)


def train(settings: AdapterSettings, resume_step: int | None, compute: Compute) -> dict:
    """The run itself; see main()."""
    # -- host, experts, data ------------------------------------------------------------------------------------------
    logger.info(f"training {settings.tag} on {compute.world_size} x {device_name(compute)}, {str(compute.dtype)[6:]}")
    folder = checkpoints.tag_dir(settings)
    begins = resume_step is None
    model, adapters = rank0_first(compute, lambda: build(settings, compute.device, compute.dtype, begins))
    checkpoints.check_finite(model.state_dict(), f"host {settings.host}")
    if begins:
        dataset = rank0_first(compute, lambda: prepare_for(settings))
    else:
        dataset = rank0_first(compute, lambda: resumed_data(settings, folder, resume_step))
    tokenizer = model.host.tokenizer
    agree_before_first_step(compute, dict(adapters=adapters, data_sha256=dataset.fingerprint["sha256"]))
    store = TokenStore(dataset, tokenizer, "train", vocabulary=model.vocabulary)
    rows = Rows(store, settings.max_seq_len)
    loader = PackedLoader(
        rows,
        settings.rows,
        settings.max_seq_len,
        settings.seed,
        compute.rank,
        compute.world_size,
        compute.device,
        count=("audio",),
        caption_dropout=settings.caption_dropout,
    )
    warn_repeated_rows(settings, loader)
    before = {} if begins else checkpoint_files.read_metadata(checkpoint_files.step_dir(folder, resume_step))
    text_loss, text_fingerprint = text_measure(settings, model, compute, before.get("text_fingerprint"))

    # -- optimizer, and where a run goes on ---------------------------------------------------------------------------
    optimizer = build_optimizer(model, settings, compute.rank, compute.world_size)
    run = AdapterRun()
    if resume_step is not None:
        state, optimizer_state, metadata = checkpoints.load_checkpoint(folder, resume_step, load_optimizer=True)
        where = checkpoint_files.step_dir(folder, resume_step)
        check_facts(metadata.get("adapters", {}), adapters, where)
        checkpoints.check_finite(state | optimizer_state, where)
        checkpoints.check_codec(dataset, metadata, where)
        run = restore_progress(
            where,
            metadata,
            dataset,
            loader,
            lambda: load_trained(model, state, where),
            lambda: optimizer.load_state_dict(optimizer_state),
            run,
        )
    changes = model.config.changes_text
    if text_loss and (begins or not changes):  # by the same device and dtype as afterwards
        run.text_before = text_loss(FrozenHostBaseline(model))
    if text_loss and begins and changes:
        run.text_begin = text_loss(model)
    counts = model.num_parameters()
    logger.info(f"parameters: {', '.join(f'{name} {n:,}' for name, n in counts.items() if n)}")
    size = 4 * counts["trained"] / 1e6
    logger.info(
        f"trained: {100 * counts['trained'] / counts['total']:.2f}% of all; a checkpoint has {size:,.1f} MB of it, and "
        f"{2 * size:,.1f} MB of the optimizer's state"
    )
    if model.config.trains_host:
        logger.info("the host is trained, too: in float32")
    if settings.expert != "none" and resume_step is None and not settings.musicgen:
        logger.info("experts: none of MusicGen's, drawn at random")

    # -- what the loop evaluates and saves ----------------------------------------------------------------------------
    counted: dict = {}

    def evaluate(last: bool, log: MetricsLog, stop: Callable[[], bool]) -> None:
        if not (last or schedule.is_due(settings.eval_every, run.step)):
            return
        how = dict(rows=settings.device_batch_size, rank=compute.rank, world_size=compute.world_size, stop=stop)
        found = evaluate_audio(
            model, tokenizer, dataset, max_clips=settings.eval_clips, counted=counted.get("baselines"), **how
        )
        ids = model.vocabulary.size if settings.output_layers == "shared" else model.config.audio_outputs
        baselines = found["baselines"] | {"range": math.log(ids)}
        if not counted:
            told = ", ".join(f"{name} {baselines[name]:.4f}" for name in ("uniform", "unigram", "bigram"))
            logger.info(f"nats a code that need no model: ln {ids} = {baselines['range']:.4f}, {told}")
        counted["baselines"] = {name: nats for name, nats in found["baselines"].items() if name != "shuffled_captions"}
        text = text_loss(model, stop) if text_loss and (last or changes) else None
        run.note_val_loss(found["nats"], settings.stall_evals)
        if text is not None:
            run.note_text(text)
            if settings.train_output == "whole" and text != run.text_begin:
                logger.warning(
                    f"train_output=whole trains the rows of the host's words on sounds alone: its text loss "
                    f"changed by {text - run.text_begin:+.4f} nats a token since the first step"
                )
        baselines["text"] = run.text_before
        log.write(
            run.step, event="eval", **run.figures(), **{f"baseline/{name}": nats for name, nats in baselines.items()}
        )

    facts = dict(
        adapters=adapters,
        derived=dict(
            num_iterations=settings.num_iterations, parameters=counts, flops_per_token=model.flops_per_token()
        ),
        codec=dataset.codec,
        data_fingerprint=dataset.fingerprint,
        text_fingerprint=text_fingerprint,
    )
    codec = codec_files(dataset) if compute.rank == 0 else None
    saver = BackgroundSaver(folder, settings.keep_last, None, compute.rank, codec)
    hashed = state_hash(model.host)
    result = loop(
        Training(
            settings,
            compute,
            model,
            optimizer,
            loader,
            run,
            settings.num_iterations,
            settings.learning_rate,
            evaluate,
            saver,
            model.trained,
            facts,
            resumed=resume_step is not None,
        )
    )
    if not model.config.trains_host:
        assert state_hash(model.host) == hashed, "a tensor of the frozen host has changed"
        logger.info(f"the host's tensors are as they were: {hashed[:8]}")
    return result


def build_optimizer(model: AdapterModel, settings: AdapterSettings, rank: int, world_size: int) -> MuonAdamW:
    """AdamW over what is trained, and nothing else: one rate, a group for each kind of parameter."""
    groups: dict[str, dict[str, torch.nn.Parameter]] = {}
    for name, parameter in model.trained():
        kind = "adapters" if name.endswith("_proj.weight") and name.startswith("experts.") else name.split(".")[0]
        groups.setdefault(kind, {})[name] = parameter
    common = dict(
        kind="adamw",
        lr=settings.learning_rate,
        initial_lr=settings.learning_rate,
        betas=settings.adam_betas,
        eps=1e-8,
        weight_decay=settings.weight_decay,
    )
    named = [
        dict(name=kind, params=list(found.values()), param_names=list(found), **common)
        for kind, found in groups.items()
    ]
    return MuonAdamW(named, rank, world_size)


if __name__ == "__main__":
    run_script(main)
