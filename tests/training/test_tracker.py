"""The metrics log, trackers that fail in every way, and real offline runs of wandb."""

import io
import json
import os
import signal
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path
from types import SimpleNamespace

import pytest
from wandb.proto.wandb_internal_pb2 import Record

from nanochat.training import tracker
from nanochat.training.tracker import MetricsLog, open_tracker
from scripts import base_train

LIMIT = 0.5  # seconds that a hanging tracker is waited for
FAKE = """
import json, os, time
MISBEHAVIOUR, WHERE = os.environ["FAKE_WANDB"].split()
url = "https://example.org/run"

def meet(where, **facts):
    with open(os.environ["FAKE_WANDB_CALLS"], "a") as file:
        file.write(json.dumps([where, facts]) + chr(10))
    if where == WHERE:
        if MISBEHAVIOUR == "raise":
            raise ConnectionError("gone" + chr(10) + "for good")
        if MISBEHAVIOUR == "exit":
            os._exit(7)
        time.sleep(3600)

def init(**facts):
    meet("init", **facts)
    import wandb
    return wandb

def log(values, step):
    meet("log", step=step, **values)

def finish():
    meet("finish")

meet("import")
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """fake("raise log"): a wandb of our own that does so in the tracker's process; returns a reader of its calls."""
    calls = tmp_path / "fake" / "calls"
    calls.parent.mkdir()
    (calls.parent / "wandb.py").write_text(FAKE)
    calls.touch()

    def behave(how: str):
        monkeypatch.setenv("PYTHONPATH", str(calls.parent), prepend=os.pathsep)
        monkeypatch.setenv("FAKE_WANDB", how)
        monkeypatch.setenv("FAKE_WANDB_CALLS", str(calls))
        monkeypatch.setattr(tracker, "FINISH_SECONDS", LIMIT)
        return lambda: [json.loads(line) for line in calls.read_text().splitlines()]

    return behave


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def wait_until(condition) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


# ---------------------------------------------------------------------------------------------------------------------
# the log


