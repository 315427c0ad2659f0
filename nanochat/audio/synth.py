"""Captioned melodies, computed: sounds to train on and to be measured against, without any download.

Clip i is a function of (seed, i) alone, so any part of the data can be made anywhere in any order. Every attribute is
in the caption in words and in `attributes`. About one (root, instrument) pair in seven is marked unseen: a split that
holds these out asks whether a model combines a pitch and an instrument that it never heard together. Of the other
pairs a tenth of the sounds is held out: there are some 2,000 at two seconds, so clips repeat them, and the split has to
go by the sound (`sound_key`), not by the clip's number.
"""

import hashlib
from dataclasses import dataclass

import numpy as np

SAMPLE_RATE = 16000
ROOTS = range(48, 72)  # MIDI numbers, C3 .. B4
SCALES = {"major": (0, 2, 4, 5, 7, 9, 11), "minor": (0, 2, 3, 5, 7, 8, 10)}  # semitones above the first degree
CONTOURS = {"rising": 1, "falling": -1, "steady": 0}  # degrees of the scale from note to note
TEMPI = (60, 90, 135, 200)  # beats a minute, far apart: 2, 3, 5 and 7 notes in two seconds

# harmonic -> (amplitude, decay per second). Harmonics alone, so that every note has one fundamental.
INSTRUMENTS = {
    "sine": {1: (1.0, 0.0)},
    "organ": {k: (a, 0.0) for k, a in enumerate((1.0, 0.8, 0.6, 0.4, 0.3, 0.2), 1)},
    "square": {k: (1 / k, 0.0) for k in range(1, 16, 2)},
    "pluck": {k: (k**-0.8, 2.0 + 1.2 * k) for k in range(1, 11)},
    "bell": {1: (1.0, 1.5), 4: (0.6, 3.0), 7: (0.4, 5.0), 10: (0.25, 8.0)},
}
NOTES = "C, C sharp, D, D sharp, E, F, F sharp, G, G sharp, A, A sharp, B".split(", ")
TEMPLATES = (
    "a {contour} {mode} melody on {instrument} starting on {root} at {bpm} bpm",
    "{instrument} plays a {mode} tune from {root}, {contour}, {bpm} bpm",
    "at {bpm} bpm, {root} first, then a {contour} line in {mode} on {instrument}",
    "{contour} {mode} notes, {instrument}, {root}, {bpm} bpm",
    "starting on {root}: {instrument}, {contour}, {mode}, at a tempo of {bpm} bpm",
)

ATTACK, RELEASE, GAP = 0.01, 0.03, 0.04  # seconds; the gap before the next note gives repeated notes their onsets
HIGHEST = 7600.0  # Hz: harmonics above are dropped, well before it could alias


@dataclass(frozen=True)
class Clip:
    """wav: float32 [samples] at 16 kHz, within -0.5 .. 0.5. attributes: root (MIDI number of the first note),
    pitch_hz (of the first note), mode, contour, bpm, instrument, unseen (whether its pair is held out)."""

    wav: np.ndarray
    caption: str
    attributes: dict


def note_name(number: int) -> str:
    """A MIDI number spelt out: 60 is "C 4", 61 "C sharp 4"."""
    return f"{NOTES[number % 12]} {number // 12 - 1}"


def frequency(number: int | np.ndarray) -> float | np.ndarray:
    """Hz of a MIDI number in equal temperament, A4 = 440."""
    return 440.0 * 2.0 ** ((number - 69) / 12)


def is_unseen(root: int, instrument: str) -> bool:
    """Whether the pair is held out: 3 or 4 of an instrument's 24 roots, and no root under two instruments."""
    return (root + 3 * list(INSTRUMENTS).index(instrument)) % 7 == 0


