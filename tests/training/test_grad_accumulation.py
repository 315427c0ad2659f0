"""Smaller micro-batches; what the training makes of them is in test_recovery."""

import pytest
import torch

from nanochat.config.settings import Settings
from nanochat.system.environment import UserError
from nanochat.training.grad_accumulation import (
    forward_backward,
    halve_micro_batch,
    is_out_of_memory,
    suggest_batch_size_on_oom,
)


def settings(rows: int, device_rows: int) -> Settings:
    return Settings(max_seq_len=8, total_batch_size=8 * rows, device_batch_size=device_rows)


@pytest.mark.parametrize(
    ("rows", "start", "ranks", "sizes"),
    [(16, 16, 1, [8, 4, 2, 1]), (12, 12, 1, [6, 3, 1]), (15, 15, 1, [5, 1]), (32, 8, 2, [4, 2, 1]), (24, 99, 2, [6])],
)
def test_at_most_half_and_always_a_divisor(rows, start, ranks, sizes):
    """Red when the half of an odd number is taken without looking for a divisor."""
    now = settings(rows, start)
    for size in sizes:
        before, _ = now.batch_plan(ranks)
        now = halve_micro_batch(now, ranks)
        assert now.batch_plan(ranks) == (size, rows // ranks // size)
        assert size <= before / 2
    with pytest.raises(UserError, match="out of memory with a single row of max_seq_len=8"):
        halve_micro_batch(settings(rows, 1), ranks)


def test_a_model_out_of_memory_gives_none_and_other_errors_pass():
    """Red when any RuntimeError is taken for a lack of memory."""
    ids = torch.zeros(4, 8, dtype=torch.long)

    def failing(error):
        def model(x, y, loss_reduction):
            raise error

        return model

    valid = torch.tensor(32)
    assert forward_backward(failing(torch.OutOfMemoryError("CUDA out of memory")), ids, ids, 2, valid) is None
    assert (
        forward_backward(failing(RuntimeError("DefaultCPUAllocator: can't allocate memory")), ids, ids, 2, valid)
        is None
    )
    with pytest.raises(RuntimeError, match="shapes"):
        forward_backward(failing(RuntimeError("shapes do not match")), ids, ids, 2, valid)
    with pytest.raises(RuntimeError, match="shapes"), suggest_batch_size_on_oom(settings(4, 4), 1):
        raise RuntimeError("shapes do not match")


def test_the_cpu_says_it_in_these_words():
    """What torch itself raises here, so that a change of its words is noticed."""
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**58, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)


def test_a_masked_micro_batch_adds_nothing():
    """The loss of a batch whose first half has no target is that of the second half, and without any it is 0."""
    weight = torch.ones((), requires_grad=True)

    def model(x, y, loss_reduction):
        return (weight * x * (y != -100)).sum()

    x = torch.arange(8.0).view(4, 2)
    y = torch.tensor([[-100, -100], [-100, -100], [1, -100], [1, 1]])
    loss = forward_backward(model, x, y, 2, (y != -100).sum())
    assert loss.item() == pytest.approx((4 + 6 + 7) / 3)
    weight.grad = None
    masked = torch.full_like(y, -100)
    assert forward_backward(model, x, masked, 2, (masked != -100).sum()).item() == 0
    assert weight.grad.item() == 0
