"""Prepare the data of a run: python -m scripts.data [config.py] [--data=SOURCE ...] [--verify]

Makes base_dir()/data/<source>/ (parquet shards and a manifest) unless it is there, and prints what it holds.
--verify reads every shard again and compares its sha256 with the manifest.
"""

import logging

from nanochat.config.config_file import find_no_effect, from_command_line
from nanochat.data.dataset import Dataset, describe
from nanochat.data_pipeline import prepare_for
from nanochat.runtime import run_script

logger = logging.getLogger("nanochat")


def main(argv: list[str] | None = None) -> Dataset:
    """Prepare and describe the dataset of the settings on the command line; returns it."""
    line = from_command_line(argv, switches=("verify",), usage="python -m scripts.data [config.py]")
    for note in find_no_effect(line):
        logger.info(note)
    dataset = prepare_for(line.settings)
    if "verify" in line.switches:
        logger.info(f"data: sha256 of {dataset.verify()} shards compared with the manifest")
    describe(dataset)
    return dataset


if __name__ == "__main__":
    run_script(main)
