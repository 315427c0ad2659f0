"""Loss and gradients of a step, micro-batch by micro-batch, and smaller micro-batches when memory runs out."""

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
    micro_batch_size: int,
    num_targets: torch.Tensor,
    optimizer: MuonAdamW | None = None,
) -> torch.Tensor | None:
    """Forward and backward, one micro-batch after the other; the mean loss, or None when memory runs out.

    inputs, targets: int64 [rows of this rank, T]. micro_batch_size: rows. num_targets: targets that are scored in the
    global batch, a scalar tensor. Returns each modality's part of the loss, [E]: their sum is the loss.
    Gradients are left in the parameters, or their reduce-scatter is launched where an optimizer is given; after None
    they are incomplete, and all ranks have to drop them.
    """
    loss: torch.Tensor | None = torch.zeros((), device=inputs.device)  # becomes [E] with the first addition
    try:
        for start in range(0, len(inputs), micro_batch_size):
            end = start + micro_batch_size
            micro_loss = model(inputs[start:end], targets[start:end], loss_reduction="modalities")
            micro_loss = micro_loss / num_targets.clamp(min=1)
            if optimizer is not None and end >= len(inputs):
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
    """The CUDA allocator's error or Python's, or those of driver, cuBLAS and CPU allocator, known by their text."""
    texts = ("can't allocate memory", "not enough memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and any(text in str(error) for text in texts)
    )


def halve_micro_batch(settings: Settings, world_size: int) -> Settings:
    """The settings with at most half the micro-batch size; UserError when it is one row already."""
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
            f"retried with smaller micro-batches: use --resume --device_batch_size={fits} ({first_line(error)})"
        ) from error
