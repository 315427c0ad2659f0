"""Before the first step all ranks agree on what they train, or all end with one line that names who differs.

Each rank reads its own command line, config.py, base folder and checkout. They need not be the same files (nodes with
a disk each), but their contents have to be equal. Until the process group exists the ranks exchange messages through
the launcher's store.
"""

import hashlib
import json
import os
import platform
from collections.abc import Callable, Iterable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from nanochat.runtime import Compute, first_line, shown, wait_for_master
from nanochat.system.environment import (
    LAUNCHER,
    LOCAL,
    SharedError,
    UserError,
    base_dir,
    rank_error,
    rank_from_env,
    restarts_from_env,
    world_size_from_env,
)
from nanochat.system.storage_errors import describe, find_storage_error

CHECKOUT = Path(__file__).parents[2]
MAX_NAMED = 4  # differences in one message


class Meeting:
    """The ranks exchange JSON through the launcher's store; with a single rank nothing is exchanged."""

    def __init__(self, timeout: float):
        """timeout: seconds to wait for ranks that do not answer at all."""
        self.rank, self.world_size, self.rounds = rank_from_env(), world_size_from_env(), 0
        self.timeout = timedelta(seconds=timeout)
        self.store = None  # connected when it is first needed: --help needs no other rank

    def _connect(self):
        try:
            wait_for_master(self.timeout.total_seconds(), self.rank)
            store, _, _ = next(dist.rendezvous("env://", self.rank, self.world_size, timeout=self.timeout))
        except (dist.DistStoreError, dist.DistNetworkError, OSError) as error:
            raise self._unanswered(self.timeout, error) from error
        same_host = os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE")
        # torchrun serves all attempts of a host from one store; over several nodes they are counted apart, and
        # runs/nodes.sh makes it open a new one.
        return dist.PrefixStore(f"agree_{restarts_from_env() if same_host else 0}", store)

    def gather(self, value, timeout: timedelta | None = None) -> list:
        """value of every rank, by rank; UserError when some rank does not answer in time."""
        if self.world_size == 1:
            return [value]
        self.store = self.store or self._connect()
        self.rounds += 1
        keys = [f"{self.rounds}/{rank}" for rank in range(self.world_size)]
        self.store.set(keys[self.rank], json.dumps(value))
        try:
            self.store.wait(keys, timeout or self.timeout)
            return [json.loads(self.store.get(key)) for key in keys]
        except (dist.DistStoreError, dist.DistNetworkError) as error:
            raise self._unanswered(timeout or self.timeout, error) from error

    def _unanswered(self, timeout: timedelta, error: Exception) -> UserError:
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        variables = " ".join(name for name in (*LAUNCHER, *LOCAL) if name in os.environ)
        return rank_error(
            f"rank {self.rank} of {self.world_size} did not meet all others at {where} within {timeout} "
            f"({first_line(error)}): start all ranks, as torchrun does, or for a single process `unset {variables}`"
        )

    def share(self, make: Callable, facts: Callable[..., dict] = lambda made: {}, timeout: timedelta | None = None):
        """(make() of this rank, facts(made) of every rank); a UserError of any rank is raised as SharedError on all.

        Any other error is raised on its rank, after the others have received its name: none waits for that rank.
        """
        made, failed, bug = None, None, None
        try:
            made = make()
        except UserError as error:
            failed = str(error)
            if self.world_size == 1:
                raise
        except Exception as error:
            if self.world_size == 1:
                raise
            if (storage := find_storage_error(error)) is not None:
                failed = describe(storage, base_dir())
            else:
                failed, bug = f"{type(error).__name__}: {first_line(error)}", error
        report = {"error": failed, "host": platform.node(), "facts": facts(made) if failed is None else {}}
        reports = self.gather(report, timeout)
        if bug is not None:
            raise bug
        for rank, found in enumerate(reports):
            if found["error"] is not None:
                where = f"rank {rank} on {found['host']}: " if rank else ""
                raise SharedError(where + found["error"])
        return made, reports


def source_hashes() -> dict[str, str]:
    """The code that this rank runs: path below the checkout -> first digits of the sha256 of each module."""
    files = sorted(path for folder in ("nanochat", "scripts") for path in (CHECKOUT / folder).rglob("*.py"))
    return {path.relative_to(CHECKOUT).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()[:12] for path in files}


def refuse_differences(what: str, reports: list[dict]) -> None:
    """SharedError when the facts of some rank are not those of rank 0: names, ranks, hosts and values.

    reports: by rank, {"host": ..., "facts": {name: JSON value}}.
    """
    first, lines = reports[0]["facts"], []
    for rank, report in enumerate(reports):
        names = [n for n in sorted(first.keys() | report["facts"].keys()) if first.get(n) != report["facts"].get(n)]
        for name in names[:MAX_NAMED]:
            here, there = shown(first.get(name)), shown(report["facts"].get(name))
            lines.append(f"{name} is {here} on rank 0 and {there} on rank {rank} ({report['host']})")
        if len(names) > MAX_NAMED:
            lines.append(f"{len(names) - MAX_NAMED} more differ on rank {rank}")
    if lines:
        listed = "; ".join(lines[: 2 * MAX_NAMED]) + f"; {len(lines) - 2 * MAX_NAMED} more" * (len(lines) > 8)
        raise SharedError(
            f"the ranks do not agree on {what}: {listed}. Give all ranks the same command, config.py, checkout, "
            "data and checkpoints"
        )


def weights_checksum(named: Iterable[tuple[str, torch.Tensor]]) -> str:
    """Of the sums of each tensor's bytes by row and by column: equal, on any device, where the weights are equal."""
    digest = hashlib.sha256()
    for name, tensor in named:
        digest.update(name.encode())
        flat = tensor.detach().contiguous()
        table = flat.view(len(flat) if flat.ndim > 1 else 1, -1).view(torch.uint8)
        for along in (0, 1):  # both, so that values that changed places are seen
            digest.update(table.sum(along, dtype=torch.int64).cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def agree_before_first_step(compute: Compute, facts: dict) -> list[dict]:
    """Compare what the ranks are about to train, through the process group; returns the facts by rank.

    facts: JSON values by name; nested ones are compared key by key.
    """
    if compute.world_size == 1:
        return [facts]
    reports = compute.gather({"host": platform.node(), "facts": _flat(facts)})
    refuse_differences("what to train", reports)
    return reports


def _flat(value, prefix: str = "") -> dict:
    """{"a": {"b": 1}} -> {"a.b": 1}; folders are each rank's own business."""
    if not isinstance(value, dict):
        return {prefix: json.loads(json.dumps(value))}
    found = {}
    for name, inner in value.items():
        if name != "directory":
            found |= _flat(inner, f"{prefix}.{name}" if prefix else str(name))
    return found
