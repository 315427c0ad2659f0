"""Folders: other suffixes, links, permissions, special files, odd names, our own output."""

import gzip
import os
import socket
from collections.abc import Callable
from pathlib import Path

from scripts.stress.inputs.cases import Case, Refused, Used
from scripts.stress.inputs.texts import data_of, encoded, folder_case, plain_files, text_of, write

TRAIN = (
    "--vocab_size=300 --depth=2 --model_dim=64 --head_dim=32 --max_seq_len=64 --device_batch_size=2 "
    "--total_batch_size=128 --num_iterations=4 --compile=False --device_type=cpu --eval_tokens=256 --model_tag=try"
).split()


def cases() -> list[Case]:
    return [*_suffixes(), *_links(), *_permissions(), *_special(), *_names(), *_own_output(), *_splits()]


def _suffixes() -> list[Case]:
    files = plain_files()
    rows = b'{"text": "a row"}\n'
    others = {
        "rows.jsonl.gz": gzip.compress(rows),
        "table.csv": b"text\na row\n",
        "all.json": b'[{"text": "a row"}]',
        "page.html": b"<p>a page</p>",
        "notes.rst": b"notes",
        "run.log": b"a log",
        "paper.pdf": b"%PDF-1.7",
        "letter.docx": b"PK\3\4",
        "README": b"read me",
    }
    found = []
    for name, raw in others.items():
        suffix = name.partition(".")[2].rpartition(".")[2] or "suffix"
        expect = Used(texts=list(files.values()), count=1, says=[suffix])
        found.append(folder_case(f"a folder with {name}", encoded(files) | {name: raw}, expect))
    expect = Used(texts=list(files.values()), count=len(others), says=["9 files not read", "4 other kinds"])
    found.append(folder_case("a folder with nine other kinds", encoded(files) | others, expect))
    upper = {name.upper(): text for name, text in files.items()}
    found.append(folder_case("suffixes in capitals", encoded(upper), Used(texts=list(upper.values()))))
    only = {f"page {i}.html": b"<p>words</p>" * 500 for i in range(9)}
    found.append(folder_case("a folder of web pages alone", only, Refused(["no text found", "html"])))
    found.append(folder_case("an empty folder", {".keep": b""}, Refused(["no text found"])))
    blank = {f"blank {i}.txt": b"" for i in range(3)}
    expect = Used(texts=list(files.values()), count=3, says=["empty"])
    found.append(folder_case("three empty files among thirty", encoded(files) | blank, expect))
    return found


def _linked(label: str, link: Callable[[Path], object], expect, **options) -> Case:
    """A folder of 30 files beside which link(folder) adds something."""

    def build(folder: Path) -> None:
        for name, raw in encoded(plain_files()).items():
            write(f"texts/{name}", raw, folder)
        link(folder)

    return Case(label, build, [data_of("texts")], expect, **options)


def _links() -> list[Case]:
    files, more = list(plain_files().values()), {f"more {i}.txt": text_of(1500, 100 + i) for i in range(30)}

    def with_more(folder: Path) -> None:
        for name, raw in encoded(more).items():
            write(f"elsewhere/deep/{name}", raw, folder)

    def to_folder(folder: Path) -> None:
        with_more(folder)
        (folder / "texts/linked").symlink_to(folder / "elsewhere")

    def twice(folder: Path) -> None:
        to_folder(folder)
        (folder / "texts/linked again").symlink_to(folder / "elsewhere")

    def only_link(folder: Path) -> None:
        with_more(folder)
        (folder / "texts").mkdir()
        (folder / "texts/linked").symlink_to(folder / "elsewhere")

    def to_file(folder: Path) -> None:
        write("single.txt", text_of(1500, 77).encode(), folder)
        (folder / "texts/linked.txt").symlink_to(folder / "single.txt")

    def relative(folder: Path) -> None:
        with_more(folder)
        (folder / "texts/linked").symlink_to("../elsewhere/deep")

    def loop(folder: Path) -> None:
        (folder / "texts/loop").symlink_to(folder / "texts")

    def to_parent(folder: Path) -> None:
        (folder / "texts/up").symlink_to("..")

    def to_itself(folder: Path) -> None:
        (folder / "texts/itself.txt").symlink_to("itself.txt")

    def broken(folder: Path) -> None:
        (folder / "texts/broken.txt").symlink_to(folder / "absent.txt")

    both = [*files, *more.values()]
    return [
        _linked("a linked folder", to_folder, Used(texts=both)),
        _linked("a folder linked twice", twice, Used(texts=both, skipped=["linked again"])),
        Case("nothing but a linked folder", only_link, [data_of("texts")], Used(texts=list(more.values()))),
        _linked("a linked file", to_file, Used(texts=[*files, text_of(1500, 77)])),
        _linked("a relative link", relative, Used(texts=both)),
        _linked("a link to the folder itself", loop, Used(texts=files, skipped=["loop"])),
        _linked("a link to the folder above", to_parent, Used(texts=files, skipped=["up"])),
        _linked("a link to itself", to_itself, Used(texts=files, skipped=["itself.txt"])),
        _linked("a broken link", broken, Used(texts=files, skipped=["broken.txt"])),
    ]


