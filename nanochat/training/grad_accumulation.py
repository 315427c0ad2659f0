"""Loss and gradients of a step, micro-batch by micro-batch, and what happens when memory runs out."""

import contextlib
import dataclasses
from collections.abc import Iterator

import torch

from nanochat.config.settings import Settings
from nanochat.optim import MuonAdamW
from nanochat.runtime import first_line
from nanochat.system.environment import UserError


def forward_backward(
    model,
    inputs: torch.Tensor,
    targets: torch.Tensor,
    rows: int,
    valid: torch.Tensor,
    optimizer: MuonAdamW | None = None,
) -> torch.Tensor | None:
    """Forward and backward of `rows` rows at a time; the loss over `valid` targets, or None without memory.

    inputs, targets int64 [rows of this rank, T]; valid: targets that count in the global batch, a scalar tensor.
    Returns each modality's part of the loss, [E]: their sum is the loss.
    Gradients are left in the parameters, or are already on their way to the other ranks if the optimizer is given;
    after None they are not of use, and all ranks have to drop them.
    """
    loss: torch.Tensor | None = torch.zeros((), device=inputs.device)  # of as many modalities as the model says
    try:
        for start in range(0, len(inputs), rows):
            x, y = inputs[start : start + rows], targets[start : start + rows]
            micro_loss = model(x, y, loss_reduction="modalities") / valid.clamp(min=1)
            if optimizer is not None and start + rows >= len(inputs):
                optimizer.overlap_gradient_reduction()
            micro_loss.sum().backward()
            loss = loss + micro_loss.detach()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        loss = None
    if optimizer is not None:  # not in the handler, which keeps the failed pass's memory alive
        optimizer.launch_reduce_scatter(failed=loss is None)
    return loss


def is_out_of_memory(error: BaseException) -> bool:
    """The CUDA allocator's error or Python's; driver, cuBLAS and the CPU's allocator raise others, known by words."""
    words = ("can't allocate memory", "not enough memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and any(part in str(error) for part in words)
    )


def halve_micro_batch(settings: Settings, world_size: int) -> Settings:
    """The settings with at most half as many rows a micro-batch; UserError when one row was too much already."""
    micro, _ = settings.batch_plan(world_size)
    if micro == 1:
        raise UserError(
            f"out of memory with a single row of max_seq_len={settings.max_seq_len}: a shorter max_seq_len or a "
            "smaller model fits"
        )
    rows = settings.rows // world_size
    half = next(n for n in range(micro // 2, 0, -1) if rows % n == 0)
    return dataclasses.replace(settings, device_batch_size=half)


@contextlib.contextmanager
def suggest_batch_size_on_oom(settings: Settings, world_size: int) -> Iterator[None]:
    """Turn running out of memory, where ranks exchange gradients and a step cannot start over, into a UserError."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        micro, _ = settings.batch_plan(world_size)
        fits = halve_micro_batch(settings, world_size).device_batch_size
        raise UserError(
            f"out of memory with device_batch_size={micro}, outside of a step's forward and backward, which would be "
            f"tried again in smaller parts: continue with --resume --device_batch_size={fits} ({first_line(error)})"
        ) from error
