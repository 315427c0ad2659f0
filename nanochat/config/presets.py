"""Presets: what differs from the defaults; chosen by measurement where dev/LOG.md says so."""

# Together they won on a CPU (dev/LOG.md); they are also nanochat's own recipe since March 2026.
MODERN = dict(
    value_embeddings=True,
    smear=True,
    residual_scalars=True,
    backout=True,
    qk_scale=1.2,
    rope_base=100_000.0,
    window_pattern="SSSL",
)


PRESETS: dict[str, dict] = {
    "cpu": dict(
        data="stdlib",
        vocab_size=4096,
        depth=4,
        model_dim=192,
        head_dim=64,
        max_seq_len=512,
        tie_weights=True,
        **MODERN,
        short_window=64,
        num_iterations=600,
        total_batch_size=4096,
        device_batch_size=8,
        eval_every=200,
        eval_tokens=None,
        sample_every=None,
        save_every=300,
        target_param_data_ratio=None,
    ),
    "audio": dict(
        data="synth",
        data_limit=3000,
        modalities="audio:256",
        codebooks=2,
        codec="pitch",
        vocab_size=320,
        depth=4,
        model_dim=128,
        head_dim=32,
        max_seq_len=240,
        tie_weights=True,
        value_embeddings=True,
        smear=True,
        residual_scalars=True,
        backout=True,
        qk_scale=1.2,
        num_iterations=200,
        total_batch_size=3840,
        device_batch_size=16,
        eval_every=100,
        eval_tokens=None,
        sample_every=None,
        target_param_data_ratio=None,
        compile=False,  # so short a run is over before compiling has paid
    ),
    "gpu1": dict(
        data="climbmix",
        data_limit=24,
        vocab_size=32768,
        depth=12,
        head_dim=128,
        max_seq_len=2048,
        tie_weights=True,
        **MODERN,
        target_param_data_ratio=12.0,
        total_batch_size=524_288,
        device_batch_size=16,
        weight_decay=0.1,
        eval_tokens=10_485_760,
        core_metric_every=2000,
        save_every=1000,
        keep_last=2,
    ),
    "8xh100": dict(
        data="climbmix",
        data_limit=240,
        vocab_size=65536,
        depth=20,
        head_dim=128,
        max_seq_len=2048,
        tie_weights=True,
        **MODERN,
        target_param_data_ratio=12.0,
        total_batch_size=524_288,
        device_batch_size=16,
        weight_decay=0.1,
        eval_tokens=10_485_760,
        core_metric_every=2000,
        save_every=1000,
        keep_last=2,
    ),
}


PRESET_WORLD = {"cpu": 1, "audio": 1, "gpu1": 1, "8xh100": 8}


def hardware_preset(device_type: str, gpus: int = 0) -> str:
    """The preset that fits the hardware: cpu, gpu1, or 8xh100 for several GPUs."""
    return "cpu" if device_type != "cuda" else "8xh100" if gpus > 1 else "gpu1"
