"""Evaluate a base model: bits per byte, loss over sounds, CORE, the OFFLINE suite, samples.

python -m scripts.base_eval [--model-tag d4-tied] [--step 600] [--eval core,bpb,audio,offline,sample]
torchrun --nproc_per_node=8 -m scripts.base_eval --eval core,bpb

Prints a table and writes base_dir()/base_eval/<tag>_<step>.json and .csv, or those of --out, after each part. Results
of other parts for the same weights and data, written there before, are kept. With --data the file's name ends in the
first digits of that fingerprint.
"""

import argparse
import csv
import dataclasses
import io
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from nanochat.arguments import Parser
from nanochat.audio_loss_eval import evaluate_audio
from nanochat.audio_sources import holds_sounds
from nanochat.checkpoint_manager import (
    build_model,
    check_codec,
    check_tokenizer,
    find_checkpoint,
    model_file_hash,
    step_path,
    weights_hash,
)
from nanochat.core_bundle import find_bundle, load_bundle
from nanochat.core_eval import evaluate_core
from nanochat.dataloader import TokenStore
from nanochat.dataset import Dataset, prepare_for
from nanochat.engine import generate
from nanochat.loss_eval import bits_per_byte, compressor_baselines, never, packed_losses
from nanochat.offline_eval import build_tasks, evaluate_offline, kept_tasks
from nanochat.packing import Rows
from nanochat.parameters import find_non_finite
from nanochat.runtime import (
    Compute,
    SharedError,
    UserError,
    base_dir,
    check_output,
    device_name,
    init_compute,
    pick_device_type,
    pick_dtype,
    print0,
    run_script,
    write_atomically,
)
from nanochat.settings import FIELDS, Settings, checked, nearest_name
from nanochat.tokenizer import Tokenizer, find_or_train
from nanochat.trained_data import open_trained_data, with_other_data

PARTS = ("core", "bpb", "audio", "offline", "sample")
DATA_FLAGS = ("data_limit", "data_column", "data_split", "data_config", "data_audio_column")
SAMPLE_TOKENS = 64
BARS = {"chance": "chance", "char_5gram": "5-gram", "word_overlap": "overlap"}
TASK_COLUMNS = ("accuracy", "centered", "chance", "char_5gram", "word_overlap", "items", "truncated", "cut", "seconds")


