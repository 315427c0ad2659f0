"""Teach a frozen language model to emit audio codes: `python -m scripts.adapter_train [config.py] [--key=value ...]`.

Settings come from `python -m scripts.configure --stage adapters`; --resume and torchrun as in scripts.base_train, whose
loop this is. Trained are the adapters around the experts, the audio rows, and what else the settings ask for.
"""

import logging
import math
from collections.abc import Callable

import torch

from nanochat import checkpoint_manager as checkpoints
from nanochat.adapters.checkpoint import AdapterRun, build, check_identity, load_trained
from nanochat.adapters.hosts import state_hash
from nanochat.adapters.model import AdapterModel, FrozenHostBaseline
from nanochat.adapters.text_loss import make_text_loss
from nanochat.audio.loss import evaluate_audio
from nanochat.config.adapter_settings import AdapterSettings
from nanochat.config.config_file import from_command_line
from nanochat.data.packing import PackedLoader, Rows
from nanochat.data.token_store import TokenStore
from nanochat.data_pipeline import codec_files, open_run_data, prepare_for, warn_repeated_rows
from nanochat.hardware import device_name
from nanochat.optim import MuonAdamW
from nanochat.runtime import Compute, rank0_first, run_script
from nanochat.training import schedule
from nanochat.training.background_saver import BackgroundSaver
from nanochat.training.launch import launch
from nanochat.training.rank_agreement import agree_before_first_step
from nanochat.training.resume import Origin, restore_progress
from scripts.base_train import TrainState, training_loop

logger = logging.getLogger("nanochat")


def main(argv: list[str] | None = None) -> dict:
    """Train; returns {"model_tag", "step", "val_loss/audio", "val_loss/text", "train_seconds", "stopped"}."""
    usage = "python -m scripts.adapter_train [config.py]"
    return launch(lambda: from_command_line(argv, usage=usage, kind=AdapterSettings), train)


def train(settings: AdapterSettings, origin: Origin | None, compute: Compute) -> dict:
    """The run itself; see main()."""
    logger.info(f"training {settings.tag} on {compute.world_size} x {device_name(compute)}, {str(compute.dtype)[6:]}")
    resumed = origin is not None

    # -- host, experts, data ------------------------------------------------------------------------------------------
    model, adapters = rank0_first(compute, lambda: build(settings, compute.device, compute.dtype, not resumed))
    checkpoints.check_finite(model.state_dict(), f"host {settings.host}")
    dataset = rank0_first(compute, lambda: open_run_data(settings, origin) if resumed else prepare_for(settings))
    agree_before_first_step(compute, dict(adapters=adapters, data_sha256=dataset.fingerprint["sha256"]))
    loader = open_loader(settings, compute, model, dataset)
    warn_repeated_rows(settings, loader)
    measured_on = origin.metadata.get("text_fingerprint") if resumed else None
    text_loss, text_fingerprint = make_text_loss(settings, model, compute, measured_on)

    # -- optimizer, and the checkpoint that the run resumes from ------------------------------------------------------
    optimizer = build_optimizer(model, settings, compute.rank, compute.world_size)
    run = restore(origin, model, optimizer, loader, dataset, adapters) if resumed else AdapterRun()
    changes = model.config.changes_text
    if text_loss and not (resumed and changes):  # by the same device and dtype as afterwards
        run.text_before = text_loss(FrozenHostBaseline(model))
    if text_loss and changes and not resumed:
        run.text_begin = text_loss(model)
    describe_model(model, settings, resumed)

    # -- the loop -----------------------------------------------------------------------------------------------------
    evaluation = AudioEvaluation(settings, model, dataset, text_loss)
    derived = dict(
        num_iterations=settings.num_iterations,
        parameters=model.num_parameters(),
        flops_per_token=model.flops_per_token(),
    )
    codec = codec_files(dataset) if compute.rank == 0 else None
    host_hash = state_hash(model.host)
    state = TrainState(
        settings=settings,
        compute=compute,
        model=model,
        optimizer=optimizer,
        loader=loader,
        run=run,
        steps=settings.num_iterations,
        learning_rate=settings.learning_rate,
        saver=BackgroundSaver(checkpoints.tag_dir(settings), settings.keep_last, None, compute.rank, codec),
        trained=model.trained,
        metadata=dict(
            adapters=adapters,
            derived=derived,
            codec=dataset.codec,
            data_fingerprint=dataset.fingerprint,
            text_fingerprint=text_fingerprint,
        ),
        evaluate=evaluation.evaluate_if_due,
        resumed=resumed,
    )
    result = training_loop(state)
    if not model.config.trains_host:
        assert state_hash(model.host) == host_hash, "a tensor of the frozen host has changed"
        logger.info(f"the host's tensors are unchanged: {host_hash[:8]}")
    return result


