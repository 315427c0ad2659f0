"""Summarise a run from its files alone; and tell speedrun.sh what to do next.

python -m scripts.summary [config.py] [--key=value ...]            the closing summary of that configuration's run
python -m scripts.summary [config.py] [--key=value ...] --plan     one line: ranks, action, state, step, evaluated, tag
python -m scripts.summary [config.py] [--key=value ...] --preset   the wizard's arguments for this machine, if needed
"""

import contextlib
import json
import shlex
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from nanochat.checkpoint_files import step_dir
from nanochat.checkpoint_manager import checkpoints_dir, newest_step
from nanochat.config.command_line import typed
from nanochat.config.config_file import from_command_line
from nanochat.config.presets import hardware_preset
from nanochat.config.settings import Settings, checked, preset
from nanochat.runtime import pick_device_type, run_script
from nanochat.system.environment import UserError, base_dir
from nanochat.system.streams import require_output
from nanochat.training.estimate import usable_devices
from nanochat.training.tracker import read_metrics


@dataclass(frozen=True)
class Run:
    """The state on disk of one tag's run.

    state: "new" (no files), "done", or unfinished: "preempted" (saved after a signal), "nonfinite" (stopped by the
    guard) or "started" (killed).
    step: the newest complete checkpoint, or None. evaluation: base_eval's complete results for that step, or None.
    """

    tag: str
    state: str
    step: int | None
    metrics: list[dict]
    evaluation: dict | None

    @property
    def folder(self) -> Path:
        return checkpoints_dir() / self.tag

    @property
    def evaluation_file(self) -> Path:
        return base_dir() / "base_eval" / f"{self.tag}_{self.step or 0:06d}.json"


def find_run(tag: str) -> Run:
    """Read a tag's folder. A truncated last line of metrics.jsonl, or a truncated evaluation, counts as missing."""
    folder = checkpoints_dir() / tag
    if not folder.is_dir() or not any(folder.iterdir()):
        return Run(tag, "new", None, [], None)
    step, metrics = newest_step(folder), read_metrics(folder / "metrics.jsonl")
    events = [line.get("event") for line in metrics]
    last = next((e for e in reversed(events) if e in ("start", "resume", "done", "preempted", "nonfinite")), "start")
    ended = last in ("preempted", "nonfinite") or (last == "done" and step is not None)
    run = Run(tag, last if ended else "started", step, metrics, None)
    return run if step is None else Run(tag, run.state, step, metrics, read_evaluation(run))


def read_state(run: Run) -> dict:
    """state.json of the run's newest complete step."""
    return json.loads((step_dir(run.folder, run.step) / "state.json").read_text(encoding="utf-8"))


