"""Sources of captioned sounds: a folder, a dataset of the Hugging Face hub, or synthesised melodies.

A source is a plan, cheap to make. `fetch` lists its sounds by name; each is decoded when it is asked for, by soundfile,
resampled by soxr and mixed to one channel. A sound that cannot be used is skipped: the first few of a kind are
named, all are counted.
"""

import functools
import io
import logging
import os
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from nanochat.audio import captions
from nanochat.audio.wav_header import PLACEHOLDER, count_trailing_bytes, repair_header
from nanochat.config.settings import Settings
from nanochat.data import hub
from nanochat.data.folders import Found, escape_undecodable, find_files
from nanochat.data.local_sources import name_of_path, path_errors_as_user_errors, stat_all
from nanochat.data.splits import find_own_split
from nanochat.data.text_files import get_text
from nanochat.runtime import first_line, nearest_name, shown
from nanochat.system.environment import UserError, base_dir, expand_user

logger = logging.getLogger(__name__)

SOUND_SUFFIXES = tuple(
    ".wav .flac .ogg .oga .opus .mp3 .aif .aiff .aifc .au .snd .caf .w64 .rf64 .wave .bwf .sph .voc .mp2 .mpga".split()
)
# that libsndfile does not read
OTHER_SOUNDS = tuple(".m4a .m4b .aac .mp4 .wma .webm .weba .mka .amr .ape .wv .3gp .ac3 .ra".split())
FOLDER_FORMAT = 2  # part of the state: raise it when the same folder would give other captions or another split
FROM_NAMES = "file_name"  # as data_column: the files' own names are the captions
SYNTH_CLIPS = 3000  # when no limit is given
SYNTH_SECONDS = 2.0
HUB_SOUNDS = 10_000  # sounds taken of a hub dataset when no limit is given
RATES = (1000, 768_000)  # Hz that a sound may have
SILENT = 1e-4  # peak amplitude: -80 dB below full scale
LONGEST = 600.0  # seconds of a sound that are kept when clip_seconds is None: memory has an end
UNKNOWN_FRAMES = 1 << 40  # what libsndfile says of a stream without a length
WHOLE = 0.95  # part of the announced length that makes a file whole: an mp3's is an estimate
BLOCK = 1 << 20  # samples decoded at a time
OGG_PAGE = 65_307  # bytes of the largest page (RFC 3533)
NAMED = 5  # of each kind of bad sound


@dataclass(frozen=True)
class Sound:
    """wav: float32 [samples], one channel at the rate asked for."""

    name: str
    caption: str
    wav: np.ndarray
    attributes: dict | None = None


class Log:
    """Counts what is skipped or altered, by kind, and names the first few of each."""

    def __init__(self, skipped: Counter | None = None):
        self.skipped = Counter() if skipped is None else skipped
        self.altered: Counter = Counter()
        self.reported: set[str] = {"files"}  # kinds whose numbers were said as a whole

    def skip(self, kind: str, name: str, detail: str = "") -> None:
        self._note(self.skipped, kind, name, f"{kind}{f' ({detail})' if detail else ''}: skipped")

    def alter(self, kind: str, name: str) -> None:
        self._note(self.altered, kind, name, kind)

    def _note(self, counts: Counter, kind: str, name: str, line: str) -> None:
        counts[kind] += 1
        if counts[kind] <= NAMED:
            logger.info(f"data: {shown(name)}: {line}")

    def close(self) -> None:
        """Say how many of each kind were not named."""
        for kind, number in (*self.skipped.items(), *self.altered.items()):
            if number > NAMED and kind not in self.reported:
                logger.info(f"data: ... and {number - NAMED} more: {kind}")


@dataclass(frozen=True)
class Item:
    """A sound not yet read. load(rate in Hz, log): the sound, or None when the log says why it is skipped.

    split: "train" or "val" where the source decides it, None for the usual rule by the name. size: how much of the
    source it is, in bytes, or 1 where all sounds are cut to one length.
    """

    name: str
    load: Callable[[int, Log], Sound | None]
    split: str | None = None
    size: int = 1


