"""Adapter models and their checkpoints: built from settings or loaded, with host, experts and codec checked by hash.

A checkpoint holds the trained tensors alone. Host and experts are read from their own files, and refused where they
differ from those of the training.
"""

import dataclasses
import logging
from pathlib import Path

import torch

from nanochat import checkpoint_files
from nanochat import checkpoint_manager as checkpoints
from nanochat.adapters.hosts import Host, load_host
from nanochat.adapters.model import AdapterConfig, AdapterModel
from nanochat.adapters.musicgen import (
    Shape,
    experts_hash,
    layer_map,
    log_licence,
    random_experts,
    read_experts,
    read_shape,
)
from nanochat.audio.codecs import load_codec
from nanochat.audio.generation import add_sampling
from nanochat.config.adapter_settings import AdapterSettings
from nanochat.config.command_line import Parser, number
from nanochat.config.settings import checked
from nanochat.modality import Modality
from nanochat.runtime import pick_dtype
from nanochat.system.environment import UserError, base_dir
from nanochat.training.resume import RunState

logger = logging.getLogger(__name__)


@dataclasses.dataclass
class AdapterRun(RunState):
    """State of an adapter run: RunState, with the held-out loss over codes and the host's text loss."""

    val_loss: float | None = None
    best_loss: float | None = None
    evals_since_best: int = 0
    stall_warned: bool = False
    text_before: float | None = None  # nats per token of the untouched host
    text_begin: float | None = None  # and of the model before its first step, where a softmax is shared
    text_after: float | None = None

    def figures(self) -> dict[str, float | None]:
        return {"val_loss/audio": self.val_loss, "val_loss/text": self.text_after}

    def record_val_loss(self, loss: float, stall_evals: int) -> None:
        """Keep the held-out loss; warn once when it rises against the training loss, and once when it stalls."""
        self._note("held-out audio loss", self.val_loss, loss)
        self.val_loss = loss
        if self.best_loss is None or loss < self.best_loss:
            self.best_loss, self.evals_since_best = loss, 0
            return
        self.evals_since_best += 1
        if self.evals_since_best >= stall_evals and not self.stall_warned:
            self.stall_warned = True
            logger.warning(
                f"the held-out audio loss has not been below {self.best_loss:.4f} for {stall_evals} "
                "evaluations: it stalls"
            )

    def record_text_loss(self, after: float) -> None:
        """Keep the host's text loss in nats per token, and log how the training changed it."""
        before, self.text_after = self.text_before, after
        message = "unchanged" if after == before else f"changed by {after - before:+.4f}"
        if self.text_begin not in (None, before):
            message += f", of which {self.text_begin - before:+.4f} by the shared softmax before the first step"
        losses = f"{after:.4f} nats per token, {before:.4f} before"
        logger.info(f"step {self.step}: the host's text loss {losses}: {message}")


def make_audio_modality(settings: AdapterSettings, vocab_size: int) -> Modality:
    """The codes behind a host's V ids; `start` is input only, V + Q*K + 1, and absent from an expanded vocabulary."""
    codes, books = settings.modality_codes()["audio"], settings.codebooks
    start = vocab_size + books * codes + 1 if settings.vocabulary == "rows" else None
    return Modality("audio", books, codes, start)


def uses_musicgen(settings: AdapterSettings) -> bool:
    """Whether the experts have MusicGen's shape, their weights or not."""
    return settings.musicgen is not None and (settings.expert in ("frozen", "trained") or settings.expert_dim is None)


def find_expert_shape(settings: AdapterSettings, known_ok: bool = False) -> Shape:
    """Of the experts: MusicGen's, or of the width that the settings give."""
    if uses_musicgen(settings):
        return read_shape(settings.musicgen, known_ok=known_ok)
    return Shape(settings.expert_dim, 1, 4 * settings.expert_dim)


def make_adapter_config(
    settings: AdapterSettings, vocab_size: int, width: int, n_layer: int, shape: Shape
) -> AdapterConfig:
    return AdapterConfig(
        vocab_size=vocab_size,
        width=width,
        n_layer=n_layer,
        sequence_len=settings.max_seq_len,
        modalities=(make_audio_modality(settings, vocab_size),),
        expert=settings.expert,
        expert_dim=shape.width,
        expert_hidden=shape.hidden,
        output_layers=settings.output_layers,
        train_output=settings.train_output,
        finetune_host=settings.finetune_host,
        unfreeze=settings.unfreeze,
    )


