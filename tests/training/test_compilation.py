"""The compiler under a run: where it may work, and what is said when it fails."""

import os
import shlex
import stat
import sys
from pathlib import Path

import pytest
import torch

from nanochat.config.settings import Settings
from nanochat.gpt import GPT, GPTConfig
from nanochat.optim import build_optimizer, muon_update
from nanochat.system import environment
from nanochat.system.environment import plain_path
from nanochat.training.compilation import compile_model, compiler_message, is_compiled
from tests.forked import Forked


@pytest.mark.parametrize("name", ["a blank", "a'quote", 'a"quote', "a\\backslash", "a\nline", "a\udcffbyte"])
def test_a_path_that_no_command_line_takes_is_reached_through_a_link(name, tmp_path, monkeypatch):
    """Red when plain_path() returns the folder: g++ would see two words, or an open quote."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    folder = tmp_path / name / "deep"
    link = plain_path(folder)
    assert link.resolve() == folder.resolve()
    assert shlex.split(str(link)) == [str(link)]
    assert link.parent == tmp_path / f"nanochat-{os.getuid()}"
    assert stat.S_IMODE(link.parent.stat().st_mode) == 0o700
    assert plain_path(folder) == link
    link.unlink()
    link.symlink_to(tmp_path)  # led astray
    assert plain_path(folder).resolve() == folder.resolve()


def test_other_paths_stay_as_they_are():
    for path in ("/x/y", "/x/Umläut #1 $y".replace(" ", "-"), "/a,b&c(d)"):
        assert plain_path(Path(path)) == Path(path)


def test_no_link_is_made_where_somebody_else_could_change_it(tmp_path, monkeypatch):
    """Red when the folder's owner and mode are not looked at: its files are code that we run."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    private = tmp_path / f"nanochat-{os.getuid()}"
    private.mkdir()
    private.chmod(0o777)
    link = plain_path(tmp_path / "a blank")
    assert link.parent != private
    assert list(private.iterdir()) == []
    if link.is_symlink():
        link.unlink()


def test_all_that_the_compiler_is_given_can_be_written_into_a_command_line(tmp_path):
    """In a process that has not imported the compiler. Red when import_compiler() leaves the cache or TMPDIR alone, or
    the libraries' folders unquoted."""
    program = """
import os, shlex, tempfile
from nanochat.system import environment
tempfile.tempdir = None  # of the process that this one is a fork of
tempfile.gettempdir()
environment.keep_caches()
environment.import_compiler()
environment.import_compiler()
from torch._inductor import codecache, cpp_builder
folders = dict(libraries_dirs=["/a blank/lib"], include_dirs=["/a blank/include"])
options = cpp_builder.BuildOptionsBase(compiler="g++", **folders)
line = cpp_builder.CppBuilder("kernel", "kernel.cpp", options).get_command_line()
assert {"-L/a blank/lib", "-I/a blank/include"} <= set(shlex.split(line)), line
print(codecache._HEADER_DIR, codecache.cache_dir(), tempfile.gettempdir(), sep="\\n")
"""
    base, temporary = tmp_path / "a 'base' folder", tmp_path / "a temporary one"
    temporary.mkdir()
    names = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "TMPDIR")
    variables = {name: value for name, value in os.environ.items() if name not in names}
    variables |= dict(NANOCHAT_BASE_DIR=str(base), TMPDIR=str(temporary))
    process = Forked([sys.executable, "-c", program], env=variables)
    said = process.communicate(timeout=120)[0]
    assert process.returncode == 0, said
    headers, cache, scratch = map(Path, said.split("\n")[:3])
    assert headers.parts[: len(cache.parts)] == cache.parts
    assert cache.resolve() == base / "compiled" / "torchinductor"
    assert scratch.resolve() == temporary
    for path in (headers, cache, scratch):
        assert not environment.AWKWARD.search(str(path))


def test_the_reason_for_running_eager_is_the_compilers_own(monkeypatch, capsys):
    """Red when the first line of torch's error is all: it says that there was one."""
    message = (
        "CppCompileError: C++ compile error\n\nCommand:\ng++ x.cpp\n\nOutput:\nx.cpp: In function f:\n"
        "x.cpp:3:1: error: expected ';'\n"
    )
    assert compiler_message(RuntimeError(message)) == (
        "RuntimeError: CppCompileError: C++ compile error: x.cpp:3:1: error: expected ';'"
    )
    assert compiler_message(RuntimeError("short")) == "RuntimeError: short"

    model = GPT(GPTConfig(sequence_len=8, vocab_size=300, n_layer=1, n_head=2, n_kv_head=2, n_embd=16))
    model.init_weights()

    def broken(self) -> None:
        def fail(*_):
            raise RuntimeError(message)

        self.block_forward = fail

    monkeypatch.setattr(GPT, "compile", broken)
    monkeypatch.setattr("nanochat.training.compilation.compiler_problem", lambda: None)
    optimizer = build_optimizer(model, Settings(), torch.float32)
    compile_model(model, 1, optimizer)
    assert not is_compiled(model)
    assert optimizer.muon_update is muon_update
    assert "running without torch.compile" in (said := capsys.readouterr().out)
    assert "expected ';'" in said


def test_is_compiled_reports_the_models_state():
    """What metrics.jsonl says. Red when is_compiled() looks at the settings instead of the model."""
    model = GPT(GPTConfig(sequence_len=8, vocab_size=300, n_layer=1, n_head=2, n_kv_head=2, n_embd=16))
    assert not is_compiled(model)
    model.compile()
    assert is_compiled(model)
    model.uncompile()
    assert not is_compiled(model)
    assert not is_compiled(torch.nn.Linear(1, 1))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_muon_is_compiled_on_a_gpu_alone(monkeypatch, device):
    """As far as one gets without a GPU. Red when it is on a CPU, or stays so where the model could not be compiled."""
    model = GPT(GPTConfig(sequence_len=8, vocab_size=300, n_layer=1, n_head=2, n_kv_head=2, n_embd=16))
    model.init_weights()
    optimizer, switched = build_optimizer(model, Settings(), torch.float32), []
    monkeypatch.setattr(GPT, "compile", lambda model: None)
    monkeypatch.setattr(type(optimizer), "compile", lambda optimizer: switched.append(True))
    monkeypatch.setattr(type(optimizer), "uncompile", lambda optimizer: switched.append(False))
    if device == "cuda":
        monkeypatch.setattr(GPT, "device", torch.device("cuda", 99))  # there is no such device
    compile_model(model, 1, optimizer)
    assert switched == {"cpu": [], "cuda": [True, False]}[device]
