"""The tying experiment: equal tuning for every variant, no run twice, figures by hand."""

import json
import subprocess
from types import SimpleNamespace

import pytest

from nanochat.config.settings import Settings, validate
from nanochat.system.environment import UserError
from scripts.experiments import tying
from scripts.experiments.common import CHOOSING
from scripts.experiments.tying import GRID, RATES, SHAPE, init_runs, main, paired, seed_runs, sweep_runs


def line(key: str, settings: dict) -> dict:
    """A made-up result: tied a little worse than untied, the middle rate the best."""
    name = key.split("/")[1]
    rates = GRID.get(name, ())
    rate = settings.get(RATES.get(name, ""), 0)
    worse = abs(rates.index(rate) - 1) if rate in rates else 0
    bpb = 1.5 + 0.1 * worse + 0.01 * settings["seed"] + (0.0 if name == "untied" else 0.02)
    return dict(key=key, settings=settings, val_bpb=bpb, losses=[5.0, 4.0, 3.0], parameters=1000, seconds=1.0)


@pytest.fixture
def experiment(tmp_path, monkeypatch):
    """run(stage): main() with runs that cost nothing; .trained lists their keys."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    trained = []

    def train(key: str, settings: dict) -> dict:
        trained.append(key)
        return line(key, settings)

    monkeypatch.setattr(tying, "train", train)
    results, plot = tmp_path / "results.jsonl", tmp_path / "plot.png"

    def run(stage: str) -> dict[str, dict]:
        return main([f"--stage={stage}", f"--results={results}", f"--plot={plot}", "--workers=2"])

    return SimpleNamespace(run=run, trained=trained, results=results, plot=plot)


def test_every_variant_has_the_same_budget_and_legal_settings():
    """Red when one variant may try more rates than another, or a flag's name is not a setting."""
    assert {len(rates) for rates in GRID.values()} == {3}
    assert len(sweep_runs()) == 12
    runs = init_runs() | sweep_runs()
    for settings in ({k: v for k, v in run.items() if k not in CHOOSING} for run in runs.values()):
        made = validate(Settings(**{**SHAPE, **settings, "model_tag": "x", "overwrite": True}))
        assert (made.n_embd, made.max_seq_len, made.total_batch_size, made.vocab_size) == (128, 256, 4096, 4096)
        assert not [
            name for name in settings if made.no_effect_reason(name)
        ]  # a rate that has no effect would tune nothing
    assert len({json.dumps(settings, sort_keys=True) for settings in runs.values()}) == len(runs)


def test_paired_interval_by_hand():
    """Differences 1, 2, 3: mean 2, standard error 1 / sqrt(3), t of 2 degrees of freedom 4.303."""
    assert paired([1.0, 2.0, 3.0]) == pytest.approx((2.0, 4.303 / 3**0.5), rel=1e-4)


def test_stages_run_once_and_go_on_where_they_stopped(experiment, capsys):
    """Red when a result that is in the file is trained again."""
    with pytest.raises(UserError, match="run --stage sweep first"):
        experiment.run("seeds")
    lines = experiment.run("sweep")
    assert sorted(lines) == sorted(experiment.trained) == sorted(sweep_runs())
    kept = experiment.results.read_text().splitlines()
    experiment.results.write_text("\n".join(kept[:10]) + "\n")
    experiment.trained.clear()
    assert experiment.run("sweep").keys() == lines.keys()
    assert len(experiment.trained) == 2
    assert "12 runs, 10 there already" in capsys.readouterr().out


def test_seeds_take_the_best_rate_and_the_report_compares_pairs(experiment, capsys):
    experiment.run("sweep")
    lines = experiment.run("seeds")
    runs = seed_runs(lines)
    assert len(runs) == 12
    assert all(s[RATES[key.split("/")[1]]] == GRID[key.split("/")[1]][1] for key, s in runs.items())
    assert {s["num_iterations"] for s in runs.values()} == {1000}
    experiment.run("init")
    out = capsys.readouterr().out
    assert "| tied | 1,000 | 1.5300, 1.5400, 1.5500 | +0.0200 +- 0.0000 |" in out
    assert "| untied | 1,000 | 1.5100, 1.5200, 1.5300 |  |" in out
    assert "| initial scale | rate" in out
    assert experiment.plot.stat().st_size > 1000


def test_a_run_that_fails_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    asked = []

    def failing(command, **_):
        asked.extend(command)
        return SimpleNamespace(returncode=2, stderr="error: no room")

    monkeypatch.setattr(subprocess, "run", failing)
    with pytest.raises(UserError, match=r"run tying-sweep/tied/0.1 ended with code 2: error: no room"):
        tying.train("sweep/tied/0.1", {"tie_weights": True})
    assert {"--tie_weights=True", "--depth=3", "--model_tag=tying-sweep_tied_0.1"} <= set(asked)
