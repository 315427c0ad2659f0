import ast
import errno
import json
import os
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from nanochat.audio import adherence as audio_eval
from nanochat.audio import evaluation
from nanochat.audio import synth as synth_audio
from nanochat.audio.adherence import (
    Heard,
    compare_attributes,
    derangement,
    format_adherence,
    hear,
    learn_references,
    measure,
    tabulate_adherence,
)
from nanochat.audio.fitted_codec import fit_codec
from nanochat.system.environment import UserError
from scripts import adapter_eval
from scripts import audio_eval as audio_eval_script

RATE = 16000


@pytest.fixture(scope="module")
def clips():
    """50 clips to learn from and 50 to judge."""
    return [synth_audio.clip(index) for index in range(100)]


@pytest.fixture(scope="module")
def references(clips):
    return learn_references((clip.wav, RATE, clip.attributes) for clip in clips[:50])


def shares_of_hits(wavs, clips, references) -> dict[str, float]:
    judged = [
        compare_attributes(measure(wav, RATE, references), clip.attributes)
        for wav, clip in zip(wavs, clips, strict=True)
    ]
    return {quantity: np.mean([row[quantity] for row in judged]) for quantity in audio_eval.QUANTITIES}


def test_clean_melodies_are_heard_as_their_captions_say(clips, references):
    """Red when HARMONICS is 1."""
    assert references.tempi == (60, 90, 135, 200)
    assert references.instruments == ("bell", "organ", "pluck", "sine", "square")
    shares = shares_of_hits([clip.wav for clip in clips[50:]], clips[50:], references)
    assert shares["pitch"] >= 0.99
    assert shares["tempo"] >= 0.97
    assert shares["contour"] >= 0.95
    assert shares["instrument"] >= 0.95


def test_melodies_through_a_codec_with_guessed_phases_are_heard(clips, references):
    """Red when peaks need to be higher than 2 frames around them instead of 8 (`pre_max`, `post_max`)."""
    codec = fit_codec("frame", [clip.wav for clip in clips], codebooks=2, codes=256)
    wavs = codec.decode_batch(codec.encode_batch(np.stack([clip.wav for clip in clips[70:]])))
    shares = shares_of_hits(wavs, clips[70:], references)
    assert shares["pitch"] >= 0.95
    assert shares["tempo"] >= 0.95
    assert shares["contour"] >= 0.9
    assert shares["instrument"] >= 0.85


@pytest.mark.parametrize("decay", [0.0, 12.0])
def test_every_repeated_note_has_its_onset_and_pitch(decay):
    """Red when the level is not compressed (`power**1.0`): the notes of a decaying sound merge."""
    time = np.arange(2 * RATE) / RATE
    since = time % 0.3
    envelope = np.exp(-decay * since) * np.clip(since / 0.01, 0, 1) * np.clip((0.26 - since) / 0.02, 0, 1)
    heard = hear(np.sin(2 * np.pi * 220 * time) * envelope, RATE)
    np.testing.assert_allclose(heard.onsets, np.arange(7) * 0.3, atol=0.05)
    assert np.all(np.abs(1200 * np.log2(heard.pitches / 220)) < 10)
    assert heard.contour == "steady"
    assert heard.tempo((60, 90, 135, 200)) == 200


SPECTRA = {
    "sine": [1],
    "square": [1, 0, 1 / 3, 0, 1 / 5, 0, 1 / 7],
    "weak first": [0.5, 1, 0.3],
    "organ": [1, 0.8, 0.6, 0.4, 0.3, 0.2],
    "bell": [1, 0, 0, 0.6, 0, 0, 0.4],
}


