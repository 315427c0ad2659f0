"""What adapters around a frozen host learn, beside trained experts, adapters alone, and training everything.

`python -m scripts.experiments.adapters [--stage host|sweep|seeds|report] [--results FILE] [--workers 2]`. The host is
the text model of the cpu preset; the sounds are captioned melodies (codec pitch, 2 codebooks of 256). The expert has
half of the host's width, as MusicGen-small's has of Llama-3.2-1B's. One process with one thread a run; a run that is in
the results file is not repeated.

random: a drawn expert of that shape that stays as it is, between trained adapters.  trained: the expert is trained too.
none: adapters with nothing but a GELU between them.  everything: the host's weights are trained as well.
sweep: 4 variants x 7 rates, 200 steps, judged on a tenth of the training split.  seeds: 4 variants x 3 seeds at each
variant's best rate, 400 steps, then scripts.adapter_eval on 200 held-out sounds, which chose nothing.
report: losses, paired differences to random, captions obeyed, the host's text.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

from nanochat.checkpoint_manager import checkpoints_dir, newest_step
from nanochat.runtime import run_script
from nanochat.system.environment import UserError, base_dir
from scripts.experiments.common import (
    base_train,
    paired,
    read,
    run_missing,
    seed_runs,
    selection_note,
    sweep_runs,
    tag_of,
)

HOST = "adapters-host"
SHAPE = dict(
    host=f"nanochat:{HOST}",
    musicgen=None,
    expert_dim=96,
    data="synth",
    data_limit=3000,
    modalities="audio:256",
    codebooks=2,
    codec="pitch",
    max_seq_len=240,
    total_batch_size=3840,
    device_batch_size=16,
    eval_every=50,
    eval_clips=100,
    save_every=None,
    warmup_steps=20,
)
VARIANTS = {
    "random": dict(expert="random"),
    "trained": dict(expert="trained"),
    "none": dict(expert="none"),
    "everything": dict(expert="trained", finetune_host=True),
}
RATES = (1e-4, 5e-4, 1e-3, 5e-3, 2e-2, 5e-2, 1e-1)
SEEDS = (1, 2, 3)
QUANTITIES = ("pitch", "tempo", "contour", "instrument")


def train(key: str, settings: dict) -> dict:
    """One run; returns its line for the results file, with what captions do to its sounds where it is a seed's."""
    lines = base_train(f"adapters-{key}", {**SHAPE, **settings}, stage="adapter")
    evaluations = [line for line in lines if line.get("event") == "eval"]
    last = evaluations[-1]
    line = dict(
        key=key,
        settings=settings,
        steps=[e["step"] for e in evaluations],
        curve=[e["val_loss/audio"] for e in evaluations],
        loss=last["val_loss/audio"],
        text=last["val_loss/text"],
        seconds=lines[-1]["train_seconds"],
        baselines={k.removeprefix("baseline/"): v for k, v in last.items() if k.startswith("baseline/")},
        parameters=lines[0]["parameters"],
    )
    return line | (heard(f"adapters-{key}") if key.startswith("seeds/") else {})