def sound_key(attributes: dict, seconds: float) -> str:
    """What is heard, as text: attributes with equal waveforms have equal keys.

    Steady notes are the same in major and minor, and so are the first two degrees going up; notes beyond the end of
    the clip, or so short that the gap swallows them, are not heard. Made of exact numbers, never of samples, whose last
    bits differ between machines: the split is the same everywhere.
    """
    beat, instrument = 60 / attributes["bpm"], attributes["instrument"]
    notes = []
    for place, number in enumerate(_note_numbers(attributes, seconds).tolist()):
        end = min((place + 1) * beat, seconds)
        if end - place * beat - GAP > 2 / SAMPLE_RATE:  # below that no sample lies between the envelope's two zeros
            notes.append(f"{number}@{place * beat:.4f}-{end:.4f}")
    return f"{instrument} {' '.join(notes)}"


def is_held_out(attributes: dict, seconds: float) -> bool:
    """Whether a clip is never trained on: all of an unseen pair, and a tenth of the sounds of the other pairs."""
    key = sound_key(attributes, seconds)
    return attributes["unseen"] or int(hashlib.sha256(f"synth {key}".encode()).hexdigest(), 16) % 10 == 0


def describe_clip(index: int, seed: int = 0) -> tuple[str, dict]:
    """Caption and attributes of clip `index`, without the cost of its sound; index and seed are not negative."""
    # Raw bits of a named generator: numpy promises these for ever, unlike the draws of its distributions.
    bits = iter(np.random.PCG64(np.random.SeedSequence([seed, index])).random_raw(6).tolist())

    def pick(choices):
        return list(choices)[next(bits) % len(choices)]

    root, mode, contour, bpm, instrument = map(pick, (ROOTS, SCALES, CONTOURS, TEMPI, INSTRUMENTS))
    words = {"root": note_name(root), "mode": mode, "contour": contour, "bpm": bpm, "instrument": instrument}
    attributes = {**words, "root": root, "pitch_hz": frequency(root), "unseen": is_unseen(root, instrument)}
    return pick(TEMPLATES).format(**words), attributes


def clip(index: int, seed: int = 0, seconds: float = 2.0) -> Clip:
    """Clip `index` of the endless series `seed`, its attributes drawn uniformly; index and seed are not negative."""
    caption, attributes = describe_clip(index, seed)
    return Clip(render(attributes, seconds), caption, attributes)


def render(attributes: dict, seconds: float) -> np.ndarray:
    """The sound that a clip's attributes describe: float32 [samples]."""
    pitches = frequency(_note_numbers(attributes, seconds))
    return render_melody(pitches, 60 / attributes["bpm"], attributes["instrument"], seconds)


def _note_numbers(attributes: dict, seconds: float) -> np.ndarray:
    """MIDI numbers of the notes that begin within `seconds`, one a beat: int [notes]."""
    beats = int(np.ceil(seconds * attributes["bpm"] / 60 - 1e-9))
    degrees = CONTOURS[attributes["contour"]] * (np.arange(beats) % 8)  # at most an octave away
    return attributes["root"] + 12 * (degrees // 7) + np.array(SCALES[attributes["mode"]])[degrees % 7]


def render_melody(pitches: np.ndarray, beat: float, instrument: str, seconds: float) -> np.ndarray:
    """Notes of these fundamentals [notes] in Hz, one a beat (seconds), as float32 [samples]."""
    time = np.arange(round(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    note = (time / beat).astype(int)
    since = time - note * beat  # seconds since the onset
    left = np.minimum(beat, seconds - note * beat) - since - GAP
    envelope = np.sin(np.pi / 2 * np.clip(np.minimum(since / ATTACK, left / RELEASE), 0, 1)) ** 2  # no corner clicks
    pitch = pitches[note]
    phase = 2 * np.pi * pitch * since
    partials = INSTRUMENTS[instrument]
    # sin(kx) from the two before it: sin(kx) = 2 cos(x) sin((k-1)x) - sin((k-2)x), far cheaper than a sine each
    twice_cosine, before, now = 2 * np.cos(phase), np.zeros_like(phase), np.sin(phase)
    total = np.zeros_like(phase)
    for k in range(1, max(partials) + 1):
        if k in partials:
            amplitude, decay = partials[k]
            part = now * (amplitude * (k * pitches < HIGHEST))[note]
            total += part * np.exp(-decay * since) if decay else part
        before, now = now, twice_cosine * now - before
    return (total * envelope * (0.5 / sum(amplitude for amplitude, _ in partials.values()))).astype(np.float32)
