"""The experiment on schedules: ways of equal tokens, what is asked for is legal, and nothing is run twice."""

from nanochat.config.settings import Settings, validate
from scripts.experiments import schedules
from scripts.experiments.schedules import CONSTANT, WAYS, main, runs


def test_every_way_is_the_preset_but_for_one_setting():
    """Red when a way trains on other tokens than the preset's."""
    for settings in runs().values():
        made = validate(Settings(**settings, model_tag="x"))
        assert (made.num_iterations, made.total_batch_size) == (300, 4096)
    assert {name for way in WAYS.values() for name in way} == {"document_mask"}


def test_pairs_by_seed_and_nothing_twice(tmp_path, monkeypatch, capsys):
    """document_mask 0.01 better in 0.9 of the time, the seeds 0.1 apart. Red when pairs are not by seed."""
    trained = []

    def train(key: str, settings: dict) -> dict:
        trained.append(key)
        masked = "document_mask" in settings
        bpb, seconds = 1.5 + 0.1 * settings["seed"] - 0.01 * masked, 100.0 * settings["seed"] * (0.9 if masked else 1.0)
        return dict(key=key, settings=settings, val_bpb=bpb, seconds=seconds)

    monkeypatch.setattr(schedules, "train", train)
    for _ in range(2):
        main([f"--results={tmp_path / 'results.jsonl'}"])
    assert sorted(trained) == sorted(runs())
    out = capsys.readouterr().out
    assert f"| way | val bpb by seed | minus {CONSTANT}, paired, 95% | time, of {CONSTANT} | n |" in out
    assert f"| {CONSTANT} | 1.6000, 1.7000, 1.8000 |  | 1.000 | 3 |" in out
    assert "| document_mask | 1.5900, 1.6900, 1.7900 | -0.0100 +- 0.0000 | 0.900 | 3 |" in out
