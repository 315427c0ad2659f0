"""Python processes without the seconds that importing torch takes: forks of one process that has imported it."""

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from nanochat import hardware

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    [
        "torch._inductor.config",
        "torch.distributed.launcher.api",
        "nanochat.training.launch",
        "nanochat.data_pipeline",
        "nanochat.evaluation.offline",
    ]
)


class Forked:
    """As subprocess.Popen([python, "-m", module or "-c", program or file, *words]); one file takes what it prints.

    stdout: that file, or anything else with a name. A terminal by that name becomes the process's own, for input too.
    The ranks of torch.distributed.run are forks of their launcher. For what depends on the hash seed, on what is
    imported or on exit handlers take a new interpreter.
    """

    def __init__(self, command: Sequence[str], *, env=None, cwd=None, stdout=None, stderr=subprocess.STDOUT):
        self._file = stdout or tempfile.NamedTemporaryFile(prefix="forked-")  # noqa: SIM115  # lives as long as this
        self._read = 0
        arguments = list(map(str, command[1:])), dict(env or os.environ), self._file.name, cwd or os.getcwd()
        self._process = _context.Process(target=_begin, args=arguments)
        self._process.start()
        # Else the next start, in another thread perhaps, asks for the exit code beside us, and one of both gets 255.
        multiprocessing.process._children.discard(self._process)
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout)
        return self._process.exitcode

    def communicate(self, timeout: float | None = None) -> tuple[str, None]:
        self.wait(timeout)
        return self.output(), None

    def output(self) -> str:
        """All that it has printed so far."""
        return Path(self._file.name).read_text(encoding="utf-8")

    def readline(self) -> str:
        """Its next line, waited for; what is left, perhaps "", when it has ended."""
        while True:
            ended = self.poll() is not None
            line, newline, _ = self.output()[self._read :].partition("\n")
            if newline or ended:
                self._read += len(line + newline)
                return line + newline
            time.sleep(0.005)

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def spawn(function: Callable, arguments: tuple, ranks: int) -> None:
    """torch.multiprocessing.spawn, of forks: function(rank, *arguments) in each of them; raises what one raises."""
    from torch import multiprocessing as torch_processes

    torch_processes.start_processes(function, arguments, ranks, start_method="forkserver")


def _begin(command: list[str], env: dict[str, str], output: str, cwd: str) -> None:
    """In the new process: its own output, environment, folder and threads; then what was asked for."""
    import torch
    from torch.distributed.launcher import api

    hardware.peak_flops = lambda compute: 1e12  # measuring takes 0.6 s of each start
    if terminal := output.startswith("/dev/"):
        os.setsid()  # of this new session it is the terminal, so Ctrl-C comes as SIGINT
    descriptor = os.open(output, os.O_RDWR | os.O_APPEND)
    for standard in (0, 1, 2) if terminal else (1, 2):
        os.dup2(descriptor, standard)
    if terminal:
        sys.stdin = open(0, closefd=False)  # noqa: SIM115
    sys.stdout.reconfigure(line_buffering=True)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    torch.set_num_threads(int(env.get("OMP_NUM_THREADS", torch.get_num_threads())))

    class Forking(api.elastic_launch):
        """What torchrun starts its ranks with, told that a rank is a function."""

        def __init__(self, config, entrypoint, *rest):
            config.start_method = "fork"
            super().__init__(config, _rank, *rest)

    api.elastic_launch = Forking
    _python(command)


def _rank(*command: str) -> None:
    """A rank of torchrun, by the name "rank N"; the handlers of the launcher's signals are not its own."""
    for name in ("SIGTERM", "SIGHUP", "SIGQUIT", "SIGUSR1"):
        signal.signal(getattr(signal, name), signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if (comm := Path("/proc/self/comm")).exists():
        comm.write_text(f"rank {os.environ['RANK']}")
    try:
        _python([word for word in command if word != "-u"])
    except SystemExit as end:
        if end.code:
            raise


def _python(command: list[str]) -> None:
    """What the interpreter does with its words."""
    kind, *rest = command
    if kind == "-c":
        sys.argv = ["-c", *rest[1:]]
        exec(compile(rest[0], "<program>", "exec"), {"__name__": "__main__"})
    elif kind == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = command
        runpy.run_path(kind, run_name="__main__")
