"""The experiment on schedules: ways of equal tokens, what is asked for is legal, and nothing is run twice."""

import pytest

from nanochat.config.settings import Settings, preset, validate
from nanochat.training.schedule import tokens_before
from scripts.experiments import schedules as check_schedules
from scripts.experiments.schedules import CONSTANT, RATES, TOKENS, WAYS, main, runs


def test_every_way_sees_as_many_tokens():
    """Red when a growing batch gets the steps of a constant one, or a smaller batch keeps its number of steps."""
    for settings in runs().values():
        settings = validate(Settings(**settings, model_tag="x"))
        assert tokens_before(settings, settings.num_iterations, settings.num_iterations) == TOKENS
    changed = {name for way in WAYS.values() for name in way if name not in RATES}
    assert changed == {"total_batch_size", "num_iterations", "batch_start", "document_mask"}
    assert {"tied_weights_lr", "matrix_lr", "scalar_lr", "value_embedding_lr"} <= set(RATES)
    for name in RATES:
        assert WAYS["always 2,048"][name] == pytest.approx(getattr(preset("cpu"), name) * 0.5**0.5)


def test_pairs_by_seed_and_nothing_twice(tmp_path, monkeypatch, capsys):
    """Growing batches 0.01 better in 0.9 of the time, the seeds 0.1 apart. Red when pairs are not by seed."""
    trained = []

    def train(key: str, settings: dict) -> dict:
        trained.append(key)
        grown = "batch_start" in settings
        bpb, seconds = 1.5 + 0.1 * settings["seed"] - 0.01 * grown, 100.0 * settings["seed"] * (0.9 if grown else 1.0)
        return dict(key=key, settings=settings, val_bpb=bpb, seconds=seconds)

    monkeypatch.setattr(check_schedules, "train", train)
    for _ in range(2):
        main([f"--results={tmp_path / 'results.jsonl'}"])
    assert sorted(trained) == sorted(runs())
    out = capsys.readouterr().out
    assert f"| way | val bpb by seed | minus {CONSTANT}, paired, 95% | time, of {CONSTANT} | n |" in out
    assert f"| {CONSTANT} | 1.6000, 1.7000, 1.8000 |  | 1.000 | 3 |" in out
    assert "| 2,048, then 4,096 | 1.5900, 1.6900, 1.7900 | -0.0100 +- 0.0000 | 0.900 | 3 |" in out