def open_loader(settings: AdapterSettings, compute: Compute, model: AdapterModel, dataset) -> PackedLoader:
    """Batches of whole captioned sounds, tokenised for the host."""
    store = TokenStore(dataset, model.host.tokenizer, "train", vocabulary=model.vocabulary)
    return PackedLoader(
        Rows(store, settings.max_seq_len),
        settings.rows,
        settings.max_seq_len,
        settings.seed,
        compute.rank,
        compute.world_size,
        compute.device,
        count=("audio",),
        caption_dropout=settings.caption_dropout,
    )


def restore(
    origin: Origin, model: AdapterModel, optimizer: MuonAdamW, loader: PackedLoader, dataset, adapters: dict
) -> AdapterRun:
    """Load what was trained, optimizer, loader and generators of a step; returns the run's state at it."""
    where = origin.path
    state, optimizer_state, metadata = checkpoints.load_checkpoint(origin.folder, origin.step, load_optimizer=True)
    check_identity(metadata.get("adapters", {}), adapters, where)
    checkpoints.check_finite(state | optimizer_state, where)
    checkpoints.check_codec(dataset, metadata, where)
    return restore_progress(
        where,
        metadata,
        dataset,
        loader,
        lambda: load_trained(model, state, where),
        lambda: optimizer.load_state_dict(optimizer_state),
        AdapterRun(),
    )


def describe_model(model: AdapterModel, settings: AdapterSettings, resumed: bool) -> None:
    counts = model.num_parameters()
    logger.info(f"parameters: {', '.join(f'{name} {n:,}' for name, n in counts.items() if n)}")
    size = 4 * counts["trained"] / 1e6
    logger.info(
        f"trained: {100 * counts['trained'] / counts['total']:.2f}% of all; a checkpoint has {size:,.1f} MB of it, and "
        f"{2 * size:,.1f} MB of the optimizer's state"
    )
    if model.config.trains_host:
        logger.info("the host is trained, too: in float32")
    if settings.expert != "none" and not resumed and not settings.musicgen:
        logger.info("experts: none of MusicGen's, drawn at random")


class AudioEvaluation:
    """The held-out loss of audio beside what needs no model, and of text where training can change it."""

    def __init__(self, settings: AdapterSettings, model: AdapterModel, dataset, text_loss: Callable | None):
        self.settings, self.model, self.dataset, self.text_loss = settings, model, dataset, text_loss
        self.ids = model.vocabulary.size if settings.output_layers == "shared" else model.config.audio_outputs
        self.baselines: dict | None = None  # counted once

    def evaluate_if_due(self, state: TrainState) -> None:
        """EvaluationInterrupted when a signal came meanwhile."""
        settings, run = self.settings, state.run
        if not (state.is_last or schedule.is_due(settings.eval_every, run.step)):
            return
        found = evaluate_audio(
            self.model,
            self.model.host.tokenizer,
            self.dataset,
            max_clips=settings.eval_clips,
            counted=self.baselines,
            rows=settings.device_batch_size,
            rank=state.compute.rank,
            world_size=state.compute.world_size,
            stop=state.stop_requested,
        )
        if self.baselines is None:
            figures = ", ".join(f"{name} {found['baselines'][name]:.4f}" for name in ("uniform", "unigram", "bigram"))
            logger.info(f"nats per code that need no model: ln {self.ids} = {math.log(self.ids):.4f}, {figures}")
        self.baselines = {name: nats for name, nats in found["baselines"].items() if name != "shuffled_captions"}

        text = self.text_loss(self.model, state.stop_requested) if self._text_is_due(state) else None
        run.record_val_loss(found["nats"], settings.stall_evals)
        if text is not None:
            run.record_text_loss(text)
            if settings.train_output == "whole" and text != run.text_begin:
                logger.warning(
                    f"train_output=whole trains the rows of the host's words on sounds alone: its text loss "
                    f"changed by {text - run.text_begin:+.4f} nats per token since the first step"
                )
        baselines = found["baselines"] | {"range": math.log(self.ids), "text": run.text_before}
        named = {f"baseline/{name}": nats for name, nats in baselines.items()}
        state.log.write(run.step, event="eval", **run.figures(), **named)

    def _text_is_due(self, state: TrainState) -> bool:
        return self.text_loss is not None and (state.is_last or self.model.config.changes_text)


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
