"""Signals that ask a run to stop: a scheduler's preemption (SIGTERM, SIGUSR1) or Ctrl-C (SIGINT).

The first one is noted, and the loop saves and leaves at the end of its step; the second one ends the process at once.
"""

import os
import signal
import threading
import time

from nanochat.system.environment import under_torchrun

ECHO = 2.0  # seconds: a scheduler signals the whole job, and torchrun passes its own copy on to its workers
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopSignals:
    """Context manager: inside it `requested` is None until a signal comes, then its name.

    A thread reads the signals: the main thread may sit for long in a matmul, or for ever in a collective whose peer
    is gone, and Python runs handlers only there. Signals that the parent had us ignore (nohup) stay ignored. Outside
    of the main thread, where Python sets no handlers, nothing is noted.
    """

    def __init__(self):
        self.requested: str | None = None

    def __enter__(self) -> "StopSignals":
        self._before: dict = {}
        if threading.current_thread() is not threading.main_thread():
            return self
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        # Python's own C handler writes each signal's number there, whatever the threads are doing.
        self._wakeup = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        threading.Thread(target=self._watch, args=(self._reader,), name="signals", daemon=True).start()
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, lambda *_: None)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        failed = kind is not None and issubclass(kind, RuntimeError)
        for number, handler in self._before.items():
            if number == signal.SIGTERM and failed and under_torchrun():
                handler = signal.SIG_IGN  # the launcher may end us because a rank died: run_script names it first
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup)
        os.close(self._writer)  # the thread reads the end of the pipe

    def _watch(self, reader: int) -> None:
        first = 0.0
        with open(reader, "rb", buffering=0) as pipe:
            while number := pipe.read(1):
                if number[0] not in SIGNALS:
                    continue
                if self.requested is None:
                    self.requested, first = signal.Signals(number[0]).name, time.monotonic()
                elif not (under_torchrun() and time.monotonic() - first < ECHO):
                    os._exit(128 + number[0])  # what is half-written is under a temporary name


class EvaluationInterrupted(Exception):
    """An evaluation was asked to stop before its end, on any rank; raised on all, after the same collectives."""
