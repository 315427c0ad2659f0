"""What we promise about strangers' files, the network and the disk: one named test each."""

import ast
import json
import os
import pickle
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from nanochat import checkpoint_files
from nanochat import checkpoint_manager as cm
from nanochat.config.config_file import read_config
from nanochat.config.settings import Settings
from nanochat.data.tokenizer import Tokenizer
from nanochat.data_pipeline import find_or_train
from nanochat.gpt import GPT, GPTConfig
from nanochat.system.environment import UserError
from nanochat.upstream.pickles import read_pt, read_tokenizer_pickle
from scripts import base_train, configure
from tests.forked import Forked
from tests.tiny_run import CHECKOUT, TINY, flags
from tests.upstream.test_checkpoints import baits, hostile_pickles, saved, works

# ---------------------------------------------------------------------------------------------------------------------
# pickles


def save_step(tag_dir: Path) -> tuple[Path, Tokenizer]:
    """A whole step of a tiny model with its tokenizer."""
    tokenizer = Tokenizer([bytes([i]) for i in range(256)])
    config = GPTConfig(sequence_len=8, vocab_size=tokenizer.vocab_size, n_layer=1, n_head=2, n_kv_head=2, n_embd=16)
    model = GPT(config)
    model.init_weights()
    metadata = {"model_config": vars(config), "tokenizer_hash": tokenizer.hash}
    return cm.save_checkpoint(tag_dir, 1, model.state_dict(), None, metadata, tokenizer=tokenizer), tokenizer


def test_malicious_pickle(tmp_path, monkeypatch):
    """Where nanochat's files are read nothing of theirs runs, and where ours are read no pickle is looked at.

    Red when read_tokenizer_pickle calls pickle.loads(raw), with weights_only=False, or when Tokenizer.load takes a
    tokenizer.pkl for a missing ranks.tiktoken.
    """
    marker, path = tmp_path / "marker", tmp_path / "file"
    for _, content in hostile_pickles(marker):
        path.write_bytes(content)
        with pytest.raises(UserError):
            read_tokenizer_pickle(path)
    for bait in baits(marker).values():
        path.write_bytes(saved({"w": torch.ones(2), "x": bait}))
        with pytest.raises(UserError):
            read_pt(path)
    assert not marker.exists()

    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    step, tokenizer = save_step(cm.checkpoints_dir() / "m")
    cm.load_model("base", "cpu", "eval", "m")  # torch imports the rest of itself, which knows of pickle
    named = tokenizer.save(tmp_path / "base" / "tokenizers" / "named")
    bait = pickle.dumps(baits(marker)["posix.mkdir"])
    for folder in (step, step / "tokenizer", step.parent, named):
        for name in ("tokenizer.pkl", "model_000001.pt", "optimizer.pt", "rng.pkl", "token_bytes.pt"):
            (folder / name).write_bytes(bait)
    (named / "token_bytes.npy").write_bytes(bait)
    with monkeypatch.context() as patch:
        for module, name in ((pickle, "Unpickler"), (pickle, "load"), (pickle, "loads"), (torch, "load")):
            patch.setattr(module, name, None)
        assert cm.load_model("base", "cpu", "eval", "m")[1].hash == tokenizer.hash
        assert find_or_train(Settings(tokenizer="named"), dataset=None).hash == tokenizer.hash
        (step / "tokenizer" / "ranks.tiktoken").unlink()
        checkpoint_files.write_manifest(step)
        with pytest.raises(UserError, match=r"ranks\.tiktoken"):
            cm.load_model("base", "cpu", "eval", "m")
    assert not marker.exists()
    assert works(lambda: pickle.loads(bait), marker)


# ---------------------------------------------------------------------------------------------------------------------
# safetensors


