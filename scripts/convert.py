"""Make another model out of a checkpoint, or nanochat's and Hugging Face's formats into ours.

python -m scripts.convert --add-modality audio:2048 [--model-tag d4-tied]   a text model that can learn sounds
python -m scripts.convert --untie [--model-tag d4-tied]       an output matrix of its own, same logits
python -m scripts.convert --tie [--model-tag d4]              one table for embedding and output, at a measured loss
python -m scripts.convert --model-tag FOLDER [--era ERA]      nanochat's own files, rewritten in our format
python -m scripts.convert --from-hf FOLDER                    a Hugging Face folder, likewise

The result is a tag of its own, with a config.py to train it from, initialised from its weights (--init_from). A changed
model starts at step 0, a rewritten one keeps its step, and its optimizer state where its files hold all of it.
"""

import argparse
import dataclasses
import logging

from nanochat.checkpoint_manager import checkpoints_dir
from nanochat.config.command_line import Parser, number, seed
from nanochat.config.config_file import as_dict
from nanochat.config.settings import Settings
from nanochat.conversion import convert as conversion
from nanochat.conversion.convert import Source
from nanochat.conversion.growth import grow, grown_config
from nanochat.conversion.tying import KEEP, State
from nanochat.modality import modalities_of
from nanochat.runtime import run_script
from nanochat.system.environment import UserError
from nanochat.upstream.foreign_weights import describe_nonfinite

logger = logging.getLogger("nanochat")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser("scripts.convert", __doc__)
    parser.add_argument("--model-tag", help="folder under base_checkpoints, or the path of one (default: the newest)")
    parser.add_argument("--step", type=number(int, 0), help="step to take (default: the newest complete one)")
    parser.add_argument("--era", help="what nanochat's files are from, as in 2026-03-02 (default: what they look like)")
    parser.add_argument("--from-hf", metavar="FOLDER", help="a folder that export_hf or save_pretrained wrote")
    parser.add_argument("--output-tag", help="tag of the new model (default: the old one's and what was done)")
    parser.add_argument(
        "--tie",
        nargs="?",
        const=True,
        choices=tuple(KEEP),
        help="one table for embedding and output; a value says what of the two is kept (default: what costs least)",
    )
    parser.add_argument(
        "--untie",
        nargs="?",
        const=True,
        choices=("none", "mlp", "all"),
        help="alone: an output matrix of its own; of an added modality, what it has of its own: none, mlp, all (mlp)",
    )
    parser.add_argument("--data", help="where to measure the change in loss (default: the model's own data)")
    parser.add_argument("--add-modality", metavar="NAME:CODES", help="as in audio:2048; several with ,")
    parser.add_argument("--codebooks", type=number(int, 1), default=1, help="codebooks of audio (default 1)")
    parser.add_argument("--expert-dim", type=number(int, 1), help="width inside the experts (default: the model's)")
    parser.add_argument("--output-layers", choices=("separate", "masked", "shared"), help="logits (separate)")
    parser.add_argument("--fresh-experts", action="store_true", help="random experts, no copy of text's")
    parser.add_argument("--seed", type=seed, default=0, help="of the new weights")
    args = parser.parse(argv)
    if args.untie not in (None, True) and not args.add_modality:
        raise UserError(f"--untie={args.untie} is of an added modality: give --add-modality too, or --untie alone")
    if (args.untie is True) + (args.tie is not None) + (args.add_modality is not None) > 1:
        raise UserError("--untie, --tie and --add-modality make different models: one at a time")
    if args.from_hf and (args.model_tag or args.step is not None or args.era):
        raise UserError("--from-hf names the model: drop --model-tag, --step and --era")
    return args


def main(argv: list[str] | None = None) -> str:
    """Convert; returns the new tag."""
    args = parse(argv)
    changes = args.add_modality or args.untie or args.tie
    source = (
        conversion.open_hugging_face(args.from_hf)
        if args.from_hf
        else conversion.open_source(args.model_tag, args.step, args.era, with_optimizer=not changes)
    )
    before = conversion.settings_for(source.config, source.metadata.get("settings"))
    if args.add_modality:
        return add_modality(args, source, before)
    if args.untie or args.tie:
        return retie(args, source, before)
    if not source.foreign:
        raise UserError(f"{source.name} is in our format already: say what to do, --untie, --tie or --add-modality")
    return rewrite(args, source, before)


