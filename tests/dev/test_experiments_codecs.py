"""The codec table: entropies by hand, and that it runs."""

import math

import pytest

from nanochat.system.environment import UserError
from scripts.experiments import codecs


def test_entropies_by_hand():
    """Red when the groups are not weighted by their size."""
    assert codecs.entropy("aabb") == 1
    assert codecs.entropy("aaaa") == 0
    assert codecs.entropy_given(list("abababcc"), [1, 1, 1, 1, 1, 1, 2, 2]) == pytest.approx(6 / 8)
    assert codecs.entropy(range(24)) == pytest.approx(math.log2(24))


@pytest.mark.parametrize("text", ["pitch", "pitch,2", "pitch,2,x", "mp3,1,2", ""])
def test_a_misspelt_codec_is_refused(text):
    with pytest.raises(UserError, match="is not kind,codebooks,codes"):
        codecs.main([f"--codec={text}"])


def test_the_pitch_codec_tells_note_and_timbre_apart(monkeypatch, capsys):
    """The first book says the root, the second nothing of it; with one book of spectra all is in one code."""
    monkeypatch.setattr(codecs, "SECONDS", 1.0)
    pitch, frame = codecs.main(["--codec=pitch,2,64", "--codec=frame,1,256", "--fit=20", "--clips=3"])
    assert pitch["books"][0]["root"] > 4.4
    assert pitch["books"][1]["root"] < 0.5
    assert frame["books"][0]["root"] > 2.5
    assert pitch["pitch"] > 0.95
    assert pitch["rate"] == 600
    assert "| pitch 2 x 64 | 600 |" in capsys.readouterr().out


def test_the_split_is_counted(tmp_path, monkeypatch, capsys):
    """Red when the clip's number decides the split: held-out clips then share waveforms with training clips."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    monkeypatch.setattr(codecs, "SECONDS", 0.2)
    small = codecs.preset("audio", data_limit=150, clip_seconds=0.2, codebooks=2, codec="mdct", modalities="audio:16")
    monkeypatch.setattr(codecs, "preset", lambda name, data_limit: small)
    found = codecs.main(["--split=150"])
    assert found["seen"]["clips"] > 5
    assert found["unseen"]["clips"] > 10
    assert all(found[split][kind] == 0 for split in found for kind in ("waveform", "codes", "caption"))
    assert "also in the training split: waveform 0, codes 0, caption 0" in capsys.readouterr().out
