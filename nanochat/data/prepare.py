"""Sources become shards: documents split, written, counted and described by a manifest."""

import hashlib
import json
import logging
import os
import re
import tempfile
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from nanochat.data import hub
from nanochat.data import local_sources as sources
from nanochat.data.dataset import SPLITS, Dataset, Document, format_skipped, read_clips, read_manifest, read_shard
from nanochat.data.encodings import Undecodable, check_encodable, decode_text
from nanochat.data.folders import NAMED, escape_control
from nanochat.data.local_sources import Source, digest
from nanochat.data.splits import is_held_out, is_sane, split_by_bytes
from nanochat.files import commit_folder, sha256_of, write_atomically
from nanochat.system.environment import UserError, base_dir
from nanochat.system.temporary import file_lock, remove_abandoned, scratch_folder

logger = logging.getLogger(__name__)

SHARD_BYTES = 16_000_000  # text of one shard: enough to compress and to shuffle in, small enough to hold in memory


COPIES = "held-out equal to a training document"


FORMAT = 1  # part of the state: raise it when the same source would give other documents


CLIMBMIX_LAST = 6542  # the last shard, the one held out


CLIMBMIX_SHARDS = 8  # training shards when no limit is given: about 0.7 GB to download, 2 GB of text


def prepare(
    source: str, *, workers: int = 4, skip_corrupt: bool = False, limit: int | None = None, **options
) -> Dataset:
    """Make base_dir()/data/<source>/ when it is missing or the source changed; otherwise only open it.

    source: stdlib, packages, climbmix, hf:<dataset>, or the path of a file or folder (.txt .md .py .jsonl .parquet,
    recursively, without hidden ones; without any of those .csv .tsv .json and compressed files).
    limit: climbmix training shards, or hub documents. workers: parallel downloads of climbmix. options: of
    plan_text_source().
    Raises UserError for a missing, empty or too small source, Corrupt for an unreadable one, Unreachable for the hub.
    """
    if source == "climbmix":
        return _climbmix(limit or CLIMBMIX_SHARDS, workers, skip_corrupt)
    return open_or_prepare(plan_text_source(source, skip_corrupt=skip_corrupt, limit=limit, **options), skip_corrupt)


def plan_text_source(
    source: str,
    *,
    column: str = "text",
    split: str = "train",
    config: str | None = None,
    limit: int | None = None,
    skip_corrupt: bool = False,
) -> Source:
    """What prepare() would read; of anything but climbmix. column: of rows. split, config: of a hub dataset."""
    if source == "synth":
        raise UserError("data=synth is captioned sounds: set modalities too, as in --modalities=audio:2048")
    if source.startswith("hf:"):
        return hub.plan_hub_dataset(source.removeprefix("hf:"), column, split, config, limit)
    if source == "stdlib":
        return sources.plan_stdlib()
    if source == "packages":
        return sources.plan_packages()
    return sources.plan_path(source, column, skip_corrupt)


def state_of(source: Source) -> str:
    """What changes when the source's documents may have changed, or this program would read others of it."""
    return digest(json.dumps([FORMAT, source.state]))


def find_version(source: Source, skip_corrupt: bool) -> Dataset | None:
    """The version of a source that was prepared from its present state."""
    for directory, manifest in _list_versions(base_dir() / "data", source.name):
        if manifest["state"] == state_of(source) and codec_is_here(manifest):
            return Dataset(directory, manifest, skip_corrupt)
    return None


