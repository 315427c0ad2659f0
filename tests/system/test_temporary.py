"""Temporary names: who owns them, and that nobody deletes what a live process is writing."""

import errno
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from nanochat import checkpoint_files
from nanochat import checkpoint_manager as checkpoints
from nanochat.audio import codecs as audio
from nanochat.audio import fitted_codec
from nanochat.conversion.huggingface import write_hf
from nanochat.data import prepare
from nanochat.data.tokenizer import Tokenizer
from nanochat.gpt import GPT, GPTConfig
from nanochat.system import temporary
from nanochat.system.temporary import (
    file_lock,
    machine_id,
    owner_suffix,
    process_state,
    remove_abandoned,
    scratch_folder,
)
from tests.forked import Forked

ANCIENT = (1e9, 1e9)


def named(folder: Path, owner: str, kind: str = "folder", times: tuple = ANCIENT) -> Path:
    """A temporary file or folder of that owner, last written long ago."""
    path = folder / f".name.{owner}.tmp"
    path.mkdir() if kind == "folder" else path.write_bytes(b"half")
    os.utime(path, times)
    return path


def dead_owner() -> str:
    """The suffix of a process on this machine that has ended."""
    code = "from nanochat.system.temporary import owner_suffix; print(owner_suffix())"
    process = Forked([sys.executable, "-c", code])
    assert process.wait(timeout=60) == 0
    return process.output().strip()


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_only_what_dead_processes_left_is_deleted(tmp_path, kind):
    """Live here, however old: kept; dead here, however young: deleted; elsewhere: by the heartbeat; unknown: by age.

    Red when is_abandoned() looks at the age first, or does not compare the start times.
    """
    pid, started, *_ = owner_suffix().split("-")
    now, hour_ago = (time.time(),) * 2, (time.time() - 2 * temporary.STALE_SECONDS,) * 2
    live = named(tmp_path, owner_suffix(), kind)
    dead = named(tmp_path, dead_owner(), kind, now)
    namesake = named(tmp_path, f"{pid}-{int(started) + 1}-{machine_id()}-0", kind, now)
    beating = named(tmp_path, f"{pid}-{started}-00000000-0", kind, now)
    silent = named(tmp_path, f"{pid}-{started}-00000000-1", kind, hour_ago)
    older_form = [named(tmp_path, f"{pid}{n}", kind, times) for n, times in enumerate((now, hour_ago))]
    remove_abandoned(tmp_path, ".*.tmp")
    assert {path for path in tmp_path.iterdir()} == {live, beating, older_form[0]}
    assert not any(path.exists() for path in (dead, namesake, silent, older_form[1]))
    remove_abandoned(tmp_path, ".*.tmp", own=True)
    assert not live.exists()


def test_machines_of_one_name_are_told_apart(monkeypatch):
    """Containers share a host's name and process numbers. Red when machine() is the hash of platform.node() alone."""
    first = machine_id.__wrapped__()
    monkeypatch.setattr(temporary.os, "readlink", lambda path: "pid:[1]")
    assert len(first) == 8
    assert machine_id.__wrapped__() != first == machine_id()


def test_a_scratch_folder_beats_while_nothing_is_written(tmp_path, monkeypatch):
    """Red when scratch_folder() starts no thread: another machine would take the folder for abandoned."""
    monkeypatch.setattr(temporary, "HEARTBEAT_SECONDS", 0.01)
    with scratch_folder(tmp_path / "name[1]") as scratch:
        os.utime(scratch, ANCIENT)
        deadline = time.monotonic() + 20
        while scratch.stat().st_mtime < 2e9 and time.monotonic() < deadline and scratch.stat().st_mtime == 1e9:
            time.sleep(0.01)
        assert scratch.stat().st_mtime > 1e9
    assert not list(tmp_path.iterdir())


PREPARING = """
import os, sys
from nanochat.data import prepare
from nanochat.system.environment import base_dir
with prepare._scratch(base_dir() / "data", "slow") as scratch:
    os.utime(scratch, (1e9, 1e9))
    print(scratch, flush=True)
    sys.stdin.readline()
    print(scratch.is_dir(), flush=True)
"""


