import io
import os
import threading
import wave
from html.parser import HTMLParser

import numpy as np
import pytest

from nanochat.audio import listen_page
from nanochat.audio.listen_page import COLOURS, encode_png, read_wav, spectrogram, write_page, write_wav
from nanochat.system.environment import UserError
from scripts.stress import page as check_page

RATE = 16000
TONE = (0.5 * np.sin(2 * np.pi * 440 * np.arange(RATE) / RATE)).astype(np.float32)


class Page(HTMLParser):
    """Tags with their attributes, and the text, of a page."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data

    def values(self, tag, attribute):
        return [attributes.get(attribute) for name, attributes in self.tags if name == tag]


@pytest.mark.filterwarnings("error")  # what NaN is as an integer is not the same on every machine
def test_sound_is_clipped_not_wrapped_and_comes_back(tmp_path):
    """Red without np.clip in write_wav (2.0 becomes -2), or without nan_to_num."""
    path = tmp_path / "new" / "x.wav"
    write_wav(path, np.array([0.0, 0.5, -0.5, 1.0, 2.0, -7.0, np.nan, np.inf, -np.inf]), 24000)
    with wave.open(str(path)) as file:
        assert (file.getnchannels(), file.getsampwidth(), file.getframerate()) == (1, 2, 24000)
        pcm = np.frombuffer(file.readframes(-1), "<i2")
    assert pcm.tolist() == [0, 16384, -16384, 32767, 32767, -32767, 0, 32767, -32767]
    wav, rate = read_wav(path)
    np.testing.assert_allclose(wav, np.clip([0, 0.5, -0.5, 1, 2, -7, 0, 9, -9], -1, 1), atol=1e-4)
    assert rate == 24000
    assert os.listdir(path.parent) == ["x.wav"]


@pytest.mark.parametrize("content", [None, b"", b"RIFF", b"text" * 20])
def test_a_file_that_is_no_sound_is_named(tmp_path, content):
    path = tmp_path / "x.wav"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"x\.wav"):
        read_wav(path)


def test_pictures_are_png_files_in_our_colours():
    """Red when rows do not begin with their filter byte, or the chunk's sum leaves out its name. Decoded by Pillow."""
    from PIL import Image

    levels = np.linspace(-0.2, 1.2, 60).reshape(5, 12)
    with Image.open(io.BytesIO(encode_png(levels))) as image:
        image.verify()
    with Image.open(io.BytesIO(encode_png(levels))) as image:
        pixels = np.asarray(image.convert("RGB"))
    assert pixels.shape == (5, 12, 3)
    assert tuple(pixels[0, 0]) == COLOURS[0]
    assert tuple(pixels[-1, -1]) == COLOURS[-1]
    assert tuple(np.asarray(pixels[2, 5], int)) == pytest.approx(COLOURS[2], abs=3)


def test_a_spectrogram_shows_a_tone_in_its_row_and_when_it_sounds():
    """Red when frequencies rise from the top row down, or columns do not follow time."""
    levels = spectrogram(np.concatenate([np.zeros(RATE), TONE]), RATE)
    frequencies = np.geomspace(8000, 60, levels.shape[0])
    assert frequencies[levels[:, 240].argmax()] == pytest.approx(440, rel=0.06)
    assert levels[:, :140].max() <= 0
    assert levels.max() == pytest.approx(1)
    for odd in (np.zeros(0), np.zeros(5), np.full(100, np.nan), np.zeros(RATE)):
        assert np.isfinite(spectrogram(odd, RATE)).all()
        assert spectrogram(odd, RATE).max() <= 0


