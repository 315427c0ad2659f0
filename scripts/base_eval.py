"""Evaluate a base model: bits per byte, loss over sounds, CORE, the OFFLINE suite, samples.

python -m scripts.base_eval [--model-tag d4-tied] [--step 600] [--eval core,bpb,audio,offline,sample]
torchrun --nproc_per_node=8 -m scripts.base_eval --eval core,bpb

Prints tables and writes base_dir()/base_eval/<tag>_<step>.json and .csv, or those of --out, after each part. Earlier
results of other parts for the same weights and data are kept. With --data the file's name ends in the first digits of
that fingerprint.
"""

import argparse
import dataclasses
import logging
from functools import partial
from pathlib import Path

import torch

from nanochat.audio.loss import evaluate_audio
from nanochat.audio.sources import holds_sounds
from nanochat.checkpoint_files import weights_hash
from nanochat.checkpoint_manager import (
    build_model,
    check_codec,
    check_tokenizer,
    find_checkpoint,
    model_file_hash,
    step_path,
)
from nanochat.config.command_line import Parser, number
from nanochat.config.settings import Settings
from nanochat.data.dataset import Dataset
from nanochat.data.tokenizer import Tokenizer
from nanochat.data.trained_data import replace_data
from nanochat.data_pipeline import find_or_train, open_trained_data, prepare_for
from nanochat.evaluation.bpb import compressor_baselines
from nanochat.evaluation.core import evaluate_core
from nanochat.evaluation.core_bundle import find_bundle
from nanochat.evaluation.offline import evaluate_offline
from nanochat.evaluation.report import report, save
from nanochat.evaluation.suite import draw_samples, evaluate_bpb, settings_of, warn_of_other_data
from nanochat.files import check_output
from nanochat.hardware import device_name
from nanochat.model.parameters import find_non_finite
from nanochat.runtime import (
    Compute,
    from_rank0,
    init_compute,
    nearest_name,
    pick_device_type,
    pick_dtype,
    rank0_first,
    run_script,
)
from nanochat.system.environment import UserError, base_dir

logger = logging.getLogger("nanochat")

PARTS = ("core", "bpb", "audio", "offline", "sample")
DATA_FLAGS = ("data_limit", "data_column", "data_split", "data_config", "data_audio_column")


