"""The compiled step over a static cache against eager decoding, which test_engine.py holds against none at all."""

import functools
import weakref

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from nanochat import decoding
from nanochat.decoding import StaticCache, cast_for_inference, make_decode_step
from nanochat.engine import decode, generate
from nanochat.gpt import GPT
from tests.model.test_routing import BOTH, mixture
from tests.test_gpt import FEATURES, MODERN, VARIANTS, build, random_ids

LONG = dict(sequence_len=200, n_kv_head=2, tie_weights=True, **MODERN)


@pytest.fixture
def uncompiled(monkeypatch):
    """The static cache with the step as it stands, which needs no seconds of compiling."""
    monkeypatch.setattr(decoding, "compiler_problem", lambda: "switched off")


def steps(model, ids: torch.Tensor, prompt: int, compiled: bool) -> torch.Tensor:
    """Logits [B, T - prompt, V] behind each further token of ids [B, T]."""
    with torch.inference_mode():
        model = cast_for_inference(model)
        cache = model.new_cache(len(ids), ids.size(1))
        model(ids[:, :prompt], kv_cache=cache)
        step = make_decode_step(model, cache, ids.size(1), compiled)
        return torch.stack([step(ids[:, t : t + 1]).clone() for t in range(prompt, ids.size(1))], dim=1)