def rewrite(args: argparse.Namespace, source: Source, settings: Settings) -> str:
    """The same model in our format."""
    tag = args.output_tag or f"{source.name}-converted"
    folder = conversion.write(source, tag, source.step, source.config, source.state, settings, source.optimizer_state)
    state = "with" if source.optimizer_state else "without"
    tokenizer = "" if source.tokenizer else ", and without a tokenizer"
    exact = "bit for bit, NaN and infinite values too" if describe_nonfinite(source.state) else "bit for bit"
    logger.info(f"{folder}: {format_parameters(source.state)}, {exact}, {state} its optimizer state{tokenizer}")
    log_how_to_train(tag)
    return tag


def retie(args: argparse.Namespace, source: Source, before: Settings) -> str:
    """The model tied or untied, and what that costs in loss."""
    if source.config.tie_weights == bool(args.tie):
        raise UserError(f"{source.name} is {'tied' if args.tie else 'untied'} already")
    loss = conversion.held_out_loss(source, before, args.data)
    if args.tie:
        config, state = conversion.tied_source(source, loss, None if args.tie is True else args.tie)
    else:
        config, state = conversion.untied_source(source, loss)
    after = conversion.settings_for(config, as_dict(before))
    tag = args.output_tag or f"{source.name}-{'tied' if args.tie else 'untied'}"
    folder = conversion.write(source, tag, 0, config, state, after)
    logger.info(f"{folder}: {format_parameters(state)}, {format_parameters(source.state)} before")
    log_how_to_train(tag)
    return tag


def add_modality(args: argparse.Namespace, source: Source, before: Settings) -> str:
    """A model of one more modality, that gives the same text the same logits."""
    tokenizer = source.tokenizer
    if tokenizer is None:
        raise UserError(f"{source.name} holds no tokenizer, whose reserved ids start a modality")
    if "audio" in before.modality_codes() and args.codebooks not in (1, before.codebooks):
        raise UserError(f"--codebooks={args.codebooks}: the model's audio has {before.codebooks}")
    untie = args.untie or (before.untie if before.modalities else "mlp")
    if args.expert_dim and (untie == "none" or (before.modalities and args.expert_dim != before.expert_dim)):
        there = "no experts" if untie == "none" else f"experts of width {before.expert_dim or before.n_embd}"
        raise UserError(f"--expert-dim={args.expert_dim}: the model has {there}; one width serves all modalities")
    after = dataclasses.replace(
        before,
        modalities=", ".join(filter(None, [before.modalities, args.add_modality])),
        untie=untie,
        codebooks=before.codebooks if "audio" in before.modality_codes() else args.codebooks,
        expert_dim=before.expert_dim if before.modalities else args.expert_dim,
        model_tag=None,
        output_layers=args.output_layers or (before.output_layers if before.modalities else "separate"),
    )
    new = modalities_of(after, tokenizer.vocab_size)[len(source.config.modalities) :]
    for modality in new:
        if "<|reserved_" not in (token := tokenizer.decode([modality.start])):
            raise UserError(
                f"tokenizer {tokenizer.name} has {token} at id {modality.start}, no reserved id: it cannot grow"
            )
    config = grown_config(source.config, new, args.untie, args.output_layers)
    state = grow(source.state, config, args.seed, not args.fresh_experts, before.tied_init_std)
    tag = args.output_tag or "-".join([source.name, *(m.name for m in new)])
    if not before.modalities and "audio" in after.modality_codes():  # its text goes on beside the sounds
        after = dataclasses.replace(after, data="synth", text_data=before.data, data_limit=None)
    written = conversion.write(source, tag, 0, config, state, after)
    logger.info(f"{written}: {format_parameters(state)}, {', '.join(m.name for m in new)} added")
    if "audio" in after.modality_codes():
        text = after.text_data or "no"
        logger.info(f"train it on {after.data} ({text} text beside it), or on --data=FOLDER of your own")
    else:
        logger.info("it has no sounds to learn from: give audio too, or bring data of your own")
    log_how_to_train(tag)
    return tag


def format_parameters(state: State) -> str:
    return f"{sum(tensor.numel() for tensor in state.values()):,} parameters"


def log_how_to_train(tag: str) -> None:
    logger.info(f"  python -m scripts.base_train {checkpoints_dir() / tag / 'config.py'} --model_tag={tag}-trained")


if __name__ == "__main__":
    run_script(main)
