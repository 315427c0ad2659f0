"""Sources of documents: every source becomes parquet shards with a `text` column and a manifest.

`prepare` reads the standard library, the installed packages, files and folders, a dataset of the Hugging Face hub, or
climbmix, and leaves base_dir()/data/<source>/ with shard_00000.parquet ... (training), val_00000.parquet ... (held
out; climbmix keeps the hub's names) and manifest.json. Captioned sounds have their codes in a further column. A folder
without a manifest does not count: everything is written under a temporary name and renamed when whole. A source whose
content changed is prepared into a new folder.

Held out is a document when int(sha256(name), 16) % 10 == 0: the relative posix path of a file, or "path#row" for a
block of a single text file, a line of jsonl, a row of parquet or of a hub dataset. Of climbmix it is the last shard, of
a dataset with a validation or test part that part. Where names hold out too much or too little, bytes decide (splits).
"""

import itertools
import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from nanochat.data.encodings import Corrupt
from nanochat.data.text_files import io_errors_as_corrupt, open_parquet
from nanochat.files import sha256_of
from nanochat.system.environment import UserError, base_dir

logger = logging.getLogger(__name__)

SPLITS = ("train", "val")


# ---------------------------------------------------------------------------------------------------------------------
# the prepared dataset


class Document(NamedTuple):
    """What a source yields; sources of text yield the first two alone.

    codes: int [T, Q] of a captioned sound, attributes: what is known of it, split: None for the rule of held_out.
    """

    name: str
    text: str | bytes
    codes: np.ndarray | None = None
    attributes: dict | None = None
    split: str | None = None


@dataclass
class Dataset:
    """Parquet shards on disk with their manifest.

    manifest keys: name, source, licence, fingerprint, left_out (reason -> count) and files, one entry a shard:
    name, split, size (bytes on disk), sha256 (of the file), documents, text_bytes (UTF-8), text_sha256. An unusual
    split is described in split_rule, held-out documents equal to training ones are counted in held_out_copies. With
    sounds it has codec, altered (kind -> count), and an entry clips, unseen, caption_bytes, codes and codes_sha256.
    """

    directory: Path
    manifest: dict
    skip_corrupt: bool = False
    skipped: dict[str, str] = field(default_factory=dict)  # shard name -> reason

    @property
    def name(self) -> str:
        return self.manifest["name"]

    @property
    def fingerprint(self) -> dict:
        """source, version, files, bytes (of text) and sha256 (of names and texts): equal for equal documents."""
        return self.manifest["fingerprint"]

    @property
    def codec(self) -> dict | None:
        """name, hash, codebooks (Q), codes (K), frame_rate, sample_rate (Hz) and directory; None without sounds."""
        codec = self.manifest.get("codec")
        return codec and codec | {"directory": str(base_dir() / codec["directory"])}

    def entries(self, split: str) -> list[dict]:
        """The manifest's entries of one split, without shards known to be damaged; Corrupt names a damaged one."""
        assert split in SPLITS, split
        for entry in self.manifest["files"]:
            if entry["split"] == split and entry["name"] not in self.skipped:
                path = self.directory / entry["name"]
                size = path.stat().st_size if path.is_file() else None
                if size is None:
                    self._damaged(path, "is missing")
                elif size != entry["size"]:
                    self._damaged(path, f"has {size} bytes, the manifest says {entry['size']}")
        return [e for e in self.manifest["files"] if e["split"] == split and e["name"] not in self.skipped]

    def shards(self, split: str) -> list[Path]:
        """Paths of the shards of "train" or "val", in order; sizes are checked."""
        return [self.directory / entry["name"] for entry in self.entries(split)]

    def text_bytes(self, split: str) -> int:
        """UTF-8 bytes of the split's documents."""
        return sum(entry["text_bytes"] for entry in self.entries(split))

    def num_documents(self, split: str) -> int:
        return sum(entry["documents"] for entry in self.entries(split))

    def documents(self, split: str) -> Iterator[tuple[str, str]]:
        """(name, text) of every document of a split, in path order."""
        for shard in self.shards(split):
            yield from self.read(shard)

    def documents_at(self, split: str, places: set[int]) -> Iterator[tuple[str, str]]:
        """(name, text) of the documents with these numbers, in path order; the other shards are not read."""
        first = 0
        for entry in self.entries(split):
            if wanted := {place - first for place in places if first <= place < first + entry["documents"]}:
                documents = itertools.islice(self.read(self.directory / entry["name"]), max(wanted) + 1)
                yield from (document for number, document in enumerate(documents) if number in wanted)
            first += entry["documents"]

    def read(self, shard: Path) -> Iterator[tuple[str, str]]:
        """(name, text) of one shard's documents, a row group at a time.

        A corrupt shard raises Corrupt with its name. Under skip_corrupt it is read through first, so that it gives
        all of its documents or none, and is then logged, counted in `skipped` and never read again.
        """
        return self._rows(shard, read_shard)

    def read_clips(self, shard: Path) -> Iterator[tuple[str, str, np.ndarray | None, dict | None]]:
        """(name, text, codes int64 [T, Q], attributes) likewise; codes are None for text, attributes where unknown."""
        return self._rows(shard, lambda shard: read_clips(shard, self.manifest.get("codec")))

    def _rows(self, shard: Path, reader: Callable[[Path], Iterator[tuple]]) -> Iterator[tuple]:
        try:
            if self.skip_corrupt:
                for _ in reader(shard):
                    pass
            yield from reader(shard)
        except Corrupt as error:
            self._damaged(shard, str(error).removeprefix(f"{shard} "))

    def verify(self) -> int:
        """Hash every shard again and return their number; Corrupt names the shards that differ from the manifest."""
        paths = [path for split in SPLITS for path in self.shards(split)]
        recorded = {entry["name"]: entry["sha256"] for entry in self.manifest["files"]}
        for path in paths:
            if sha256_of(path) != recorded[path.name]:
                self._damaged(path, "does not have the sha256 of its manifest")
        return sum(path.name not in self.skipped for path in paths)

    def _damaged(self, path: Path, why: str) -> None:
        if not self.skip_corrupt:
            remedy = f"delete {path if self.manifest['source'] == 'climbmix' else self.directory} and prepare it again"
            raise Corrupt(f"{path} {why}: {remedy}, or skip the shard with --skip_corrupt=True")
        if path.name not in self.skipped:
            self.skipped[path.name] = why
            logger.info(f"data: {path.name} {why}: skipped ({len(self.skipped)} so far)")


