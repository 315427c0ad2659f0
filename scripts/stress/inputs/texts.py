"""Single texts: encodings, line ends, sizes, names."""

import functools
from pathlib import Path

from scripts.stress.inputs.cases import Case, Refused, Used

DATA = ("scripts.data", "--data={in}/{name}")
UNICODE = {
    "utf-8": "utf-8",
    "utf-8 with BOM": "utf-8-sig",
    "utf-16 with BOM": "utf-16",
    "utf-32 with BOM": "utf-32",
    "utf-16-le": "utf-16-le",
    "utf-16-be": "utf-16-be",
    "utf-32-le": "utf-32-le",
    "utf-32-be": "utf-32-be",
}
BOMS = {"utf-16-be with BOM": ("utf-16-be", b"\xfe\xff"), "utf-32-be with BOM": ("utf-32-be", b"\0\0\xfe\xff")}
FOREIGN = {
    "latin-1": "Größe, café, naïve, señor, übermäßig",
    "cp1252": "“quoted” – 5 € … Größe",
    "koi8-r": "Привет, мир",
    "shift_jis": "日本語のテキスト",
    "gb18030": "简体中文文本",
    "cp437": "Zürich ist schön",
}


def text_of(size: int, number: int = 0, extra: str = "ä é ж 語") -> str:
    """About `size` bytes of lines that no two documents share; deterministic."""
    lines, length, i = [], 0, 0
    while length < size:
        lines.append(f"document {number} line {i}: {extra} words {(i * 7919 + number * 104729) % 99991} go by\n")
        length += len(lines[-1].encode())
        i += 1
        if i % 12 == 0:
            lines.append("\n")
    return "".join(lines)


def data_of(name: str, *flags: str) -> tuple[str, ...]:
    return ("scripts.data", f"--data={{in}}/{name}", *flags)


def write(name: str, raw: bytes, folder: Path) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(raw)


def file_case(label: str, raw: bytes, expect, name: str = "input.txt", **options) -> Case:
    """A case of one file by itself."""
    return Case(label, functools.partial(write, name, raw), [data_of(name)], expect, **options)


def folder_case(label: str, files: dict[str, bytes], expect, *flags: str, **options) -> Case:
    """A case of a folder with these files and 30 plain ones of ours."""

    def build(folder: Path) -> None:
        for name, raw in files.items():
            write(f"texts/{name}", raw, folder)

    return Case(label, build, [data_of("texts", *flags)], expect, **options)


def plain_files(count: int = 30, size: int = 1500) -> dict[str, str]:
    """Name -> text of plain files, a sane share of which is held out."""
    return {f"chapter {i}.txt": text_of(size, i) for i in range(count)}


def encoded(files: dict[str, str]) -> dict[str, bytes]:
    return {name: text.encode() for name, text in files.items()}


def cases() -> list[Case]:
    return [*_encodings(), *_foreign(), *_line_ends(), *_sizes_and_names(), *_shares()]


def _encodings() -> list[Case]:
    """Every Unicode encoding is read, alone and in a folder; a byte order mark is no part of the text."""
    found = []
    text = text_of(30_000)
    encodings = {label: (codec, b"") for label, codec in UNICODE.items()} | BOMS
    for label, (codec, bom) in encodings.items():
        found.append(file_case(f"one file, {label}", bom + text.encode(codec), Used(joined=text)))
        files = plain_files()
        raw = {name: bom + text.encode(codec) for name, text in files.items()}
        found.append(folder_case(f"a folder, {label}", raw, Used(texts=list(files.values()))))
        lines = "".join(f'{{"text": "row {i} has some words and {i * 7919}"}}\n' for i in range(400))
        rows = [f"row {i} has some words and {i * 7919}" for i in range(400)]
        found.append(file_case(f"jsonl, {label}", bom + lines.encode(codec), Used(texts=rows), name="rows.jsonl"))
    mixed = plain_files()
    codecs = [*UNICODE.values()]
    raw = {name: text.encode(codecs[i % len(codecs)]) for i, (name, text) in enumerate(mixed.items())}
    found.append(folder_case("a folder of eight encodings", raw, Used(texts=list(mixed.values()))))
    crlf = text.replace("\n", "\r\n")
    found.append(file_case("utf-16 with CRLF", crlf.encode("utf-16"), Used(joined=crlf)))
    return found


