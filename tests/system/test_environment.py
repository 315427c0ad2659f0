"""What a process finds in its environment: the base folder and the variables of a launcher."""

import errno
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from nanochat.audio.sources import holds_sounds
from nanochat.checkpoint_manager import find_checkpoint
from nanochat.conversion import convert as conversion
from nanochat.runtime import run_script
from nanochat.system import environment
from nanochat.system.environment import UserError, base_dir, check_launcher, expand_user
from nanochat.system.storage_errors import describe
from tests.forked import Forked
from tests.tiny_run import CHECKOUT, TINY, flags, start

# ---------------------------------------------------------------------------------------------------------------------
# the base folder


def no_home() -> Path:
    raise RuntimeError("Could not determine home directory.")


def test_the_base_folder_may_be_anything_that_is_or_can_be_a_folder(monkeypatch, tmp_path):
    """Red when the value is taken as it is: relative ones would follow the current folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ends in a blank ").mkdir()
    for given in ("Über 🎵 'x' \"y\" #$&", str(tmp_path / "new" / "deep"), "ends in a blank ", "."):
        monkeypatch.setenv("NANOCHAT_BASE_DIR", given)
        assert base_dir() == tmp_path / given
        assert base_dir().is_absolute()
    monkeypatch.setenv("NANOCHAT_BASE_DIR", "~/x")
    assert base_dir() == Path.home() / "x"
    monkeypatch.setenv("NANOCHAT_BASE_DIR", "")
    assert base_dir() == Path.home() / ".cache" / "nanochat"


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ("FILE", "is a file"),
        ("FILE/below", "Not a directory"),
        ("~nosuch/x", "no such home folder"),
        ("new ", "white space"),
        ("new\n", "white space"),
        (" ", "white space"),
        ("x" * 300, "File name too long"),
        ("LOOP/x", "Too many levels"),
        ("a\udcffb", "is no UTF-8"),
        (None, "has no home folder"),
    ],
)
def test_a_base_folder_that_cannot_be_is_one_line_and_code_2(given, reason, monkeypatch, tmp_path, capsys):
    """Whatever asks for it. Red when base_dir() lets Path's own errors out, or takes a file."""
    (tmp_path / "FILE").touch()
    (tmp_path / "LOOP").symlink_to("LOOP")
    monkeypatch.chdir(tmp_path)
    if given is None:
        monkeypatch.delenv("NANOCHAT_BASE_DIR")
        monkeypatch.setattr(Path, "home", no_home)
    else:
        monkeypatch.setenv("NANOCHAT_BASE_DIR", given)
    with pytest.raises(SystemExit) as ended:
        run_script(base_dir)
    said = capsys.readouterr().err
    assert (ended.value.code, said.count("\n")) == (2, 1)
    assert "NANOCHAT_BASE_DIR" in said
    assert reason in said
    run_script(lambda: None)  # as --help, which needs none


def test_help_needs_no_home_and_no_base_folder():
    """In a new interpreter, as a user without an entry in passwd. Red when keep_caches() lets base_dir() raise."""
    program = """
import os, pathlib, runpy, sys
def no_home(*_):
    raise RuntimeError("Could not determine home directory.")
pathlib.Path.home = classmethod(no_home)
pathlib.Path.expanduser = no_home
runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)
"""
    variables = {name: value for name, value in os.environ.items() if name not in ("HOME", "NANOCHAT_BASE_DIR", "USER")}
    scripts = ["base_train", "base_eval", "adapter_train", "audio_generate", "summary", "plot_run"]
    running = [Forked([sys.executable, "-c", program, f"scripts.{name}", "--help"], env=variables) for name in scripts]
    for name, process in zip(scripts, running, strict=True):
        said = process.communicate(timeout=60)[0]
        assert process.returncode == 0, (name, said)
        assert "usage: " in said


def test_a_path_with_a_home_that_is_not_there_is_refused(tmp_path, monkeypatch):
    assert expand_user("~/x", "data") == Path.home() / "x"
    with pytest.raises(UserError, match="codec='~nosuch/x': there is no such home"):
        expand_user("~nosuch/x", "codec")
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    with monkeypatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", "x")
        with pytest.raises(UserError, match="NANOCHAT_BASE_DIR='x': the current folder is gone"):
            base_dir()
    for name, value, look in (
        ("model_tag", "~nosuch/x", lambda: find_checkpoint("~nosuch/x", None)),
        ("--from-hf", "~nosuch/x", lambda: conversion.open_hugging_face("~nosuch/x")),
        ("data", "~nosuch/x", lambda: holds_sounds("~nosuch/x")),
    ):
        with pytest.raises(UserError, match=f"{name}='{value}': there is no such home folder"):
            look()


