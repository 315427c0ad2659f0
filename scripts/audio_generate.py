"""Sound from a caption: python -m scripts.audio_generate --prompt "..." --out x.wav [--num 4] [--seed 0] [--stream]

Several sounds become x-1.wav, x-2.wav, ... --stream writes 16-bit samples to the standard output as they come:
`... --stream | aplay -f S16_LE -r 16000`.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

from nanochat.arguments import Parser, number, prompt, seed, temperature
from nanochat.audio_generation import generate_codes, open_audio_model, stream_sound, to_sound
from nanochat.listen_page import write_wav
from nanochat.runtime import UserError, check_output, init_compute, run_script
from nanochat.streams import require_output


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
        check_out(args.out, args.num)
    return args


def add_request(parser: Parser) -> None:
    """The flags that say which sounds, and where to."""
    parser.add_argument("--prompt", type=prompt, required=True, help="the caption")
    parser.add_argument("--out", type=Path, help="wav file to write")
    parser.add_argument("--num", type=number(int, 1), default=1, help="how many sounds")
    parser.add_argument(
        "--seconds", type=number(float, 0.02), help="the longest sound (default: what the context holds)"
    )


def check_out(out: Path, num: int) -> None:
    """UserError where not all of num sounds can be written, now and not when they are made."""
    for path in output_paths(out, num):
        check_output(path, "--out", suffix=".wav")


def output_paths(out: Path, num: int) -> list[Path]:
    """x.wav, or x-1.wav, x-2.wav, ... for several sounds."""
    return [out] if num == 1 else [out.with_name(f"{out.stem}-{place}{out.suffix}") for place in range(1, num + 1)]


def add_sampling(parser: Parser) -> None:
    """The flags that choose a checkpoint and how to draw from it."""
    parser.add_argument("--seed", type=seed, default=0, help="the same seed gives the same sounds")
    parser.add_argument("--temperature", type=temperature, default=0.8, help="0 takes the likeliest code each time")
    parser.add_argument(
        "--top-k", type=number(int, 1, off="among all"), help="draw among the k likeliest codes (default: None, all)"
    )
    parser.add_argument("--model-tag", help="folder of the checkpoints (default: the newest)")
    parser.add_argument("--step", type=number(int, 0), help="step to take (default: the newest whole one)")
    parser.add_argument("--device-type", help="cpu, cuda or mps (default: the best one here)")


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
    return write_all(args.out, sounds, codec.sample_rate) if args.out else []


def write_all(out: Path, sounds: list[np.ndarray], sample_rate: int) -> list[Path]:
    """Write x.wav, or x-1.wav, x-2.wav, ...; returns the files."""
    paths = output_paths(out, len(sounds))
    for path, wav in zip(paths, sounds, strict=True):
        write_wav(path, wav, sample_rate)
        print(f"{path}: {len(wav) / sample_rate:.2f} s, {len(wav)} samples")
    return paths


if __name__ == "__main__":
    run_script(main)
