"""Every setting of training, declared once: what all stages have in RunSettings, base training's own in Settings.

Wizard questions, config.py, --flags and --help all come from the fields of these classes (and of AdapterSettings).
Adding a setting is one line here. Presets are sets of values that differ from the defaults.
"""

import itertools
import math
import re
import types
import typing
from dataclasses import dataclass
from typing import ClassVar

from nanochat.config.declaration import (
    ON,
    IllegalCombination,
    Like,
    check_number,
    fields_of,
    in_group,
    meets,
    nearest_divisor,
    types_of,
)
from nanochat.config.presets import PRESETS
from nanochat.config.removed import check_removed_value, drop_removed
from nanochat.modality import RESERVED, modalities_of
from nanochat.runtime import nearest_name, shown
from nanochat.system import logs
from nanochat.system.environment import UserError

HUB = Like(r"hf:.*", "hf:<dataset>")
LIMITED = Like(r"climbmix|synth|hf:.*", "climbmix, synth or hf:<dataset>")
COLUMNS = Like(
    r"(?!(stdlib|packages|climbmix|synth)$)(?!.*\.(txt|md|py)(\.(gz|bz2|xz|zst))?$).*",
    "hf:<dataset>, or files with columns or sounds",
)
NO_WINDOW = 1024  # GPTConfig.short_window where no layer has a short window
AUDIO = Like(r"(.*,)?\s*audio:.*", "audio:<codes>")


