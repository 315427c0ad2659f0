"""The machine under a run: exit codes, devices, atomic files."""

import errno
import logging
import os
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from nanochat import files, hardware, runtime
from nanochat.files import write_atomically
from nanochat.runtime import init_compute, run_script
from nanochat.system.environment import UserError
from scripts import adapter_generate, audio_generate
from tests.forked import Forked


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
    for name, value in dict(RANK=1, WORLD_SIZE=2, MASTER_ADDR="localhost", MASTER_PORT=29500).items():
        monkeypatch.setenv(name, str(value))
    assert exit_code(UserError("no")) == 2
    logging.getLogger("nanochat").info("hello")
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
    assert hardware.gpu_peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert hardware.gpu_peak_flops("NVIDIA H100 PCIe") == 756e12
    assert hardware.gpu_peak_flops("Some new GPU") is None
    assert hardware.measure_matmul_flops(torch.device("cpu"), torch.float32, size=64, seconds=0.01) > 1e6


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


def test_a_missing_compiler_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-c++")
    assert hardware.compiler_problem() == "no C++ compiler (no-such-c++) on PATH"


def test_ranks_that_were_started_anew_do_not_see_what_the_dead_left(monkeypatch):
    """torchrun keeps one store for all attempts. Red without the prefix: gloo would call the addresses of the dead."""
    server = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    names = dict(MASTER_ADDR="localhost", MASTER_PORT=server.port, RANK=0, WORLD_SIZE=1, LOCAL_WORLD_SIZE=1)
    for name, value in {**names, "TORCHELASTIC_USE_AGENT_STORE": True, "TORCHELASTIC_RESTART_COUNT": 0}.items():
        monkeypatch.setenv(name, str(value))
    first = runtime._rendezvous()
    assert (first["rank"], first["world_size"]) == (0, 1)
    first["store"].set("address", "of a process that dies")
    assert runtime._rendezvous()["store"].check(["address"])
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert not runtime._rendezvous()["store"].check(["address"])
    monkeypatch.setenv("WORLD_SIZE", "2")  # another node counts its own attempts
    assert runtime._rendezvous() == {}


def test_a_dead_rank_is_named_before_the_launcher_ends_us():
    """The launcher's SIGTERM comes while the dead rank is looked for. Red when run_script leaves SIGTERM as it is."""
    program = """
import os, signal
from nanochat import runtime
def lost():
    os.kill(os.getpid(), signal.SIGTERM)
    return "rank 1 (process 5 on here) died"
runtime.find_lost_ranks = lost
def main():
    raise RuntimeError("Connection closed by peer")
runtime.run_script(main)
"""
    environment = {**os.environ, "TORCHELASTIC_RUN_ID": "x", "RANK": "0"}
    process = Forked([sys.executable, "-c", program], env=environment)
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 1, said
    assert "error: rank 1 (process 5 on here) died: rank 0 cannot continue (Connection closed by peer)" in said


# ---------------------------------------------------------------------------------------------------------------------
# outputs are checked before the work


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("folder.wav", "is a folder"),
        ("FILE/x.wav", "FILE is no folder"),
        ("closed/x.wav", "Permission denied"),
        ("x" * 230 + ".wav", "File name too long"),
        ("pipe.wav", "device or a pipe"),
        ("x.mp3", "only .wav"),
        ("x", "only .wav"),
        ("LOOP/x.wav", "cannot be written"),
    ],
)
@pytest.mark.parametrize("script", [audio_generate, adapter_generate])
def test_a_sound_that_could_not_be_written_is_not_generated(script, name, reason, tmp_path, monkeypatch):
    """Red when parse() does not call check_out(): the same after the sounds are made, in Python's own words."""
    (tmp_path / "folder.wav").mkdir()
    (tmp_path / "closed").mkdir()
    (tmp_path / "FILE").touch()
    (tmp_path / "LOOP").symlink_to("LOOP")
    os.mkfifo(tmp_path / "pipe.wav")
    if name.startswith("closed/"):  # for the owner of all files, too
        monkeypatch.setattr(Path, "write_bytes", denied)
    with pytest.raises(UserError) as caught:
        script.parse(["--prompt", "x", "--out", str(tmp_path / name)])
    assert str(caught.value).startswith("--out=")
    assert reason in str(caught.value)
    assert "NANOCHAT_BASE_DIR" not in str(caught.value)


def denied(path, data):
    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))


def test_every_one_of_several_sounds_is_checked(tmp_path):
    """Red when only the first name is looked at."""
    (tmp_path / "x-3.wav").mkdir()
    words = ["--prompt", "x", "--out", str(tmp_path / "x.wav"), "--num"]
    audio_generate.parse([*words, "2"])
    with pytest.raises(UserError, match=r"x-3\.wav is a folder"):
        audio_generate.parse([*words, "3"])


def test_a_check_leaves_nothing_behind_and_finds_a_full_disk(tmp_path, monkeypatch):
    """Also where the disk takes an empty file. Red when the trial file is empty, or stays."""
    files.check_output(tmp_path / "new" / "x.json", "--json")
    assert list((tmp_path / "new").iterdir()) == []
    (tmp_path / "there").write_text("old")
    files.check_output(tmp_path / "there", "--json")
    assert (tmp_path / "there").read_text() == "old"

    def full(path, data):
        path.touch()
        if data:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(UserError, match=r"No space left on device.*NANOCHAT_BASE_DIR"):
        files.check_output(tmp_path / "x.json")
    assert [path.name for path in tmp_path.iterdir() if "x.json" in path.name] == []


def test_the_user_reads_the_name_that_was_given(tmp_path):
    """Red when open_atomic() lets the error name its temporary file."""
    path = tmp_path / "no" / "x"
    with pytest.raises(FileNotFoundError) as caught, files.open_atomic(path):
        pass
    assert caught.value.filename == str(path)
