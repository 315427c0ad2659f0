"""Untied, tied, tied with output projection: which learns best per token, with equal tuning for each?

`python -m scripts.experiments.tying [--stage init|sweep|seeds|report] [--results FILE] [--workers 2]` trains small
models (depth 3, width 128, context 256, 4096 tokens a step, vocabulary 4096) on the `packages` corpus, one process with
one thread each, and appends one JSON line a run to the results file. A run that is in the file is not repeated, so the
script continues where it stopped.

init: tied, 3 initial scales x 3 rates, 120 steps.  sweep: 4 variants x 3 rates of the output matrix, 333 steps; both
are judged on a tenth of the training split.  seeds: 4 variants x 3 seeds at each variant's best rate, 1,000 steps,
judged on the held-out documents, which chose nothing.  report: tables, paired differences, plot.
"""

import argparse
import os
import statistics
from pathlib import Path

from nanochat.runtime import run_script
from scripts.experiments.common import CHOOSING, base_train, best_rate, paired, read, run_missing, selection_note

SHAPE = dict(
    data="packages",
    vocab_size=4096,
    depth=3,
    model_dim=128,
    head_dim=64,
    max_seq_len=256,
    total_batch_size=4096,
    device_batch_size=16,
    eval_tokens=262_144,
    eval_every=250,
)
VARIANTS = {
    "untied": dict(tie_weights=False),
    "tied": dict(tie_weights=True),
    "tied+proj": dict(tie_weights=True, use_output_projection=True),
    "tied+proj-res": dict(tie_weights=True, use_output_projection=True, output_projection_residual=True),
}
# Each variant may choose among three rates of the matrix that makes the logits, a factor of 2.5 apart.
RATES = {name: ("tied_weights_lr" if name != "untied" else "unembedding_lr") for name in VARIANTS}
GRID = {name: ((0.002, 0.005, 0.0125) if name != "untied" else (0.0016, 0.004, 0.01)) for name in VARIANTS}
INIT_STDS, INIT_RATES = (0.005, 0.02, 0.08), (0.005, 0.02, 0.2)
SEEDS = (1, 2, 3)


def train(key: str, settings: dict) -> dict:
    """One run in a process of its own; returns its line for the results file."""
    lines = base_train(f"tying-{key}", {**SHAPE, **settings})
    losses = [line["loss"] for line in lines if "loss" in line]
    return dict(
        key=key,
        settings=settings,
        steps=len(losses),
        val_bpb=[line["val_bpb"] for line in lines if line.get("event") == "eval"][-1],
        train_loss=statistics.fmean(losses[-50:]),
        seconds=lines[-1]["train_seconds"],
        parameters=lines[0]["parameters"],
        losses=[round(loss, 4) for loss in losses[9::10]],
    )


def init_runs() -> dict[str, dict]:
    return {
        f"init/{std}/{rate}": dict(
            VARIANTS["tied"], **CHOOSING, num_iterations=120, seed=1, tied_init_std=std, tied_weights_lr=rate
        )
        for std in INIT_STDS
        for rate in INIT_RATES
    }


def sweep_runs() -> dict[str, dict]:
    return {
        f"sweep/{name}/{rate}": {**VARIANTS[name], **CHOOSING, "num_iterations": 333, "seed": 1, RATES[name]: rate}
        for name in VARIANTS
        for rate in GRID[name]
    }


def seed_runs(lines: dict[str, dict]) -> dict[str, dict]:
    return {
        f"seeds/{name}/{seed}": {**VARIANTS[name], "num_iterations": 1000, "seed": seed, RATES[name]: rate}
        for seed in SEEDS
        for name in VARIANTS
        for rate in [best_rate(lines, name, GRID[name], "val_bpb")]
    }


def report(lines: dict[str, dict], plot: Path | None) -> list[str]:
    """Markdown tables of all stages that have results, and the plot of the seeds' training losses."""
    out = selection_note(lines)
    if any(key.startswith("init/") for key in lines):
        out += ["| initial scale | " + " | ".join(f"rate {r}" for r in INIT_RATES) + " |", "| --- " * 4 + "|"]
        for std in INIT_STDS:
            cells = [lines.get(f"init/{std}/{rate}") for rate in INIT_RATES]
            out.append(f"| {std} | " + " | ".join(f"{c['val_bpb']:.4f}" if c else "" for c in cells) + " |")
    for name in VARIANTS:
        cells = [(rate, lines.get(f"sweep/{name}/{rate}")) for rate in GRID[name]]
        if all(cell for _, cell in cells):
            out.append(f"sweep {name}: " + ", ".join(f"{rate}: {cell['val_bpb']:.4f}" for rate, cell in cells))
    final = {n: [lines[f"seeds/{n}/{s}"] for s in SEEDS if f"seeds/{n}/{s}" in lines] for n in VARIANTS}
    if all(len(runs) == len(SEEDS) for runs in final.values()):
        out += ["", "| variant | parameters | val bpb by seed | minus untied, paired, 95% (n=3) |", "| --- " * 4 + "|"]
        for name, runs in final.items():
            bpbs = [run["val_bpb"] for run in runs]
            mean, half = paired([a - b["val_bpb"] for a, b in zip(bpbs, final["untied"], strict=True)])
            difference = "" if name == "untied" else f"{mean:+.4f} +- {half:.4f}"
            shown = ", ".join(f"{bpb:.4f}" for bpb in bpbs)
            out.append(f"| {name} | {runs[0]['parameters']:,} | {shown} | {difference} |")
        if plot is not None:
            draw(final, plot)
            out.append(f"training losses: {plot}")
    return out


def draw(final: dict[str, list[dict]], plot: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(SEEDS), figsize=(11, 4), sharey=True)
    window = 8  # recorded losses, one every 10 steps
    for index, (seed, axes) in enumerate(zip(SEEDS, panels, strict=True)):
        for name, runs in final.items():
            losses = runs[index]["losses"]
            smooth = [statistics.fmean(losses[max(0, i + 1 - window) : i + 1]) for i in range(len(losses))]
            axes.plot([10 * (i + 1) for i in range(len(losses))], smooth, lw=1.2, label=name)
        axes.set(title=f"seed {seed}", xlabel="step of 4,096 tokens", ylim=(2.2, 4.5))
    panels[0].set_ylabel(f"training loss (nats per token, mean of {window}, one every 10 steps)")
    panels[0].legend()
    figure.tight_layout()
    figure.savefig(plot, dpi=120)


def main(argv: list[str] | None = None) -> dict[str, dict]:
    """Run a stage and print its report; returns the result lines by key."""
    parser = argparse.ArgumentParser(prog="scripts.experiments.tying", description=__doc__.splitlines()[0])
    parser.add_argument("--stage", choices=("init", "sweep", "seeds", "report"), default="report")
    parser.add_argument("--results", type=Path, default=Path("dev/tying.jsonl"))
    parser.add_argument("--plot", type=Path, default=Path("dev/tying.png"))
    parser.add_argument("--workers", type=int, default=max(1, os.cpu_count() or 1))
    arguments = parser.parse_args(argv)
    lines = read(arguments.results)
    stages = {"init": init_runs, "sweep": sweep_runs, "seeds": lambda: seed_runs(lines)}
    if arguments.stage != "report":
        lines = run_missing(stages[arguments.stage](), arguments.results, arguments.workers, train, "val_bpb")
    print("\n".join(report(lines, arguments.plot)))
    return lines


if __name__ == "__main__":
    run_script(main)
