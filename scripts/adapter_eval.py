"""What adapters have learnt: python -m scripts.adapter_eval [--model-tag llama-3.2-1b-musicgen-small] [--num 200]

Prints the held-out loss over codes beside baselines that need no model, the host's text loss now and before the
training, and, as scripts.audio_eval, whether generated sounds do what their captions say, beside shuffled captions.
Writes base_dir()/adapter_eval/<tag>_<step>.json and base_dir()/adapter_audio/<tag>/listen.html.
"""

import argparse
import logging

from nanochat.adapters.checkpoint import add_adapter_flags, open_adapters
from nanochat.adapters.model import FrozenHostBaseline
from nanochat.adapters.text_loss import make_text_loss
from nanochat.audio.adherence import import_librosa
from nanochat.audio.evaluation import check_writable_results, evaluate_sounds, write_result
from nanochat.audio.loss import evaluate_audio
from nanochat.checkpoint_manager import check_codec
from nanochat.config.command_line import Parser, number
from nanochat.data_pipeline import open_trained_data
from nanochat.evaluation.suite import warn_of_other_data
from nanochat.runtime import init_compute, run_script

logger = logging.getLogger("nanochat")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser("scripts.adapter_eval", __doc__)
    parser.add_argument(
        "--num", type=number(int, 2), default=200, help="sounds to generate, half of them of unseen combinations"
    )
    add_adapter_flags(parser)
    return parser.parse(argv)


def main(argv: list[str] | None = None) -> dict:
    """Measure; returns what is written."""
    args = parse(argv)
    import_librosa()  # now, and not when the sounds are made
    compute = init_compute(args.device_type, None, args.seed)
    model, codec, metadata, settings, folder = open_adapters(
        args.model_tag, args.step, compute.device, args.host, args.musicgen
    )
    tokenizer = model.host.tokenizer
    result = dict(model_tag=folder.parent.name, step=metadata["step"], guidance=args.guidance)
    check_writable_results(result, "adapter_eval", "adapter_audio")
    dataset = open_trained_data(settings, metadata.get("data_fingerprint"))
    check_codec(dataset, metadata, folder)
    warn_of_other_data(dataset, metadata.get("data_fingerprint"))
    loss = evaluate_audio(model, tokenizer, dataset, rows=settings.device_batch_size)
    logger.info(
        f"held-out audio loss {loss['nats']:.4f} nats per code ({loss['bits_per_second']:.0f} bit/s) on "
        f"{loss['clips']} sounds; {', '.join(f'{name} {nats:.4f}' for name, nats in loss['baselines'].items())}"
    )
    measure, _ = make_text_loss(settings, model, compute, metadata.get("text_fingerprint"))
    after = measure(model) if measure else None
    # By this device and dtype, where the host is still there as it was.
    before = metadata["run"].get("text_before")
    if measure and not model.config.trains_host:
        before = measure(FrozenHostBaseline(model))
    if measure and before is not None:
        message = "the same to the last bit" if after == before else f"{after - before:+.4f}"
        logger.info(f"the host's text loss {after:.6f} nats per token, {before:.6f} before the training: {message}")
    result |= dict(loss=loss, text=dict(before=before, after=after))
    write_result(result, "adapter_eval")
    return evaluate_sounds(
        model, tokenizer, codec, dataset, args, result, "adapter_eval", "adapter_audio", args.guidance
    )


if __name__ == "__main__":
    run_script(main)
