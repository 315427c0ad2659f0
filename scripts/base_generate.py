"""Text from a prompt: python -m scripts.base_generate --prompt "def main(" [--num 3] [--max-tokens 500] [--compile]

A single continuation is printed as it comes, with nothing else on the standard output. The same seed gives the same
text. --compile makes tokens come faster (a single row on a CPU: three times), after seconds of compiling.
"""

import argparse
import codecs
import contextlib
import logging
import sys

import torch

from nanochat.checkpoint_manager import load_model
from nanochat.config.command_line import Parser, number, prompt, seed, temperature
from nanochat.engine import decode, generate
from nanochat.evaluation.report import printable
from nanochat.runtime import init_compute, pick_dtype, run_script
from nanochat.system.environment import UserError
from nanochat.system.streams import require_output

logger = logging.getLogger("nanochat")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser("scripts.base_generate", __doc__)
    parser.add_argument("--prompt", type=prompt, default="", help="what the text begins with (default: nothing)")
    parser.add_argument("--max-tokens", type=number(int, 1), default=256, help="the longest continuation")
    parser.add_argument("--num", type=number(int, 1), default=1, help="how many continuations")
    parser.add_argument("--compile", action="store_true", help="compile the step: for thousands of tokens")
    parser.add_argument("--seed", type=seed, default=0, help="the same seed gives the same text")
    parser.add_argument("--temperature", type=temperature, default=0.8, help="0 takes the likeliest token each time")
    parser.add_argument(
        "--top-k", type=number(int, 1, off="among all"), default=50, help="draw among the k likeliest tokens; None: all"
    )
    parser.add_argument("--model-tag", help="folder of the checkpoints, or a path with a slash (default: the newest)")
    parser.add_argument("--step", type=number(int, 0), help="step to take (default: the newest complete one)")
    parser.add_argument("--device-type", help="cpu, cuda or mps (default: the best one here)")
    parser.add_argument("--era", help="of nanochat's own files, as 2026-03-02, where they do not tell it")
    return parser.parse(argv)


def main(argv: list[str] | None = None) -> list[str]:
    """Generate and print; returns the continuations."""
    args = parse(argv)
    require_output()
    compute = init_compute(args.device_type, None, args.seed)
    with contextlib.redirect_stdout(sys.stderr):
        model, tokenizer, metadata = load_model("base", compute.device, "eval", args.model_tag, args.step, args.era)
    if tokenizer is None:
        raise UserError("the checkpoint holds no tokenizer: a prompt cannot be read")
    if tokenizer.vocab_size != model.config.vocab_size:
        raise UserError(f"the tokenizer has {tokenizer.vocab_size} ids, the model {model.config.vocab_size}")
    model.compute_dtype = pick_dtype((metadata.get("settings") or {}).get("dtype"), compute.device_type)
    ids = tokenizer.encode(args.prompt, bos=True)
    room = model.rotary_length - len(ids)
    if room < 1:
        raise UserError(f"--prompt is {len(ids)} tokens long, the rotary table {model.rotary_length}: shorten it")
    if args.max_tokens > room:
        raise UserError(
            f"--max-tokens={args.max_tokens} behind a prompt of {len(ids)} tokens is beyond the {model.rotary_length} "
            f"positions of the rotary table: {room} or fewer"
        )
    if len(ids) + args.max_tokens > model.config.sequence_len:
        logger.info(f"longer than the {model.config.sequence_len} tokens that the model has ever seen together")
    stop = (tokenizer.bos_id, *(m.start for m in model.config.modalities))
    kwargs = dict(temperature=args.temperature, top_k=args.top_k, seed=args.seed, compiled=args.compile)
    if args.num > 1:
        found = generate(model, ids, args.max_tokens, num_samples=args.num, stop=stop, **kwargs)
        texts = [tokenizer.decode(one) for one in found]
        for number_, text in enumerate(texts, 1):
            print(printable(f"--- {number_}\n{args.prompt}{text}"))
        return texts
    print(printable(args.prompt), end="", flush=True)
    pieces, characters = [], codecs.getincrementaldecoder("utf-8")("replace")  # a character may take several tokens
    for tokens in decode(model, torch.tensor([ids]), args.max_tokens, **kwargs):
        if (token := int(tokens[0])) in stop:
            break
        pieces.append(characters.decode(tokenizer.bytes_of(token)))
        print(printable(pieces[-1]), end="", flush=True)
    pieces.append(characters.decode(b"", final=True))
    print(printable(pieces[-1]))
    return ["".join(pieces)]


if __name__ == "__main__":
    run_script(main)
