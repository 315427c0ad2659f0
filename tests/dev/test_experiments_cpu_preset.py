"""The trials of the cpu preset: few, legal, and blind to the held-out split, as the part that trials train on is."""

import pytest

from nanochat.config.config_file import read_config
from nanochat.config.presets import PRESETS
from nanochat.config.settings import Settings, validate
from nanochat.system.environment import UserError
from scripts.experiments import cpu_preset


def test_trials_are_legal_and_few_and_the_preset_is_one_of_them():
    """Red when the preset is none of the named trials, or a sixteenth is named (run or not, it cannot tell)."""
    assert len(cpu_preset.TRIALS) <= 15
    for changes in cpu_preset.TRIALS.values():
        validate(Settings(**{**PRESETS["cpu"], **changes}))
    preset = Settings(**PRESETS["cpu"])
    assert any(
        all(getattr(preset, name) == value for name, value in changes.items()) for changes in cpu_preset.TRIALS.values()
    )


def test_trials_never_see_the_held_out_split(monkeypatch, tmp_path):
    """Red when run_trial() gives the preset's own data to the trial."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    read = {}

    def main(argv: list[str]) -> None:
        read.update(read_config(argv[0]))
        raise UserError("seen enough")

    monkeypatch.setattr(cpu_preset.base_train, "main", main)
    monkeypatch.setattr(cpu_preset, "training_part", lambda settings: tmp_path / f"part of {settings['data']}")
    with pytest.raises(UserError, match="seen enough"):
        cpu_preset.run_trial("t512-w192")
    assert read["data"] == str(tmp_path / "part of stdlib")
