"""Caption tables of every habit give the captions that their author wrote, or name the rows that do not."""

import csv
import io
import json
import unicodedata
from collections import defaultdict
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.audio.captions import SoundNames, find_captions
from nanochat.system.environment import UserError
from tests.messages import record_messages


def read(folder: Path, table: str | bytes, sounds: list[str], name: str = "captions.csv", column: str = "text"):
    """(captions by sound, names skipped by kind, lines printed) of a folder with these sounds and this table."""
    folder.mkdir(exist_ok=True)
    path = folder / Path(name).name
    path.write_bytes(table if isinstance(table, bytes) else table.encode())
    skipped, lines = defaultdict(list), []
    files = dict.fromkeys(sounds, Path("none")) | {name: path}

    def skip(kind: str, name: str, detail: str = "") -> None:
        skipped[kind].append(name)

    with record_messages(lines):
        found = find_captions("in", files, sounds, column, skip, Path("/root"))
    return {name: caption.text for name, caption in found.items()}, dict(skipped), lines


def names(count: int) -> list[str]:
    return [f"{number:02d}.wav" for number in range(count)]


# ---------------------------------------------------------------------------------------------------------------------
# quotes


@pytest.mark.parametrize(
    "odd",
    [
        {5: '"and so it goes'},
        {5: '"and so it goes', 8: 'that is it"'},
        {38: '"the last but one', 39: 'and the last"'},
        {5: 'say "hello" to', 8: '"yes" and "no"'},
        {5: '"Fine."'},
        {5: '"', 7: '""', 9: 'a 12" record'},
    ],
)
@pytest.mark.parametrize("header", [True, False])
def test_stray_quotes_in_a_tsv_are_letters(tmp_path, odd, header):
    """Every caption as it is written. Red when the strict reading comes first for tabs, or wins against one with more
    rows: a quote would swallow all up to the next one."""
    captions = {name: odd.get(number, f"caption {number}") for number, name in enumerate(names(40))}
    lines = ["file_name\ttext"] * header + [f"{name}\t{text}" for name, text in captions.items()]
    found, skipped, _ = read(tmp_path, "\n".join(lines) + "\n", names(40), "captions.tsv")
    assert found == captions
    assert not skipped


def test_stray_quotes_beside_quoted_cells(tmp_path):
    """A comma table that needs its quotes, with one that nobody closes. Red without the tolerant reading."""
    captions = {name: f"first, {name}" for name in names(20)} | {"07.wav": '"stray', "09.wav": 'say "a", ""b"" and\nc'}
    lines = ["file_name,text"]
    for name, text in captions.items():
        lines.append(f"{name},{text}" if text == '"stray' else '{},"{}"'.format(name, text.replace('"', '""')))
    found, skipped, _ = read(tmp_path, "\r\n".join(lines), names(20))
    assert found == captions
    assert not skipped


def test_quotes_that_are_marks_are_no_letters(tmp_path):
    """In tabs too, where all cells have them. Red when quotes are letters in every tsv."""
    rows = [("file_name", "text"), *((name, f'a "{name}"\tand\nmore') for name in names(5))]
    csv.writer(out := io.StringIO(newline=""), delimiter="\t", quoting=csv.QUOTE_ALL).writerows(rows)
    found, skipped, _ = read(tmp_path, out.getvalue(), names(5), "captions.tsv")
    assert found == dict(rows[1:])
    assert not skipped


def test_rows_that_do_not_fit_are_named(tmp_path):
    """Too few and too many cells; commas in the last column belong to the caption. Red when extra cells are dropped."""
    table = "file_name,text\n00.wav,one, two, three\n01.wav\n02.wav,x\n03.wav,y\n"
    found, skipped, _ = read(tmp_path, table, names(5))
    assert found == {"00.wav": "one, two, three", "02.wav": "x", "03.wav": "y"}
    assert skipped == {"row with too few or too many cells": ["captions.csv line 3"]}
    table = "file_name,text,who\n00.wav,one,me\n01.wav,one, two,you\n02.wav,x,us\n"
    found, skipped, _ = read(tmp_path, table, names(3))
    assert found == {"00.wav": "one", "02.wav": "x"}
    assert list(skipped.values()) == [["captions.csv line 3"]]


# ---------------------------------------------------------------------------------------------------------------------
# columns


def test_ljspeech(tmp_path):
    """id|text|text without a header, commas in the first row. Red when the first row is always a header, the delimiter
    is the most frequent mark, or ids are not looked for in subfolders."""
    sounds = [f"wavs/LJ001-{number:04d}.wav" for number in range(3)]
    rows = ["Printing, in the only sense, with which,|Printing, in the only sense, with which,", "is 2|is two", "a|a"]
    table = "".join(f"LJ001-{number:04d}|{row}\n" for number, row in enumerate(rows))
    found, skipped, lines = read(tmp_path, table, sounds, "metadata.csv")
    assert found == dict(zip(sounds, ("Printing, in the only sense, with which,", "is two", "a"), strict=True))
    assert not skipped
    assert lines == [
        "data: metadata.csv has no header: names in column 1, captions in column 3 (--data_column takes another)"
    ]
    found, _, _ = read(tmp_path, table, sounds, "metadata.csv", column="2")
    assert found[sounds[1]] == "is 2"
    with pytest.raises(UserError, match=r"no header, .* no column 'caption': choose with --data_column \(2, 3\)"):
        read(tmp_path, table, sounds, "metadata.csv", column="caption")


