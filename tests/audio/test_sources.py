"""Captioned sounds of every layout are found; what cannot be used is named, counted and skipped, never a traceback."""

import json
import os
import struct
import sys
import tracemalloc
import wave
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile

from nanochat.audio import synth as synth_audio
from nanochat.audio.sources import Log, Sound, decode, holds_sounds, plan_sounds
from nanochat.config.settings import Settings
from nanochat.data.hub import Unreachable
from nanochat.system.environment import UserError, base_dir
from tests.messages import no_messages, record_messages

RATE = 16000


@pytest.fixture(autouse=True)
def base(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    (tmp_path / "base" / "data").mkdir(parents=True)


def tone(seconds: float = 0.1, rate: int = RATE, hertz: float = 440.0) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def write_sound(path: Path, wav: np.ndarray | None = None, rate: int = RATE, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, tone(rate=rate) if wav is None else wav, rate, **options)
    return path


def read_all(lines: list | None = None, **settings) -> tuple[dict[str, Sound], Log]:
    """Every sound of a source at 16 kHz by name, and what was noted."""
    log = Log()
    with record_messages(lines):
        source = plan_sounds(Settings(modalities="audio:64", **settings))
        sounds = [sound for item in source.fetch(log) if (sound := item.load(RATE, log)) is not None]
        log.close()
    assert len({sound.name for sound in sounds}) == len(sounds)
    return {sound.name: sound for sound in sounds}, log


# ---------------------------------------------------------------------------------------------------------------------
# where captions come from


def table(kind: str, columns: tuple[str, str], rows: dict[str, str]) -> str:
    if kind == "jsonl":
        return "".join(json.dumps(dict(zip(columns, row, strict=True))) + "\n" for row in rows.items())
    mark = "\t" if kind == "tsv" else ","
    return "".join(mark.join(f'"{cell}"' for cell in row) + "\r\n" for row in [columns, *rows.items()])


@pytest.mark.parametrize(
    ("name", "columns", "column"),
    [
        ("metadata.csv", ("file_name", "text"), "text"),
        ("metadata.jsonl", ("file_name", "text"), "text"),
        ("captions.csv", ("ytid", "caption"), "caption"),
        ("captions.jsonl", ("path", "text"), "text"),
        ("any.tsv", ("sound", "text"), "text"),
    ],
)
@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("suffix", ["", ".wav"])
def test_tables(tmp_path, name, columns, column, mark, suffix):
    """Red when utf-8-sig becomes utf-8, the first column is not taken for file names, or a lacking suffix not borne."""
    for sound in ("one", "sub/two"):
        write_sound(tmp_path / "in" / f"{sound}.wav")
    rows = {f"one{suffix}": "a tone, high", f"sub/two{suffix}": "Ärger\u2028with two lines"}
    (tmp_path / "in" / name).write_text(mark + table(name.rpartition(".")[2], columns, rows), encoding="utf-8")
    sounds, log = read_all(data=str(tmp_path / "in"), data_column=column)
    assert {key: sound.caption for key, sound in sounds.items()} == dict(
        zip(("one.wav", "sub/two.wav"), rows.values(), strict=True)
    )
    assert not log.skipped


def test_the_file_name_column_need_not_be_first_and_tables_lie_in_subfolders(tmp_path):
    """Red when a table's file names are relative to the root, the first column wins, or a BOM joins its name."""
    for split in ("train", "test"):
        write_sound(tmp_path / "in" / split / "a.wav")
        (tmp_path / "in" / split / "metadata.csv").write_text(f"\ufefftext,file_name\nof {split},a.wav\n")
    sounds, _ = read_all(data=str(tmp_path / "in"))
    assert {name: sound.caption for name, sound in sounds.items()} == {
        "train/a.wav": "of train",
        "test/a.wav": "of test",
    }


def test_text_files_and_file_names(tmp_path):
    """x.txt beside x.wav; names only when asked for. Red when names are a silent last resort."""
    for name in ("kick_drum-1.5", "snare"):
        write_sound(tmp_path / "in" / f"{name}.flac")
    (tmp_path / "in" / "snare.txt").write_bytes(b"\xef\xbb\xbfa snare\n")
    sounds, log = read_all(data=str(tmp_path / "in"))
    assert {name: sound.caption for name, sound in sounds.items()} == {"snare.flac": "a snare"}
    assert log.skipped == {"sound without a caption": 1}
    sounds, log = read_all(data=str(tmp_path / "in"), data_column="file_name")
    assert sorted(sound.caption for sound in sounds.values()) == ["kick drum 1.5", "snare"]
    assert not log.skipped


def test_synth(tmp_path):
    """The clips are synth_audio's own, and their sounds decide the split. Red when an item's split is None."""
    sounds, log = read_all(data="synth", data_limit=12, clip_seconds=0.5)
    assert list(sounds) == [f"synth/{i}" for i in range(12)]
    assert not log.skipped
    for i, sound in enumerate(sounds.values()):
        clip = synth_audio.clip(i, seconds=0.5)
        assert np.array_equal(sound.wav, clip.wav)
        assert sound.caption == clip.caption
        assert sound.attributes == clip.attributes
    items = plan_sounds(Settings(modalities="audio:64", data="synth", data_limit=100, clip_seconds=0.5)).fetch(log)
    for i, item in enumerate(items):
        clip = synth_audio.clip(i, seconds=0.5)
        assert item.split == ("val" if synth_audio.is_held_out(clip.attributes, 0.5) else "train")
    assert Counter(item.split for item in items)["val"] > 10


# ---------------------------------------------------------------------------------------------------------------------
# what a folder holds


def splits_of(folder: Path) -> tuple[dict, Log]:
    log = Log()
    items = plan_sounds(Settings(modalities="audio:64", data=str(folder))).fetch(log)
    return {item.name: item.split for item in items}, log


def test_linked_folders_are_read_and_other_files_named(tmp_path):
    """Red when os.walk lists the folder without following links, or sounds of other kinds go unsaid."""
    for name in ("in/a.wav", "elsewhere/b.opus", "elsewhere/deep/c.au", "elsewhere/d.aiff"):
        kind = dict(format="OGG", subtype="OPUS") if name.endswith("opus") else {}
        write_sound(tmp_path / name, rate=48000, **kind)
        (tmp_path / name).with_suffix(".txt").write_text(f"caption of {name}")
    (tmp_path / "in" / "more").symlink_to(tmp_path / "elsewhere")
    for name in ("e.m4a", "f.m4a", "g.pdf"):
        (tmp_path / "in" / name).write_bytes(b"x")
    (tmp_path / "in" / "e.txt").write_text("caption of e")
    lines = []
    sounds, log = read_all(lines, data=str(tmp_path / "in"))
    assert sorted(sounds) == ["a.wav", "more/b.opus", "more/d.aiff", "more/deep/c.au"]
    assert log.skipped == {"of other kinds": 3, "text file without its sound": 1}
    assert "data: 3 files not read: 2 .m4a (e.m4a, f.m4a), 1 .pdf (g.pdf)" in lines
    assert "data: 'e.txt': text file without its sound: skipped" in lines


def test_what_cannot_be_read_is_skipped_by_name(tmp_path, monkeypatch):
    """A subfolder only under skip_corrupt, a caption like a sound always. Red when skip_corrupt does not reach the
    walk, or the caption's error ends the preparation."""
    for name in ("a.wav", "b.wav", "locked/c.wav"):
        write_sound(tmp_path / "in" / name)
        (tmp_path / "in" / name).with_suffix(".txt").write_text(f"caption of {name}")
    (tmp_path / "in" / "b.txt").unlink()
    (tmp_path / "in" / "b.txt").symlink_to("/proc/self/mem")  # opens, and no read succeeds
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "locked" and access(path, mode))
    with pytest.raises(UserError, match=r"in/locked cannot be read .*--skip_corrupt=True"):
        read_all(data=str(tmp_path / "in"))
    sounds, log = read_all(data=str(tmp_path / "in"), skip_corrupt=True)
    assert sorted(sounds) == ["a.wav"]
    assert log.skipped == {"unreadable": 1, "caption that cannot be read": 1}


