"""Kernels belong to a model: what one is trained with changes nothing for others in the same process."""

import functools

import pytest
import torch

from nanochat.config.settings import Settings
from nanochat.model.kernels import Kernels
from nanochat.optim import build_optimizer
from nanochat.training.kernel_selection import select_attention
from tests.test_gpt import build, random_ids


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """torch.compile() with a backend that runs graphs as they are, and notes each run."""
    found: list[str] = []

    def backend(graph, inputs):
        def run(*args):
            found.append("compiled")
            return graph.forward(*args)

        return run

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    yield found
    torch._dynamo.reset()


def step(model, optimizer) -> torch.Tensor:
    """The loss of one training step."""
    ids = random_ids(2, 17)
    loss = model(ids[:, :-1], ids[:, 1:])
    loss.backward()
    optimizer.reduce_gradients()
    optimizer.step()
    return loss.detach()


def test_a_compiled_and_an_eager_model_take_turns(calls):
    """Red when compile() sets what all models use: a state of the module or class."""
    models = [build(n_layer=1) for _ in range(2)]
    optimizers = [build_optimizer(model, Settings(), torch.float32) for model in models]
    models[0].compile()
    optimizers[0].compile()
    expected = {0: {"compiled"}, 1: set()}
    for number in (0, 1, 0, 1):
        calls.clear()
        step(models[number], optimizers[number])
        assert set(calls) == expected[number]
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(a, b)

    models[1].uncompile()
    calls.clear()
    step(models[0], optimizers[0])
    assert calls
    models[0].uncompile()
    optimizers[0].uncompile()
    calls.clear()
    step(models[0], optimizers[0])
    assert not calls


def test_another_attention_kernel_is_its_models_alone():
    """Red when the kernels are shared (a class attribute, or one default object for all models)."""
    usual, changed = build(), build()
    asked = []

    def doubled(q, k, v, window, mask):
        asked.append(window)
        return 2 * v

    changed.kernels.attention[False] = doubled
    ids = random_ids(2, 9)
    before = build()(ids)
    assert torch.equal(usual(ids), before)
    assert asked == []
    assert not torch.allclose(changed(ids), before)
    assert asked == [None, None]  # both layers
    with torch.no_grad():  # evaluation is not trained with it
        torch.testing.assert_close(changed(ids), before)
    assert len(asked) == 2
    assert usual.kernels == Kernels()


def test_selecting_again_replaces_the_kernels():
    model = build()
    model.kernels.attention = {True: torch.add, False: torch.add}
    select_attention(model)
    assert model.kernels.attention == {}
