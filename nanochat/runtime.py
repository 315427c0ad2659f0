"""The machine under a run: device, dtype, seeds, process group, printing, atomic files, exit codes."""

import difflib
import errno
import os
import platform
import random
import signal
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist

from nanochat import hardware
from nanochat.hardware import cpu_has_bf16, keep_memory
from nanochat.system import streams
from nanochat.system.environment import (
    LAUNCHER,
    LOCAL,
    SharedError,
    UserError,
    base_dir,
    check_launcher,
    keep_caches,
    rank_error,
    rank_from_env,
    restarts_from_env,
    under_torchrun,
    world_size_from_env,
)
from nanochat.system.storage_errors import describe, find_storage_error
from nanochat.system.temporary import process_state

EXIT_USER_ERROR = 2
LONG_TIMEOUT = timedelta(hours=3)  # for what one rank does alone: downloads, a tokenizer, compressor baselines


def run_script(main) -> None:
    """Call a script's main() and end the process as the contract says: 2 with one line for a user's mistake."""
    streams.open_streams()
    try:
        keep_caches()
        if not {"-h", "--help"} & set(sys.argv[1:]):
            check_launcher()
        main()
        streams.close_streams()
    except SharedError as error:
        if rank_from_env() != 0:
            time.sleep(1)  # rank 0 leaves first: a launcher ends the others as soon as one has left
            sys.exit(EXIT_USER_ERROR)
        fail(str(error))
    except UserError as error:
        fail(str(error), error.own)
    except KeyboardInterrupt:
        sys.exit(130)
    except RuntimeError as error:
        if (failed := find_storage_error(error)) is not None:
            fail(describe(failed, base_dir()))
        if under_torchrun():  # a launcher that saw the dead rank before us ends us, too: not before it is named
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        lost = find_lost_ranks()
        if not lost:
            if others := sorted({host for host, _, _ in _places if host != platform.node()}):
                print(f"ranks on other hosts cannot be seen from here: {', '.join(others)}", file=sys.stderr)
            raise
        # A collective failed because its peer is gone: the launcher's own report calls that our failure as well.
        print(
            f"error: {lost}: rank {rank_from_env()} cannot continue ({first_line(error)})", file=sys.stderr, flush=True
        )
        os._exit(1)  # the process group waits for the dead when it is taken down
    except streams.OutputError as error:
        if error.errno == errno.EPIPE:  # the reader, such as `| head`, has seen enough
            sys.exit(141)
        fail(str(error))
    except Exception as error:  # a disk that is full, in whatever type a library reports it
        if (failed := find_storage_error(error)) is None:
            raise
        fail(describe(failed, base_dir()))
    finally:
        if dist.is_available() and dist.is_initialized():
            with suppress(RuntimeError):
                dist.destroy_process_group()


def fail(message: str, own: bool = False) -> None:
    """Print one line on standard error and leave with the exit code of a user's mistake.

    Before the ranks have met they all see the same mistake, and rank 0 prints it; later it may be one rank's own.
    """
    if own or dist.is_initialized() or rank_from_env() == 0:
        print(f"error: {' '.join(message.split())}", file=sys.stderr, flush=True)
    sys.exit(EXIT_USER_ERROR)


# ---------------------------------------------------------------------------------------------------------------------
# ranks


@dataclass(frozen=True)
class Compute:
    """Where a process computes: device, activation dtype, and its place among the ranks."""

    device: torch.device
    dtype: torch.dtype
    rank: int = 0
    local_rank: int = 0
    world_size: int = 1

    @property
    def device_type(self) -> str:
        return self.device.type

    def synchronize(self) -> None:
        hardware.synchronize(self.device)

    def free_memory(self) -> None:
        """Give memory that nothing uses any more back to the GPU."""
        if self.device_type == "cuda":
            torch.cuda.empty_cache()

    def barrier(self, patient: bool = False) -> None:
        """Wait for all ranks; patiently where one of them works alone for long."""
        if self.world_size > 1:
            dist.barrier(group=_patient_group if patient else None)

    def gather(self, value) -> list:
        """value of every rank, by rank; a collective that waits for long. Anything that pickle takes."""
        if self.world_size == 1:
            return [value]
        found = [None] * self.world_size
        dist.all_gather_object(found, value, _patient_group)
        return found

    def any_rank(self, flag: bool) -> bool:
        """True on every rank when it is true on any; a collective."""
        if self.world_size == 1:
            return flag
        votes = torch.tensor(float(flag), device=self.device)
        dist.all_reduce(votes)
        return votes.item() > 0


def pick_device_type(name: str | None) -> str:
    """'cuda', 'mps' or 'cpu': the named one if this machine has it (UserError otherwise), else the best there is."""
    have = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name is None:
        return "cuda" if have["cuda"] else "mps" if have["mps"] else "cpu"
    if name not in have:
        raise UserError(f"device_type={name!r} is unknown: one of cuda, mps, cpu, or None for the best one here")
    if not have[name]:
        here = ", ".join(k for k, v in have.items() if v)
        raise UserError(f"device_type={name!r} is not available on this machine: choose one of {here}")
    return name


def pick_dtype(name: str | None, device_type: str) -> torch.dtype:
    """Dtype of activations and matmuls (parameters stay float32): bfloat16 where the hardware profits from it."""
    if name is not None:
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]
    if device_type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability() >= (8, 0) else torch.float32
    return torch.bfloat16 if device_type == "cpu" and cpu_has_bf16() else torch.float32


_patient_group = None
_places: list[tuple[str, int, str | None]] = []  # host, process and its start time of every rank