def test_a_folder_of_other_sounds_says_how_to_convert_them(tmp_path):
    """Red when only the suffixes that are read make a folder one of sounds."""
    (tmp_path / "in").mkdir()
    for name in ("a.m4a", "a.txt"):
        (tmp_path / "in" / name).write_text("x")
    assert holds_sounds(str(tmp_path / "in"))
    with pytest.raises(UserError, match=r"1 \.m4a \(a\.m4a\).*ffmpeg -i FILE FILE\.wav"):
        read_all(data=str(tmp_path / "in"))


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        (("train", "test"), {"train": "train", "test": "val"}),
        (("train", "validation", "test"), {"train": "train", "validation": "val"}),
        (("train", "other"), {"train": None, "other": None}),
    ],
)
@pytest.mark.parametrize("column", [False, True])
def test_a_split_of_the_folders_own_is_kept(tmp_path, parts, expected, column):
    """By folders with a table each, or by the column `split` of one table. Red when _splits() is not asked."""
    rows = {part: [f"{part[:2]}{i}.wav" for i in range(3)] for part in parts}
    for part, names in rows.items():
        for name in names:
            write_sound(tmp_path / "in" / ("" if column else part) / name)
        if not column:
            table = "file_name,text\n" + "".join(f"{name},of {name}\n" for name in names)
            (tmp_path / "in" / part / "metadata.csv").write_text(table)
    if column:
        table = "".join(f"{name},{part},of {name}\n" for part, names in rows.items() for name in names)
        (tmp_path / "in" / "metadata.csv").write_text("file_name,split,text\n" + table)
    splits, log = splits_of(tmp_path / "in")
    found = {name: expected[part] for part, names in rows.items() for name in names if part in expected}
    assert {Path(name).name: split for name, split in splits.items()} == found
    assert sum(log.skipped.values()) == 3 * (len(parts) - len(expected))