@dataclass
class SoundSource:
    """What a source would give; name to licence and state mean what they do for sources of text."""

    name: str
    source: str
    version: str
    licence: str
    state: object
    fetch: Callable[[Log], list[Item]]  # the sounds with captions; a hub dataset is downloaded
    advice: str = "give more sounds"


def holds_sounds(data: str) -> bool:
    """Whether a source is one of sounds: by its name, or by the files in a folder; hub datasets may be."""
    if data in ("stdlib", "packages", "climbmix"):
        return False
    path = expand_user(data, "data")
    if data == "synth" or data.startswith("hf:") or not path.exists():
        return True  # what is not there is named later
    if not path.is_dir():
        return path.suffix.lower() in SOUND_SUFFIXES + OTHER_SOUNDS
    files = find_files(path, skip_corrupt=True).files  # who reads the folder says what cannot be read
    return any(name.lower().endswith(SOUND_SUFFIXES + OTHER_SOUNDS) for name, _ in files)


def plan_sounds(settings: Settings) -> SoundSource:
    """The captioned sounds that `data` names: synth, hf:<dataset> or a folder; UserError for anything else."""
    data, seconds = settings.data, settings.clip_seconds
    if data == "synth":
        return _plan_synth(settings.data_limit or SYNTH_CLIPS, seconds or SYNTH_SECONDS)
    if data.startswith("hf:"):
        return _plan_hub(settings)
    ways = "one of synth, hf:<dataset>, or the path of a folder of sounds"
    if data in ("stdlib", "packages", "climbmix"):
        raise UserError(f"data={data} holds no sounds: {ways}; text to mix in goes to --text_data={data}")
    with path_errors_as_user_errors("data", data):
        root = Path(data).expanduser()
        is_folder, is_file = root.is_dir(), root.is_file()
    if is_file:
        raise UserError(f"data={data} is a file: captioned sounds are {ways}")
    if not is_folder:
        raise UserError(f"data={data}: no such folder; {ways}")
    return _plan_folder(root, settings, seconds)


# ---------------------------------------------------------------------------------------------------------------------
# synthesised melodies


def _plan_synth(limit: int, seconds: float) -> SoundSource:
    """Clips 0 .. limit-1, of `seconds` each; a sound is on one side of the split, whatever the clips that have it."""
    from nanochat.audio.synth import SAMPLE_RATE, clip, describe_clip, is_held_out

    def load(index: int, rate: int, log: Log) -> Sound:
        made = clip(index, seconds=seconds)
        return Sound(f"synth/{index}", made.caption, resample(made.wav, SAMPLE_RATE, rate), dict(made.attributes))

    def item(index: int) -> Item:
        split = "val" if is_held_out(describe_clip(index)[1], seconds) else "train"
        return Item(f"synth/{index}", functools.partial(load, index), split)

    return SoundSource(
        "synth",
        "synth",
        f"{limit} clips of {seconds:g} s",
        "made by this program: no rights of others",
        [limit, seconds, "split by sound"],
        lambda log: [item(index) for index in range(limit)],
        "raise --data_limit",
    )


# ---------------------------------------------------------------------------------------------------------------------
# folders


def _plan_folder(root: Path, settings: Settings, seconds: float | None) -> SoundSource:
    """Sounds below a folder, each called by its relative path, with captions from tables or from x.txt beside x.wav."""
    data, column = settings.data, settings.data_column
    found = find_files(root, skip_corrupt=settings.skip_corrupt)
    sounds = [name for name, _ in found.files if name.lower().endswith(SOUND_SUFFIXES)]
    if not sounds:
        found.choose(lambda name: False)
        held = "; ".join(found.describe()) or "0 files"
        other = any(name.lower().endswith(OTHER_SOUNDS) for name, _ in found.files)
        advice = ": convert them, as in `ffmpeg -i FILE FILE.wav`" if other else ""
        raise UserError(f"data={data}: no sounds among {held}; what is read: {' '.join(SOUND_SUFFIXES)}{advice}")
    files = found.choose(lambda name: name.lower().endswith(SOUND_SUFFIXES + captions.SUFFIXES + (".txt",)))
    absolute = root.resolve()
    advice = (
        "each sound needs a caption: a table captions.csv or captions.jsonl (file name first, caption in the column "
        f"{column!r}, --data_column names another), a text file x.txt beside x.wav, or --data_column={FROM_NAMES} to "
        "take the files' names"
    )
    return SoundSource(
        name_of_path(absolute),
        escape_undecodable(absolute.name),
        f"column {column}",
        "not known: your own files",
        [column, seconds, FOLDER_FORMAT, stat_all(files)],
        lambda log: _folder_items(data, root, found, column, seconds, log),
        advice,
    )


