"""The first signal is noted, the second ends the process at once, also while the main thread is away in C."""

import os
import signal
import sys
import time

import pytest

from nanochat.training.stop_signals import StopSignals
from tests.forked import Forked

# The main thread leaves Python for minutes, as in a collective whose peer is gone.
BUSY = """
import hashlib, signal, sys
from nanochat.training.stop_signals import StopSignals
with StopSignals() as signals:
    print("ready", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2_000_000_000)
"""


@pytest.fixture
def busy(request):
    process = Forked([sys.executable, "-c", BUSY])
    assert process.readline() == "ready\n"
    yield process
    process.kill()
    process.wait()


def send(number: int) -> None:
    os.kill(os.getpid(), number)
    time.sleep(0.05)  # until the thread has read it


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_the_first_signal_is_noted_and_handlers_come_back(name):
    """Red when SIGUSR1 keeps its default, which ends the process."""
    before = signal.getsignal(getattr(signal, name))
    with StopSignals() as signals:
        assert signals.requested is None
        send(getattr(signal, name))
        assert signals.requested == name
    assert signal.getsignal(getattr(signal, name)) == before
    with StopSignals() as signals:  # a second run in this process starts unasked
        assert signals.requested is None


def test_a_second_signal_ends_the_process_at_once(busy):
    """Red when the handler runs in Python's main thread, which does not come back."""
    busy.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    assert busy.poll() is None
    busy.send_signal(signal.SIGTERM)
    assert busy.wait(timeout=5) == 128 + signal.SIGTERM


def test_a_launchers_copy_of_the_first_signal_does_not_count_as_a_second(monkeypatch):
    """Schedulers signal the whole job. Red without ECHO: one signal would end the process before it has saved."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job")
    with StopSignals() as signals:
        send(signal.SIGTERM)
        send(signal.SIGTERM)  # this process is still there to say so
        assert signals.requested == "SIGTERM"


def test_an_ignored_signal_stays_ignored(monkeypatch):
    """nohup and shells' background jobs ignore Ctrl-C. Red when every signal gets a handler."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with StopSignals() as signals:
            send(signal.SIGINT)
            assert signals.requested is None
            send(signal.SIGTERM)
            assert signals.requested == "SIGTERM"
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("error", [RuntimeError, ValueError])
@pytest.mark.parametrize("under_torchrun", [False, True])
def test_a_launcher_cannot_end_a_rank_that_has_yet_to_name_the_dead_one(monkeypatch, error, under_torchrun):
    """Red when SIGTERM has its default again between a collective's error and run_script, or stays ignored for ever."""
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    if under_torchrun:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(error), StopSignals():
            raise error("connection closed by peer")
        ignored = signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
        assert ignored == (under_torchrun and error is RuntimeError)
    finally:
        signal.signal(signal.SIGTERM, before)
