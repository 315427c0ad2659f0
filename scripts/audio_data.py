"""Captioned sounds to codes: python -m scripts.audio_data --modalities=audio:2048 --data=SOURCE [--codec=KIND ...]

SOURCE is synth, hf:<dataset> or a folder of sounds with captions. Fits or opens the codec, encodes every sound, mixes
in the documents of --text_data, and prints what the dataset holds. --caption-from-names takes the files' names as
captions, as --data_column=file_name does here and in training. --adapters: the config.py and flags are those of
scripts.adapter_train.
"""

import dataclasses
import logging
import math
import sys

from nanochat.audio.dataset import BYTES_PER_POSITION
from nanochat.audio.sources import FROM_NAMES
from nanochat.config.adapter_settings import AdapterSettings
from nanochat.config.config_file import find_no_effect, from_command_line
from nanochat.config.settings import Settings
from nanochat.data.dataset import SPLITS, Dataset, describe
from nanochat.data_pipeline import prepare_for
from nanochat.runtime import run_script
from nanochat.system.environment import UserError

logger = logging.getLogger("nanochat")


def main(argv: list[str] | None = None) -> Dataset:
    """Prepare and describe the dataset of sounds that the command line names; returns it."""
    words = sys.argv[1:] if argv is None else argv
    line = from_command_line(
        words,
        switches=("caption_from_names", "adapters"),
        usage="python -m scripts.audio_data [config.py]",
        kind=AdapterSettings if "--adapters" in words else Settings,
    )
    settings = line.settings
    if "audio" not in settings.modality_codes():
        raise UserError(f"modalities={settings.modalities!r} names no audio: set --modalities=audio:2048, say")
    if "caption_from_names" in line.switches:
        settings = dataclasses.replace(settings, data_column=FROM_NAMES)
        logger.info(f"data: to train on these sounds as well, set data_column={FROM_NAMES!r}")
    for note in find_no_effect(line):
        logger.info(note)
    dataset = prepare_for(settings)
    describe(dataset)
    describe_sounds(dataset)
    return dataset


def describe_sounds(dataset: Dataset) -> None:
    """Print codec and rate, and for each split clips, seconds, codes and the share of text among the positions."""
    codec = dataset.codec
    bits = codec["frame_rate"] * codec["codebooks"] * math.log2(codec["codes"])
    logger.info(
        f"codec        {codec['name']} {codec['codebooks']} x {codec['codes']} at {codec['sample_rate']} Hz, "
        f"{codec['frame_rate']:g} frames/s, {bits:.0f} bit/s: {codec['directory']}"
    )
    for split in SPLITS:
        total = {
            key: sum(entry[key] for entry in dataset.entries(split))
            for key in ("clips", "unseen", "codes", "caption_bytes", "text_bytes")
        }
        seconds = total["codes"] / codec["codebooks"] / codec["frame_rate"]
        unseen = f" ({total['unseen']} of unseen pairs)" if total["unseen"] else ""
        logger.info(f"{split:<12} {total['clips']:>9,} clips{unseen} {seconds:>10.1f} s {total['codes']:>12,} codes")
        text = total["text_bytes"] - total["caption_bytes"]
        share = text / (total["text_bytes"] + BYTES_PER_POSITION * total["codes"])
        taken = f"{BYTES_PER_POSITION} bytes taken for one, as one code is"
        logger.info(f"{'':<12} {text:>9,} bytes of text alone, {share:.3f} of the positions ({taken})")
    for kind, count in dataset.manifest["altered"].items():
        logger.info(f"altered      {count:>9,} {kind}")


if __name__ == "__main__":
    run_script(main)
