"""The features experiment: legal settings, nothing twice, equal time by hand."""

import pytest

from nanochat.config.settings import Settings, validate
from scripts.experiments import features
from scripts.experiments.features import SHAPE, STEPS, VARIANTS, at_equal_time, goal_runs, main, seed_runs


def test_every_variant_is_legal_and_does_something():
    """Red when a variant's setting has no effect, or two variants are the same."""
    runs = seed_runs() | goal_runs()
    for settings in runs.values():
        made = validate(Settings(**{**SHAPE, **settings, "model_tag": "x"}))
        assert not [name for name in settings if made.no_effect_reason(name)]
    assert len({str(sorted(settings.items())) for settings in runs.values()}) == len(runs)


def test_equal_time_is_where_classic_would_be():
    """Classic falls from 2.0 to 1.9 in 15% more steps: a feature that costs 7.5% has to be held against 1.95."""
    assert at_equal_time(2.0, 1.9, 1.0) == 2.0
    assert at_equal_time(2.0, 1.9, 1.075) == pytest.approx(1.95)


def test_stages_from_runs_to_the_report(tmp_path, monkeypatch, capsys):
    """Modern is 0.1 better in every seed and twice as slow. Red when pairs are not by seed, or a run is repeated."""
    trained = []

    def train(key: str, settings: dict) -> dict:
        trained.append(key)
        bpb = 2.0 + settings["seed"] - 0.1 * ("modern" in key) - 0.02 * (settings["num_iterations"] > STEPS)
        return dict(key=key, settings=settings, val_bpb=bpb, seconds=1.0, parameters=1000)

    monkeypatch.setattr(features, "train", train)
    timed = {name: dict(ratio=1.0 + ("modern" in name) / 2) for name in (*VARIANTS, "control")}
    monkeypatch.setattr(features.bench, "main", lambda argv: {"train": {"contenders": timed}})
    results = tmp_path / "results.jsonl"
    for stage in ("seeds", "seeds", "time"):
        main([f"--stage={stage}", f"--results={results}"])
    assert sorted(trained) == sorted(seed_runs())
    row = next(line for line in capsys.readouterr().out.splitlines()[::-1] if line.startswith("| modern |"))
    assert "-0.1000 +- 0.0000 | 1.500 | -0.0333 +- 0.0000" in row  # 200 steps more take classic 0.0667 down