def test_the_metrics_log_appends_and_spells_what_json_lacks(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    log = MetricsLog(path)
    log.write(1, loss=float("nan"), grad_norm=float("inf"), event="skip", val_bpb=None, lr=0.123456789, data={"a": 1})
    log.close()
    log.close()
    log.write(2, loss=1.0)  # after the end: nothing happens
    (line,) = lines(path)
    assert line.pop("time") > 1.7e9
    assert line == dict(step=1, loss="nan", grad_norm="inf", event="skip", val_bpb=None, lr=0.1234568, data={"a": 1})
    MetricsLog(None).write(1, loss=1.0)


def test_resuming_drops_later_and_torn_lines(tmp_path):
    """Red when `keep_below` keeps what a killed run wrote after its checkpoint, or a torn line its place."""
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 3}\n{"step": 2, "loss": 2}\n{"step": 3, "loss": 1}\n[]\n{"step": "x"}\n{"st')
    log = MetricsLog(path, keep_below=2)
    log.write(3, loss=0.5)
    log.close()
    assert [(line["step"], line["loss"]) for line in lines(path)] == [(1, 3), (2, 2), (3, 0.5)]
    path.write_bytes(path.read_bytes()[:-9])
    log = MetricsLog(path)  # what a finished run does: it adds a line and drops none that is whole
    log.write(3, event="done")
    log.close()
    assert [line["step"] for line in lines(path)] == [1, 2, 3]


def test_a_line_is_one_system_call(tmp_path):
    """Red when the file is buffered: a long line would reach it in pieces, and a kill could tear more than the last."""
    log = MetricsLog(tmp_path / "rows.jsonl")
    raw, sizes = log.file, []
    assert isinstance(raw, io.FileIO)  # whose write() is one write(2)
    log.file = SimpleNamespace(write=lambda data: sizes.append(len(data)) or raw.write(data), close=raw.close)
    log.write(1, rows=list(range(9000)))
    log.close()
    assert sizes == [(tmp_path / "rows.jsonl").stat().st_size]
    assert lines(tmp_path / "rows.jsonl")[0]["rows"] == list(range(9000))


# ---------------------------------------------------------------------------------------------------------------------
# trackers that fail


@pytest.mark.parametrize("where", ["import", "init", "log", "finish"])
@pytest.mark.parametrize("how", ["raise", "hang", "exit"])
def test_no_tracker_stops_or_delays_a_run(fake, tmp_path, capsys, how, where):
    """Red without the kill after FINISH_SECONDS (hangs), or when _give_up keeps the child (warns twice)."""
    calls = fake(f"{how} {where}")
    log = MetricsLog(tmp_path / "m.jsonl", open_tracker("online", "r", {}, tmp_path))
    child = log.tracker.process
    log.write(1, loss=2.0)
    wait_until(lambda: where == "finish" or where in [name for name, _ in calls()])
    if how != "hang" and where != "finish":
        child.wait(10)
    start = time.monotonic()
    for step in range(2, 1001):
        log.write(step, loss=1 / step)
    log.close()
    assert time.monotonic() - start < LIMIT + 3
    assert [line["step"] for line in lines(tmp_path / "m.jsonl")] == list(range(1, 1001))
    said = [line for line in capsys.readouterr().out.splitlines() if "warning" in line]
    reason = {
        "raise": "ConnectionError: gone for good",
        "hang": "did not finish within 0.5 s",
        "exit": "exit code 7" if where == "finish" else "ended",
    }[how]
    assert len(said) == 1
    assert reason in said[0]
    assert "metrics.jsonl is complete" in said[0]
    assert child.poll() is not None
    if how == "raise":
        assert "Traceback" in (tmp_path / "tracker.log").read_text()


def test_a_tracker_gets_the_numbers_of_every_line(fake, tmp_path, capsys):
    """Red when follow() ends before it has read what was written last, or begins at the start of the file."""
    calls = fake("- -")
    (tmp_path / "m.jsonl").write_text('{"step": 1, "loss": 4.0}\n{"step": 2, "loss": 3.0}\n')
    log = MetricsLog(tmp_path / "m.jsonl", open_tracker("online", "my run", {"depth": 4}, tmp_path), keep_below=1)
    log.write(2, loss=2.0, event="x", rows=[1], lr=float("inf"))
    log.write(2, event="save")
    log.write(3, loss=1.0)
    log.close()
    (_, _), (_, facts), *rest = calls()
    assert (facts["mode"], facts["name"], facts["config"]) == ("online", "my run", {"depth": 4})
    assert rest == [
        ["log", {"step": 2, "loss": 2.0, "lr": float("inf")}],
        ["log", {"step": 3, "loss": 1.0}],
        ["finish", {}],
    ]
    assert "warning" not in capsys.readouterr().out


def test_a_killed_run_s_tracker_sends_the_rest(fake, tmp_path):
    """Red when the child does not take the end of its input as the end of the run: it would stay for ever."""
    calls = fake("- -")
    program = (
        "import os, sys; from pathlib import Path; from nanochat.training.tracker import MetricsLog, open_tracker\n"
        "folder = Path(sys.argv[1]); log = MetricsLog(folder / 'm.jsonl', open_tracker('online', 'r', {}, folder))\n"
        "for step in range(50): log.write(step, loss=1.0)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    dead = subprocess.run([sys.executable, "-c", program, tmp_path], env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert dead.returncode == -signal.SIGKILL
    wait_until(lambda: calls() and calls()[-1][0] == "finish")
    assert [facts["step"] for name, facts in calls() if name == "log"] == list(range(50))


def test_disabled_or_not_the_first_rank_is_no_tracker(tmp_path, monkeypatch):
    assert open_tracker("disabled", "r", {}, tmp_path) is None
    monkeypatch.setenv("RANK", "1")
    assert open_tracker("online", "r", {}, tmp_path) is None
    assert list(tmp_path.iterdir()) == []


def test_a_resumed_run_keeps_its_id_and_a_torn_one_is_replaced(tmp_path, capsys):
    """Red when _run_id takes what it finds unseen, or makes a new one each time."""
    first = open_tracker("offline", "r", {}, tmp_path).init
    assert open_tracker("offline", "r", {}, tmp_path).init["id"] == first["id"]
    assert first["resume"] == "allow"
    path = tmp_path / "wandb_run_id"
    for odd in (b"", first["id"][:7].encode(), b"\xff\xfe", b"../../etc/passwd"):
        path.write_bytes(odd)
        new = open_tracker("offline", "r", {}, tmp_path).init["id"]
        assert len(new) == 16
        assert new != first["id"]
        assert path.read_text() == f"{new}\n"
    path.unlink()
    path.mkdir()
    assert open_tracker("offline", "r", {}, tmp_path) is None
    assert capsys.readouterr().out.count("warning: no tracker") == 1


# ---------------------------------------------------------------------------------------------------------------------
# the real wandb, and the real training script


def records(path: Path):
    """The records of a .wandb file: a LevelDB log of 32 KiB blocks behind a header of 7 bytes; any damage is an error.

    github.com/google/leveldb/blob/main/doc/log_format.md, with plain CRC-32 over type and data.
    """
    data, at, parts = path.read_bytes(), 7, []
    assert data[:4] == b":W&B"
    while at < len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        crc, size, kind = struct.unpack_from("<IHB", data, at)
        part = data[at + 7 : at + 7 + size]
        assert len(part) == size
        assert zlib.crc32(bytes([kind]) + part) == crc
        parts.append(part)
        at += 7 + size
        if kind in (1, 4):  # full, last
            record = Record()
            record.ParseFromString(b"".join(parts))
            yield record
            parts = []
    assert not parts


def test_offline_runs_are_whole_and_can_be_sent_later(tmp_path, monkeypatch):
    """Red when the environment's WANDB_MODE=disabled wins, the child is killed before it is done, or wandb's
    cache goes to the home directory."""
    folder = tmp_path / "tag"
    folder.mkdir()
    for name in ("HOME", "TMPDIR"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(name, str(tmp_path / name))
    for start in (1, 401):
        log = MetricsLog(folder / "metrics.jsonl", open_tracker("offline", "name", {"depth": 4}, folder), start - 1)
        for step in range(start, start + 400):
            log.write(step, loss=1 / step, lr=0.1)
        log.close()
    runs = sorted(folder.glob("wandb/offline-run-*/*.wandb"))
    assert len(runs) == 2
    steps, ids = [], set()
    for run in runs:
        found = list(records(run))
        ids |= {record.run.run_id for record in found if record.HasField("run")}
        items = [
            {i.nested_key[0] if i.nested_key else i.key: json.loads(i.value_json) for i in r.history.item}
            for r in found
            if r.HasField("history")
        ]
        assert all(item["loss"] == pytest.approx(1 / item["_step"], abs=1e-6) for item in items)
        steps += [item["_step"] for item in items]
        assert found[-1].WhichOneof("record_type") in ("exit", "footer", "final", "request")
    assert steps == list(range(1, 801))
    assert ids == {(folder / "wandb_run_id").read_text().strip()}
    assert not any((tmp_path / "HOME").iterdir())
    assert not any((tmp_path / "TMPDIR").iterdir())


def test_tracker_failure(fake, tmp_path, monkeypatch, capsys):
    """tracker_failure: the training script ends as always beside a tracker that hangs. Red as those above."""
    fake("hang log")
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    monkeypatch.setattr(base_train, "peak_flops", lambda compute: 1e12)
    text = tmp_path / "stories"
    text.mkdir()
    for number in range(20):
        (text / f"{number}.txt").write_text(f"the cat {number} sleeps under the tree and the dog runs\n" * 20)
    settings = dict(
        data=text,
        vocab_size=300,
        depth=1,
        model_dim=32,
        head_dim=32,
        max_seq_len=32,
        total_batch_size=128,
        device_batch_size=4,
        num_iterations=5,
        compile=False,
        device_type="cpu",
        dtype="float32",
        eval_every=None,
        eval_tokens=128,
        model_tag="t",
        wandb_mode="online",
    )
    result = base_train.main([f"--{name}={value}" for name, value in settings.items()])
    assert result["stopped"] == "done"
    log = lines(tmp_path / "base" / "base_checkpoints" / "t" / "metrics.jsonl")
    assert [line["step"] for line in log if "loss" in line] == [1, 2, 3, 4, 5]
    assert log[-1]["event"] == "done"
    assert capsys.readouterr().out.count("warning: wandb stopped") == 1