@pytest.mark.parametrize("number", [errno.EFBIG, errno.EDQUOT, errno.EROFS, errno.ENOTDIR, errno.EISDIR])
def test_the_way_out_of_an_error_of_the_disk_fits_its_place(number, monkeypatch, tmp_path):
    """NANOCHAT_BASE_DIR is named for what lies there alone. Red when describe() says it of every path."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    inside = describe(OSError(number, os.strerror(number), str(tmp_path / "x")), base_dir())
    outside = describe(OSError(number, os.strerror(number), "/elsewhere/x"), base_dir())
    assert "NANOCHAT_BASE_DIR" in inside
    assert "NANOCHAT_BASE_DIR" not in outside
    assert "/elsewhere/x" in outside


# ---------------------------------------------------------------------------------------------------------------------
# the launcher

ALL = dict(RANK="1", WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT="29500")


@pytest.fixture
def launcher(monkeypatch):
    """launcher(**variables): these are set and no others of a launcher."""

    def put(**variables: str) -> None:
        for name in (*environment.LAUNCHER, *environment.LOCAL):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return put


@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        (dict(RANK="0", WORLD_SIZE="2"), "MASTER_ADDR and MASTER_PORT are missing"),
        (dict(RANK="1"), "WORLD_SIZE and MASTER_ADDR and MASTER_PORT are missing"),
        (dict(WORLD_SIZE="4"), "RANK and MASTER_ADDR and MASTER_PORT are missing"),
        (ALL | dict(MASTER_PORT=""), "MASTER_PORT is missing"),
        (ALL | dict(RANK="abc"), "RANK is not a whole number"),
        (ALL | dict(RANK="-1"), "RANK is not a whole number"),
        (ALL | dict(RANK="2"), "RANK must be below WORLD_SIZE"),
        (dict(RANK="0", WORLD_SIZE="0"), "MASTER_ADDR and MASTER_PORT are missing"),
        (ALL | dict(RANK="0", WORLD_SIZE="0"), "RANK must be below WORLD_SIZE"),
        (ALL | dict(LOCAL_RANK="5"), "LOCAL_RANK must be below"),
        (ALL | dict(LOCAL_RANK="1", LOCAL_WORLD_SIZE="1"), "LOCAL_RANK must be below"),
        (ALL | dict(LOCAL_RANK="x"), "LOCAL_RANK is not a whole number"),
        (ALL | dict(MASTER_PORT="99999"), "MASTER_PORT is no port"),
        (ALL | dict(TORCHELASTIC_RESTART_COUNT="many"), "TORCHELASTIC_RESTART_COUNT is not a whole number"),
    ],
)
def test_launcher_variables_that_are_no_launch_are_one_line_and_code_2(variables, reason, launcher, capsys):
    """On every rank, and with the way out. Red when check_launcher() returns at once: tracebacks, or silence."""
    launcher(**variables)
    with pytest.raises(SystemExit) as ended:
        run_script(lambda: None)
    said = capsys.readouterr().err
    assert (ended.value.code, said.count("\n")) == (2, 1)
    assert reason in said
    assert f"`unset {' '.join(name for name in (*ALL, *environment.LOCAL) if variables.get(name))}`" in said


def test_leftovers_without_a_rank_are_ignored_and_said(launcher, capsys):
    """Red when LOCAL_RANK stays: this process would wait for another one to make the tokens, on another GPU."""
    launcher(LOCAL_RANK="3", TORCHELASTIC_RUN_ID="none", MASTER_ADDR="gone", TORCHELASTIC_RESTART_COUNT="")
    check_launcher()
    assert (
        capsys.readouterr().err
        == "ignoring LOCAL_RANK=3 TORCHELASTIC_RUN_ID=none: no launcher set RANK and WORLD_SIZE\n"
    )
    assert not {"LOCAL_RANK", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT"} & os.environ.keys()


def test_a_launch_is_left_alone(launcher, capsys):
    """By torchrun, by hand, and of a single process. Red when LOCAL_WORLD_SIZE is asked for."""
    for variables in (
        ALL,
        ALL | dict(LOCAL_RANK="0", LOCAL_WORLD_SIZE="1", TORCHELASTIC_RUN_ID="7", TORCHELASTIC_RESTART_COUNT="2"),
        dict(RANK="0"),
        dict(RANK="0", WORLD_SIZE="1", MASTER_PORT="1"),
        {},
    ):
        launcher(**variables)
        check_launcher()
        assert variables.items() <= os.environ.items()
    assert capsys.readouterr().err == ""


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("localhost", 0))
        return one.getsockname()[1]


def test_ranks_that_are_started_by_hand_train_together(corpus, base):
    """RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, nothing else. Red when torchrun's own variables are asked for."""
    names = dict(WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT=str(free_port()))
    words = flags({**TINY, "data": corpus, "model_tag": "by-hand", "device_batch_size": 2})
    ranks = [start(base, *words, RANK=str(rank), LOCAL_RANK=str(rank), **names) for rank in (0, 1)]
    said = [process.communicate(timeout=120)[0] for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], said
    assert "training by-hand on 2 x cpu" in said[0]


def test_a_launch_whose_others_never_come_is_one_line(corpus, base):
    """Either rank, alone, waits for --rank_timeout. Red without wait_for_master() or the except in Meeting._connect(),
    or where the meeting keeps the default patience of 600 s.
    """
    names = dict(WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT=str(free_port()))
    words = flags({**TINY, "data": corpus, "model_tag": "alone", "device_batch_size": 2, "rank_timeout": 1})
    for rank in ("1", "0"):
        process = start(base, *words, RANK=rank, **names)
        said = process.communicate(timeout=120)[0]
        assert process.returncode == 2, said
        assert f"error: rank {rank} of 2 did not meet all others at localhost:" in said
        assert said.count("\n") == 1, "torch's own words, with its stack, or a traceback"
        assert "`unset RANK WORLD_SIZE MASTER_ADDR MASTER_PORT`" in said


def test_import_order_needs_no_torch():
    """The environment is read before torch is there. Red when environment.py imports it."""
    code = "import sys; import nanochat.system.environment, nanochat.system.streams; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(CHECKOUT)}).returncode == 0
