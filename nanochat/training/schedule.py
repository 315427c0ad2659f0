"""Pure functions of the step: horizon, batch size, learning rate, momentum, weight decay. No torch."""

import math

from nanochat.config.settings import RunSettings, Settings

MOMENTUM_WARMUP = 300  # steps until Muon's momentum has risen from 0.85 to 0.95 (modded-nanogpt)


def num_iterations(settings: Settings, matmul_parameters: int, flops_per_token: int) -> int:
    """Optimizer steps of the run: given outright, or from a FLOPs budget, or from a ratio of tokens to parameters."""
    if settings.num_iterations is not None:
        return settings.num_iterations
    if settings.target_flops is not None:
        tokens = settings.target_flops / flops_per_token
    else:
        tokens = settings.target_param_data_ratio * matmul_parameters
    sizes = batch_sizes(settings)
    mean = len(sizes) / sum(1 / size for size in sizes)  # of steps that take equal tokens at each size
    return max(1, round(tokens / mean))


def batch_sizes(settings: RunSettings) -> list[int]:
    """Tokens of a step, from batch_start by doubling to total_batch_size; that alone without the former."""
    sizes = [settings.batch_start or settings.total_batch_size]
    while sizes[-1] < settings.total_batch_size:
        sizes.append(2 * sizes[-1])
    return sizes


def batch_words(settings: RunSettings) -> str:
    """As in "8,192", or "2,048 to 8,192"."""
    sizes = batch_sizes(settings)
    return f"{sizes[0]:,} to {sizes[-1]:,}" if len(sizes) > 1 else f"{sizes[0]:,}"


def stages(settings: RunSettings, steps: int) -> list[tuple[int, int]]:
    """(first step, tokens a step) for each size of the batch: equal tokens at each, to the nearest step.

    A batch that grows is the other way to let noise fall (arXiv 1711.00489), and small ones teach as much a token as
    long as the model knows little (arXiv 1812.06162, 2505.23971).
    """
    sizes, begun = batch_sizes(settings), 0.0
    whole, result = sum(1 / size for size in sizes), []
    for size in sizes:
        result.append((round(begun * steps), size))
        begun += 1 / size / whole
    return result


def batch_tokens(settings: RunSettings, step: int, steps: int) -> int:
    """Tokens of the global batch at `step` of `steps`."""
    return next(size for first, size in reversed(stages(settings, steps)) if step >= first)


def tokens_before(settings: RunSettings, step: int, steps: int) -> int:
    """Tokens of the steps before `step`."""
    found = stages(settings, steps)
    ends = [first for first, _ in found[1:]] + [steps]
    return sum(size * max(0, min(step, end) - first) for (first, size), end in zip(found, ends, strict=True))


def progress(settings: RunSettings, step: int, steps: int) -> float:
    """`step` as a step of a run with a constant batch that has seen the same part of all tokens."""
    if settings.batch_start is None:
        return step
    return steps * tokens_before(settings, step, steps) / tokens_before(settings, steps, steps)


def lr_multiplier(settings: RunSettings, step: int, steps: int) -> float:
    """Linear warmup, constant, linear warmdown to final_lr_frac: the factor of every rate at `step` of `steps`.

    With a batch that grows the warmdown goes by tokens seen, and all is times the root of the batch's part of the last
    one: where the batch doubles, the rate rises.
    """
    warmdown = round(settings.warmdown_ratio * steps)
    up = (step + 1) / settings.warmup_steps if step < settings.warmup_steps else 1.0
    place = progress(settings, step, steps)
    left = (steps - place) / warmdown if place > steps - warmdown else 1.0
    scale = (batch_tokens(settings, step, steps) / settings.total_batch_size) ** 0.5
    return scale * min(up, left + (1 - left) * settings.final_lr_frac)  # where the two overlap, the lower one


def muon_momentum(step: int) -> float:
    return 0.85 + 0.10 * min(step / MOMENTUM_WARMUP, 1.0)


def weight_decay(settings: Settings, step: int, steps: int) -> float:
    """Linear to zero at the end: late decay would only fight the small last updates (nanochat)."""
    return settings.weight_decay * (1 - progress(settings, step, steps) / steps)


def is_due(every: int | None, step: int) -> bool:
    """Whether something on a cadence happens after `step` steps; None is never."""
    return every is not None and step > 0 and step % every == 0


def clip_scale(norm: float, limit: float | None) -> float:
    """The factor that brings a gradient of this norm within the limit."""
    return 1.0 if limit is None or norm <= limit or not math.isfinite(norm) else limit / norm
