"""A page to listen to: one HTML file, its sounds and spectrograms in a folder beside it, nothing from elsewhere."""

import hashlib
import html
import io
import os
import re
import shutil
import tempfile
import wave
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from nanochat.files import open_atomic, write_atomically
from nanochat.system.environment import UserError
from nanochat.system.temporary import file_lock

Sound = tuple[np.ndarray, int] | str | Path  # (wav [samples], sample rate in Hz), or a file of write_wav

WIDTH, HEIGHT = 320, 96  # pixels of a spectrogram
LOWEST, RANGE = 60.0, 70.0  # Hz of its lowest row; dB from its brightest to its darkest colour
COLOURS = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))  # evenly spaced, after viridis

STYLE = """
:root { color-scheme: light dark; --line: #8886; --hit: #18794e; --miss: #b42318 }
@media (prefers-color-scheme: dark) { :root { --hit: #5bd69b; --miss: #ff9b8f } }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 0 auto; padding: 1rem }
h1 { font-size: 1.5rem } h2 { font-size: 1.2rem; margin-top: 2rem } h3 { font-size: 1rem; margin: 0 0 .5rem }
pre { overflow-x: auto; font-size: .8rem; border: 1px solid var(--line); border-radius: .5rem; padding: .75rem }
.clips { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(20rem, 100%), 1fr)) }
article { border: 1px solid var(--line); border-radius: .5rem; padding: .75rem; overflow-wrap: anywhere }
img { width: 100%; height: 6rem; display: block; border-radius: .25rem; image-rendering: pixelated }
audio { width: 100%; height: 2.5rem; margin-top: .5rem } p { margin: .5rem 0 0; font-size: .9rem }
.hit, .miss { color: var(--hit); white-space: nowrap } .miss { color: var(--miss) }
"""


def write_wav(path: Path, wav: np.ndarray, sample_rate: int) -> None:
    """Write a mono sound [samples] of -1..1 as 16-bit PCM, whole or not at all; louder is clipped, NaN is silence."""
    pcm = np.round(np.clip(np.nan_to_num(wav, posinf=1, neginf=-1), -1, 1) * 32767).astype("<i2")
    path.parent.mkdir(parents=True, exist_ok=True)
    with open_atomic(path) as file, wave.open(file, "wb") as writer:
        writer.setnchannels(1)
        writer.setsampwidth(2)
        writer.setframerate(sample_rate)
        writer.writeframes(pcm.tobytes())


def read_wav(path: Path) -> tuple[np.ndarray, int]:
    """(float32 [samples], sample rate) of a 16-bit mono wav file. UserError for anything else."""
    try:
        with wave.open(str(path), "rb") as reader:
            if (shape := (reader.getsampwidth(), reader.getnchannels())) != (2, 1):
                raise UserError(f"{path} has {shape[0]} bytes a sample in {shape[1]} channels: give 16-bit mono wav")
            return np.frombuffer(reader.readframes(-1), "<i2").astype(np.float32) / 32767, reader.getframerate()
    except (OSError, EOFError, wave.Error) as error:
        raise UserError(f"{path} is no 16-bit wav file ({error}): write it again") from error


def encode_png(levels: np.ndarray) -> bytes:
    """A PNG file of levels 0..1 [rows, columns] in 256 colours from dark blue to yellow."""
    from PIL import Image

    steps = np.linspace(0, len(COLOURS) - 1, 256)
    palette = np.stack([np.interp(steps, range(len(COLOURS)), channel) for channel in zip(*COLOURS, strict=True)], 1)
    picture = Image.fromarray(np.round(np.clip(levels, 0, 1) * 255).astype(np.uint8))
    picture.putpalette(palette.round().astype(np.uint8).tobytes())
    file = io.BytesIO()
    picture.save(file, "png", optimize=True)
    return file.getvalue()


