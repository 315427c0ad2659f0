"""Make another model out of a checkpoint: python -m scripts.convert --add-modality audio:2048 [--model-tag d4-tied]

The text model keeps what it knows: the same text gives the same logits. The new model is written as step 0 of a tag of
its own, <model_tag>-audio, with a config.py to train it from: --init_from begins with its weights.
"""

import argparse
import dataclasses

import torch

from nanochat.arguments import Parser, number
from nanochat.checkpoint_manager import build_model, checkpoints_dir, find_checkpoint, save_checkpoint, step_dir
from nanochat.config_file import as_dict, render_config
from nanochat.growth import grow, grown_config
from nanochat.modality import modalities_of
from nanochat.runtime import UserError, print0, run_script, write_atomically
from nanochat.settings import FIELDS, Settings, checked, validate


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser("scripts.convert", __doc__)
    parser.add_argument("--add-modality", required=True, metavar="NAME:CODES", help="as in audio:2048; several with ,")
    parser.add_argument("--codebooks", type=number(int, 1), default=1, help="codebooks of audio (default 1)")
    parser.add_argument("--expert-dim", type=number(int, 1), help="width inside the experts (default: the model's)")
    parser.add_argument("--untie", choices=("none", "mlp", "all"), help="what the modality has of its own (mlp)")
    parser.add_argument("--output-layers", choices=("separate", "masked", "shared"), help="logits (separate)")
    parser.add_argument("--fresh-experts", action="store_true", help="do not begin with a copy of text's")
    parser.add_argument("--seed", type=number(int, 0), default=0, help="of the new weights")
    parser.add_argument("--model-tag", help="folder under base_checkpoints (default: the newest)")
    parser.add_argument("--step", type=number(int, 0), help="step to take (default: the newest whole one)")
    parser.add_argument("--output-tag", help="tag of the new model (default: the old one's and the modality)")
    return parser.parse(argv)


def main(argv: list[str] | None = None) -> str:
    """Convert; returns the new tag."""
    args = parse(argv)
    checkpoint_dir, step = find_checkpoint(args.model_tag, args.step)
    model, tokenizer, metadata = build_model(checkpoint_dir, step, "cpu", "eval")
    if tokenizer is None:
        raise UserError(f"{step_dir(checkpoint_dir, step)} holds no tokenizer, whose reserved ids start a modality")
    saved = {name: checked(name, value) for name, value in metadata.get("settings", {}).items() if name in FIELDS}
    before = Settings(**saved)
    if before.untie == "random" and before.modalities:
        raise UserError("untie=random draws every id's expert anew for another number of modalities: it cannot grow")
    if "audio" in before.modality_codes() and args.codebooks not in (1, before.codebooks):
        raise UserError(f"--codebooks={args.codebooks}: the model's audio has {before.codebooks}")
    untie = args.untie or (before.untie if before.modalities else "mlp")
    if args.expert_dim and (untie == "none" or (before.modalities and args.expert_dim != before.expert_dim)):
        there = "no experts" if untie == "none" else f"experts of width {before.expert_dim or before.n_embd}"
        raise UserError(f"--expert-dim={args.expert_dim}: the model has {there}; one width serves all modalities")
    after = dataclasses.replace(
        before, modalities=", ".join(filter(None, [before.modalities, args.add_modality])), untie=untie,
        codebooks=before.codebooks if "audio" in before.modality_codes() else args.codebooks,
        expert_dim=before.expert_dim if before.modalities else args.expert_dim, model_tag=None,
        output_layers=args.output_layers or (before.output_layers if before.modalities else "separate"),
    )  # fmt: skip
    new = modalities_of(after, tokenizer.vocab_size)[len(model.config.modalities) :]
    for modality in new:
        if "<|reserved_" not in (token := tokenizer.decode([modality.start])):
            raise UserError(
                f"tokenizer {tokenizer.name} has {token} at id {modality.start}, no reserved id: it cannot grow"
            )
    config = grown_config(model.config, new, args.untie, args.output_layers)
    state = grow(model.state_dict(), config, args.seed, not args.fresh_experts, before.tied_init_std)
    tag = args.output_tag or "-".join([checkpoint_dir.name, *(m.name for m in new)])
    validate(dataclasses.replace(before, model_tag=tag))
    folder = checkpoints_dir() / tag
    if folder.exists():
        raise UserError(f"{folder} is there already: name another tag with --output-tag")
    after = dataclasses.replace(after, init_from=tag)
    if not before.modalities and "audio" in after.modality_codes():  # its text goes on beside the sounds
        after = dataclasses.replace(after, data="synth", text_data=before.data, data_limit=None)
    facts = dict(
        settings=as_dict(after), model_config=dataclasses.asdict(config), tokenizer_hash=tokenizer.hash,
        converted_from=dict(model_tag=checkpoint_dir.name, step=step), versions=dict(torch=torch.__version__),
    )  # fmt: skip
    written = save_checkpoint(folder, 0, state, None, facts, tokenizer=tokenizer)
    write_atomically(folder / "config.py", render_config(after))
    print0(f"{written}: {sum(t.numel() for t in state.values()):,} parameters, {', '.join(m.name for m in new)} added")
    told = "it has no sounds to learn from: give audio too, or bring data of your own"
    if "audio" in after.modality_codes():
        told = f"train it on {after.data} ({after.text_data or 'no'} text beside it), or on --data=FOLDER of your own"
    print0(f"{told}:")
    print0(f"  python -m scripts.base_train {folder / 'config.py'} --model_tag={tag}-trained")
    return tag


if __name__ == "__main__":
    run_script(main)
