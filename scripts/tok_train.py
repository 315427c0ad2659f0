"""Train the tokenizer that a configuration asks for: python -m scripts.tok_train [config.py] [--key=value ...]"""

import logging

from nanochat.config.config_file import find_no_effect, from_command_line
from nanochat.data.tokenizer import Tokenizer, measure_bytes_per_token, read_held_out_text
from nanochat.data_pipeline import find_or_train, prepare_for
from nanochat.runtime import run_script

logger = logging.getLogger("nanochat")


def main(argv: list[str] | None = None) -> Tokenizer:
    """Prepare the data, train on its train split (or find what an earlier call trained), and say what came of it."""
    usage = "python -m scripts.tok_train [config.py] [--key=value ...]"
    line = from_command_line(argv, switches=(), usage=usage)
    settings = line.settings
    for note in find_no_effect(line):
        logger.info(note)
    dataset = prepare_for(settings)
    tokenizer = find_or_train(settings, dataset)
    rate = measure_bytes_per_token(tokenizer.encode_batch, read_held_out_text(dataset))
    logger.info(f"tokenizer {tokenizer.name}: {tokenizer.vocab_size} ids, hash {tokenizer.hash}")
    logger.info(f"{rate:.3f} bytes per token on held-out text of {dataset.name}")
    return tokenizer


if __name__ == "__main__":
    run_script(main)