def heard(key: str) -> dict:
    """scripts.adapter_eval on 200 sounds: captions obeyed, and the host's text loss before and after."""
    tag = tag_of(key)
    done = subprocess.run(
        [sys.executable, "-m", "scripts.adapter_eval", "--model-tag", tag, "--num", "200"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        errors="replace",
    )
    if done.returncode:
        raise UserError(f"adapter_eval of {tag} ended with code {done.returncode}: {done.stderr.strip()[-500:]}")
    result = json.loads(sorted((base_dir() / "adapter_eval").glob(f"{tag}_*.json"))[-1].read_text())
    return dict(adherence=result["adherence"], text_before=result["text"]["before"], text_after=result["text"]["after"])


def host_run() -> None:
    """Train the host, by the cpu preset, if it is not there."""
    if newest_step(checkpoints_dir() / HOST) is None:
        config = Path(__file__).resolve().parents[2] / "runs" / "cpu.py"
        command = [sys.executable, "-m", "scripts.base_train", str(config), f"--model_tag={HOST}"]
        if subprocess.run(command).returncode:
            raise UserError("the host could not be trained: see above")


def report(lines: dict[str, dict]) -> list[str]:
    """Markdown tables of the stages that have results."""
    out = selection_note(lines)
    for name in VARIANTS:
        cells = [(rate, lines.get(f"sweep/{name}/{rate}")) for rate in RATES]
        if all(cell for _, cell in cells):
            shown = (f"{rate}: {cell['loss']:.4f}" for rate, cell in cells)
            out.append(f"sweep {name}: {', '.join(shown)}")
    final = {n: [lines[f"seeds/{n}/{s}"] for s in SEEDS if f"seeds/{n}/{s}" in lines] for n in VARIANTS}
    if any(len(runs) < len(SEEDS) for runs in final.values()):
        return out
    baselines = final["random"][0]["baselines"]
    out += [
        "",
        "nats a code: "
        + ", ".join(f"{k} {v:.4f}" for k, v in baselines.items() if k not in ("shuffled_captions", "text")),
    ]
    out += [
        "",
        "| variant | rate | held-out nats by seed | minus random, paired, 95% (n=3) | other captions | text, nats |",
        "| --- " * 6 + "|",
    ]
    for name, runs in final.items():
        differences = [a["loss"] - b["loss"] for a, b in zip(runs, final["random"], strict=True)]
        mean, half = paired(differences) if name != "random" else (0.0, 0.0)
        difference = f"{mean:+.4f} +- {half:.4f}" if name != "random" else ""
        shuffled = statistics.fmean(run["baselines"]["shuffled_captions"] for run in runs)
        same = all(run["text_before"] == run["text_after"] for run in runs)
        text = "unchanged" if same else ", ".join(f"{r['text_before']:.3f} -> {r['text_after']:.3f}" for r in runs)
        nats = ", ".join(f"{run['loss']:.4f}" for run in runs)
        out.append(
            f"| {name} | {runs[0]['settings']['learning_rate']} | {nats} | {difference} | {shuffled:.4f} | {text} |"
        )
    for split in ("seen", "unseen"):
        out += ["", f"| captions obeyed, {split} pairs | " + " | ".join(QUANTITIES) + " |", "| --- " * 5 + "|"]
        for name, runs in final.items():
            cells = []
            for quantity in QUANTITIES:
                share = statistics.fmean(run["adherence"][split]["generated"][quantity]["share"] for run in runs)
                low = min(run["adherence"][split]["above shuffled"][quantity]["low"] for run in runs)
                cells.append(f"{share:.2f} (above shuffled by {low:+.2f} or more)")
            out.append(f"| {name} | " + " | ".join(cells) + " |")
    return out


def main(argv: list[str] | None = None) -> dict[str, dict]:
    """Run a stage and print its report; returns the result lines by key."""
    parser = argparse.ArgumentParser(prog="scripts.experiments.adapters", description=__doc__.splitlines()[0])
    parser.add_argument("--stage", choices=("host", "sweep", "seeds", "report"), default="report")
    parser.add_argument("--results", type=Path, default=Path("dev/adapters.jsonl"))
    parser.add_argument("--workers", type=int, default=max(1, os.cpu_count() or 1))
    arguments = parser.parse_args(argv)
    lines = read(arguments.results)
    if arguments.stage != "report":
        host_run()
    if arguments.stage in ("sweep", "seeds"):
        if arguments.stage == "sweep":
            runs = sweep_runs(VARIANTS, "learning_rate", RATES, 200)
        else:
            runs = seed_runs(VARIANTS, "learning_rate", RATES, 400, SEEDS, lines)
        lines = run_missing(runs, arguments.results, arguments.workers, train, "loss")
    print("\n".join(report(lines)))
    return lines


if __name__ == "__main__":
    run_script(main)
