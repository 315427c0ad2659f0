"""A command of the product in a process of its own: a fork of one that has imported torch, or a new interpreter."""

import contextlib
import ctypes
import multiprocessing
import os
import resource
import runpy
import shutil
import subprocess
import sys
import traceback
from pathlib import Path

from nanochat import hardware
from scripts.stress.inputs.cases import Case, Result

CHECKOUT = Path(__file__).parents[3]
SECONDS = 120  # after which a command counts as one that hangs
DAC_OVERRIDE, DAC_READ_SEARCH = 1, 2  # capabilities(7): root's rights to open what the permissions forbid

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(
    ["torch", "nanochat.training.launch", "nanochat.data_pipeline", "nanochat.evaluation.offline"]
)


def run_case(case: Case, folder: Path) -> Result:
    """Build the case below `folder` and run its commands; AssertionError when one before the last fails."""
    inputs, base = folder / "in", folder / "base"
    inputs.mkdir(parents=True)
    case.build(inputs)
    *before, last = case.steps
    for step in before:
        if callable(step):
            step(folder)
            continue
        result = _run(case, step, folder, base, final=False)
        if result.code:
            raise AssertionError(f"{' '.join(step)} ended with {result.code}: {result.errors.strip()[-300:]}")
    return _run(case, last, folder, base, final=True)


def _run(case: Case, words, folder: Path, base: Path, final: bool) -> Result:
    places = {"{in}": str(folder / "in"), "{base}": str(base), "{folder}": str(folder)}

    def put(text: str) -> str:
        for key, value in places.items():
            text = text.replace(key, value)
        return text

    environment = {name: value for name, value in os.environ.items() if not name.startswith(("TORCHELASTIC", "PET_"))}
    environment |= dict(NANOCHAT_BASE_DIR=str(base), PYTHONPATH=str(CHECKOUT), OMP_NUM_THREADS="1", PYTHONSAFEPATH="1")
    environment |= dict(HF_HUB_OFFLINE="1", WANDB_MODE="disabled", CUDA_VISIBLE_DEVICES="")
    for name, value in case.environment.items() if final else ():
        environment.pop(name, None)
        if value is not None:
            environment[name] = put(value)
    words = [put(word) for word in words]
    where = folder / "cwd"
    where.mkdir(exist_ok=True)
    streams = [case.stdout, case.stderr] if final else ["file", "file"]
    files = [str(folder / name) if stream == "file" else stream for name, stream in zip("oe", streams, strict=True)]
    for name in "oe":
        (folder / name).write_bytes(b"")
    limit = case.limit if final else None
    start = _start_fresh if case.fresh and final else _start_fork
    code = start(words, environment, str(where), files, case.plain_user and final, limit)
    texts = [(folder / name).read_bytes().decode("utf-8", "replace") for name in "oe"]
    return Result(code, *texts, base)


def _start_fork(words, environment, where, files, plain_user, limit) -> int:
    process = context.Process(target=_begin, args=(words, environment, where, files, plain_user, limit))
    process.start()
    multiprocessing.process._children.discard(process)  # another thread's start would reap it beside us
    process.join(SECONDS)
    if process.exitcode is None:
        process.kill()
        process.join()
        raise AssertionError(f"no end within {SECONDS} s")
    return process.exitcode


def _begin(words, environment, where, files, plain_user, limit) -> None:
    """In the fork: environment, folder, streams and rights of the case; then its module as the interpreter runs it."""
    import torch

    hardware.peak_flops = lambda compute: 1e12  # measuring takes half a second of each start
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(where)
    torch.set_num_threads(1)
    for descriptor, file in zip((1, 2), files, strict=True):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), descriptor)
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
    _restrict(plain_user, limit)
    sys.argv = list(words)
    code = 0
    try:
        runpy.run_module(words[0], run_name="__main__", alter_sys=True)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    os._exit(code or 0)


def _start_fresh(words, environment, where, files, plain_user, limit) -> int:
    handles = [None if file is None else open(file, "ab") for file in files]  # noqa: SIM115

    def prepare() -> None:
        for descriptor, handle in zip((1, 2), handles, strict=True):
            if handle is None:
                os.close(descriptor)
        _restrict(plain_user, limit)

    try:
        return subprocess.run(
            [sys.executable, "-m", *words],
            env=environment,
            cwd=where,
            stdin=subprocess.DEVNULL,
            stdout=handles[0],
            stderr=handles[1],
            preexec_fn=prepare,
            timeout=SECONDS,
        ).returncode
    except subprocess.TimeoutExpired as error:
        raise AssertionError(f"no end within {SECONDS} s") from error
    finally:
        for handle in filter(None, handles):
            handle.close()


def _restrict(plain_user: bool, limit: int | None) -> None:
    if plain_user:
        drop_root_override()
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))


def drop_root_override() -> None:
    """Take away root's rights to pass over permissions, so that a folder of mode 000 is closed to this process."""
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this process
    data = (ctypes.c_uint32 * 6)()
    if libc.capget(header, data):
        raise OSError(ctypes.get_errno(), "capget failed")
    keep = ~(1 << DAC_OVERRIDE | 1 << DAC_READ_SEARCH) & 0xFFFFFFFF
    for place in (0, 1, 2):  # effective, permitted, inheritable
        data[place] &= keep
    for capability in (DAC_OVERRIDE, DAC_READ_SEARCH):
        libc.prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP: not back at the next exec
    if libc.capset(header, data):
        raise OSError(ctypes.get_errno(), "capset failed")


def remove(folder: Path) -> None:
    """Delete a case's folder, whatever its permissions."""
    for path, folders, _ in os.walk(folder):
        for name in folders:
            if not os.path.islink(os.path.join(path, name)):
                os.chmod(os.path.join(path, name), 0o700)
    shutil.rmtree(folder, ignore_errors=True)