@pytest.mark.parametrize("spectrum", SPECTRA)
def test_every_pitch_is_heard_in_its_octave(spectrum):
    """Red when LOWEST is 110.0, or trough_threshold 0.9: a strong second harmonic is taken for the first."""
    for number in range(36, 84):  # C2 to B5
        pitch, time = 440 * 2 ** ((number - 69) / 12), np.arange(RATE // 2) / RATE
        partials = ((k, amplitude) for k, amplitude in enumerate(SPECTRA[spectrum], 1) if k * pitch < 7600)
        wav = sum(amplitude * np.sin(2 * np.pi * k * pitch * time) for k, amplitude in partials)
        assert abs(1200 * np.log2(hear(wav, RATE).first_hz / pitch)) < 20, number


def test_noise_under_a_note_is_no_note():
    """Red when the floor of 35 dB is at 99: bursts of noise at -40 dB become onsets."""
    rng, time = np.random.default_rng(0), np.arange(2 * RATE) / RATE
    bursts = np.repeat(rng.random(20) < 0.5, RATE // 10) * rng.normal(size=2 * RATE)
    wav = np.sin(2 * np.pi * np.where(time < 1, 220, 330) * time) + 0.01 * bursts
    np.testing.assert_allclose(hear(wav, RATE).onsets, [0, 1], atol=0.05)


@pytest.mark.parametrize(
    "onsets, bpm",
    [
        ([0, 0.44, 0.89, 1.33, 1.78], 135),
        ([0, 0.26, 0.56, 0.86, 1.16, 1.46, 1.76], 200),  # the first one late, as its attack has no note before it
        ([0, 0.3, 0.9, 1.2, 1.5, 1.8], 200),  # one missed
        ([0, 0.3, 1.0], 60),  # one too many
        ([0.05, 0.72, 1.38], 90),
        ([0, 0.5, 1.0, 1.5], None),  # 120 bpm is twice 60, and not 60
        ([0, 0.1, 0.35, 0.6, 0.7, 0.8, 1.05], None),
        ([0.3], None),
        ([], None),
    ],
)
def test_the_tempo_is_the_class_that_fits_the_onsets(onsets, bpm):
    """Red when `shifts` are 0 (the late first onset), or the least score 0.5 (120 bpm becomes 60)."""
    assert Heard(np.array(onsets), np.empty(0), None, 2.0).tempo((60, 90, 135, 200)) == bpm


@pytest.mark.parametrize(
    "numbers, contour",
    [
        ([60, 62], "rising"),
        ([60, 60, 60, 60], "steady"),
        ([60, 59, 57, 55], "falling"),
        ([60], None),
        ([], None),
        ([60, 60, 60, 62, 62], "rising"),  # two notes, heard as five
        ([60, 62, 64, 65, 67, 57], "rising"),  # the last one an octave down
        ([60, 60, 72, 60, 60, 60], "steady"),
        ([60, 60, 60, 60, 60, 60, 67], "steady"),  # one wrong
    ],
)
def test_the_contour_is_the_way_of_most_pairs(numbers, contour):
    """Red when the least tendency is 0.7, or 0.1, of the pairs instead of 0.3."""
    pitches = np.array([np.nan, *(440 * 2 ** ((number - 69) / 12) for number in numbers)])
    assert Heard(np.arange(pitches.size) / 4, pitches, None, 2.0).contour == contour


def test_a_sound_that_stops_is_not_an_onset():
    """Red when `later` is not filtered by the loudness that follows."""
    wav = np.sin(2 * np.pi * 200 * np.arange(2 * RATE) / RATE) * (np.arange(2 * RATE) < RATE)
    assert hear(wav, RATE).onsets.tolist() == [0.0]


def test_the_sample_rate_does_not_matter(clips, references):
    """Red when mono does not resample."""
    import soxr

    for clip in clips[80:84]:
        measured = measure(soxr.resample(clip.wav, RATE, 24000), 24000, references)
        assert all(compare_attributes(measured, clip.attributes).values())


TIME = np.arange(2 * RATE) / RATE
NOISE = np.random.default_rng(0).normal(size=2 * RATE)
ODD = {
    "nothing": np.zeros(0),
    "one sample": np.ones(1),
    "silence": np.zeros(2 * RATE),
    "nan": np.full(2 * RATE, np.nan),
    "noise": NOISE,
    "faint noise": 1e-4 * NOISE,
    "constant": np.ones(2 * RATE),
    "infinite": np.full(100, np.inf),
    "click": np.eye(1, 2 * RATE, 5000)[0],
    "chirp": np.sin(2 * np.pi * (100 * TIME + 200 * TIME**2)),
}


@pytest.mark.parametrize("name", ODD)
@pytest.mark.filterwarnings("error")
def test_sounds_without_notes_are_misses(name, references):
    """Red when find_stable_pitch takes any median (noise has a pitch then), or to_mono keeps NaN."""
    attributes = {"pitch_hz": 220.0, "bpm": 60, "contour": "steady", "instrument": "sine"}
    for sample_rate in (RATE, 24000):
        measured = measure(ODD[name], sample_rate, references)
        assert set(measured.values()) == {None}
        assert not any(compare_attributes(measured, attributes).values())


def test_the_judge_does_not_know_the_synthesiser_nor_a_codec():
    """Red with `from nanochat.audio.synth import frequency` in audio_eval."""
    tree = ast.parse(Path(audio_eval.__file__).read_text(encoding="utf-8"))
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    imported |= {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
    allowed = {"nanochat.runtime", "nanochat.system.environment"}
    assert {name for name in imported if name.startswith("nanochat")} <= allowed


@pytest.mark.parametrize("cents, hit", [(0, True), (49, True), (-49, True), (51, False), (-51, False), (1200, False)])
def test_a_pitch_hits_within_fifty_cents(cents, hit):
    """Red when CENTS is 100, or abs is missing in hits."""
    measured = {"f0": 220 * 2 ** (cents / 1200), "bpm": None, "contour": None, "instrument": None}
    attributes = {"pitch_hz": 220.0, "bpm": 60, "contour": "steady", "instrument": "sine"}
    assert compare_attributes(measured, attributes)["pitch"] is hit


def captioned(number: int, right: bool, unseen: bool = False) -> tuple[dict, dict]:
    """A measurement that hits all of its caption or nothing; no two numbers share a pitch or an instrument."""
    asked = {"root": number, "pitch_hz": 100.0 * 2 ** (number / 12), "bpm": 60, "contour": "steady"}
    asked |= {"instrument": f"i{number}", "unseen": unseen}
    heard = {"f0": asked["pitch_hz"], "bpm": 60, "contour": "steady", "instrument": asked["instrument"]}
    return (heard if right else dict.fromkeys(heard)), asked


def test_the_table_counts_each_split_against_its_floor_and_chance():
    """Red when the shuffled row takes `others` of the whole set, or made[index][1]: its own caption."""
    generated = [captioned(n, n < 6) for n in range(10)] + [captioned(n, True, unseen=True) for n in range(20, 24)]
    table = tabulate_adherence([captioned(0, True)], generated)
    seen, unseen = table["seen"], table["unseen"]
    assert [seen[row]["n"] for row in audio_eval.ROWS] == [1, 10, 10]
    assert [unseen[row]["n"] for row in audio_eval.ROWS] == [0, 4, 4]
    assert unseen["codec"]["pitch"] == {"hits": 0, "share": None, "low": 0.0, "high": 1.0}
    assert seen["generated"]["pitch"]["hits"] == 6
    assert unseen["generated"]["pitch"]["share"] == 1.0
    assert seen["shuffled"]["pitch"]["hits"] == 0  # all captions ask for another pitch
    assert seen["shuffled"]["tempo"]["hits"] == 6  # all captions ask for the same tempo: a hit by chance is a hit
    assert seen["chance"] == {"pitch": 0.1, "tempo": 1.0, "contour": 1.0, "instrument": 0.1}
    text = format_adherence(table)
    assert "0.60 [0.31, 0.83]" in text
    assert text.count("shuffled (floor)") == 2
    assert format_adherence(tabulate_adherence([], [])) == ""


def test_a_derangement_moves_everything_and_hits_every_other_place():
    """Red when np.roll shifts by 0."""
    targets = Counter()
    for seed in range(400):
        order = derangement(5, seed)
        assert sorted(order) == list(range(5))
        assert not any(order == np.arange(5))
        targets[int(order[0])] += 1
    assert set(targets) == {1, 2, 3, 4}
    assert min(targets.values()) > 60
    assert [derangement(n, 0).tolist() for n in (0, 1, 2)] == [[], [], [1, 0]]
    assert derangement(50, 1).tolist() != derangement(50, 2).tolist()


@pytest.mark.parametrize("count, n", [(0, 7), (3, 7), (7, 7), (150, 200)])
def test_the_interval_is_wilsons(count, n):
    """The ends p lie 1.96 standard errors sqrt(p (1 - p) / n) from count / n. Red with another method."""
    low, high = audio_eval.wilson(count, n)
    for end in {low, high} - {0.0, 1.0}:
        assert abs(count / n - end) == pytest.approx(1.95996 * (end * (1 - end) / n) ** 0.5, rel=1e-4)
    assert (low == 0.0) == (count == 0)
    assert (high == 1.0) == (count == n)


def test_references_without_a_pitch_are_one_line():
    with pytest.raises(UserError, match="no reference sound"):
        learn_references([(NOISE, RATE, {"bpm": 60, "instrument": "sine"})])


def test_without_librosa_the_way_out_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "librosa", None)
    with pytest.raises(UserError, match=r"librosa.*\[audio\]"):
        hear(NOISE, RATE)


@pytest.mark.parametrize("script", [audio_eval_script, adapter_eval])
def test_librosa_is_asked_for_before_the_sounds_are_made(script, monkeypatch):
    """Red when main() does not call import_librosa() first: it is missed after minutes of generating."""
    monkeypatch.setitem(sys.modules, "librosa", None)
    for name in ("open_audio_model", "open_adapters"):
        monkeypatch.setattr(script, name, None, raising=False)
    with pytest.raises(UserError, match="measuring sounds needs librosa"):
        script.main([])


def test_figures_are_written_before_the_page(tmp_path, monkeypatch, capsys):
    """Red when listen() writes the result last: a page that cannot be written would cost the figures."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    sound, codes = np.zeros(8, np.float32), np.zeros((2, 1), int)
    held_out = [(f"caption {number}", codes, {}) for number in range(3)]
    monkeypatch.setattr(evaluation, "iterate_clips", lambda dataset, split: held_out)
    monkeypatch.setattr(evaluation, "generate_codes", lambda m, t, captions, **_: [codes] * len(captions))
    monkeypatch.setattr(evaluation, "to_sound", lambda codec, codes: [sound] * len(codes))
    monkeypatch.setattr(evaluation, "measure_distances", lambda real, generated, rate: ({"generated": {}}, "the table"))

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(evaluation, "write_page", full)
    model = SimpleNamespace(config=SimpleNamespace(sequence_len=100))
    tokenizer = SimpleNamespace(encode=lambda text, bos: [0])
    codec = SimpleNamespace(codebooks=1, sample_rate=8)
    args = SimpleNamespace(num=2, seed=0, temperature=1.0, top_k=None)
    with pytest.raises(OSError, match="No space left"):
        evaluation.evaluate_sounds(model, tokenizer, codec, None, args, {"model_tag": "m", "step": 3, "loss": 1.5})
    assert "the table" in capsys.readouterr().out
    written = json.loads((tmp_path / "audio_eval" / "m_000003.json").read_text())
    assert (written["loss"], written["clips"], written["distances"]) == (1.5, 2, {"generated": {}})