def read_evaluation(run: Run) -> dict | None:
    """base_eval's results for the run's newest step: None when absent, incomplete, or those of other weights."""
    manifest = json.loads((step_dir(run.folder, run.step) / "manifest.json").read_text(encoding="utf-8"))
    try:
        found = json.loads(run.evaluation_file.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    if not isinstance(found, dict) or not ({"bpb", "samples"} <= found.keys() and found.keys() & {"offline", "core"}):
        return None
    same = (
        found.get("model_file_sha256", found.get("weights_sha256")) == manifest["files"]["model.safetensors"]["sha256"]
    )
    return found if same else None


# ---------------------------------------------------------------------------------------------------------------------
# for speedrun.sh


def count_gpus(settings: Settings) -> int:
    """The GPUs that a run with these settings can use here."""
    import torch

    return torch.cuda.device_count() if pick_device_type(settings.device_type) == "cuda" else 0


def choose_action(run: Run, settings: Settings, given: Iterable[str]) -> str:
    """What training has to do: "start", "resume", or "nothing" when the run is done with the very values given.

    A longer horizon, or a value that a resume refuses, is for base_train to judge.
    """
    if run.state == "new" or settings.overwrite:
        return "start"
    if run.state != "done":
        return "resume"
    saved = read_state(run).get("settings", {})
    same = (name in saved and checked(name, saved[name]) == getattr(settings, name) for name in given)
    return "nothing" if all(same) else "resume"


def format_plan(settings: Settings, given: Iterable[str] = ()) -> str:
    """'ranks action state step evaluated tag' of the run that the settings name; step is - when there is none."""
    with contextlib.redirect_stdout(sys.stderr):  # messages about corrupt steps are not part of the answer
        run = find_run(settings.tag)
    gpus = count_gpus(settings)
    world = usable_devices(settings, gpus)
    if world < gpus:
        print(f"{settings.rows} rows a step do not divide by {gpus} GPUs: using {world}", file=sys.stderr)
    step = "-" if run.step is None else run.step
    names = set(given) - {"model_tag"}  # the folder that was found answers for it
    words = (world, choose_action(run, settings, names), run.state, step, "yes" if run.evaluation else "no", run.tag)
    return " ".join(map(str, words))


def choose_wizard_arguments(settings: Settings, names_data: bool, gpus: int) -> str:
    """The preset of this machine; with packages as its data where nobody asked for climbmix and it is unreachable."""
    name = hardware_preset(pick_device_type(settings.device_type), gpus)
    arguments = f"--preset {name}"
    if names_data or preset(name).data != "climbmix":
        return arguments
    from nanochat.data.hub import Unreachable, probe
    from nanochat.data.prepare import climbmix_is_here  # with pyarrow, which only GPU presets need here

    try:
        if not climbmix_is_here(preset(name).data_limit):
            probe("climbmix")
    except Unreachable as error:
        print(f"{error}: this config trains on packages instead", file=sys.stderr)
        return f"{arguments} --set data=packages"
    return arguments


# ---------------------------------------------------------------------------------------------------------------------
# the closing summary


def format_summary(run: Run) -> str:
    """The summary as text: checkpoint, size, training, bpb beside the compressors, suite, samples, next commands."""
    if run.step is None:
        raise UserError(f"no checkpoint in {run.folder}: train one with `python -m scripts.base_train`")
    folder = step_dir(run.folder, run.step)
    lines = [f"checkpoint  {folder}", *_training_lines(run)]
    if run.evaluation is None:
        lines.append(f"evaluation  none yet for step {run.step}")
    else:
        lines += [*_bpb_lines(run.evaluation["bpb"]), *_suite_lines(run.evaluation), *_sample_lines(run.evaluation)]
        lines.append(f"details     {run.evaluation_file}")
    return "\n".join(["", *lines, "", "next, for example:", *(f"  {line}" for line in _next_commands(run))])


def _training_lines(run: Run) -> list[str]:
    state = read_state(run)
    parts = [f"{run.step:,} steps"]
    if total := state.get("derived", {}).get("parameters", {}).get("total"):
        parts.insert(0, f"{total:,} parameters")
    if tokens := [line["tokens"] for line in run.metrics if "tokens" in line]:
        parts.append(f"{tokens[-1]:,} tokens")
    if seconds := state.get("run", {}).get("train_seconds"):
        parts.append(f"{seconds:,.0f} s of training")
    return [f"model       {run.tag}: {', '.join(parts)}"]


def _bpb_lines(bpb: dict) -> list[str]:
    train = f"   train {bpb['train']:.4f}" if bpb.get("train") is not None else ""
    lines = [f"val bpb     {bpb['val']:.4f}{train}"]
    for key, name in (("xz", "xz -9e"), ("xz_primed", "xz -9e primed with the training split")):
        if bpb.get(key) is not None:
            verdict = "the model is better" if bpb["val"] < bpb[key] else "the model is not better"
            lines.append(f"            {bpb[key]:.4f} is {name}: {verdict}")
    return lines


def _suite_lines(evaluation: dict) -> list[str]:
    from nanochat.evaluation.report import find_exceeded_baselines  # heavy, and only a finished evaluation needs it

    lines = []
    for key, name in (("core", "CORE"), ("offline", "offline")):
        if key in evaluation:
            tasks = evaluation[key]["tasks"].values()
            ahead = Counter(baseline for task in tasks for baseline in find_exceeded_baselines(task))
            counts = ", ".join(f"{baseline} in {n}" for baseline, n in ahead.items()) or "nothing"
            score = evaluation[key]["score"] or 0.0  # None: the corpus yields no task at all
            lines.append(f"{name:<12}{score:.4f} mean centered accuracy; of {len(tasks)} tasks it exceeds {counts}")
    return lines


def _sample_lines(evaluation: dict, width: int = 300) -> list[str]:
    """One continuation of held-out text and one unconditional sample, as far as there are both."""
    from nanochat.evaluation.report import printable  # as above

    lines = []
    for prompted in (True, False):
        sample = next((s for s in evaluation["samples"] if bool(s["prompt"]) == prompted), None)
        if sample is not None:
            lines.append(f"sample      {'continuing a held-out document' if prompted else 'unconditional'}:")
            text = printable(sample["prompt"] + sample["text"][:width])
            lines += [f"            | {line}" for line in text.splitlines()]
    return lines


def _next_commands(run: Run) -> list[str]:
    python = typed(sys.executable)
    config = shlex.quote(str(run.folder / "config.py"))  # the run's own settings, flags included
    return [
        f"{python} -m scripts.base_generate --model-tag {shlex.quote(run.tag)} --prompt 'import '",
        f"{python} -m scripts.base_train {config} --resume --num_iterations={2 * run.step}",
        f"{python} -m scripts.base_train {config} --data=FOLDER --model_tag=mine",
        f"{python} -m scripts.configure",
    ]


def main(argv: list[str] | None = None) -> Run | None:
    """Print the plan, the wizard's arguments, or (without a switch) the summary of the run that the settings name."""
    line = from_command_line(argv, switches=("plan", "preset", "resume"), usage="python -m scripts.summary [config.py]")
    require_output()
    if "preset" in line.switches:
        if line.config_path is None:
            print(choose_wizard_arguments(line.settings, "data" in line.origins, count_gpus(line.settings)))
        else:
            print(f"using {line.config_path} as it is", file=sys.stderr)
        return None
    if "plan" in line.switches:
        print(format_plan(line.settings, line.origins))
        return None
    run = find_run(line.settings.tag)
    print(format_summary(run))
    return run


if __name__ == "__main__":
    run_script(main)
