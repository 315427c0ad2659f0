"""What a sound plays, by signal processing, against what its caption asked for.

A melody's first pitch, tempo, contour and instrument are measured with librosa and without a line of the synthesiser
or of a codec; tables count the hits, with intervals, between the ceiling that a codec sets and the floor of chance.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from nanochat.system.environment import UserError

RATE = 16000  # Hz: every sound is measured at this rate
HOP = 160  # samples from frame to frame, 10 ms
WINDOW = 2048  # samples, 128 ms: two harmonics of the lowest note lie four bins apart
LOWEST, HIGHEST = 55.0, 1200.0  # Hz, fundamentals
SILENCE = -60.0  # dB of full scale: a sound that never gets above holds no note
HARMONICS = 8
CENTS = 50  # a pitch this near counts as hit
QUANTITIES = ("pitch", "tempo", "contour", "instrument")
ATTRIBUTES = {"pitch": "root", "tempo": "bpm", "contour": "contour", "instrument": "instrument"}
ROWS = ("codec", "generated", "shuffled")


def import_librosa():
    """librosa, imported. UserError without it."""
    try:
        import librosa
    except ImportError as error:
        way_out = "pip install -c constraints.txt -e '.[audio]'"
        raise UserError(f"measuring sounds needs librosa ({error}): {way_out}") from error
    return librosa


def to_mono(wav: np.ndarray, sample_rate: int) -> np.ndarray:
    """Any samples [samples] as float32 at RATE around 0, at least one window long; what is not a number becomes 0."""
    wav = np.asarray(wav)
    assert wav.ndim == 1, wav.shape
    wav = np.clip(np.nan_to_num(wav, posinf=0, neginf=0), -1e5, 1e5).astype(np.float32)
    wav -= wav.mean() if wav.size else 0
    if sample_rate != RATE and wav.size:
        wav = import_librosa().resample(wav, orig_sr=sample_rate, target_sr=RATE)
    return np.pad(wav, (0, max(0, WINDOW - wav.size)))


def to_decibel(power: np.ndarray) -> np.ndarray:
    return 10 * np.log10(np.maximum(power, 1e-12))


# ---------------------------------------------------------------------------------------------------------------------
# what is heard


@dataclass(frozen=True)
class Heard:
    """onsets: seconds [notes]. pitches: Hz of each note [notes], NaN where it has none. timbre: features [F] that do
    not depend on the pitch, None without a pitched note. seconds: length of the sound."""

    onsets: np.ndarray
    pitches: np.ndarray
    timbre: np.ndarray | None
    seconds: float

    @property
    def first_hz(self) -> float | None:
        """Fundamental of the first note in Hz; None without."""
        return float(self.pitches[0]) if self.pitches.size and np.isfinite(self.pitches[0]) else None

    @property
    def contour(self) -> str | None:
        """rising, falling or steady: the way of most pairs of notes, near and far; None with fewer than two pitches."""
        pitches = 12 * np.log2(self.pitches[np.isfinite(self.pitches)])  # semitones
        if pitches.size < 2:
            return None
        first, second = np.triu_indices(pitches.size, 1)
        steps = pitches[second] - pitches[first]
        tendency = np.mean(steps > 0.5) - np.mean(
            steps < -0.5
        )  # one wrong pitch, or a note split in two, moves it little
        return "rising" if tendency > 0.3 else "falling" if tendency < -0.3 else "steady"

    def tempo(self, classes: Iterable[float]) -> float | None:
        """The one of these tempi (beats a minute) whose beats lie nearest the onsets; None when none fits.

        Beats are counted from up to 0.1 s around the first onset, whose attack differs from the others' by its window.
        An onset matches a beat within an eighth of the period, at most 60 ms; the score is the F-measure of matches,
        above 0.7, so that a missed or an extra onset does not change the class and a doubled tempo is none.
        """
        if self.onsets.size < 2:
            return None
        scores = {}
        for bpm in classes:
            period = 60 / bpm
            beats = np.arange(self.onsets[0], self.seconds - 0.1, period)
            shifts = np.linspace(-0.1, 0.1, 21)[:, None, None]
            distances = np.abs(self.onsets[:, None] - beats - shifts).min(2)  # [shifts, onsets]
            matches = (distances < min(0.06, period / 8)).sum(1).max()
            scores[bpm] = 2 * matches / (self.onsets.size + beats.size)
        best = max(scores, key=scores.get)
        return best if scores[best] > 0.7 else None

    def instrument(self, references: "References") -> str | None:
        """Name of the reference timbre that is nearest; None without a pitched note."""
        if self.timbre is None:
            return None
        return references.instruments[int(np.argmax(references.weights @ self.timbre + references.offsets))]


def hear(wav: np.ndarray, sample_rate: int) -> Heard:
    """Notes of a mono sound [samples]. Any content is accepted: silence, noise and NaN are sounds without notes."""
    librosa = import_librosa()
    wav = to_mono(wav, sample_rate)
    power = np.abs(librosa.stft(wav, n_fft=WINDOW, hop_length=HOP)) ** 2  # [bins, frames]
    loudness = to_decibel(librosa.feature.rms(y=wav, frame_length=512, hop_length=HOP)[0] ** 2)  # [frames]
    seconds = wav.size / RATE
    if loudness.max() < SILENCE:
        return Heard(np.empty(0), np.empty(0), None, seconds)
    onsets = find_onsets(librosa, power, loudness)
    f0 = librosa.yin(wav, fmin=LOWEST, fmax=HIGHEST, sr=RATE, frame_length=1024, hop_length=HOP, trough_threshold=0.25)
    ends = [*onsets[1:], loudness.size]
    notes = [select_note_frames(loudness, start, end) for start, end in zip(onsets, ends, strict=True)]
    pitches = np.array([find_stable_pitch(f0[frames]) for frames in notes])
    pitched = [(frames, hz) for frames, hz in zip(notes, pitches, strict=True) if np.isfinite(hz)]
    timbre = np.median([measure_timbre(power, loudness, *note) for note in pitched], axis=0) if pitched else None
    return Heard(np.array(onsets) * HOP / RATE, pitches, timbre, seconds)


def find_onsets(librosa, power: np.ndarray, loudness: np.ndarray) -> list[int]:
    """Frames at which notes begin: the first loud one, and peaks of the share of the spectrum that is new.

    The share compares spectra 60 ms apart, as square roots of magnitudes down to 35 dB below the loudest, so that a
    decayed pluck's next note counts as much as the first and the noise of a codec does not.
    """
    lag = 6
    first = int(np.argmax(loudness > loudness.max() - 25))
    level = power**0.25
    level = np.maximum(level - 10 ** (-35 / 40) * level.max(), 0)
    total = level.sum(0)
    new = np.zeros_like(total)
    rise = np.maximum(level[:, lag:] - level[:, :-lag], 0).sum(0)
    new[lag // 2 : lag // 2 - lag] = rise / (0.5 * total.max() + total[lag:])
    peaks = librosa.util.peak_pick(new, pre_max=8, post_max=8, pre_avg=8, post_avg=8, delta=0.03, wait=12)
    # where a note is cut off its spectrum is new, too: an onset has sound after it
    later = [int(peak) for peak in peaks if first + 12 <= peak < loudness.size - 10]
    later = [peak for peak in later if loudness[peak + 8 : peak + 14].max() > loudness.max() - 25]
    least = max(0.13, 0.4 * new[later].max(initial=0))
    return [first, *(peak for peak in later if new[peak] > least)]


def select_note_frames(loudness: np.ndarray, start: int, end: int) -> np.ndarray:
    """Frames of one note that are loud and not at its edges, where the window also holds its neighbours."""
    edge = min(4, (end - start) // 4)
    frames = np.arange(start + edge, max(end - edge, start + edge + 1)).clip(max=loudness.size - 1)
    return frames[loudness[frames] > loudness[frames].max() - 20]


def find_stable_pitch(f0: np.ndarray) -> float:
    """Median of a note's fundamentals in Hz [frames]; NaN when most frames lie elsewhere, as those of noise do, or
    when it is the estimator's limit."""
    middle = float(np.median(f0))
    stable = np.mean(np.abs(1200 * np.log2(f0 / middle)) < CENTS) > 0.5
    return middle if stable and LOWEST < middle < HIGHEST else math.nan


