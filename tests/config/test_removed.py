"""Settings of version 0.1.0 that are gone: dropped with one line where they had no effect, refused otherwise."""

import pytest

from nanochat.config.config_file import from_command_line, read_config
from nanochat.config.removed import log_removed
from nanochat.config.settings import Settings, checked_settings
from nanochat.system.environment import UserError
from nanochat.training.resume import resumed_settings
from tests.messages import record_messages

EXPECTED = ["batch_start = None has no effect: the setting was removed after version 0.1.0"]


@pytest.fixture(autouse=True)
def nothing_logged_yet():
    """Each test stands for a new process."""
    log_removed.cache_clear()


def test_a_config_of_the_version_before_is_accepted_with_one_line(tmp_path):
    """Red when batch_start is an unknown setting, or when the line is not logged."""
    path = tmp_path / "old.py"
    path.write_text('depth = 3\nbatch_start = None\nroute = "sort"\n')
    with record_messages() as lines:
        assert read_config(path) == {"depth": 3, "route": "sort"}
    assert lines == EXPECTED


def test_a_resume_with_config_and_checkpoint_of_the_version_before_logs_one_line(tmp_path):
    """Red when config.py and checkpoint each log theirs."""
    path = tmp_path / "old.py"
    path.write_text('batch_start = None\nmodel_tag = "x"\nroute = "sort"\n')
    saved = {"batch_start": None, "model_tag": "x", "route": "sort"}
    with record_messages() as lines:
        command = from_command_line([str(path), "--resume"])
        assert resumed_settings(command, tmp_path / "x", saved, 3) == Settings(model_tag="x")
    assert lines == EXPECTED


def test_a_removed_flag_without_effect_is_accepted():
    with record_messages() as lines:
        assert from_command_line(["--batch_start=None", "--depth=3"]).settings == Settings(depth=3)
    assert lines == EXPECTED


@pytest.mark.parametrize("line", ["batch_start = 2048", 'untie = "random"', 'route = "slice"', "batch_start = False"])
def test_a_value_that_had_an_effect_names_the_last_version_that_knew_it(tmp_path, line):
    """Red when the value is called misspelt, or is dropped."""
    path = tmp_path / "old.py"
    path.write_text(f'modalities = "audio:16"\n{line}\n')
    with pytest.raises(UserError, match=r"old\.py:2.*with version 0\.1\.0|old\.py:2.*removed after version 0\.1\.0"):
        read_config(path)
    name, _, value = line.partition(" = ")
    with pytest.raises(UserError, match=r"0\.1\.0"):
        from_command_line([f"--{name}={value.strip(chr(34))}"])


def test_settings_of_a_checkpoint_of_the_version_before():
    """Red when checked_settings() does not ask drop_removed()."""
    with record_messages() as lines:
        assert checked_settings({"depth": 3, "batch_start": None}) == {"depth": 3}
    assert lines == EXPECTED
    with pytest.raises(UserError, match=r"batch_start=2048 .*0\.1\.0"):
        checked_settings({"depth": 3, "batch_start": 2048})