def test_a_live_preparation_outlives_others(tiny_corpus, base):
    """A preparation that has written nothing for years is not deleted by another process that prepares something.

    Red when _scratch() deletes by age: `time.time() - stale.stat().st_mtime > 3600` in place of is_abandoned().
    """
    environment = {**os.environ, "NANOCHAT_BASE_DIR": str(base), "PYTHONPATH": str(Path(__file__).parents[2])}
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", PREPARING]
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment) as process:
        scratch = Path(process.stdout.readline().strip())
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("NANOCHAT_BASE_DIR", str(base))
            prepare.prepare(str(tiny_corpus))
        print(file=process.stdin, flush=True)
        assert process.stdout.readline().strip() == "True"
    assert not scratch.exists()


class Held(threading.Thread):
    """Runs write(), which is stopped in the middle by `reached`, until `go` is set."""

    def __init__(self, write):
        super().__init__()
        self.write, self.reached, self.go, self.error = write, threading.Event(), threading.Event(), None

    def pause(self) -> None:
        if threading.current_thread() is self:
            self.reached.set()
            assert self.go.wait(30)

    def run(self) -> None:
        try:
            self.write()
        except BaseException as error:
            self.error = error


@pytest.mark.parametrize("what", ["tokenizer", "codec"])
def test_two_writers_of_one_target_do_not_share_a_temporary_folder(tmp_path, monkeypatch, what):
    """The second writer of the same folder, in the middle of the first one's work, disturbs nothing.

    Containers have equal process numbers, which two threads stand for here. Red when the temporary name holds the
    process number alone.
    """
    tokenizer = Tokenizer([bytes([i]) for i in range(256)])
    noise = np.random.default_rng(0).standard_normal(16_000).astype(np.float32) / 8
    saved = tokenizer if what == "tokenizer" else fitted_codec.fit_codec("frame", [noise], 1, 16)
    held, fsync = Held(lambda: saved.save(tmp_path / "target")), os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: (held.pause(), fsync(handle))[1])
    held.start()
    assert held.reached.wait(30)
    saved.save(tmp_path / "target")
    held.go.set()
    held.join()
    assert held.error is None
    assert [path.name for path in tmp_path.iterdir()] == ["target"]
    load = Tokenizer.load if what == "tokenizer" else audio.load_codec
    assert load(tmp_path / "target").hash == saved.hash


def save_a_step(folder: Path) -> None:
    checkpoints.save_checkpoint(folder, 1, {"w": torch.ones(2)}, None, {})


def export_a_model(folder: Path) -> None:
    model = GPT(GPTConfig(sequence_len=8, vocab_size=32, n_layer=1, n_head=1, n_kv_head=1, n_embd=8))
    write_hf(folder / "target", model.config, model.state_dict())


PLACES = {
    "saving a step": (".step_000001.tmp-{}", save_a_step),
    "the start of a run": (".metrics.jsonl.{}.tmp", checkpoint_files.remove_stale_temp_files),
    "a tokenizer": (
        ".target.{}.tmp",
        lambda folder: Tokenizer([bytes([i]) for i in range(256)]).save(folder / "target"),
    ),
    "an export": (".target.{}.tmp", export_a_model),
}


@pytest.mark.parametrize("place", PLACES)
def test_every_writer_spares_the_live_and_clears_after_the_dead(tmp_path, place):
    """Red when save_checkpoint() deletes by name alone, or scratch_folder() clears nothing away."""
    form, write = PLACES[place]
    parent = os.getppid()
    live = tmp_path / form.format(f"{parent}-{process_state(parent)[1]}-{machine_id()}-0")
    dead = tmp_path / form.format(dead_owner())
    for path in (live, dead):
        path.mkdir()
        os.utime(path, ANCIENT)
    write(tmp_path)
    assert live.exists()
    assert not dead.exists()


def test_file_lock_keeps_others_out_and_leaves_nothing(tmp_path):
    """Red when acquire() is left out, or when the file is unlinked after release()."""
    path, order = tmp_path / ".lock", []
    with file_lock(path) as mine, file_lock(path, wait=False) as second:
        assert mine
        assert not second

        def wait():
            with file_lock(path):
                order.append("other")

        other = threading.Thread(target=wait)
        other.start()
        time.sleep(0.1)
        order.append("mine")
    other.join()
    assert order == ["mine", "other"]
    assert not list(tmp_path.iterdir())


def test_file_systems_without_locks_keep_nobody_out(tmp_path, monkeypatch):
    """Red when open_locked() lets every OSError through."""

    def missing(*args, **kwargs):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(temporary.fcntl, "flock", missing)
    with file_lock(tmp_path / ".lock") as first, file_lock(tmp_path / ".lock", wait=False) as second:
        assert first
        assert second
    assert not list(tmp_path.iterdir())
