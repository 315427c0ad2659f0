"""Messages on the terminal and in run.log."""

import logging
import re
from pathlib import Path

import pytest

from nanochat.system import logs
from nanochat.system.environment import UserError
from tests.tiny_run import tag_dir

logger = logging.getLogger("nanochat.somewhere")


@pytest.fixture(autouse=True)
def usual_level():
    yield
    logs.set_log_level("info")


def test_warnings_are_named_and_debug_is_hidden(capsys):
    """Red when LineFormatter does not name the level, or the console's level is not info."""
    logger.debug("details")
    logger.info("100% of it")
    logger.warning("watch out")
    assert capsys.readouterr() == ("100% of it\nwarning: watch out\n", "")


def test_other_ranks_log_errors_only(capsys, monkeypatch):
    """Red without the filter of the console."""
    for name, value in dict(RANK=1, WORLD_SIZE=2, MASTER_ADDR="localhost", MASTER_PORT=29500).items():
        monkeypatch.setenv(name, str(value))
    logger.warning("everybody sees this")
    logger.error("this rank's own")
    assert capsys.readouterr().out == "error: this rank's own\n"


def test_run_log_holds_what_a_quiet_terminal_does_not_show(tmp_path, capsys):
    """Red when run.log takes the console's level, or replaces what an earlier start wrote."""
    (tmp_path / "run.log").write_text("before\n")
    logs.set_log_level("warning")
    with logs.run_log(tmp_path / "run.log", "warning"):
        logger.info("step 1")
        logger.warning("hot \ud800")
    logger.info("after the run")
    lines = (tmp_path / "run.log").read_text().splitlines()
    assert lines[0] == "before"
    assert len(lines) == 3
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ", line) for line in lines[1:])
    assert lines[1].endswith(" step 1")
    assert lines[2].endswith(r" warning: hot \ud800")
    assert capsys.readouterr().out.startswith("warning: hot")


@pytest.mark.parametrize("error", [UserError("no such data"), ZeroDivisionError("1 / 0")])
def test_run_log_ends_with_the_error_that_ended_the_run(tmp_path, error):
    """A user's mistake in one line, anything else with its traceback."""
    with pytest.raises(type(error)), logs.run_log(tmp_path / "run.log"):
        raise error
    text = (tmp_path / "run.log").read_text()
    assert str(error) in text.splitlines()[0]
    assert ("Traceback" in text) == isinstance(error, ZeroDivisionError)


@pytest.mark.parametrize("where", ["/dev/full", "/proc/run.log"])
def test_a_run_log_that_cannot_be_written_costs_one_warning(where, capsys):
    """Red when handleError() prints its traceback, or when the handler stays."""
    with logs.run_log(Path(where)):
        logger.info("one")
        logger.info("two")
    out, err = capsys.readouterr()
    assert out.count("cannot be written") == 1
    assert "warning: " in out
    assert "one\n" in out
    assert "two\n" in out
    assert err == ""


def test_a_run_log_waits_for_its_folder(tmp_path):
    """The refused run leaves nothing behind, the other has every line. Red when the handler makes the folder itself."""
    with pytest.raises(UserError), logs.run_log(tmp_path / "refused" / "run.log"):
        logger.info("reading the data")
        raise UserError("no such data")
    assert list(tmp_path.iterdir()) == []
    with logs.run_log(tmp_path / "good" / "run.log"):
        logger.info("reading the data")
        (tmp_path / "good").mkdir()
        logger.info("step 1")
    lines = (tmp_path / "good" / "run.log").read_text().splitlines()
    assert [line.split(" ", 2)[2] for line in lines] == ["reading the data", "step 1"]


def test_muted_drops_messages_but_no_errors(capsys):
    with logs.muted():
        logger.warning("again")
        logger.error("broken")
    logger.info("heard")
    assert capsys.readouterr().out == "error: broken\nheard\n"


def test_training_writes_run_log_and_obeys_log_level(train, base, capsys):
    """run.log has the lines of the terminal, and those that a quiet one hides. Red without run_log() in launch."""
    train("logged", num_iterations=1)
    shown = capsys.readouterr().out
    text = (tag_dir("logged") / "run.log").read_text()
    assert "parameters: " in text
    assert "parameters: " in shown

    train("quiet", num_iterations=1, log_level="warning")
    assert "parameters: " not in capsys.readouterr().out
    assert "parameters: " in (tag_dir("quiet") / "run.log").read_text()
