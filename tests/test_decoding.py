"""The compiled step over a static cache against eager decoding, which test_engine.py holds against none at all."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from test_gpt import FEATURES, MODERN, VARIANTS, build, random_ids
from test_routing import BOTH, mixture

from nanochat import decoding
from nanochat.decoding import CompiledStep, StaticCache, cast_once, stepper
from nanochat.engine import decode, generate

LONG = dict(sequence_len=200, n_kv_head=2, tie_weights=True, **MODERN)


@pytest.fixture
def uncompiled(monkeypatch):
    """The static cache with the step as it stands, which needs no seconds of compiling."""
    monkeypatch.setattr(decoding, "compiler_problem", lambda: "left out")


def steps(model, ids: torch.Tensor, prompt: int, compiled: bool) -> torch.Tensor:
    """Logits [B, T - prompt, V] behind each further token of ids [B, T]."""
    with torch.inference_mode():
        model = cast_once(model)
        cache = model.new_cache(len(ids), ids.size(1))
        model(ids[:, :prompt], kv_cache=cache)
        step = stepper(model, cache, compiled)
        return torch.stack([step(ids[:, t : t + 1]).clone() for t in range(prompt, ids.size(1))], dim=1)


@settings(max_examples=30)
@given(
    variant=st.sampled_from(sorted(VARIANTS)),
    features=st.sets(st.sampled_from(sorted(FEATURES))),
    kv_heads=st.sampled_from([1, 2, 4]),
    window=st.integers(1, 12),
    prompt=st.integers(1, 20),
)
def test_a_static_cache_is_a_growing_one(variant, features, kv_heads, window, prompt):
    """Any features, windows shorter and longer than the prompt, past the end of the ring.

    Red when the ring holds `window` tokens instead of window + 1, or when the prompt's are put in from slot 0 on.
    """
    changes = {k: v for name in features for k, v in FEATURES[name].items()}
    changes |= {"window_pattern": "SL", "short_window": window}
    model, ids = build(n_layer=3, n_kv_head=kv_heads, **{**VARIANTS[variant], **changes}), random_ids(2, prompt + 20)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoding, "compiler_problem", lambda: "left out")
        found = steps(model, ids, prompt, compiled=True)
    torch.testing.assert_close(found, model(ids)[:, prompt:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("untie", ["mlp", "all"])
def test_experts_of_every_row(untie, uncompiled):
    """Rows of different modalities at one step. Red when StaticCache.route is "slice"."""
    model, ids = build(**{**BOTH, "untie": untie}, **MODERN), mixture("interleaved")
    ids[1] = mixture("text")[1]
    torch.testing.assert_close(steps(model, ids, 4, True), model(ids)[:, 4:], rtol=1e-5, atol=1e-5)


def test_one_graph_for_a_whole_text_and_the_next():
    """Compiled, past two growths of what a step sees: eager's text, and nothing is compiled twice.

    Red when `seen` is not marked dynamic, or when the sum for one row in product() leaves out a channel.
    """
    model = build(**LONG)
    compiled = torch._dynamo.utils.counters["stats"]
    for rows in (1, 3):
        prompts = random_ids(rows, 60)
        eager = torch.stack(list(decode(model, prompts, 80, temperature=0)))
        assert torch.equal(torch.stack(list(decode(model, prompts, 80, temperature=0, compiled=True))), eager)
        before = compiled["unique_graphs"]
        other = build(seed=1, **LONG)
        eager = torch.stack(list(decode(other, prompts[:, :9], 100, seed=3, top_k=5)))
        assert torch.equal(torch.stack(list(decode(other, prompts[:, :9], 100, seed=3, top_k=5, compiled=True))), eager)
        assert compiled["unique_graphs"] == before > 0
    assert len(set(eager[:, 0].tolist())) > 3  # a constant text would prove nothing


def test_guidance_and_several_samples(uncompiled):
    """Each has a cache of its own. Red when stepper() takes the guided one's cache for both."""
    model = build(**LONG)
    how = dict(num_samples=3, temperature=1.0, seed=4)
    assert generate(model, [3, 9, 27], 30, compiled=True, **how) == generate(model, [3, 9, 27], 30, **how)
    guided = [
        torch.stack(list(decode(model, random_ids(2, 9), 20, unguided=[3, 4], guidance=3.0, compiled=compiled)))
        for compiled in (False, True)
    ]
    assert torch.equal(*guided)
    assert not torch.equal(guided[0], torch.stack(list(decode(model, random_ids(2, 9), 20))))


def test_weights_are_cast_once_and_float32_is_shared():
    """bfloat16: the very logits of casting at every use, and lambdas stay float32. Red when they are cast too."""
    model, ids = build(**LONG), random_ids(2, 20)
    shared = cast_once(model)
    assert {p.data_ptr() for p in shared.parameters()} == {p.data_ptr() for p in model.parameters()}
    assert cast_once(shared) is shared and type(model.transformer.h[0].mlp.c_fc).__name__ == "Linear"
    model.compute_dtype = torch.bfloat16
    cast = cast_once(model)
    assert cast.transformer.wte.weight.dtype == torch.bfloat16 and cast.resid_lambdas.dtype == torch.float32
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    with torch.inference_mode():
        assert torch.equal(cast(ids), model(ids))


def test_memory_of_a_window_is_the_windows(uncompiled):
    """Ten times the positions, and a layer with a window takes what it took. Red without min(length, window + 1)."""
    model = cast_once(build(n_layer=2, window_pattern="SL", short_window=7))
    with torch.inference_mode():
        cache = model.new_cache(1, 150)
        model(random_ids(1, 12), kv_cache=cache)
        sizes = [store.size(3) for store in StaticCache(model, cache, 150).store]
    assert sizes == [8, 150]


def test_a_full_cache_and_a_compiler_that_fails(monkeypatch, capsys):
    """The step after the last position is refused; a compiler's failure is said and costs nothing.

    Red when the error of the compiler is not caught, or when make_room() does not look.
    """
    model, ids = build(**LONG), random_ids(1, 70)

    def fails(*args):
        raise torch._dynamo.exc.InternalTorchDynamoError("no luck")

    monkeypatch.setattr(CompiledStep, "compiled", fails)
    found = steps(model, ids, 60, compiled=True)
    assert "without torch.compile (InternalTorchDynamoError: no luck)" in capsys.readouterr().out
    torch.testing.assert_close(found, model(ids)[:, 60:], rtol=1e-5, atol=1e-5)
    with torch.inference_mode():
        model = cast_once(model)
        cache = model.new_cache(1, 61)
        model(ids[:, :60], kv_cache=cache)
        step = stepper(model, cache, True)
        step(ids[:, :1])
        with pytest.raises(AssertionError, match="cache of 61 positions is full"):
            step(ids[:, :1])
