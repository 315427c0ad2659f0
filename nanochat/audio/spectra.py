"""Sounds as rows of numbers, 50 a second, and back: spectra with guessed phases, and the MDCT.

B sounds, N samples, T = ceil(N / HOP) frames (at least one), each centred on its hop of 20 ms at 16 kHz. All sounds of
a batch are computed alike, so a sound's frames do not depend on its neighbours. Everything is float32 on the CPU.
"""

import math

import torch

SAMPLE_RATE = 16000
HOP = 320  # samples from frame to frame
WINDOW = 2048  # samples; 128 ms tell two low semitones apart
FLOOR = 5e-4  # amplitude (1.0 is full scale) under which log spectra are flat: quiet noise should not cost codes


def frames(wavs: torch.Tensor, window: int) -> torch.Tensor:
    """[B, N] -> [B, T, window]: samples around the middle of each hop, zeros beyond the ends."""
    count = max(1, math.ceil(wavs.shape[1] / HOP))
    margin = (window - HOP) // 2
    padded = torch.nn.functional.pad(wavs, (margin, margin + count * HOP - wavs.shape[1]))
    return padded.unfold(1, window, HOP)


def overlap_add(rows: torch.Tensor) -> torch.Tensor:
    """[B, T, window] -> [B, T * HOP]: the sum of the frames, each where frames() took it from."""
    batch, count, window = rows.shape
    hops = math.ceil(window / HOP)
    total = rows.new_zeros(batch, count + hops - 1, HOP)
    for hop in range(hops):
        part = rows[:, :, hop * HOP : (hop + 1) * HOP]
        total[:, hop : hop + count, : part.shape[2]] += part
    return total.flatten(1)[:, (window - HOP) // 2 :][:, : count * HOP]


def log_spectra(wavs: torch.Tensor) -> torch.Tensor:
    """[B, N] -> [B, T, WINDOW // 2 + 1]: log amplitude of each frequency; a full-scale sine has 0 at its peak."""
    window = torch.hann_window(WINDOW)
    spectra = torch.fft.rfft(frames(wavs, WINDOW) * window)
    return torch.log(spectra.abs() * (2 / window.sum()) + FLOOR)


def from_log_spectra(logs: torch.Tensor, iterations: int = 32, momentum: float = 0.99) -> torch.Tensor:
    """The inverse of log_spectra, [B, T * HOP]: phases by fast Griffin-Lim (Perraudin et al. 2013), the same each time.

    A frame of -inf is silent.
    """
    window = torch.hann_window(WINDOW)
    amplitude = ((logs.exp() - FLOOR).clamp(min=0) * (window.sum() / 2))[..., None]
    angles = torch.rand(logs.shape[1:], generator=torch.Generator().manual_seed(0)) * (2 * math.pi)
    phases = torch.polar(torch.ones_like(angles), angles)[None]  # drawn row by row: a longer sound begins alike
    weight = overlap_add((window * window).expand(1, logs.shape[1], WINDOW))
    before = 0.0
    for step in range(iterations + 1):
        spectra = torch.view_as_complex(torch.view_as_real(phases) * amplitude)  # twice as fast as complex times real
        wavs = overlap_add(torch.fft.irfft(spectra, WINDOW) * window) / weight
        if step == iterations:
            return wavs
        rebuilt = torch.fft.rfft(frames(wavs, WINDOW) * window)
        phases = torch.sub(rebuilt, before, alpha=momentum / (1 + momentum)).sgn()
        before = rebuilt


def _mdct_basis() -> torch.Tensor:
    """[2 * HOP, HOP]: cosines under a sine window, scaled so that the transform is its own inverse."""
    time = torch.arange(2 * HOP, dtype=torch.float64)[:, None] + 0.5
    frequency = torch.arange(HOP, dtype=torch.float64) + 0.5
    cosines = torch.cos(math.pi / HOP * (time + HOP / 2) * frequency) * math.sqrt(2 / HOP)
    return (cosines * torch.sin(math.pi / (2 * HOP) * time)).float()


def mdct(wavs: torch.Tensor) -> torch.Tensor:
    """[B, N] -> [B, T, HOP]: the modified discrete cosine transform, frames of two hops under a sine window."""
    return frames(wavs, 2 * HOP) @ _mdct_basis()


def from_mdct(rows: torch.Tensor) -> torch.Tensor:
    """The inverse of mdct, [B, T * HOP]; exact, and with all T * HOP samples."""
    wavs = overlap_add(rows @ _mdct_basis().T)
    # Half a hop at either end lies under one frame alone, times its window squared: nothing sounded beyond the end, so
    # there is no alias to cancel and dividing is enough.
    window = torch.sin(math.pi / (2 * HOP) * (torch.arange(HOP // 2) + HOP // 2 + 0.5)) ** 2
    wavs[:, : HOP // 2] /= window
    wavs[:, -(HOP // 2) :] /= window.flip(0)
    return wavs
