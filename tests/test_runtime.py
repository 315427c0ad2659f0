"""The machine under a run: exit codes, devices, atomic files, the metrics log, trackers that fail."""

import errno
import json
import os
import sys
import types
from pathlib import Path

import pytest
import torch

from nanochat import runtime
from nanochat.runtime import MetricsLog, UserError, base_dir, init_compute, run_script, write_atomically


def exit_code(error: BaseException) -> int:
    def main() -> None:
        raise error

    with pytest.raises(SystemExit) as caught:
        run_script(main)
    return caught.value.code


def test_a_users_mistake_is_one_line_and_code_2(capsys):
    """Red when run_script lets the traceback through, or the message keeps its line breaks."""
    assert exit_code(UserError("depth=0 is too small:\n at least 1")) == 2
    out, err = capsys.readouterr()
    assert (out, err) == ("", "error: depth=0 is too small: at least 1\n")


def test_only_rank_0_speaks(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert exit_code(UserError("no")) == 2
    runtime.print0("hello")
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES])
def test_a_full_or_closed_disk_is_the_users_to_mend(code, capsys):
    assert exit_code(OSError(code, os.strerror(code), "/somewhere/x")) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert os.strerror(code) in err
    assert "/somewhere/x" in err


def test_bugs_keep_their_traceback_and_other_exits_their_code():
    with pytest.raises(ZeroDivisionError):
        run_script(lambda: 1 / 0)
    with pytest.raises(OSError, match="Interrupted"):
        run_script(lambda: (_ for _ in ()).throw(OSError(errno.EINTR, "Interrupted")))
    assert exit_code(SystemExit(3)) == 3
    assert exit_code(KeyboardInterrupt()) == 130


def test_base_dir_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    assert base_dir() == tmp_path
    monkeypatch.setenv("NANOCHAT_BASE_DIR", "~/x")
    assert base_dir() == Path.home() / "x"
    monkeypatch.setenv("NANOCHAT_BASE_DIR", "")
    assert base_dir() == Path.home() / ".cache" / "nanochat"


def test_devices_that_are_not_there_are_refused():
    assert runtime.pick_device_type("cpu") == "cpu"
    with pytest.raises(UserError, match="'tpu' is unknown"):
        runtime.pick_device_type("tpu")
    missing = "cuda" if torch.backends.mps.is_available() else "mps"
    with pytest.raises(UserError, match=f"'{missing}' is not available on this machine: choose one of .*cpu"):
        runtime.pick_device_type(missing)


def test_init_compute_seeds_and_makes_the_cpu_deterministic():
    draws = []
    for _ in range(2):
        compute = init_compute("cpu", "bfloat16", 7)
        draws.append((torch.rand(3).tolist(), runtime.random.random(), runtime.np.random.rand()))
    assert draws[0] == draws[1]
    assert (compute.device, compute.dtype, compute.rank, compute.world_size) == (
        torch.device("cpu"),
        torch.bfloat16,
        0,
        1,
    )
    assert torch.are_deterministic_algorithms_enabled()
    assert runtime.pick_dtype("float32", "cpu") is torch.float32
    init_compute("cpu", None, 2**63 - 1)  # larger than numpy's seeds


def test_peaks():
    """The longer name wins: an H100 PCIE is not an H100 SXM."""
    assert runtime.gpu_peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert runtime.gpu_peak_flops("NVIDIA H100 PCIe") == 756e12
    assert runtime.gpu_peak_flops("Some new GPU") is None
    assert runtime.measured_matmul_flops(torch.device("cpu"), torch.float32, size=64, seconds=0.01) > 1e6


# ---------------------------------------------------------------------------------------------------------------------
# files


def test_write_atomically_leaves_the_old_or_the_new_file(tmp_path, monkeypatch):
    """Red when the text is written in place, or the temporary file stays behind."""
    path = tmp_path / "deep" / "file.txt"
    write_atomically(path, "old")
    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:

            def full(*_):
                raise OSError(errno.ENOSPC, "No space left on device")

            patch.setattr(os, name, full)
            with pytest.raises(OSError, match="No space"):
                write_atomically(path, "new")
        assert path.read_text() == "old"
        assert list(path.parent.iterdir()) == [path]
    write_atomically(path, "new")
    assert path.read_text() == "new"


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
    assert runtime.open_tracker("disabled", "r", {}, tmp_path) is None
    assert not started
    runtime.open_tracker("offline", "my run", {"depth": 4}, tmp_path)
    assert (started["mode"], started["name"], started["config"]) == ("offline", "my run", {"depth": 4})
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if not installed
    assert runtime.open_tracker("online", "r", {}, tmp_path) is None
    assert "wandb is not available (ModuleNotFoundError" in capsys.readouterr().out


def test_a_missing_compiler_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-c++")
    assert runtime.compiler_problem() == "no C++ compiler (no-such-c++) on PATH"