# ---------------------------------------------------------------------------------------------------------------------
# decoding


@pytest.mark.parametrize(
    ("suffix", "rate", "options"),
    [
        ("wav", 8000, {"subtype": "PCM_U8"}),
        ("wav", 44100, {"subtype": "PCM_24"}),
        ("wav", 48000, {"subtype": "FLOAT"}),
        ("flac", 22050, {}),
        ("ogg", 32000, {}),
        ("mp3", 16000, {}),
        ("aiff", 11025, {}),
    ],
)
def test_any_format_gives_the_same_wave(tmp_path, suffix, rate, options):
    """Compared with the sine computed at 16 kHz. Red without the resampling, or with its rates exchanged."""
    path = write_sound(tmp_path / f"a.{suffix}", tone(0.5, rate), rate, **options)
    log = Log()
    wav = decode(path, "a", RATE, None, log)
    assert wav.dtype == np.float32
    assert wav.ndim == 1
    assert abs(len(wav) - RATE / 2) <= 1
    middle = slice(2000, 6000)
    assert np.abs(wav[middle] - tone(0.5)[middle]).max() < (0.1 if suffix in ("ogg", "mp3") else 0.02)


@pytest.mark.parametrize("codec", ["VORBIS", "OPUS"])
def test_an_ogg_that_was_cut_is_named(tmp_path, codec):
    """Within a page and at the end of one; libsndfile reads both without a word. Red without is_cut_ogg()."""
    path = write_sound(tmp_path / "a.ogg", tone(20, 48000), 48000, format="OGG", subtype=codec)
    raw = path.read_bytes()
    last = raw.rindex(b"OggS\0")
    assert 0 < last < len(raw)
    for size, expected in ((len(raw), {}), (len(raw) - 1, {"truncated": 1}), (last, {"truncated": 1})):
        path.write_bytes(raw[:size])
        log = Log()
        wav = decode(path, "a", 48000, None, log)
        assert (wav is None, log.skipped) == (bool(expected), expected)


def test_eight_bit_by_the_standard_library(tmp_path):
    with wave.open(str(tmp_path / "a.wav"), "wb") as file:
        file.setnchannels(1), file.setsampwidth(1), file.setframerate(RATE)
        file.writeframes(bytes([128, 192, 64, 0] * 100))
    with no_messages():
        wav = decode(tmp_path / "a.wav", "a", RATE, None, Log())
    assert wav[:4].tolist() == [0.0, 0.5, -0.5, -1.0]


