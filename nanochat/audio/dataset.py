"""Captioned sounds become documents with codes, mixed with text: what `dataset.prepare_for` writes as shards.

The codec is fitted on a bounded sample of the training sounds, or opened; every sound is decoded and encoded in one
pass, so that memory holds a batch of them and no more.
"""

import dataclasses
import hashlib
import json
import logging
import math
from collections import Counter
from collections.abc import Iterable, Iterator

import numpy as np

from nanochat.audio import codec_files, fitted_codec
from nanochat.audio import codecs as audio
from nanochat.audio.sources import Item, Log, Sound, SoundSource, plan_sounds
from nanochat.audio.spectra import SAMPLE_RATE
from nanochat.config.settings import Settings
from nanochat.data.dataset import SPLITS, Dataset, Document, format_skipped
from nanochat.data.local_sources import Source, digest, slugify, stat_all
from nanochat.data.splits import SHARE, is_held_out, is_sane
from nanochat.system import logs
from nanochat.system.environment import UserError, base_dir, expand_user

logger = logging.getLogger(__name__)

FIT_SECONDS = 600  # of sound that a codec is fitted on
FIT_PIECE = 30  # seconds taken of one sound, so that a long one is not the whole sample
BATCH = 1 << 20  # samples encoded together, of sounds of equal length
BYTES_PER_POSITION = 3  # of text: about what a small tokenizer gives, so that a mix can be planned without one
COPY = "held-out sound with the codes of a training sound"
FORMAT = 1  # part of the state: raise it when the same sounds would give other codes


def plan_audio(settings: Settings, text: Dataset | None) -> Source:
    """The documents of the sounds that `data` names, each with its codes, and of text-only documents among them.

    text: what text_data names, so much of it that it takes `text_share` of the positions of each split; a code counts
    as one position, and so do BYTES_PER_POSITION bytes of a caption or text.
    """
    sounds = plan_sounds(settings)
    codes = settings.modality_codes()["audio"]
    plan = {
        "codec": [_codec_state(settings, codes), settings.codebooks, codes],
        "sounds": sounds.state,
        "text": text and [text.fingerprint["sha256"], settings.text_share],
        "format": FORMAT,
    }
    # The folder's name distinguishes settings; the state distinguishes contents.
    limit = settings.data_limit if settings.data == "synth" or settings.data.startswith("hf:") else None
    chosen = [settings.codec, settings.data_column, settings.clip_seconds, limit]
    chosen += [settings.text_data, settings.text_share] if text else []
    shape = f"{slugify(settings.codec.rpartition('/')[2].rpartition(':')[2])}-{settings.codebooks}x{codes}"
    manifest: dict = {"codec": {"codebooks": settings.codebooks, "codes": codes}}
    return Source(
        f"{sounds.name}-{shape}-{digest(json.dumps(chosen))[:8]}",
        sounds.source,
        f"{sounds.version}, codec {settings.codec} {settings.codebooks} x {codes}",
        sounds.licence if text is None else f"{sounds.licence}; text: {text.manifest['licence']}",
        plan,
        lambda counts: _documents(settings, sounds, codes, text, manifest, counts),
        least_bytes=0,
        manifest=manifest,
    )


def _codec_state(settings: Settings, codes: int) -> object:
    """What distinguishes codecs without loading a large one: a fitted one's hash, an EnCodec's files or hub name."""
    if settings.codec in codec_files.KINDS:
        return settings.codec
    if not settings.codec.startswith("encodec:"):
        return audio.open_codec(settings.codec, settings.codebooks, codes).hash
    folder = expand_user(settings.codec.removeprefix("encodec:"), "codec")
    files = sorted((path.name, path) for path in folder.iterdir()) if folder.is_dir() else []
    return [settings.codec, stat_all(files)]


def _documents(
    settings: Settings, sounds: SoundSource, codes: int, text: Dataset | None, manifest: dict, counts: Counter
) -> Iterator[Document]:
    """Every captioned sound as a document, in the source's order within its split, and text where it is due.

    A held-out sound whose codes equal those of a training sound (a copy, or one that the codec cannot tell from it) is
    skipped: the model would be scored on what it was trained on. Completes the manifest.
    """
    log = Log(counts)
    items = _assign_splits(sounds.fetch(log), sounds.source, manifest)
    counts["files"] = len(items)
    opened = audio.open_codec(settings.codec, settings.codebooks, codes)
    codec = opened or _fit_codec(settings, sounds, items, codes, log)
    manifest["codec"] = _save_codec(codec)
    clips: Counter = Counter()  # by split

    def documents() -> Iterator[Document]:
        trained: set[str] = set()  # hashes of the codes in the training split, which comes first for this reason
        splits = {split: [item for item in items if item.split == split] for split in SPLITS}
        for split, chosen in splits.items():
            loaded = (item.load(codec.sample_rate, log) for item in chosen)
            for sound, coded in _encode_sounds(codec, loaded, f"{len(chosen):,} {split}"):
                key = hashlib.sha256(repr(coded.shape).encode() + coded.tobytes()).hexdigest()
                if split == "train":
                    trained.add(key)
                elif key in trained:
                    log.skip(COPY, sound.name)
                    continue
                clips[split] += 1
                yield Document(sound.name, sound.caption, coded, sound.attributes, split)

    yield from documents() if text is None else _mix_text(documents(), text, settings.text_share)
    log.close()
    manifest["altered"] = dict(sorted(log.altered.items()))
    _check_enough(settings, sounds, clips, counts)