@dataclass(frozen=True)
class RunSettings:
    """What every stage of training has: where it runs, data, horizon, schedule, saving.

    The one base class of this repository: a second copy of forty declarations would drift from the first. Each stage
    adds its own settings, may redeclare one of these with another default, and defines

    stage, script       its name in the wizard, and the script that trains it
    checkpoints         its folder under base_dir(), with one folder per tag
    groups              the sections of its config.py, in order
    presets(), tag      its presets; the name of a run without a model_tag
    """

    stage: ClassVar[str]
    script: ClassVar[str]
    checkpoints: ClassVar[str]
    groups: ClassVar[tuple[str, ...]]

    setting = in_group("run")
    model_tag: str | None = setting(
        None, "name of the checkpoint folder; None says depth and variant, as in d4-tied", ask=True
    )
    device_type: str | None = setting(
        None,
        "where to compute; None: the best of this machine",
        choices=("cpu", "cuda", "mps"),
        ask=True,
        resumable=True,
    )
    wandb_mode: str = setting(
        "disabled",
        "Weights & Biases; metrics.jsonl is always written",
        choices=("disabled", "offline", "online"),
        ask=True,
        resumable=True,
    )
    run: str = setting("dummy", "name of the run for trackers", when=("wandb_mode", ON), ask=True, resumable=True)
    dtype: str | None = setting(
        None, "dtype of activations; None: bfloat16 where it is faster", choices=("float32", "bfloat16"), resumable=True
    )
    seed: int = setting(42, "seed of initialisation, data order and samples", ge=0, le=2**63 - 1)
    deterministic: bool = setting(
        False,
        "bit-equal runs on a GPU, slower (on a CPU they always are)",
        when=("device_type", (None, "cuda", "mps")),
        resumable=True,
    )
    rank_timeout: int = setting(
        600, "seconds that a rank waits for the others in a step before the run ends", ge=1, resumable=True
    )
    log_level: str = setting(
        "info", "lowest level shown on the terminal; run.log has info and above", choices=logs.LEVELS, resumable=True
    )

    setting = in_group("data")
    data: str = setting(
        "stdlib", "stdlib, packages, climbmix, synth (melodies), hf:<dataset>, or a file or folder", ask=True
    )
    data_column: str = setting(
        "text", "column that holds the text in jsonl, parquet and hub datasets", when=("data", COLUMNS)
    )
    data_split: str = setting("train", "split of the hub dataset to read", when=("data", HUB))
    data_config: str | None = setting(None, "configuration name of the hub dataset", when=("data", HUB))
    data_limit: int | None = setting(
        None, "at most this many shards, documents or sounds; None: the source's default", ge=1, when=("data", LIMITED)
    )
    skip_corrupt: bool = setting(
        False, "skip unreadable shards and files, naming them, instead of stopping", resumable=True
    )

    setting = in_group("modalities")
    modalities: str | None = setting(
        None, "modalities beside text and the codes in a codebook of each, as in audio:2048", ask="further modalities"
    )
    codebooks: int = setting(
        1, "codebooks of audio: positions that one frame takes", ge=1, le=32, when=("modalities", AUDIO), ask=True
    )
    codec: str = setting(
        "frame",
        "sound to codes: frame, pitch, mdct (fitted on the data); encodec:<hub name or folder>; a fitted one's name",
        when=("modalities", AUDIO),
        ask=True,
    )
    clip_seconds: float | None = setting(
        None, "sounds are cut to this many seconds; None keeps all of them", gt=0, when=("modalities", AUDIO)
    )
    data_audio_column: str = setting("audio", "column that holds the sound in hub datasets", when=("data", HUB))

    setting = in_group("horizon")
    num_iterations: int | None = setting(
        None, "optimizer steps; overrides the other two horizons", ge=1, ask=True, resumable=True
    )
    setting = in_group("batch")
    max_seq_len: int = setting(512, "context length in tokens", ge=2, le=2**24, ask=True)
    total_batch_size: int = setting(8192, "tokens per optimizer step over all devices", ge=2, le=2**40, ask=True)
    device_batch_size: int = setting(
        16, "micro-batch size in rows; lower it when memory runs out", ge=1, ask=True, resumable=True
    )

    setting = in_group("optimizer")
    grad_clip: float | None = setting(1.0, "gradients are clipped to this global norm; None never clips", gt=0)
    adam_betas: tuple[float, float] = setting((0.8, 0.95), "AdamW's beta1 and beta2", ge=0, le=0.999999)
    warmup_steps: int = setting(0, "steps of linear learning-rate warmup", ge=0, ask=True)
    warmdown_ratio: float = setting(
        0.4, "final fraction of the steps, in which the learning rate decays linearly", ge=0, le=1, ask=True
    )
    final_lr_frac: float = setting(
        0.0, "final learning rate as a fraction of the peak", ge=0, le=1, when=("warmdown_ratio", ON)
    )

    setting = in_group("evaluation")
    eval_every: int | None = setting(
        250, "steps between evaluations of validation bpb; None only at the end", ge=1, ask=True, resumable=True
    )

    setting = in_group("checkpoints")
    save_every: int | None = setting(
        None, "steps between checkpoints; None only at the end", ge=1, ask=True, resumable=True
    )
    keep_last: int | None = setting(
        None, "number of newest checkpoints kept; None: all", ge=1, when=("save_every", ON), ask=True, resumable=True
    )
    overwrite: bool = setting(
        False, "start over although the model_tag holds a run (the old one is moved aside)", resumable=True
    )
    ignore_lock: bool = setting(
        False, "train although another process seems to be training this model_tag", resumable=True
    )
    log_rows: bool = setting(False, "log the documents of every row to rows_rank<k>.jsonl", resumable=True)

    # -- derived values: the same everywhere, without torch -----------------------------------------------------------

    @property
    def rows(self) -> int:
        """Rows of max_seq_len tokens in one global batch."""
        return self.total_batch_size // self.max_seq_len

    def modality_codes(self) -> dict[str, int]:
        """Codes in a codebook of each modality beside text, by name; UserError for what is not name:codes, ..."""
        codes = {}
        for part in (self.modalities or "").split(",") if self.modalities else ():
            name, _, number = part.strip().partition(":")
            legal = number.isascii() and number.isdigit() and len(number) < 8 and 1 < int(number) <= 1_000_000
            if name in codes:
                message = f"modalities={shown(self.modalities)} names {name} twice"
                raise IllegalCombination("modalities", "audio:2048", message)
            if not re.fullmatch("[a-z][a-z0-9]*", name) or name == "text" or not legal:
                raise IllegalCombination(
                    "modalities",
                    "audio:2048",
                    f"modalities={shown(self.modalities)}: {part.strip()!r} is not name:codes with a new lower-case "
                    "name and 2 to 1000000 codes, as in audio:2048",
                )
            codes[name] = int(number)
        if len(codes) > RESERVED:
            message = f"modalities={shown(self.modalities)}: there are {RESERVED} reserved ids to start them with"
            raise IllegalCombination("modalities", "audio:2048", message)
        return codes

    def batch_plan(self, world_size: int = 1) -> tuple[int, int]:
        """(rows of one micro-batch, micro-batches of a step) of each rank; UserError names the nearest legal values."""
        unit, ranks = self.max_seq_len * world_size, f" * {world_size} ranks" if world_size > 1 else ""
        if self.total_batch_size % unit:
            raise _not_multiple(self, "total_batch_size", f"max_seq_len{ranks}", unit)
        rows = self.rows // world_size
        micro = min(self.device_batch_size, rows)
        if rows % micro:
            nearest = nearest_divisor(rows, micro)
            raise IllegalCombination(
                "device_batch_size",
                nearest,
                f"device_batch_size={micro} does not divide the {rows} rows of a rank "
                f"(total_batch_size {self.total_batch_size} / max_seq_len {self.max_seq_len} / {world_size} ranks): "
                f"nearest legal value {nearest}",
            )
        return micro, rows // micro

    def no_effect_reason(self, name: str) -> str | None:
        """Why a setting has no effect under the others, or None when it has one."""
        if name == "data_audio_column" and not AUDIO.matches(self.modalities):
            return f"data_audio_column has no effect while modalities={self.modalities!r}"
        other = name
        while condition := fields_of(type(self))[other].metadata["when"]:  # a switch may itself be switched off
            other, wanted = condition
            value = getattr(self, other)
            if not meets(value, wanted):
                return f"{name} has no effect while {other}={value!r}"
        return None

    def check(self, world_size: int = 1) -> None:
        """IllegalCombination, with the nearest legal value, for values that are legal alone and not together."""
        tag = self.model_tag or ""
        if tag.startswith(".") or set("/\\") & set(tag) or len(tag.encode()) > 200:
            message = f"model_tag={shown(tag)} must be a folder's name: no slashes, no leading dot, at most 200 bytes"
            raise IllegalCombination("model_tag", None, message)
        if "audio" in self.modality_codes() and self.codec == "pitch" and self.codebooks < 2:
            raise IllegalCombination(
                "codebooks", 2, "codec=pitch codes the pitch and the rest apart: codebooks must be at least 2"
            )
        self.batch_plan(world_size)


