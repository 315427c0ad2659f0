"""Leave for Hugging Face: python -m scripts.export_hf [--model-tag d4-tied] --out FOLDER

Writes a checkpoint as a folder for AutoModelForCausalLM.from_pretrained and AutoTokenizer.from_pretrained. A classic
model is transformers' own NanoChat; one with newer features comes with its code in hf_modeling.py, which transformers
runs only with trust_remote_code=True.
"""

from pathlib import Path

import torch

from nanochat.arguments import Parser, number
from nanochat.checkpoint_manager import build_model, find_checkpoint, step_path
from nanochat.hf_format import MODELING, write_hf
from nanochat.runtime import print0, run_script


def main(argv: list[str] | None = None) -> dict:
    """Export; returns what write_hf tells of the folder."""
    parser = Parser("scripts.export_hf", __doc__)
    parser.add_argument("--model-tag", help="under base_checkpoints, or the path of a folder, nanochat's own too")
    parser.add_argument("--step", type=number(int, 0), help="step to take (default: the newest whole one)")
    parser.add_argument("--era", help="of nanochat's own files, where they do not tell it: see scripts.convert")
    parser.add_argument("--out", type=Path, required=True, help="the new folder")
    parser.add_argument(
        "--fold-projection", action="store_true", help="wte @ P as an untied output matrix: plain NanoChat"
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the weights")
    args = parser.parse(argv)
    checkpoint_dir, step = find_checkpoint(args.model_tag, args.step)
    model, tokenizer, _ = build_model(checkpoint_dir, step, "cpu", "eval", era=args.era)
    facts = write_hf(
        args.out, model.config, model.state_dict(), tokenizer, fold=args.fold_projection,
        dtype=getattr(torch, args.dtype),
    )  # fmt: skip
    print0(f"{step_path(checkpoint_dir, step)} -> {args.out}")
    print0(
        f"{facts['architecture']}, {facts['parameters']:,} parameters, {facts['bytes'] / 1e6:,.1f} MB of {args.dtype}, "
        f"weights hash {facts['weights_hash']}, read back bit for bit"
    )
    if tokenizer is None:
        print0("the checkpoint holds no tokenizer: none was written")
    if facts["newer"]:
        print0(
            f"transformers' NanoChat has no {', '.join(facts['newer'])}: the folder brings {MODELING}, which runs for "
            "those who load it with trust_remote_code=True"
        )
        if model.config.use_output_projection and not args.fold_projection:
            print0("--fold-projection would write the output projection as an untied output matrix")
    return facts


if __name__ == "__main__":
    run_script(main)
