"""Do modality experts pay? Dense, experts, and two controls, with equal active FLOPs and equal tuning.

`python -m scripts.experiments.experts [--stage sweep|seeds|report] [--results FILE] [--workers 2]` trains small models
(depth 4, width 128) on captioned melodies (codec frame, one codebook of 512: note and instrument in one code) and as
many positions of the standard library's text, one process with one thread each. A run that is in the results file is
not repeated.

dense: one MLP for all (equal active FLOPs).  dense-wide: an MLP twice as wide, as many parameters as with experts, and
more FLOPs.  mlp: an MLP for each modality.  all: attention's matrices too.  random: as many MLPs, each id through one
that is drawn (once: the same for all seeds).  All have separate output layers, so that nothing but the experts differs.
sweep: 5 variants x 3 Muon rates, 150 steps, judged on a tenth of the training split.  seeds: 5 variants x 3 seeds at
each variant's best rate, 300 steps, judged on the held-out rows, which chose nothing.
report: losses with paired differences to dense, and the share of dense's steps that reach its final loss, as
Mixture-of-Transformers (arXiv 2411.04996) counts them.
"""

import argparse
import os
import statistics
from pathlib import Path

from nanochat.runtime import run_script
from scripts.experiments.common import base_train, paired, read, run_missing, seed_runs, selection_note, sweep_runs

SHAPE = dict(
    data="synth",
    data_limit=6000,
    modalities="audio:512",
    codec="frame",
    text_data="stdlib",
    text_share=0.5,
    vocab_size=1024,
    depth=4,
    model_dim=128,
    head_dim=32,
    max_seq_len=256,
    total_batch_size=4096,
    device_batch_size=16,
    eval_tokens=40_960,
    eval_every=25,
    compile=False,
)
VARIANTS = {
    "dense": dict(untie="none"),
    "dense-wide": dict(untie="none", mlp_ratio=8.0),
    "mlp": dict(untie="mlp"),
    "all": dict(untie="all"),
    "random": dict(untie="random"),
}
RATES = (0.01, 0.02, 0.04)
SEEDS = (1, 2, 3)
MODALITIES = ("text", "audio")


def train(key: str, settings: dict) -> dict:
    """One run; returns its line for the results file."""
    drawn = settings["untie"] == "random"
    run = {**SHAPE, **settings, "untie": "mlp" if drawn else settings["untie"]}
    lines = base_train(f"experts-{key}", run, module="scripts.experiments.random_experts" if drawn else None)
    evaluations = [line for line in lines if line.get("event") == "eval"]
    curve = {m: [round(line[f"val_loss/{m}"], 5) for line in evaluations] for m in MODALITIES}
    return dict(
        key=key,
        settings=settings,
        curve=curve,
        steps=[line["step"] for line in evaluations],
        loss=curve["text"][-1] + curve["audio"][-1],
        seconds=lines[-1]["train_seconds"],
        parameters=lines[0]["parameters"],
    )


def share_of_steps(steps: list[int], losses: list[float], goal: float) -> float | None:
    """Where a curve first comes down to `goal`, as a part of all steps, between measurements on a straight line."""
    for i, loss in enumerate(losses):
        if loss <= goal:
            if i == 0:
                return steps[0] / steps[-1]
            part = (losses[i - 1] - goal) / (losses[i - 1] - loss)
            return (steps[i - 1] + part * (steps[i] - steps[i - 1])) / steps[-1]
    return None


def report(lines: dict[str, dict], plot: Path | None) -> list[str]:
    """Markdown tables of the stages that have results, and the plot of the seeds' losses."""
    out = selection_note(lines)
    for name in VARIANTS:
        cells = [(rate, lines.get(f"sweep/{name}/{rate}")) for rate in RATES]
        if all(cell for _, cell in cells):
            shown = (f"{r}: text {c['curve']['text'][-1]:.4f} audio {c['curve']['audio'][-1]:.4f}" for r, c in cells)
            out.append(f"sweep {name}: {', '.join(shown)}")
    final = {n: [lines[f"seeds/{n}/{s}"] for s in SEEDS if f"seeds/{n}/{s}" in lines] for n in VARIANTS}
    if any(len(runs) < len(SEEDS) for runs in final.values()):
        return out
    for modality in MODALITIES:
        out += [
            "",
            f"| {modality} | parameters | held-out nats by seed | minus dense, paired, 95% (n=3) | dense's steps |",
            "| --- " * 5 + "|",
        ]
        for name, runs in final.items():
            ends = [run["curve"][modality][-1] for run in runs]
            goals = [run["curve"][modality][-1] for run in final["dense"]]
            mean, half = paired([a - b for a, b in zip(ends, goals, strict=True)])
            shares = [
                share_of_steps(run["steps"], run["curve"][modality], goal)
                for run, goal in zip(runs, goals, strict=True)
            ]
            reached = [share for share in shares if share is not None]
            told = f"{statistics.fmean(reached):.0%}" if len(reached) == len(shares) else f"{len(reached)} of 3 runs"
            difference = "" if name == "dense" else f"{mean:+.4f} +- {half:.4f}"
            nats = ", ".join(f"{end:.4f}" for end in ends)
            out.append(f"| {name} | {runs[0]['parameters']:,} | {nats} | {difference} | {told} |")
    if plot is not None:
        draw(final, plot)
        out.append(f"held-out losses: {plot}")
    return out


def draw(final: dict[str, list[dict]], plot: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(MODALITIES), figsize=(11, 4))
    for modality, axes in zip(MODALITIES, panels, strict=True):
        for name, runs in final.items():
            curves = zip(*(run["curve"][modality] for run in runs), strict=True)
            axes.plot(runs[0]["steps"], [statistics.fmean(values) for values in curves], lw=1.2, label=name)
        axes.set(title=modality, xlabel="step of 4,096 positions", ylabel="held-out nats, mean of 3 seeds")
    panels[0].legend()
    figure.tight_layout()
    figure.savefig(plot, dpi=120)


def main(argv: list[str] | None = None) -> dict[str, dict]:
    """Run a stage and print its report; returns the result lines by key."""
    parser = argparse.ArgumentParser(prog="scripts.experiments.experts", description=__doc__.splitlines()[0])
    parser.add_argument("--stage", choices=("sweep", "seeds", "report"), default="report")
    parser.add_argument("--results", type=Path, default=Path("dev/experts.jsonl"))
    parser.add_argument("--plot", type=Path, default=Path("dev/experts.png"))
    parser.add_argument("--workers", type=int, default=max(1, os.cpu_count() or 1))
    arguments = parser.parse_args(argv)
    lines = read(arguments.results)
    if arguments.stage != "report":
        if arguments.stage == "sweep":
            runs = sweep_runs(VARIANTS, "matrix_lr", RATES, 150)
        else:
            runs = seed_runs(VARIANTS, "matrix_lr", RATES, 300, SEEDS, lines)
        lines = run_missing(runs, arguments.results, arguments.workers, train, "loss")
    print("\n".join(report(lines, arguments.plot)))
    return lines


if __name__ == "__main__":
    run_script(main)
