"""Prepare the data of a run: python -m scripts.data [config.py] [--data=SOURCE ...] [--verify]

Makes base_dir()/data/<source>/ (parquet shards and a manifest) unless it is there, and prints what it holds.
--verify reads every shard again and compares its sha256 with the manifest.
"""

from nanochat.config_file import find_no_effect, from_command_line
from nanochat.dataset import SPLITS, Dataset, prepare_for
from nanochat.runtime import print0, run_script


def main(argv: list[str] | None = None) -> Dataset:
    """Prepare and describe the dataset of the settings on the command line; returns it."""
    line = from_command_line(argv, switches=("verify",), usage="python -m scripts.data [config.py]")
    for note in find_no_effect(line):
        print0(note)
    dataset = prepare_for(line.settings, say=print0)
    if "verify" in line.switches:
        print0(f"data: sha256 of {dataset.verify()} shards compared with the manifest")
    describe(dataset)
    return dataset


def describe(dataset: Dataset) -> None:
    """Print source, sizes by split, fingerprint and folder."""
    fingerprint = dataset.fingerprint
    print0(f"source       {fingerprint['source']} ({fingerprint['version']}), {fingerprint['files']} files")
    print0(f"licence      {dataset.manifest['licence']}")
    for split in SPLITS:
        shards, documents, size = len(dataset.shards(split)), dataset.num_documents(split), dataset.text_bytes(split)
        print0(f"{split:<12} {documents:>9,} documents {size / 1e6:>10.2f} MB in {shards} shard{'s' * (shards != 1)}")
    for reason, count in (dataset.manifest["left_out"] | {"corrupt shards": len(dataset.skipped)}).items():
        if count:
            print0(f"left out     {count:>9,} {reason}")
    print0(f"fingerprint  sha256 {fingerprint['sha256']}")
    print0(f"folder       {dataset.directory}")


if __name__ == "__main__":
    run_script(main)
