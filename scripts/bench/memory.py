"""Where the memory of a training step goes, by part, beside what the wizard predicts.

`python -m scripts.bench memory [--preset NAME]`: bytes of tensors as torch's allocator counts them, and the resident
set of the whole process, which also holds Python, torch and its compiler.
"""

import argparse
import gc
from collections.abc import Callable
from pathlib import Path

import torch

from nanochat.training.estimate import estimate, find_hardware
from scripts.bench.timing import table
from scripts.bench.train import Contender, settings_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--preset", help="settings to measure; None: the shape that nanochat was measured at")
    parser.add_argument("--eager", action="store_true", help="without torch.compile")


def run(args: argparse.Namespace) -> dict:
    """Print the table; returns {"bytes": {part: [measured, predicted]}}."""
    resident_before = resident_bytes("VmRSS")
    contender = Contender(settings_of(args.preset, device_type=args.device_type), compiled=not args.eager)
    contender.step()  # from here on the optimizer's state is there
    model, optimizer = contender.model, contender.optimizer
    forgetful_peak(resident_before)
    parameters = sum(tensor_bytes(p) for p in model.parameters())
    state = sum(tensor_bytes(tensor) for name, tensor in optimizer.state_items() if not name.endswith(".step"))
    contender.gradients()  # they stay, and are added to as in every micro-batch but the first
    passes = peak_bytes(contender.gradients)
    update = peak_bytes(lambda: (optimizer.reduce_gradients(), optimizer.step()))
    model.zero_grad(set_to_none=True)
    contender.step()

    predicted = estimate(contender.settings, find_hardware(args.device_type))
    parts = dict(predicted.memory)
    measured = {
        "parameters": (parameters, parts["parameters"]),
        "gradients": (parameters, parts["gradients"]),
        "optimizer": (state, parts["optimizer"]),
        "activations and logits": (passes, parts["activations"] + parts["logits"]),
        "step": (update, parts["step"]),
    }
    if resident_before and "saving" in parts:  # nothing is saved here
        wanted = predicted.peak_memory - parts["saving"]
        measured["resident set, peak of a step"] = resident_bytes("VmHWM"), wanted
    rows = [(name, a / 2**20, b / 2**20, a / b) for name, (a, b) in measured.items()]
    print(f"{contender.rows} rows a micro-batch, {contender.dtype}{', eager' if args.eager else ''}; MiB")
    print(table(("part", "measured", "predicted", "ratio"), rows))
    return dict(bytes={name: list(pair) for name, pair in measured.items()})


def tensor_bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def peak_bytes(work: Callable[[], object]) -> int:
    """The most bytes of tensors that are alive at a time while work() runs, beyond those that were before."""
    gc.collect()
    if torch.cuda.is_initialized():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True, acc_events=True) as profiler:
        work()
    changes = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    alive = most = 0
    for change in sorted(changes, key=lambda event: event.start_ns()):
        alive += change.nbytes()
        most = max(most, alive)
    return most


def resident_bytes(field: str) -> int | None:
    """VmRSS (now) or VmHWM (the most so far) of this process in bytes; None where there is no /proc."""
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    line = next(line for line in status.read_text().splitlines() if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024


def forgetful_peak(there_is_proc: object) -> None:
    """Let VmHWM begin anew: compiling takes more memory than any step."""
    if there_is_proc:
        Path("/proc/self/clear_refs").write_text("5")