def measure_timbre(power: np.ndarray, loudness: np.ndarray, frames: np.ndarray, hz: float) -> np.ndarray:
    """Of one note: its harmonics in dB below their sum, odd over even, centroid in harmonics, decay in dB a second."""
    spectrum = power[:, frames].mean(1)
    harmonics = np.zeros(HARMONICS)
    for index in range(HARMONICS):
        middle, half = (index + 1) * hz * WINDOW / RATE, max(2.0, 0.03 * (index + 1) * hz * WINDOW / RATE)
        harmonics[index] = spectrum[round(middle - half) : round(middle + half) + 1].sum()
    harmonics = np.maximum(harmonics / max(harmonics.sum(), 1e-12), 1e-4)
    odd_even = to_decibel(harmonics[::2].sum()) - to_decibel(harmonics[1::2].sum())
    centroid = harmonics @ np.arange(1, HARMONICS + 1)
    slope = np.polyfit(frames * HOP / RATE, loudness[frames], 1)[0] if frames.size > 4 else 0.0
    return np.array([*to_decibel(harmonics), odd_even, centroid, np.clip(slope, -60, 10)])


@dataclass(frozen=True)
class References:
    """What the judge knows of the captions' vocabulary: tempi in beats a minute, and a linear discriminant for timbres
    (weights [instruments, F], offsets [instruments]) with one covariance for all instruments, shrunk by a tenth."""

    tempi: tuple[float, ...]
    instruments: tuple[str, ...]
    weights: np.ndarray
    offsets: np.ndarray


