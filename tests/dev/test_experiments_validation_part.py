"""Learning rates are chosen on rows that are not reported: of the training split, and disjoint from both others."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from nanochat.audio.listen_page import read_wav
from nanochat.audio.synth import clip
from nanochat.config.settings import Settings
from nanochat.data.prepare import prepare
from nanochat.data.splits import is_held_out
from nanochat.data_pipeline import prepare_for
from nanochat.system.environment import UserError
from scripts.experiments import adapters, experts, tying
from scripts.experiments import common as experiments
from scripts.experiments.common import CHOOSING, best_rate, selection_note
from scripts.experiments.validation_part import choose_on_training, training_part

SYNTH = dict(data="synth", data_limit=200, clip_seconds=0.5)


def texts(source, split: str) -> set[str]:
    return {text for _, text in prepare(str(source)).documents(split)}


def test_texts_that_choose_are_not_reported(tiny_corpus, tmp_path, monkeypatch):
    """All of the training split and nothing of the held-out one. Red when the part is made of all documents."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    part = training_part({"data": str(tiny_corpus)})
    reported, trained = texts(tiny_corpus, "val"), texts(tiny_corpus, "train")
    chooses, learns = texts(part, "val"), texts(part, "train")
    assert chooses | learns == trained
    assert chooses
    assert not chooses & learns
    assert not chooses & reported
    assert not learns & reported


def test_sounds_that_choose_are_not_reported(tmp_path, monkeypatch):
    """By waveform: clips repeat sounds. Red when the part takes held-out clips, or splits by the clip's number."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    part = training_part(SYNTH)

    def waves(found) -> set[bytes]:
        return {np.round(np.asarray(wav, np.float64) * 32767).astype(np.int16).tobytes() for wav in found}

    lines = [json.loads(line) for line in (part / "metadata.jsonl").read_text().splitlines()]
    files = {line["file_name"]: read_wav(part / line["file_name"])[0] for line in lines}
    chooses = waves(wav for name, wav in files.items() if is_held_out(name))
    learns = waves(wav for name, wav in files.items() if not is_held_out(name))
    dataset = prepare_for(Settings(modalities="audio:16", codec="frame", **SYNTH))
    numbers = {split: [int(name.split("/")[1]) for name, _ in dataset.documents(split)] for split in ("train", "val")}
    reported = waves(clip(number, seconds=0.5).wav for number in numbers["val"])
    assert len(files) == len(numbers["train"])
    assert len(chooses) > 5
    assert len(learns) > 50
    assert len(reported) > 20
    assert not chooses & learns
    assert not chooses & reported
    assert not learns & reported
    again = prepare_for(Settings(modalities="audio:16", codec="frame", data=str(part)))
    kept = {name for name, _ in again.documents("val")}  # without those of the same codes as a training sound
    assert kept
    assert kept <= {name for name in files if is_held_out(name)}
    assert {name for name, _ in again.documents("train")} == {name for name in files if not is_held_out(name)}


@pytest.mark.parametrize("check", [experts, adapters, tying])
def test_sweeps_choose_on_the_part_and_seeds_are_judged_on_the_held_out_rows(check, monkeypatch, tmp_path):
    """The command line of each kind of run. Red when a sweep's runs lack CHOOSING, or the seeds' runs have it."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    monkeypatch.setattr(experiments, "choose_on_training", lambda settings: settings | {"data": "PART"})
    asked = []

    def run(command, **_):
        asked.append(command)
        return SimpleNamespace(returncode=1, stderr="no")

    monkeypatch.setattr(experiments.subprocess, "run", run)
    if check is tying:
        sweep = check.sweep_runs() | check.init_runs()
        lines = {key: dict(settings=settings, val_bpb=1.0) for key, settings in sweep.items()}
        seeds = check.seed_runs(lines)
    else:
        rate = "matrix_lr" if check is experts else "learning_rate"
        sweep = experiments.sweep_runs(check.VARIANTS, rate, check.RATES, 150)
        lines = {key: dict(settings=settings, loss=1.0) for key, settings in sweep.items()}
        seeds = experiments.seed_runs(check.VARIANTS, rate, check.RATES, 300, check.SEEDS, lines)
    assert len({len([key for key in sweep if f"/{name}/" in key]) for name in check.VARIANTS}) == 1
    for runs, data in ((sweep, "PART"), (seeds, check.SHAPE["data"])):
        for key, settings in runs.items():
            with pytest.raises(UserError, match="ended with code 1"):
                check.train(key, settings)
            assert f"--data={data}" in asked[-1]
            assert not [word for word in asked[-1] if word.startswith("--validation")]


def test_a_sweep_on_the_reported_rows_does_not_choose_and_is_named():
    """Red when best_rate() takes any line with the right key."""
    old = {f"sweep/a/{rate}": dict(settings=dict(rate=rate), loss=rate) for rate in (1, 2)}
    new = {key: line | dict(settings=line["settings"] | CHOOSING) for key, line in old.items()}
    with pytest.raises(UserError, match="run --stage sweep first"):
        best_rate(old, "a", (1, 2), "loss")
    assert best_rate(new, "a", (2, 1), "loss") == 1
    assert selection_note(new) == []
    assert "slightly optimistic" in selection_note(old)[0]


def test_both_sources_of_a_mixture_are_replaced(tiny_corpus, tmp_path, monkeypatch):
    """Red when text_data keeps its held-out documents, or the limit of the source stays with its part."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    chosen = choose_on_training(SYNTH | dict(text_data=str(tiny_corpus), depth=2))
    assert chosen["depth"] == 2
    assert chosen["data_limit"] is None
    assert [name for name in ("data", "text_data") if "training_parts" not in chosen[name]] == []
