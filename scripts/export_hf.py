"""Leave for Hugging Face: python -m scripts.export_hf [--model-tag d4-tied] --out FOLDER, or --refresh FOLDER

Writes a checkpoint as a folder for AutoModelForCausalLM.from_pretrained and AutoTokenizer.from_pretrained. A classic
model is transformers' own NanoChat; one with newer features comes with its code in hf_modeling.py, which transformers
runs only with trust_remote_code=True. --refresh puts the newest code into a folder that was exported earlier.
"""

import argparse
import logging
from pathlib import Path

import torch

from nanochat.checkpoint_manager import build_model, find_checkpoint, step_path
from nanochat.config.command_line import Parser, number
from nanochat.conversion.hf_refresh import refresh
from nanochat.conversion.huggingface import write_hf
from nanochat.runtime import run_script
from nanochat.system.environment import UserError
from nanochat.upstream.hf_model_types import MODELING

logger = logging.getLogger("nanochat")


def main(argv: list[str] | None = None) -> dict:
    """Export; returns the summary of write_hf(), or of refresh_export()."""
    parser = Parser("scripts.export_hf", __doc__)
    parser.add_argument("--model-tag", help="under base_checkpoints, or the path of a folder, nanochat's own too")
    parser.add_argument("--step", type=number(int, 0), help="step to take (default: the newest complete one)")
    parser.add_argument("--era", help="of nanochat's own files, where they do not tell it: see scripts.convert")
    parser.add_argument("--out", type=Path, help="the new folder")
    parser.add_argument("--refresh", type=Path, metavar="FOLDER", help=f"an export: replace its {MODELING} by today's")
    parser.add_argument(
        "--fold-projection", action="store_true", help="wte @ P as an untied output matrix: plain NanoChat"
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the weights (float32)")
    args = parser.parse(argv)
    if args.refresh is not None:
        return refresh_export(args)
    if args.out is None:
        raise UserError("name the new folder with --out=FOLDER, or an earlier export with --refresh=FOLDER")
    dtype = args.dtype or "float32"
    checkpoint_dir, step = find_checkpoint(args.model_tag, args.step)
    model, tokenizer, _ = build_model(checkpoint_dir, step, "cpu", "eval", era=args.era)
    summary = write_hf(
        args.out, model.config, model.state_dict(), tokenizer, fold=args.fold_projection, dtype=getattr(torch, dtype)
    )
    logger.info(f"{step_path(checkpoint_dir, step)} -> {args.out}")
    if summary["nonfinite"]:
        logger.warning(f"the weights hold NaN or infinite values: {summary['nonfinite']}; the export has them too")
    logger.info(
        f"{summary['architecture']}, {summary['parameters']:,} parameters, {summary['bytes'] / 1e6:,.1f} MB of "
        f"{dtype}, weights hash {summary['weights_hash']}, read back bit for bit"
    )
    if tokenizer is None:
        logger.info("the checkpoint holds no tokenizer: none was written")
    if summary["newer"]:
        logger.info(
            f"transformers' NanoChat has no {', '.join(summary['newer'])}: the folder brings {MODELING}, which runs "
            "for those who load it with trust_remote_code=True"
        )
        if model.config.use_output_projection and not args.fold_projection:
            logger.info("--fold-projection would write the output projection as an untied output matrix")
    return summary


def refresh_export(args: argparse.Namespace) -> dict:
    """Refresh an export; returns {"changes": a line for each}."""
    if others := [name for name, value in vars(args).items() if name != "refresh" and value not in (None, False)]:
        raise UserError(f"--refresh changes a folder that is there: it goes without --{others[0].replace('_', '-')}")
    changes = refresh(args.refresh)
    for line in changes or [f"its {MODELING} and config.json are up to date"]:
        logger.info(f"{args.refresh}: {line}")
    return dict(changes=changes)


if __name__ == "__main__":
    run_script(main)
