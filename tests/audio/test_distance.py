import numpy as np
import pytest
from scipy.linalg import sqrtm

from nanochat.audio import synth as synth_audio
from nanochat.audio.distance import frechet, frechet_dsp, log_mel_l1, si_sdr, stft_convergence, tabulate_distances

RATE = 16000
RNG = np.random.default_rng(0)
NOISE, OTHER_NOISE = RNG.normal(size=(2, RATE)).astype(np.float32) * 0.1


def test_si_sdr_is_the_ratio_of_powers_and_ignores_the_scale():
    """Red when target is the reference itself."""
    other_noise = OTHER_NOISE - NOISE * (OTHER_NOISE @ NOISE / (NOISE @ NOISE))
    for decibel in (-5, 10, 30):
        mixed = NOISE + other_noise * 10 ** (-decibel / 20) * np.linalg.norm(NOISE) / np.linalg.norm(other_noise)
        for scale in (1, 0.01, -3):
            assert si_sdr(NOISE, scale * mixed) == pytest.approx(decibel, abs=0.1)
    assert si_sdr(NOISE, NOISE) == pytest.approx(100, abs=0.1)
    assert si_sdr(NOISE, np.zeros_like(NOISE)) <= 0


def test_spectral_distances_of_known_changes():
    """Red when stft_convergence divides by the other, or log_mel_l1 takes log10."""
    assert stft_convergence(NOISE, NOISE) == 0
    assert log_mel_l1(NOISE, NOISE) == 0
    assert stft_convergence(NOISE, -NOISE) == 0  # magnitudes alone count
    assert stft_convergence(NOISE, np.zeros_like(NOISE)) == pytest.approx(1)
    assert stft_convergence(NOISE, 3 * NOISE) == pytest.approx(2, rel=1e-4)
    assert log_mel_l1(NOISE, np.e * NOISE) == pytest.approx(1, abs=1e-3)


def test_the_frechet_distance_is_that_of_the_matrix_root():
    """Red when `middle` counts once instead of twice."""
    means, factors = RNG.normal(size=(2, 6)), RNG.normal(size=(2, 6, 6))
    a, b = (factor @ factor.T for factor in factors)
    expected = np.sum((means[0] - means[1]) ** 2) + np.trace(a + b - 2 * sqrtm(a @ b).real)
    assert frechet(means[0], a, means[1], b) == pytest.approx(expected, rel=1e-6)
    assert frechet(means[0], a, means[0], a) == pytest.approx(0, abs=1e-6)


def test_frechet_dsp_tells_sets_of_other_sounds_apart():
    """Red when scale is 0 * first.std(0) + 1, or both moments come from the first set."""
    clips = [synth_audio.clip(index) for index in range(40)]
    plucked = [clip.wav for clip in clips if clip.attributes["instrument"] == "pluck"]
    organ = [clip.wav for clip in clips if clip.attributes["instrument"] == "organ"]
    same = frechet_dsp(plucked[::2], plucked[1::2], RATE)
    assert frechet_dsp(plucked, organ, RATE) > 2 * same > 0
    assert frechet_dsp(plucked, plucked, RATE) == pytest.approx(0, abs=1e-6)
    assert frechet_dsp(plucked[:1], organ, RATE) is None
    silent = [np.zeros(RATE), np.zeros(100)]
    assert np.isfinite(frechet_dsp(silent, organ, RATE))
    assert np.isfinite(frechet_dsp(organ, silent, RATE))


def test_the_table_takes_means_over_sounds_that_are_there():
    """Red when silent references are kept: their convergence is no number."""
    pairs = [
        (NOISE, 3 * NOISE[:-100]),
        (np.zeros(RATE), NOISE),
        (np.full(RATE, 0.5), NOISE),
        (OTHER_NOISE, OTHER_NOISE),
    ]
    row = tabulate_distances(pairs, RATE)
    assert row["n"] == 2
    assert row["silent"] == 2
    assert row["stft_convergence"] == pytest.approx(1, rel=1e-4)
    assert row["si_sdr"] == pytest.approx(100, abs=0.1)
    assert row["frechet_dsp"] > 0
    assert tabulate_distances([], RATE)["log_mel_l1"] is None
