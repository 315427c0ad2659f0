"""Does generated sound do what its caption says? python -m scripts.audio_eval [--model-tag d4-tied-audio] [--num 240]

Generates a sound for held-out captions, listens with signal processing, and prints three rows: real clips through the
codec (the ceiling), generated, generated against other clips' captions (the floor); for combinations of note and
instrument that the training had, and for those that it never had. Writes base_dir()/audio/<tag>/listen.html and
base_dir()/audio_eval/<tag>_<step>.json. Sounds without attributes are compared as a whole.
"""

import argparse

from nanochat.audio import adherence as audio_eval
from nanochat.audio.evaluation import check_writable_results, evaluate_sounds
from nanochat.audio.generation import add_sampling, open_audio_model
from nanochat.checkpoint_manager import check_codec
from nanochat.config.command_line import Parser, number
from nanochat.data_pipeline import open_trained_data
from nanochat.evaluation.suite import settings_of, warn_of_other_data
from nanochat.runtime import init_compute, run_script


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser("scripts.audio_eval", __doc__)
    parser.add_argument(
        "--num", type=number(int, 2), default=240, help="sounds to generate, half of them of unseen combinations"
    )
    add_sampling(parser)
    return parser.parse(argv)


def main(argv: list[str] | None = None) -> dict:
    """Generate, measure, write page and figures; returns the figures."""
    args = parse(argv)
    audio_eval.import_librosa()  # now, and not when the sounds are made
    compute = init_compute(args.device_type, None, args.seed)
    model, tokenizer, codec, metadata, folder = open_audio_model(args.model_tag, args.step, compute.device)
    result = {"model_tag": folder.parent.name, "step": metadata["step"]}
    check_writable_results(result, "audio_eval", "audio")
    dataset = open_trained_data(settings_of(metadata), metadata.get("data_fingerprint"))
    check_codec(dataset, metadata, folder)
    warn_of_other_data(dataset, metadata.get("data_fingerprint"))
    return evaluate_sounds(model, tokenizer, codec, dataset, args, result)


if __name__ == "__main__":
    run_script(main)
