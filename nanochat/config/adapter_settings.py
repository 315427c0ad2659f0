"""Settings of adapter training, which teaches a frozen language model to speak audio codes."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from nanochat.config.declaration import ON, IllegalCombination, in_group, redeclare
from nanochat.config.settings import RunSettings
from nanochat.runtime import shown

TEXT_SOURCES = ("stdlib", "packages", "climbmix")
LAYER_MAPS = ("even", "first", "last")


@dataclass(frozen=True)
class AdapterSettings(RunSettings):
    """All settings of one run of adapter training. None means off, or 'decide for me' where the help says so."""

    stage: ClassVar[str] = "adapters"
    script: ClassVar[str] = "scripts.adapter_train"
    checkpoints: ClassVar[str] = "adapter_checkpoints"
    groups: ClassVar[tuple[str, ...]] = (
        *("run", "host", "expert", "vocabulary", "data", "modalities"),
        *("horizon", "batch", "optimizer", "evaluation", "checkpoints"),
    )
    text_data: ClassVar[None] = None  # a setting of base training that preparing sounds reads: no text is mixed in

    setting = in_group("host")
    host: str = setting(
        "meta-llama/Llama-3.2-1B",
        "the language model: hub name or folder of a decoder with gated MLPs, meta:<folder> for Meta's own files, "
        "nanochat:<model_tag> for one of ours",
        ask=True,
        resumable=True,
    )
    finetune_host: bool = setting(
        False,
        "train the host's weights too: a baseline, which costs the host its text",
        ask="train the host's weights too?",
    )
    unfreeze: str | None = setting(
        None,
        "also train the host's parameters whose names hold this text, as in output (an older recipe's rule)",
        when=("finetune_host", False),
        ask=True,
    )

    setting = in_group("expert")
    expert: str = setting(
        "frozen",
        "between the adapters: MusicGen's layers frozen, MusicGen's fine-tuned, random frozen ones, or nothing",
        choices=("frozen", "trained", "random", "none"),
        ask=True,
    )
    musicgen: str | None = setting(
        "facebook/musicgen-small",
        "MusicGen (weights: CC-BY-NC 4.0): hub name, small, medium, large, or a folder; None needs expert_dim",
        ask=True,
        resumable=True,
    )
    expert_dim: int | None = setting(
        None,
        "width of a randomly initialised expert, or of the adapters alone; None: MusicGen's, as with expert=frozen",
        ge=1,
        le=1_000_000,
        ask="width of the experts",
    )
    layer_map: str = setting(
        "even",
        "MusicGen's layer for each of the host's: even, first, last, or a list as in 0,2,3",
        when=("expert", ("frozen", "trained")),
        ask=True,
    )

    setting = in_group("vocabulary")
    vocabulary: str = setting(
        "rows",
        "audio ids as rows beside the host's, with end and an input-only start; or one expanded matrix of codes alone, "
        "without markers",
        choices=("rows", "expanded"),
        ask=True,
    )
    output_layers: str = setting(
        "separate",
        "softmax and loss over the audio ids alone; or one shared over the whole vocabulary",
        choices=("separate", "shared"),
        ask=True,
    )
    train_output: str = setting(
        "rows",
        "what is trained of the output: the audio rows; a copy of the whole matrix, which changes the text; or none of "
        "it, all rows zero",
        choices=("rows", "whole", "none"),
        ask=True,
    )
    caption_dropout: float = setting(
        0.1, "fraction of captions dropped in training, for classifier-free guidance", ge=0, le=0.9, ask=True
    )

    setting = in_group("optimizer")
    learning_rate: float = setting(5e-4, "AdamW learning rate of adapters and audio rows", gt=0, ask=True)
    weight_decay: float = setting(0.0, "decoupled weight decay of the trained parameters", ge=0, ask=True)

    setting = in_group("evaluation")
    eval_clips: int | None = setting(
        200, "held-out sounds of each evaluation; None takes all", ge=1, ask=True, resumable=True
    )
    stall_evals: int = setting(
        5,
        "log when the validation loss has not improved for this many evaluations",
        ge=1,
        when=("eval_every", ON),
        resumable=True,
    )
    check_text: str | None = setting(
        "stdlib",
        "source of text on which the host's loss is measured before and after training; None skips this",
        ask=True,
    )
    check_tokens: int = setting(20_000, "tokens of that text", ge=2, when=("check_text", ON))

    # settings of all stages that have another default or help here
    dtype: str | None = redeclare(
        RunSettings,
        "dtype",
        help="dtype of the frozen weights and of activations; trained parameters stay float32; "
        "None takes bfloat16 where the hardware profits from it",
    )
    model_tag: str | None = redeclare(
        RunSettings, "model_tag", help="name of the checkpoint folder; None says host, expert and variant"
    )
    data: str = redeclare(
        RunSettings, "data", "synth", help="synth (captioned melodies), hf:<dataset>, or the path of a folder of sounds"
    )
    data_limit: int | None = redeclare(
        RunSettings, "data_limit", help="use at most this many sounds; None uses the source's default"
    )
    modalities: str = redeclare(RunSettings, "modalities", "audio:2048", help="audio and the codes in a codebook of it")
    codebooks: int = redeclare(RunSettings, "codebooks", when=None)
    codec: str = redeclare(RunSettings, "codec", when=None)
    clip_seconds: float | None = redeclare(RunSettings, "clip_seconds", when=None, ask=True)
    max_seq_len: int = redeclare(RunSettings, "max_seq_len", help="tokens of a row, caption and codes")
    num_iterations: int = redeclare(RunSettings, "num_iterations", 1000, help="optimizer steps")
    device_batch_size: int = redeclare(RunSettings, "device_batch_size", 8)
    adam_betas: tuple[float, float] = redeclare(RunSettings, "adam_betas", (0.9, 0.99))
    warmup_steps: int = redeclare(RunSettings, "warmup_steps", 50)
    warmdown_ratio: float = redeclare(RunSettings, "warmdown_ratio", 0.3)
    eval_every: int | None = redeclare(
        RunSettings,
        "eval_every",
        100,
        help="steps between evaluations of the validation audio loss; None only at the end",
    )
    save_every: int | None = redeclare(RunSettings, "save_every", 200)
    keep_last: int | None = redeclare(RunSettings, "keep_last", 2)

    @classmethod
    def presets(cls) -> dict[str, dict]:
        return ADAPTER_PRESETS

    @property
    def tag(self) -> str:
        """Folder of the checkpoints: the given one, or host, expert and what differs from the default recipe."""
        if self.model_tag:
            return self.model_tag
        parts = [_last_name(self.host)]
        if self.expert in ("frozen", "trained") and self.musicgen:
            name = _last_name(self.musicgen)
            parts.append(name if "musicgen" in name else f"musicgen-{name}")
        parts += [self.expert] * (self.expert != "frozen")
        parts += ["expanded"] * (self.vocabulary == "expanded")
        parts += ["shared"] * (self.output_layers == "shared")
        parts += {"rows": [], "whole": ["whole"], "none": ["zero"]}[self.train_output]
        parts += ["finetuned"] if self.finetune_host else [_last_name(self.unfreeze)] if self.unfreeze else []
        return "-".join(parts)

    def no_effect_reason(self, name: str) -> str | None:
        drawn = self.expert in ("random", "none") and self.expert_dim is not None
        if name == "musicgen" and drawn:
            return f"musicgen has no effect while expert={self.expert!r} and expert_dim={self.expert_dim}"
        if name == "layer_map" and self.expert == "trained" and self.musicgen is None:
            return "layer_map has no effect while musicgen=None"
        return super().no_effect_reason(name)

    def check(self, world_size: int = 1) -> None:
        if not self.host.rpartition(":")[2].strip():
            message = f"host={shown(self.host)} names no model: a hub name, a folder, meta:<folder> or nanochat:<tag>"
            raise IllegalCombination("host", type(self).host, message)
        if self.expert == "frozen" and self.musicgen is None:
            message = "expert=frozen is MusicGen's: name one with musicgen, or set expert=random, which draws one"
            raise IllegalCombination("musicgen", type(self).musicgen, message)
        if self.expert in ("frozen", "trained") and self.musicgen and self.expert_dim:
            message = f"expert={self.expert} has MusicGen's width: set expert_dim=None, not {self.expert_dim}, or "
            other = "expert=random" if self.expert == "frozen" else "musicgen=None"
            raise IllegalCombination("expert_dim", None, f"{message}{other}, which draws one of that width")
        if self.musicgen is None and self.expert_dim is None:
            message = f"expert={self.expert} without musicgen has no width: set expert_dim, such as 1024"
            raise IllegalCombination("expert_dim", 1024, message)
        if self.layer_map not in LAYER_MAPS and not re.fullmatch(r"\s*\d{1,3}\s*(,\s*\d{1,3}\s*)*", self.layer_map):
            message = (
                f"layer_map={shown(self.layer_map)} is not {', '.join(LAYER_MAPS)} or a list of layers as in 0,2,3"
            )
            raise IllegalCombination("layer_map", "even", message)
        if self.train_output == "whole" and self.output_layers == "separate":
            message = (
                "train_output=whole with output_layers=separate: a softmax over audio alone gives the rows of text no "
                "gradient; set train_output=rows, or output_layers=shared"
            )
            raise IllegalCombination("train_output", "rows", message)
        if list(self.modality_codes()) != ["audio"]:
            message = (
                f"modalities={shown(self.modalities)}: the adapters speak audio, as in audio:2048, and nothing else"
            )
            raise IllegalCombination("modalities", "audio:2048", message)
        if self.data in TEXT_SOURCES:
            message = f"data={self.data} holds no sounds: synth, hf:<dataset>, or the path of a folder"
            raise IllegalCombination("data", "synth", message)
        super().check(world_size)


def _last_name(name: str) -> str:
    """The last part of a hub name, a path or prefix:name, in letters that suit a folder's name."""
    last = Path(name.rpartition(":")[2]).name.lower()
    return re.sub(r"[^a-z0-9._]+", "-", last).strip(".-")[:50] or "model"


# ---------------------------------------------------------------------------------------------------------------------
# presets: what differs from the defaults

ADAPTER_PRESETS: dict[str, dict] = {
    "llama": dict(
        codec="encodec:facebook/encodec_32khz",
        clip_seconds=10.0,
        max_seq_len=1024,
        device_batch_size=4,
        total_batch_size=65_536,
        num_iterations=2000,
    ),
    "tiny": dict(
        host="nanochat:host",
        expert="random",
        musicgen=None,
        expert_dim=64,
        data_limit=3000,
        modalities="audio:256",
        codebooks=2,
        codec="pitch",
        max_seq_len=240,
        total_batch_size=3840,
        device_batch_size=16,
        num_iterations=300,
        eval_clips=100,
        learning_rate=0.02,  # small hosts take large steps (dev/LOG.md)
    ),
}


def adapter_hardware_preset(device_type: str, gpus: int = 0) -> str:
    """The preset that fits the hardware: a GPU holds a Llama of a billion parameters."""
    return "llama" if device_type == "cuda" else "tiny"