def test_channels_are_mixed_and_long_sounds_cut(tmp_path):
    """Red when one channel is taken for all, or when the cut is at the wrong rate."""
    left, right = tone(1, 8000, 300), tone(1, 8000, 500)
    path = write_sound(tmp_path / "a.wav", np.stack([left, right], 1), 8000)
    log = Log()
    wav = decode(path, "a", 8000, 0.25, log)
    assert np.allclose(wav, (left + right)[:2000] / 2, atol=1e-4)
    assert log.altered == {"several channels mixed to one": 1, "cut to 0.25 s": 1}
    log = Log()
    assert len(decode(path, "a", 8000, 1.0, log)) == 8000
    assert "cut to 1 s" not in log.altered


def test_a_long_file_costs_no_more_than_its_part(tmp_path):
    """Ten hours in a sparse file. Red when decode() reads the file whole."""
    size = 10 * 3600 * 8000
    head = b"RIFF" + struct.pack("<I", size + 36) + b"WAVEfmt " + struct.pack("<IHHIIHH", 16, 1, 1, 8000, 8000, 1, 8)
    with open(tmp_path / "long.wav", "wb") as file:
        file.write(head + b"data" + struct.pack("<I", size))
        file.truncate(44 + size)
    tracemalloc.start()
    wav = decode(tmp_path / "long.wav", "long", 8000, 2.0, log := Log())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(wav) == 16000
    assert log.altered == {"cut to 2 s": 1}
    assert peak < 32e6


def test_a_sound_written_into_a_pipe_is_whole(tmp_path):
    """Its header announces 4 GB. Red without the bound in _cut_short."""
    raw = bytearray(write_sound(tmp_path / "a.wav").read_bytes())
    raw[40:44] = b"\xff" * 4
    (tmp_path / "a.wav").write_bytes(raw)
    with no_messages():
        assert len(decode(tmp_path / "a.wav", "a", RATE, None, Log())) == 1600


def test_flac_from_a_pipe_is_whole(tmp_path):
    """Its header says 0 samples, which means an unknown number. Red when soundfile may seek in it."""
    raw = bytearray(write_sound(tmp_path / "a.flac", tone(1)).read_bytes())
    raw[21] &= 0xF0
    raw[22:26] = bytes(4)  # the 36 bits of the total in STREAMINFO
    (tmp_path / "a.flac").write_bytes(raw)
    with no_messages():
        assert len(decode(tmp_path / "a.flac", "a", RATE, None, Log())) == RATE
    assert len(decode(tmp_path / "a.flac", "a", RATE, 0.25, Log())) == RATE // 4


# ---------------------------------------------------------------------------------------------------------------------
# bad input


def spoilt(folder: Path) -> dict[str, int]:
    """A folder with everything that can be wrong with a sound or its caption; returns kind -> number."""
    captions = {}

    def sound(name: str, wav: np.ndarray | None = None, rate: int = RATE, **options) -> Path:
        captions[name] = f"caption of {name}"
        return write_sound(folder / name, wav, rate, **options)

    sound("good.wav")
    sound("silent.wav", np.zeros(1600, np.float32))
    sound("whisper.wav", tone() * 1e-5, subtype="FLOAT")
    sound("anti.wav", np.stack([tone(), -tone()], 1))
    sound("nan.wav", np.where(np.arange(1600) == 800, np.nan, tone()), subtype="FLOAT")
    sound("infinite.wav", np.where(np.arange(1600) == 800, np.inf, tone()), subtype="FLOAT")
    sound("no samples.wav", np.zeros(0, np.float32))
    sound("slow.wav", rate=500), sound("fast.wav", rate=2_000_000)
    for name in ("cut.wav", "cut.flac", "cut.aiff", "cut.ogg", "cut.mp3"):
        path = sound(name, tone(2))
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    for name, content in {"empty.wav": b"", "noise.wav": bytes(range(256)) * 9, "text.mp3": b"no sound " * 99}.items():
        (folder / name).write_bytes(content)
        captions[name] = name
    write_sound(folder / "uncaptioned.wav")
    sound("blank.wav")
    captions["blank.wav"] = "  "
    sound("surrogate.wav")
    captions["surrogate.wav"] = "\ud800"
    write_sound(folder.parent / "outside.wav")
    captions |= {"absent.wav": "x", "../outside.wav": "x", str(folder / "good.wav"): "x", "C:\\a.wav": "x"}
    (folder / "song.m4a").write_bytes(b"of a kind that is not read")
    captions |= {"captions.jsonl": "not a sound", "song.m4a": "not one for us"}
    write_sound(folder / "latin.wav")
    (folder / "latin.txt").write_bytes(b"\xe4rger")
    sound("loud.wav", tone() * 4, subtype="FLOAT")
    rows = [*captions.items(), ("good.wav", "another caption")]
    (folder / "captions.jsonl").write_text("".join(json.dumps({"file": a, "text": b}) + "\n" for a, b in rows))
    return {
        "silent": 3,
        "samples that are no numbers": 2,
        "absurd sample rate": 2,
        "empty sound": 2,
        "truncated": 4,
        "unreadable": 3,
        "caption of a file that is no sound": 2,
        "sound without a caption": 1,
        "empty caption": 1,
        "caption that is not UTF-8": 2,
        "caption without its sound": 1,
        "path outside the folder": 2,
        "second caption of a sound": 2,
    }


