"""What an optimizer step costs: Muon, AdamW, the sum of gradients, and their share of a whole training step.

`python -m scripts.bench optimizer [--preset NAME]`
"""

import argparse
import statistics

from nanochat.optim import MuonAdamW
from scripts.bench.timing import alternate, matmul_peak, summary, table
from scripts.bench.train import Contender, settings_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--preset", help="settings to measure; None: the shape that nanochat was measured at")
    parser.add_argument("--eager", action="store_true", help="without torch.compile")


def run(args: argparse.Namespace) -> dict:
    """Print the table; returns contenders (seconds, share of the step) and peak_flops."""
    contender = Contender(settings_of(args.preset, device_type=args.device_type), compiled=not args.eager)
    contender.gradients()
    gradients = {p: p.grad for p in contender.model.parameters()}
    contender.model.zero_grad(set_to_none=True)

    def update(kinds: tuple[str, ...]):
        groups = [dict(group) for group in contender.optimizer.param_groups if group["kind"] in kinds]
        optimizer = MuonAdamW(groups)
        optimizer.muon_update = contender.optimizer.muon_update  # which may be compiled

        def work() -> None:
            for group in groups:
                for parameter in group["params"]:
                    parameter.grad = gradients[parameter]
            optimizer.reduce_gradients()
            optimizer.step()
            contender.model.zero_grad(set_to_none=True)

        return work

    def passes() -> None:
        contender.gradients()
        contender.model.zero_grad(set_to_none=True)

    contenders = {"whole step": contender.step, "forward and backward": passes, "update": update(("muon", "adamw"))}
    contenders |= {"Muon": update(("muon",)), "AdamW": update(("adamw",))}
    dtype = next(g["dtype"] for g in contender.optimizer.param_groups if g["kind"] == "muon")
    name, peaks = str(dtype).removeprefix("torch."), []
    device = contender.ids.device
    times = alternate(contenders, args.rounds, between=lambda: peaks.append(matmul_peak(device, dtype)))
    found = summary(times, "whole step")
    flops = contender.optimizer.muon_flops()
    rate = flops / found["Muon"]["seconds"]
    for one in found.values():
        one["dtype"] = name
    rows = [(what, 1000 * one["seconds"], f"{one['ratio']:.1%}") for what, one in found.items()]
    print(table(("part", "ms", "share of the step"), rows))
    peak = statistics.median(peaks)
    print(f"Muon: {flops / 1e9:.3g} GFLOP in {name}, {rate / 1e9:,.0f} GFLOP/s, {rate / peak:.1%} of the peak")
    return dict(contenders=found, peak_flops={name: peak}, muon_flops=flops)
