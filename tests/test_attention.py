"""Every attention path against a softmax over an explicit mask in float64."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from nanochat import attention
from nanochat.attention import blocked_causal_attention, causal_attention


def qkv(B: int, T: int, S: int, H: int, kv: int, D: int, seed: int = 0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(B, n, h, D, generator=generator) for n, h in ((T, H), (S, kv), (S, kv)))


def reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int | None = None) -> torch.Tensor:
    """Query t of T sees keys 0 .. S - T + t, or the last window + 1 of them; head h reads key head h // (H / H_kv)."""
    (_, T, H, D), S = q.shape, k.size(1)
    k, v = (z.double()[:, :, [h * z.size(2) // H for h in range(H)]] for z in (k, v))
    scores = torch.einsum("bthd,bshd->bhts", q.double(), k) / D**0.5
    back = torch.arange(S - T, S)[:, None] - torch.arange(S)[None]
    visible = (back >= 0) & (back <= (S if window is None else window))
    return torch.einsum("bhts,bshd->bthd", scores.masked_fill(~visible, -torch.inf).softmax(-1), v)


@pytest.mark.parametrize("length", [1, 2, 127, 128, 129, 255, 256, 300])
@pytest.mark.parametrize("heads", [(2, 2), (4, 2), (3, 1)])
@pytest.mark.parametrize("window", [None, 1, 100, 128, 200])
def test_blocked_attention_at_block_edges(length, heads, window):
    """Red when a block's keys end one position early or late (`:end`), begin late (`start - window + 1`), or
    `triu(start - first + 1)` loses its 1."""
    q, k, v = qkv(2, length, length, *heads, 4)
    out = blocked_causal_attention(q, k, v, window)
    torch.testing.assert_close(out.double(), reference(q, k, v, window), rtol=1e-5, atol=1e-5)


@settings(max_examples=40)
@given(
    T=st.integers(1, 12),
    past=st.integers(0, 9),
    heads=st.sampled_from([(1, 1), (2, 2), (4, 2), (6, 1)]),
    grad=st.booleans(),
    window=st.none() | st.integers(1, 22),
    seed=st.integers(0, 3),
)
def test_every_path_is_the_reference(T, past, heads, grad, window, seed):
    """One new token, several behind a cache, none cached, with windows. Red when `tril(S - T)` becomes `tril()`."""
    q, k, v = qkv(2, T, T + past, *heads, 6, seed)
    with torch.set_grad_enabled(grad):
        out = causal_attention(q, k, v, window)
    assert out.shape == q.shape
    torch.testing.assert_close(out.double(), reference(q, k, v, window), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("window", [None, 2, 4])
def test_gradients_through_the_blocks(monkeypatch, window):
    """Small blocks, many of them, with shared key heads."""
    monkeypatch.setattr(attention, "CPU_BLOCK", 3)
    q, k, v = (z.requires_grad_() for z in qkv(2, 10, 10, 4, 2, 4))
    weight = torch.randn(2, 10, 4, 4, generator=torch.Generator().manual_seed(9))
    ours = torch.autograd.grad((causal_attention(q, k, v, window) * weight).sum(), (q, k, v))
    theirs = torch.autograd.grad((reference(q, k, v, window) * weight).sum(), (q, k, v))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_bfloat16_keeps_its_dtype_and_stays_close():
    q, k, v = qkv(1, 140, 140, 2, 2, 8)
    out = causal_attention(*(z.bfloat16() for z in (q, k, v)))
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), reference(q, k, v), rtol=0.05, atol=0.03)