def _foreign() -> list[Case]:
    """What is not Unicode is refused by name, or skipped by name among texts that are."""
    found = []
    for codec, extra in FOREIGN.items():
        raw = text_of(20_000, extra=extra).encode(codec)
        found.append(file_case(f"one file, {codec}", raw, Refused(["UTF-8"])))
        files = plain_files()
        bad = {"foreign 1.txt": raw[:3000], "foreign 2.txt": raw[3000:6000]}
        expect = Used(texts=list(files.values()), skipped=sorted(bad), says=["UTF-8"])
        found.append(folder_case(f"a folder with two files in {codec}", encoded(files) | bad, expect))
    binary = {
        "an ELF file": b"\x7fELF\x02\x01\x01" + bytes(range(256)) * 40,
        "a gzip file": b"\x1f\x8b\x08\0" + bytes(5000),
        "zeros": bytes(20_000),
        "a png": b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 40,
    }
    for label, raw in binary.items():
        found.append(file_case(f"{label} called .txt", raw, Refused(["input.txt"])))
        files = plain_files()
        expect = Used(texts=list(files.values()), skipped=["binary.txt"])
        found.append(folder_case(f"a folder with {label} called .txt", encoded(files) | {"binary.txt": raw}, expect))
    return found


def _line_ends() -> list[Case]:
    text = text_of(30_000)
    ends = {"LF": "\n", "CRLF": "\r\n", "CR": "\r", "NEL": "\x85", "U+2028": "\u2028", "form feeds": "\f"}
    found = [
        file_case(f"lines end in {label}", (changed := text.replace("\n", end)).encode(), Used(joined=changed))
        for label, end in ends.items()
    ]
    mixed = text.replace("go by\n", "go by\r\n", 40).replace("7 go by\n", "7 go by\r")
    found.append(file_case("mixed line ends", mixed.encode(), Used(joined=mixed)))
    last = text.rstrip("\n")
    found.append(file_case("no newline at the end", last.encode(), Used(joined=last)))
    line = " ".join(f"word{i * 7919 % 99991}" for i in range(150_000))
    found.append(file_case("one line of a megabyte, as text8", line.encode(), Used(joined=line)))
    found.append(file_case("one line of 20 KB", line[:20_000].encode(), Used(joined=line[:20_000])))
    dna = "".join("ACGT"[i * i * 31 % 101 % 4] for i in range(60_000))
    found.append(file_case("DNA without a blank", dna.encode(), Used(joined=dna)))
    return found


def _sizes_and_names() -> list[Case]:
    """Whether a text trains depends on its size, never on its name."""
    found = []
    for size in (11_000, 20_000, 40_000):
        text = text_of(size)
        for name in ("input.txt", "book.txt", "a.txt", "data.md", "Ünïcode ☃.txt", "notes.txt"):
            found.append(file_case(f"{size:,} bytes called {name}", text.encode(), Used(joined=text), name=name))
    found.append(file_case("an empty file", b"", Refused(["input.txt"])))
    found.append(file_case("nothing but blanks", b" \n\t" * 9000, Refused(["input.txt"])))
    found.append(file_case("100 bytes", text_of(100).encode(), Refused(["too little text"])))
    found.append(Case("no such file", lambda folder: None, [data_of("absent.txt")], Refused(["no such file"])))
    row = '{"text": ' + '"' + "words and more words " * 2000 + '"}\n'
    found.append(
        file_case("jsonl of one row", row.encode(), Used(joined="words and more words " * 2000), name="x.jsonl")
    )
    return found


def _shares() -> list[Case]:
    """The held-out share of the bytes is sane whatever the names and sizes."""
    files = plain_files(30, 5000)
    large = {f"large {name}.txt": text_of(2_000_000, 99) for name in ("a", "b")}
    found = []
    for name, text in large.items():
        for other in range(4):  # names of which some fall to the held-out tenth
            both = files | {f"{other} {name}": text}
            found.append(
                folder_case(
                    f"30 files and one of 2 MB called {other} {name}",
                    encoded(both),
                    Used(joined=None, texts=None, says=["held out|val"], share=True),
                )
            )
    few = {f"part {i}.txt": text_of(6000, i) for i in range(3)}
    found.append(folder_case("a folder of three files", encoded(few), Used(says=["val"])))
    return found
