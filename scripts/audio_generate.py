"""Sound from a caption: python -m scripts.audio_generate --prompt "..." --out x.wav [--num 4] [--seed 0] [--stream]

Several sounds become x-1.wav, x-2.wav, ... --stream writes 16-bit samples to the standard output as they come:
`... --stream | aplay -f S16_LE -r 16000`.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

from nanochat.audio.generation import (
    add_request,
    add_sampling,
    check_out_writable,
    generate_codes,
    open_audio_model,
    stream_sound,
    to_sound,
    write_all,
)
from nanochat.config.command_line import Parser
from nanochat.runtime import init_compute, run_script
from nanochat.system.environment import UserError
from nanochat.system.streams import require_output


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser("scripts.audio_generate", __doc__)
    add_request(parser)
    parser.add_argument("--stream", action="store_true", help="16-bit samples to the standard output as they come")
    add_sampling(parser)
    args = parser.parse(argv)
    if args.stream and args.num > 1:
        raise UserError("--stream plays one sound: leave --num out")
    if args.out is None and not args.stream:
        raise UserError("name a file with --out x.wav, or play with --stream")
    if args.out is not None:
        check_out_writable(args.out, args.num)
    return args


def main(argv: list[str] | None = None) -> list[Path]:
    """Generate; returns the files written."""
    args = parse(argv)
    standard_output = sys.stdout
    if args.stream:
        require_output()
        sys.stdout = sys.stderr  # words must not get among the samples
    try:
        return generate(args, standard_output)
    finally:
        sys.stdout = standard_output


def generate(args: argparse.Namespace, output) -> list[Path]:
    compute = init_compute(args.device_type, None, args.seed)
    model, tokenizer, codec, _, _ = open_audio_model(args.model_tag, args.step, compute.device)
    how = dict(
        frames=args.seconds and max(1, round(args.seconds * codec.frame_rate)),
        seed=args.seed,
        temperature=args.temperature,
        top_k=args.top_k,
    )
    if args.stream:
        pieces = []
        for piece in stream_sound(model, tokenizer, codec, args.prompt, **how):
            pieces.append(piece)
            output.buffer.write((np.clip(piece, -1, 1) * 32767).astype("<i2").tobytes())
            output.buffer.flush()
        sounds = [np.concatenate([*pieces, np.zeros(0, np.float32)])]
    else:
        sounds = to_sound(codec, generate_codes(model, tokenizer, [args.prompt] * args.num, **how))
    return write_all(args.out, sounds, codec.sample_rate) if args.out else []


if __name__ == "__main__":
    run_script(main)
