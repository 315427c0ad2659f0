"""What each codec keeps of a melody, and what its codes say.

`python -m scripts.check_codecs [--codec pitch,2,256 ...] [--fit 300] [--clips 60]`: kind, codebooks, codes. Each is
fitted on synthesised clips and applied to others: seconds to fit and to decode a clip, the share of pitched frames
within 50 cents (librosa's yin on the decoded sound against its pyin on the original), SI-SDR (of codecs that keep the
waveform), loudness; and for each codebook the bits of a code (unigram, given the last code of its book) and the bits
that it tells about the root note when instrument and time since the onset are known: 0 is what a model needs to play a
note on an instrument that it never heard there.
"""

import argparse
import math
import time
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable

import numpy as np

from nanochat.audio import KINDS, fit_codec
from nanochat.audio_distance import si_sdr
from nanochat.audio_eval import needs_librosa
from nanochat.runtime import UserError, run_script
from nanochat.synth_audio import INSTRUMENTS, ROOTS, SAMPLE_RATE, clip, frequency, melody

CODECS = ("frame,1,512", "frame,1,2048", "pitch,2,256", "mdct,4,1024")
FIRST_HELD_OUT = 50_000  # clips from here on are nobody's training clips
NOTE_FRAMES = 45  # of a note of one second


def parse_codec(text: str) -> tuple[str, int, int]:
    kind, *numbers = text.split(",")
    if kind not in KINDS or len(numbers) != 2 or not all(number.isdigit() for number in numbers):
        raise UserError(f"--codec {text!r} is not kind,codebooks,codes: as in pitch,2,256 ({', '.join(KINDS)})")
    return kind, int(numbers[0]), int(numbers[1])


def entropy(values: Iterable[Hashable]) -> float:
    """Bits of the empirical distribution."""
    counts = np.array(list(Counter(values).values()))
    return float(-(counts / counts.sum()) @ np.log2(counts / counts.sum()))


def entropy_given(values: list, known: list) -> float:
    """Bits of the values when `known` is known."""
    groups = defaultdict(list)
    for value, key in zip(values, known, strict=True):
        groups[key].append(value)
    return sum(len(group) * entropy(group) for group in groups.values()) / len(values)


def pitch_share(wavs: np.ndarray, decoded: np.ndarray) -> float:
    """Share of the originals' voiced frames whose pitch the decoded sounds have within 50 cents."""
    librosa, how = needs_librosa(), dict(fmin=60, fmax=1050, sr=SAMPLE_RATE, frame_length=2048, hop_length=320)
    close = []
    for wav, other in zip(wavs, decoded, strict=True):
        f0, voiced, _ = librosa.pyin(wav, **how)
        found = librosa.yin(other[: len(wav)], **how)
        frames = min(len(f0), len(found))
        voiced = voiced[:frames]
        close.extend(np.abs(1200 * np.log2(found[:frames][voiced] / f0[:frames][voiced])) < 50)
    return float(np.mean(close))


def said_of_the_root(codec, book: int) -> float:
    """Bits that a book's codes tell about the root when instrument and frame are known, over one note of each root."""
    told = []
    for instrument in INSTRUMENTS:
        notes = [melody(np.array([frequency(root)] * 2), 1.0, instrument, 2.0) for root in ROOTS]
        codes = codec.encode_batch(np.stack(notes))[:, book, :NOTE_FRAMES]
        told.extend(
            entropy(column.tolist()) for column in codes.T
        )  # a code follows from the root: all it says is of it
    return float(np.mean(told))


def measure(kind: str, books: int, codes: int, fit: int, count: int) -> dict:
    """The figures of one codec."""
    begun = time.perf_counter()
    training = [clip(index).wav for index in range(fit)]
    made = time.perf_counter()
    codec = fit_codec(kind, training, books, codes, say=lambda line: None)
    fitted = time.perf_counter()
    wavs = np.stack([clip(FIRST_HELD_OUT + index).wav for index in range(count)])
    coded = codec.encode_batch(wavs)
    start = time.perf_counter()
    decoded = codec.decode_batch(coded)[:, : wavs.shape[1]]
    seconds = time.perf_counter() - start
    row = dict(
        codec=f"{kind} {books} x {codes}", rate=codec.frame_rate * books * math.log2(codes), fit=fitted - made,
        decode=seconds / count, synth=(made - begun) / fit, pitch=pitch_share(wavs, decoded),
        si_sdr=float(np.mean([si_sdr(a, b) for a, b in zip(wavs, decoded, strict=True)])),
        level=20 * math.log10(float(decoded.std() / wavs.std())),
    )  # fmt: skip
    row["books"] = [
        dict(
            unigram=entropy(coded[:, q].reshape(-1).tolist()),
            bigram=entropy_given(coded[:, q, 1:].reshape(-1).tolist(), coded[:, q, :-1].reshape(-1).tolist()),
            root=said_of_the_root(codec, q),
        )
        for q in range(books)
    ]  # fmt: skip
    return row


def main(argv: list[str] | None = None) -> list[dict]:
    """Print the table; returns its rows."""
    parser = argparse.ArgumentParser(prog="scripts.check_codecs", description=__doc__.splitlines()[0])
    parser.add_argument("--codec", action="append", help="kind,codebooks,codes (repeatable)")
    parser.add_argument("--fit", type=int, default=300, help="clips to fit on")
    parser.add_argument("--clips", type=int, default=60, help="other clips to measure on")
    arguments = parser.parse_args(argv)
    chosen = [parse_codec(text) for text in arguments.codec or CODECS]
    print(f"fitted on {arguments.fit} clips, measured on {arguments.clips} others of 2 s; control: root is log2 of "
          f"{len(ROOTS)} = {math.log2(len(ROOTS)):.2f} bits")  # fmt: skip
    names = (
        "codec",
        "bit/s",
        "fit s",
        "decode s a clip",
        "f0 within 50 cents",
        "SI-SDR dB",
        "level dB",
        "bits, by book",
    )
    print(f"| {' | '.join(names)} |\n{'| --- ' * len(names)}|")
    rows = []
    for kind, books, codes in chosen:
        row = measure(kind, books, codes, arguments.fit, arguments.clips)
        told = "; ".join(f"{b['unigram']:.2f}, {b['bigram']:.2f}, root {b['root']:.2f}" for b in row["books"])
        waveform = f"{row['si_sdr']:.1f}" if kind == "mdct" else ""
        print(
            f"| {row['codec']} | {row['rate']:.0f} | {row['fit']:.1f} | {row['decode']:.3f} | {row['pitch']:.3f} | "
            f"{waveform} | {row['level']:+.1f} | {told} |", flush=True,
        )  # fmt: skip
        rows.append(row)
    return rows


if __name__ == "__main__":
    run_script(main)
