"""Wav headers that were written into a pipe, and all others, give the samples that are there."""

import io
import struct
import wave

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.audio.sources import Log, decode
from nanochat.audio.wav_header import Joined, repair_header

RATE = 8000
SUBFORMAT = b"\x00\x00\x00\x00\x10\x00\x80\x00\x00\xaa\x00\x38\x9b\x71"  # of WAVE_FORMAT_EXTENSIBLE, behind the tag
BLIND = (0, 0xFFFFFFFF, 0x7FFFFFFF, 0x7FFFF000, 0x80000000, 2_000_000_000)  # sizes that writers into pipes announce


def chunk(name: bytes, content: bytes, size: int | None = None) -> bytes:
    return name + struct.pack("<I", len(content) if size is None else size) + content + bytes(len(content) % 2)


def header(channels: int, bits: int, is_float: bool, extensible: bool) -> bytes:
    block = channels * bits // 8
    tag = 3 if is_float else 1
    common = struct.pack("<HIIHH", channels, RATE, RATE * block, block, bits)
    if not extensible:
        return struct.pack("<H", tag) + common
    return struct.pack("<H", 0xFFFE) + common + struct.pack("<HHIH", 22, bits, 0, tag) + SUBFORMAT


def samples(frames: int, channels: int, bits: int, is_float: bool) -> tuple[bytes, np.ndarray]:
    """(little-endian bytes, their mono mix as float64) of a wave, by struct alone."""
    values = np.sin(np.arange(frames * channels) / 3 + 0.1) * 0.8
    if is_float:
        raw = b"".join(struct.pack("<f" if bits == 32 else "<d", value) for value in values)
        exact = values
    else:
        whole = [round(value * (2 ** (bits - 1) - 1)) for value in values]
        offset = 128 if bits == 8 else 0
        raw = b"".join((number + offset).to_bytes(bits // 8, "little", signed=bits > 8) for number in whole)
        exact = np.array(whole) / 2 ** (bits - 1)
    return raw, exact.reshape(-1, channels).mean(axis=1)


@st.composite
def wavs(draw):
    """(file, its mono mix): a header of any legal or blind kind, with chunks before and behind the samples."""
    bits, is_float = draw(st.sampled_from([(8, False), (16, False), (24, False), (32, False), (32, True), (64, True)]))
    channels, frames = draw(st.integers(1, 3)), draw(st.integers(1, 300))
    raw, exact = samples(frames, channels, bits, is_float)
    kind = draw(st.sampled_from(["plain", "blind", "rf64", "blind rf64", "bw64"]))
    others = st.lists(st.sampled_from([b"LIST", b"JUNK", b"fact", b"bext"]), max_size=2)
    before = [chunk(name, bytes(draw(st.integers(4, 9)))) for name in draw(others)]
    body = [*before, chunk(b"fmt ", header(channels, bits, is_float, draw(st.booleans())))]
    if "64" in kind:
        size = 0 if kind == "blind rf64" else len(raw)
        body.insert(0, chunk(b"ds64", struct.pack("<QQQI", 0, size, 0, 0)))
        body.append(chunk(b"data", raw, 0xFFFFFFFF))
    else:
        body.append(chunk(b"data", raw, draw(st.sampled_from(BLIND)) if kind == "blind" else None))
        if kind == "plain":
            body += [chunk(name, b"INFOIART\x02\x00\x00\x00me") for name in draw(others)]
    if "blind" in kind and len(raw) % 2:
        body[-1] = body[-1][:-1]  # who writes into a pipe stops at the last sample
    content = b"WAVE" + b"".join(body)
    name = {"rf64": b"RF64", "blind rf64": b"RF64", "bw64": b"BW64"}.get(kind, b"RIFF")
    total = draw(st.sampled_from([len(content), 0, 0xFFFFFFFF])) if kind != "plain" else len(content)
    tag = b"ID3\x03\x00\x00\x00\x00\x00\x0a" + bytes(10) if draw(st.booleans()) else b""
    return tag + name + struct.pack("<I", total) + content, exact


@settings(max_examples=150, deadline=None, derandomize=True)
@given(wavs())
def test_every_sample_of_a_wav_is_read(drawn):
    """Their number and values, without a word in the log. Red when repair_header() returns the file, takes 0 for no
    sound, does not know ds64, or leaves a tag in front."""
    raw, exact = drawn
    wav = decode(io.BytesIO(raw), "a", RATE, None, log := Log())
    assert not log.skipped
    assert len(wav) == len(exact)
    np.testing.assert_allclose(wav, exact, atol=2e-7 if len(exact) else 0)


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_the_standard_library_counts_the_same(tmp_path, width):
    """Files of `wave`, and the same ones with the sizes of a pipe. Red as above."""
    path = tmp_path / "a.wav"
    with wave.open(str(path), "wb") as file:
        file.setparams((2, width, RATE, 0, "NONE", ""))
        file.writeframes(bytes(range(1, 241)) * width * 2)
    with wave.open(str(path)) as file:
        frames = file.getnframes()
    raw = path.read_bytes()
    for size in (len(raw) - 44, *BLIND):
        path.write_bytes(raw[:40] + struct.pack("<I", size) + raw[44:])
        assert len(decode(path, "a", RATE, None, Log())) == frames == 240


@pytest.mark.parametrize(("kind", "mark", "behind"), [("AIFF", b"SSND", 4), ("AU", b".snd", 8)])
@pytest.mark.parametrize("size", [0xFFFFFFFF, 2_000_000_000])
def test_other_formats_of_a_pipe(kind, mark, behind, size):
    """Red when only wav files may announce more than there is."""
    import soundfile

    soundfile.write(file := io.BytesIO(), np.sin(np.arange(1000)) / 2, RATE, format=kind, subtype="PCM_16")
    raw = bytearray(file.getvalue())
    place = raw.index(mark) + behind
    raw[place : place + 4] = struct.pack(">I", size)
    wav = decode(io.BytesIO(bytes(raw)), "a", RATE, None, log := Log())
    assert len(wav) == 1000
    assert not log.skipped


def test_what_is_cut_or_empty_is_named(tmp_path):
    """Half of the samples, 97% of them, none, none but chunks behind. Red when every larger size is a placeholder, or
    chunks behind an empty sound are read as one."""
    raw, _ = samples(1000, 1, 16, False)
    body = b"WAVE" + chunk(b"fmt ", header(1, 16, False, False))
    for content, left_out, altered in (
        (chunk(b"data", raw)[:1008], {"truncated": 1}, {}),
        (chunk(b"data", raw)[:1948], {}, {"a little shorter than its header says": 1}),
        (chunk(b"data", b""), {"empty sound": 1}, {}),
        (chunk(b"data", b"") + chunk(b"LIST", b"INFOIART\x02\x00\x00\x00me"), {"empty sound": 1}, {}),
        (b"", {"unreadable": 1}, {}),
    ):
        log = Log()
        wav = decode(io.BytesIO(b"RIFF" + struct.pack("<I", 2036) + body + content), "a", RATE, None, log)
        assert (wav is None) == bool(left_out)
        assert (log.skipped, log.altered) == (left_out, altered)


def test_a_view_reads_and_seeks_like_a_file():
    """A head and a part of another file. Red when seek() or read() takes the other file's places for its own."""
    view = Joined(b"abc", io.BytesIO(bytes(range(100))), 10, 5)
    assert view.read() == b"abc" + bytes(range(10, 15))
    assert view.tell() == 8
    assert view.read(1) == b""
    assert view.seek(2) == 2
    assert view.read(3) == b"c" + bytes([10, 11])
    assert view.seek(-1, 2) == 7
    assert view.read(4) == bytes([14])
    assert view.seek(-8, 1) == 0
    plain = io.BytesIO(b"RIFF" + struct.pack("<I", 40) + b"WAVE" + chunk(b"fmt ", bytes(16)) + chunk(b"data", bytes(4)))
    assert repair_header(plain) is plain
    assert plain.tell() == 0


def test_more_than_four_gigabytes(tmp_path):
    """A pipe's 5 GB, sparse: the first second is read, and the header counts the rest. Red when the size is cut to 32
    bits."""
    import soundfile

    with open(tmp_path / "a.wav", "wb") as file:
        file.write(b"RIFF\xff\xff\xff\xffWAVE" + chunk(b"fmt ", header(1, 16, False, False)) + chunk(b"data", b"", 0))
        file.write(samples(RATE, 1, 16, False)[0])
        file.truncate(44 + 5_000_000_000)
    with open(tmp_path / "a.wav", "rb") as file, soundfile.SoundFile(repair_header(file)) as sound:
        assert sound.frames == 2_500_000_000
    assert len(decode(tmp_path / "a.wav", "a", RATE, 1.0, Log())) == RATE


def test_a_header_that_says_too_little_is_said():
    """Samples behind the announced ones are named as altered; chunks, tags and padding behind them are none.

    Red when count_trailing_bytes() returns 0, or takes chunks for samples.
    """
    raw, _ = samples(4000, 1, 16, False)
    form = chunk(b"fmt ", header(1, 16, False, False))

    def altered(*parts: bytes) -> dict:
        wav = decode(io.BytesIO(b"RIFF\0\0\0\0WAVE" + b"".join(parts)), "a", RATE, None, log := Log())
        assert wav is not None
        assert not log.skipped
        return log.altered

    said = "longer than its header says, which alone is read"
    assert altered(form, chunk(b"data", raw, 1000)) == {said: 1}
    assert altered(form, chunk(b"data", raw)) == {}
    assert altered(form, chunk(b"data", raw), chunk(b"LIST", bytes(3000))) == {}
    assert altered(form, chunk(b"data", raw), b"TAG" + bytes(125)) == {}