def test_the_page_holds_everything_and_nothing_from_elsewhere(tmp_path):
    """Red when a caption is not escaped, or an alt text or a label is left out."""
    write_wav(tmp_path / "given.wav", TONE, RATE)
    nasty = 'a "rising" <script>alert(1)</script> & tune'
    items = [
        {
            "caption": nasty,
            "sound": (TONE, RATE),
            "split": "seen",
            "measured": {"f0": 440.123, "bpm": None},
            "hits": {"pitch": True, "tempo": False},
            "reference": (TONE, RATE),
        },
        {"caption": "plain", "sound": tmp_path / "given.wav", "split": "held out"},
    ]
    path = write_page(tmp_path / "tag" / "listen.html", "Sounds of <d4>", items, "pitch  0.9 < 1")
    page = Page(path)
    assert not page.values("script", "src")
    assert "http" not in path.read_text(encoding="utf-8")
    for text in (nasty, "Sounds of <d4>", "pitch  0.9 < 1", "seen: 1", "held out: 1", "f0 440.1", "bpm none"):
        assert text in page.text
    assert "pitch hit" in page.text
    assert "tempo miss" in page.text
    assert len(page.values("audio", "src")) == len(page.values("img", "src")) == 3
    for source in page.values("audio", "src"):
        np.testing.assert_allclose(read_wav(path.parent / source)[0], TONE, atol=1e-4)
    assert all((path.parent / source).read_bytes().startswith(b"\x89PNG") for source in page.values("img", "src"))
    assert set(page.values("audio", "preload")) == {"none"}
    assert "controls" in dict(page.tags)["audio"]
    assert all(nasty in text for text in page.values("img", "alt")[:2] + page.values("audio", "aria-label")[:2])
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in page.tags


def test_a_new_page_replaces_the_old_one_and_nothing_else(tmp_path):
    """Red when old folders stay, or all folders of the place are removed."""
    path = tmp_path / "listen.html"
    (tmp_path / "listen-mine").mkdir()
    write_page(path, "one", [{"caption": "a", "sound": (TONE, RATE)}] * 2)
    first = {file.name for file in tmp_path.iterdir()}
    write_page(path, "one", [{"caption": "a", "sound": (TONE, RATE)}] * 2)
    assert {file.name for file in tmp_path.iterdir()} == first  # the same sounds, the same folder
    write_page(path, "two", [{"caption": "b", "sound": (-TONE, RATE)}])
    second = {file.name for file in tmp_path.iterdir()}
    assert len(second) == 3
    assert first & second == {"listen.html", "listen-mine"}
    assert all((tmp_path / source).is_file() for source in Page(path).values("audio", "src"))


def test_a_page_that_cannot_be_made_leaves_the_old_one(tmp_path):
    """Red when sounds are written into the page's own folder."""
    path = write_page(tmp_path / "listen.html", "one", [{"caption": "a", "sound": (TONE, RATE)}])
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match="absent"):
        write_page(path, "two", [{"caption": "b", "sound": (TONE, RATE)}, {"caption": "c", "sound": "absent.wav"}])
    assert sorted(tmp_path.rglob("*")) == before
    assert "one" in Page(path).text


def test_the_check_says_when_there_is_no_browser_or_no_page(tmp_path, monkeypatch):
    path = write_page(tmp_path / "listen.html", "one", [])
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="no browser on PATH"):
        check_page.main([str(path)])
    with pytest.raises(UserError, match="absent"):
        check_page.main([str(tmp_path / "absent.html")])


def test_two_pages_at_once_leave_the_last_one_whole(tmp_path, monkeypatch):
    """A second page of the same name is written while the first is about to clear older folders away.

    Red without file_lock() in write_page(): the second's folder goes, and its page shows nothing.
    """
    path, write, others = tmp_path / "listen.html", listen_page.write_atomically, []
    wav = np.sin(np.arange(8000) / 9).astype(np.float32)

    def second() -> None:
        write_page(path, "second", [dict(caption="b", sound=(wav[::-1].copy(), 16000))])

    def first_is_slow(target, text):
        if not others:
            others.append(threading.Thread(target=second))
            others[0].start()
            others[0].join(0.5)
        write(target, text)

    monkeypatch.setattr(listen_page, "write_atomically", first_is_slow)
    write_page(path, "first", [dict(caption="a", sound=(wav, 16000))])
    others[0].join()
    [folder] = [entry for entry in tmp_path.iterdir() if entry.is_dir()]
    assert folder.name in path.read_text()
    assert not list(tmp_path.glob(".*"))
