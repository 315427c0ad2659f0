"""Captioned sounds: tables and wav headers."""

import csv
import functools
import io
import json
import struct
import unicodedata
from collections.abc import Callable
from pathlib import Path

import numpy as np

from scripts.stress.inputs.cases import Case, Refused, Used

RATE = 8000
CLIPS = 40
LENGTH = 0.3  # seconds of each
AUDIO = ("scripts.audio_data", "--data={in}/sounds", "--modalities=audio:64", "--codec=frame")


def samples(number: int, seconds: float = LENGTH) -> np.ndarray:
    """int16 [samples] of three tones in an order of its own, so that codes differ too."""
    times = np.arange(round(seconds * RATE)) / RATE
    pitches = np.array([200 + 300 * (number % 4), 200 + 300 * (number // 4 % 4), 200 + 300 * (number // 16)])
    pitch = pitches[(times / seconds * 3).astype(int)]
    return (8000 * np.sin(2 * np.pi * pitch * times)).astype("<i2")


def wav(
    pcm: bytes,
    *,
    size: int | None = None,
    riff: int | None = None,
    kind: int = 1,
    bits: int = 16,
    channels: int = 1,
    rate: int = RATE,
    before: bytes = b"",
    extra: bytes = b"",
) -> bytes:
    """A RIFF file whose header says what it is asked to say."""
    block = channels * bits // 8
    head = struct.pack("<HHIIHH", kind, channels, rate, rate * block, block, bits) + extra
    body = b"WAVEfmt " + struct.pack("<I", len(head)) + head + before
    body += b"data" + struct.pack("<I", len(pcm) if size is None else size) + pcm
    return b"RIFF" + struct.pack("<I", len(body) if riff is None else riff) + body


def captions(count: int = CLIPS) -> dict[str, str]:
    return {f"clip {i}.wav": f"tone {i}, as high as {200 + 37 * i} Hz" for i in range(count)}


def _write_sounds(folder: Path, names, sub: str = "sounds") -> None:
    (folder / sub).mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(names):
        path = folder / sub / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(wav(samples(i).tobytes()))


def table(rows: list[list[str]], **options) -> str:
    file = io.StringIO()
    csv.writer(file, lineterminator="\n", **options).writerows(rows)
    return file.getvalue()


def case(
    label: str, tables: dict[str, bytes], expect, names=None, change: Callable[[Path], object] | None = None
) -> Case:
    """Forty sounds beside these tables."""

    def build(folder: Path) -> None:
        _write_sounds(folder, names or captions())
        for name, raw in tables.items():
            (folder / "sounds" / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / "sounds" / name).write_bytes(raw)
        if change:
            change(folder / "sounds")

    return Case(f"captions: {label}", build, [AUDIO], expect)


def cases() -> list[Case]:
    return [*_tables(), *_more_tables(), *_headers()]


def _tables() -> list[Case]:
    """The same captions in every table that people write."""
    known = captions()
    used = Used(clips=known, seconds=CLIPS * LENGTH)
    rows = [["file_name", "text"], *([name, text] for name, text in known.items())]
    stray = {name: f'"{text}' if i == 5 else text for i, (name, text) in enumerate(known.items())}
    tabs = "".join(f"{name}\t{text}\n" for name, text in [("file_name", "text"), *stray.items()])
    both = {name: f'a "quoted" {text}; and | more' for name, text in known.items()}
    lines = {name: f"{text}\nin two lines" for name, text in known.items()}
    found = [
        case("csv", {"metadata.csv": table(rows).encode()}, used),
        case("csv, every field quoted", {"captions.csv": table(rows, quoting=csv.QUOTE_ALL).encode()}, used),
        case("csv with CRLF", {"metadata.csv": table(rows).replace("\n", "\r\n").encode()}, used),
        case("csv with a stray quote in a tsv", {"captions.tsv": tabs.encode()}, Used(clips=stray)),
        case("quotes, semicolons, bars", {"metadata.csv": _rows(both)}, Used(clips=both)),
        case("captions of two lines", {"metadata.csv": _rows(lines)}, Used(clips=lines)),
        case("id|text|text without header", {"metadata.csv": _ljspeech(known)}, used),
        case("semicolons between columns", {"metadata.csv": table(rows, delimiter=";").encode()}, used),
        case("tabs in a .csv", {"metadata.csv": table(rows, delimiter="\t").encode()}, used),
        case("blanks in the header", {"metadata.csv": table([["file_name", " text "], *rows[1:]]).encode()}, used),
        case("jsonl", {"metadata.jsonl": _json(known, "file_name", "text")}, used),
        case("jsonl, text before audio", {"metadata.jsonl": _json(known, "audio", "text", text_first=True)}, used),
        case("a byte order mark in jsonl", {"metadata.jsonl": b"\xef\xbb\xbf" + _json(known, "audio", "text")}, used),
        case(
            "names without suffix", {"metadata.csv": _rows({n.removesuffix(".wav"): t for n, t in known.items()})}, used
        ),
    ]
    for encoding in ("utf-8-sig", "utf-16", "utf-16-le", "utf-32"):
        found.append(case(f"csv in {encoding}", {"metadata.csv": table(rows).encode(encoding)}, used))
    foreign = table([["file_name", "text"], *([name, f"Größe {text}"] for name, text in known.items())])
    found.append(case("csv in latin-1", {"metadata.csv": foreign.encode("latin-1")}, Refused(["UTF-8"])))
    found.append(case("no captions", {}, Refused(["caption"])))
    return found


def _rows(captions: dict[str, str]) -> bytes:
    return table([["file_name", "text"], *map(list, captions.items())]).encode()


def _ljspeech(captions: dict[str, str]) -> bytes:
    return "".join(f"{name.removesuffix('.wav')}|{text}|{text}\n" for name, text in captions.items()).encode()


def _json(captions: dict[str, str], name_key: str, text_key: str, text_first: bool = False) -> bytes:
    rows = [{name_key: name, text_key: text} for name, text in captions.items()]
    rows = [dict(reversed(row.items())) for row in rows] if text_first else rows
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def _more_tables() -> list[Case]:
    """Captions beside sounds, subfolders, names in two normal forms, and losses that must be counted."""
    known = captions()
    decomposed = {unicodedata.normalize("NFD", f"Übung é {i}.wav"): f"tone number {i} is here" for i in range(CLIPS)}
    composed = {unicodedata.normalize("NFC", name): text for name, text in decomposed.items()}
    beside = {f"{name.removesuffix('.wav')}.txt": text.encode() for name, text in known.items()}
    wide = {name: raw.decode().encode("utf-16") for name, raw in beside.items()}
    deep = {f"wavs/{name}": text for name, text in known.items()}
    fewer = {name: text for name, text in known.items() if name not in ("clip 3.wav", "clip 4.wav")}
    strangers = known | {"clip 97.wav": "not there", "clip 98.wav": "not there either"}
    empty = known | {"clip 3.wav": "  "}
    rest = {name: text for name, text in known.items() if name != "clip 3.wav"}

    def audio_folder(folder: Path) -> None:
        for part, start in (("train", 0), ("test", 34)):
            names = [n for i, n in enumerate(known) if (i >= 34) == bool(start)]
            (folder / part).mkdir()
            for name in names:
                (folder / name).rename(folder / part / name)
            (folder / part / "metadata.csv").write_bytes(_rows({name: known[name] for name in names}))

    parts = {f"{'test' if i >= 34 else 'train'}/{name}": text for i, (name, text) in enumerate(known.items())}
    return [
        case("x.txt beside x.wav", beside, Used(clips=known)),
        case("x.txt in UTF-16", wide, Used(clips=known)),
        case("names in NFD, table in NFC", {"metadata.csv": _rows(composed)}, Used(clips=decomposed), names=decomposed),
        case("names in NFC, table in NFD", {"metadata.csv": _rows(decomposed)}, Used(clips=composed), names=composed),
        case("ids without their subfolder", {"metadata.csv": _rows(known)}, Used(clips=deep), names=deep),
        case("ids of LJSpeech in wavs/", {"metadata.csv": _ljspeech(known)}, Used(clips=deep), names=deep),
        case(
            "two sounds without a caption",
            {"metadata.csv": _rows(fewer)},
            Used(clips=fewer, skipped=["clip 3.wav", "clip 4.wav"]),
        ),
        case(
            "two captions without a sound",
            {"metadata.csv": _rows(strangers)},
            Used(clips=known, skipped=["clip 97.wav", "clip 98.wav"]),
        ),
        case("an empty caption", {"metadata.csv": _rows(empty)}, Used(clips=rest, skipped=["clip 3.wav"])),
        case(
            "train/ and test/ with tables",
            {},
            Used(clips=parts, says=["its own split: 6 of 40 sounds are held out"]),
            change=audio_folder,
        ),
        case(
            "sounds that nothing decodes",
            {"metadata.csv": _rows(known), "voice.m4a": b"\0\0\0\x20ftypM4A "},
            Used(clips=known, count=1, says=["m4a"]),
        ),
    ]


def _headers() -> list[Case]:
    """Headers as pipes, recorders and editors write them: all samples are used, or the sound is skipped by name."""
    pcm = samples(3).tobytes()
    times = np.arange(round(LENGTH * RATE)) / RATE
    tone = 0.25 * np.sin(2 * np.pi * 311 * times)
    guid = struct.pack("<HHIHHQ", 22, 16, 4, 1, 0, 0x719B3800AA000080)[:2] + struct.pack("<HI", 16, 4)
    guid += struct.pack("<HHHH", 1, 0, 0, 16) + bytes.fromhex("800000aa00389b71")
    listed = b"LIST" + struct.pack("<I", 26) + b"INFOISFT" + struct.pack("<I", 13) + b"a recorder 1\0\0"
    three = (tone * 2**23).astype("<i4").view(np.uint8).reshape(-1, 4)[:, :3].tobytes()
    good = {
        "data size 0, as from a pipe": wav(pcm, size=0, riff=0),
        "data size 0xFFFFFFFF": wav(pcm, size=0xFFFFFFFF, riff=0xFFFFFFFF),
        "data size 2,000,000,000": wav(pcm, size=2_000_000_000, riff=2_000_000_036),
        "data size 0x7FFFFFFF": wav(pcm, size=0x7FFFFFFF, riff=0x7FFFFFFF),
        "an odd data size": wav(pcm, size=len(pcm) - 1),
        "a RIFF size of 0": wav(pcm, riff=0),
        "a LIST before the data": wav(pcm, before=listed),
        "a LIST behind the data": wav(pcm) + listed,
        "an extensible format": wav(pcm, kind=0xFFFE, extra=guid),
        "8 bits": wav((128 + tone * 127).astype(np.uint8).tobytes(), bits=8),
        "24 bits": wav(three, bits=24),
        "32-bit floats": wav(tone.astype("<f4").tobytes(), kind=3, bits=32),
        "64-bit floats": wav(tone.astype("<f8").tobytes(), kind=3, bits=64),
        "six channels": wav(np.repeat(samples(3), 6).tobytes(), channels=6),
    }
    bad = {
        "no RIFF": b"no wav at all" * 400,
        "an empty file": b"",
        "a header alone": wav(b""),
        "half of the data": wav(pcm[: len(pcm) // 2], size=len(pcm)),
        "0 channels": wav(pcm, channels=0),
        "a rate of 0": wav(pcm, rate=0),
        "NaN": wav(np.full(2000, np.nan, "<f4").tobytes(), kind=3, bits=32),
        "zeros": wav(bytes(4000)),
        "an unknown format": wav(pcm, kind=0x1234),
    }
    known = captions()
    found = []
    for label, raw in good.items():
        expect = Used(clips=known, seconds=CLIPS * LENGTH)
        found.append(_header_case(label, raw, expect))
    rest = {name: text for name, text in known.items() if name != "clip 3.wav"}
    for label, raw in bad.items():
        found.append(_header_case(label, raw, Used(clips=rest, skipped=["clip 3.wav"])))
    return found


def _header_case(label: str, raw: bytes, expect: Used) -> Case:
    put = functools.partial(_put, "clip 3.wav", raw)
    made = case(label, {"metadata.csv": _rows(captions())}, expect, change=put)
    return Case(f"wav: {label}", made.build, made.steps, expect)


def _put(name: str, raw: bytes, folder: Path) -> None:
    (folder / name).write_bytes(raw)
