"""A validation part to choose learning rates on: a tenth of the training split, so that what is reported chose nothing.

The training split of a source is written out as a source of its own. Data preparation holds a tenth of that out again,
as of any source: runs that choose train on the nine tenths and are judged on the tenth. The rows that the final runs
are judged on are in neither.
"""

import functools
import hashlib
import itertools
import json
import shutil
import threading
from pathlib import Path

import numpy as np

from nanochat.audio.listen_page import write_wav
from nanochat.audio.sources import Log, plan_sounds
from nanochat.config.settings import Settings
from nanochat.data.local_sources import slugify
from nanochat.data.prepare import prepare
from nanochat.data.splits import is_held_out
from nanochat.files import write_atomically
from nanochat.system.environment import base_dir

RATE = 16_000  # Hz of the sounds that are written
SOUNDS = ("synth",)
_lock = threading.Lock()  # runs start in threads, and the part is made once


def choose_on_training(settings: dict) -> dict:
    """The settings with `data` and `text_data` replaced by their training splits."""
    changed = {name: str(training_part(settings, name)) for name in ("data", "text_data") if settings.get(name)}
    return settings | changed | ({"data_limit": None} if settings.get("data_limit") else {})


def training_part(settings: dict, name: str = "data") -> Path:
    """The training split of the source settings[name], as a jsonl of texts or a folder of captioned sounds."""
    with _lock:
        source = settings[name]
        if source in SOUNDS:
            return _sounds(source, settings.get("data_limit"), settings.get("clip_seconds"))
        return _texts(source)


@functools.cache
def _texts(source: str) -> Path:
    dataset = prepare(source)
    path = _place(source, dataset.fingerprint["sha256"], ".jsonl")
    if not path.exists():
        lines = (json.dumps({"text": text}) for _, text in dataset.documents("train"))
        write_atomically(path, "\n".join(lines) + "\n")
    return path


def _sounds(source: str, limit: int | None, seconds: float | None) -> Path:
    """Files whose names decide their side of the split: equal sounds are on one side."""
    found = plan_sounds(Settings(data=source, data_limit=limit, clip_seconds=seconds))
    folder = _place(source, hashlib.sha256(repr(found.state).encode()).hexdigest())
    if folder.is_dir():
        return folder
    scratch = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    log, lines = Log(print), []
    for number, item in enumerate(found.fetch(log)):
        if (item.split or ("val" if is_held_out(item.name) else "train")) == "val":
            continue
        sound = item.load(RATE, log)
        samples = np.round(sound.wav * 32767).astype(np.int16)
        name = _name(number, is_held_out(hashlib.sha256(samples.tobytes()).hexdigest()))
        write_wav(scratch / name, sound.wav, RATE)
        lines.append(json.dumps({"file_name": name, "text": sound.caption}))
    (scratch / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    scratch.rename(folder)
    return folder


def _name(number: int, held: bool) -> str:
    """The first name for a sound that the rule of data preparation puts on the side that it belongs to."""
    names = (f"{number:06d}-{turn}.wav" for turn in itertools.count())
    return next(name for name in names if is_held_out(name) == held)


def _place(source: str, state: str, suffix: str = "") -> Path:
    return base_dir() / "training_parts" / f"{slugify(source)}-{state[:8]}{suffix}"
