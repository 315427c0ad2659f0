"""Results of an evaluation: tables on the terminal, a .json and a .csv that later parts complete."""

import csv
import io
import json
import logging
import math
import sys
from pathlib import Path

from nanochat.evaluation.suite import describe_data
from nanochat.files import write_atomically

logger = logging.getLogger(__name__)

BASELINES = {"chance": "chance", "char_5gram": "5-gram", "word_overlap": "overlap"}
TASK_COLUMNS = ("accuracy", "centered", "chance", "char_5gram", "word_overlap", "items", "truncated", "cut", "seconds")


def find_exceeded_baselines(task: dict) -> list[str]:
    """The baselines that an accuracy exceeds by more than 1.96 standard errors."""
    lower = task["accuracy"] - 1.96 * math.sqrt(task["accuracy"] * (1 - task["accuracy"]) / task["items"])
    return [name for key, name in BASELINES.items() if task.get(key) is not None and lower > task[key]]


def report(result: dict) -> None:
    """Print the results on the terminal."""
    print(f"\n{result['model_tag']} step {result['step']} on {describe_data(result['data_fingerprint'] or {})}")
    if read := result.get("data_settings"):
        print(f"read with {', '.join(f'{name}={value!r}' for name, value in read.items())}")
    if bpb := result.get("bpb"):
        rows = [[s, f"{bpb[s]:.4f}", f"{bpb[f'{s}_bytes']:,}", f"{bpb[f'{s}_seconds']:.1f}"] for s in ("train", "val")]
        for key, name in (("xz", "xz -9e of val"), ("xz_primed", "xz -9e of val after train")):
            if bpb.get(key) is not None:
                rows.append([name, f"{bpb[key]:.4f}", f"{bpb['val_bytes']:,}", ""])
        show("bits per byte", ["", "bpb", "bytes", "seconds"], rows)
        if "val_losses" in bpb:
            rows = [
                [
                    name,
                    *(
                        f"{bpb[f'{split}_losses'][name]['nats'] / unit:.4f}"
                        for split in ("train", "val")
                        for unit in (1, math.log(2))
                    ),
                ]
                for name in bpb["val_losses"]
            ]
            show("loss a token, by modality", ["", "train nats", "bits", "val nats", "bits"], rows)
    if "audio" in result:
        report_audio(result["audio"])
    for part, title in (("core", "CORE"), ("offline", "OFFLINE suite (not comparable with CORE)")):
        if part in result and result[part]["tasks"]:
            report_suite(title, result[part])
    for sample in result.get("samples", ()):
        title = f"continuing {sample['prompt']!r}" if sample["prompt"] else "unconditional"
        print(printable(f"\n--- {title}:\n{sample['text']}"))


def report_audio(audio: dict) -> None:
    """The loss over codes beside its baselines."""
    nats = {"model": audio["nats"], **{f"model, {k} combinations": v for k, v in audio["splits"].items()}}
    nats |= {name.replace("_", " "): value for name, value in audio["baselines"].items()}
    rate = audio["bits_per_second"] / audio["nats"]
    rows = [[k, f"{v:.4f}", f"{v / math.log(2):.4f}", f"{v * rate:.0f}"] for k, v in nats.items()]
    show(f"sound: {audio['clips']:,} clips, {audio['codes']:,} codes", ["", "nats", "bits a code", "bits/s"], rows)
    print("shuffled captions minus model: what the model takes from the caption")


def report_suite(title: str, suite: dict) -> None:
    """The table of a suite, at most 80 columns wide; a star marks the baselines that a task exceeds."""
    baselines = {key: name for key, name in BASELINES.items() if any(key in task for task in suite["tasks"].values())}
    rows = []
    for label, task in suite["tasks"].items():
        exceeded = find_exceeded_baselines(task)
        cells = [
            f"{task[key]:.3f}{'*' if name in exceeded else ' '}" if key in task else ""
            for key, name in baselines.items()
        ]
        accuracy, centered = f"{task['accuracy']:.3f}", f"{task['centered']:.3f}"
        rows.append([label, accuracy, centered, *cells, str(task["items"]), f"{task['seconds']:.1f}"])
    score = "" if suite["score"] is None else f"{suite['score']:.4f}"
    rows.append(["mean", "", score, *[""] * (len(baselines) + 2)])
    show(title, ["task", "accur.", "centered", *(f"{name} " for name in baselines.values()), "items", "sec."], rows)
    print("* exceeded by more than 1.96 standard errors")
    shortened = [f"{label} {t['truncated']} ({t['cut']})" for label, t in suite["tasks"].items() if t["truncated"]]
    if shortened:
        print(f"items truncated on the left (of which into the scored text: wrong): {', '.join(shortened)}")


