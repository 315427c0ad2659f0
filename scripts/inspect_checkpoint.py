"""Describe a checkpoint: `python -m scripts.inspect_checkpoint [CKPT] [--tensors] [--era ERA] [--reseal]`.

CKPT: a step's folder, a tag or its folder (the newest step), a folder of nanochat's own files or its model_000123.pt,
or a Hugging Face folder; default: the newest step. Says its format and age, the config, parameters by group, tokenizer,
data, optimizer state, the hash of the weights, and whether it is complete. --reseal rewrites manifest.json of a step
that was edited by hand. Exit code 1 where something is corrupt, missing or not finite.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from nanochat.checkpoint_files import find_corruption, read_metadata, read_tensors, weights_hash, write_manifest
from nanochat.checkpoint_manager import (
    check_state,
    check_tokenizer,
    checkpoints_dir,
    find_checkpoint,
    is_upstream,
    list_steps,
    model_config,
    newest_step,
    step_path,
    tokenizer_of,
)
from nanochat.config.command_line import Parser
from nanochat.data.tokenizer import Tokenizer
from nanochat.gpt import GPT, GPTConfig
from nanochat.model.parameters import find_non_finite, num_parameters
from nanochat.runtime import run_script
from nanochat.system.environment import UserError
from nanochat.system.streams import require_output
from nanochat.upstream import checkpoints as upstream
from nanochat.upstream.optimizer import read_optimizer
from nanochat.upstream.pickles import read_pt

READ = (
    "a step's folder (state.json, model.safetensors), nanochat's model_000123.pt with meta_000123.json beside it, or a "
    "Hugging Face folder (config.json, model.safetensors)"
)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser("scripts.inspect_checkpoint", __doc__)
    parser.add_argument("folder", nargs="?", type=Path, help="what to look into; default: the newest step")
    parser.add_argument("--tensors", action="store_true", help="list every tensor with dtype and shape")
    parser.add_argument("--era", help="of nanochat's own files, where they do not tell it")
    parser.add_argument("--reseal", action="store_true", help="rewrite manifest.json of a step that was edited by hand")
    return parser.parse(argv)


def main(argv: list[str] | None = None) -> dict:
    """Print the report; returns it: "folder", "corruption" (None: complete), and the rest where it could be read."""
    args = parse(argv)
    require_output()
    path = args.folder or find_checkpoint(None, None)[0]
    if not path.exists() and (checkpoints_dir() / path).is_dir():  # a tag
        path = checkpoints_dir() / path
    if args.reseal:
        reseal(path)

    folder, (path, inspect) = path, recognise(path, args.era)
    report = {"folder": str(path), "corruption": None}
    if path != folder and path != step_path(folder, newest := max(list_steps(folder))):
        report["newest"] = f"step {newest} of {folder} is corrupt: this is the newest complete one"
    try:
        report |= inspect()
    except UserError as error:
        report["corruption"] = str(error)
    state = report.pop("state", {})
    if report["corruption"] is None and (found := find_non_finite(state)):
        report["corruption"] = f"{found}: take an earlier step"

    print(f"{path}: {(report['corruption'] or 'complete').removeprefix(f'{path}: ').removeprefix(f'{path} ')}")
    if "newest" in report:
        print(f"  note: {report['newest']}")
    for name in ("format", "model", "beyond", "parameters", "tokenizer", "data", "optimizer", "codec", "weights"):
        if name in report:
            print(f"  {name:10s} {report[name]}")
    for note in report.get("metadata", {}).get("upstream", {}).get("notes", []):
        print(f"  note: {note}")
    if args.tensors:
        list_tensors(state)
    return report


def reseal(folder: Path) -> None:
    """Write a new manifest for an edited step; UserError for one that cannot be loaded."""
    if not (folder / "state.json").is_file():
        raise UserError(f"{folder} is not the folder of a step: it has no state.json")
    read_metadata(folder)  # before sealing: UserError for what cannot be loaded
    read_tensors(folder / "model.safetensors")
    write_manifest(folder)
    print(f"resealed {folder}")


def recognise(path: Path, era: str | None) -> tuple[Path, Callable[[], dict]]:
    """(the path to report on, a call that makes the report, with the tensors as "state"); UserError: no checkpoint."""
    if not path.exists():
        raise UserError(f"there is no {path}: name {READ}")
    if path.is_file():
        match = upstream.MODEL_NAME.fullmatch(path.name)
        if match and (meta := upstream.meta_file(path.parent, int(match[1]))).is_file():
            return path, lambda: inspect_upstream(path.parent, int(match[1]), era)
        if path.suffix == ".pt":
            kind = f"tensors alone: {meta.name}, which describes their model, is not beside it" if match else "tensors"
            return path, lambda: {"format": kind, **describe_weights(read_pt(path))}
        raise UserError(f"{path} alone is no checkpoint: name {READ}")
    if any((path / name).exists() for name in ("state.json", "manifest.json")) or path.name.startswith("step_"):
        return path, lambda: inspect_step(path)
    if steps := list_steps(path):
        complete = newest_step(path)
        step = steps[-1] if complete is None else complete  # of a corrupt last one the report says why
        if is_upstream(path, step):
            return step_path(path, step), lambda: inspect_upstream(path, step, era)
        return step_path(path, step), lambda: inspect_step(step_path(path, step))
    if (path / "config.json").is_file():
        return path, lambda: inspect_hugging_face(path)
    raise UserError(f"{path} holds no checkpoint that is known: name {READ}")


def inspect_step(folder: Path) -> dict:
    """Of a step's folder; UserError before anything else is read where its manifest does not hold."""
    if reason := find_corruption(folder):
        raise UserError(f"{reason}: take another step, or reseal what was edited by hand with --reseal")
    metadata, state = read_metadata(folder), read_tensors(folder / "model.safetensors")
    report = {"format": f"ours, step {metadata.get('step')}", "metadata": metadata}
    tokenizer = Tokenizer.load(folder / "tokenizer") if (folder / "tokenizer").is_dir() else None
    if "adapters" in metadata:
        report |= {"format": f"{report['format']}: adapters of a frozen host", **describe_weights(state)}
    else:
        config = model_config(metadata)
        with torch.device("meta"):
            check_state(GPT(config), state, folder)
        if tokenizer is not None:
            check_tokenizer(tokenizer, metadata, folder)
        report |= describe_model(config, state, tokenizer)
    fingerprint = metadata.get("data_fingerprint") or {}
    source = [str(fingerprint[key]) for key in ("source", "version") if key in fingerprint]
    report["data"] = f"{' '.join(source)} ({str(fingerprint.get('sha256'))[:8]})" if fingerprint else "not recorded"
    if codec := metadata.get("codec"):
        report["codec"] = f"hash {str(codec.get('hash'))[:8]}{'' if (folder / 'codec').is_dir() else ', not in here'}"
    report["optimizer"] = "complete" if (folder / "optimizer.safetensors").is_file() else "none: it cannot be resumed"
    return report


