"""Generation with the cache against generation without it."""

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from nanochat.engine import generate, sample
from nanochat.system.environment import UserError
from tests.test_gpt import FEATURES, MODERN, VARIANTS, VARIANTS_AND_FEATURES, build, random_ids

PROMPT = [3, 14, 15, 9, 26]


@torch.inference_mode()
def uncached(model, ids: list[int], max_tokens: int, temperature=1.0, top_k=None, seed=42) -> list[int]:
    """The whole sequence through the model for each new id."""
    generator, idx = torch.Generator().manual_seed(seed), torch.tensor([ids])
    for _ in range(max_tokens):
        idx = torch.cat([idx, sample(model(idx)[:, -1], generator, temperature, top_k)], dim=1)
    return idx[0, len(ids) :].tolist()


@pytest.mark.parametrize(
    ("variant", "kv_heads"), [*((n, 4) for n in VARIANTS_AND_FEATURES), ("untied", 1), ("tied", 2), ("modern", 2)]
)
def test_cached_generation_matches_uncached(variant, kv_heads):
    """Greedy and drawn, past the training context. Red when the cached step takes the rotation of position 0."""
    model = build(n_kv_head=kv_heads, **VARIANTS_AND_FEATURES[variant])
    for how in (dict(temperature=0.0), dict(temperature=0.8, top_k=7, seed=5), dict(temperature=1.3, seed=6)):
        plain = uncached(model, PROMPT, 16, **how)
        assert generate(model, PROMPT, 16, **how) == [plain], how
    assert len(set(plain)) > 3  # a constant answer would prove nothing


@pytest.mark.parametrize("features", [{}, MODERN])
def test_prefill_in_chunks_gives_the_same_logits(features):
    """A prompt in one piece, or 4 + 1 + 6 tokens behind a growing cache: the same logits.

    Red when the smear gate forgets the last token of the piece before.
    """
    model, ids = build(n_kv_head=2, **features), random_ids(2, 11)
    with torch.inference_mode():
        cache = model.new_cache(2, 11)
        pieces = [model(part, kv_cache=cache) for part in ids.split([4, 1, 6], dim=1)]
        torch.testing.assert_close(torch.cat(pieces, dim=1), model(ids), rtol=1e-5, atol=1e-5)
        assert cache.position == 11
        with pytest.raises(AssertionError, match="full"):
            model(ids[:, :1], kv_cache=cache)