# ---------------------------------------------------------------------------------------------------------------------
# the command line


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The arguments; underscores in flags count as dashes. UserError for anything unknown or out of range."""
    parser = Parser("scripts.base_eval", __doc__)
    parser.add_argument("--model-tag", help="folder under base_checkpoints, or a path with a slash (default: newest)")
    parser.add_argument("--step", type=_whole(0), help="step to evaluate (default: the newest whole one)")
    parser.add_argument(
        "--eval", type=_parts,
        help="comma-separated: core, bpb, audio, offline, sample (default: all but core on a CPU, all but offline on a "
        "GPU; audio only where the data holds sounds)",
    )  # fmt: skip
    parser.add_argument("--max-per-task", type=_whole(1), help="items per task of a suite, and sounds (default: all)")
    parser.add_argument(
        "--bundle", help="folder of the CORE bundle (default: eval_bundle in the base folder, or download)"
    )
    parser.add_argument("--device-batch-size", type=_whole(1), help="rows of one forward (default: as trained)")
    parser.add_argument("--device-type", help="cpu, cuda or mps (default: the best one here)")
    parser.add_argument(
        "--out", type=Path, help="folder for the results, or a .json file (default: base_eval in the base folder)"
    )
    parser.add_argument("--data", help="another data source than the model was trained on")
    parser.add_argument("--data-limit", type=_whole(1), help="of --data: use at most so many documents or shards")
    parser.add_argument("--data-column", help="of --data: column that holds the text (default: text)")
    parser.add_argument("--data-split", help="of --data: split of a hub dataset (default: train)")
    parser.add_argument("--data-config", help="of --data: configuration name of a hub dataset")
    parser.add_argument("--data-audio-column", help="of --data: column that holds the sound (default: audio)")
    parser.add_argument("--era", help="of nanochat's own files, as 2026-03-02, where they do not tell it")
    args = parser.parse(argv)
    if args.data is None and (given := [name for name in DATA_FLAGS if getattr(args, name) is not None]):
        raise UserError(f"--{given[0].replace('_', '-')} says how to read other data: name it with --data=SOURCE")
    return args


def _whole(least: int) -> Callable[[str], int]:
    def convert(text: str) -> int:
        if not text.isascii() or not text.isdigit() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")
        return int(text)

    return convert


def _parts(text: str) -> tuple[str, ...]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names or [text]:
        if name not in PARTS:
            raise argparse.ArgumentTypeError(f"unknown part {name!r}{nearest_name(name, PARTS)}")
    return tuple(part for part in PARTS if part in names)


# ---------------------------------------------------------------------------------------------------------------------
# what belongs to a checkpoint


def settings_of(metadata: dict) -> Settings:
    """The settings of the training; names that this version does not know and absent ones mean the default."""
    saved = metadata.get("settings")
    if not isinstance(saved, dict):
        print0(f"the checkpoint does not say its settings: assuming the defaults, data={Settings().data}")
        saved = {}
    return Settings(**{name: checked(name, value) for name, value in saved.items() if name in FIELDS})


def said_data_settings(settings: Settings) -> dict:
    """Which data was read, and those settings of how that had an effect."""
    return {name: getattr(settings, name) for name in ("data", *DATA_FLAGS) if settings.inert(name) is None}


def rank0_first(compute: Compute, make: Callable):
    """make() on rank 0, which writes files, then on the others, which find them."""
    if compute.rank == 0:
        value = make()
        compute.barrier()
        return value
    compute.barrier()
    return make()


def from_rank0(make: Callable, rank: int, world_size: int, device: torch.device):
    """What make() returns on rank 0, on every rank; a UserError of it is raised on every rank."""
    if world_size == 1:
        return make()
    box: list = [None, None]
    if rank == 0:
        try:
            box[0] = make()
        except UserError as error:
            box[1] = str(error)
    dist.broadcast_object_list(box, src=0, device=device)
    if box[1] is not None:
        raise SharedError(box[1])
    return box[0]


def warn_of_other_data(dataset: Dataset, trained: dict | None) -> None:
    """Say so when the documents are not those of the training: bits per byte do not compare then."""
    now = dataset.fingerprint
    if not trained:
        print0("the checkpoint has no data fingerprint: whether this is the data it was trained on is unknown")
    elif trained.get("sha256") != now["sha256"]:
        print0(
            f"warning: trained on {_name(trained)}, evaluated on {_name(now)}: the numbers do not compare, "
            "and documents held out here may have been trained on"
        )


def _name(fingerprint: dict) -> str:
    facts = [str(fingerprint.get(key)) for key in ("source", "version")]
    return f"{' '.join(facts)} ({str(fingerprint.get('sha256'))[:8]})"


# ---------------------------------------------------------------------------------------------------------------------
# the parts


def evaluate_bpb(
    model, tokenizer: Tokenizer, dataset: Dataset, settings: Settings, rows: int, compute: Compute
) -> dict:
    """Bits per byte of the whole val split, and of the start of train: eval_tokens of it, or as many as val has."""
    ranks = dict(rank=compute.rank, world_size=compute.world_size)
    result = {}
    limit = settings.eval_tokens
    seq_len = model.config.sequence_len
    for split in ("val", "train"):
        begun = time.perf_counter()
        store = TokenStore(dataset, tokenizer, split, vocabulary=model.vocabulary)
        if dataset.codec is None:
            stream = store.stream(None if split == "val" else limit + 1)
            limit = limit or len(stream)
            found = bits_per_byte(model, stream, tokenizer.token_bytes, rows=rows, seq_len=seq_len, **ranks)
        else:
            most = None if split == "val" else limit
            packed = Rows(store, seq_len, print0, max_tokens=most)
            limit = limit or len(packed) * seq_len
            found = packed_losses(model, packed, tokenizer.token_bytes, rows=rows, max_tokens=most, **ranks)
        store.close()
        result |= {split: found["bpb"], f"{split}_bytes": found["bytes"], f"{split}_tokens": found["tokens"]}
        result[f"{split}_seconds"] = time.perf_counter() - begun
        if "losses" in found:
            result[f"{split}_losses"] = found["losses"]
    if result["val_bytes"] != dataset.text_bytes("val"):
        print0(f"warning: scored {result['val_bytes']} of {dataset.text_bytes('val')} held-out bytes")
    return result


def check_suite(compute: Compute) -> None:
    """Before a training that will score CORE: UserError for a bundle that is damaged, on every rank."""

    def check() -> None:
        if (bundle := find_bundle(download=False)) is not None:
            load_bundle(bundle)

    from_rank0(check, compute.rank, compute.world_size, compute.device)


def evaluate_suite(
    model, tokenizer: Tokenizer, dataset: Dataset, max_per_task: int | None = None, *, rank: int = 0,
    world_size: int = 1, stop: Callable[[], bool] = never,
) -> dict[str, float]:  # fmt: skip
    """{"core": score} where the CORE bundle lies in the base folder, else {"offline": score}; {} without any task.

    For use during training: nothing is downloaded, the cheap baselines are left out, and OFFLINE's items are made once,
    by rank 0. All ranks call it together.
    stop: asked before every forward; when it says yes on any rank, CutShort is raised on all.
    """
    options = dict(max_per_task=max_per_task, rank=rank, world_size=world_size, stop=stop, say=print0)
    bundle = from_rank0(lambda: find_bundle(download=False), rank, world_size, model.device)
    if bundle is not None:
        return {"core": evaluate_core(model, tokenizer, bundle, **options)["score"]}
    tasks = kept_tasks(
        dataset, lambda: from_rank0(lambda: build_tasks(dataset, print0), rank, world_size, model.device)
    )
    score = evaluate_offline(model, tokenizer, dataset, baselines=False, tasks=tasks, **options)["score"]
    return {} if score is None else {"offline": score}


def draw_samples(model, tokenizer: Tokenizer, dataset: Dataset, seed: int) -> list[dict]:
    """Continuations of the first lines of four held-out documents, then two texts from nothing (after BOS)."""
    count = dataset.num_documents("val")
    prompts = []
    for _, text in dataset.documents_at("val", {count * n // 4 for n in range(4)}):
        lines = [line for line in text[:2000].split("\n") if line.strip()]
        prompts.append("\n".join(lines[:2])[:160].rstrip())
    samples = []
    for prompt in [*dict.fromkeys(filter(None, prompts)), "", ""]:
        ids = tokenizer.encode(prompt, bos=True)
        stop = (tokenizer.bos_id, *(m.start for m in model.config.modalities))
        options = dict(temperature=0.8, top_k=50, seed=seed + len(samples), stop=stop)
        new = generate(model, ids, SAMPLE_TOKENS, **options)[0]
        samples.append({"prompt": prompt, "text": tokenizer.decode(new)})
    return samples


# ---------------------------------------------------------------------------------------------------------------------
# the report


def beaten(task: dict) -> list[str]:
    """The bars that an accuracy is above by more than chance would explain: 1.96 standard errors."""
    error = 1.96 * math.sqrt(task["accuracy"] * (1 - task["accuracy"]) / task["items"])
    return [name for key, name in BARS.items() if task.get(key) is not None and task["accuracy"] - error > task[key]]


def report(result: dict) -> None:
    """Print the results on the terminal."""
    print(f"\n{result['model_tag']} step {result['step']} on {_name(result['data_fingerprint'] or {})}")
    if read := result.get("data_settings"):
        print(f"read with {', '.join(f'{name}={value!r}' for name, value in read.items())}")
    if bpb := result.get("bpb"):
        rows = [[s, f"{bpb[s]:.4f}", f"{bpb[f'{s}_bytes']:,}", f"{bpb[f'{s}_seconds']:.1f}"] for s in ("train", "val")]
        for key, name in (("xz", "xz -9e of val"), ("xz_primed", "xz -9e of val after train")):
            if bpb.get(key) is not None:
                rows.append([name, f"{bpb[key]:.4f}", f"{bpb['val_bytes']:,}", ""])
        show("bits per byte", ["", "bpb", "bytes", "seconds"], rows)
        if "val_losses" in bpb:
            rows = [[name, *(f"{bpb[f'{split}_losses'][name]['nats'] / unit:.4f}" for split in ("train", "val")
                     for unit in (1, math.log(2)))] for name in bpb["val_losses"]]  # fmt: skip
            show("loss a token, by modality", ["", "train nats", "bits", "val nats", "bits"], rows)
    if "audio" in result:
        report_audio(result["audio"])
    for part, title in (("core", "CORE"), ("offline", "OFFLINE suite (not comparable with CORE)")):
        if part in result and result[part]["tasks"]:
            report_suite(title, result[part])
    for sample in result.get("samples", ()):
        title = f"continuing {sample['prompt']!r}" if sample["prompt"] else "from nothing"
        print(printable(f"\n--- {title}:\n{sample['text']}"))


def report_audio(audio: dict) -> None:
    """The loss over codes beside its baselines."""
    nats = {"model": audio["nats"], **{f"model, {k} combinations": v for k, v in audio["splits"].items()}}
    nats |= {name.replace("_", " "): value for name, value in audio["baselines"].items()}
    rate = audio["bits_per_second"] / audio["nats"]
    rows = [[k, f"{v:.4f}", f"{v / math.log(2):.4f}", f"{v * rate:.0f}"] for k, v in nats.items()]
    show(f"sound: {audio['clips']:,} clips, {audio['codes']:,} codes", ["", "nats", "bits a code", "bits/s"], rows)
    print("shuffled captions less model: what is taken from the caption")


def report_suite(title: str, suite: dict) -> None:
    """The table of a suite, at most 80 columns wide; a star marks the bars that a task is above."""
    bars = {key: name for key, name in BARS.items() if any(key in task for task in suite["tasks"].values())}
    rows = []
    for label, task in suite["tasks"].items():
        won = beaten(task)
        cells = [f"{task[key]:.3f}{'*' if name in won else ' '}" if key in task else "" for key, name in bars.items()]
        accuracy, centered = f"{task['accuracy']:.3f}", f"{task['centered']:.3f}"
        rows.append([label, accuracy, centered, *cells, str(task["items"]), f"{task['seconds']:.1f}"])
    score = "" if suite["score"] is None else f"{suite['score']:.4f}"
    rows.append(["mean", "", score, *[""] * (len(bars) + 2)])
    show(title, ["task", "accur.", "centered", *(f"{name} " for name in bars.values()), "items", "sec."], rows)
    print("* beaten by more than 1.96 standard errors")
    shortened = [f"{label} {t['truncated']} ({t['cut']})" for label, t in suite["tasks"].items() if t["truncated"]]
    if shortened:
        print(f"items that lost their left end (and part of the scored text: wrong): {', '.join(shortened)}")


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
            print0(f"{path} is not readable ({error}): written anew")
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


class Results:
    """What was measured, on disk after every part: no later part, and no disk, costs what is computed already.

    found: all of it. error: why it could not be written, None when it was.
    """

    def __init__(self, rank: int):
        self.rank, self.found, self.path, self.error = rank, {}, None, None

    def open(self, path: Path, facts: dict) -> None:
        """path: the .json to write. facts: what the figures belong to."""
        self.path, self.found = path, facts

    def add(self, **parts) -> None:
        """Take parts that are done, and write them from rank 0; a failing disk is noted, since more is to come."""
        self.found |= parts
        if self.rank == 0:
            try:
                self.found = save(self.found, self.path)
                self.error = None
            except OSError as error:
                self.error = error

    def show(self) -> None:
        """Print, on rank 0, what there is: after a failure too."""
        if self.rank != 0 or not set(self.found) & {"bpb", "audio", "core", "offline", "samples"}:
            return
        report(self.found)
        if self.error is None:
            print(f"\nwritten: {self.path} and {self.path.with_suffix('.csv').name}")


def results_path(args: argparse.Namespace, tag: str, step: int, fingerprint: dict | None) -> Path:
    """The .json of the results: --out itself when it is one, else a name of its own there or in the base folder."""
    if args.out is not None and args.out.suffix == ".json":
        return args.out
    other = f"_{fingerprint['sha256'][:8]}" if args.data and fingerprint else ""
    other += f"_{args.era}" if args.era else ""
    return (args.out or base_dir() / "base_eval") / f"{tag}_{step:06d}{other}.json"


# ---------------------------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> dict:
    """Evaluate and return the results as they are written (rank 0; other ranks return their share of it)."""
    args = parse(argv)
    device_type = pick_device_type(args.device_type)
    parts = args.eval or tuple(part for part in PARTS if part != ("offline" if device_type == "cuda" else "core"))
    checkpoint_dir, step = find_checkpoint(args.model_tag, args.step)
    # As good as the file that will be written: its name is known only with the data.
    if args.out is None:
        check_output(results_path(args, checkpoint_dir.name, step, None), way_out="give --out FOLDER")
    else:
        check_output(results_path(args, checkpoint_dir.name, step, None), "--out")
    compute = init_compute(args.device_type, None, seed=42)
    print0(f"evaluating {step_path(checkpoint_dir, step)} on {device_name(compute)}: {', '.join(parts)}")
    results = Results(compute.rank)
    try:
        evaluate(args, parts, checkpoint_dir, step, compute, results)
    except torch.OutOfMemoryError as error:
        raise UserError(f"out of memory: lower --device-batch-size ({str(error).split('.')[0]})") from error
    finally:
        results.show()
    if results.error is not None:
        raise results.error
    return results.found


def evaluate(
    args: argparse.Namespace, parts: tuple[str, ...], checkpoint_dir: Path, step: int, compute: Compute,
    results: Results,
) -> None:  # fmt: skip
    """The parts, one after the other, into results; see main. A CORE without a bundle becomes OFFLINE."""
    bundle = None
    if "core" in parts:
        bundle = from_rank0(lambda: find_bundle(args.bundle), compute.rank, compute.world_size, compute.device)
        if bundle is None:
            parts = tuple(dict.fromkeys("offline" if part == "core" else part for part in parts))
    model, tokenizer, metadata = build_model(checkpoint_dir, step, compute.device, "eval", args.era)
    where = step_path(checkpoint_dir, step)
    if tokenizer is None and "upstream" in metadata:
        raise UserError(f"{where} has no tokenizer, without which no text can be scored: put tokenizer.pkl beside it")
    settings = settings_of(metadata)
    trained_on = metadata.get("data_fingerprint")
    model.compute_dtype = pick_dtype(settings.dtype, compute.device_type)
    if args.data:
        settings = with_other_data(settings, args.data, **{name: getattr(args, name) for name in DATA_FLAGS})
        if not holds_sounds(args.data):
            settings = dataclasses.replace(settings, modalities=None)
        elif metadata.get("codec"):  # codes mean what they meant in the training
            settings = dataclasses.replace(settings, codec=str(where / "codec"))

    def open_data() -> Dataset:
        if args.data:
            return prepare_for(settings, say=print0)
        return open_trained_data(settings, trained_on, say=print0)

    dataset = None
    if tokenizer is None or set(parts) - {"core"}:
        dataset = rank0_first(compute, open_data)
        check_codec(dataset, metadata, where)
        warn_of_other_data(dataset, trained_on)
    if tokenizer is None:
        print0("the checkpoint holds no tokenizer: taking the one that its settings name")
        tokenizer = rank0_first(compute, lambda: find_or_train(settings, dataset, say=print0))
        check_tokenizer(tokenizer, metadata, where)
    if tokenizer.vocab_size != model.config.vocab_size:
        raise UserError(f"the tokenizer has {tokenizer.vocab_size} ids, the model {model.config.vocab_size}")

    if (found := find_non_finite(model.state_dict())) is not None:
        print0(f"warning: {found}: no figure of this model means anything")
    facts = {
        "model_tag": checkpoint_dir.name,
        "step": step,
        "weights_hash": weights_hash(model.state_dict()),
        "model_file_sha256": model_file_hash(checkpoint_dir, step),
        **({"era": metadata["upstream"]["era"]} if "upstream" in metadata else {}),
        "data_fingerprint": dataset.fingerprint if dataset else trained_on,
        **({"data_settings": said_data_settings(settings)} if args.data and dataset else {}),
    }
    results.open(results_path(args, checkpoint_dir.name, step, facts["data_fingerprint"]), facts)
    measure(args, parts, settings, bundle, model, tokenizer, dataset, compute, results)


def measure(
    args: argparse.Namespace, parts: tuple[str, ...], settings: Settings, bundle, model, tokenizer: Tokenizer,
    dataset: Dataset | None, compute: Compute, results: Results,
) -> None:  # fmt: skip
    """Each part that was asked for, into results as soon as it is done."""
    rows = args.device_batch_size or min(settings.device_batch_size, max(1, settings.rows))
    options = dict(
        max_per_task=args.max_per_task,
        batch_tokens=rows * model.config.sequence_len,
        rank=compute.rank,
        world_size=compute.world_size,
        say=print0,
    )
    if "bpb" in parts:
        results.add(bpb=evaluate_bpb(model, tokenizer, dataset, settings, rows, compute))
    if "audio" in parts and dataset.codec is not None:
        shape = dict(rows=rows, rank=compute.rank, world_size=compute.world_size)
        try:
            results.add(audio=evaluate_audio(model, tokenizer, dataset, max_clips=args.max_per_task, **shape))
        except UserError as error:  # too few sounds, on all ranks alike: the other parts have their results
            print0(f"audio left out: {error}")
    elif "audio" in (args.eval or ()):
        print0(f"audio left out: {dataset.name} holds no sounds")
    if bundle is not None:
        results.add(core=evaluate_core(model, tokenizer, bundle, **options))
    if "offline" in parts:
        results.add(offline=evaluate_offline(model, tokenizer, dataset, **options))
    # From here on nothing is shared: only rank 0 works.
    if compute.rank == 0:
        if "bpb" in parts:
            results.add(bpb=results.found["bpb"] | compressor_baselines(dataset, say=print0))
        if "sample" in parts:
            try:
                results.add(samples=draw_samples(model, tokenizer, dataset, settings.seed))
            except UserError as error:  # the figures above are worth more than the samples
                print0(f"no samples: {error}")


if __name__ == "__main__":
    run_script(main)
