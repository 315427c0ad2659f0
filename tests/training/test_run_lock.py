"""The lock of a model_tag: who holds it is told, who is gone does not count."""

import errno
import fcntl
import json
import os
import platform
import sys
import time

import pytest

from nanochat.runtime import process_state
from nanochat.system import temporary
from nanochat.system.environment import UserError
from nanochat.training.run_lock import run_lock
from tests.forked import Forked

HOLDER = """
import sys, time
from pathlib import Path
from nanochat.training.run_lock import run_lock
with run_lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(100)
"""


# All wait for the gate; the one that gets in stays there.
STARTS = """
import os, sys, time
from pathlib import Path
from nanochat.training.run_lock import run_lock
from nanochat.runtime import UserError
print("ready", flush=True)
while not os.path.exists(sys.argv[1]):
    pass
try:
    with run_lock(Path(FOLDER)):
        os.write(1, b"in\\n")
        time.sleep(100)
except UserError:
    os.write(1, b"out\\n")
"""


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "runs" / "tag"


@pytest.fixture
def holder(folder):
    process = Forked([sys.executable, "-c", HOLDER, folder])
    assert process.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def owner(**changes) -> str:
    me = dict(pid=os.getpid(), host=platform.node(), started=process_state(os.getpid())[1], launch=None, since="noon")
    return json.dumps(me | changes)


def test_the_lock_is_held_and_let_go(folder):
    path = folder.with_name(".tag.lock")
    with run_lock(folder):
        facts = json.loads(path.read_text())
        assert (facts["pid"], facts["host"]) == (os.getpid(), platform.node())
        with (
            pytest.raises(UserError, match=rf"model_tag='tag' is being trained by process {os.getpid()} on "),
            run_lock(folder),
        ):
            raise AssertionError("two at once")
        assert json.loads(path.read_text()) == facts
        with run_lock(folder.with_name("other")):
            pass
    assert not path.exists()
    with pytest.raises(KeyError), run_lock(folder):
        raise KeyError
    assert not path.exists()


def test_another_process_holds_it_until_it_is_killed(folder, holder, capsys):
    """Red when the lock is only a file, or a dead process's file counts as held."""
    with pytest.raises(UserError, match=f"process {holder.pid} on "), run_lock(folder):
        pass
    facts = folder.with_name(".tag.lock").read_text()
    folder.with_name(".tag.lock").write_text(owner(pid=2**22 + 1))  # as seen from another container: no such process
    with pytest.raises(UserError, match="is being trained by"), run_lock(folder):
        pass
    folder.with_name(".tag.lock").write_text(facts)
    with run_lock(folder, ignore=True):  # told to; the other one's lock is no longer ours to remove
        assert json.loads(folder.with_name(".tag.lock").read_text())["pid"] == os.getpid()
    holder.kill()
    holder.wait()
    folder.with_name(".tag.lock").write_text(owner(pid=holder.pid))
    with run_lock(folder):
        assert f"process {holder.pid} on {platform.node()} (since noon) left its lock" in capsys.readouterr().out


STALE = {
    "its number is another process's": (owner(started="1"), 0, True),
    "this very process": (owner(), 0, False),
    "just touched on another host": (owner(host="elsewhere"), 0, False),
    "long untouched on another host": (owner(host="elsewhere"), 3600, True),
    "torn": ('{"pid": 12', 0, True),
    "no object": ("[1]", 0, True),
    "empty": ("", 0, True),
}


@pytest.mark.parametrize("how", STALE)
def test_stale_locks_are_recognised(folder, how):
    """A file that no living process has locked. Red when age is taken for death on this host, or not on others."""
    text, age, free = STALE[how]
    folder.parent.mkdir()
    path = folder.with_name(".tag.lock")
    path.write_text(text)
    os.utime(path, (time.time() - age, time.time() - age))
    if free:
        with run_lock(folder):
            pass
        assert not path.exists()
    else:
        with pytest.raises(UserError, match="is being trained by"), run_lock(folder):
            pass
        assert path.read_text() == text


def test_a_launchers_restart_takes_its_own_lock_over(folder, monkeypatch):
    """The first rank may have moved to another host, which the lock of a living one has not.

    Red when the host alone decides, or when a second job of the same id gets in at its restart.
    """
    folder.parent.mkdir()
    folder.with_name(".tag.lock").write_text(owner(host="elsewhere", launch="job-7"))
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job-7")
    with pytest.raises(UserError), run_lock(folder):
        pass
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    with run_lock(folder):
        pass
    folder.with_name(".tag.lock").write_text(owner(launch="job-7"))
    with pytest.raises(UserError), run_lock(folder):
        pass


def test_two_starts_at_a_stale_lock(folder):
    """4 processes at once: one gets in. Red when a held lock is taken over because its file is old."""
    script = STARTS.replace("FOLDER", repr(str(folder)))
    folder.parent.mkdir(exist_ok=True)
    folder.with_name(".tag.lock").write_text(owner(pid=2**22 + 1))
    gate = folder.with_name("gate")
    racers = [Forked([sys.executable, "-c", script, gate]) for _ in range(4)]
    for racer in racers:
        assert racer.readline() == "ready\n"
    gate.touch()
    answers = [racer.readline() for racer in racers]
    for racer in racers:
        racer.kill()
        racer.wait()
    assert answers.count("out\n") == 3, answers  # the fourth tells that it takes the lock over


def test_a_file_system_without_locks_still_trains(folder, monkeypatch, capsys):
    """Red when any OSError of flock goes through."""

    def unknown(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", unknown)
    with run_lock(folder):
        assert "knows no locks (Function not implemented)" in capsys.readouterr().out
        with pytest.raises(UserError, match=f"trained by process {os.getpid()}"), run_lock(folder):
            pass


def test_the_holder_shows_that_it_lives(folder, monkeypatch):
    """Red without heartbeat(): on another host a long run would look stale."""
    monkeypatch.setattr(temporary, "HEARTBEAT_SECONDS", 0.01)
    with run_lock(folder):
        path = folder.with_name(".tag.lock")
        os.utime(path, (1, 1))
        deadline = time.monotonic() + 5
        while path.stat().st_mtime < 1e9:
            assert time.monotonic() < deadline
            time.sleep(0.01)
