"""The metrics log, and trackers that fail."""

import json
import sys
import types
from pathlib import Path

from nanochat.tracker import MetricsLog, open_tracker


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_metrics_log_appends_and_spells_what_json_lacks(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    log = MetricsLog(path)
    log.write(1, loss=float("nan"), grad_norm=float("inf"), event="skip", val_bpb=None, lr=0.123456789, data={"a": 1})
    log.close()
    log.close()
    log.write(2, loss=1.0)  # after the end: nothing happens
    (line,) = lines(path)
    assert line.pop("time") > 1.7e9
    assert line == dict(
        step=1, loss="nan", grad_norm="inf", event="skip", val_bpb=None, lr=0.1234568, data={"a": 1}
    )  # fmt: skip
    MetricsLog(None).write(1, loss=1.0)


def test_resuming_drops_later_and_torn_lines(tmp_path):
    """Red when `keep_below` keeps what a killed run wrote after its checkpoint."""
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 3}\n{"step": 2, "loss": 2}\n{"step": 3, "loss": 1}\n[]\n{"step": 2, "lo')
    log = MetricsLog(path, keep_below=2)
    log.write(3, loss=0.5)
    log.close()
    assert [(line["step"], line["loss"]) for line in lines(path)] == [(1, 3), (2, 2), (3, 0.5)]


class Tracker:
    def __init__(self, broken: bool):
        self.broken, self.logged, self.finished = broken, [], False

    def log(self, values: dict, step: int) -> None:
        if self.broken:
            raise ConnectionError("gone")
        self.logged.append((step, values))

    def finish(self) -> None:
        self.finished = True


def test_a_tracker_gets_the_numbers_and_its_failure_stops_nothing(tmp_path, capsys):
    good, bad = Tracker(False), Tracker(True)
    for tracker in (good, bad):
        log = MetricsLog(tmp_path / "m.jsonl", tracker)
        log.write(1, loss=2.0, event="x")
        log.write(2, loss=1.0)
        log.close()
    assert good.logged == [(1, {"loss": 2.0}), (2, {"loss": 1.0})]
    assert good.finished
    assert len(lines(tmp_path / "m.jsonl")) == 4
    assert capsys.readouterr().out.count("tracker stopped working (ConnectionError: gone)") == 1


def test_wandb_is_started_by_name_and_missed_in_one_line(monkeypatch, tmp_path, capsys):
    started = {}
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=lambda **facts: started.update(facts)))
    assert open_tracker("disabled", "r", {}, tmp_path) is None
    assert not started
    open_tracker("offline", "my run", {"depth": 4}, tmp_path)
    assert (started["mode"], started["name"], started["config"]) == ("offline", "my run", {"depth": 4})
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if not installed
    assert open_tracker("online", "r", {}, tmp_path) is None
    assert "wandb is not available (ModuleNotFoundError" in capsys.readouterr().out