@settings(max_examples=40)
@given(
    variant=st.sampled_from(sorted(VARIANTS)),
    features=st.sets(st.sampled_from(sorted(FEATURES))),
    layers=st.integers(1, 4),
    kv_heads=st.sampled_from([1, 2, 4]),
    pattern=st.text("SL", min_size=1, max_size=3),
    window=st.integers(1, 12),
    pieces=st.lists(st.integers(1, 7), min_size=1, max_size=4),
)
def test_any_combination_of_features_prefilled_in_chunks(variant, features, layers, kv_heads, pattern, window, pieces):
    """Every feature with every other, windows shorter and longer than a piece: cached logits are those of one forward.

    Red when a window is cut from the end of the cache without the new tokens (`[:, -window:]`), or by one token wrong.
    """
    changes = {k: v for name in features for k, v in FEATURES[name].items()}
    model = build(
        n_layer=layers,
        n_kv_head=kv_heads,
        **{**VARIANTS[variant], **changes},
        **({"window_pattern": pattern, "short_window": window} if "windows" not in features else {}),
    )
    ids = random_ids(2, sum(pieces))
    with torch.inference_mode():
        cache = model.new_cache(2, sum(pieces))
        logits = torch.cat([model(part, kv_cache=cache) for part in ids.split(pieces, dim=1)], dim=1)
        torch.testing.assert_close(logits, model(ids), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("features", [dict(document_start=9), MODERN])
def test_a_document_knows_nothing_of_the_one_before(features):
    """Uncached and cached, its logits are those that it has alone; without the field they are not.

    Red when smear() or bigrams() look across the border, or the cache's `begun` stays at 0.
    """
    model, ids = build(**features), random_ids(2, 14)
    ids[:, 8:] = torch.where(ids[:, 8:] == 9, 10, ids[:, 8:])
    ids[:, 8] = 9
    other = build(**{**features, "document_start": None})
    with torch.inference_mode():
        alone = model(ids[:, 8:])
        torch.testing.assert_close(model(ids)[:, 8:], alone, rtol=1e-4, atol=1e-4)
        assert (other(ids)[:, 8:] - other(ids[:, 8:])).abs().amax(dim=(0, 2)).min() > 1e-2
        cache = model.new_cache(2, 14)
        pieces = [model(part, kv_cache=cache) for part in ids.split([10, 1, 3], dim=1)]
        torch.testing.assert_close(torch.cat(pieces, dim=1)[:, 8:], alone, rtol=1e-4, atol=1e-4)


def test_a_repeated_cache_continues_every_row():
    """Red when the smeared embedding of the prompt's last token is not repeated, or where its document begins."""
    model, ids = build(**MODERN), random_ids(3, 9)
    ids[:, :5] = ids[0, :5]
    ids[:, 2] = MODERN["document_start"]
    with torch.inference_mode():
        cache = model.new_cache(1, 9)
        model(ids[:1, :5], kv_cache=cache)
        torch.testing.assert_close(
            model(ids[:, 5:], kv_cache=cache.repeated(3)), model(ids)[:, 5:], rtol=1e-5, atol=1e-5
        )


def test_several_samples_differ_and_are_repeatable():
    model = build()
    samples = generate(model, PROMPT, 12, num_samples=5, seed=3)
    assert len({tuple(s) for s in samples}) == 5
    assert samples == generate(model, PROMPT, 12, num_samples=5, seed=3)
    assert samples != generate(model, PROMPT, 12, num_samples=5, seed=4)
    greedy = generate(model, PROMPT, 12, num_samples=3, temperature=0)
    assert greedy == [greedy[0]] * 3


def test_stop_ends_each_sample_and_is_not_returned():
    """Red when `running` is forgotten: a stopped row would go on after its stop token."""
    model = build()
    free = generate(model, PROMPT, 30, num_samples=4, seed=3)
    stop = free[0][10]
    stopped = generate(model, PROMPT, 30, num_samples=4, seed=3, stop=(stop,))
    assert stopped == [row[: row.index(stop)] if stop in row else row for row in free]
    assert generate(model, PROMPT, 30, temperature=0, stop=tuple(range(50))) == [[]]
    assert generate(model, PROMPT, 0) == [[]]


def test_sampling_follows_the_distribution_within_top_k():
    """20,000 draws of three logits against their softmax; top_k keeps the two best alone."""
    logits = torch.tensor([[1.0, 3.0, 2.0]]).repeat(20_000, 1)
    generator = torch.Generator().manual_seed(0)
    drawn = sample(logits, generator, 0.5, None)[:, 0].bincount(minlength=3) / 20_000
    torch.testing.assert_close(drawn, (logits[0] / 0.5).softmax(-1), rtol=0, atol=0.01)
    best = sample(logits, generator, 1.0, 2)[:, 0].bincount(minlength=3) / 20_000
    torch.testing.assert_close(best, torch.tensor([0.0, 0.731, 0.269]), rtol=0, atol=0.01)
    assert sample(logits[:1], generator, 1.0, 99).shape == (1, 1)


@pytest.mark.parametrize("how", [dict(temperature=0.0), dict(temperature=0.8, top_k=7), dict(temperature=1.0)])
@pytest.mark.parametrize(("name", "value"), [("lm_head.weight", float("nan")), ("transformer.wte.weight", -math.inf)])
def test_a_model_that_is_not_finite_generates_nothing(name, value, how):
    """One bad value is named; red when decode() draws without looking at the logits (RuntimeError, or "!!!!")."""
    model = build()
    with torch.no_grad():
        model.get_parameter(name)[PROMPT[-1], 3] = value
    with pytest.raises(UserError, match=rf"1 tensors are not finite, {name} the first \(1 of its"):
        generate(model, PROMPT, 4, **how)


def test_a_tiny_temperature_is_greedy():
    """Red when the logits are divided before their maximum is taken off: infinity, and NaN probabilities."""
    model = build()
    assert generate(model, PROMPT, 6, temperature=1e-40) == generate(model, PROMPT, 6, temperature=0.0)
