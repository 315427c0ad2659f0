"""Draw a run from its metrics.jsonl: `python -m scripts.plot_run [--model-tag TAG] [--output run.png]`.

Training loss (nats per token), and val bpb with the compressors that base_eval measured beside it. Needs matplotlib
(the dev extras).
"""

import json
import os
from pathlib import Path

from nanochat.checkpoint_manager import checkpoints_dir, newest_tag
from nanochat.config.command_line import Parser
from nanochat.files import check_output, open_atomic
from nanochat.runtime import run_script
from nanochat.system.environment import UserError, base_dir
from nanochat.training.tracker import read_metrics


def main(argv: list[str] | None = None) -> Path:
    """Write the picture; returns its path. UserError without a run or without matplotlib."""
    parser = Parser("scripts.plot_run", __doc__)
    parser.add_argument("--model-tag", help="default: the newest")
    parser.add_argument("--output", type=Path, default=Path("run.png"))
    arguments = parser.parse(argv)
    check_output(arguments.output, "--output")
    tag = arguments.model_tag or newest_tag(checkpoints_dir())
    metrics = checkpoints_dir() / tag / "metrics.jsonl"
    if not metrics.is_file():
        raise UserError(f"model_tag={tag!r}: there is no {metrics}")
    os.environ.setdefault("MPLCONFIGDIR", str(base_dir() / "matplotlib"))  # its cache of fonts
    try:
        import matplotlib
    except ImportError as error:
        raise UserError(f"plotting needs matplotlib ({error}): pip install -c constraints.txt -e '.[dev]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.2))
    kinds = figure.canvas.get_supported_filetypes()
    if (kind := arguments.output.suffix[1:].lower()) not in kinds:
        raise UserError(f"--output={arguments.output}: the name must end in one of .{', .'.join(sorted(kinds))}")
    lines = read_metrics(metrics)
    losses = [(line["step"], line["loss"]) for line in lines if "loss" in line and "event" not in line]
    evals = [(line["step"], line["val_bpb"]) for line in lines if line.get("event") == "eval" and "val_bpb" in line]
    left.plot(*zip(*losses, strict=True), lw=0.8)
    left.set(xlabel="step", ylabel="training loss (nats per token)", title=tag)
    right.plot(*zip(*evals, strict=True), marker="o", ms=3, label="this run")
    evaluations = sorted((base_dir() / "base_eval").glob(f"{tag}_*.json"))
    bpb = json.loads(evaluations[-1].read_text(encoding="utf-8")).get("bpb", {}) if evaluations else {}
    for color, key, name in (("C1", "xz", "xz -9e"), ("C2", "xz_primed", "xz -9e primed with the training split")):
        if bpb.get(key) is not None:
            right.axhline(bpb[key], color=color, ls="--", lw=1, label=name)
    right.set(xlabel="step", ylabel="val bpb (bits per byte)")
    if right.lines:
        right.legend(fontsize=8)
    figure.tight_layout()
    with open_atomic(arguments.output) as file:
        figure.savefig(file, format=kind, dpi=110)
    print(f"written: {arguments.output}")
    return arguments.output


if __name__ == "__main__":
    run_script(main)
