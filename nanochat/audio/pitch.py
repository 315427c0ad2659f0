"""Pitch apart from timbre: which note a frame has, and how loud each of its harmonics is, whatever the note.

Legend: B sounds, T frames, S pitches, A bands. A band is a range of harmonic numbers, so the row of a note on an
instrument is that of any other note on it. A frame without pitch is measured in the bands of REFERENCE and sounds as
noise.
"""

import math
from functools import cache

import torch

from nanochat.audio.spectra import HOP, SAMPLE_RATE, frames, overlap_add

WINDOW = 1024  # samples: 64 ms hold three periods of the lowest pitch
OCTAVES = 5
LOWEST = 55.0  # Hz: an A, so that every tempered note is the very middle of a pitch
REFERENCE = 62.5  # Hz
EDGES = (*(h + 0.5 for h in range(17)), 19.5, 22.5, 26.5, 30.5, 35.5, 41.5, 48.5, 56.5, 66.5, 77.5, 90.5, 108.5, 128.5)
SILENT = 1e-4  # amplitude (full scale is 1): frames below have no pitch and no timbre
RELATIVE_FLOOR = 0.05  # of the frame's level: weaker harmonics count as absent
LEVEL_WEIGHT = 2.0  # of the loudness among the bands

UNVOICED, JUMP, STEP, OCTAVE_UP = 0.35, 0.35, 0.1, 0.02  # costs of the pitch track, in units of YIN's difference


def pitches(bins: int) -> torch.Tensor:
    """[OCTAVES * bins] Hz: the pitches that codes 1, 2, ... stand for, `bins` to the octave."""
    return LOWEST * 2.0 ** (torch.arange(OCTAVES * bins) / bins)


def track_pitch(wavs: torch.Tensor, bins: int) -> torch.Tensor:
    """[B, N] -> int64 [B, T]: the pitch of each frame, 1 .. S, or 0 without one.

    YIN's normalised difference (de Cheveigne and Kawahara 2002) says how well each pitch explains each frame; the
    cheapest path through the frames wins, where changing costs. Quiet frames hardly count, so they keep their pitch.
    """
    rows = frames(wavs, WINDOW)
    spectra = torch.fft.rfft(rows, 2 * WINDOW)
    whole, lags, cosines = _lags(bins)
    matches = (spectra.real.square() + spectra.imag.square()) @ cosines
    energy = torch.nn.functional.pad(rows.square().cumsum(2), (1, 0))
    total = energy[..., -1:]
    at = torch.cat([whole, lags])
    both = _interpolate(energy, WINDOW - at) + total - _interpolate(energy, at)  # of the two overlapping parts
    difference = (1 - 2 * matches / (both + 1e-9)).clamp(min=0)
    mean = difference[..., : len(whole)].cumsum(2) / whole
    cost = difference[..., len(whole) :] / (_interpolate(torch.nn.functional.pad(mean, (1, 0)), lags) + 1e-9)
    cost = cost.clamp(max=1.0) + OCTAVE_UP * torch.log2(lags)
    cost = torch.cat([torch.full_like(total, UNVOICED + OCTAVE_UP * math.log2(lags.mean())), cost], 2)
    level = total / WINDOW
    trust = level / (level + 1e-2 * level.amax(1, keepdim=True) + SILENT**2)
    best = _find_cheapest_path(cost * trust)
    return best.masked_fill(level[..., 0] < SILENT**2 / 2, 0)