def read_shard(shard: Path) -> Iterator[tuple[str, str]]:
    """(name, text) of a parquet shard; without a `name` column documents are called file#row. Corrupt if unreadable."""
    with io_errors_as_corrupt(shard):
        file = open_parquet(shard)
        columns = [column for column in ("name", "text") if column in file.schema_arrow.names]
        row = 0
        for group in range(file.num_row_groups):
            table = file.read_row_group(group, columns=columns)
            texts = table["text"].to_pylist()
            if "name" in columns:
                yield from zip(table["name"].to_pylist(), texts, strict=True)
            else:
                yield from ((f"{shard.name}#{row + i}", text or "") for i, text in enumerate(texts))
            row += len(texts)


def read_clips(shard: Path, codec: dict | None) -> Iterator[tuple[str, str, np.ndarray | None, dict | None]]:
    """(name, text, codes int64 [T, Q] or None, attributes or None) of a shard; Corrupt for codes the codec lacks."""
    if codec is None:
        yield from ((name, text, None, None) for name, text in read_shard(shard))
        return
    with io_errors_as_corrupt(shard):
        file = open_parquet(shard)
        for group in range(file.num_row_groups):
            table = file.read_row_group(group, columns=["name", "text", "codes", "attributes"])
            for name, text, flat, attributes in zip(*table.columns, strict=True):
                codes = _frames(flat.values.to_numpy(), codec, f"{shard} document {name}") if flat.is_valid else None
                yield name.as_py(), text.as_py(), codes, json.loads(attributes.as_py() or "null")


def _frames(codes: np.ndarray, codec: dict, where: str) -> np.ndarray:
    """[T * Q] as int64 [T, Q]; Corrupt unless these are whole frames of legal codes."""
    if codes.size % codec["codebooks"] or not codes.size:
        raise Corrupt(f"{where}: {codes.size} codes are no frames of {codec['codebooks']}")
    if not 0 <= codes.min() <= codes.max() < codec["codes"]:
        raise Corrupt(f"{where}: codes {codes.min()}..{codes.max()} are outside 0..{codec['codes'] - 1}")
    return codes.astype(np.int64).reshape(-1, codec["codebooks"])


# ---------------------------------------------------------------------------------------------------------------------
# files


def read_manifest(directory: Path) -> dict | None:
    """The manifest, or None where there is none that counts."""
    try:
        manifest = json.loads((directory / "manifest.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{directory / 'manifest.json'} cannot be read ({error}): delete {directory}") from error
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), list):
        raise UserError(f"{directory / 'manifest.json'} is not a manifest of ours: delete {directory}")
    return manifest


def format_skipped(counts: dict[str, int]) -> str:
    """' (skipped: 2 empty, 1 hidden)' for counts by reason, in their order; '' where there are none but files."""
    skipped = ", ".join(f"{number} {reason}" for reason, number in sorted(counts.items()) if reason != "files")
    return f" (skipped: {skipped})" if skipped else ""


def describe(dataset: Dataset) -> None:
    """Print source, sizes by split, fingerprint and folder."""
    fingerprint = dataset.fingerprint
    logger.info(f"source       {fingerprint['source']} ({fingerprint['version']}), {fingerprint['files']} files")
    logger.info(f"licence      {dataset.manifest['licence']}")
    for split in SPLITS:
        shards, documents, size = len(dataset.shards(split)), dataset.num_documents(split), dataset.text_bytes(split)
        logger.info(
            f"{split:<12} {documents:>9,} documents {size / 1e6:>10.2f} MB in {shards} shard{'s' * (shards != 1)}"
        )
    for reason, count in (dataset.manifest["left_out"] | {"corrupt shards": len(dataset.skipped)}).items():
        if count:
            logger.info(f"skipped      {count:>9,} {reason}")
    logger.info(f"fingerprint  sha256 {fingerprint['sha256']}")
    logger.info(f"folder       {dataset.directory}")
