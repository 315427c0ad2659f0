"""Sound from a caption: python -m scripts.audio_generate --prompt "..." --out x.wav [--num 4] [--seed 0] [--stream]

Several sounds become x-1.wav, x-2.wav, ... --stream writes 16-bit samples to the standard output as they come:
`... --stream | aplay -f S16_LE -r 16000`.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

from nanochat.audio_generation import generate_codes, open_audio_model, stream_sound, to_sound
from nanochat.listen_page import write_wav
from nanochat.runtime import UserError, init_compute, run_script


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.audio_generate", description=__doc__.split("\n")[0], allow_abbrev=False
    )
    parser.add_argument("--prompt", required=True, help="the caption")
    parser.add_argument("--out", type=Path, help="wav file to write (needed without --stream)")
    parser.add_argument("--num", type=int, default=1, help="how many sounds")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same sounds")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest code each time")
    parser.add_argument("--top-k", type=int, help="draw among the k likeliest codes")
    parser.add_argument("--seconds", type=float, help="the longest sound (default: what the context has room for)")
    parser.add_argument("--model-tag", help="folder under base_checkpoints (default: the newest)")
    parser.add_argument("--step", type=int, help="step to take (default: the newest whole one)")
    parser.add_argument("--device-type", help="cpu, cuda or mps (default: the best one here)")
    parser.add_argument("--stream", action="store_true", help="16-bit samples to the standard output as they come")

    def refuse(message: str):
        raise UserError(f"{message} (see --help)")

    parser.error = refuse
    args = parser.parse_args(argv)
    for name, least in (("num", 1), ("seed", 0), ("temperature", 0), ("top_k", 1), ("seconds", 0.02), ("step", 0)):
        value = getattr(args, name)
        if value is not None and not least <= value < 1e9:
            raise UserError(f"--{name.replace('_', '-')}={value} must be at least {least}")
    if args.stream and args.num > 1:
        raise UserError("--stream plays one sound: leave --num out")
    if args.out is None and not args.stream:
        raise UserError("name a file with --out x.wav, or play with --stream")
    if args.out is not None and args.out.suffix.lower() != ".wav":
        raise UserError(f"--out={args.out}: only .wav files are written")
    return args


def main(argv: list[str] | None = None) -> list[Path]:
    """Generate; returns the files written."""
    args = parse(argv)
    standard_output = sys.stdout
    if args.stream:
        sys.stdout = sys.stderr  # words must not get among the samples
    try:
        return generate(args, standard_output)
    finally:
        sys.stdout = standard_output


def generate(args: argparse.Namespace, output) -> list[Path]:
    compute = init_compute(args.device_type, None, args.seed)
    model, tokenizer, codec, _, _ = open_audio_model(args.model_tag, args.step, compute.device)
    how = dict(
        frames=args.seconds and max(1, round(args.seconds * codec.frame_rate)), seed=args.seed,
        temperature=args.temperature, top_k=args.top_k,
    )  # fmt: skip
    if args.stream:
        pieces = []
        for piece in stream_sound(model, tokenizer, codec, args.prompt, **how):
            pieces.append(piece)
            output.buffer.write((np.clip(piece, -1, 1) * 32767).astype("<i2").tobytes())
            output.buffer.flush()
        sounds = [np.concatenate([*pieces, np.zeros(0, np.float32)])]
    else:
        sounds = to_sound(codec, generate_codes(model, tokenizer, [args.prompt] * args.num, **how))
    paths = []
    for number, wav in enumerate(sounds if args.out else [], 1):
        path = args.out if args.num == 1 else args.out.with_name(f"{args.out.stem}-{number}{args.out.suffix}")
        write_wav(path, wav, codec.sample_rate)
        print(f"{path}: {len(wav) / codec.sample_rate:.2f} s")
        paths.append(path)
    return paths


if __name__ == "__main__":
    run_script(main)