@cache
def _lags(bins: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """All whole lags in samples, the lag of each pitch, and the cosines that make a power spectrum the autocorrelation
    at these lags, also between samples."""
    whole = torch.arange(1.0, math.ceil(SAMPLE_RATE / LOWEST) + 1)
    lags = SAMPLE_RATE / pitches(bins)
    weight = torch.full((WINDOW + 1, 1), 2.0)
    weight[[0, -1]] = 1.0
    angles = torch.arange(WINDOW + 1)[:, None] * torch.cat([whole, lags]) * (math.pi / WINDOW)
    return whole, lags, weight * torch.cos(angles) / (2 * WINDOW)


def _interpolate(values: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """values [..., n] at fractional places [m], linearly interpolated: [..., m]."""
    low = places.floor().long().clamp(max=values.shape[-1] - 2)
    return torch.lerp(values.index_select(-1, low), values.index_select(-1, low + 1), places - low)


def _find_cheapest_path(cost: torch.Tensor) -> torch.Tensor:
    """cost [B, T, 1 + S] of each state -> states [B, T] of the cheapest path; a change costs JUMP, to the next STEP."""
    batch, count, states = cost.shape
    here = torch.arange(states).expand(batch, -1)
    far = torch.full((batch, 1), math.inf)
    total, came = cost[:, 0], []
    for t in range(1, count):
        lowest = total.min(1, keepdim=True)
        up = torch.cat([far, far, total[:, 1:-1] + STEP], 1)  # from the state below; 0, no pitch, has no neighbours
        down = torch.cat([far, total[:, 2:] + STEP, far], 1)
        total, choice = torch.stack([total, up, down, (lowest.values + JUMP).expand(-1, states)]).min(0)
        came.append(
            torch.stack([here, here - 1, here + 1, lowest.indices.expand(-1, states)]).gather(0, choice[None])[0]
        )
        total = total + cost[:, t]
    path = [total.argmin(1)]
    for back in reversed(came):
        path.append(back.gather(1, path[-1][:, None])[:, 0])
    return torch.stack(path[::-1], 1)


def measure_harmonics(wavs: torch.Tensor, states: torch.Tensor, bins: int) -> tuple[torch.Tensor, torch.Tensor]:
    """[B, N], [B, T] of track_pitch() -> rows [B, T, 1 + A] and which of their entries lie below the Nyquist frequency.

    An entry is a log amplitude: first the frame's level, then each band relative to it.
    """
    window = torch.hann_window(WINDOW)
    spectra = torch.fft.rfft(frames(wavs, WINDOW) * window)
    power = spectra.real.square() + spectra.imag.square()
    sums = torch.nn.functional.pad(power.cumsum(2), (1, 0)) * (2 / (WINDOW * window.square().sum()))
    edges = _base_frequency(states, bins)[..., None] * torch.tensor(EDGES)
    places = (edges * (WINDOW / SAMPLE_RATE) + 0.5).clamp(max=sums.shape[-1] - 1)
    low = places.long().clamp(max=sums.shape[-1] - 2)
    inside = torch.lerp(sums.gather(2, low), sums.gather(2, low + 1), places - low)
    visible = edges[..., 1:] <= SAMPLE_RATE / 2
    amplitude = (2 * inside.diff(dim=2).clamp(min=0)).sqrt() * visible
    level = amplitude.square().sum(2, keepdim=True).sqrt()
    shape = torch.log(amplitude / (level + SILENT) + RELATIVE_FLOOR)
    rows = torch.cat([LEVEL_WEIGHT * torch.log(level + SILENT), shape], 2)
    return rows, torch.cat([torch.ones_like(level, dtype=torch.bool), visible], 2)


def _base_frequency(states: torch.Tensor, bins: int) -> torch.Tensor:
    """Hz of each state; REFERENCE for state 0."""
    return torch.cat([torch.tensor([REFERENCE]), pitches(bins)])[states]


def synthesize(states: torch.Tensor, rows: torch.Tensor, bins: int) -> torch.Tensor:
    """The inverse of track_pitch() and measure_harmonics(): [B, T], [B, T, 1 + A] -> [B, T * HOP].

    Each frame sounds with steady harmonics, or as noise, under a window of two hops; phases continue across frames.
    """
    level = (torch.exp(rows[..., :1] / LEVEL_WEIGHT) - SILENT).clamp(min=0)
    shape = (torch.exp(rows[..., 1:]) - RELATIVE_FLOOR).clamp(min=0)
    base = _base_frequency(states, bins)
    edges = torch.tensor(EDGES)
    amplitude = shape / (shape.square().sum(2, keepdim=True).sqrt() + 1e-9) * level
    voiced = states > 0
    # harmonics
    step = 2 * math.pi / SAMPLE_RATE * base.double()
    middle = torch.cumsum((step + torch.nn.functional.pad(step[:, :-1], (1, 0))) / 2 * HOP, 1) % (2 * math.pi)
    time = torch.arange(2 * HOP) + 0.5 - HOP
    phase = middle.float()[..., None] + step.float()[..., None] * time
    twice, before, now = 2 * torch.cos(phase), torch.zeros_like(phase), torch.sin(phase)
    total = torch.zeros_like(phase)
    for band in range(len(EDGES) - 1):
        numbers = range(math.ceil(EDGES[band]), math.ceil(EDGES[band + 1]))
        share = amplitude[..., band] * voiced / math.sqrt(len(numbers))
        for number in numbers:
            if not (audible := number * base < SAMPLE_RATE / 2).any():
                break
            total.addcmul_(now, (share * audible)[..., None])
            before, now = now, before.neg_().addcmul_(twice, now)
    # noise
    if not voiced.all():
        white = torch.randn(states.shape[1], 2 * HOP, generator=torch.Generator().manual_seed(0))
        band = torch.bucketize(torch.arange(HOP + 1) * (SAMPLE_RATE / (2 * HOP)) / REFERENCE, edges) - 1
        within = (band >= 0) & (band < len(EDGES) - 1)
        band = band.clamp(0, len(EDGES) - 2)
        counts = torch.bincount(band[within], minlength=len(EDGES) - 1).clamp(min=1)
        gain = (amplitude / math.sqrt(2) * (HOP / counts).sqrt())[..., band] * within
        total += torch.fft.irfft(torch.fft.rfft(white) * gain) * ~voiced[..., None]
    return overlap_add(total * torch.hann_window(2 * HOP))