@pytest.mark.parametrize("mark", [",", ";", "\t", "|"])
@pytest.mark.parametrize("header", ["file_name{}text", "\ufeff file_name {} text "])
def test_the_delimiter_is_the_one_that_gives_file_names(tmp_path, mark, header):
    """Other marks are more frequent in the header and in the captions. Red when marks are counted instead."""
    captions = {
        name: "a, b; c | d, e; f | g"[: 4 * number + 1].replace(mark, ":") for number, name in enumerate(names(4))
    }
    lines = [header.format(mark), *(f"{name}{mark}{text}" for name, text in captions.items())]
    found, skipped, _ = read(tmp_path, "\n".join(lines), names(4))
    assert found == captions
    assert not skipped


@pytest.mark.parametrize("mark", [",", ";"])
def test_a_line_for_excel_names_the_delimiter(tmp_path, mark):
    """sep=; in front of the header is no row. Red when it is read as the header."""
    lines = [f"sep={mark}", f"file_name{mark}text", *(f"{name}{mark}of {name}" for name in names(3))]
    found, skipped, _ = read(tmp_path, "\r\n".join(lines), names(3))
    assert found == {name: f"of {name}" for name in names(3)}
    assert not skipped


@pytest.mark.parametrize("name", ["captions.csv", "captions.jsonl"])
def test_the_column_of_names_is_the_one_whose_values_exist(tmp_path, name):
    """Behind the captions and a number. Red when the first column is taken."""
    rows = [{"text": f"number {i}", "id": str(100 + i), "audio": f"clips/{i}.mp3"} for i in range(3)]
    table = "".join(json.dumps(row) + "\n" for row in rows)
    if name.endswith("csv"):
        table = "\n".join(",".join(row) for row in [list(rows[0]), *(row.values() for row in rows)])
    found, skipped, _ = read(tmp_path, table, [row["audio"] for row in rows], name)
    assert found == {row["audio"]: row["text"] for row in rows}
    assert not skipped


def test_a_row_without_the_column_is_named(tmp_path):
    """The other rows are used; a column that no row has is an error. Red when one such row ends the preparation."""
    table = '{"file": "00.wav", "text": "a"}\n{"file": "01.wav"}\n\n{"file": "02.wav", "text": null}\n'
    found, skipped, _ = read(tmp_path, table, names(3), "captions.jsonl")
    assert found == {"00.wav": "a", "02.wav": ""}
    assert skipped == {"row without a caption": ["captions.jsonl line 2"]}
    with pytest.raises(UserError, match=r"has no column 'txt', did you mean 'text'\?: choose with --data_column"):
        read(tmp_path, table, names(3), "captions.jsonl", column="txt")


# ---------------------------------------------------------------------------------------------------------------------
# names


@pytest.mark.parametrize(("on_disk", "in_table"), [("NFD", "NFC"), ("NFC", "NFD")])
def test_composed_and_decomposed_names_are_one(tmp_path, on_disk, in_table):
    """As macOS writes umlauts. Red when names are compared as they are."""
    sound, row = (unicodedata.normalize(form, "Grüße/Äpfel é.wav") for form in (on_disk, in_table))
    assert sound != row
    for title in (row, row[:-4], row.rpartition("/")[2]):
        found, skipped, _ = read(tmp_path, f"file_name,text\n{title},apples\n", [sound])
        assert found == {sound: "apples"}
        assert not skipped


def test_what_a_table_may_call_a_file():
    """Red when any way is missing, or an ambiguous name takes the first file."""
    sounds = ["a/one.wav", "b/one.wav", "b/two.flac", "b/Three.WAV", "c/four.wav", "c/four.flac", "v1.5.wav"]
    known = SoundNames([*sounds, "b/notes.pdf"], sounds, Path("/root"))
    for title, folder, name in (
        ("a/one.wav", "", "a/one.wav"),
        ("one.wav", "a", "a/one.wav"),
        ("one", "b", "b/one.wav"),
        ("./one.wav", "b", "b/one.wav"),
        ("a/one.wav", "tables", "a/one.wav"),
        ("../a/one", "b", "a/one.wav"),
        ("two", "", "b/two.flac"),
        ("b\\two.flac", "", "b/two.flac"),
        ("three.wav", "b", "b/Three.WAV"),
        ("/root/a/one.wav", "b", "a/one.wav"),
        ("v1.5", "", "v1.5.wav"),
        ("c/four.flac", "", "c/four.flac"),
        ("b/notes.pdf", "", "b/notes.pdf"),
        (" two ", "", "b/two.flac"),
    ):
        assert known.find(title, folder) == (name, ""), (title, folder)
    for title, folder, why in (
        ("one.wav", "", "name of several sounds (a/one.wav, b/one.wav)"),
        ("four", "c", "name of several sounds"),
        ("/root2/a/one.wav", "", "path outside"),
        ("../six.wav", "a", "caption without its sound"),
        ("", "", "caption"),
        ("../../one.wav", "a", "path outside"),
        ("C:\\one.wav", "", "path outside"),
        ("five.wav", "", "caption without"),
        ("z/one.wav", "", "caption without"),
    ):
        name, said = known.find(title, folder)
        assert name is None, (title, folder)
        assert said.startswith(why), (title, folder)
    assert known.find("two.flac", "a", anywhere=False)[0] is None
    assert known.find("two", "b", anywhere=False)[0]


