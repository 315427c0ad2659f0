"""Schedules and horizons: values by hand, properties over random settings."""

import itertools
import math

import hypothesis.strategies as st
import pytest
from hypothesis import given

from nanochat.config.settings import Settings
from nanochat.training.schedule import clip_scale, is_due, lr_multiplier, muon_momentum, num_iterations, weight_decay


def test_the_shape_by_hand():
    """10 steps, 2 of warmup, 4 of warmdown to a tenth. Red when warmup starts at 0 or warmdown is one step late."""
    settings = Settings(warmup_steps=2, warmdown_ratio=0.4, final_lr_frac=0.1)
    rates = [lr_multiplier(settings, step, 10) for step in range(10)]
    assert rates == pytest.approx([0.5, 1, 1, 1, 1, 1, 1, 0.775, 0.55, 0.325])
    assert [lr_multiplier(Settings(warmdown_ratio=0.0), step, 5) for step in range(5)] == [1.0] * 5


@given(steps=st.integers(1, 300), warmup=st.integers(0, 400), ratio=st.floats(0, 1), final=st.floats(0, 1))
def test_rates_are_bounded_continuous_and_end_low(steps, warmup, ratio, final):
    """Also where warmup and warmdown overlap. Red when the two meet with a jump."""
    settings = Settings(warmup_steps=warmup, warmdown_ratio=ratio, final_lr_frac=final)
    rates = [lr_multiplier(settings, step, steps) for step in range(steps)]
    warmdown = round(ratio * steps)
    assert all(0 < rate <= 1 for rate in rates)
    largest = max(1 / max(1, warmup), (1 - final) / max(1, warmdown))
    assert all(abs(a - b) <= largest + 1e-12 for a, b in itertools.pairwise(rates))
    assert warmup > 0 or rates[0] == 1
    assert rates[-1] <= final + (1 - final) / max(1, warmdown) + 1e-12


def test_momentum_and_decay():
    assert [muon_momentum(step) for step in (0, 150, 300, 10_000)] == pytest.approx([0.85, 0.9, 0.95, 0.95])
    settings = Settings(weight_decay=0.2)
    assert [weight_decay(settings, step, 4) for step in range(5)] == pytest.approx([0.2, 0.15, 0.1, 0.05, 0.0])


def test_horizons_by_precedence():
    """1000 matmul parameters, 9000 FLOPs a token, 100 tokens a step. Red when the ratio wins over the FLOPs."""
    settings = dict(max_seq_len=10, total_batch_size=100)
    both = dict(settings, target_flops=9e6, target_param_data_ratio=20.0)
    assert num_iterations(Settings(**both, num_iterations=7), 1000, 9000) == 7
    assert num_iterations(Settings(**both), 1000, 9000) == 10
    assert num_iterations(Settings(**settings, target_param_data_ratio=20.0), 1000, 9000) == 200
    assert num_iterations(Settings(**settings, target_flops=1.0), 1000, 9000) == 1


def test_cadences():
    assert [step for step in range(10) if is_due(3, step)] == [3, 6, 9]
    assert not any(is_due(None, step) for step in range(10))


@given(st.floats(0, 1e30) | st.sampled_from([math.inf, math.nan]), st.none() | st.floats(1e-6, 1e6))
def test_clipping_brings_every_finite_norm_within_the_limit(norm, limit):
    scale = clip_scale(norm, limit)
    assert 0 < scale <= 1
    if limit is not None and math.isfinite(norm):
        assert norm * scale <= limit * (1 + 1e-12)
        assert scale == 1 or norm > limit
    else:
        assert scale == 1