def learn_references(sounds: Iterable[tuple[np.ndarray, int, Mapping]]) -> References:
    """From (wav [samples], sample rate, attributes) of sounds that are not judged: real clips through the codec.

    UserError when no sound has a note with a pitch.
    """
    tempi, names, timbres = set(), [], []
    for wav, sample_rate, attributes in sounds:
        tempi.add(attributes["bpm"])
        if (timbre := hear(wav, sample_rate).timbre) is not None:
            names.append(attributes["instrument"])
            timbres.append(timbre)
    if not names:
        raise UserError("no reference sound holds a note with a pitch: check the codec, or fit it on more sounds")
    features, instruments = np.array(timbres), tuple(sorted(set(names)))
    labels = np.array([instruments.index(name) for name in names])
    means = np.stack([features[labels == index].mean(0) for index in range(len(instruments))])
    spread = features - means[labels]
    covariance = shrink_covariance(spread.T @ spread / len(spread))
    weights = np.linalg.solve(covariance, means.T).T
    return References(tuple(sorted(tempi)), instruments, weights, -0.5 * (weights * means).sum(1))


def shrink_covariance(covariance: np.ndarray) -> np.ndarray:
    """A covariance [F, F] moved a tenth of the way to its diagonal: invertible with few samples."""
    return 0.9 * covariance + np.diag(0.1 * np.diag(covariance) + 1e-3)


# ---------------------------------------------------------------------------------------------------------------------
# what was asked for


def measure(wav: np.ndarray, sample_rate: int, references: References) -> dict:
    """f0 (Hz of the first note), bpm, contour and instrument of a sound [samples]; None for what it does not show."""
    heard = hear(wav, sample_rate)
    return {
        "f0": heard.first_hz,
        "bpm": heard.tempo(references.tempi),
        "contour": heard.contour,
        "instrument": heard.instrument(references),
    }


def compare_attributes(measured: Mapping, attributes: Mapping) -> dict[str, bool]:
    """Whether pitch (within 50 cents), tempo, contour and instrument are those of a clip's attributes."""
    f0 = measured["f0"]
    return {
        "pitch": f0 is not None and abs(1200 * math.log2(f0 / attributes["pitch_hz"])) <= CENTS,
        "tempo": measured["bpm"] == attributes["bpm"],
        "contour": measured["contour"] == attributes["contour"],
        "instrument": measured["instrument"] == attributes["instrument"],
    }