def test_bad_input_is_named_and_counted(tmp_path):
    """Each kind by its name, nothing raised, nothing dropped unsaid.

    Red without any one of the checks in decode() and _captions(): its sound then counts elsewhere or comes through.
    """
    expected = spoilt(tmp_path / "in")
    lines = []
    sounds, log = read_all(lines, data=str(tmp_path / "in"))
    assert {name: sound.caption for name, sound in sounds.items()} == {
        "good.wav": "caption of good.wav",
        "loud.wav": "caption of loud.wav",
    }
    assert dict(log.skipped) == expected | {"of other kinds": 1}
    assert "data: 1 file not read: 1 .m4a (song.m4a)" in lines
    assert log.altered == {"louder than full scale, turned down": 1}
    assert np.abs(sounds["loud.wav"].wav).max() == 1.0
    for kind, number in expected.items():
        assert sum(f": {kind}" in line for line in lines) == number, kind
    assert "data: 'nan.wav': samples that are no numbers: skipped" in lines
    assert all("\n" not in line and len(line) < 500 for line in lines)


def test_the_first_of_a_kind_are_named_the_rest_counted(tmp_path):
    """Red when NAMED is not compared, or close() says nothing."""
    for number in range(17):
        write_sound(tmp_path / "in" / f"{number:02d}.wav", np.zeros(99, np.float32))
    write_sound(tmp_path / "in" / "good.wav")
    lines: list[str] = []
    sounds, log = read_all(lines, data=str(tmp_path / "in"), data_column="file_name")
    assert list(sounds) == ["good.wav"]
    assert log.skipped == {"silent": 17}
    assert lines == [f"data: '{i:02d}.wav': silent: skipped" for i in range(5)] + ["data: ... and 12 more: silent"]


def test_a_file_that_vanishes_is_unreadable(tmp_path):
    """Red when decode() looks at the file's size outside its try."""
    log = Log()
    assert decode(tmp_path / "gone.wav", "gone", RATE, None, log) is None
    assert log.skipped == {"unreadable": 1}


@pytest.mark.parametrize(
    ("files", "column", "words"),
    [
        ({}, "text", "no sounds among 0 files"),
        ({"a.wav": None, "captions.csv": "file,caption\na.wav,x\n"}, "captoin", "has no column 'captoin', did"),
        ({"a.wav": None, "captions.jsonl": '{"file": "a.wav", "text": 3}\n'}, "text", "holds int, not text"),
        ({"a.wav": None, "captions.jsonl": "{\n"}, "text", r"captions\.jsonl line 1 is not JSON"),
        ({"a.wav": None, "captions.jsonl": "[]\n"}, "text", "line 1 is not a JSON object"),
        ({"a.wav": None, "captions.csv": "file,text,text\na.wav,b,c\n"}, "text", "has 2 columns 'text'"),
        ({"a.wav": None, "captions.csv": "a1,b,c\na.wav,b,c\n"}, "caption", r"no header.*--data_column \(2, 3\)"),
        ({"a.wav": None, "captions.csv": b"file,text\na.wav,\xe4rger\n"}, "text", "is not UTF-8 .*iso-8859-1 -t UTF-8"),
        ({"a.wav": None, "a.csv": "", "b.jsonl": ""}, "text", r"captions in which of a\.csv, b\.jsonl"),
    ],
)
def test_bad_folders_are_one_line(tmp_path, files, column, words):
    folder = tmp_path / "in"
    folder.mkdir()
    for name, content in files.items():
        if content is None:
            write_sound(folder / name)
        else:
            (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=words) as caught:
        read_all(data=str(folder), data_column=column)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ("stdlib", "holds no sounds.*--text_data=stdlib"),
        ("/no/such/folder", "no such folder; one of synth"),
        (__file__, "is a file"),
        ("hf:", "lacks the dataset's name"),
        ("~nosuchuser/x", "cannot be looked up"),
    ],
)
def test_what_is_no_source_of_sounds(data, words):
    with pytest.raises(UserError, match=words):
        read_all(data=data)


