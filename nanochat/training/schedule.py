"""Schedules as pure functions of the step: horizon, learning rate, momentum, weight decay. No torch."""

import math

from nanochat.config.settings import RunSettings, Settings

MOMENTUM_WARMUP = 300  # steps until Muon's momentum has risen from 0.85 to 0.95 (modded-nanogpt)


def num_iterations(settings: Settings, matmul_parameters: int, flops_per_token: int) -> int:
    """Optimizer steps of the run: given, or from a compute budget in FLOPs, or from a ratio of tokens to parameters."""
    if settings.num_iterations is not None:
        return settings.num_iterations
    if settings.target_flops is not None:
        tokens = settings.target_flops / flops_per_token
    else:
        tokens = settings.target_param_data_ratio * matmul_parameters
    return max(1, round(tokens / settings.total_batch_size))


def lr_multiplier(settings: RunSettings, step: int, steps: int) -> float:
    """The factor of every learning rate at `step`: linear warmup, constant, linear warmdown to final_lr_frac."""
    warmup = (step + 1) / settings.warmup_steps if step < settings.warmup_steps else 1.0

    warmdown_steps = round(settings.warmdown_ratio * steps)
    left = (steps - step) / warmdown_steps if step > steps - warmdown_steps else 1.0
    warmdown = left + (1 - left) * settings.final_lr_frac

    return min(warmup, warmdown)  # where the two overlap, the lower one


def muon_momentum(step: int) -> float:
    """Rises linearly from 0.85 to 0.95 over MOMENTUM_WARMUP steps."""
    return 0.85 + 0.10 * min(step / MOMENTUM_WARMUP, 1.0)


def weight_decay(settings: Settings, step: int, steps: int) -> float:
    """Decays linearly to zero: late weight decay would only fight the small last updates (nanochat)."""
    return settings.weight_decay * (1 - step / steps)


def is_due(every: int | None, step: int) -> bool:
    """Whether something with a cadence of `every` steps is due after `step` of them; None is never."""
    return every is not None and step > 0 and step % every == 0


def clip_scale(norm: float, limit: float | None) -> float:
    """The factor that clips a gradient of this norm to the limit."""
    return 1.0 if limit is None or norm <= limit or not math.isfinite(norm) else limit / norm
