"""Distances between sounds of any kind: pairs after a codec, and sets of sounds."""

from collections.abc import Iterable, Sequence

import numpy as np

from nanochat.audio.adherence import RATE, SILENCE, WINDOW, hear, import_librosa, shrink_covariance, to_decibel, to_mono


def tabulate_distances(pairs: Iterable[tuple[np.ndarray, np.ndarray]], sample_rate: int) -> dict:
    """Means over (reference [samples], other [samples]) pairs at one sample rate, cut to the shorter one's length.

    n, silent (references without a sound, skipped), stft_convergence, log_mel_l1, si_sdr (dB; means something only for
    codecs that keep the waveform: after Griffin-Lim the phase is arbitrary), frechet_dsp. None where nothing is left.
    """
    kept, silent = [], 0
    for pair in pairs:
        length = min(len(wav) for wav in pair)
        reference, other = (to_mono(wav[:length], sample_rate) for wav in pair)
        if np.abs(reference).max() > 10 ** (SILENCE / 20):
            kept.append((reference, other))
        else:
            silent += 1
    row: dict = {"n": len(kept), "silent": silent}
    for distance in (stft_convergence, log_mel_l1, si_sdr):
        row[distance.__name__] = float(np.mean([distance(*pair) for pair in kept])) if kept else None
    row["frechet_dsp"] = frechet_dsp([reference for reference, _ in kept], [other for _, other in kept], RATE)
    return row


def stft_convergence(reference: np.ndarray, other: np.ndarray) -> float:
    """||A - B|| / ||A|| of the magnitudes, a mean over windows of 2048 to 256 samples; 0 is equal (1910.11480)."""
    stft, total = import_librosa().stft, 0.0
    for window in (2048, 1024, 512, 256):
        a, b = (np.abs(stft(wav, n_fft=window)) for wav in (reference, other))
        total += np.linalg.norm(a - b) / np.linalg.norm(a)
    return total / 4


def log_mel_l1(reference: np.ndarray, other: np.ndarray) -> float:
    """Mean distance in nats between the logarithms of 80 mel bands' magnitudes at RATE, 1e-3 and up."""
    mel = import_librosa().feature.melspectrogram
    a, b = (mel(y=wav, sr=RATE, n_fft=1024, hop_length=256, n_mels=80, power=1) for wav in (reference, other))
    return float(np.abs(np.log(np.maximum(a, 1e-3)) - np.log(np.maximum(b, 1e-3))).mean())


def si_sdr(reference: np.ndarray, other: np.ndarray) -> float:
    """Signal to distortion in dB when the best scale of the reference is free (1811.02508); within -100..100."""
    reference, other = reference - reference.mean(), other - other.mean()
    target = reference * (reference @ other / (reference @ reference))
    signal, noise = float(target @ target), float(np.square(other - target).sum())
    return float(10 * np.log10(max(signal, 1e-10 * noise, 1e-30) / max(noise, 1e-10 * signal, 1e-30)))


def frechet_dsp(sounds: Sequence[np.ndarray], others: Sequence[np.ndarray], sample_rate: int) -> float | None:
    """Frechet distance between Gaussians of fixed features of two sets of sounds; None with fewer than two in a set.

    Features [45]: mean and deviation of 16 log-mel bands, mean chroma, onsets a second; in deviations of the first
    set. They are computed, not learnt, so figures compare with each other and with no published one.
    """
    if min(len(sounds), len(others)) < 2:
        return None
    first, second = (np.array([dsp_features(wav, sample_rate) for wav in wavs]) for wavs in (sounds, others))
    scale = first.std(0) + 1e-3
    moments = ((rows.mean(0), shrink_covariance(np.cov(rows.T))) for rows in (first / scale, second / scale))
    return frechet(*next(moments), *next(moments))


def dsp_features(wav: np.ndarray, sample_rate: int) -> np.ndarray:
    """The features [45] of one sound [samples]; see frechet_dsp."""
    librosa = import_librosa()
    wav = to_mono(wav, sample_rate)
    mel = to_decibel(librosa.feature.melspectrogram(y=wav, sr=RATE, n_fft=1024, hop_length=256, n_mels=16) + 1e-6)
    chroma = librosa.feature.chroma_stft(y=wav, sr=RATE, n_fft=WINDOW, hop_length=512, tuning=0).mean(1)
    return np.array([*mel.mean(1), *mel.std(1), *chroma, hear(wav, RATE).onsets.size * RATE / wav.size])


def frechet(mean: np.ndarray, covariance: np.ndarray, other_mean: np.ndarray, other_covariance: np.ndarray) -> float:
    """|m - m'|^2 + tr(C + C' - 2 (C C')^(1/2)) of two Gaussians with means [F] and covariances [F, F]."""
    values, vectors = np.linalg.eigh(covariance)
    root = vectors * np.sqrt(values.clip(min=0)) @ vectors.T
    middle = np.sqrt(np.linalg.eigvalsh(root @ other_covariance @ root).clip(min=0)).sum()  # the trace of the root
    squared = np.square(mean - other_mean).sum() + np.trace(covariance) + np.trace(other_covariance) - 2 * middle
    return max(0.0, float(squared))
