"""What each codec keeps of a melody, and what its codes say.

`python -m scripts.experiments.codecs [--codec pitch,2,256 ...] [--fit 300] [--clips 60]`: kind, codebooks, codes. Each
is fitted on synthesised clips of the training split and applied to held-out ones, none of whose sounds it was fitted
on: seconds to fit and to decode a clip, the share of pitched frames within 50 cents (librosa's yin on the decoded sound
against its pyin on the original), SI-SDR (of codecs that keep the waveform), loudness; and for each codebook the bits
of a code (unigram, given the last code of its book) and the bits that it tells about the root note when instrument and
time since the onset are known: 0 is what a model needs to play a note on an instrument that it never heard there.

`--split 3000` checks the split of so many clips instead, prepared as the `audio` preset does: how many held-out clips
share waveform, codes or caption with a training clip.
"""

import argparse
import hashlib
import itertools
import math
import time
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable

import numpy as np

from nanochat.audio.adherence import import_librosa
from nanochat.audio.codec_files import KINDS
from nanochat.audio.distance import si_sdr
from nanochat.audio.fitted_codec import fit_codec
from nanochat.audio.synth import (
    INSTRUMENTS,
    ROOTS,
    SAMPLE_RATE,
    clip,
    describe_clip,
    frequency,
    is_held_out,
    render,
    render_melody,
)
from nanochat.config.settings import preset
from nanochat.data.dataset import SPLITS
from nanochat.data_pipeline import prepare_for
from nanochat.runtime import run_script
from nanochat.system import logs
from nanochat.system.environment import UserError

CODECS = ("frame,1,512", "frame,1,2048", "pitch,2,256", "mdct,4,1024")
SECONDS = 2.0  # of a clip
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
    librosa, how = import_librosa(), dict(fmin=60, fmax=1050, sr=SAMPLE_RATE, frame_length=2048, hop_length=320)
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
        notes = [render_melody(np.array([frequency(root)] * 2), 1.0, instrument, 2.0) for root in ROOTS]
        codes = codec.encode_batch(np.stack(notes))[:, book, :NOTE_FRAMES]
        told.extend(
            entropy(column.tolist()) for column in codes.T
        )  # a code follows from the root: all it says is of it
    return float(np.mean(told))


def numbers(held_out: bool, count: int) -> list[int]:
    """The first `count` clips of the held-out or the training split of `synth`."""
    wanted = (i for i in itertools.count() if is_held_out(describe_clip(i)[1], SECONDS) is held_out)
    return list(itertools.islice(wanted, count))


def check_split(clips: int) -> dict[str, dict[str, int]]:
    """For "seen" and "unseen": the held-out clips, and those whose waveform, codes or caption a training clip has."""
    data = prepare_for(preset("audio", data_limit=clips))
    known: dict[str, set] = {"waveform": set(), "codes": set(), "caption": set()}
    found = {split: Counter() for split in ("seen", "unseen")}
    for split in SPLITS:  # training first
        for shard in data.shards(split):
            for _, caption, codes, attributes in data.read_clips(shard):
                wav = render(attributes, SECONDS) + 0.0  # -0.0 is 0.0
                marks = dict(waveform=wav.tobytes(), codes=codes.tobytes(), caption=caption.encode())
                marks = {kind: hashlib.sha256(mark).digest() for kind, mark in marks.items()}
                if split == "train":
                    for kind, mark in marks.items():
                        known[kind].add(mark)
                else:
                    counts = found["unseen" if attributes["unseen"] else "seen"]
                    counts.update(clips=1, **{kind: mark in known[kind] for kind, mark in marks.items()})
    for split, counts in found.items():
        shared = ", ".join(f"{kind} {counts[kind]}" for kind in known)
        print(f"{split}: {counts['clips']} held-out clips of {clips}; also in the training split: {shared}")
    return {split: dict(counts) for split, counts in found.items()}


def measure(kind: str, books: int, codes: int, fit: int, count: int) -> dict:
    """The figures of one codec."""
    begun = time.perf_counter()
    training = [clip(index, seconds=SECONDS).wav for index in numbers(held_out=False, count=fit)]
    made = time.perf_counter()
    with logs.muted():
        codec = fit_codec(kind, training, books, codes)
    fitted = time.perf_counter()
    wavs = np.stack([clip(index, seconds=SECONDS).wav for index in numbers(held_out=True, count=count)])
    coded = codec.encode_batch(wavs)
    start = time.perf_counter()
    decoded = codec.decode_batch(coded)[:, : wavs.shape[1]]
    seconds = time.perf_counter() - start
    row = dict(
        codec=f"{kind} {books} x {codes}",
        rate=codec.frame_rate * books * math.log2(codes),
        fit=fitted - made,
        decode=seconds / count,
        synth=(made - begun) / fit,
        pitch=pitch_share(wavs, decoded),
        si_sdr=float(np.mean([si_sdr(a, b) for a, b in zip(wavs, decoded, strict=True)])),
        level=20 * math.log10(float(decoded.std() / wavs.std())),
    )
    row["books"] = [
        dict(
            unigram=entropy(coded[:, q].reshape(-1).tolist()),
            bigram=entropy_given(coded[:, q, 1:].reshape(-1).tolist(), coded[:, q, :-1].reshape(-1).tolist()),
            root=said_of_the_root(codec, q),
        )
        for q in range(books)
    ]
    return row


def main(argv: list[str] | None = None) -> list[dict] | dict:
    """Print the table, or what --split asks for; returns its rows."""
    parser = argparse.ArgumentParser(prog="scripts.experiments.codecs", description=__doc__.splitlines()[0])
    parser.add_argument("--codec", action="append", help="kind,codebooks,codes (repeatable)")
    parser.add_argument("--fit", type=int, default=300, help="clips to fit on")
    parser.add_argument("--clips", type=int, default=60, help="other clips to measure on")
    parser.add_argument("--split", type=int, metavar="CLIPS", help="check the split of so many clips, and no codec")
    arguments = parser.parse_args(argv)
    if arguments.split is not None:
        return check_split(arguments.split)
    chosen = [parse_codec(text) for text in arguments.codec or CODECS]
    print(
        f"fitted on {arguments.fit} clips, measured on {arguments.clips} others of 2 s; control: root is log2 of "
        f"{len(ROOTS)} = {math.log2(len(ROOTS)):.2f} bits"
    )
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
            f"{waveform} | {row['level']:+.1f} | {told} |",
            flush=True,
        )
        rows.append(row)
    return rows


if __name__ == "__main__":
    run_script(main)
