"""Captioned sounds become shards of codes: the codec's own, mixed with text as asked, whole or not at all."""

import dataclasses
import json
import re
import subprocess
import sys
import wave
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile

from nanochat.audio import codecs as audio
from nanochat.audio import dataset as audio_dataset
from nanochat.audio import fitted_codec
from nanochat.config.config_file import read_config
from nanochat.config.settings import Settings, validate
from nanochat.data import dataset
from nanochat.data import prepare as prepare_module
from nanochat.data.dataset import Dataset, read_shard
from nanochat.data.encodings import Corrupt
from nanochat.data.local_sources import digest
from nanochat.data.prepare import prepare
from nanochat.data.splits import is_held_out
from nanochat.data_pipeline import prepare_for
from nanochat.system.environment import UserError, base_dir
from scripts import audio_data
from scripts import data as data_script
from tests.forked import Forked
from tests.messages import no_messages, record_messages

RATE = 16000
ROOT = Path(dataset.__file__).parents[2]


@pytest.fixture(autouse=True)
def base(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    return tmp_path / "base"


def a_sound(number: int) -> np.ndarray:
    """0.23 s, or 0.3 s for every fifth, of two partials and noise."""
    time = np.arange(4800 if number % 5 == 0 else 3680) / RATE
    noise = np.random.default_rng(number).normal(0, 0.05, len(time))
    return 0.3 * np.sin(2 * np.pi * (200 + 20 * number) * time) + 0.1 * np.sin(7000 * time) + noise


@pytest.fixture
def folder(tmp_path) -> Path:
    """30 sounds, some of them held out by the hash of their names, with captions."""
    (tmp_path / "in").mkdir()
    for number in range(30):
        soundfile.write(tmp_path / "in" / f"{number:02d}.wav", a_sound(number), RATE)
    rows = [{"file_name": f"{number:02d}.wav", "text": f"tone number {number}"} for number in range(30)]
    (tmp_path / "in" / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "in"


def settings_of(folder: Path | str, **changes) -> Settings:
    chosen = dict(data=str(folder), modalities="audio:16", codebooks=2, codec="mdct")
    return Settings(**{**chosen, **changes})


def clips_of(data: Dataset, split: str) -> list[tuple]:
    return [clip for shard in data.shards(split) for clip in data.read_clips(shard)]


# ---------------------------------------------------------------------------------------------------------------------
# sounds to codes


def test_codes_are_the_codecs_own(folder):
    """Every sound, decoded by the standard library and encoded alone by the codec that the manifest names.

    Red when batches mix up their sounds, codes are flattened codebook by codebook, or the split is not held_out.
    """
    data = prepare_for(settings_of(folder))
    codec = audio.load_codec(data.codec["directory"])
    assert (codec.name, codec.hash, codec.codebooks, codec.codes) == ("mdct", data.codec["hash"], 2, 16)
    assert (data.codec["name"], data.codec["frame_rate"], data.codec["sample_rate"]) == ("mdct", 50.0, RATE)
    assert (data.codec["codebooks"], data.codec["codes"]) == (2, 16)
    seen = []
    for split in ("train", "val"):
        for name, text, codes, attributes in clips_of(data, split):
            with wave.open(str(folder / name)) as file:
                wav = np.frombuffer(file.readframes(file.getnframes()), "<i2") / np.float32(2**15)
            assert codes.dtype == np.int64
            assert np.array_equal(codes.T, codec.encode(wav))
            assert text == f"tone number {int(name[:2])}"
            assert attributes is None
            assert (split == "val") == is_held_out(name)
            seen.append(name)
    assert sorted(seen) == [f"{number:02d}.wav" for number in range(30)]
    assert data.fingerprint["files"] == 30
    assert data.manifest["left_out"] == {} == data.manifest["altered"]
    total = {key: sum(e[key] for s in ("train", "val") for e in data.entries(s)) for key in ("clips", "codes")}
    assert total == {"clips": 30, "codes": 2 * sum(-(-len(a_sound(i)) // 320) for i in range(30))}


def test_shards_hold_frames_in_order_and_read_as_text_too(folder):
    """The documented columns, read by pyarrow alone. Red when the codes are widened, or read() needs them."""
    data = prepare_for(settings_of(folder))
    table = pq.read_table(data.shards("train")[0])
    assert table.schema.names == ["name", "text", "codes", "attributes"]
    assert table.schema.field("codes").type == pa.list_(pa.int16())
    for row, (name, text, codes, _) in zip(table.to_pylist(), clips_of(data, "train"), strict=True):
        assert (row["name"], row["text"], row["attributes"]) == (name, text, None)
        assert row["codes"] == [code for frame in codes.tolist() for code in frame]
    assert list(data.documents("train")) == [(name, text) for name, text, _, _ in clips_of(data, "train")]
    assert data.text_bytes("val") == sum(len(text.encode()) for _, text, _, _ in clips_of(data, "val"))
    assert data.verify() == 2


def test_many_codes_take_wider_integers(tmp_path):
    """Red when int16 is used for 40,000 codes: pyarrow would refuse to write them."""
    documents = [("a", "text", np.array([[39_999], [0]]), {"root": 60}, split) for split in ("train", "val")]
    documents = [dataset.Document(*document) for document in documents]
    entries = prepare_module._write_documents(documents, tmp_path, {"codebooks": 1, "codes": 40_000})
    assert [entry["codes"] for entry in entries] == [2, 2]
    (found,) = dataset.read_clips(tmp_path / "shard_00000.parquet", {"codebooks": 1, "codes": 40_000})
    assert found[2].tolist() == [[39_999], [0]]
    assert found[3] == {"root": 60}


def test_synth_keeps_attributes_and_its_split(monkeypatch):
    """Red when an unseen pair is trained on, or heard by the codec that is fitted, or attributes are dropped."""
    from nanochat.audio.synth import clip, is_held_out

    heard = []
    fit = fitted_codec.fit_codec
    monkeypatch.setattr(
        fitted_codec, "fit_codec", lambda kind, wavs, *rest, **more: heard.append(wavs) or fit(kind, wavs, *rest)
    )
    data = prepare_for(settings_of("synth", data_limit=40, clip_seconds=0.2))
    assert data.name.startswith("synth-mdct-2x16-")
    for split in ("train", "val"):
        for name, text, codes, attributes in clips_of(data, split):
            made = clip(int(name.rpartition("/")[2]), seconds=0.2)
            assert (text, attributes, len(codes)) == (made.caption, made.attributes, 10)
            assert (split == "val") == is_held_out(attributes, 0.2)
    assert len(heard[0]) == len(clips_of(data, "train"))
    unseen = [attributes["unseen"] for *_, attributes in clips_of(data, "val")]
    assert sum(unseen) == sum(entry["unseen"] for entry in data.entries("val")) > 0
    assert sum(entry["unseen"] for entry in data.entries("train")) == 0


@pytest.mark.parametrize("codec", ["pitch", "frame"])
def test_nothing_held_out_was_trained_on(codec):
    """Codes in the shards and the waveforms behind them. A coarse `frame` cannot tell some notes apart: such held-out
    sounds are counted out. Red when the clip's number decides the split, or when codes are not compared."""
    from nanochat.audio.synth import clip

    shape = {"modalities": "audio:128"} if codec == "pitch" else {"codebooks": 1}
    data = prepare_for(settings_of("synth", data_limit=200, clip_seconds=0.1, codec=codec, **shape))
    found = {split: clips_of(data, split) for split in ("train", "val")}
    codes = [{clip[2].tobytes() for clip in found[split]} for split in found]
    waves = [{clip(int(item[0][6:]), seconds=0.1).wav.tobytes() for item in found[split]} for split in found]
    assert not codes[0] & codes[1]
    assert not waves[0] & waves[1]
    assert min(map(len, waves)) > 5
    seen = sum(not attributes["unseen"] for *_, attributes in found["val"])
    assert seen > (10 if codec == "pitch" else 0)
    left = data.manifest["left_out"].get("held-out sound with the codes of a training sound", 0)
    assert sum(map(len, found.values())) + left == 200
    assert (left > 5) == (codec == "frame")


def test_a_copy_of_a_training_sound_is_not_held_out(folder):
    """Named and counted, wherever it stands in the order of names. Red when held-out sounds are encoded first."""
    copy, kept = (f"{number:02d}.wav" for number in range(30) if is_held_out(f"{number:02d}.wav"))
    assert not is_held_out("29.wav")
    assert copy < "29.wav"
    soundfile.write(folder / copy, a_sound(29), RATE)
    lines = []
    with record_messages(lines):
        data = prepare_for(settings_of(folder))
    assert [name for name, *_ in clips_of(data, "val")] == [kept]
    assert data.manifest["left_out"] == {"held-out sound with the codes of a training sound": 1}
    assert f"data: {copy!r}: held-out sound with the codes of a training sound: skipped" in lines
    soundfile.write(folder / kept, a_sound(28), RATE)
    with pytest.raises(UserError, match=r"no sound is held out .*2 held-out sound with.* a finer codec"):
        prepare_for(settings_of(folder))


def test_the_codec_learns_from_a_bounded_part_of_the_training_sounds(folder, monkeypatch):
    """Red when _split and held_out are not asked, when sounds come in the order of the files, or without the bound."""
    heard = []
    fit = fitted_codec.fit_codec

    def fitted(kind, sounds, *rest, **more):
        heard.append(list(sounds))
        return fit(kind, heard[-1], *rest, **more)

    monkeypatch.setattr(fitted_codec, "fit_codec", fitted)
    monkeypatch.setattr(audio_dataset, "FIT_SECONDS", 1)
    prepare_for(settings_of(folder))
    train = [number for number in range(30) if not is_held_out(f"{number:02d}.wav")]
    train.sort(key=lambda number: digest(f"{number:02d}.wav"))
    expected, room = [], RATE
    for number in train:
        expected.append(a_sound(number)[:room])
        room -= len(expected[-1])
        if not room:
            break
    assert len(expected) < len(train)
    assert len(expected[-1]) < 3680
    assert sum(map(len, heard[0])) == RATE
    for wav, wanted in zip(heard[0], expected, strict=True):
        assert np.abs(wav - wanted).max() < 1e-4


def test_a_fitted_codec_can_be_named(folder, monkeypatch):
    """Opened, not fitted. Red when open_codec's codec is replaced by a new fit."""
    first = prepare_for(settings_of(folder))
    monkeypatch.setattr(fitted_codec, "fit_codec", None)
    for named in (Path(first.codec["directory"]).name, first.codec["directory"]):
        again = prepare_for(settings_of(folder, codec=named))
        assert again.codec == first.codec
        assert again.directory != first.directory
        assert again.fingerprint["sha256"] == first.fingerprint["sha256"]
    with pytest.raises(UserError, match="2"):
        prepare_for(settings_of(folder, codec=named, codebooks=1))


# ---------------------------------------------------------------------------------------------------------------------
# prepared once


def test_an_unchanged_source_is_only_opened(folder, monkeypatch):
    """Red when the state holds anything that differs between two calls."""
    first = prepare_for(settings_of(folder))
    monkeypatch.setattr("nanochat.audio.sources.decode", None)
    with no_messages():
        again = prepare_for(settings_of(folder, depth=9))
    assert again.directory == first.directory
    assert again.manifest == first.manifest


@pytest.mark.parametrize(
    "change",
    [
        {"codebooks": 3},
        {"modalities": "audio:8"},
        {"codec": "frame"},
        {"clip_seconds": 0.1},
        {"data_column": "file_name"},
        {"text_data": "TEXT"},
        {"text_data": "TEXT", "text_share": 0.25},
    ],
)
def test_other_settings_give_another_folder(folder, corpus, change):
    """Red when a setting is left out of both the folder's name and its state."""
    change = {key: str(corpus) if value == "TEXT" else value for key, value in change.items()}
    before = {"text_data": str(corpus)} if "text_share" in change else {}
    first = prepare_for(settings_of(folder, **before))
    other = prepare_for(settings_of(folder, **change))
    assert other.directory != first.directory
    assert other.fingerprint["sha256"] != first.fingerprint["sha256"]
    with no_messages():
        assert prepare_for(settings_of(folder, **change)).directory == other.directory


def test_the_fingerprint_covers_codes_and_a_changed_sound_is_met(folder):
    """Same names and captions, one other sound. Red when the fingerprint takes texts alone, or the state no sounds."""
    first = prepare_for(settings_of(folder))
    soundfile.write(folder / "03.wav", a_sound(77), RATE)
    lines = []
    with record_messages(lines):
        other = prepare_for(settings_of(folder))
    assert "changed since it was prepared" in lines[0]
    assert other.fingerprint["sha256"] != first.fingerprint["sha256"]
    assert other.directory != first.directory
    assert [e["text_sha256"] for e in other.entries("train")] == [e["text_sha256"] for e in first.entries("train")]


def test_a_lost_codec_is_fitted_again(folder):
    """Red without codec_is_here: the dataset would open and nobody could listen."""
    first = prepare_for(settings_of(folder))
    for path in Path(first.codec["directory"]).iterdir():
        path.unlink()
    Path(first.codec["directory"]).rmdir()
    again = prepare_for(settings_of(folder))
    assert again.directory == first.directory
    assert audio.load_codec(again.codec["directory"]).hash == first.codec["hash"]


def test_a_kill_leaves_nothing_that_counts(folder, base):
    """Ended between the shards and the rename. Red when the scratch folder is the target."""
    code = (
        "import os\nfrom nanochat import data_pipeline\nfrom nanochat.config.settings import Settings\n"
        f"from nanochat.data import prepare\nprepare.commit_folder = lambda *a: os._exit(9)\n"
        f"data_pipeline.prepare_for(Settings(data={str(folder)!r}, "
        "modalities='audio:16', codebooks=2, codec='mdct'))\n"
    )
    process = Forked([sys.executable, "-c", code])
    assert process.wait(timeout=60) == 9, process.output()
    assert [path.name[0] for path in (base / "data").iterdir()] == ["."]
    assert len(clips_of(prepare_for(settings_of(folder)), "train")) > 20


# ---------------------------------------------------------------------------------------------------------------------
# the mix with text


@pytest.fixture
def text(tmp_path) -> Path:
    """400 one-line documents of about 60 bytes."""
    path = tmp_path / "lines.jsonl"
    path.write_text("".join(json.dumps({"text": f"line {i} says {i * i} " * 3}) + "\n" for i in range(400)))
    return path


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_text_takes_its_share_of_both_splits(folder, text, share):
    """Counted from the shards: a code is a position, and 3 bytes of text. Whole documents, of their own split.

    Red when the share is taken as a ratio to the sounds, or captions do not count, or val text is trained on.
    """
    data = prepare_for(settings_of(folder, text_data=str(text), text_share=share, data_column="text"))
    known = dict(prepare(str(text)).documents("train")), dict(prepare(str(text)).documents("val"))
    for split, documents in zip(("train", "val"), known, strict=True):
        clips = clips_of(data, split)
        alone = [(name, words) for name, words, codes, _ in clips if codes is None]
        assert alone
        assert all(documents[name] == words for name, words in alone)
        positions = np.cumsum([0] + [len(words) / 3 for _, words in alone])
        sounds = sum(codes.size + len(words) / 3 for _, words, codes, _ in clips if codes is not None)
        without_last, reached = positions[-2:] / (positions[-2:] + sounds)
        assert without_last < share <= reached
        order = [digest(name) for name, _ in alone]
        assert order == sorted(order)
        places = [place for place, clip in enumerate(clips) if clip[2] is None]
        assert len(clips) - len(places) > places[0]  # among the sounds, not behind them


def test_text_that_runs_out_is_said(folder, text):
    """Red when the end of the text ends the sounds, or is silent."""
    text.write_text("".join(json.dumps({"text": "short " * 60}) + "\n" for _ in range(40)))
    lines = []
    with record_messages(lines):
        data = prepare_for(settings_of(folder, text_data=str(text), text_share=0.9))
    assert sum("has no more train text" in line for line in lines) == 1
    assert sum(codes is not None for _, _, codes, _ in clips_of(data, "train")) == sum(
        not is_held_out(f"{number:02d}.wav") for number in range(30)
    )


# ---------------------------------------------------------------------------------------------------------------------
# what is wrong


def test_codes_outside_the_codebook_are_corrupt(folder):
    """Named with shard and document; left out when asked. Red without the comparison in read_clips."""
    data = prepare_for(settings_of(folder))
    shard = data.shards("train")[0]
    table = pq.read_table(shard).to_pylist()
    name = table[4]["name"]
    for codes, words in (
        ([16, 0], "0..16 are outside 0..15"),
        ([-1, 0], "-1..0 are"),
        ([0, 1, 2], "3 codes are no frames"),
    ):
        table[4]["codes"] = codes
        pq.write_table(pa.Table.from_pylist(table, pq.read_schema(shard)), shard)
        entry = next(entry for entry in data.manifest["files"] if entry["name"] == shard.name)
        entry["size"] = shard.stat().st_size
        with pytest.raises(Corrupt, match=rf"{shard.name} document {name}: .*{re.escape(words)}"):
            clips_of(data, "train")
    lines = []
    with record_messages(lines):
        lenient = Dataset(data.directory, data.manifest, skip_corrupt=True)
        assert clips_of(lenient, "train") == []
    assert list(lenient.skipped) == [shard.name]
    assert len(lines) == 1


def spoil(folder: Path, count: int, content: bytes) -> None:
    for path in sorted(folder.glob("*.wav"))[:count]:
        path.write_bytes(content)


def test_single_bad_sounds_are_counted_in_the_manifest(folder):
    """Red when the counts of the log do not reach left_out, or sounds of the fit are counted twice."""
    spoil(folder, 4, b"no sound")
    lines = []
    with record_messages(lines):
        data = prepare_for(settings_of(folder, clip_seconds=0.25))
    assert data.manifest["left_out"] == {"unreadable": 4}
    assert data.manifest["altered"] == {"cut to 0.25 s": 5}
    assert sum("unreadable" in line and ".wav" in line for line in lines) == 4


@pytest.mark.parametrize(
    ("count", "words"),
    [
        (16, r"most of 30 captioned sounds \(skipped: 16 unreadable\) cannot be read"),
        (30, r"most of 30 captioned sounds \(skipped: 30 unreadable\) cannot be read"),
    ],
)
def test_a_source_that_is_mostly_unreadable_is_an_error(folder, count, words):
    """Red when the shares of bad sounds are not compared."""
    spoil(folder, count, b"no sound")
    with pytest.raises(UserError, match=words):
        prepare_for(settings_of(folder))
    assert list((base_dir() / "data").iterdir()) == []


def test_nothing_left_is_one_line_with_all_counts(folder):
    """Silence everywhere, or captions for none. Red when a codec is fitted on nothing."""
    for path in folder.glob("*.wav"):
        soundfile.write(path, np.zeros(1600), RATE)
    with pytest.raises(UserError, match=r"no sound to train on among 30 captioned sounds \(skipped: 30 silent\)"):
        prepare_for(settings_of(folder))
    (folder / "captions.jsonl").write_text('{"file_name": "x.wav", "text": "x"}\n')
    words = r"among 0 captioned sounds \(skipped: 1 caption without its sound, 30 sound without a caption\): each sound"
    with pytest.raises(UserError, match=words) as caught:
        prepare_for(settings_of(folder))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["none", "most", "few"])
def test_names_that_hold_out_too_little_or_too_much_do_not_decide(folder, kind):
    """No sound, a long one that is most of the data, four sounds of which none. Red when names alone decide."""
    out = [path for path in sorted(folder.glob("*.wav")) if is_held_out(path.name)]
    if kind == "most":
        soundfile.write(out[0], np.concatenate([a_sound(number) for number in range(60)]), RATE)
    else:
        for path in out if kind == "none" else [p for p in folder.glob("*.wav") if p.name > "03.wav"]:
            path.unlink()
    lines = []
    with record_messages(lines):
        data = prepare_for(settings_of(folder))
    codes = {split: sum(len(clip[2]) for clip in clips_of(data, split)) for split in ("train", "val")}
    assert 0.02 < codes["val"] / sum(codes.values()) < (0.5 if kind == "few" else 0.15)
    assert kind != "most" or out[0].name in [name for name, *_ in clips_of(data, "train")]
    share = {"none": "0.0%", "few": "0.0%"}.get(kind, "6")
    assert any(f": names would hold out {share}" in line and "are held out by size" in line for line in lines)


def test_a_split_of_its_own_is_said(folder):
    """A column `split` of the table, in the shards and in the manifest. Red when the items' own split is not asked."""
    rows = [json.loads(line) for line in (folder / "captions.jsonl").read_text().splitlines()]
    rows = [row | {"split": "test" if 10 <= number < 15 else "train"} for number, row in enumerate(rows)]
    (folder / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with record_messages(lines := []):
        data = prepare_for(settings_of(folder))
    assert [name for name, *_ in clips_of(data, "val")] == [f"{number}.wav" for number in range(10, 15)]
    assert any("its own split: 5 of 30 sounds are held out" in line for line in lines)


def test_one_sound_cannot_be_split(folder):
    for path in sorted(folder.glob("*.wav"))[1:]:
        path.unlink()
    with pytest.raises(UserError, match="no sound is held out among 1 captioned sounds"):
        prepare_for(settings_of(folder, modalities="audio:8"))


def test_too_little_sound_for_the_codec(folder):
    with pytest.raises(UserError, match="cannot fill 4096 codes"):
        prepare_for(settings_of(folder, modalities="audio:4096"))
    assert list((base_dir() / "data").iterdir()) == []


def test_synth_needs_modalities():
    with pytest.raises(UserError, match="set modalities"):
        prepare_for(Settings(data="synth"))


# ---------------------------------------------------------------------------------------------------------------------
# scripts and recipe


def test_script(folder, text, capsys):
    """The figures agree with the shards. Red when seconds forget the codebooks."""
    flags = [
        f"--{key}={value}"
        for key, value in dataclasses.asdict(settings_of(folder)).items()
        if key in ("data", "modalities", "codebooks", "codec")
    ]
    data = audio_data.main([*flags, f"--text_data={text}", "--text_share=0.2"])
    out = capsys.readouterr().out
    train = [codes for _, _, codes, _ in clips_of(data, "train") if codes is not None]
    assert re.search(
        rf"train +{len(train)} clips +{sum(map(len, train)) / 50:.1f} s +{2 * sum(map(len, train)):,} codes", out
    )
    assert "mdct 2 x 16 at 16000 Hz, 50 frames/s, 400 bit/s" in out
    assert str(data.directory) in out
    printed = re.findall(r"([\d,]+) bytes of text alone, ([\d.]+) of the positions", out)
    for split, (size, share) in zip(("train", "val"), printed, strict=True):
        alone = sum(len(words) for _, words, codes, _ in clips_of(data, split) if codes is None)
        positions = sum(
            len(words) / 3 + (codes is not None and codes.size) for _, words, codes, _ in clips_of(data, split)
        )
        assert int(size.replace(",", "")) == alone
        assert share == f"{alone / 3 / positions:.3f}"
    assert data_script.main([*flags, f"--text_data={text}", "--text_share=0.2", "--verify"]).directory == data.directory
    named = audio_data.main([*flags, "--caption-from-names"])
    assert "data_column='file_name'" in capsys.readouterr().out
    assert dict(read_shard(named.shards("val")[0])) == {
        f"{n:02d}.wav": f"{n:02d}" for n in range(30) if is_held_out(f"{n:02d}.wav")
    }


@pytest.mark.parametrize("flags", [[], ["--modalities=image:512"]])
def test_script_without_audio(flags):
    with pytest.raises(UserError, match="names no audio: set --modalities=audio:2048"):
        audio_data.main(flags)


def test_recipe_of_spoken_prompts(tmp_path):
    """The shell parses, its Python writes captions and legal settings. Red when comments become captions."""
    import gzip

    script = (ROOT / "runs" / "asterisk.sh").read_text()
    subprocess.run(["bash", "-n", ROOT / "runs" / "asterisk.sh"], check=True)
    (program,) = re.findall(r"<<'EOF'\n(.*?)^EOF$", script, re.DOTALL | re.MULTILINE)
    with gzip.open(tmp_path / "in.gz", "wt") as file:
        file.write("; a comment: no caption\n\ndigits/1: One.\nat-time: The time: exactly...\n")
    files = tmp_path / "in.gz", tmp_path, tmp_path / "config.py"
    process = Forked([sys.executable, "-c", program, *files])
    assert process.wait(timeout=60) == 0, process.output()
    rows = [json.loads(line) for line in (tmp_path / "captions.jsonl").read_text().splitlines()]
    assert rows == [
        {"file_name": "digits/1.wav", "text": "One."},
        {"file_name": "at-time.wav", "text": "The time: exactly..."},
    ]
    assert validate(Settings(**read_config(tmp_path / "config.py"))).data == str(tmp_path)