def tensors_file(header: object, data: bytes = bytes(8), length: int | None = None) -> bytes:
    """8 bytes of the header's length, the header, the data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(*shape: int, offsets: tuple = (0, 8), dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


TWICE = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}'
HOSTILE_TENSORS = {
    "a header of 2^60 bytes": tensors_file({"a": entry(2)}, length=2**60),
    "a header of 2^64 - 1 bytes": tensors_file({"a": entry(2)}, length=2**64 - 1),
    "a header longer than the file": tensors_file({"a": entry(2)}, length=500),
    "overlapping tensors": tensors_file({"a": entry(2), "b": entry(2, offsets=(4, 12))}, bytes(12)),
    "the same bytes twice": tensors_file({"a": entry(2), "b": entry(2)}),
    "offsets past the end": tensors_file({"a": entry(10**10, offsets=(0, 4 * 10**10))}),
    "offsets in reverse": tensors_file({"a": entry(2, offsets=(8, 0))}),
    "a hole": tensors_file({"a": entry(2), "b": entry(2, offsets=(16, 24))}, bytes(24)),
    "bytes behind the last tensor": tensors_file({"a": entry(2)}, bytes(99)),
    "a negative shape": tensors_file({"a": entry(-2)}),
    "a shape that overflows": tensors_file({"a": entry(2**62, 4)}),
    "a shape beyond torch's numbers": tensors_file({"a": entry(2**63, 0, offsets=(0, 0))}, b""),
    "another size than the shape's": tensors_file({"a": entry(3)}),
    "a name twice": tensors_file(TWICE),
    "an unknown type": tensors_file({"a": entry(2, dtype="PICKLE")}),
    "deep nesting": tensors_file(b'{"a":' + b"[" * 10**6 + b"]" * 10**6 + b"}"),
    "no JSON": tensors_file(b"hello"),
    "no UTF-8": tensors_file(b"\xff{}"),
    "a list": tensors_file([1]),
    "nothing": b"",
    "a pickle": pickle.dumps({"a": 1}),
}


@contextmanager
def little_memory(more: int = 200 * 2**20) -> Iterator[None]:
    """Allocations of more bytes than these fail, where the kernel tells how many this process has."""
    statm = Path("/proc/self/statm")
    if not statm.exists():
        yield
        return
    import resource

    before = resource.getrlimit(resource.RLIMIT_AS)
    now = int(statm.read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + more, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.parametrize("name", HOSTILE_TENSORS)
def test_malicious_safetensors(tmp_path, name):
    """One line that names the file, in 200 MB. Red when read_tensors lets the library's or torch's own errors out."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(HOSTILE_TENSORS[name])
    with little_memory(), pytest.raises(UserError, match=r"model\.safetensors") as caught:
        checkpoint_files.read_tensors(path)
    assert len(str(caught.value)) < 1000


# ---------------------------------------------------------------------------------------------------------------------
# config.py

HOSTILE_CONFIGS = r"""
depth = open(M, 'w')
depth = open(M, 'w').fileno()
depth = 4; open(M, 'w')
open(M, 'w')
import os; os.mkdir(M)
depth = __import__('os').mkdir(M)
depth = [open(M, 'w') for _ in (1,)]
depth = (lambda: open(M, 'w'))()
depth = f"{open(M, 'w')}"
depth = "%s" % open(M, 'w')
depth = 4 if open(M, 'w') else 5
depth = (model_dim := open(M, 'w')) and 4
depth = {open(M, 'w'): 1}
depth = -open(M, 'w').fileno()
depth = 4 + open(M, 'w').fileno()
depth = [1][open(M, 'w').fileno() - open(M, 'w').fileno()]
depth = adam_betas = open(M, 'w')
depth, model_dim = 4, open(M, 'w')
depth: open(M, 'w') = 4
depth = 4; depth += open(M, 'w').fileno()
'''docstring'''; open(M, 'w')
assert open(M, 'w')
del open(M, 'w').name
raise open(M, 'w')
with open(M, 'w') as depth: depth = 4
for depth in [4]: open(M, 'w')
while open(M, 'w'): break
if open(M, 'w'): depth = 4
try: open(M, 'w')\nfinally: depth = 4
match open(M, 'w'):\n case depth: depth = 4
class depth: model_dim = open(M, 'w')
class depth(metaclass=lambda *a: open(M, 'w')): pass
def depth(n=open(M, 'w')): pass
@(lambda f: open(M, 'w'))\ndef depth(): pass
from os import mkdir; mkdir(M)
exec("open(M, 'w')")
depth = eval("open(M, 'w')")
""".strip().splitlines()


@pytest.mark.parametrize("number", range(len(HOSTILE_CONFIGS)))
def test_malicious_config(tmp_path, monkeypatch, number):
    """Refused with file and line wherever a config.py is read. Red when _read_with_lines evaluates what it parsed."""
    monkeypatch.chdir(tmp_path)
    marker, path = tmp_path / "marker", tmp_path / "config.py"
    text = HOSTILE_CONFIGS[number].replace("M", repr(str(marker))).replace(r"\n", "\n")
    path.write_text("# a comment\n" + text + "\n")
    readers = (
        lambda: read_config(path),
        lambda: base_train.main([str(path)]),
        lambda: base_train.main([]),  # ./config.py
        lambda: configure.main(["--defaults"]),  # which would overwrite it
        lambda: configure.main(["--defaults", "--force", f"--output={path}"]),
    )
    for read in readers:
        with pytest.raises(UserError, match=r"config\.py:[23]: "):
            read()
        assert [entry.name for entry in tmp_path.iterdir()] == ["config.py"]
    assert works(lambda: exec(text, {}), marker), "as Python it would have made the marker"


