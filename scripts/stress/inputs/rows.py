"""Rows of text: jsonl and parquet."""

import functools
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from scripts.stress.inputs.cases import Case, Refused, Used
from scripts.stress.inputs.texts import data_of, file_case


def cases() -> list[Case]:
    return [*_jsonl(), *_parquet()]


def sentences(count: int = 300) -> list[str]:
    return [f"sentence {i} of the table has the number {i * 7919 % 99991} and some words more" for i in range(count)]


def _lines(texts: list[str]) -> list[str]:
    return [json.dumps({"id": i, "text": text}, ensure_ascii=False) for i, text in enumerate(texts)]


def _jsonl() -> list[Case]:
    texts = sentences()
    lines = _lines(texts)
    lone = "\ud83d"

    def case(label: str, odd: list[str], expect, *flags: str, end: str = "\n") -> Case:
        raw = end.join([*lines[:100], *odd, *lines[100:], ""]).encode()
        made = file_case(f"jsonl: {label}", raw, expect, name="rows.jsonl")
        return Case(made.name, made.build, [data_of("rows.jsonl", *flags)], expect)

    refused = {
        "a row without the column": ('{"id": 7}', ["line 101", "text"]),
        "a number for a text": ('{"text": 7}', ["line 101", "text"]),
        "a list for a text": ('{"text": ["a"]}', ["line 101"]),
        "a line that is cut off": ('{"text": "half a', ["line 101"]),
        "a line of something else": ("text,id", ["line 101"]),
        "a list as row": ('["a", "b"]', ["line 101"]),
        "two objects in a line": ('{"text": "a"} {"text": "b"}', ["line 101"]),
        "deep nesting": ('{"text": ' + "[" * 100_000 + "]" * 100_000 + "}", ["line 101"]),
    }
    found = []
    for label, (odd, says) in refused.items():
        found.append(case(label, [odd], Refused(says)))
        expect = Used(texts=texts, count=1, says=["line 101"])
        found.append(case(f"{label}, skip_corrupt", [odd], expect, "--skip_corrupt=True"))
    surrogate = json.dumps({"text": f"half {lone} a pair"})
    found.append(case("half a surrogate pair", [surrogate], Used(texts=texts, count=1, says=["101|#100"])))
    found += [
        case("blank lines", ["", "  ", ""], Used(texts=texts, count=3)),
        case("a null", ['{"text": null}'], Used(texts=texts, count=1)),
        case("CRLF", [], Used(texts=texts), end="\r\n"),
        case("a key twice", ['{"text": "first", "text": "second"}'], Used(texts=[*texts, "second"])),
        case("a pair of surrogates", ['{"text": "\\ud83d\\ude00 smiles"}'], Used(texts=[*texts, "😀 smiles"])),
        case("another column", [], Refused(["content"]), "--data_column=content"),
        case("a column of numbers", [], Refused(["id"]), "--data_column=id"),
    ]
    return found


def _parquet() -> list[Case]:
    texts = sentences()

    def case(label: str, columns: dict, expect, *flags: str, **options) -> Case:
        def build(folder: Path) -> None:
            pq.write_table(pa.table(columns), folder / "rows.parquet", **options)

        return Case(f"parquet: {label}", build, [data_of("rows.parquet", *flags)], expect)

    def damaged(label: str, change, expect) -> Case:
        def build(folder: Path) -> None:
            path = folder / "rows.parquet"
            pq.write_table(pa.table({"text": texts}), path)
            path.write_bytes(change(path.read_bytes()))

        return Case(f"parquet: {label}", build, [data_of("rows.parquet")], expect)

    used = Used(texts=texts)
    return [
        case("plain", {"text": texts}, used),
        case("large strings", {"text": pa.array(texts, pa.large_string())}, used),
        case("a dictionary", {"text": pa.array(texts).dictionary_encode()}, used),
        case("string views", {"text": pa.array(texts).cast(pa.string_view())}, used),
        case("many row groups", {"text": texts}, used, row_group_size=7),
        case("nulls", {"text": [*texts, None, None]}, Used(texts=texts, count=2)),
        case("another column", {"body": texts}, Refused(["body", "data_column"])),
        case("the named column", {"body": texts}, used, "--data_column=body"),
        case("numbers", {"text": list(range(300))}, Refused(["text"])),
        case("lists", {"text": [[text] for text in texts]}, Refused(["text"])),
        case("no row", {"text": pa.array([], pa.string())}, Refused(["too little text"])),
        damaged("cut off", lambda raw: raw[:-100], Refused([r"rows\.parquet"])),
        damaged("empty", lambda raw: b"", Refused([r"rows\.parquet"])),
        damaged("something else", lambda raw: b"text\na row\n" * 900, Refused([r"rows\.parquet"])),
        damaged("a byte flipped", functools.partial(_flip, 2000), Refused([r"rows\.parquet"])),
    ]


def _flip(place: int, raw: bytes) -> bytes:
    return raw[:place] + bytes([raw[place] ^ 0x55]) + raw[place + 1 :]