def inspect_upstream(folder: Path, step: int, era: str | None) -> dict:
    """Of nanochat's own files of a step."""
    state, metadata = upstream.load(folder, step, era)
    config, origin = model_config(metadata), metadata["upstream"]
    tokenizer = tokenizer_of(folder, step)
    if tokenizer is not None:
        check_tokenizer(tokenizer, metadata, folder)
    return {
        "format": f"nanochat's own of era {origin['era']} (by {origin['told_by']}), step {step}",
        "era": origin["era"],
        "metadata": metadata,
        **describe_model(config, state, tokenizer),
        "data": "not recorded",
        "optimizer": read_optimizer(folder, step, config)[1],
    }


def inspect_hugging_face(folder: Path) -> dict:
    from nanochat.conversion.huggingface import read_hf  # which no other format needs

    config, state, tokenizer = read_hf(folder)
    kind = json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"]
    return {"format": f"Hugging Face, {kind}", **describe_model(config, state, tokenizer)}


def describe_model(config: GPTConfig, state: dict[str, torch.Tensor], tokenizer: Tokenizer | None) -> dict:
    """Sizes, fields beyond classic nanochat's, parameters, tokenizer and weights."""
    with torch.device("meta"):
        counts = num_parameters(GPT(config))
    heads = f"{config.n_head} heads of {config.head_dim}"
    heads += f" ({config.n_kv_head} of keys and values)" if config.n_kv_head < config.n_head else ""
    sizes = upstream.SIZES
    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    beyond = [f"{k}={v!r}" for k, v in fields.items() if k not in sizes and v != getattr(GPTConfig, k)]
    return {
        "model": f"{config.n_layer} layers of width {config.n_embd}, {heads}, {config.vocab_size:,} ids, context "
        f"{config.sequence_len:,}",
        "beyond": f"classic nanochat: {', '.join(beyond) or 'nothing'}",
        "config": config,
        "parameters": f"{counts['total']:,}: "
        + ", ".join(f"{name} {count:,}" for name, count in counts.items() if count and name != "total"),
        "tokenizer": f"{tokenizer.vocab_size:,} ids, hash {tokenizer.hash[:8]}" if tokenizer else "none",
        **describe_weights(state),
    }


def describe_weights(state: dict[str, torch.Tensor]) -> dict:
    found = weights_hash(state)
    kinds = ", ".join(sorted({str(tensor.dtype)[6:] for tensor in state.values()}))
    return {"state": state, "weights_hash": found, "weights": f"{len(state)} tensors, {kinds}, hash {found}"}


def list_tensors(state: dict[str, torch.Tensor]) -> None:
    """Print name, dtype and shape of every tensor."""
    for name, tensor in state.items():
        # ascii(): a stranger's file may name its tensors with a terminal's control characters.
        print(f"  {ascii(name)[1:-1]:48s} {str(tensor.dtype)[6:]:10s} {list(tensor.shape)}")


def check(argv: list[str] | None = None) -> None:
    """main() as a command: exit code 1 unless the checkpoint is complete.

    Of a tag the newest step counts, even where the report describes an earlier one.
    """
    report = main(argv)
    if report["corruption"] is not None or "newest" in report:
        sys.exit(1)


if __name__ == "__main__":
    run_script(check)