def open_or_prepare(source: Source, skip_corrupt: bool) -> Dataset:
    """Open the version of this source that was prepared from this state, or make it."""
    data = base_dir() / "data"
    if found := find_version(source, skip_corrupt):
        _log_split_rule(found.manifest)
        return found
    known = _list_versions(data, source.name)
    why = f"{source.name} changed since it was prepared" if known else f"preparing {source.name}"
    logger.info(f"data: {why}, writing shards")
    with _scratch(data, source.name) as scratch:
        counts: Counter = Counter()
        entries = _write_shards(source, scratch, counts)
        _check_enough(source, entries, counts)
        manifest = {
            "name": source.name,
            "source": source.source,
            "licence": source.licence,
            "fingerprint": _make_fingerprint(source.source, source.version, counts["files"], entries),
            "state": state_of(source),
            "left_out": {reason: n for reason, n in sorted(counts.items()) if reason != "files"},
            **source.manifest,
            "files": entries,
        }
        known = _list_versions(data, source.name)  # again: another process may have been faster
        same = [d for d, m in known if m["fingerprint"]["sha256"] == manifest["fingerprint"]["sha256"]]
        if same:  # touched, not changed
            target, manifest["name"] = same[0], same[0].name
            _write_manifest(target, manifest | {"files": read_manifest(target)["files"]})
        else:
            target = data / source.name
            if target.exists():
                target = data / f"{source.name}-v{manifest['fingerprint']['sha256'][:8]}"
                manifest["name"] = target.name
            _write_manifest(scratch, manifest)
            try:
                commit_folder(scratch, target)
            except OSError:
                if read_manifest(target) is None:  # otherwise another process was faster, with the same documents
                    raise
    manifest = read_manifest(target)
    logger.info(
        f"data: {manifest['fingerprint']['files']} files, {manifest['fingerprint']['bytes'] / 1e6:.2f} MB of text"
        f"{format_skipped(manifest['left_out'])} -> {target}"
    )
    _log_split_rule(manifest)
    return Dataset(target, manifest, skip_corrupt)


def _log_split_rule(manifest: dict) -> None:
    """Say it when the split is not the usual one, by the hash of the documents' names."""
    if rule := manifest.get("split_rule"):
        logger.info(f"data: {manifest['name']}: {rule}")


def codec_is_here(manifest: dict) -> bool:
    return "codec" not in manifest or (base_dir() / manifest["codec"]["directory"]).is_dir()


def _write_shards(source: Source, directory: Path, counts: Counter) -> list[dict]:
    """Write a source's documents as shards in both splits; returns the manifest's entries, train first.

    Text of which names hold out too much or too little is split by bytes instead, which source.manifest then says.
    Held-out documents equal to one of training are dropped or counted as the source wants it.
    """
    order = bytearray()  # 1 for a held-out document: what was written to two splits can be read in the source's order
    hashes = {split: array("Q") for split in SPLITS}
    rules = set()

    def documents() -> Iterator[Document]:
        for document in _decode_documents(source, counts):
            rules.add("own" if document.split else "name")
            split = document.split or ("val" if is_held_out(document.name) else "train")
            order.append(split == "val")
            hashes[split].append(_hash_text(document.text))
            yield document._replace(split=split)

    codec = source.manifest.get("codec")
    entries = _write_documents(documents(), directory, codec)
    sizes = _bytes_by_split(entries)
    if codec or not entries:
        return entries
    if "own" in rules and "split_rule" in source.manifest:
        source.manifest["split_rule"] += f": {sizes['val'] / (sizes['train'] + sizes['val']):.1%} of the bytes"
    elif not is_sane(sizes):
        entries = _split_anew(source, directory, entries, order, hashes)
        source.manifest["split_rule"] = _describe_rule(sizes, _bytes_by_split(entries))
    copies = np.isin(hashes["val"], np.unique(hashes["train"]))
    if copies.any() and source.drop_copies:
        counts[COPIES] += int(copies.sum())
        pairs = zip(_read_back(directory, entries, "val"), copies, strict=True)
        return _rewrite_splits(
            directory, entries, ("val",), (Document(*pair, split="val") for pair, copy in pairs if not copy)
        )
    if copies.any():
        source.manifest["held_out_copies"] = int(copies.sum())
        logger.info(
            f"data: warning: {copies.sum()} of {len(copies)} held-out documents are equal to a training document: "
            "held-out figures are slightly optimistic"
        )
    return entries