def test_missing_libraries_are_one_line(tmp_path, monkeypatch):
    """Red when needed() lets the ImportError through."""
    write_sound(tmp_path / "in" / "a.wav", rate=8000)
    for module in ("soxr", "soundfile"):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(UserError, match=rf"{module} is needed .*pip install .*audio"):
            read_all(data=str(tmp_path / "in"), data_column="file_name")


# ---------------------------------------------------------------------------------------------------------------------
# hub datasets, read from local folders by the same library


def write_parquet(path: Path, rows: list[dict]) -> None:
    """As the hub's own datasets: encoded sounds inside, and the column marked as audio."""
    import datasets

    path.parent.mkdir(parents=True)
    kinds = datasets.Features({"sound": datasets.Audio(), "caption": datasets.Value("string")})
    table = pa.table({key: pa.array([row[key] for row in rows], kinds.arrow_schema.field(key).type) for key in kinds})
    pq.write_table(table.replace_schema_metadata(kinds.arrow_schema.metadata), path)


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))


def test_hub_dataset_with_sounds_inside(tmp_path, hub_cache):
    """Red when the bytes inside are not read, the limit is off by one, or a row without a sound is an error."""
    raw = [write_sound(tmp_path / f"{i}.wav", tone(0.1, hertz=200 + 50 * i)).read_bytes() for i in range(4)]
    raw[2] = b"no sound"
    rows = [{"sound": {"bytes": data, "path": None}, "caption": f"tone {i}"} for i, data in enumerate(raw)]
    rows += [{"sound": None, "caption": "nothing"}, {"sound": rows[0]["sound"], "caption": None}, rows[0]]
    write_parquet(tmp_path / "set" / "train.parquet", rows)
    lines = []
    source = f"hf:{tmp_path / 'set'}"
    sounds, log = read_all(lines, data=source, data_audio_column="sound", data_column="caption", data_limit=6)
    name = source.removeprefix("hf:")
    assert {key: sound.caption for key, sound in sounds.items()} == {f"{name}#{i}": f"tone {i}" for i in (0, 1, 3)}
    for i in (0, 1, 3):
        assert np.abs(sounds[f"{name}#{i}"].wav - tone(0.1, hertz=200 + 50 * i)).max() < 1e-4
    assert log.skipped == {"unreadable": 1, "caption without its sound": 1, "empty caption": 1}
    assert any("stopped after 6 sounds" in line for line in lines)
    assert not list((base_dir() / "data").iterdir())


def test_a_changed_local_dataset_is_met(tmp_path, hub_cache):
    """Red when the state of hf: is its name and options alone."""
    folder = tmp_path / "set"
    write_sound(folder / "0.wav")
    (folder / "metadata.csv").write_text("file_name,text\n0.wav,tone\n")

    def state():
        return plan_sounds(Settings(modalities="audio:64", data=f"hf:{folder}")).state

    first = state()
    assert state() == first
    write_sound(folder / "0.wav", tone(0.2))
    assert state() != first


