"""Presets: what differs from the defaults, each with its reason.

runs/*.py are rendered from here: `python -m nanochat.config.preset_files`.
"""

# nanochat's own recipe since March 2026; gains alone, measured in dev/PERFORMANCE.md (together 0.189 bpb).
FEATURES: dict[str, tuple] = {
    "value_embeddings": (True, "gains 0.070 bpb alone (dev/PERFORMANCE.md)"),
    "smear": (True, "gains 0.037 bpb alone"),
    "residual_scalars": (True, "gains 0.006 bpb alone, within the noise: as nanochat"),
    "backout": (True, "gains nothing measurable alone: as nanochat"),
    "qk_scale": (1.2, "gains 0.017 bpb alone"),
}
WINDOWS: dict[str, tuple] = {
    "rope_base": (100_000.0, "gains nothing measurable alone: nanochat's base with windows"),
    "window_pattern": ("SSSL", "gains 0.021 bpb alone, and short windows take less compute"),
}
MODERN = {name: value for name, (value, _) in (FEATURES | WINDOWS).items()}
TIED = (True, "a third fewer parameters (dev/LOG.md)")

GPU: dict[str, tuple] = {
    "data": ("climbmix", "nanochat's pretraining text"),
    "head_dim": (128, "the size that FlashAttention kernels are fastest at"),
    "max_seq_len": (2048, "nanochat's context"),
    "tie_weights": TIED,
    **FEATURES,
    **WINDOWS,
    "target_param_data_ratio": (12.0, "tokens per parameter, below Chinchilla's 20: nanochat's compute-optimal ratio"),
    "total_batch_size": (524_288, "nanochat's batch"),
    "weight_decay": (0.1, "nanochat's, for runs of this length"),
    "eval_tokens": (10_485_760, "a validation figure with little noise"),
    "core_metric_every": (2000, "CORE a few times in a run"),
    "save_every": (1000, "what a crash may cost"),
    "keep_last": (2, "bounds the disk space"),
}

REASONS: dict[str, dict[str, tuple]] = {
    "cpu": {
        "model_dim": (192, "best of the widths that train in minutes on two cores (dev/LOG.md)"),
        "tie_weights": TIED,
        **FEATURES,
        **WINDOWS,
        "short_window": (64, "short windows are easier to learn in so few steps"),
        "num_iterations": (600, "3.5 minutes on two cores"),
        "target_param_data_ratio": (None, "num_iterations decides"),
        "total_batch_size": (4096, "more steps for the same tokens"),
        "device_batch_size": (8, "the whole batch at once: 8 rows of 512 tokens"),
        "eval_every": (200, "three measurements"),
        "eval_tokens": (None, "the held-out part is small: all of it"),
        "sample_every": (None, "one sample, at the end"),
        "save_every": (300, "once before the end"),
    },
    "audio": {
        "data": ("synth", "captioned melodies, made on the spot"),
        "data_limit": (3000, "melodies, made in half a minute"),
        "modalities": ("audio:256", "small codebooks suit so little data"),
        "codebooks": (2, "the pitch, and the rest of a frame"),
        "codec": ("pitch", "melodies are pitch above all"),
        "vocab_size": (320, "captions use few words"),
        "model_dim": (128, "minutes on two cores"),
        "head_dim": (32, "four heads at this width"),
        "max_seq_len": (240, "a caption and a melody of 4 seconds"),
        "tie_weights": TIED,
        **FEATURES,
        "num_iterations": (200, "a minute or two on two cores"),
        "target_param_data_ratio": (None, "num_iterations decides"),
        "total_batch_size": (3840, "16 rows of 240 tokens"),
        "eval_every": (100, "two measurements"),
        "eval_tokens": (None, "the held-out part is small: all of it"),
        "sample_every": (None, "sounds are sampled by scripts.audio_generate"),
        "compile": (False, "so short a run is over before compiling has paid"),
    },
    "gpu1": {
        "data_limit": (24, "shards of the text: enough for one epoch"),
        "vocab_size": (32768, "nanochat's vocabulary for small models"),
        "depth": (12, "GPT-2's size, hours on one GPU"),
        **GPU,
    },
    "8xh100": {
        "data_limit": (240, "shards of the text: enough for one epoch"),
        "vocab_size": (65536, "nanochat's vocabulary"),
        "depth": (20, "nanochat's speedrun"),
        **GPU,
    },
}

PRESETS: dict[str, dict] = {
    name: {key: value for key, (value, _) in reasons.items()} for name, reasons in REASONS.items()
}
PRESET_WORLD = {"cpu": 1, "audio": 1, "gpu1": 1, "8xh100": 8}


def hardware_preset(device_type: str, gpus: int = 0) -> str:
    """The preset that fits the hardware: cpu, gpu1, or 8xh100 for several GPUs."""
    return "cpu" if device_type != "cuda" else "8xh100" if gpus > 1 else "gpu1"