def _decode_documents(source: Source, counts: Counter) -> Iterator[Document]:
    """The source's documents as text; those that are no text are named and counted, empty ones counted."""
    for document in source.read(counts):
        document = Document(*document)
        try:
            text = decode_text(document.text) if isinstance(document.text, bytes) else document.text
            check_encodable(text)
        except Undecodable as error:
            counts["undecodable"] += 1
            row = re.fullmatch(r"(.*\.jsonl)#(\d+)", document.name)
            where = escape_control(f"{row[1]} line {int(row[2]) + 1}" if row else document.name)
            if counts["undecodable"] <= NAMED:
                source.undecodable.append(f"{where} is {error}")
                logger.info(f"data: {source.undecodable[-1]}: skipped")
            continue
        if text.strip():
            yield document._replace(text=text)
        else:
            counts["empty"] += 1
    if counts["undecodable"] > NAMED:
        logger.info(f"data: ... and {counts['undecodable'] - NAMED} more documents that are not UTF-8")


def _write_documents(documents: Iterable[Document], directory: Path, codec: dict | None = None) -> list[dict]:
    """Write documents whose split is known as shards of about SHARD_BYTES; returns the manifest's entries."""
    entries: list[dict] = []
    pending: dict[str, list[tuple]] = {split: [] for split in SPLITS}
    sizes = dict.fromkeys(SPLITS, 0)

    def flush(split: str) -> None:
        number = sum(entry["split"] == split for entry in entries)
        path = directory / f"{'shard' if split == 'train' else 'val'}_{number:05d}.parquet"
        names, texts, codes, attributes = zip(*pending[split], strict=True)
        table = pa.table({"name": pa.array(names, pa.string()), "text": pa.array(texts, pa.string())})
        if codec:
            kind = pa.int16() if codec["codes"] <= 2**15 else pa.int32()
            table = table.append_column("codes", pa.array(codes, pa.list_(kind)))
            table = table.append_column("attributes", pa.array(attributes, pa.string()))
        with pa.OSFile(os.fsencode(path), "wb") as file:  # a path need not be UTF-8
            pq.write_table(table, file, compression="zstd", row_group_size=1024, write_page_checksum=True)
        entries.append(_describe_shard(path, split, codec))
        pending[split], sizes[split] = [], 0

    for name, text, codes, attributes, split in documents:
        flat = None if codes is None else np.ascontiguousarray(codes).reshape(-1)
        known = None if attributes is None else json.dumps(attributes)
        pending[split].append((name, text, flat, known))
        sizes[split] += len(text.encode()) + (0 if flat is None else flat.nbytes)
        if sizes[split] >= SHARD_BYTES:
            flush(split)
    for split in SPLITS:
        if pending[split]:
            flush(split)
    return sorted(entries, key=lambda entry: (SPLITS.index(entry["split"]), entry["name"]))


def _bytes_by_split(entries: list[dict]) -> dict[str, int]:
    return {s: sum(entry["text_bytes"] for entry in entries if entry["split"] == s) for s in SPLITS}