def init_compute(
    device_type: str | None,
    dtype: str | None,
    seed: int,
    deterministic: bool = False,
    rank_timeout: float | None = None,
) -> Compute:
    """Choose device and dtype, seed every generator, and join the process group when torchrun started us.

    deterministic: bit-equal results on a GPU too. rank_timeout: seconds that a rank waits in a collective for the
    others; None is PATIENCE.
    """
    global _patient_group
    kind = pick_device_type(device_type)
    rank, world = rank_from_env(), world_size_from_env()
    local = int(os.environ.get("LOCAL_RANK", 0))
    if kind == "cuda":
        here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        if max(here, local + 1) > torch.cuda.device_count():
            raise UserError(
                f"{max(here, local + 1)} processes for {torch.cuda.device_count()} GPUs: lower --nproc_per_node"
            )
        if deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS asks for
            torch.use_deterministic_algorithms(True)
        torch.cuda.set_device(local)
        torch.set_float32_matmul_precision("high")
    elif kind == "cpu":
        # Without it compiled runs differ between processes (the embedding's gradient); the price is not visible.
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # which costs a pass over every new tensor
        keep_memory()
        if world > 1 and "OMP_NUM_THREADS" in os.environ and os.environ["OMP_NUM_THREADS"] == "1":
            # torchrun's own default of one thread a rank: share the cores instead.
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", world))))
    device = torch.device(kind, local) if kind == "cuda" else torch.device(kind)
    if world > 1 and not dist.is_initialized():
        timeout = timedelta(seconds=rank_timeout) if rank_timeout else LONG_TIMEOUT
        try:
            wait_for_master(timeout.total_seconds(), rank)
            dist.init_process_group(
                "nccl" if kind == "cuda" else "gloo",
                **_rendezvous(timeout),
                timeout=timeout,
                device_id=device if kind == "cuda" else None,
            )
        except (dist.DistStoreError, dist.DistNetworkError, ConnectionError, TimeoutError, socket.gaierror) as error:
            raise rank_error(
                f"rank {rank} of {world} met no other at {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']} "
                f"({first_line(error)}): start all ranks, as torchrun does, or for a single process `unset "
                f"{' '.join(name for name in (*LAUNCHER, *LOCAL) if name in os.environ)}`"
            ) from error
        _patient_group = dist.new_group(backend="gloo", timeout=LONG_TIMEOUT)
        _places[:] = [None] * world
        dist.all_gather_object(_places, (platform.node(), os.getpid(), process_state(os.getpid())[1]), _patient_group)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    return Compute(device, pick_dtype(dtype, kind), rank, local, world)


def wait_for_master(seconds: float, rank: int) -> None:
    """Wait until the rendezvous address answers; OSError after `seconds`.

    torch would wait as long, and then print its stack. The rank that answers there itself has nothing to wait for.
    """
    if rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return
    place, deadline = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])), time.monotonic() + seconds
    while True:
        try:
            return socket.create_connection(place, timeout=max(0.1, deadline - time.monotonic())).close()
        except OSError:
            if time.monotonic() > deadline:
                raise
        time.sleep(0.1)


def _rendezvous(timeout: timedelta = LONG_TIMEOUT) -> dict:
    """Where the ranks find each other, free of what those before a restart left there.

    torchrun serves all attempts from one store, and the new ranks would now and then connect to the addresses of the
    dead (seen with torch 2.13). Over several nodes the attempts are counted apart: there the environment variable of
    runs/nodes.sh makes torchrun open a new store.
    """
    if os.environ.get("LOCAL_WORLD_SIZE") != os.environ.get("WORLD_SIZE"):
        return {}
    store, rank, world = next(dist.rendezvous("env://", timeout=timeout))
    return dict(store=dist.PrefixStore(f"attempt_{restarts_from_env()}", store), rank=rank, world_size=world)


def find_lost_ranks() -> str:
    """Which ranks on this host died or are stopped, as text; empty when all are running."""
    deadline = time.monotonic() + 2  # a dying process closes its sockets a moment before it is gone
    while _places:
        lost = []
        for rank, (host, pid, started) in enumerate(_places):
            if host == platform.node() and rank != rank_from_env():
                state, start = process_state(pid)
                if state is None or start != started:
                    lost.append(f"rank {rank} (process {pid} on {host}) died")
                elif state in "Tt":
                    lost.append(f"rank {rank} (process {pid} on {host}) is stopped")
        if lost or time.monotonic() > deadline:
            return ", ".join(lost)
        time.sleep(0.05)
    return ""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type when it has none; at most 300 characters."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


def shown(value) -> str:
    """repr(), cut to what fits into one line of a message."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:60]}... ({len(text)} characters)"


def nearest_name(name: str, known) -> str:
    """', did you mean X?' for the closest known name; without one, all known names or where to find them."""

    close = difflib.get_close_matches(name.replace("-", "_").lower(), list(known), n=1, cutoff=0.5)
    if close:
        return f", did you mean {close[0]!r}?"
    return f" (known: {', '.join(known)})" if len(known) <= 12 else " (--help lists all that there are)"


def rank0_first(compute: Compute, make: Callable):
    """make() on every rank: on rank 0, which writes files, then on one rank a node, then on those that find them."""
    for turn in (compute.rank == 0, compute.local_rank == 0 and compute.rank != 0, compute.local_rank != 0):
        if turn:
            made = make()
        compute.barrier(patient=True)
    return made


def from_rank0(make: Callable, rank: int, world_size: int, device: torch.device):
    """What make() returns on rank 0, on every rank; a UserError of it is raised on every rank."""
    if world_size == 1:
        return make()
    box: list = [None, None]
    if rank == 0:
        try:
            box[0] = make()
        except UserError as error:
            box[1] = str(error)
    dist.broadcast_object_list(box, src=0, device=device)
    if box[1] is not None:
        raise SharedError(box[1])
    return box[0]