# ---------------------------------------------------------------------------------------------------------------------
# network and disk

# Runs the stages in a fresh interpreter. Every connection and look-up that leaves the machine fails and is noted, even
# if somebody catches the error, and so is every file that Python opens for writing.
DRIVER = """
import importlib, json, os, sys

connections, written, stages = sys.argv[1:]
connections, written = open(connections, "w", buffering=1), open(written, "w", buffering=1)

def guard(event, arguments):
    if event in ("socket.connect", "socket.sendto", "socket.getaddrinfo", "socket.gethostbyname"):
        address = arguments[1] if event in ("socket.connect", "socket.sendto") else arguments[:1]
        if isinstance(address, tuple) and address[0] not in (None, "localhost", "127.0.0.1", "::1"):
            connections.write(f"{event} {address}\\n")
            raise OSError(101, f"Network is unreachable: {address}")
    elif event == "open" and isinstance(arguments[0], str) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        written.write(os.path.abspath(arguments[0]) + "\\n")
    elif event == "os.mkdir":
        written.write(os.path.abspath(os.fsdecode(arguments[0])) + "\\n")

sys.addaudithook(guard)
for name, *arguments in json.loads(stages):
    script = importlib.import_module(f"scripts.{name}")
    script.run_script(lambda: script.main(arguments))
"""


def drive(home: Path, stages: list[list[str]], start=subprocess.Popen, **environment: str) -> SimpleNamespace:
    """Run stages where home folder, temporary folder, cache folder and current folder are each new and empty."""
    places = {name: home / name for name in ("home", "tmp", "xdg", "cwd", "base", "notes")}
    for place in places.values():
        place.mkdir(parents=True)
    variables = dict(
        PATH=os.environ["PATH"],
        HOME=str(places["home"]),
        TMPDIR=str(places["tmp"]),
        XDG_CACHE_HOME=str(places["xdg"]),
        XDG_CONFIG_HOME=str(places["xdg"]),
        NANOCHAT_BASE_DIR=str(places["base"]),
        PYTHONPATH=str(CHECKOUT),
        PYTHONDONTWRITEBYTECODE="1",
        OMP_NUM_THREADS="1",
        **environment,
    )
    notes = [places["notes"] / "connections", places["notes"] / "written"]
    command = [sys.executable, "-c", DRIVER, *map(str, notes), json.dumps(stages)]
    with open(home / "printed", "w") as printed:
        process = start(command, env=variables, cwd=places["cwd"], stdout=printed, stderr=subprocess.STDOUT)
        code = process.wait(timeout=300)
    connections, written = (note.read_text().splitlines() for note in notes)
    out = (home / "printed").read_text()
    return SimpleNamespace(code=code, out=out, connections=connections, written=written, **places)


# A C++ compiler that knows its version and the preprocessor, and fails to compile.
COMPILER = """#!/bin/sh
for word; do [ "$last" = -o ] && target=$word; last=$word; done
case " $* " in
    *" --version "*) echo "g++ (GCC) 13.2.0" ;;
    *" -E "*) echo "// $*" >"$target" ;;
    *) exit 1 ;;
esac
"""


@pytest.fixture(scope="module")
def stages(tmp_path_factory, corpus) -> SimpleNamespace:
    """The core stages, one step of training. torch.compile writes its files and then has no use for them: they lie
    where they would lie, without the minute that compiling takes."""
    home = tmp_path_factory.mktemp("machine")
    compiler = home / "g++"
    compiler.write_text(COMPILER)
    compiler.chmod(0o755)
    settings = flags({**TINY, "data": corpus, "depth": 1, "num_iterations": 1, "compile": True, "model_tag": "m"})
    data = [f"--data={corpus}"]
    return drive(
        home,
        [
            ["configure", "--defaults", "--output=named.py"],
            ["data", *data],
            ["tok_train", *data, "--vocab_size=300"],
            ["base_train", "named.py", *settings],
            ["base_eval", "--max-per-task=4"],
            ["plot_run", "--output=named.png"],
        ],
        CXX=str(compiler),
        TORCHINDUCTOR_COMPILE_THREADS="1",  # a pool of compilers takes longer to start than to use
    )