def _hash_text(text: str) -> int:
    """64 bits of a text, to find equal ones."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def _describe_rule(by_name: dict[str, int], by_bytes: dict[str, int]) -> str:
    share, new = (sizes["val"] / sum(sizes.values()) for sizes in (by_name, by_bytes))
    return (
        f"the rule by name would hold out {share:.1%} of the bytes: about every tenth document or block of a long one "
        f"is held out instead, {new:.1%}"
    )


def _read_back(directory: Path, entries: list[dict], split: str) -> Iterator[tuple[str, str]]:
    for entry in entries:
        if entry["split"] == split:
            yield from read_shard(directory / entry["name"])


def _split_anew(
    source: Source, directory: Path, entries: list[dict], order: bytearray, hashes: dict[str, array]
) -> list[dict]:
    """Replace shards by ones that are split by bytes, and hashes by theirs."""
    written = {split: _read_back(directory, entries, split) for split in SPLITS}
    in_order = (next(written[SPLITS[flag]]) for flag in order)
    new: dict[str, array] = {split: array("Q") for split in SPLITS}

    def documents() -> Iterator[Document]:
        for name, text, split in split_by_bytes(in_order, sum(_bytes_by_split(entries).values())):
            new[split].append(_hash_text(text))
            yield Document(name, text, split=split)

    entries = _rewrite_splits(directory, entries, SPLITS, documents())
    hashes.update(new)
    return entries


def _rewrite_splits(directory: Path, entries: list[dict], splits: Iterable[str], documents: Iterable) -> list[dict]:
    """Write documents in place of the shards of some splits, which may be read meanwhile; returns all entries."""
    with tempfile.TemporaryDirectory(dir=directory, prefix=".") as folder:
        new = _write_documents(documents, Path(folder))
        for entry in entries:
            if entry["split"] in splits:
                (directory / entry["name"]).unlink()
        for entry in new:
            os.rename(Path(folder, entry["name"]), directory / entry["name"])
    kept = [entry for entry in entries if entry["split"] not in splits]
    return sorted(kept + new, key=lambda entry: (SPLITS.index(entry["split"]), entry["name"]))


def _describe_shard(path: Path, split: str, codec: dict | None = None) -> dict:
    """A shard's manifest entry, from reading it whole: what is recorded is what can be read back."""
    documents, text_bytes, texts = 0, 0, hashlib.sha256()
    sounds, totals = hashlib.sha256(), dict.fromkeys(("clips", "unseen", "caption_bytes", "codes"), 0)
    for name, text, codes, attributes in read_clips(path, codec):
        raw = text.encode("utf-8")
        texts.update(f"{name}\0{len(raw)}\0".encode() + raw)
        documents, text_bytes = documents + 1, text_bytes + len(raw)
        if codes is not None:
            sounds.update(f"{name}\0{json.dumps(attributes)}\0{codes.size}\0".encode() + codes.astype("<i4").tobytes())
            clip = dict(clips=1, unseen=(attributes or {}).get("unseen", 0), caption_bytes=len(raw), codes=codes.size)
            totals = {key: totals[key] + int(clip[key]) for key in totals}
    entry = {
        "name": path.name,
        "split": split,
        "size": path.stat().st_size,
        "sha256": sha256_of(path),
        "documents": documents,
        "text_bytes": text_bytes,
        "text_sha256": texts.hexdigest(),
    }
    return entry | totals | {"codes_sha256": sounds.hexdigest()} if codec else entry


def _make_fingerprint(source: str, version: str, files: int, entries: list[dict]) -> dict:
    """The dataset's identity, from its texts and codes: parquet bytes differ between versions of pyarrow."""
    total = sum(entry["text_bytes"] for entry in entries)
    keys = ("split", "text_sha256", "codes_sha256")
    sha256 = digest("".join(" ".join(entry[key] for key in keys if key in entry) + "\n" for entry in entries))
    return {"source": source, "version": version, "files": files, "bytes": total, "sha256": sha256}


def _check_enough(source: Source, entries: list[dict], counts: Counter) -> None:
    sums = {s: [sum(e[k] for e in entries if e["split"] == s) for k in ("documents", "text_bytes")] for s in SPLITS}
    total = sum(size for _, size in sums.values())
    found = f"{counts['files']} files with {total} bytes of text{format_skipped(counts)}"
    if total < source.least_bytes:
        advice = source.advice
        if source.undecodable:
            advice = f"{counts['undecodable']} documents are not UTF-8 text; {source.undecodable[0]}"
        raise UserError(
            f"data={source.source}: too little text: {found}, at least {source.least_bytes} needed: {advice}"
        )
    for split, meaning in (("train", "to train on"), ("val", "held out")):
        if not sums[split][0]:
            documents = sum(n for n, _ in sums.values())
            raise UserError(
                f"data={source.source}: no document is {meaning} among {documents} ({found}): {source.advice}, with "
                "texts of their own in both parts"
            )


