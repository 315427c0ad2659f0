"""The quality experiment: settings that differ by the path alone, pairs by seed, and a plain path that evaluates."""

import runpy
import sys

import pytest
import torch

from nanochat.config.settings import Settings, validate
from nanochat.system.environment import UserError
from scripts import base_train
from scripts.experiments import quality
from scripts.experiments.quality import PLAIN, SEEDS, WAYS, main, report, runs
from tests.tiny_run import TINY, flags, metrics


def test_runs_differ_by_path_and_dtype_alone():
    """Red when a way has another batch, or plain trains by the default path."""
    wanted = runs(8192, list(WAYS))
    assert len(wanted) == len(SEEDS) * len(WAYS)
    plain = wanted[f"8192/{PLAIN}/1"]
    assert plain["module"] == "scripts.bench.plain"
    assert plain["dtype"] == "float32"
    for key, settings in wanted.items():
        shown = {name: value for name, value in settings.items() if name != "module"}
        validate(Settings(**shown, model_tag="x"))
        assert {name for name in shown if shown[name] != plain[name]} <= {"dtype", "seed"}, key


def test_pairs_by_seed_and_nothing_twice(tmp_path, monkeypatch, capsys):
    """bfloat16 is 0.001 worse in every seed, the seeds 0.1 apart. Red when pairs are not by seed."""
    trained = []

    def train(key: str, settings: dict) -> dict:
        trained.append(key)
        bpb = 1.5 + 0.1 * settings["seed"] + 0.001 * (settings["dtype"] == "bfloat16")
        return dict(key=key, settings=settings, val_bpb=bpb, seconds=1.0)

    monkeypatch.setattr(quality, "train", train)
    monkeypatch.setattr(quality, "pick_dtype", lambda *args: torch.bfloat16)
    for _ in range(2):
        lines = main([f"--results={tmp_path / 'results.jsonl'}"])
    assert sorted(trained) == sorted(runs(8192, [PLAIN, "fast bfloat16"]))
    assert "| 1.6010, 1.7010, 1.8010, 1.9010, 2.0010 | +0.0010 +- 0.0000 | 5 |" in capsys.readouterr().out
    del lines[f"8192/{PLAIN}/2"]
    assert "| 1.6010, 1.8010, 1.9010, 2.0010 | +0.0010 +- 0.0000 | 4 |" in "\n".join(report(lines, 8192))


def test_what_cannot_be_run():
    with pytest.raises(UserError, match="--ways: 'typo' is not one of plain float32, fast float32, fast bfloat16"):
        runs(8192, ["typo"])
    with pytest.raises(UserError, match="--tokens 256 is not a multiple of the context of 512"):
        runs(256, list(WAYS))


def test_the_plain_path_trains_and_evaluates(train, corpus, monkeypatch):
    """As `python -m scripts.bench.plain` runs it: the default's losses and val bpb, by another model.

    Red when its evaluation asks plain.py for a sum, or when base_train keeps its own GPT.
    """
    train("default", seed=5)
    monkeypatch.setattr(base_train, "GPT", base_train.GPT)  # put back afterwards
    words = flags({"data": corpus, **TINY, "seed": 5, "model_tag": "plain"})
    monkeypatch.setattr(sys, "argv", ["scripts.bench.plain", *words])
    runpy.run_module("scripts.bench.plain", run_name="__main__")
    assert base_train.GPT.__name__ == "PlainGPT"
    for key in ("loss", "val_bpb"):
        found, wanted = (torch.tensor([x for x in metrics(tag, key) if x]) for tag in ("plain", "default"))
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
