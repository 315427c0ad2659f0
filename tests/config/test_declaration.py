"""One line declares a setting: everything else follows from it."""

import dataclasses
from dataclasses import dataclass

import pytest
import torch

from nanochat.config import config_file
from nanochat.config.config_file import from_command_line, help_text, read_config, render_config
from nanochat.config.declaration import resumable_names, setting
from nanochat.config.settings import Settings
from nanochat.system.environment import UserError
from nanochat.training.estimate import Hardware
from nanochat.training.resume import resumed_settings
from scripts.configure import Dialogue


@dataclass(frozen=True)
class Extended(Settings):
    noise: float = setting(0.0, "noise added to the embedding", "model", ge=0, le=1, ask="noise?", resumable=True)


@pytest.fixture
def extended(monkeypatch):
    monkeypatch.setitem(config_file.STAGES, "base", Extended)
    return Extended


def test_a_setting_is_declared_in_one_line(extended, tmp_path):
    """In config.py, flags, --help and the wizard's questions. Red when any of them has a list of its own."""
    path = tmp_path / "config.py"
    path.write_text(render_config(extended(noise=0.25)))
    assert read_config(path, extended)["noise"] == 0.25
    assert "# noise added to the embedding" in path.read_text()

    assert from_command_line(["--noise=0.5"], kind=extended).settings.noise == 0.5
    with pytest.raises(UserError, match=r"noise=2 is too large: at most 1"):
        from_command_line(["--noise=2"], kind=extended)
    assert "--noise=number" in help_text("x", kind=extended)

    hardware = Hardware("cpu", "cpu", 1, None, 1e9, torch.float32)
    questions = Dialogue(hardware, extended(), "cpu", {}).questions
    assert ("model", "noise") in questions
    assert ("model", "rope_base") not in questions


@pytest.mark.parametrize("resumable", [True, False])
def test_the_declaration_decides_whether_a_resume_may_change_a_setting(extended, tmp_path, resumable):
    """Red when resume.py has a list of its own."""
    kind = dataclasses.make_dataclass(
        "Kind", [("noise", float, setting(0.0, "noise", "model", resumable=resumable))], bases=(Settings,), frozen=True
    )
    assert ("noise" in resumable_names(kind)) == resumable
    command = from_command_line(["--resume", "--noise=0.5", "--model_tag=x"], kind=kind)
    saved = {"noise": 0.0, "model_tag": "x"}
    if resumable:
        assert resumed_settings(command, tmp_path / "x", saved, 3).noise == 0.5
    else:
        with pytest.raises(UserError, match=r"--resume cannot change noise=0\.5"):
            resumed_settings(command, tmp_path / "x", saved, 3)
