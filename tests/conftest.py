"""The suite's surroundings: a throw-away base folder, no network, few threads, the same random cases every time."""

import getpass
import ipaddress
import os
import random
import signal
import socket
import tempfile
from pathlib import Path

import hypothesis
import pytest

from nanochat import hardware

# Before anything reads them: huggingface_hub does so when it is imported, child processes inherit all of them.
_SCRATCH = tempfile.TemporaryDirectory(prefix="nanochat-tests-")
os.environ.update(
    NANOCHAT_BASE_DIR=f"{_SCRATCH.name}/base",
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    WANDB_MODE="disabled",
    WANDB_SILENT="true",
    MPLBACKEND="agg",
    HF_HOME=f"{_SCRATCH.name}/huggingface",
)
# torch's own place for what it compiled: the scripts would choose one in the base folder, and compile anew each time.
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", f"{tempfile.gettempdir()}/torchinductor_{getpass.getuser()}")

hypothesis.settings.register_profile("suite", derandomize=True, deadline=None, print_blob=True, database=None)
hypothesis.settings.load_profile("suite")

# A shell starts background jobs with SIGINT ignored, nohup with SIGHUP, and children inherit that: untestable.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_unconfigure() -> None:
    _SCRATCH.cleanup()


@pytest.fixture(scope="session", autouse=True)
def few_threads():
    """At most two torch threads, so that figures do not depend on the machine's size."""
    import torch  # only when a test runs: collecting stays quick

    torch.set_num_threads(min(2, torch.get_num_threads()))


@pytest.fixture(scope="session", autouse=True)
def quiet_folder():
    """Run in an empty folder: scripts read ./config.py, and one that lies in the checkout must not change a test."""
    before = Path.cwd()
    folder = Path(_SCRATCH.name) / "cwd"
    folder.mkdir()
    os.chdir(folder)
    yield folder
    os.chdir(before)


def _is_local(host: str | None) -> bool:
    if host in (None, "", "localhost", socket.gethostname()):
        return True
    try:
        return ipaddress.ip_address(host.split("%")[0]).is_loopback
    except ValueError:
        return False  # a name that somebody would have to look up


@pytest.fixture(scope="session", autouse=True)
def no_network():
    """Any connection or name look-up that leaves this machine fails as on a machine without network.

    Covers this process; child processes get HF_HUB_OFFLINE and WANDB_MODE from the environment.
    """
    connect, connect_ex, lookup = socket.socket.connect, socket.socket.connect_ex, socket.getaddrinfo

    def check(sock, address):
        if sock.family in (socket.AF_INET, socket.AF_INET6) and not _is_local(address[0]):
            raise OSError(101, f"Network is unreachable (tests are offline): {address}")

    def offline_connect(sock, address):
        check(sock, address)
        return connect(sock, address)

    def offline_connect_ex(sock, address):
        check(sock, address)
        return connect_ex(sock, address)

    def offline_lookup(host, *args, **kwargs):
        if not _is_local(host.decode() if isinstance(host, bytes) else host):
            raise socket.gaierror(socket.EAI_AGAIN, f"Temporary failure in name resolution (tests are offline): {host}")
        return lookup(host, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", offline_connect)
        patch.setattr(socket.socket, "connect_ex", offline_connect_ex)
        patch.setattr(socket, "getaddrinfo", offline_lookup)
        yield


def _module_text(rng: random.Random, functions: int) -> str:
    """A made-up Python module: imports, functions with docstrings, branches and loops over a few dozen words."""
    nouns = "row column token shard batch index weight offset buffer header record value path name key".split()
    verbs = "read write merge split count find check sort drop pack scan trim load move join".split()
    lines = [f'"""Tools to {rng.choice(verbs)} a {rng.choice(nouns)}."""', "", f"import {rng.choice(['os', 're'])}", ""]
    for number in range(functions):
        verb, noun, other = rng.choice(verbs), *rng.sample(nouns, 2)
        lines += [
            f"def {verb}_{noun}_{number}({noun}, {other}, limit={rng.randrange(100)}):",
            f'    """{verb.capitalize()} the {noun} with its {other}, at most {rng.randrange(1000)} times."""',
            f"    if {noun} is None or limit < {rng.randrange(10)}:",
            f"        raise ValueError('no {noun} to {verb}')",
            f"    {other}s = [{noun}]",
            f"    for {other} in range(limit):",
            f"        {other}s.append({other} {rng.choice('+-*')} {rng.randrange(50)})",
            f"    return {rng.choice([f'{other}s', f'len({other}s)', f'{noun}, {other}s'])}",
            "",
        ]
    return "\n".join(lines)


@pytest.fixture(scope="session")
def tiny_corpus(tmp_path_factory) -> Path:
    """A folder of 60 generated .py documents in two sub-folders, about 250 KB, the same bytes in every run."""
    folder = tmp_path_factory.mktemp("tiny_corpus")
    rng = random.Random(1337)
    for number in range(60):
        path = folder / ("lib" if number % 3 else "app") / f"module_{number:02d}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(_module_text(rng, functions=rng.randrange(8, 20)), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """24 small documents: an epoch of 12 rows of 64 tokens a step is over after about 13 steps."""
    folder = tmp_path_factory.mktemp("corpus")
    rng = random.Random(0)
    words = "the a cat dog tree house runs sleeps under over behind quickly and then never 1 22 333".split()
    for number in range(24):
        text = "\n".join(" ".join(rng.choices(words, k=9)) for _ in range(24))
        (folder / f"story {number}.txt").write_text(text)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """One base folder for all runs of a file, so that data and tokenizer are made once."""
    return tmp_path_factory.mktemp("base")


@pytest.fixture
def train(base, corpus, monkeypatch):
    """train(tag, *switches, **settings): base_train's main() on the tiny model; the peak is measured in no time."""
    from scripts import base_train
    from tests.tiny_run import TINY, flags, started

    real = hardware.measure_matmul_flops
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(base))
    monkeypatch.setattr(hardware, "measure_matmul_flops", lambda *args: real(*args, size=64, seconds=0) and 1e12)

    def run(tag: str, *words: str, **settings) -> dict:
        return base_train.main(flags({"data": corpus, **TINY, **settings, "model_tag": tag}) + list(words))

    yield run
    while started:
        if (process := started.pop()).poll() is None:
            process.terminate()  # a launcher passes it on to its ranks, which save and leave
            process.wait(timeout=60)
