"""Sound from a caption, by a model with adapters: python -m scripts.adapter_generate --prompt "..." --out x.wav

--guidance 3 takes the caption three times as seriously (it wants a training with --caption_dropout). --text continues
the prompt in words instead, which are the host's unless its output or weights were trained. --host and --musicgen say
where these lie, if not where they lay in training.
"""

import argparse

import torch

from nanochat.adapters.checkpoint import add_adapter_flags, open_adapters
from nanochat.audio.generation import add_request, check_out_writable, generate_codes, to_sound, write_all
from nanochat.config.command_line import Parser, number
from nanochat.engine import generate
from nanochat.runtime import init_compute, run_script
from nanochat.system.environment import UserError
from nanochat.system.streams import require_output


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser("scripts.adapter_generate", __doc__)
    add_request(parser)
    parser.add_argument("--text", action="store_true", help="continue the prompt in words")
    parser.add_argument("--max-tokens", type=number(int, 1), default=64, help="the most words with --text, in tokens")
    add_adapter_flags(parser)
    args = parser.parse(argv)
    if args.text == (args.out is not None):
        raise UserError("name a file with --out x.wav for sound, or --text for words: one of the two")
    if args.out is not None:
        check_out_writable(args.out, args.num)
    return args


def main(argv: list[str] | None = None) -> list:
    """Generate; returns the files written, or the words."""
    args = parse(argv)
    compute = init_compute(args.device_type, None, args.seed)
    model, codec, _, _, _ = open_adapters(args.model_tag, args.step, compute.device, args.host, args.musicgen)
    tokenizer = model.host.tokenizer
    kwargs = dict(seed=args.seed, temperature=args.temperature, top_k=args.top_k)
    if args.text:
        require_output()
        ids = tokenizer.encode(args.prompt, bos=True)
        if len(ids) + args.max_tokens > (room := model.host.context):
            raise UserError(
                f"--max-tokens={args.max_tokens} behind a prompt of {len(ids)} is beyond the {room} positions that the "
                f"host knows: {room - len(ids)} or fewer"
            )
        found = generate(model, ids, args.max_tokens, num_samples=args.num, stop=model.host.stop, **kwargs)
        words = [tokenizer.decode(one) for one in found]
        print("\n".join(words))
        return words
    frames = args.seconds and max(1, round(args.seconds * codec.frame_rate))
    with torch.inference_mode():
        prompts = [args.prompt] * args.num
        codes = generate_codes(model, tokenizer, prompts, frames=frames, guidance=args.guidance, **kwargs)
    return write_all(args.out, to_sound(codec, codes), codec.sample_rate)


if __name__ == "__main__":
    run_script(main)