@dataclass(frozen=True)
class Settings(RunSettings):
    """All settings of one run of base training. None means off, or 'decide for me' where the help says so."""

    stage: ClassVar[str] = "base"
    script: ClassVar[str] = "scripts.base_train"
    checkpoints: ClassVar[str] = "base_checkpoints"
    groups: ClassVar[tuple[str, ...]] = (
        *("run", "data", "model", "modalities", "horizon", "batch", "optimizer", "evaluation", "checkpoints"),
    )

    setting = in_group("run")
    compile: bool = setting(
        True, "compile the model with torch.compile; falls back to eager, logging why, if that fails", resumable=True
    )
    fp8: bool = setting(False, "FP8 matmuls for the blocks' large matrices in training: Hopper GPUs or newer")
    init_from: str | None = setting(
        None, "initialise from the newest checkpoint of this model_tag or folder, ours or nanochat's own"
    )

    init_era: str | None = setting(
        None, "era of nanochat's own files in init_from, as in 2026-03-02; None: detected", when=("init_from", ON)
    )

    setting = in_group("data")
    tokenizer: str | None = setting(None, "name or folder of a trained tokenizer; None trains one on this data")
    vocab_size: int = setting(
        4096, "ids of the tokenizer, 16 special ones included", ge=272, le=1_000_000, when=("tokenizer", None), ask=True
    )

    setting = in_group("model")
    depth: int = setting(4, "number of transformer layers: the one dial", ge=1, le=1000, ask=True)
    head_dim: int = setting(64, "width of one attention head (even)", ge=2, le=10_000, ask=True)
    aspect_ratio: int = setting(
        64, "width per layer: model_dim = depth * it, rounded up to head_dim", ge=1, le=10_000, when=("model_dim", None)
    )
    model_dim: int | None = setting(
        None, "width of the residual stream; None takes depth * aspect_ratio", ge=1, le=1_000_000, ask=True
    )
    n_kv_head: int | None = setting(
        None, "key/value heads (grouped-query attention); None means one for each query head", ge=1, ask=True
    )
    mlp_ratio: float = setting(4.0, "MLP hidden units per unit of width", gt=0, le=64)
    tie_weights: bool = setting(
        False, "tie the output layer to the embedding: one matrix for both", ask="tie embedding weights?"
    )
    use_output_projection: bool = setting(
        False,
        "square projection of the features before the tied output layer",
        when=("tie_weights", True),
        ask="add an output projection before the logits?",
    )
    output_projection_residual: bool = setting(
        False, "add the projection to its input instead of replacing it", when=("use_output_projection", True)
    )
    rope_base: float = setting(10000.0, "base of the rotary frequencies; nanochat now uses 100000", gt=1)
    qk_scale: float = setting(
        1.0, "scale of normalised queries and keys: larger is sharper attention; nanochat now uses 1.2", gt=0
    )
    softcap: float = setting(15.0, "logits are softcapped to plus and minus this with tanh", gt=0, le=40)
    window_pattern: str = setting(
        "L", "pattern of attention windows tiled over the layers: L full context, S short; the last layer is always L"
    )
    short_window: int | None = setting(
        None,
        "tokens that an S layer sees back; None: a quarter of the context",
        ge=1,
        le=2**24,
        when=("window_pattern", ON),
    )
    document_mask: bool = setting(
        False, "attention stays inside each document of a row; on GPUs this uses FlexAttention"
    )
    vocab_multiple: int = setting(
        1, "embedding and output rows are padded to a multiple of this; 64 suits GPU kernels", ge=1, le=65536
    )
    value_embeddings: bool = setting(
        False, "every other layer adds a gated token embedding to its values: costs memory, hardly any time"
    )
    smear: bool = setting(False, "mix a gated part of the previous token's embedding into each token's")
    residual_scalars: bool = setting(
        False, "learned weights of the residual stream and of the embedding at the input of each block"
    )
    backout: bool = setting(
        False, "subtract a learned fraction of the middle block's output after the last block (from depth 3 on)"
    )
    bigram_rows: int | None = setting(
        None, "rows of a hashed bigram embedding table that every block adds; None has none", ge=1, le=2**24
    )

    setting = in_group("modalities")
    untie: str = setting(
        "mlp",
        "what each modality has of its own: nothing, its MLPs, or its attention matrices too",
        choices=("none", "mlp", "all"),
        when=("modalities", ON),
        ask="untie for each modality",
    )
    expert_dim: int | None = setting(
        None,
        "width of the experts of modalities beside text; None takes the model's",
        ge=1,
        le=1_000_000,
        when=("untie", ON),
        ask="width of the experts",
    )
    output_layers: str = setting(
        "separate",
        "output layer: one per modality; one shared, masked to the target's modality in the loss; or one shared",
        choices=("separate", "masked", "shared"),
        when=("modalities", ON),
        ask=True,
    )
    loss_modalities: str = setting(
        "all",
        "modalities whose targets count in the training loss: all, or names such as audio",
        when=("modalities", ON),
        ask="modalities in the loss",
    )
    text_data: str | None = setting(
        None,
        "source of text-only documents to mix with captioned sounds: as data, by its defaults, from column text",
        when=("modalities", AUDIO),
        ask="text-only documents from",
    )
    text_share: float = setting(
        0.5, "share of the positions that text-only documents take", gt=0, le=0.99, when=("text_data", ON), ask=True
    )
    route: str = setting(
        "sort",
        "how tokens get to their experts: sorted, every expert on all tokens (where), or one kernel (grouped)",
        choices=("sort", "where", "grouped"),
        when=("untie", ON),
        resumable=True,
    )

    setting = in_group("horizon")
    target_flops: float | None = setting(
        None,
        "compute budget in FLOPs; overrides the ratio",
        gt=0,
        when=("num_iterations", None),
        ask=True,
        resumable=True,
    )
    target_param_data_ratio: float | None = setting(
        20.0,
        "tokens per matmul parameter (Chinchilla: 20)",
        gt=0,
        when=("target_flops", None),
        ask=True,
        resumable=True,
    )

    setting = in_group("optimizer")
    embedding_lr: float = setting(
        0.2,
        "AdamW learning rate of an untied embedding, times (width/768)^-0.5",
        gt=0,
        when=("tie_weights", False),
        ask=True,
    )
    unembedding_lr: float = setting(
        0.004, "AdamW learning rate of an untied lm_head, scaled alike", gt=0, when=("tie_weights", False), ask=True
    )
    tied_weights_lr: float = setting(
        0.005,
        "AdamW learning rate of the tied matrix, scaled alike",
        gt=0,
        when=("tie_weights", True),
        ask="tied learning rate",
    )
    tied_init_std: float = setting(
        0.02, "standard deviation of the tied matrix at initialisation", gt=0, when=("tie_weights", True)
    )
    untie_at: float | None = setting(
        None,
        "fraction of the steps after which the tied matrix is untied, keeping its learning rate; None: never",
        gt=0,
        le=0.999,
        when=("tie_weights", True),
    )
    value_embedding_lr: float = setting(
        0.2, "AdamW learning rate of value embeddings, scaled alike", gt=0, when=("value_embeddings", True)
    )
    bigram_lr: float = setting(
        0.2, "AdamW learning rate of the bigram table, scaled alike", gt=0, when=("bigram_rows", ON)
    )
    matrix_lr: float = setting(0.02, "Muon learning rate of the weight matrices", gt=0, ask=True)
    scalar_lr: float = setting(0.01, "AdamW learning rate of the gates and scalars of newer features", gt=0)
    weight_decay: float = setting(0.0, "decoupled weight decay of the Muon matrices", ge=0, ask=True)
    cautious_weight_decay: bool = setting(
        True, "apply weight decay only where update and weight have the same sign", when=("weight_decay", ON)
    )
    muon_method: str = setting(
        "polar_express", "orthogonalisation of Muon's update", choices=("polar_express", "newton_schulz")
    )
    muon_dtype: str | None = setting(
        None, "dtype of the orthogonalisation; None follows dtype", choices=("float32", "bfloat16")
    )
    muon_nesterov: bool = setting(True, "Nesterov momentum in Muon")
    muon_normalize: bool = setting(
        True, "normalise Muon's update per neuron by a running variance (NorMuon, arXiv 2510.05491)"
    )

    setting = in_group("evaluation")
    eval_tokens: int | None = setting(
        1_048_576, "held-out tokens of each evaluation; None takes all", ge=1, resumable=True
    )
    core_metric_every: int | None = setting(
        None, "steps between runs of CORE, or without its bundle of the offline suite", ge=1, ask=True, resumable=True
    )
    core_metric_max_per_task: int | None = setting(
        500, "items per task of these evaluations; None takes all", ge=1, when=("core_metric_every", ON), resumable=True
    )
    sample_every: int | None = setting(
        2000, "steps between printed samples; None prints one after the last step only", ge=1, ask=True, resumable=True
    )

    @property
    def n_embd(self) -> int:
        """Width: model_dim, or depth * aspect_ratio rounded up to a whole number of heads."""
        return self.model_dim or math.ceil(self.depth * self.aspect_ratio / self.head_dim) * self.head_dim

    @property
    def n_head(self) -> int:
        return self.n_embd // self.head_dim

    @property
    def tag(self) -> str:
        """Name of the checkpoint folder: model_tag, or depth and variant."""
        if self.model_tag:
            return self.model_tag
        tied = "-tied" * self.tie_weights
        projected = self.tie_weights and self.use_output_projection
        further = "".join(f"-{name}" for name in self.modality_codes())
        residual = projected and self.output_projection_residual
        return f"d{self.depth}{tied}{'-proj' * projected}{'-res' * residual}{further}"

    def model_arguments(self, vocab_size: int | None = None, bos_id: int = 0) -> dict:
        """Arguments of GPTConfig that are derived, not copied by name; see GPTConfig.from_settings()."""
        vocab_size = vocab_size or self.vocab_size
        projected = self.tie_weights and self.use_output_projection
        quarter = math.ceil(self.max_seq_len / 512) * 128  # as nanochat: rounded up to its kernels' tile

        derived = dict(
            sequence_len=self.max_seq_len,
            vocab_size=vocab_size,
            n_layer=self.depth,
            n_kv_head=self.n_kv_head or self.n_head,
            use_output_projection=projected,
            output_projection_residual=projected and self.output_projection_residual,
            document_start=bos_id if self.document_mask else None,
            bigram_rows=self.bigram_rows or 0,
            backout=self.backout and self.depth > 2,  # else the middle block is the last: lambda would have no effect
            short_window=(self.short_window or quarter) if "S" in self.window_pattern else NO_WINDOW,
        )
        if self.modalities:
            return derived | dict(modalities=modalities_of(self, vocab_size))
        return derived | dict(modalities=(), untie="none", output_layers="shared")

    @staticmethod
    def of_model(config) -> dict:
        """The settings that describe the text model of a GPTConfig: the inverse of GPTConfig.from_settings()."""
        shape = dict(
            depth=config.n_layer, model_dim=config.n_embd, head_dim=config.head_dim, max_seq_len=config.sequence_len
        )
        other = ("vocab_size", "modalities", "untie", "output_layers")  # the tokenizer's, and what data has to go with
        shape |= {n: getattr(config, n) for n in fields_of(Settings) if hasattr(config, n) and n not in other}
        return shape | dict(bigram_rows=config.bigram_rows or None, document_mask=config.document_start is not None)

    def untie_step(self, steps: int) -> int | None:
        """The step, 1 to steps - 1, after which the tied matrix is untied; None: never."""
        if not (self.tie_weights and self.untie_at):
            return None
        return max(1, min(round(self.untie_at * steps), steps - 1))

    def no_effect_reason(self, name: str) -> str | None:
        short = "S" in "".join(self.window_pattern[i % len(self.window_pattern)] for i in range(self.depth - 1))
        window = self.short_window or math.ceil(self.max_seq_len / 512) * 128
        covers = window >= self.max_seq_len - 1 and f"max_seq_len={self.max_seq_len}, which {window} tokens cover"
        features = self.value_embeddings or self.smear or self.residual_scalars or (self.backout and self.depth > 2)
        reasons = {
            # tokenizer and embeddings come with the weights
            "vocab_size": self.init_from and not self.tokenizer and f"init_from={self.init_from!r}",
            "tied_init_std": self.tie_weights and self.init_from and f"init_from={self.init_from!r}",
            "backout": self.depth < 3 and f"depth={self.depth}",
            "window_pattern": "S" in self.window_pattern and (covers if short else f"depth={self.depth}"),
            "short_window": not short and f"window_pattern={self.window_pattern!r} and depth={self.depth}",
            "scalar_lr": not features
            and not self.bigram_rows
            and "value_embeddings, smear, residual_scalars, backout and bigram_rows are off",
        }
        if name == "short_window" and "S" not in self.window_pattern:
            reasons[name] = f"window_pattern={self.window_pattern!r}"
        elif name == "short_window" and short and self.short_window:
            reasons[name] = covers
        return f"{name} has no effect while {reasons[name]}" if reasons.get(name) else super().no_effect_reason(name)

    @property
    def counted_modalities(self) -> tuple[str, ...] | None:
        """Names of the modalities whose targets count in the loss; None for all."""
        if self.loss_modalities == "all":
            return None
        return tuple(name.strip() for name in self.loss_modalities.split(","))

    @classmethod
    def presets(cls) -> dict[str, dict]:
        return PRESETS

    def check(self, world_size: int = 1) -> None:
        if not re.fullmatch("[SL]+", self.window_pattern):
            message = f"window_pattern={shown(self.window_pattern)} is not made of S and L, as SSSL is"
            raise IllegalCombination("window_pattern", "SSSL", message)
        if self.head_dim % 2:
            even = self.head_dim + 1
            raise IllegalCombination(
                "head_dim", even, f"head_dim={self.head_dim} is odd, rotary embedding needs pairs: use {even}"
            )
        if self.n_embd % self.head_dim:
            raise _not_multiple(self, "model_dim", "head_dim", self.head_dim)
        self._check_hidden("mlp_ratio", self.n_embd)
        if self.modalities and self.expert_dim is not None and self.untie != "none":
            self._check_hidden("expert_dim", self.expert_dim)
        if self.n_kv_head and self.n_head % self.n_kv_head:
            nearest = nearest_divisor(self.n_head, self.n_kv_head)
            raise IllegalCombination(
                "n_kv_head",
                nearest,
                f"n_kv_head={self.n_kv_head} does not divide the {self.n_head} query heads "
                f"(model_dim {self.n_embd} / head_dim {self.head_dim}): nearest legal value {nearest}",
            )
        if (self.num_iterations, self.target_flops, self.target_param_data_ratio) == (None, None, None):
            message = "no horizon: set num_iterations, target_flops or target_param_data_ratio"
            raise IllegalCombination("target_param_data_ratio", 20.0, message)
        self._check_modalities()
        super().check(world_size)

    def _check_hidden(self, name: str, width: int) -> None:
        """IllegalCombination for an MLP without a hidden unit, with the smallest legal value of the setting."""
        if round(self.mlp_ratio * width) >= 1:
            return
        if name == "expert_dim":
            least = next(n for n in itertools.count(width) if round(self.mlp_ratio * n) >= 1)
        else:
            least = next(n / 10**4 for n in itertools.count(1) if round(n / 10**4 * width) >= 1)
        raise IllegalCombination(
            name,
            least,
            f"{name}={getattr(self, name)}: round(mlp_ratio={self.mlp_ratio} * width {width}) leaves an MLP without a "
            f"hidden unit: smallest legal value {least}",
        )

    def _check_modalities(self) -> None:
        names = ("text", *self.modality_codes())
        if self.data == "synth" and "audio" not in names:
            raise IllegalCombination(
                "modalities", "audio:512", "data=synth is captioned sounds: set modalities=audio:512, or other data"
            )
        counted = self.counted_modalities or ("text",)
        if wrong := [name for name in counted if name not in names]:
            raise IllegalCombination(
                "loss_modalities",
                "all",
                f"loss_modalities={self.loss_modalities!r}: no modality {wrong[0]!r} among {', '.join(names)}",
            )
        if not {"text", "audio"} & set(counted):
            raise IllegalCombination(
                "loss_modalities",
                "all",
                f"loss_modalities={self.loss_modalities!r}: data holds only text and audio, nothing would be learnt",
            )
        routed = self.modalities and self.route == "grouped" and self.untie != "none"
        if routed and self.expert_dim not in (None, self.n_embd):
            raise IllegalCombination(
                "expert_dim",
                self.n_embd,
                f"route=grouped needs experts of one width: expert_dim={self.expert_dim} is not {self.n_embd}",
            )