@pytest.mark.parametrize("saved", [False, True])
def test_a_datasets_own_split_is_held_out(tmp_path, hub_cache, saved):
    """test/ of an audiofolder, and of a DatasetDict that was saved. Red when one split is read alone."""
    import datasets

    for split, count in (("train", 3), ("test", 2)):
        for i in range(count):
            write_sound(tmp_path / "set" / split / f"{i}.wav", tone(0.1, hertz=200 + 50 * i))
        rows = "".join(f"{i}.wav,{split} {i}\n" for i in range(count))
        (tmp_path / "set" / split / "metadata.csv").write_text(f"file_name,text\n{rows}")
    folder = tmp_path / "set"
    if saved:
        parts = {}
        for split in ("train", "test"):
            paths = sorted((folder / split).glob("*.wav"))
            rows = [
                {"sound": {"bytes": path.read_bytes(), "path": None}, "caption": f"{split} {path.stem}"}
                for path in paths
            ]
            write_parquet(tmp_path / split / "rows.parquet", rows)
            table = pq.read_table(tmp_path / split / "rows.parquet")
            parts[split] = datasets.Dataset(datasets.table.InMemoryTable(table))
        folder = tmp_path / "saved"
        datasets.DatasetDict(parts).save_to_disk(str(folder))
    log = Log()
    columns = dict(data_column="caption", data_audio_column="sound") if saved else {}
    settings = Settings(modalities="audio:64", data=f"hf:{folder}", data_limit=30, **columns)
    items = plan_sounds(settings).fetch(log)
    sounds = {item.name: (item.split, item.load(RATE, log).caption) for item in items}
    trained = {f"{folder}#{i}": ("train", f"train {i}") for i in range(3)}
    assert sounds == trained | {f"{folder}/test#{i}": ("val", f"test {i}") for i in range(2)}


@pytest.mark.parametrize("packed", [False, True])
def test_hub_dataset_of_files(tmp_path, hub_cache, packed):
    """An audiofolder, plain and in an archive. Red when only local paths are read, or with datasets.Audio itself."""
    folder = tmp_path / "set"
    for i in range(3):
        write_sound(folder / f"{i}.wav")
    (folder / "metadata.csv").write_text("file_name,text\n" + "".join(f"{i}.wav,tone {i}\n" for i in range(3)))
    if packed:
        with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
            for path in sorted(folder.iterdir()):
                archive.write(path, path.name)
                path.unlink()
        (tmp_path / "all.zip").rename(folder / "all.zip")
    sounds, log = read_all(data=f"hf:{folder}")
    assert sorted(sound.caption for sound in sounds.values()) == ["tone 0", "tone 1", "tone 2"]
    assert not log.skipped


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"data_column": "captoin", "data_audio_column": "sound"}, "'captoin', did you mean 'caption'.*--data_column"),
        ({"data_column": "caption"}, "no sounds in column 'audio' .*sound.*--data_audio_column"),
        ({"data_column": "caption", "data_audio_column": "caption"}, "no sounds in column 'caption'"),
        ({"data_split": "nonsense"}, "nonsense"),
    ],
)
def test_bad_hub_options(tmp_path, hub_cache, options, words):
    raw = write_sound(tmp_path / "a.wav").read_bytes()
    write_parquet(tmp_path / "set" / "train.parquet", [{"sound": {"bytes": raw, "path": None}, "caption": "a"}])
    with pytest.raises(UserError, match=words) as caught:
        read_all(data=f"hf:{tmp_path / 'set'}", **options)
    assert "\n" not in str(caught.value)


def test_captions_without_sounds_say_how_to_supply_them(tmp_path, hub_cache):
    """As MusicCaps: ids and times of videos. The folder that the message describes then works."""
    (tmp_path / "set").mkdir()
    row = {"ytid": "-0Gj8-vB1q4", "start_s": 30, "caption": "a low quality recording"}
    (tmp_path / "set" / "train.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(UserError, match=r"captions but no sounds.*<ytid>\.wav beside a captions\.csv.*--data"):
        read_all(data=f"hf:{tmp_path / 'set'}", data_column="caption")
    write_sound(tmp_path / "clips" / "-0Gj8-vB1q4.wav")
    (tmp_path / "clips" / "captions.csv").write_text(",".join(row) + "\n" + ",".join(map(str, row.values())) + "\n")
    sounds, _ = read_all(data=str(tmp_path / "clips"), data_column="caption")
    assert Counter(sound.caption for sound in sounds.values()) == {"a low quality recording": 1}


def test_no_network_is_one_line(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with pytest.raises(Unreachable, match=r"not here and http://127\.0\.0\.1:9 cannot be reached"):
        read_all(data="hf:some/sounds")