def build(settings: AdapterSettings, device, dtype: torch.dtype, begin: bool = True) -> tuple[AdapterModel, dict]:
    """(model, identity of its host and experts); begin: False where trained tensors will replace its own.

    UserError: host or MusicGen are not there or of the wrong kind, or max_seq_len is beyond the host's context.
    """
    host = load_host(settings.host, device, dtype)
    check_context(settings, host)
    shape, layers, experts = find_expert_shape(settings, known_ok=settings.expert in ("random", "none")), None, None
    if settings.expert != "none":
        if uses_musicgen(settings) and settings.expert != "random":
            layers = layer_map(settings.layer_map, shape.layers, host.n_layer)
        if layers and (begin or settings.expert == "frozen"):
            experts = read_experts(settings.musicgen, layers)
        else:
            experts = random_experts(shape, host.n_layer, settings.seed)
            if layers:
                log_licence()
    config = make_adapter_config(settings, host.vocab_size, host.width, host.n_layer, shape)
    model = AdapterModel(host, config, experts, settings.seed)
    identity = dict(
        host=host.name,
        host_hash=host.hash,
        tokenizer_hash=host.tokenizer.hash,
        expert=settings.expert,
        musicgen=settings.musicgen if layers else None,
        layer_map=layers and list(layers),
        expert_hash=experts_hash(experts) if experts and settings.expert != "trained" else None,
        ranges={name: list(pair) for name, pair in zip(config.vocabulary.names, config.vocabulary.ranges, strict=True)},
        start=config.modalities[0].start,
        config=dataclasses.asdict(config),
    )
    return model, identity


def check_context(settings: AdapterSettings, host: Host) -> None:
    if settings.max_seq_len > host.context:
        raise UserError(
            f"max_seq_len={settings.max_seq_len} is beyond the {host.context} positions that {host.name} knows: "
            f"--max_seq_len={host.context} or less"
        )


def check_identity(saved: dict, own: dict, where: Path) -> None:
    """UserError when host, experts or layout differ from those that the checkpoint was trained with."""
    if saved.get("host_hash") != own["host_hash"]:
        raise UserError(
            f"{where} was trained on host {saved.get('host')} with weights {str(saved.get('host_hash'))[:8]}, "
            f"{own['host']} has {own['host_hash'][:8]}: name the same host with --host"
        )
    if saved.get("expert_hash") != own["expert_hash"]:
        theirs, ours = (
            f"{identity.get('musicgen') or 'random draw'} ({str(identity.get('expert_hash'))[:8]})"
            for identity in (saved, own)
        )
        raise UserError(
            f"{where} was trained around experts of {theirs}, these are of {ours}: name the same ones with --musicgen"
        )
    for name in ("tokenizer_hash", "expert", "layer_map", "ranges", "start"):
        if saved.get(name) != own[name]:
            raise UserError(f"{where}: {name} is {own[name]!r} here, {saved.get(name)!r} in the checkpoint")


def load_trained(model: AdapterModel, state: dict[str, torch.Tensor], where: Path) -> None:
    """Put the tensors of a checkpoint into the model; UserError names one that is missing, unexpected or misshapen."""
    own = dict(model.trained())
    for name in sorted(own.keys() | state.keys()):
        if name not in state or name not in own:
            raise UserError(f"{where}: model.safetensors {'lacks' if name in own else 'holds an unexpected'} {name}")
        if state[name].shape != own[name].shape:
            raise UserError(f"{where}: {name} has shape {tuple(state[name].shape)}, expected {tuple(own[name].shape)}")
    with torch.no_grad():
        for name, tensor in state.items():
            own[name].copy_(tensor)


def adapters_dir() -> Path:
    return base_dir() / AdapterSettings.checkpoints


def restore_settings(metadata: dict, where: Path, **changes) -> AdapterSettings:
    """The settings of the training, `changes` on top: where host and MusicGen lie now."""
    if "adapters" not in metadata:
        raise UserError(f"{where} is no checkpoint of adapters: its state.json says nothing of a host")
    known = {field.name for field in dataclasses.fields(AdapterSettings)}
    saved = {
        name: checked(name, value, AdapterSettings) for name, value in metadata["settings"].items() if name in known
    }
    return AdapterSettings(**saved | {name: value for name, value in changes.items() if value is not None})


def open_adapters(
    model_tag: str | None, step: int | None, device, host: str | None = None, musicgen: str | None = None
) -> tuple[AdapterModel, object, dict, AdapterSettings, Path]:
    """(model, codec, metadata, settings, step folder) of a checkpoint; UserError where a part is missing or differs."""
    checkpoint_dir, step = checkpoints.find_checkpoint(model_tag, step, adapters_dir())
    folder = checkpoint_files.step_dir(checkpoint_dir, step)
    state, _, metadata = checkpoints.load_checkpoint(checkpoint_dir, step)
    settings = restore_settings(metadata, folder, host=host, musicgen=musicgen)
    model, identity = build(settings, device, pick_dtype(settings.dtype, torch.device(device).type), begin=False)
    check_identity(metadata["adapters"], identity, folder)
    load_trained(model, state, folder)
    codec = load_codec(folder / "codec")
    trained = metadata.get("codec") or {}
    if codec.hash != trained.get("hash"):
        raise UserError(
            f"{folder / 'codec'} is not the codec of the training data: its hash is {codec.hash[:8]}, the checkpoint "
            f"was trained with {str(trained.get('hash'))[:8]}"
        )
    return model.eval(), codec, metadata, settings, folder


def add_adapter_flags(parser: Parser) -> None:
    """Flags for the checkpoint, for its host and experts, and for sampling."""
    parser.add_argument("--guidance", type=number(float, 0.0), default=1.0, help="classifier-free guidance; 1 is none")
    parser.add_argument("--host", help="where the host lies (default: as in training)")
    parser.add_argument("--musicgen", help="where MusicGen lies (default: as in training)")
    add_sampling(parser)
