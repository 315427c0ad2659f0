"""Tied and untied models are the same function where they can be; the optimizer goes on sanely where they part."""

import math

import pytest
import torch

from nanochat.config.settings import Settings
from nanochat.conversion.tying import tied, untied
from nanochat.gpt import GPT
from nanochat.modality import Modality
from nanochat.optim import MuonAdamW, build_optimizer
from nanochat.system.environment import UserError
from tests.test_gpt import MODERN, VARIANTS, build, random_ids

TIED = {name: changes for name, changes in VARIANTS.items() if changes}
PROJECTED = VARIANTS["tied-proj"]
AUDIO = dict(modalities=(Modality("audio", codebooks=2, codes=8, start=43),), untie="mlp")
LAYERS = {"text": {}, **{layers: dict(**AUDIO, output_layers=layers) for layers in ("shared", "masked", "separate")}}
IDS = torch.tensor([[3, 43, 51, 60, 66, 4, 9, 12]])  # with a sound in it


def opened(config, state: dict) -> GPT:
    model = GPT(config)
    model.load_state_dict(state, strict=True)
    return model


@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("variant", TIED)
def test_untied_gives_the_same_logits(variant, layers):
    """Red when lm_head is wte @ P.T, when the residual's identity is left out, or a modality's table is forgotten."""
    model = build(**TIED[variant], **LAYERS[layers], **MODERN | dict(vocab_multiple=16))
    ids = IDS if layers != "text" else random_ids(2, 9)
    config, state, nothing = untied(model.config, model.state_dict())
    assert nothing is None
    assert not config.tie_weights
    assert not config.use_output_projection
    torch.testing.assert_close(opened(config, state)(ids), model(ids), rtol=1e-5, atol=1e-5)
    assert len(state["lm_head.weight"]) % 16 == 0  # the padding is kept
    with pytest.raises(UserError, match="untied already"):
        untied(config, state)


@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("variant", TIED)
def test_tied_finds_the_projection_again(variant, layers):
    """Red when `tied` takes the residual for granted, or P solves anything but |wte P - lm_head|."""
    model = build(**TIED[variant], **LAYERS[layers])
    ids = IDS if layers != "text" else random_ids(2, 9)
    config, state, _ = untied(model.config, model.state_dict())
    for keep in ("projection",) if PROJECTED.items() <= TIED[variant].items() else ("output", "input", "both"):
        again = opened(*tied(config, state, keep))
        torch.testing.assert_close(again(ids), model(ids), rtol=1e-4, atol=1e-4)
        assert sum(p.numel() for p in again.parameters()) == sum(p.numel() for p in model.parameters())
    with pytest.raises(UserError, match="tied already"):
        tied(model.config, model.state_dict())


def test_what_tied_keeps():
    """Red when "output" keeps wte, "input" forgets the rows' lengths, or P fits the text's tables alone."""
    model, ids = build(**LAYERS["separate"]), IDS
    state = model.state_dict()
    wte, lm_head = state["transformer.wte.weight"], state["lm_head.weight"]
    models = {keep: opened(*tied(model.config, state, keep)) for keep in ("output", "input", "both", "projection")}
    assert torch.equal(models["output"].output_weight, lm_head)
    for keep in ("input", "projection"):
        torch.testing.assert_close(models[keep].embed(ids), model.embed(ids))
    for keep in ("input", "both"):
        torch.testing.assert_close(models[keep].output_weight.norm(dim=1), lm_head.norm(dim=1))
    mean = wte / wte.norm(dim=1, keepdim=True) + lm_head / lm_head.norm(dim=1, keepdim=True)
    torch.testing.assert_close(torch.cosine_similarity(models["both"].output_weight, mean), torch.ones(50))
    wte, lm_head = (torch.cat([t for name, t in state.items() if kind in name]) for kind in ("wte", "lm_head"))
    torch.testing.assert_close(models["projection"].output_projection.weight, torch.linalg.pinv(wte) @ lm_head)


# ---------------------------------------------------------------------------------------------------------------------
# the optimizer


def stepped(model: GPT, steps: int = 5, **settings) -> MuonAdamW:
    """An optimizer after some steps with random gradients."""
    optimizer = build_optimizer(model, Settings(**settings), torch.float32)
    generator = torch.Generator().manual_seed(2)
    for _ in range(steps):
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.reduce_gradients()
        optimizer.step()
    return optimizer