def _shard_name(number: int) -> str:
    return f"shard_{number:05d}.parquet"


def open_climbmix(limit: int, skip_corrupt: bool = False) -> Dataset | None:
    """The first `limit` training shards and the held-out one where all are here, without a look at the hub."""
    return _climbmix(limit, 1, skip_corrupt) if climbmix_is_here(limit) else None


def climbmix_is_here(limit: int | None) -> bool:
    """Whether every shard of prepare("climbmix", limit=limit) was downloaded whole, so that no hub is needed."""
    directory = base_dir() / "data" / "climbmix"
    known = {entry["name"] for entry in (read_manifest(directory) or {"files": []})["files"]}
    return all(name in known and (directory / name).exists() for name in _climbmix_names(limit or CLIMBMIX_SHARDS))


def _climbmix_names(limit: int) -> list[str]:
    return [_shard_name(number) for number in (*range(limit), CLIMBMIX_LAST)]


def _climbmix(limit: int, workers: int, skip_corrupt: bool) -> Dataset:
    """The first `limit` training shards and the held-out last one, downloaded where missing.

    One folder serves every limit: its manifest records size and sha256 of all shards at their first download, the
    returned dataset and fingerprint cover only the shards asked for.
    """
    if limit > CLIMBMIX_LAST:
        raise UserError(f"data_limit={limit}: climbmix has {CLIMBMIX_LAST} training shards")
    directory = base_dir() / "data" / "climbmix"
    names = _climbmix_names(limit)
    manifest = read_manifest(directory) or {
        "name": "climbmix",
        "source": "climbmix",
        "licence": f"see the dataset card of {hub.CLIMBMIX_REPO} on the hub",
        "left_out": {},
        "files": [],
    }

    def fingerprint(entries: list[dict]) -> dict:
        return _make_fingerprint("climbmix", hub.CLIMBMIX_REPO, len(entries), entries)

    known = {entry["name"]: entry for entry in manifest["files"]}
    if missing := [name for name in names if name not in known or not (directory / name).exists()]:
        recorded = {name: entry["sha256"] for name, entry in known.items()}
        for path in hub.download_climbmix(missing, directory, workers, recorded):
            known[path.name] = _describe_shard(path, "val" if path.name == _shard_name(CLIMBMIX_LAST) else "train")
            with file_lock(directory / ".manifest.lock"):  # another process may have added shards meanwhile
                there = (read_manifest(directory) or manifest)["files"]
                known = {entry["name"]: entry for entry in there} | known
                entries = [known[name] for name in sorted(known)]
                _write_manifest(directory, manifest | {"files": entries, "fingerprint": fingerprint(entries)})
    entries = [known[name] for name in names]
    return Dataset(directory, manifest | {"files": entries, "fingerprint": fingerprint(entries)}, skip_corrupt)


def _write_manifest(directory: Path, manifest: dict) -> None:
    write_atomically(directory / "manifest.json", json.dumps(manifest, indent=1) + "\n")


def _list_versions(data: Path, name: str) -> list[tuple[Path, dict]]:
    """The prepared versions of a source: the folder of its name, and later ones with -v and the content's hash."""
    folders = sorted(data.iterdir()) if data.is_dir() else []
    ours = [d for d in folders if re.fullmatch(re.escape(name) + "(-v[0-9a-f]{8})?", d.name)]
    return [(d, manifest) for d in ours if (manifest := read_manifest(d)) is not None]


@contextmanager
def _scratch(data: Path, name: str) -> Iterator[Path]:
    """A temporary folder beside the target, removed on the way out, as is what dead processes left behind."""
    try:
        data.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make {data} ({error.strerror}): point NANOCHAT_BASE_DIR to another place") from error
    remove_abandoned(data, ".*.tmp")
    with scratch_folder(data / name) as scratch:
        yield scratch