GROUPS, FIELDS, TYPES = Settings.groups, fields_of(Settings), types_of(Settings)  # base training's


def type_name(name: str, kind: type[RunSettings] = Settings) -> str:
    """The setting's type as text: 'int or None', 'two numbers'."""
    hint = types_of(kind)[name]
    if hint == tuple[float, float]:
        return "two numbers"
    names = {int: "int", float: "number", bool: "True or False", str: "text", type(None): "None"}
    parts = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return " or ".join(names[part] for part in parts)


def checked(name: str, value, kind: type[RunSettings] = Settings):
    """The value as the setting's own type; UserError for a wrong type, a non-finite number or an illegal value."""
    fields = fields_of(kind)
    if name not in fields:
        raise UserError(f"unknown setting {name!r}{nearest_name(name, fields)}")
    check_removed_value(name, value)
    hint, metadata = types_of(kind)[name], fields[name].metadata
    allowed = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None and type(None) in allowed:
        return None
    if hint == tuple[float, float]:
        if not isinstance(value, (tuple, list)) or len(value) != 2:
            raise UserError(f"{name}={shown(value)} is not two numbers, such as {fields[name].default}")
        return tuple(check_number(name, part, float, metadata) for part in value)
    for one in allowed:
        if one is bool and isinstance(value, bool):
            return value
        if one in (int, float) and isinstance(value, (int, float)) and not isinstance(value, bool):
            without = _meaning_of_none(metadata["help"]) if type(None) in allowed else ""
            return check_number(name, value, one, metadata, without)
        if one is str and isinstance(value, str):
            if metadata["choices"] and value not in metadata["choices"]:
                raise UserError(f"{name}={shown(value)} is not one of {', '.join(metadata['choices'])}")
            if any(0xD800 <= ord(c) < 0xE000 for c in value):
                raise UserError(f"{name}={shown(value)} is no text in this locale: set LC_ALL=C.UTF-8, or rename it")
            if not value.strip() or any(ord(c) < 32 for c in value):
                raise UserError(f"{name}={shown(value)} is empty or holds control characters")
            return value
    raise UserError(f"{name}={shown(value)} is a {type(value).__name__}: expected {type_name(name, kind)}")