def moved(config, state: dict, optimizer_state: dict, gradients: dict, betas=Settings.adam_betas) -> dict:
    """How far one step moves each parameter, in units of its rate; absent gradients are zero."""
    model = opened(config, {name: tensor.clone() for name, tensor in state.items()})
    optimizer = build_optimizer(model, Settings(adam_betas=betas), torch.float32)
    optimizer.load_state_dict(optimizer_state)
    assert optimizer.state_dict().keys() == optimizer_state.keys()
    for name, parameter in model.named_parameters():
        parameter.grad = gradients.get(name, torch.zeros_like(parameter))
    optimizer.reduce_gradients()
    optimizer.step()
    rates = {name: group["lr"] for group in optimizer.param_groups for name in group["param_names"]}
    return {name: (tensor - state[name]) / rates[name] for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("betas", [(0.8, 0.95), (0.9, 0.999)])
@pytest.mark.parametrize("layers", ["text", "separate"])
@pytest.mark.parametrize("variant", ["tied-proj", "tied-proj-res"])
def test_the_step_after_untying_is_bounded(variant, layers, betas):
    """Whatever gradient comes first. Red when the second moment starts at zero, the step count stays, or the first
    moment is not scaled down to one gradient's share."""
    model = build(**TIED[variant], **LAYERS[layers])
    optimizer_state = stepped(model, adam_betas=betas).state_dict()
    config, state, optimizer_state = untied(model.config, model.state_dict(), optimizer_state, betas)
    heads = [name for name in state if name.startswith("lm_head")]
    assert len(heads) == (2 if layers == "separate" else 1)
    average = {name: optimizer_state[f"{name}.exp_avg"] / (1 - betas[0]) for name in heads}
    for gradient in (
        {},
        average,
        {name: -tensor for name, tensor in average.items()},
        {name: 1e-6 * tensor.flip(0) for name, tensor in average.items()},
        {name: 1e6 * tensor.flip(0) for name, tensor in average.items()},
        {name: betas[0] / betas[1] * tensor for name, tensor in average.items()},
    ):
        steps = moved(config, state, optimizer_state, gradient, betas)
        assert all(steps[name].abs().max() <= 1.005 for name in heads)
        assert all(step.isfinite().all() for step in steps.values())
    assert all(steps[name].abs().max() > 0.9 for name in heads)  # the last is the worst there is


def test_the_first_moment_is_folded():
    """As the average gradient @ P. Red when the projection's own state stays, or the average is not bias-corrected."""
    model = build(**PROJECTED)
    before = stepped(model, steps=2).state_dict()
    _, _, after = untied(model.config, model.state_dict(), before)
    average = before["transformer.wte.weight.exp_avg"] / (1 - 0.8**2)
    expected = torch.einsum("vk,kc->vc", average, model.output_projection.weight.detach())
    torch.testing.assert_close(after["lm_head.weight.exp_avg"] / (1 - 0.8), expected)
    assert after["lm_head.weight.step"] == 1
    assert not any(name.startswith("output_projection") for name in after)
    for name in ("step", "exp_avg", "exp_avg_sq"):  # the embedding goes on as it was
        assert torch.equal(after[f"transformer.wte.weight.{name}"], before[f"transformer.wte.weight.{name}"])


def test_without_projection_both_go_on_as_the_one_did():
    """Without a gradient, AdamW moves both by its momentum, by hand. Red when lm_head's moments start anew."""
    model = build(**VARIANTS["tied"])
    before = stepped(model, steps=3).state_dict()
    config, state, after = untied(model.config, model.state_dict(), before)
    m, v = (before[f"transformer.wte.weight.{name}"] for name in ("exp_avg", "exp_avg_sq"))
    expected = -(0.8 * m / (1 - 0.8**4)) / (0.95 * v / (1 - 0.95**4)).sqrt()
    steps = moved(config, state, after, {})
    for name in ("transformer.wte.weight", "lm_head.weight"):
        torch.testing.assert_close(steps[name], expected, rtol=1e-3, atol=1e-3)
    assert math.isclose(before["transformer.wte.weight.step"], 3)


def test_a_modality_that_never_trained_has_no_state():
    """Red when `untied` takes a state of every table for granted."""
    model = build(**PROJECTED, **LAYERS["separate"])
    state = {name: t for name, t in stepped(model).state_dict().items() if "wtes.audio" not in name}
    _, _, after = untied(model.config, model.state_dict(), state)
    assert "lm_head.weight.step" in after
    assert not any(name.startswith("lm_heads.audio") for name in after)
