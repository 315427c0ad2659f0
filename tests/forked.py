"""Python processes without the seconds that importing torch takes: forks of one process that has imported it."""

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    [
        "torch._inductor.config",
        "torch.distributed.run",
        "nanochat.resume",
        "nanochat.training_data",
        "scripts.base_eval",
    ]
)


class Forked:
    """As subprocess.Popen([python, "-m", module or file, *words]), where stdout and stderr are one file on the disk.

    What the process runs it runs as `__main__`. The ranks of torch.distributed.run are forks of their launcher.
    """

    def __init__(self, command: list[str], *, env: dict[str, str], stdout, stderr=subprocess.STDOUT, cwd=None):
        self.output = Path(stdout.name)
        self._process = _context.Process(target=_begin, args=(list(command[1:]), dict(env), self.output, cwd))
        self._process.start()
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
        return self.output.read_text(), None

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _begin(command: list[str], env: dict[str, str], output: Path, cwd: Path | None) -> None:
    """In the new process: its own output, environment, folder and threads; then what was asked for."""
    import torch
    from torch.distributed.launcher import api

    from nanochat import runtime

    runtime.measured_matmul_flops = lambda *_, **__: 1e12  # 0.6 s of each start
    descriptor = os.open(output, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd or os.getcwd())
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
    Path("/proc/self/comm").write_text(f"rank {os.environ['RANK']}")
    try:
        _python([word for word in command if word != "-u"])
    except SystemExit as end:
        if end.code:
            raise


def _python(command: list[str]) -> None:
    if command[0] == "-m":
        sys.argv = command[1:]
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = command
        runpy.run_path(command[0], run_name="__main__")