def printable(text: str) -> str:
    """The text with control characters escaped, and what the terminal's encoding lacks: samples must not steer it."""
    plain = "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)
    encoding = sys.stdout.encoding or "utf-8"
    return plain.encode(encoding, "backslashreplace").decode(encoding)


def show(title: str, names: list[str], rows: list[list[str]]) -> None:
    """A table, numbers to the right: with rich on a terminal, plain aligned text elsewhere."""
    print(f"\n{title}")
    if sys.stdout.isatty():
        try:
            from rich.console import Console
            from rich.table import Table
            from rich.text import Text

            table = Table(box=None, pad_edge=False, padding=(0, 1))
            for i, name in enumerate(names):
                table.add_column(name, justify="right" if i else "left", style="" if i else "bold", no_wrap=True)
            for row in rows:
                table.add_row(*map(Text, row))
            Console().print(table)
            return
        except ImportError as error:
            print(f"(plain table: {error})")
    widths = [max(len(row[i]) for row in [names, *rows]) for i in range(len(names))]
    for first, *others in [names, *rows]:
        cells = (cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))
        print("  ".join([first.ljust(widths[0]), *cells]).rstrip())


def as_csv(result: dict) -> str:
    """Lines of part, label, value (bpb or accuracy; the score in the line `mean`) and a task's other columns."""
    columns = TASK_COLUMNS[1:]
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["part", "label", "value", *columns])
    for label in ("train", "val", "xz", "xz_primed"):
        if result.get("bpb", {}).get(label) is not None:
            table.writerow(["bpb", label, result["bpb"][label], *[""] * len(columns)])
    for label, part in result.get("bpb", {}).get("val_losses", {}).items():
        table.writerow(["loss", label, part["nats"], *[""] * len(columns)])
    if audio := result.get("audio"):
        for label, nats in {"nats": audio["nats"], **audio["baselines"]}.items():
            table.writerow(["audio", label, nats, *[""] * len(columns)])
    for part in ("core", "offline"):
        for label, task in result.get(part, {}).get("tasks", {}).items():
            table.writerow([part, label, task["accuracy"], *(task.get(column, "") for column in columns)])
        if part in result:
            table.writerow([part, "mean", result[part]["score"], *[""] * len(columns)])
    return text.getvalue()


def find_non_finite_figures(value, name: str = "") -> list[str]:
    """The dotted names of figures that are NaN or infinite, which JSON has no number for."""
    if isinstance(value, float):
        return [] if math.isfinite(value) else [name]
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    return [n for key, item in items for n in find_non_finite_figures(item, f"{name}.{key}" if name else str(key))]


def replace_figures(value, names: list[str], new: float | None, name: str = ""):
    """A copy of the results with the figures of these dotted names replaced."""
    if isinstance(value, dict):
        return {k: replace_figures(v, names, new, f"{name}.{k}" if name else str(k)) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [replace_figures(v, names, new, f"{name}.{i}") for i, v in enumerate(value)]
    return new if name in names else value


def save(result: dict, path: Path) -> dict:
    """Write path and the .csv beside it; parts that an earlier call found for the same weights and data stay.

    Figures that are not finite are null in the file, which names them under "non_finite".
    """
    earlier = {}
    if path.is_file():
        try:
            earlier = json.loads(path.read_text(encoding="utf-8"))
            if isinstance(earlier, dict):
                earlier = replace_figures(earlier, earlier.pop("non_finite", []), math.nan)
        except ValueError as error:
            logger.info(f"{path} is not readable ({error}): written anew")
    same = ("model_file_sha256", "data_fingerprint")
    if isinstance(earlier, dict):
        earlier.setdefault("model_file_sha256", earlier.pop("weights_sha256", None))  # its earlier name
    if isinstance(earlier, dict) and all(earlier.get(key) == result[key] for key in same):
        result = earlier | result
    written = result
    if names := find_non_finite_figures(result):
        written = replace_figures(result, names, None) | {"non_finite": names}
    write_atomically(path, json.dumps(written, indent=1, allow_nan=False) + "\n")
    write_atomically(path.with_suffix(".csv"), as_csv(result))
    return result