def _folder_items(data: str, root: Path, found: Found, column: str, seconds: float | None, log: Log) -> list[Item]:
    """The sounds of a folder that have captions; what the folder holds besides is named and counted."""
    found.report(counts := {})
    log.skipped.update(counts)
    log.reported |= counts.keys()
    files = dict(found.files)
    names = [name for name in files if name.lower().endswith(SOUND_SUFFIXES)]
    if column == FROM_NAMES:
        texts = {name: captions.Caption(re.sub("[_-]+", " ", Path(name).stem)) for name in names}
    else:
        texts = captions.find_captions(data, files, names, column, log.skip, root.resolve())
    splits = _splits(names, texts)
    items = []
    for name in names:
        if name not in texts:
            log.skip("sound without a caption", name)
        elif texts[name] is None:
            continue  # named with its caption
        elif splits and splits[name] is None:
            log.skip("sound of a test part beside the validation part that is held out", name)
        elif is_usable(caption := texts[name].text.strip(), name, log):
            load = functools.partial(_load_file, name, caption, files[name], seconds)
            size = 1 if seconds else files[name].stat().st_size
            items.append(Item(name, load, splits[name] if splits else None, size))
    return items


def _splits(names: list[str], texts: dict[str, captions.Caption | None]) -> dict[str, str | None] | None:
    """The split that a folder brings along, by sound: from a column of its tables, or from folders train/, test/."""
    said = {name: caption.split for name, caption in texts.items() if caption is not None}
    if said and None not in said.values():
        by_column = find_own_split(f"{split}/{name}" for name, split in said.items())
        if by_column:
            return {name: by_column.get(f"{said.get(name)}/{name}", "train") for name in names}
    return find_own_split(names)


def _load_file(name: str, caption: str, path: Path, seconds: float | None, rate: int, log: Log) -> Sound | None:
    wav = decode(path, name, rate, seconds, log)
    return None if wav is None else Sound(name, caption, wav)


def is_usable(caption: str, name: str, log: Log) -> bool:
    """Whether a caption says something and can be written as UTF-8; the log names one that does not."""
    broken = any(0xD800 <= ord(character) < 0xE000 for character in caption)  # lone surrogates; JSON may hold them too
    if broken or not caption:
        log.skip("caption that is not UTF-8" if broken else "empty caption", name)
    return not broken and bool(caption)


# ---------------------------------------------------------------------------------------------------------------------
# the hub


def _plan_hub(settings: Settings) -> SoundSource:
    name = settings.data.removeprefix("hf:")
    if not name:
        raise UserError("data=hf: lacks the dataset's name, as in hf:ashraq/esc50")
    options = dict(
        column=settings.data_column,
        audio_column=settings.data_audio_column,
        split=settings.data_split,
        config=settings.data_config,
        limit=settings.data_limit or HUB_SOUNDS,
    )
    return SoundSource(
        *hub.describe_source(name, options, settings.clip_seconds),
        lambda log: _hub_items(name, options, settings.clip_seconds, log),
        hub.ADVICE,
    )


