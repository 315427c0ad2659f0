"""Benchmarks: `python -m scripts.bench [PART] [--rounds N] [--json FILE] [--against FILE]`.

Contenders take turns in one process; figures are medians beside the matmul peak that was measured between them.
Without PART all parts run, one after the other. --json keeps the figures; --against compares with such a file of an
earlier run, each in units of its own peak, so that a machine that is slower today does not count. `PART --help` shows
what else a part takes.
"""

import argparse
import importlib
import json
import platform
import subprocess
import sys
from pathlib import Path

import torch

from nanochat.files import check_output, write_atomically
from nanochat.hardware import device_name
from nanochat.runtime import init_compute, run_script
from nanochat.system.environment import UserError
from scripts.bench.timing import against, table

PARTS = {
    "train": "a whole training step against the plain path: tokens/s, MFU, gradients",
    "head": "the chunked loss head against full logits: time and memory",
    "attention": "blocked attention against torch's kernel, over contexts and windows",
    "optimizer": "what Muon and AdamW cost a step",
    "generate": "the static cache and the compiled step against eager cached decoding",
    "eval": "bucketed scoring with shared prefixes against one by one",
    "load": "tokens/s of the loader and of tokenisation, tokens that packing wastes",
    "tokenizer": "time and memory of training on text without blanks, over its size",
    "memory": "resident memory by part, against the prediction",
    "ranks": "two ranks on the cores of one process",
    "growth": "time and memory over depth, context and vocabulary",
    "predictions": "the wizard's predictions against probes",
}
MODULES = {"eval": "evaluate"}  # where the file cannot have the part's name


def main(argv: list[str] | None = None) -> dict:
    """Run a part, or all; returns {"machine": ..., part: its result} as --json writes it."""
    first = argparse.ArgumentParser(
        prog="scripts.bench",
        description=__doc__.splitlines()[0],
        epilog="parts: " + "; ".join(f"{name}: {what}" for name, what in PARTS.items()),
    )
    first.add_argument("part", nargs="?", choices=PARTS, metavar="PART", help="one of the parts below; all without it")
    argv = list(sys.argv[1:] if argv is None else argv)
    chosen, rest = (argv[:1], argv[1:]) if argv and not argv[0].startswith("-") else ([], argv)
    part = first.parse_args(chosen or [flag for flag in rest if flag in ("-h", "--help")]).part
    results = {}
    for name in [part] if part else PARTS:
        module = importlib.import_module(f"scripts.bench.{MODULES.get(name, name)}")
        parser = argparse.ArgumentParser(prog=f"scripts.bench {name}", description=f"{name}: {PARTS[name]}")
        common(parser)
        if hasattr(module, "add_arguments"):
            module.add_arguments(parser)
        args = parser.parse_args(rest)
        if args.rounds < 1:
            raise UserError(f"--rounds {args.rounds} is too small: at least 1")
        if args.json:
            check_output(args.json, "--json")
        reference = read_reference(args.against, part)
        args.compute = init_compute(args.device_type, None, seed=1)  # with the switches that training sets
        results.setdefault("machine", machine(args.compute))
        results[name] = module.run(args)
        if args.json:  # after each part: a later one may fail
            write_atomically(args.json, json.dumps(results, indent=1) + "\n")
        if reference:
            compare(name, results[name], reference)
    return results


def common(parser: argparse.ArgumentParser) -> None:
    """The flags that every part takes."""
    parser.add_argument("--rounds", type=int, default=10, help="in which all contenders take their turn")
    parser.add_argument("--device_type", help="cuda, mps or cpu; the best one here")
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--against", type=Path, help="such a file of an earlier run to compare with")


def machine(compute) -> dict[str, str]:
    """What was measured, where: device, torch, commit."""
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        )
        commit = done.stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # an installed copy
        commit = "unknown"
    return dict(device=device_name(compute), torch=torch.__version__, python=platform.python_version(), commit=commit)


def read_reference(path: Path | None, part: str | None) -> dict:
    """The figures of an earlier run; {} without one."""
    if path is None:
        return {}
    try:
        reference = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"--against {path} is not there: an earlier run's --json writes it") from None
    except ValueError as error:
        raise UserError(f"--against {path} is not a file of --json: {error}") from None
    if not isinstance(reference, dict) or (part is not None and part not in reference):
        raise UserError(f"--against {path} has no figures of {part}: run `scripts.bench {part} --json` first")
    return reference


def compare(name: str, result: dict, reference: dict) -> None:
    """Print and add to a part's result how its contenders do against the earlier run."""
    result["against"] = against(result, reference.get(name, {}))
    told = reference.get("machine", {})
    print(f"against {told.get('commit', 'an unknown commit')} on {told.get('device', 'an unknown device')}, per peak:")
    print(table(("contender", "time over the earlier"), result["against"].items()))


if __name__ == "__main__":
    run_script(main)