def test_ambiguous_names_are_named(tmp_path):
    found, skipped, _ = read(tmp_path, "file_name,text\none,x\ntwo,y\n", ["a/one.wav", "b/one.wav", "b/two.wav"])
    assert found == {"b/two.wav": "y"}
    assert skipped == {"name of several sounds (a/one.wav, b/one.wav)": ["one"]}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
@pytest.mark.parametrize("name", ["captions.csv", "captions.jsonl", "a.txt"])
def test_encodings(tmp_path, encoding, name):
    """Red when a table or a text beside its sound is taken for UTF-8."""
    caption = "Die Tür fällt zu, und alle schweigen. " * 3
    table = {"captions.csv": f'file_name,text\r\na.wav,"{caption}"\r\n', "a.txt": caption}
    table["captions.jsonl"] = json.dumps({"file_name": "a.wav", "text": caption}, ensure_ascii=False) + "\n"
    found, skipped, _ = read(tmp_path, table[name].encode(encoding), ["a.wav"], name)
    assert found == {"a.wav": caption}
    assert not skipped


def test_texts_beside_sounds(tmp_path):
    """In either Unicode form and case; what no sound takes is named. Red when only exact names count."""
    sounds = [unicodedata.normalize("NFD", "Tür.wav"), "B.WAV", "c.wav", "d.flac", "e.wav"]
    texts = {"Tür.txt": "door", "b.txt": "bee", "c.txt": "no", "d.txt": "dee", "readme.txt": "about"}
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "e.txt").write_bytes(b"\xe4\xf6\xfc caf\xe9")
    (tmp_path / "captions.csv").write_text("file_name,text\nc.wav,yes\n")
    (tmp_path / "other.csv").write_text("a,b\n")
    files = {path.name: path for path in sorted(tmp_path.iterdir())} | dict.fromkeys(sounds, Path("none"))
    skipped = defaultdict(list)
    found = find_captions("in", files, sounds, "text", lambda kind, name, detail="": skipped[kind].append(name))
    assert {name: caption and caption.text for name, caption in found.items()} == dict(
        zip(sounds, ("door", "bee", "yes", "dee", None), strict=True)
    )
    assert dict(skipped) == {
        "second caption of a sound": ["c.txt"],
        "caption that is not UTF-8": ["e.wav"],
        "text file without its sound": ["readme.txt"],
        "table beside the captions": ["other.csv"],
    }


# ---------------------------------------------------------------------------------------------------------------------
# tables drawn at random

CELLS = st.text(st.sampled_from("ab ,;|\t\"'\\\n#0é字"), min_size=1, max_size=8).filter(
    lambda cell: cell.strip() == cell
)


@st.composite
def tables(draw):
    """(table, captions by sound): written by csv with any delimiter and any quoting that can hold the cells."""
    count = draw(st.integers(2, 6))
    mark = draw(st.sampled_from(",;\t|"))
    quoting = draw(st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC, csv.QUOTE_NONE]))
    cells = CELLS.map(lambda cell: cell.translate({10: " ", 13: " ", ord(mark): " ", 92: "/", 34: "'"}).strip() or "x")
    captions = draw(st.lists(cells if quoting == csv.QUOTE_NONE else CELLS, min_size=count, max_size=count))
    width = draw(st.integers(0, 2))
    order = draw(st.permutations(range(2 + width)))
    rows = [["file_name", "text", "who", "when"][: 2 + width]]
    rows += [[name, caption, "me", "now"][: 2 + width] for name, caption in zip(names(count), captions, strict=True)]
    out = io.StringIO(newline="")
    quote = None if quoting == csv.QUOTE_NONE else '"'
    writer = csv.writer(
        out, delimiter=mark, quoting=quoting, quotechar=quote, lineterminator=draw(st.sampled_from(["\n", "\r\n"]))
    )
    writer.writerows([[row[place] for place in order] for row in rows])
    return out.getvalue(), dict(zip(names(count), captions, strict=True))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(tables())
def test_tables_as_csv_writes_them(drawn):
    """The cells that were written are read. Red without the strict reading, or when a delimiter is left out."""
    import tempfile

    table, captions = drawn
    with tempfile.TemporaryDirectory() as folder:
        found, skipped, _ = read(Path(folder) / "in", table, list(captions))
    assert found == captions
    assert not skipped