def _hub_items(name: str, options: dict, seconds: float | None, log: Log) -> list[Item]:
    """Stream the rows once, their encoded sounds into a nameless file: they are read in two orders afterwards."""
    items: list[Item] = []
    spool = None
    for place, _, held, (caption, raw) in hub.stream_rows(
        name, options, "sounds", lambda stream: _hub_rows(name, stream, options)
    ):
        if raw is None:
            log.skip("caption without its sound", place)
        elif is_usable(caption, place, log):
            if spool is None:  # the items read it, and it goes with them
                spool = tempfile.TemporaryFile(dir=base_dir() / "data")  # noqa: SIM115
            where = spool.tell(), spool.write(raw)
            load = functools.partial(_load_spooled, place, caption, spool, where, seconds)
            items.append(Item(place, load, held, 1 if seconds else where[1]))
    return items


def _hub_rows(name: str, stream, options: dict) -> Iterator[tuple[str, bytes | None]]:
    """(caption, encoded sound or None) of every row."""
    try:
        import datasets
        import fsspec  # datasets' own access to files in archives and on the hub
    except ImportError as error:
        raise UserError(f"data=hf:{name} needs the datasets package: pip install datasets ({error})") from error

    class Undecoded(datasets.Audio):
        """Bytes and paths as they are: the original asks for torchcodec even where nothing is to be decoded."""

        def encode_example(self, value):
            return {"bytes": None, "path": value} if isinstance(value, str) else value

    column, audio = options["column"], options["audio_column"]
    _check_columns(name, stream.features, audio, column)
    for record in stream.select_columns([audio, column]).cast_column(audio, Undecoded(decode=False)):
        caption, value = get_text(record, column, f"hf:{name}").strip(), record[audio] or {}
        raw = value.get("bytes")
        if raw is None and value.get("path"):
            with fsspec.open(value["path"], "rb") as file:
                raw = file.read()
        yield caption, raw


def _check_columns(name: str, features: dict | None, audio: str, column: str) -> None:
    """UserError unless a hub dataset has a column of sounds and one of captions."""
    import datasets

    if features is None:
        raise UserError(f"data=hf:{name} does not say what its columns hold: choose another dataset, or pass a folder")
    sounds = [key for key, kind in features.items() if isinstance(kind, datasets.Audio)]
    if not sounds:
        first = "ytid" if "ytid" in features else "id"
        raise UserError(
            f"data=hf:{name} has captions but no sounds (columns {', '.join(features)}): obtain the clips yourself, "
            f"put them into a folder as <{first}>.wav beside a captions.csv with the columns {first} and {column}, "
            "and pass that folder as --data"
        )
    if audio not in sounds:
        raise UserError(
            f"data=hf:{name} has no sounds in column {audio!r}{nearest_name(audio, sounds)}: choose with "
            "--data_audio_column"
        )
    if column not in features:
        others = [key for key in features if key not in sounds]
        raise UserError(
            f"data=hf:{name} has no column {column!r}{nearest_name(column, others)}: choose the captions with "
            "--data_column"
        )


def _load_spooled(
    name: str, caption: str, spool: BinaryIO, place: tuple[int, int], seconds: float | None, rate: int, log: Log
) -> Sound | None:
    start, size = place
    spool.seek(start)
    wav = decode(io.BytesIO(spool.read(size)), name, rate, seconds, log)
    return None if wav is None else Sound(name, caption, wav)


# ---------------------------------------------------------------------------------------------------------------------
# decoding