def test_offline_only(stages, tmp_path):
    """The core stages need no network and do not even ask for it.

    Red when a stage looks up a name, as with socket.getaddrinfo("example.org", 443) in a try in base_train.main().
    """
    assert stages.code == 0, stages.out
    assert stages.connections == []
    (report,) = (stages.base / "base_eval").glob("*.json")
    assert json.loads(report.read_text())["bpb"]["val"] > 0
    asking = drive(tmp_path, [["data", "--data=climbmix"]], Forked, HF_ENDPOINT="http://hub.invalid")
    assert asking.code != 0, "the guard itself"
    assert "hub.invalid" in asking.connections[0], "the guard itself"


def test_nothing_is_written_elsewhere(stages):
    """Only the base folder and the outputs that were named are written.

    Red without TORCHINDUCTOR_CACHE_DIR in keep_caches(), without import_compiler(), or MPLCONFIGDIR in plot_run.
    """
    assert stages.code == 0, stages.out
    assert "running without torch.compile (" in stages.out
    assert sorted(path.name for path in stages.cwd.iterdir()) == ["named.png", "named.py"]
    for place in (stages.home, stages.xdg, stages.tmp):
        assert [path.relative_to(place).as_posix() for path in place.rglob("*")] == []
    allowed = (stages.base, stages.cwd, stages.tmp)
    outside = [path for path in stages.written if not Path(path).is_relative_to("/dev")]
    assert [path for path in outside if not any(Path(path).is_relative_to(place) for place in allowed)] == []
    compiled = stages.base / "compiled"
    assert {path.suffix for path in compiled.rglob("*") if path.is_file()} >= {".cpp", ".h"}, "torch wrote nothing"


# ---------------------------------------------------------------------------------------------------------------------
# our own source

UNPICKLERS = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
CALLS = {"eval", "exec", "__import__", "os.system", "os.popen", "yaml.load", "yaml.unsafe_load", "yaml.full_load"}
CALLS |= {"torch.jit.load", "torch.hub.load", "torch.package.PackageImporter", "pickle.load", "pickle.loads"}


def dangers(source: str) -> list[str]:
    """What a file's source does that could run a stranger's code."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] in UNPICKLERS]
        elif isinstance(node, ast.ImportFrom):
            wanted = [f"{node.module}.{alias.name}" for alias in node.names]
            found += [name for name in wanted if name.split(".")[0] in UNPICKLERS or name in CALLS | {"torch.load"}]
        elif isinstance(node, ast.keyword) and node.arg in ("trust_remote_code", "shell", "allow_pickle"):
            found += [] if ast.unparse(node.value) == "False" else [node.arg]
        elif isinstance(node, ast.Constant) and node.value == "trust_remote_code":
            found.append(node.value)
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            safe = any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in node.keywords)
            if name in CALLS or (name == "torch.load" and not safe):
                found.append(name)
    return found


def test_our_source_runs_no_strangers_code():
    """Red with a torch.load without weights_only=True, or any of the snippets below, in nanochat/ or scripts/."""
    for snippet in (
        "torch.load(p)",
        "torch.load(p, weights_only=False)",
        "from torch import load",
        "import pickle",
        "eval(x)",
        "from pickle import loads",
        "exec(x)",
        "yaml.load(x)",
        "run(x, shell=True)",
        "np.load(p, allow_pickle=True)",
        "f(trust_remote_code=True)",
        "f(**{'trust_remote_code': True})",
        "os.system(x)",
        "import dill",
    ):
        assert dangers(snippet), snippet
    for snippet in (
        "torch.load(p, weights_only=True)",
        "model.eval()",
        "yaml.safe_load(x)",
        "np.load(p)",
        "f(trust_remote_code=False)",
    ):
        assert dangers(snippet) == [], snippet
    files = sorted(path for folder in ("nanochat", "scripts") for path in (CHECKOUT / folder).rglob("*.py"))
    assert len(files) > 30
    found = {path.name: dangers(path.read_text(encoding="utf-8")) for path in files}
    # The one unpickler: it imports pickle and pickletools, and derives from pickle.Unpickler.
    assert {name: what for name, what in found.items() if what} == {"pickles.py": ["pickle"]}