def checked_settings(values: dict, kind: type[RunSettings] = Settings, origin: str = "checkpoint") -> dict:
    """The settings that a checkpoint holds, checked, without those that were removed; UserError for unknown names."""
    return {name: checked(name, value, kind) for name, value in values.items() if not drop_removed(name, value, origin)}


def _meaning_of_none(help: str) -> str:
    """', or None (never clips)' from a setting's help: other programs take -1 or 0 for that."""
    meaning = re.search(r"\bNone:? ([^;]+)", help)
    return f", or None ({meaning[1] if meaning else 'off'})"


def _not_multiple(settings: RunSettings, name: str, of: str, multiple: int) -> IllegalCombination:
    value = settings.n_embd if name == "model_dim" else getattr(settings, name)
    nearest = max(1, (value + multiple // 2) // multiple) * multiple
    message = f"{name}={value} is not a multiple of {of} ({multiple}): nearest legal value {nearest}"
    return IllegalCombination(name, nearest, message)


def validate(settings: RunSettings, world_size: int = 1) -> RunSettings:
    """Check single values and their combinations; returns the settings; UserError names the nearest legal value."""
    for name in fields_of(type(settings)):
        checked(name, getattr(settings, name), type(settings))
    settings.check(world_size)
    return settings


def preset(name: str, kind: type[RunSettings] = Settings, **changes) -> RunSettings:
    """The settings of a stage's preset, with some changed; UserError for an unknown name."""
    presets = kind.presets()
    if name not in presets:
        raise UserError(f"unknown preset {name!r}{nearest_name(name, presets)}")
    return kind(**{**presets[name], **changes})