def decode(file: Path | io.BytesIO, name: str, rate: int, seconds: float | None, log: Log) -> np.ndarray | None:
    """The first `seconds` (None: LONGEST) of a sound as float32 [samples], one channel at `rate` Hz.

    None, and a word in the log, for a sound that is empty, truncated, unreadable, silent (peak below -80 dB), not
    finite, or of an absurd sample rate. No more is decoded than asked for.
    """
    soundfile = import_optional("soundfile", "to decode sounds")
    seconds = seconds or LONGEST
    try:
        with open(file, "rb") if isinstance(file, Path) else nullcontext(file) as raw:
            if not raw.seek(0, os.SEEK_END):
                return log.skip("empty sound", name)
            if count_trailing_bytes(raw) > (1 - WHOLE) * raw.seek(0, os.SEEK_END):
                log.alter("longer than its header says, which alone is read", name)
            if is_cut_ogg(raw):
                return log.skip("truncated", name)
            view = repair_header(raw)
            # a path where nothing is to be mended: libsndfile reads it faster, and knows some formats by the suffix
            with soundfile.SoundFile(file if view is raw and isinstance(file, Path) else view) as sound:
                given, channels = sound.samplerate, sound.channels
                if not RATES[0] <= given <= RATES[1]:
                    return log.skip("absurd sample rate", name, f"{given} Hz")
                if lacking := _missing_share(sound.extra_info):
                    if lacking > 1 - WHOLE:
                        return log.skip("truncated", name)
                    log.alter("a little shorter than its header says", name)
                wanted = max(1, round(seconds * given))
                blocks, length = _read_blocks(sound, wanted)
                if length <= wanted and length < WHOLE * sound.frames and sound.frames < UNKNOWN_FRAMES:
                    return log.skip("truncated", name)
    except (soundfile.SoundFileError, OSError) as error:
        return log.skip("unreadable", name, first_line(error))
    if not length:
        return log.skip("empty sound", name)
    wav = np.concatenate(blocks)
    if length > wanted:
        wav = wav[:wanted]
        log.alter(f"cut to {seconds:g} s", name)
    if not np.isfinite(wav).all():
        return log.skip("samples that are no numbers", name)
    peak = np.abs(wav).max()
    if peak < SILENT:
        return log.skip("silent", name)
    if channels > 1:
        log.alter("several channels mixed to one", name)
    if peak > 1:
        wav /= peak
        log.alter("louder than full scale, turned down", name)
    return resample(wav, given, rate)


def _read_blocks(sound, wanted: int) -> tuple[list[np.ndarray], int]:
    """Blocks of samples, float32 mixed to one channel, up to just over `wanted` of them; and how many they hold."""
    blocks, length = [], 0
    if sound.frames >= UNKNOWN_FRAMES:  # FLAC from a pipe: soundfile would seek past the end, and fail
        sound.seekable = lambda: False
    while length <= wanted and len(block := sound.read(max(1, BLOCK // sound.channels), "float32", always_2d=True)):
        blocks.append(block.mean(axis=1))
        length += len(block)
    return blocks, length


def _missing_share(facts: str) -> float:
    """The part of the announced bytes that libsndfile did not find; 0 where a pipe's writer announced no length."""
    sizes = re.search(r"(?:data|SSND|Data Size)\s*: (\d+) \(should be (\d+)\)", facts)
    if not sizes or not 0 < int(sizes[1]) < PLACEHOLDER:
        return 0.0
    return max(0, int(sizes[1]) - int(sizes[2])) / int(sizes[1])


def is_cut_ogg(file: BinaryIO) -> bool:
    """Whether an Ogg file ends within a page, or before the page that is marked as the last (RFC 3533)."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    if file.read(4) != b"OggS":
        return False
    start = max(0, size - 2 * OGG_PAGE)
    file.seek(start)
    tail = file.read()
    place = tail.rfind(b"OggS\0")
    page = tail[place:]
    if place < 0 or len(page) < 27 or len(page) < 27 + page[26]:
        return True
    return len(page) < 27 + page[26] + sum(page[27 : 27 + page[26]]) or not page[5] & 4


def resample(wav: np.ndarray, given: int, rate: int) -> np.ndarray:
    """float32 [samples] at `given` Hz as float32 at `rate` Hz."""
    if given == rate:
        return wav
    return import_optional("soxr", "to change sample rates").resample(wav, given, rate).astype(np.float32, copy=False)


def import_optional(module: str, purpose: str):
    """An optional module, imported; UserError says how to install it."""
    import importlib

    try:
        return importlib.import_module(module)
    except (ImportError, OSError) as error:  # OSError: a library that it wraps
        raise UserError(
            f"{module} is needed {purpose} ({first_line(error)}): pip install -c constraints.txt -e '.[audio]'"
        ) from error