def tabulate_adherence(codec: Sequence[tuple], generated: Sequence[tuple], seed: int = 0) -> dict:
    """Shares of hits from (measured, attributes) pairs: {"seen": {row: {"n", quantity: {...}}}, "unseen": ...}.

    Rows: codec (real clips through the codec: the ceiling), generated, shuffled (the floor: each generated sound
    against the attributes of another clip of its split, drawn with the seed; they may be alike by chance), and chance
    (the share that the best constant guess would hit). A quantity has share, low, high (95%) and hits.
    """
    table = {}
    for split, unseen in (("seen", False), ("unseen", True)):
        real, made = ([pair for pair in pairs if bool(pair[1].get("unseen")) is unseen] for pairs in (codec, generated))
        others = derangement(len(made), seed)
        shuffled = [(made[index][0], made[other][1]) for index, other in enumerate(others)]
        table[split] = {row: hit_rates(pairs) for row, pairs in zip(ROWS, (real, made, shuffled), strict=True)}
        table[split]["chance"] = {
            quantity: max(Counter(attributes[key] for _, attributes in made).values()) / len(made) if made else None
            for quantity, key in ATTRIBUTES.items()
        }
        table[split]["above shuffled"] = hits_above_shuffled(made, shuffled)
    return table


def hits_above_shuffled(made: Sequence[tuple], shuffled: Sequence[tuple]) -> dict:
    """For each quantity how much more of the sounds hit their own caption than another's: mean and 95% interval.

    The difference of each sound is -1, 0 or 1; the interval is the normal one of their mean.
    """
    table = {}
    pairs = [(compare_attributes(*own), compare_attributes(*other)) for own, other in zip(made, shuffled, strict=True)]
    for quantity in QUANTITIES if len(pairs) > 1 else ():
        differences = np.array([float(own[quantity]) - float(other[quantity]) for own, other in pairs])
        mean, half = float(differences.mean()), float(1.96 * differences.std(ddof=1) / len(pairs) ** 0.5)
        table[quantity] = {"mean": mean, "low": mean - half, "high": mean + half}
    return table


def hit_rates(pairs: Sequence[tuple]) -> dict:
    """One row: n, and of each quantity the hits, their share (None of nothing) and its 95% interval."""
    counts = Counter(name for pair in pairs for name, hit in compare_attributes(*pair).items() if hit)
    row: dict = {"n": len(pairs)}
    for quantity in QUANTITIES:
        low, high = wilson(counts[quantity], len(pairs))
        share = counts[quantity] / len(pairs) if pairs else None
        row[quantity] = {"hits": counts[quantity], "share": share, "low": low, "high": high}
    return row


def derangement(n: int, seed: int) -> np.ndarray:
    """A random order of 0..n-1 in which nothing stays in place (one cycle through all); empty for n < 2."""
    cycle = np.random.default_rng(seed).permutation(n if n > 1 else 0)
    order = np.empty_like(cycle)
    order[cycle] = np.roll(cycle, 1)
    return order


def wilson(hits: int, n: int) -> tuple[float, float]:
    """The 95% Wilson score interval of a share; (0, 1) without a trial."""
    if n == 0:
        return 0.0, 1.0
    interval = stats.binomtest(hits, n).proportion_ci(0.95, method="wilson")
    return interval.low, interval.high


def format_adherence(table: dict) -> str:
    """The table for a terminal or a page: a block for each split that has generated clips."""
    names = {"codec": "codec (ceiling)", "generated": "generated", "shuffled": "shuffled (floor)"}
    blocks = []
    for split, rows in table.items():
        if rows["generated"]["n"] == 0:
            continue
        lines = [f"{split:<17}{'n':>5}  " + "".join(f"{quantity:<21}" for quantity in QUANTITIES)]
        for row, name in names.items():
            cells = [
                "-" if cell["share"] is None else f"{cell['share']:.2f} [{cell['low']:.2f}, {cell['high']:.2f}]"
                for cell in (rows[row][quantity] for quantity in QUANTITIES)
            ]
            lines.append(f"{name:<17}{rows[row]['n']:>5}  " + "".join(f"{cell:<21}" for cell in cells))
        chances = "".join(f"{rows['chance'][quantity]:<21.2f}" for quantity in QUANTITIES)
        lines.append(f"{'chance':<24}{chances}")
        gains = [
            f"{gain['mean']:.2f} [{gain['low']:.2f}, {gain['high']:.2f}]" for gain in rows["above shuffled"].values()
        ]
        if gains:
            lines.append(f"{'above shuffled':<24}" + "".join(f"{gain:<21}" for gain in gains))
        blocks.append("\n".join(line.rstrip() for line in lines))
    return "\n\n".join(blocks)
