"""Output that cannot be written or spelt: no run may feel it, and no tool whose result it is may hide it."""

import errno
import io
import json
import os
import subprocess
import sys
import threading

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat.data import dataset
from nanochat.system import logs, streams
from tests.forked import Forked
from tests.tiny_run import CHECKOUT, TINY, flags, metrics, tag_dir

ODD = "Über 🎵 \udcff \ufffd"  # an umlaut, an emoji, a byte of a file name that is no UTF-8, the sign for such bytes
NARROW = {
    "latin-1": dict(PYTHONIOENCODING="latin-1"),
    "ascii": dict(PYTHONIOENCODING="ascii:strict"),
    "cp1252": dict(PYTHONIOENCODING="cp1252"),
    "C locale": dict(LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0"),
}


def python(program: str, redirect: str = "", **environment: str) -> subprocess.CompletedProcess:
    """A new interpreter without torch: encodings and closed descriptors are settled before Python's first line."""
    command = ["sh", "-c", f'exec "$0" -c "$1" {redirect}', sys.executable, program]
    env = {**os.environ, "PYTHONPATH": str(CHECKOUT), **environment}
    return subprocess.run(command, env=env, capture_output=True, timeout=60)


@pytest.mark.parametrize("encoding", NARROW)
def test_any_text_is_printed_in_any_encoding(encoding):
    """Red when _safe() keeps the stream's own errors, which are strict here."""
    program = f"""
import argparse, sys, warnings
from nanochat.system import logs, streams
streams.open_streams()
print({ODD!a}, sys.stdout.fileno())
streams.emit({ODD!a}, flush=True)
print({ODD!a}, file=sys.stderr)
warnings.warn({ODD!a})
streams.close_streams()
argparse.ArgumentParser(description={ODD!a}).parse_args(["--help"])
"""
    done = python(program, **NARROW[encoding])
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.split(b"\n")[:2]
    spelt = ODD.encode("ascii" if encoding in ("ascii", "C locale") else encoding, "backslashreplace")
    assert (first, second) == (spelt + b" 1", spelt)
    assert done.stderr.count(rb"\U0001f3b5 \udcff") == 2


@pytest.mark.parametrize(
    ("redirect", "reason"),
    [
        (">/dev/full", "No space left on device"),
        (">&-", "it is closed"),
        (">/dev/full 2>/dev/full", None),
        (">&- 2>&-", None),
        ("2>&-", None),
        ("<&-", None),
    ],
)
def test_a_stream_that_cannot_be_written_ends_nothing(redirect, reason):
    """Exit code 0 and one line, whatever prints. Red when _Descriptor.write() raises what it caught."""
    program = """
import os, sys
from nanochat.system import logs, streams
streams.open_streams()
file = open(os.devnull, "w")
assert file.fileno() > 2, "a closed descriptor was given to the next file"
for number in range(3):
    print("x" * 100_000)
    streams.emit("y", flush=True)
print("to standard error", file=sys.stderr)
sys.stdin.read()
assert streams.on_terminal() is False
streams.close_streams()
os._exit(0 if not os.environ["REASON"] or streams.lost["standard output"] == os.environ["REASON"] else 1)
"""
    done = python(program, redirect, REASON=reason or "")
    assert done.returncode == 0, done.stderr
    said = done.stderr.decode()
    assert said.count("continuing without it") == (reason is not None)
    assert f"standard output cannot be written ({reason})" in said or reason is None


@pytest.mark.parametrize("lost", ["full", "closed", "reader gone"])
def test_a_tool_whose_result_is_its_output_says_when_that_is_lost(lost, tmp_path):
    """Red when require_output() does nothing: generated text would be gone with exit code 0."""
    program = """
import os, sys, time
from nanochat import runtime
from nanochat.system import logs, streams
def main():
    streams.require_output()
    for number in range(20):
        print("x" * 100_000, flush=True)
        time.sleep(0.01)
runtime.run_script(main)
"""
    before = {
        "full": "os.dup2(os.open('/dev/full', os.O_WRONLY), 1)",
        "closed": "os.close(1); sys.stdout = sys.__stdout__ = None",  # as the interpreter begins
        "reader gone": "reader, writer = os.pipe(); os.dup2(writer, 1); os.close(reader)",
    }
    program = program.replace("def main", f"{before[lost]}\ndef main")
    with open(tmp_path / "stderr", "w+") as stderr:
        process = Forked([sys.executable, "-c", program], stdout=stderr)
        code = process.wait(60)
    said = process.output()
    if lost == "reader gone":
        assert (code, said) == (141, "")
    else:
        assert (code, said.count("\n")) == (2, 1)
        assert said.startswith("error: standard output cannot be written (")


def test_a_reader_that_is_slow_loses_nothing():
    """Of a pipe that does not block. Red when _write() gives up at the first None."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    stream = io.TextIOWrapper(io.BufferedWriter(streams._Descriptor(writer, "test", None)), "utf-8")
    text = "0123456789" * 30_000  # more than a pipe holds
    received = []

    def read() -> None:
        while len(b"".join(received)) < len(text):
            received.append(os.read(reader, 10_000))

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    stream.write(text)
    stream.flush()
    thread.join(30)
    os.close(reader)
    os.close(writer)
    assert b"".join(received).decode() == text
    assert "test" not in streams.lost


def test_a_main_that_is_called_with_other_streams_prints_all_the_same(monkeypatch, capsys):
    """Red when messages go through print(): notebooks and tests bring streams of their own, strict ones among them."""
    monkeypatch.setattr(streams, "lost", {})
    narrow = io.TextIOWrapper(io.BytesIO(), "ascii", "strict")
    monkeypatch.setattr(sys, "stdout", narrow)
    logs.ROOT.info("Ü \udcff")
    assert narrow.buffer.getvalue() == rb"\xdc \udcff" + b"\n"
    monkeypatch.setattr(sys, "stdout", None)
    logs.ROOT.info("nowhere")
    assert not streams.on_terminal()
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        logs.ROOT.info("x")
        logs.ROOT.info("y")
        assert sys.stdout is not full
        with pytest.raises(OSError, match="No space"):
            full.flush()
        os.dup2(os.open(os.devnull, os.O_WRONLY), full.fileno())
    monkeypatch.undo()
    assert capsys.readouterr().err.count("continuing without it") == 1


def test_printing_to_a_stream_that_was_closed_meanwhile_ends_nothing(monkeypatch, capsys):
    """A caller may close its stream while a thread prints. Red when emit() lets ValueError pass."""
    monkeypatch.setattr(streams, "lost", {})
    closed = io.StringIO()
    closed.close()
    monkeypatch.setattr(sys, "stdout", closed)
    logs.ROOT.info("one")
    logs.ROOT.info("two")
    assert streams.lost == {"standard output": "it is closed"}
    assert capsys.readouterr().err == "standard output cannot be written (it is closed): continuing without it\n"


def test_a_run_whose_output_is_lost_trains_to_its_end_and_says_so_in_its_log(corpus, base, monkeypatch):
    """Red when run_script does not call open_streams(), or MetricsLog drops the news."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(base))
    words = flags({**TINY, "data": corpus, "model_tag": "full", "sample_every": 1})
    with open(os.devnull) as null:
        program = (
            "import os, sys; full = os.open('/dev/full', os.O_WRONLY); os.dup2(full, 1); os.dup2(full, 2);"
            f"sys.argv[1:] = {words!r};"
            "from scripts import base_train; from nanochat.runtime import run_script; run_script(base_train.main)"
        )
        process = Forked([sys.executable, "-c", program], env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=null)
        assert process.wait(timeout=120) == 0
    assert (tag_dir("full") / "step_000004").is_dir()
    reason = os.strerror(errno.ENOSPC)
    assert {**metrics("full", "lost")[0]} == {"standard error": reason, "standard output": reason}
    assert len(metrics("full", "lost")) == 1
    assert json.loads((tag_dir("full") / "metrics.jsonl").read_text().splitlines()[-1])["event"] == "done"


def test_a_parquet_file_is_found_by_the_bytes_of_its_name(tmp_path):
    """A name need not be UTF-8, and under LC_ALL=C none seems to be. Red when pyarrow is handed the path itself."""
    path = tmp_path / "b\udcffä 🎵.parquet"
    with open(path, "wb") as file:
        pq.write_table(pa.table({"text": ["one", "two"]}), file)
    assert [text for _, text in dataset.read_shard(path)] == ["one", "two"]