def spectrogram(wav: np.ndarray, sample_rate: int) -> np.ndarray:
    """Levels 0..1 [HEIGHT, WIDTH] of a sound [samples]: time to the right, pitch upwards in equal steps an octave."""
    window = 2 * (sample_rate // 32)  # 62.5 ms
    wav = np.pad(np.nan_to_num(wav, posinf=0, neginf=0), window // 2)
    starts = np.linspace(0, len(wav) - window, WIDTH).astype(int)
    frames = np.stack([wav[start : start + window] for start in starts]) * np.hanning(window)
    magnitude = np.abs(np.fft.rfft(frames)) / window
    frequencies = np.geomspace(min(8000, sample_rate / 2), LOWEST, HEIGHT)
    bins = np.fft.rfftfreq(window, 1 / sample_rate)
    level = 20 * np.log10(np.stack([np.interp(frequencies, bins, frame) for frame in magnitude], 1) + 1e-6)
    return (level - max(level.max(), RANGE - 120)) / RANGE + 1  # silence, -120 dB, is dark


def write_page(path: Path, title: str, items: Iterable[Mapping], notes: str = "") -> Path:
    """Write an HTML page with a player and a spectrogram for each item, in the order given under each split's heading.

    items: caption (str) and sound, optionally split (a heading), measured ({name: value}), hits ({name: bool}) and
    reference (another sound to compare with). notes: text shown at the top as it is, a table of figures for example.
    The page appears whole: its files lie in a folder named by their content, and an older page's folder goes last.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    items = list(items)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.stem}-") as temporary:
        whole = Path(temporary) / "whole"
        whole.mkdir()
        for number, item in enumerate(items):
            write_sound(whole, f"{number:04d}", item["sound"])
            if item.get("reference") is not None:
                write_sound(whole, f"{number:04d}-reference", item["reference"])
        digest = hashlib.sha256()
        for file in sorted(whole.iterdir()):
            digest.update(file.name.encode() + file.read_bytes())
        folder = path.with_name(f"{path.stem}-{digest.hexdigest()[:12]}")
        with file_lock(path.with_name(f".{path.name}.lock")):  # else the folder of another process's page would go
            if not folder.is_dir():
                os.replace(whole, folder)
            write_atomically(path, render_page(title, notes, items, folder.name))
            for old in path.parent.iterdir():
                if old != folder and re.fullmatch(re.escape(path.stem) + "-[0-9a-f]{12}", old.name) and old.is_dir():
                    shutil.rmtree(old)
    return path


def write_sound(folder: Path, name: str, sound: Sound) -> None:
    """Write name.wav and name.png, its spectrogram."""
    wav, sample_rate = sound if isinstance(sound, tuple) else read_wav(Path(sound))
    write_wav(folder / f"{name}.wav", wav, sample_rate)
    with open_atomic(folder / f"{name}.png") as file:
        file.write(encode_png(spectrogram(wav, sample_rate)))


def render_page(title: str, notes: str, items: list[Mapping], folder: str) -> str:
    """The HTML text; everything that comes from outside is escaped."""
    sections: dict[str, list[str]] = {}
    for number, item in enumerate(items):
        source = f"{html.escape(folder)}/{number:04d}"
        sections.setdefault(str(item.get("split") or "clips"), []).append(render_clip(item, source))
    body = "\n".join(
        f'<h2>{html.escape(split)}: {len(articles)}</h2>\n<div class="clips">\n' + "\n".join(articles) + "\n</div>"
        for split, articles in sections.items()
    )
    table = f'<pre tabindex="0">{html.escape(notes)}</pre>\n' if notes else ""  # reachable by keyboard, to scroll it
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n<link rel="icon" href="data:,">\n'
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        f"<h1>{html.escape(title)}</h1>\n{table}{body}\n</main>\n</body>\n</html>\n"
    )


def render_clip(item: Mapping, source: str) -> str:
    """One clip: its caption, spectrogram and player, what was measured and what of it hit, and the reference."""
    caption = html.escape(item["caption"])
    parts = [f"<h3>{caption}</h3>", render_player(source, caption)]
    if item.get("measured"):
        heard = ", ".join(f"{name} {shown(value)}" for name, value in item["measured"].items())
        parts.append(f"<p>heard: {html.escape(heard)}</p>")
    if item.get("hits"):
        marks = (("hit", "\u2713") if hit else ("miss", "\u2717") for hit in item["hits"].values())
        words = (
            f'<span class="{word}">{mark} {html.escape(name)} {word}</span>'
            for name, (word, mark) in zip(item["hits"], marks, strict=True)
        )
        parts.append(f"<p>{', '.join(words)}</p>")
    if item.get("reference") is not None:
        parts.append(f"<p>reference</p>{render_player(f'{source}-reference', f'reference: {caption}')}")
    return "<article>\n" + "\n".join(parts) + "\n</article>"


def render_player(source: str, label: str) -> str:
    """Spectrogram and player of one sound; label is escaped already."""
    return (
        f'<img src="{source}.png" width="{WIDTH}" height="{HEIGHT}" loading="lazy" alt="Spectrogram of: {label}">\n'
        f'<audio controls preload="none" src="{source}.wav" aria-label="{label}"></audio>'
    )


def shown(value: object) -> str:
    """A measured value in a few digits."""
    return "none" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
