"""What the experiments share: a process for each run, a file of results, rates chosen on rows that are not reported,
paired intervals."""

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from scipy import stats

from nanochat.config.settings import Settings
from nanochat.files import write_atomically
from nanochat.system.environment import UserError, base_dir
from scripts.experiments.validation_part import choose_on_training

NO_CONFIG = "no_config.py"  # an empty file, so that a ./config.py has no say
# A run with this among its settings trains and is judged on parts of the training split (validation_part.py).
CHOOSING = {"validation": "a tenth of the training split"}


def tag_of(key: str) -> str:
    return "".join(c if c.isalnum() or c in "._-" else "_" for c in key)


def base_train(
    key: str, settings: dict, stage: str = "base", ranks: int = 1, threads: int = 1, module: str | None = None
) -> list[dict]:
    """One training run with so many threads a rank, in processes of its own, under a tag made of its key.

    stage: "base", or "adapter" for scripts.adapter_train; module: what to run in its place. Returns its metrics.jsonl.
    """
    tag = tag_of(key)
    if CHOOSING.items() <= settings.items():
        settings = choose_on_training({name: value for name, value in settings.items() if name not in CHOOSING})
    flags = [f"--{name}={value}" for name, value in {**settings, "model_tag": tag, "overwrite": True}.items()]
    write_atomically(base_dir() / NO_CONFIG, "")
    launcher = ["torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", "-m"] if ranks > 1 else []
    done = subprocess.run(
        [sys.executable, "-m", *launcher, module or f"scripts.{stage}_train", str(base_dir() / NO_CONFIG), *flags],
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        capture_output=True,
        text=True,
        errors="replace",
    )
    if done.returncode:
        raise UserError(f"run {key} ended with code {done.returncode}: {done.stderr.strip()[-500:]}")
    metrics = base_dir() / f"{stage}_checkpoints" / tag / "metrics.jsonl"
    return [json.loads(line) for line in metrics.read_text().splitlines()]


def run_missing(
    runs: dict[str, dict], results: Path, workers: int, train: Callable[[str, dict], dict], score: str
) -> dict[str, dict]:
    """Do what the file lacks, `workers` at a time, a line for each; returns all lines by key. score: what to print."""
    have = read(results)
    missing = {key: wish for key, wish in runs.items() if key not in have or _differ(have[key]["settings"], wish)}
    results.open("a").close()  # what hours of runs are to go into
    print(f"{len(runs)} runs, {len(runs) - len(missing)} there already", flush=True)
    with ThreadPoolExecutor(workers) as pool:
        for future in as_completed([pool.submit(train, *item) for item in missing.items()]):
            line = future.result()
            with open(results, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            print(f"{line['key']:40s} {score} {line[score]:.4f}  {line['seconds']:.0f} s", flush=True)
    return read(results)


def _differ(one: dict, other: dict) -> bool:
    """Whether two runs of base training differ, where one may spell out what the other leaves at its default."""
    defaults = vars(Settings())
    return {**defaults, **one} != {**defaults, **other}


def sweep_runs(variants: dict[str, dict], rate: str, rates: Iterable[float], steps: int) -> dict[str, dict]:
    """Every variant at every value of the setting `rate`, one seed, judged on a part of the training split."""
    return {
        f"sweep/{name}/{value}": {**changes, **CHOOSING, "num_iterations": steps, "seed": 1, rate: value}
        for name, changes in variants.items()
        for value in rates
    }


def seed_runs(
    variants: dict[str, dict], rate: str, rates: Iterable[float], steps: int, seeds: Iterable[int], lines: dict
) -> dict[str, dict]:
    """Every variant with every seed, at its rate with the lowest loss in the sweep."""
    best = {name: best_rate(lines, name, rates, "loss") for name in variants}
    return {
        f"seeds/{name}/{seed}": {**variants[name], "num_iterations": steps, "seed": seed, rate: best[name]}
        for seed in seeds
        for name in variants
    }


def best_rate(lines: dict[str, dict], name: str, rates: Iterable[float], score: str) -> float:
    """The rate of a variant with the lowest score on the validation part; UserError while a run of its sweep lacks."""
    found = {rate: lines.get(f"sweep/{name}/{rate}") for rate in rates}
    if not all(line and CHOOSING.items() <= line["settings"].items() for line in found.values()):
        raise UserError("the sweep is not finished: run --stage sweep first")
    return min(found, key=lambda rate: found[rate][score])


def selection_note(lines: dict[str, dict]) -> list[str]:
    """A caveat where the rates of the results were chosen on the rows that they report."""
    sweep = [line for key, line in lines.items() if key.startswith("sweep/")]
    if all(CHOOSING.items() <= line["settings"].items() for line in sweep):
        return []
    return ["rates selected on the validation rows that are reported: levels slightly optimistic"]


def against(
    baseline: str, ways: Iterable[str], seeds: Iterable[int], lines: dict, title: str, key: str, times: bool = False
) -> list[str]:
    """A table of val bpb over the seeds that a way and the baseline have in common.

    key: of a result line, with {way} and {seed}. times: also the median ratio of seconds, for runs that had equal
    company.
    """
    heads = [title, "val bpb by seed", f"minus {baseline}, paired, 95%", *[f"time, of {baseline}"] * times, "n"]
    out = [f"| {' | '.join(heads)} |", "| --- " * len(heads) + "|"]
    for way in ways:
        pairs = [[lines.get(key.format(way=name, seed=seed)) for name in (way, baseline)] for seed in seeds]
        pairs = [pair for pair in pairs if None not in pair]
        if pairs:
            ratio = statistics.median(one["seconds"] / base["seconds"] for one, base in pairs)
            apart = [one["val_bpb"] - base["val_bpb"] for one, base in pairs]
            difference = "{:+.4f} +- {:.4f}".format(*paired(apart)) if way != baseline and len(pairs) > 1 else ""
            shown = ", ".join(f"{one['val_bpb']:.4f}" for one, _ in pairs)
            cells = [way, shown, difference, *[f"{ratio:.3f}"] * times, str(len(pairs))]
            out.append(f"| {' | '.join(cells)} |")
    return out


def read(results: Path) -> dict[str, dict]:
    if not results.exists():
        return {}
    return {line["key"]: line for line in map(json.loads, results.read_text(encoding="utf-8").splitlines())}


def paired(differences: list[float]) -> tuple[float, float]:
    """Mean and half width of the 95% interval (Student's t) of paired differences."""
    n = len(differences)
    return statistics.fmean(differences), stats.t.ppf(0.975, n - 1) * statistics.stdev(differences) / n**0.5