def _assign_splits(items: list[Item], sounds: str, manifest: dict) -> list[Item]:
    """The items of the source `sounds`, each with its split: the source's own, or by the hash of its name.

    Names of a few sounds, or of one that is most of the data, may hold out next to nothing or nearly all. Outside the
    bounds of is_sane() sounds are held out in their order instead, whenever that keeps a tenth of the bytes.
    """
    splits = [item.split or ("val" if is_held_out(item.name) else "train") for item in items]
    sizes = dict.fromkeys(SPLITS, 0)
    for item, split in zip(items, splits, strict=True):
        sizes[split] += item.size
    if not any(item.split for item in items) and len(items) > 1 and not is_sane(sizes):
        seen = held = 0
        for place, item in enumerate(items):
            seen += item.size
            splits[place] = "val" if held + item.size / 2 <= SHARE * seen else "train"
            held += item.size * (splits[place] == "val")
        if not held:  # fewer than ten, or one that is most
            splits[min(range(len(items)), key=lambda place: items[place].size)] = "val"
        share = sizes["val"] / max(1, sum(sizes.values()))
        manifest["split_rule"] = (
            f"names would hold out {share:.1%} of the sounds: {splits.count('val')} of {len(items)} are held out by "
            "size, in their order"
        )
    elif any(item.split for item in items) and sounds != "synth":
        manifest["split_rule"] = f"its own split: {splits.count('val')} of {len(items)} sounds are held out"
    return [dataclasses.replace(item, split=split) for item, split in zip(items, splits, strict=True)]


def _mix_text(sounds: Iterable[Document], text: Dataset, share: float) -> Iterator[Document]:
    """The sounds' documents, and after each the text-only ones that are due in its split, whole."""
    texts = {split: _shuffled(text, split) for split in SPLITS}
    due = dict.fromkeys(SPLITS, 0.0)  # positions of text owed to a split
    for sound in sounds:
        yield sound
        split = sound.split
        due[split] += share / (1 - share) * (sound.codes.size + len(sound.text.encode()) / BYTES_PER_POSITION)
        while due[split] > 0:
            name, words = next(texts[split], (None, ""))
            if name is None:
                logger.info(f"data: {text.name} has no more {split} text: its share will be below text_share={share}")
                due[split] = -math.inf
            else:
                due[split] -= len(words.encode()) / BYTES_PER_POSITION
                yield Document(name, words, split=split)


def _shuffled(text: Dataset, split: str) -> Iterator[tuple[str, str]]:
    """(name, text) of a split in the order of their names' hashes, shard by shard."""
    for shard in sorted(text.shards(split), key=lambda path: digest(path.name)):
        yield from sorted(text.read(shard), key=lambda document: digest(document[0]))


def _encode_sounds(codec, sounds: Iterable[Sound | None], total: str) -> Iterator[tuple[Sound, np.ndarray]]:
    """Each sound with its codes [T, Q]; neighbours of equal length are encoded together."""
    batch: list[Sound] = []
    done = 0

    def flush() -> Iterator[tuple[Sound, np.ndarray]]:
        nonlocal done
        if batch:
            wavs = np.stack([sound.wav for sound in batch])
            yield from ((sound, codes.T) for sound, codes in zip(batch, codec.encode_batch(wavs), strict=True))
            if done // 1000 != (done := done + len(batch)) // 1000:
                logger.info(f"data: encoded {done:,} of {total} sounds")
            batch.clear()

    for sound in sounds:
        if sound is not None:
            size = len(sound.wav)
            if batch and (size != len(batch[0].wav) or size * (len(batch) + 1) > BATCH):
                yield from flush()
            batch.append(sound)
    yield from flush()


def _fit_codec(settings: Settings, sounds: SoundSource, items: list[Item], codes: int, log: Log):
    """A codec fitted on FIT_SECONDS of the training split, drawn over the whole source by the hash of the names."""
    rate, room = SAMPLE_RATE, FIT_SECONDS * SAMPLE_RATE
    unused = Log()
    pieces = []
    for item in sorted(items, key=lambda item: digest(item.name)):
        if item.split != "train":
            continue
        with logs.muted():  # the pass that encodes logs what it skips
            sound = item.load(rate, unused)
        if sound is not None:
            pieces.append(sound.wav[: min(room, FIT_PIECE * rate)])
            room -= len(pieces[-1])
            if not room:
                break
    if not pieces:
        loaded = Counter(item.split for item in items if item.load(rate, log) is not None)
        _check_enough(settings, sounds, loaded, log.skipped)
    seconds = sum(map(len, pieces)) / rate
    logger.info(f"data: fitting a codec {settings.codec} on {seconds:.0f} s of {len(pieces)} sounds")
    return fitted_codec.fit_codec(settings.codec, pieces, settings.codebooks, codes)


def _save_codec(codec) -> dict:
    """Save a codec below base_dir()/codecs unless it is there; returns its entry for the manifest."""
    place = codec.save(audio.codec_folder(codec))
    keys = ("name", "hash", "codebooks", "codes", "frame_rate", "sample_rate")
    return {key: getattr(codec, key) for key in keys} | {"directory": place.relative_to(base_dir()).as_posix()}


def _check_enough(settings: Settings, sounds: SoundSource, clips: Counter, counts: Counter) -> None:
    """UserError with all counts unless most sounds can be read and both splits have some; clips: number by split."""
    found = f"{counts['files']} captioned sounds{format_skipped(counts)}"
    if 2 * sum(counts[kind] for kind in ("unreadable", "truncated", "empty sound")) > counts["files"] > 0:
        raise UserError(f"data={settings.data}: most of {found} cannot be read: is the folder or download complete?")
    if not clips["train"]:
        raise UserError(f"data={settings.data}: no sound to train on among {found}: {sounds.advice}")
    if not clips["val"]:
        finer = " or a finer codec (--codebooks, --modalities)" if counts[COPY] else ""
        raise UserError(
            f"data={settings.data}: no sound is held out among {found}; about one name in ten is: give more sounds"
            f"{finer}"
        )
