"""What adapter training will cost, before it starts: parameters by group, memory of the weights, disk.

Counts come from modules on the meta device (nanochat.adapters.counts), so that no second formula can drift
away from them. Activations are not predicted: they are the host's own, whose code is not ours.
"""

import textwrap

import torch

from nanochat.config.adapter_settings import AdapterSettings
from nanochat.system.environment import UserError
from nanochat.training.estimate import Hardware, count_checkpoints, format_gib, format_millions

# of each trained parameter, all float32; the last are AdamW's two moments
TRAINED_BYTES = {"trained weights": 4, "their gradients": 4, "their optimizer state": 8}


def report(settings: AdapterSettings, hardware: Hardware) -> list[str]:
    """The prediction as lines of at most 80 columns; without a host's configuration, why there are no counts."""
    from nanochat.adapters.counts import parameter_counts  # hosts and experts, which base training does without

    steps = settings.num_iterations
    tokens = steps * settings.total_batch_size
    horizon = f"steps and tokens  {steps:,} steps of {settings.total_batch_size:,} = {tokens:,} tokens"
    try:
        count = parameter_counts(settings)
    except UserError as error:
        return [*textwrap.wrap(f"parameters, memory and disk are not known yet: {error}", 79), "", horizon]
    trained, dtype = count["trained"], hardware.activation_dtype(settings)
    if settings.host.startswith("nanochat:") or settings.finetune_host or settings.unfreeze:
        dtype = torch.float32  # our own models' weights are cast where they are used; trained ones are float32
    frozen = count["total"] - trained
    names = ("bfloat16", "float32") if dtype.itemsize == 2 else ("float32", "bfloat16")
    other = format_gib(frozen * (6 - dtype.itemsize))  # 2 bytes or 4, whichever it is not
    memory = {f"frozen weights in {names[0]} ({other} in {names[1]})": frozen * dtype.itemsize}
    memory |= {f"{part} in float32": size * trained for part, size in TRAINED_BYTES.items()}
    whole = sum(memory.values())
    saves, kept = count_checkpoints(settings, steps)
    weights = TRAINED_BYTES["trained weights"] * trained
    checkpoint = weights + TRAINED_BYTES["their optimizer state"] * trained
    lines = [
        *parameter_table(settings, count),
        "",
        horizon,
        f"memory            {format_gib(whole)} per device and activations on top, of which",
        *(f"                  {format_gib(size):>10}  {part}" for part, size in memory.items()),
        f"checkpoint        {megabytes(checkpoint)}, of which trained tensors {megabytes(weights)}",
        f"disk              {megabytes(kept * checkpoint)}: {kept:,} of {saves:,} checkpoints at a time",
    ]
    if hardware.memory and whole > hardware.memory:
        lines.append(f"warning: a device has {format_gib(hardware.memory)}: take a smaller host, or dtype=bfloat16")
    return lines


def parameter_table(settings: AdapterSettings, count: dict[str, int]) -> list[str]:
    """Lines `label  count  millions` with a header: each group and what happens to it, the total, what is trained."""
    host = "trained" if settings.finetune_host else "parts trained" if settings.unfreeze else "frozen"
    notes = {
        "host": host,
        "experts": "trained" if settings.expert == "trained" else "frozen",
        "adapters": "trained",
        "audio embedding": "trained",
        "audio output": "trained" if settings.train_output == "rows" else "zero, frozen",
        "whole output": "trained" if settings.train_output == "whole" else "not trained, not in the total",
    }
    rows = [(f"{name} ({note})", count[name]) for name, note in notes.items() if count[name]]
    rows += [("total", count["total"]), (f"trained ({count['trained'] / count['total']:.1%})", count["trained"])]
    head = f"{'parameters':<44}{'count':>16}{'millions':>14}"
    return [head, *(f"{label:<44}{number:>16,}{format_millions(number):>14}" for label, number in rows)]


def megabytes(size: float) -> str:
    return f"{size / 1e6:,.1f} MB"
