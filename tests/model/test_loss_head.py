"""The chunked loss and its gradients against all logits at once and F.cross_entropy in float64."""

import functools
import types

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings

from nanochat.model import loss_head
from nanochat.model.loss_head import chunked_cross_entropy, compile_chunk_gradient, softcapped


def problem(rows: int, width: int, vocab: int, scale: float = 1.0, ignored: float = 0.3, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(rows, width, generator=generator) * scale).requires_grad_()
    weight = torch.randn(vocab, width, generator=generator).requires_grad_()
    targets = torch.randint(vocab, (rows,), generator=generator)
    return x, weight, targets.masked_fill(torch.rand(rows, generator=generator) < ignored, -100)


def reference(
    x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, reduction: str, softcap: float = 15.0
) -> torch.Tensor:
    logits = softcap * torch.tanh(x.double() @ weight.double().T / softcap)
    each = F.cross_entropy(logits, targets, reduction="none")
    valid = max(1, int((targets != -100).sum()))
    return {"none": each, "sum": each.sum(), "mean": each.sum() / valid}[reduction]


@settings(max_examples=40)
@given(
    rows=st.integers(1, 23),
    chunk=st.integers(1, 9),
    vocab=st.integers(2, 30),
    scale=st.sampled_from([0.1, 3.0, 30.0]),  # 30 drives the logits deep into the cap
    ignored=st.sampled_from([0.0, 0.5, 1.0]),
    reduction=st.sampled_from(["mean", "sum"]),
    softcap=st.sampled_from([15.0, 20.0]),
)
def test_chunked_loss_and_gradients_match_the_reference(rows, chunk, vocab, scale, ignored, reduction, softcap):
    """Red when the last, shorter chunk is dropped, `(1 - squashed^2)` is left out, or -100 counts in the mean."""
    x, weight, targets = problem(rows, 5, vocab, scale, ignored)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss_head, "chunk_rows", lambda *where, **how: chunk)
        loss = chunked_cross_entropy(x, weight, targets, reduction, softcap)
        with torch.no_grad():
            evaluated = chunked_cross_entropy(x, weight, targets, reduction, softcap)
            each = chunked_cross_entropy(x, weight, targets, "none", softcap)
    expected = reference(x, weight, targets, reduction, softcap)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(evaluated.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(each.double(), reference(x, weight, targets, "none", softcap), rtol=1e-5, atol=1e-5)
    assert each[targets == -100].eq(0).all()
    ours = torch.autograd.grad(3 * loss, (x, weight))
    theirs = torch.autograd.grad(3 * expected, (x, weight))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * max(1.0, scale, b.abs().max().item()))


def test_loss_of_ignored_targets_alone_is_zero():
    x, weight, _ = problem(6, 4, 9)
    loss = chunked_cross_entropy(x, weight, torch.full((6,), -100))
    loss.backward()
    assert loss.item() == 0
    assert not x.grad.any()
    assert not weight.grad.any()


def test_bfloat16_features_give_a_float32_loss_and_master_gradient():
    x, weight, targets = problem(700, 16, 40)
    expected = reference(x, weight, targets, "mean")
    wanted = torch.autograd.grad(expected, weight)[0]
    loss = chunked_cross_entropy(x.bfloat16(), weight, targets)
    got = torch.autograd.grad(loss, weight)[0]
    assert loss.dtype == got.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=0.02)
    assert (got - wanted).norm() < 0.02 * wanted.norm()


def test_bfloat16_gradients_from_float32_sums(monkeypatch):
    """As on NVIDIA's GPUs, the gradient is a multiple until rows are divided. Red when the target's part or `scale` is
    left out, or when -100 pulls at the weights."""
    x, weight, targets = problem(700, 16, 40, 3.0, 0.3)
    wanted = torch.autograd.grad(reference(x, weight, targets, "sum"), (x, weight))
    asked = []

    def mm(a, b, out_dtype=None, out=None):
        asked.append(out_dtype)
        return torch.matmul(a.to(out_dtype or a.dtype), b.to(out_dtype or a.dtype), out=out)

    monkeypatch.setattr(loss_head, "rounds", lambda x: False)
    monkeypatch.setattr(loss_head, "chunk_rows", lambda *where, **how: 256)
    monkeypatch.setattr(loss_head.torch, "mm", mm)
    features = x.detach().bfloat16().requires_grad_()
    got = torch.autograd.grad(chunked_cross_entropy(features, weight, targets, "sum"), (features, weight))
    for a, b in zip(got, wanted, strict=True):
        assert (a - b).norm() < 0.01 * b.norm()
    assert got[0][targets == -100].eq(0).all()
    assert asked == [None, torch.float32, torch.float32] * 3  # of 256, 256 and 188 rows


@pytest.mark.parametrize(
    ("gpu", "cuda", "dtype", "rounded"),
    [
        (False, None, torch.bfloat16, True),
        (False, None, torch.float32, False),
        (True, "13.0", torch.bfloat16, False),
        (True, "13.0", torch.float32, False),
        (True, None, torch.bfloat16, True),
    ],  # the last is ROCm
)
def test_which_devices_return_float32_sums(monkeypatch, gpu, cuda, dtype, rounded):
    monkeypatch.setattr(torch.version, "cuda", cuda)
    assert loss_head.rounds(types.SimpleNamespace(is_cuda=gpu, dtype=dtype)) is rounded


def test_logits_stay_inside_the_cap():
    assert softcapped(torch.tensor([-1e9, 0.0, 1e9])).tolist() == [-15.0, 0.0, 15.0]


def test_one_graph_for_chunks_of_any_length(monkeypatch):
    """Red without maybe_mark_dynamic: every number of rows, as the targets of a modality come in, compiled anew."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    kernel, graphs = compile_chunk_gradient(), torch._dynamo.utils.counters["stats"]
    before = graphs["unique_graphs"]
    for rows in (7, 12, 31):
        x, weight, targets = problem(rows, 5, 16, 1.0, 0.0)
        loss = chunked_cross_entropy(x, weight, targets, "sum", 15.0, kernel)
        torch.testing.assert_close(loss.double(), reference(x, weight, targets, "sum", 15.0))
    assert graphs["unique_graphs"] == before + 1