@settings(max_examples=20)
@given(
    variant=st.sampled_from(sorted(VARIANTS)),
    features=st.sets(st.sampled_from(sorted(FEATURES))),
    kv_heads=st.sampled_from([1, 2, 4]),
    window=st.integers(1, 12),
    prompt=st.integers(1, 20),
)
def test_static_cache_matches_growing_cache(variant, features, kv_heads, window, prompt):
    """Any features, windows shorter and longer than the prompt, past the end of the ring.

    Red when the ring holds `window` tokens instead of window + 1, or when the prompt's are put in from slot 0 on.
    """
    changes = {k: v for name in features for k, v in FEATURES[name].items()}
    changes |= {"window_pattern": "SL", "short_window": window}
    model, ids = build(n_layer=3, n_kv_head=kv_heads, **{**VARIANTS[variant], **changes}), random_ids(2, prompt + 20)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoding, "compiler_problem", lambda: "switched off")
        found = steps(model, ids, prompt, compiled=True)
    torch.testing.assert_close(found, model(ids)[:, prompt:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("untie", ["mlp", "all"])
def test_experts_of_every_row(untie, uncompiled):
    """Rows of different modalities at one step. Red when StaticCache.route sends a row to another's expert."""
    model, ids = build(**{**BOTH, "untie": untie}, **MODERN), mixture("interleaved")
    ids[1] = mixture("text")[1]
    torch.testing.assert_close(steps(model, ids, 4, True), model(ids)[:, 4:], rtol=1e-5, atol=1e-5)


def test_one_graph_serves_all_texts(monkeypatch):
    """Traced, past growths of what a step sees and around a ring of 26: eager's text, and one graph for each number
    of rows, whatever the prompt's length, the text's, and the model's weights.

    Red when a view is not marked dynamic, when a ring is cut to `view_end`, when `last` keeps the strides of the
    prompt, or when the sum for one row in product() leaves out a channel.
    """
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    monkeypatch.setattr(decoding, "VIEW_BLOCK", 16)  # the growths of longer texts
    monkeypatch.setattr(decoding, "compiled_last_logits", functools.cache(decoding.compiled_last_logits.__wrapped__))
    made = torch._dynamo.utils.counters["stats"]
    for rows in (1, 3):
        before = made["unique_graphs"]
        for seed, prompt, new in ((0, 15, 20), (1, 3, 35), (0, 17, 15)):
            model, prompts = build(seed=seed, **{**LONG, "short_window": 25}), random_ids(rows, prompt)
            options = dict(temperature=0) if seed == 0 else dict(seed=3, top_k=5)
            eager = torch.stack(list(decode(model, prompts, new, **options)))
            found = torch.stack(list(decode(model, prompts, new, compiled=True, **options)))
            assert torch.equal(found, eager), (rows, prompt)
            assert len(set(eager[:, 0].tolist())) > 3  # a constant text would prove nothing
        assert made["unique_graphs"] == before + 1


def test_experts_and_bfloat16_compiled():
    """As scripts run it on a CPU, with deterministic algorithms, by the compiler's own kernels, past a growth of what a
    step sees. Red when product() rounds each term to bfloat16."""
    torch.use_deterministic_algorithms(True)
    try:
        model = build(n_layer=1, **{**BOTH, "untie": "all"}, **MODERN)
        ids = mixture("interleaved", rows=1, length=70)
        exact = model(ids)[:, 60:]
        model.compute_dtype = torch.bfloat16
        errors = [(steps(model, ids, 60, compiled) - exact).square().mean() for compiled in (True, False)]
        assert 0 < errors[0] < 1.2 * errors[1]
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("count", [0, 1, 2])
def test_few_tokens(count, uncompiled):
    """Red when a static cache is made for a text that takes no step."""
    model = build()
    assert generate(model, [1, 2, 3], count, compiled=True) == generate(model, [1, 2, 3], count)


def test_guidance_and_several_samples(uncompiled):
    """Each has a cache of its own. Red when make_decode_step() takes the guided one's cache for both."""
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
    shared = cast_for_inference(model)
    assert {p.data_ptr() for p in shared.parameters()} == {p.data_ptr() for p in model.parameters()}
    assert cast_for_inference(shared) is shared
    assert type(model.transformer.h[0].mlp.c_fc).__name__ == "Linear"
    model.compute_dtype = torch.bfloat16
    cast = cast_for_inference(model)
    assert cast.transformer.wte.weight.dtype == torch.bfloat16
    assert cast.resid_lambdas.dtype == torch.float32
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    with torch.inference_mode():
        assert torch.equal(cast(ids), model(ids))


def test_windowed_layers_keep_only_the_window(uncompiled):
    """Of 150 positions a layer with a window of 7 keeps 8. Red without min(length, window + 1)."""
    model = cast_for_inference(build(n_layer=2, window_pattern="SL", short_window=7))
    with torch.inference_mode():
        cache = model.new_cache(1, 150)
        model(random_ids(1, 12), kv_cache=cache)
        sizes = [store.size(3) for store in StaticCache(model, cache, 150).store]
    assert sizes == [8, 256]


def test_the_prompts_cache_is_gone_after_the_first_step(uncompiled, monkeypatch):
    """Red when decode() keeps it, or makes it as long as the text."""
    made, real = [], GPT.new_cache

    def watched(self, batch, length):
        made.append((length, weakref.ref(cache := real(self, batch, length))))
        return cache

    monkeypatch.setattr(GPT, "new_cache", watched)
    text = decode(build(), random_ids(1, 9), 20, compiled=True)
    next(text), next(text)
    assert [(length, cache()) for length, cache in made] == [(9, None)]


def test_a_full_cache_and_a_compiler_that_fails(monkeypatch, capsys):
    """The step after the last position is refused; a compiler's failure is logged and costs nothing.

    Red when the error of the compiler is not caught, or when extend_view() does not look.
    """
    model, ids = build(**LONG), random_ids(1, 70)

    def fails(*args):
        raise torch._dynamo.exc.InternalTorchDynamoError("no luck")

    monkeypatch.setattr(decoding, "compiled_last_logits", lambda: fails)
    found = steps(model, ids, 60, compiled=True)
    assert "without torch.compile (InternalTorchDynamoError: no luck)" in capsys.readouterr().err
    torch.testing.assert_close(found, model(ids)[:, 60:], rtol=1e-5, atol=1e-5)
    with torch.inference_mode():
        model = cast_for_inference(model)
        cache = model.new_cache(1, 61)
        model(ids[:, :60], kv_cache=cache)
        step = make_decode_step(model, cache, 61, True)
        step(ids[:, :1])
        with pytest.raises(AssertionError, match="cache of 61 positions is full"):
            step(ids[:, :1])