# ---------------------------------------------------------------------------------------------------------------------
# the command line


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The arguments; underscores in flags count as dashes. UserError for anything unknown or out of range."""
    parser = Parser("scripts.base_eval", __doc__)
    parser.add_argument("--model-tag", help="folder under base_checkpoints, or a path with a slash (default: newest)")
    parser.add_argument("--step", type=number(int, 0), help="step to evaluate (default: the newest complete one)")
    parser.add_argument(
        "--eval",
        type=_parts,
        help="comma-separated: core, bpb, audio, offline, sample (default: all but core on a CPU, all but offline on a "
        "GPU; audio only where the data holds sounds)",
    )
    parser.add_argument("--max-per-task", type=number(int, 1), help="items per suite task, and sounds (default: all)")
    parser.add_argument(
        "--bundle", help="folder of the CORE bundle (default: eval_bundle in the base folder, or download)"
    )
    parser.add_argument("--device-batch-size", type=number(int, 1), help="rows of one forward (default: as trained)")
    parser.add_argument("--device-type", help="cpu, cuda or mps (default: the best one here)")
    parser.add_argument(
        "--out", type=Path, help="folder for the results, or a .json file (default: base_eval in the base folder)"
    )
    parser.add_argument("--data", help="another data source than the model was trained on")
    parser.add_argument("--data-limit", type=number(int, 1), help="of --data: largest number of documents or shards")
    parser.add_argument("--data-column", help="of --data: column that holds the text (default: text)")
    parser.add_argument("--data-split", help="of --data: split of a hub dataset (default: train)")
    parser.add_argument("--data-config", help="of --data: configuration name of a hub dataset")
    parser.add_argument("--data-audio-column", help="of --data: column that holds the sound (default: audio)")
    parser.add_argument("--era", help="of nanochat's own files, as 2026-03-02, where they do not tell it")
    args = parser.parse(argv)
    if args.data is None and (given := [name for name in DATA_FLAGS if getattr(args, name) is not None]):
        raise UserError(f"--{given[0].replace('_', '-')} says how to read other data: name it with --data=SOURCE")
    return args


def _parts(text: str) -> tuple[str, ...]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names or [text]:
        if name not in PARTS:
            raise argparse.ArgumentTypeError(f"unknown part {name!r}{nearest_name(name, PARTS)}")
    return tuple(part for part in PARTS if part in names)


# ---------------------------------------------------------------------------------------------------------------------
# the data of an evaluation


def choose_data(args: argparse.Namespace, settings: Settings, codec: Path | None) -> Settings:
    """The settings with the data of --data in place of the training's; codec: the model's, which other sounds take."""
    if not args.data:
        return settings
    settings = replace_data(settings, args.data, **{name: getattr(args, name) for name in DATA_FLAGS})
    if not holds_sounds(args.data):
        return dataclasses.replace(settings, modalities=None)
    return dataclasses.replace(settings, codec=str(codec)) if codec else settings


def effective_data_settings(settings: Settings) -> dict:
    """The data that was read, and the settings of reading it that had an effect."""
    return {name: getattr(settings, name) for name in ("data", *DATA_FLAGS) if settings.no_effect_reason(name) is None}


# ---------------------------------------------------------------------------------------------------------------------
# the report


class Results:
    """Results, written after every part, so that neither a later part nor a full disk loses what is computed already.

    found: all of them. error: why they could not be written, None if they were.
    """

    def __init__(self, rank: int):
        self.rank, self.found, self.path, self.error = rank, {}, None, None

    def open(self, path: Path, origin: dict) -> None:
        """path: the .json to write. origin: the checkpoint and data that the figures belong to."""
        self.path, self.found = path, origin

    def add(self, **parts) -> None:
        """Add parts and write them from rank 0; an error of the disk is only recorded, since more parts may follow."""
        self.found |= parts
        if self.rank == 0:
            try:
                self.found = save(self.found, self.path)
                self.error = None
            except OSError as error:
                self.error = error

    def show(self) -> None:
        """Print the results on rank 0, after a failure too."""
        if self.rank != 0 or not set(self.found) & {"bpb", "audio", "core", "offline", "samples"}:
            return
        report(self.found)
        if self.error is None:
            print(f"\nwritten: {self.path} and {self.path.with_suffix('.csv').name}")


def results_path(args: argparse.Namespace, tag: str, step: int, fingerprint: dict | None) -> Path:
    """The .json of the results: --out itself if it is one, else a file there or in the base folder."""
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
    # The name of the file is known only with the data; one in the same folder serves the check.
    flag = None if args.out is None else "--out"
    check_output(results_path(args, checkpoint_dir.name, step, None), flag, way_out="give --out FOLDER")

    compute = init_compute(args.device_type, None, seed=42)
    logger.info(f"evaluating {step_path(checkpoint_dir, step)} on {device_name(compute)}: {', '.join(parts)}")
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
    args: argparse.Namespace,
    parts: tuple[str, ...],
    checkpoint_dir: Path,
    step: int,
    compute: Compute,
    results: Results,
) -> None:
    """Measure the parts one after the other into results. A CORE without a bundle becomes OFFLINE."""
    bundle = None
    if "core" in parts:
        bundle = from_rank0(lambda: find_bundle(args.bundle), compute.rank, compute.world_size, compute.device)
        if bundle is None:
            parts = tuple(dict.fromkeys("offline" if part == "core" else part for part in parts))
    model, tokenizer, metadata = build_model(checkpoint_dir, step, compute.device, "eval", args.era)
    where = step_path(checkpoint_dir, step)
    if tokenizer is None and "upstream" in metadata:
        raise UserError(f"{where} has no tokenizer, without which no text can be scored: put tokenizer.pkl beside it")
    settings = choose_data(args, settings_of(metadata), metadata.get("codec") and where / "codec")
    trained_on = metadata.get("data_fingerprint")
    model.compute_dtype = pick_dtype(settings.dtype, compute.device_type)

    dataset = None
    if tokenizer is None or set(parts) - {"core"}:
        open_data = partial(prepare_for, settings) if args.data else partial(open_trained_data, settings, trained_on)
        dataset = rank0_first(compute, open_data)
        check_codec(dataset, metadata, where)
        warn_of_other_data(dataset, trained_on)
    if tokenizer is None:
        logger.info("the checkpoint holds no tokenizer: taking the one that its settings name")
        tokenizer = rank0_first(compute, lambda: find_or_train(settings, dataset))
        check_tokenizer(tokenizer, metadata, where)
    if tokenizer.vocab_size != model.config.vocab_size:
        raise UserError(f"the tokenizer has {tokenizer.vocab_size} ids, the model {model.config.vocab_size}")

    if (found := find_non_finite(model.state_dict())) is not None:
        logger.warning(f"{found}: no figure of this model means anything")
    origin = {
        "model_tag": checkpoint_dir.name,
        "step": step,
        "weights_hash": weights_hash(model.state_dict()),
        "model_file_sha256": model_file_hash(checkpoint_dir, step),
        **({"era": metadata["upstream"]["era"]} if "upstream" in metadata else {}),
        "data_fingerprint": dataset.fingerprint if dataset else trained_on,
        **({"data_settings": effective_data_settings(settings)} if args.data and dataset else {}),
    }
    results.open(results_path(args, checkpoint_dir.name, step, origin["data_fingerprint"]), origin)
    measure(args, parts, settings, bundle, model, tokenizer, dataset, compute, results)


def measure(
    args: argparse.Namespace,
    parts: tuple[str, ...],
    settings: Settings,
    bundle,
    model,
    tokenizer: Tokenizer,
    dataset: Dataset | None,
    compute: Compute,
    results: Results,
) -> None:
    """Add each requested part to results as soon as it is done."""
    rows = args.device_batch_size or min(settings.device_batch_size, max(1, settings.rows))
    options = dict(
        max_per_task=args.max_per_task,
        batch_tokens=rows * model.config.sequence_len,
        rank=compute.rank,
        world_size=compute.world_size,
    )

    if "bpb" in parts:
        results.add(bpb=evaluate_bpb(model, tokenizer, dataset, settings, rows, compute))
    if "audio" in parts and dataset.codec is not None:
        kwargs = dict(rows=rows, max_clips=args.max_per_task, rank=compute.rank, world_size=compute.world_size)
        try:
            results.add(audio=evaluate_audio(model, tokenizer, dataset, **kwargs))
        except UserError as error:  # too few sounds, on all ranks alike: the other parts have their results
            logger.info(f"audio skipped: {error}")
    elif "audio" in (args.eval or ()):
        logger.info(f"audio skipped: {dataset.name} holds no sounds")
    if bundle is not None:
        results.add(core=evaluate_core(model, tokenizer, bundle, **options))
    if "offline" in parts:
        results.add(offline=evaluate_offline(model, tokenizer, dataset, **options))

    # The other ranks have no part in what follows.
    if compute.rank == 0:
        if "bpb" in parts:
            results.add(bpb=results.found["bpb"] | compressor_baselines(dataset))
        if "sample" in parts:
            try:
                results.add(samples=draw_samples(model, tokenizer, dataset, settings.seed))
            except UserError as error:  # the figures above are worth more than the samples
                logger.info(f"no samples: {error}")


if __name__ == "__main__":
    run_script(main)