def _permissions() -> list[Case]:
    files = list(plain_files().values())

    def closed_folder(mode: int) -> Callable[[Path], object]:
        def build(folder: Path) -> None:
            for i in range(30):
                write(f"texts/closed/{i}.txt", text_of(1500, 200 + i).encode(), folder)
            os.chmod(folder / "texts/closed", mode)

        return build

    def closed_file(folder: Path) -> None:
        write("texts/closed.txt", text_of(1500, 200).encode(), folder)
        os.chmod(folder / "texts/closed.txt", 0)

    plain = dict(plain_user=True)
    skip = [data_of("texts", "--skip_corrupt=True")]
    found = [
        _linked("a folder without any permission", closed_folder(0), Refused(["closed"]), **plain),
        _linked("a folder that may be listed, not entered", closed_folder(0o600), Refused(["closed"]), **plain),
        _linked("a folder that may be entered, not listed", closed_folder(0o300), Refused(["closed"]), **plain),
        _linked("a file without permission", closed_file, Refused([r"closed\.txt"]), **plain),
    ]
    for case, names in ((found[0], ["closed"]), (found[3], ["closed.txt"])):
        expect = Used(texts=files, skipped=names)
        found.append(Case(f"{case.name}, skip_corrupt", case.build, skip, expect, **plain))
    return found


def _special() -> list[Case]:
    files = list(plain_files().values())

    def listening(folder: Path) -> None:
        server = socket.socket(socket.AF_UNIX)
        before = os.getcwd()
        try:
            server.bind(os.path.relpath(folder / "texts/socket.txt", before))
        finally:
            server.close()

    return [
        _linked(
            "a pipe called .txt", lambda f: os.mkfifo(f / "texts/pipe.txt"), Used(texts=files, skipped=["pipe.txt"])
        ),
        _linked("a socket called .txt", listening, Used(texts=files, skipped=["socket.txt"])),
        _linked(
            "a link to /dev/zero",
            lambda f: (f / "texts/zero.txt").symlink_to("/dev/zero"),
            Used(texts=files, skipped=["zero.txt"]),
        ),
        _linked("a folder called .txt", lambda f: (f / "texts/folder.txt").mkdir(), Used(texts=files)),
        Case("a pipe as data", lambda f: os.mkfifo(f / "pipe.txt"), [data_of("pipe.txt")], Refused([r"pipe\.txt"])),
    ]


def _names() -> list[Case]:
    names = {
        "an umlaut": "Übung {}.txt",
        "an emoji": "🙂 {}.txt",
        "a newline": "line\nbreak {}.txt",
        "a quote": 'it\'s "{}".txt',
        "a leading dash": "--data={}.txt",
        "a hash": "part#{}.txt",
        "blanks": "  {}  .txt",
        "a backslash": "a\\{}.txt",
        "a percent sign": "100%s{}.txt",
        "a bell": "\a{}.txt",
        "right to left": "\u202e{}.txt",
        "a zero-width blank": "{}\u200b.txt",
        "250 letters": "x" * 240 + "{}.txt",
        "60 folders": "d/" * 60 + "{}.txt",
    }
    found = []
    for label, pattern in names.items():
        files = {pattern.replace("{}", str(i)): text_of(1500, i) for i in range(30)}
        found.append(folder_case(f"names with {label}", encoded(files), Used(texts=list(files.values()))))

    def not_utf8(folder: Path) -> None:
        (folder / "texts").mkdir()
        for i in range(30):
            path = os.fsencode(folder / "texts") + b"/caf\xe9 %d.txt" % i
            with open(path, "wb") as file:
                file.write(text_of(1500, i).encode())

    expect = Used(texts=[text_of(1500, i) for i in range(30)])
    return [*found, Case("names that are no UTF-8", not_utf8, [data_of("texts")], expect)]


def _own_output() -> list[Case]:
    """A base folder inside the data is never read back."""
    files = plain_files()
    inside = {"NANOCHAT_BASE_DIR": "{in}/texts/out"}

    def build(folder: Path) -> None:
        for name, raw in encoded(files).items():
            write(f"texts/{name}", raw, folder)

    def train_inside(folder: Path) -> None:
        from scripts.stress.inputs.processes import run_case

        run = Case(
            "inside",
            lambda f: None,
            [("scripts.base_train", f"--data={folder / 'in' / 'texts'}", *TRAIN)],
            Used(),
            {"NANOCHAT_BASE_DIR": str(folder / "in" / "texts" / "out")},
        )
        result = run_case(run, folder / "inner")
        if result.code:
            raise AssertionError(result.errors[-300:])

    def used(folder: Path) -> None:  # so that the dataset is found below {base}
        (folder / "base").symlink_to(folder / "in" / "texts" / "out")

    own = "nanochat's own output"
    expect = Used(texts=list(files.values()), count=1, says=[own])
    return [
        Case(
            "another base folder inside the data, after a training",
            build,
            [train_inside, data_of("texts")],
            Used(texts=list(files.values()), count=3, says=[own]),
        ),
        Case(
            "the base folder inside the data, after a training",
            build,
            [train_inside, used, data_of("texts")],
            expect,
            inside,
        ),
    ]


def _splits() -> list[Case]:
    """A folder's own train and test parts are kept apart."""
    found = []
    for held in ("test", "val", "valid", "validation"):
        files = {f"train/{i}.txt": text_of(1500, i) for i in range(40)}
        files |= {f"{held}/{i}.txt": text_of(1500, 100 + i) for i in range(6)}
        expect = Used(texts=list(files.values()), says=[held])
        found.append(folder_case(f"a folder with train/ and {held}/", encoded(files), expect))
    return found
