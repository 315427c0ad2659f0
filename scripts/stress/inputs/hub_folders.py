"""Folders that the datasets package reads: hf:FOLDER."""

import contextlib
import csv
import json
import os
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from scripts.stress.inputs.cases import Case, Refused, Used
from scripts.stress.inputs.rows import sentences

HUB = ("scripts.data", "--data=hf:{in}/set")
TABLE = "set/train.csv"


def _csv(folder: Path, texts: list[str], name: str = TABLE) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["text"], *([text] for text in texts)])


def _lines(folder: Path, rows: list[dict], name: str = "set/train.jsonl") -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _parquet(folder: Path, texts: list[str], name: str) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"text": texts}), path)


def _to_disk(folder: Path, texts: list[str], parts: dict[str, list[str]] | None = None) -> None:
    import datasets

    datasets.disable_progress_bars()
    make = datasets.Dataset.from_dict
    found = datasets.DatasetDict({k: make({"text": v}) for k, v in parts.items()}) if parts else make({"text": texts})
    with contextlib.redirect_stdout(None):
        found.save_to_disk(str(folder / "set"))


def cases() -> list[Case]:
    texts, others, held = sentences(), [f"other {text}" for text in sentences()], [f"held {t}" for t in sentences(40)]

    def changed(folder: Path) -> None:
        _csv(folder / "in", others)

    def same_size(folder: Path) -> None:
        path = folder / "in" / TABLE
        before = path.stat()
        path.write_bytes(path.read_bytes().replace(b"sentence", b"SENTENCE"))
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 10**9))

    def parts(folder: Path) -> None:
        _parquet(folder, texts, "set/data/train-00000-of-00001.parquet")
        _parquet(folder, held, "set/data/test-00000-of-00001.parquet")

    def case(label: str, build: Callable[[Path], object], expect, *flags: str) -> Case:
        return Case(f"hf: {label}", build, [(*HUB, *flags)], expect)

    one, upper = (lambda folder: _csv(folder, texts)), [text.replace("sentence", "SENTENCE") for text in texts]
    return [
        case("a csv", one, Used(texts=texts)),
        Case("hf: a csv that changed", one, [HUB, changed, HUB], Used(texts=others)),
        Case("hf: a csv that changed and kept its size", one, [HUB, same_size, HUB], Used(texts=upper)),
        case("jsonl", lambda f: _lines(f, [{"text": text} for text in texts]), Used(texts=texts)),
        case("save_to_disk", lambda folder: _to_disk(folder, texts), Used(texts=texts)),
        case(
            "save_to_disk of two parts",
            lambda folder: _to_disk(folder, [], {"train": texts, "test": held}),
            Used(texts=[*texts, *held], says=["test"]),
        ),
        case("parquet in two parts", parts, Used(texts=[*texts, *held], says=["test"])),
        case("another column", one, Refused(["content", "data_column"]), "--data_column=content"),
        case("another split", one, Refused(["nosuch"]), "--data_split=nosuch"),
        case(
            "types that do not agree",
            lambda f: _lines(f, [*({"text": t} for t in texts), {"text": {"a": 1}}]),
            Refused(["hf:"]),
        ),
        case("an empty folder", lambda folder: (folder / "set").mkdir(), Refused(["hf:"])),
        Case("hf: no such folder", lambda folder: None, [HUB], Refused(["hf:"])),
    ]
