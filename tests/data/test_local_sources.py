"""Files of every kind, encoding and compression give their documents exactly; what cannot be used is named."""

import bz2
import csv
import gzip
import io
import json
import lzma
from collections import Counter

import hypothesis
import hypothesis.strategies as st
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat.data import text_files
from nanochat.data.encodings import Corrupt
from nanochat.data.prepare import prepare
from nanochat.data.text_files import Rows, file_documents, read_blocks
from nanochat.system.environment import UserError
from tests.data.test_dataset import texts_of, write_files
from tests.data.test_encodings import WIDE
from tests.messages import record_messages


@pytest.fixture(autouse=True)
def base(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    return tmp_path / "base"


TEXT = "".join(f"Zeile {i}: größer als 5 €, 文字 und 😀.\r\n" + "\r\n" * (i % 7 == 6) for i in range(600))


def documents_of(path, column="text", skip_corrupt=False, lines=None) -> list[str]:
    with record_messages(lines):
        documents = file_documents(path.name, path, column, True, Rows(skip_corrupt, Counter()))
        found = [text for _, text in documents]
    return [text.decode() if isinstance(text, bytes) else text for text in found]


# ---------------------------------------------------------------------------------------------------------------------
# encodings in files


@pytest.mark.parametrize("encoding", ["utf-8", *WIDE])
@pytest.mark.parametrize("marked", [True, False])
def test_a_text_file_of_any_unicode_encoding(tmp_path, encoding, marked):
    """Alone: the blocks of its UTF-8 form, line ends kept. In a folder: one document. No mark, no NUL in any.

    Red when blocks() splits the file's own bytes at newlines (halves of UTF-16 characters), or keeps the mark.
    """
    mark = WIDE.get(encoding, b"\xef\xbb\xbf") if marked else b""
    write_files(tmp_path, {"plain.txt": TEXT, "f/coded.txt": mark + TEXT.encode(encoding), "f/x.txt": "more " * 2000})
    expected = list(read_blocks(tmp_path / "plain.txt"))
    assert list(read_blocks(tmp_path / "f" / "coded.txt")) == expected
    assert len(expected) > 5
    data = prepare(str(tmp_path / "f" / "coded.txt"))
    found = sorted(texts_of(data).items(), key=lambda pair: [int(part) for part in pair[0].split("#")[1:]])
    assert "".join(text for _, text in found) == TEXT
    rows = Rows(False, Counter())
    (document,) = file_documents("coded.txt", tmp_path / "f" / "coded.txt", "text", False, rows)
    assert text_files.decode_text(document[1]) == TEXT


@pytest.mark.parametrize("encoding", ["utf-8", *WIDE])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_tables_of_any_unicode_encoding(tmp_path, encoding, end):
    """jsonl, json, csv and tsv with a mark, with each line end. Red when the mark stays in the first column's name."""
    mark, texts = WIDE.get(encoding, b"\xef\xbb\xbf"), [f"größe {i}, “zitiert”" for i in range(20)]
    contents = {
        "a.jsonl": end.join(json.dumps({"text": text}, ensure_ascii=False) for text in texts) + end,
        "a.json": json.dumps([{"text": text} for text in texts], indent=1).replace("\n", end),
        "a.csv": end.join(['"text","n"', *(f'"{text}",{i}' for i, text in enumerate(texts))]) + end,
        "a.tsv": end.join(["text\tn", *(f"{text}\t{i}" for i, text in enumerate(texts))]) + end,
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(mark + content.encode(encoding))
        assert documents_of(tmp_path / name) == texts, name


def test_what_is_not_unicode_is_named(tmp_path):
    """Six of 36 files in Latin-1: five are named with a way out, all are counted. All of them: the same is the error.

    Red when _decoded says nothing, or _check_enough advises a larger folder.
    """
    latin = {f"latin{i}.txt": f"Straße {i}\n".encode("latin-1") * 80 for i in range(6)}
    folder, lines = write_files(tmp_path / "some", latin | {f"{i}.txt": f"text {i}\n" * 80 for i in range(30)}), []
    with record_messages(lines):
        data = prepare(str(folder))
    assert data.manifest["left_out"] == {"undecodable": 6}
    assert len(texts_of(data)) == 30
    named = [line for line in lines if "is not UTF-8 at byte 4, looks like latin-1: iconv -f iso-8859-1" in line]
    assert len(named) == 5
    assert named[0].startswith("data: latin0.txt is")
    assert "data: ... and 1 more documents that are not UTF-8" in lines
    with pytest.raises(UserError, match=r"6 undecodable.*6 documents are not UTF-8 text; latin0\.txt is .* iconv -f"):
        prepare(str(write_files(tmp_path / "all", latin)))


def test_a_surrogate_in_json_names_its_line(tmp_path):
    rows = [{"text": f"document {i} " * 30} for i in range(60)]
    rows[7]["text"] = "\ud800 broken"
    lines: list[str] = []
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with record_messages(lines):
        prepare(str(tmp_path / "a.jsonl"))
    assert any("a.jsonl line 8 is a lone surrogate, \\ud800" in line for line in lines)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("photo.txt", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + bytes(range(256)) * 80, r"photo\.txt: binary data"),
        ("cut.txt", b"\xff\xfe" + ("text\n" * 9000).encode("utf-16-le")[:-1], r"cut\.txt: utf-16-le, but damaged"),
        ("latin.jsonl", '{"text": "Straße"}\n'.encode("latin-1") * 900, r"latin\.jsonl line 1 is not UTF-8.*latin-1"),
        ("latin.csv", "text\nStraße\n".encode("latin-1") * 900, r"latin\.csv line 2 is not UTF-8.*latin-1"),
        ("latin.txt", "Straße\n".encode("latin-1") * 900, r"too little text.*not UTF-8 text; .*looks like latin-1"),
        ("cut.csv", 'text\n"a\n' + "b\n" * 9000, r"cut\.csv line \d+ is not csv.*mend its quotes"),
        ("ragged.csv", "text,n\na,1\nb\n", r"ragged\.csv line 3 has 1 columns, the header has 2.*--skip_corrupt"),
        ("none.csv", "1,2\n" * 100, r"none\.csv line 1 has no column 'text': choose one with --data_column \(1, 2\)"),
        ("headless.csv", '0,"a b\nc"\n1,"text"\n' * 50, r"headless\.csv line 1 has no column 'text'.* \(0, a b\\nc\)"),
        ("twice.csv", "text,text\na,b\n" * 900, r"twice\.csv line 1 has 2 columns 'text': rename all but one of them"),
        ("array.jsonl", '[{"text": "a"}]', r"array\.jsonl line 1 is not a JSON object: .* when called \.json"),
        ("jp.txt", "日本語の文章\n".encode("iso2022_jp") * 900, r"jp\.txt#0 is not Unicode but iso-2022.*iconv"),
        ("kr.jsonl", b'{"text": "\\u001b$)C\\u000eKG\\u000f"}\n' * 900, r"kr\.jsonl line 1 is .*iso-2022"),
        ("cut.txt.gz", gzip.compress(b"text\n" * 90_000)[:-40], r"cut\.txt\.gz cannot be read"),
        ("false.txt.xz", b"no xz", r"false\.txt\.xz cannot be read"),
        ("false.txt.zst", b"no zst", r"false\.txt\.zst cannot be read"),
        ("a.json", '{"text": 3', r"a\.json is not JSON"),
    ],
)
def test_damaged_files_are_one_line(tmp_path, name, content, words):
    """Red when reading() lets EOFError or LZMAError through, csv is read without strict, the header is not looked at
    (the last of two columns would be taken), or _check_escapes() passes."""
    with pytest.raises(UserError, match=words) as caught:
        prepare(str(write_files(tmp_path, {name: content}) / name))
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------------------------------------------------------------
# tables and compression


@hypothesis.given(
    st.lists(st.text(st.sampled_from("ab ,;\t\"'\n\r|ü"), min_size=1).filter(str.strip), min_size=1, max_size=8),
    st.sampled_from([",", ";", "|"]),
)
def test_csv_is_what_its_writer_wrote(tmp_path_factory, texts, delimiter):
    """Commas, quotes and line ends within texts, against csv.writer. Red without newline="" in open_text."""
    path = tmp_path_factory.getbasetemp() / "written.csv"
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerows([("n", "text", "m"), *((i, text, "") for i, text in enumerate(texts))])
    assert documents_of(path) == texts


def test_tsv_with_and_without_quotes(tmp_path):
    """A tab-separated file whose texts begin with a quote keeps all rows; a quoted one loses its quotes.

    Red when _is_quoted is always true: the rows up to the next quote would become one text.
    """
    raw = ["plain", '"begins with one', 'in the middle " one', 'ends with one"', "plain"]
    path = write_files(tmp_path, {"raw.tsv": "text\tn\n" + "".join(f"{text}\t1\n" for text in raw)}) / "raw.tsv"
    assert documents_of(path) == raw
    quoted = io.StringIO(newline="")
    csv.writer(quoted, delimiter="\t").writerows([("text", "n"), ('a "b"\tc\nd', 1), ("plain", 2)])
    path = write_files(tmp_path, {"quoted.tsv": quoted.getvalue()}) / "quoted.tsv"
    assert documents_of(path) == ['a "b"\tc\nd', "plain"]


@pytest.mark.parametrize(
    "content",
    [
        '[{"text": "one"}, {"text": "two"}]',
        '["one", "two"]',
        '{"version": 1, "data": [{"text": "one"}, {"text": "two"}]}',
        '{"text": "one"}\n{"text": "two"}\n',
    ],
)
def test_json_of_several_shapes(tmp_path, content):
    assert documents_of(write_files(tmp_path, {"a.json": content}) / "a.json") == ["one", "two"]


PACK = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}
PACK[".zst"] = lambda raw: pa.compress(raw, codec="zstd", asbytes=True)


@pytest.mark.parametrize("compression", PACK)
@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".csv", ".json"])
def test_compressed_files_are_the_files(tmp_path, compression, suffix):
    """Red when the compression's suffix decides on the reader, or a stream is read on where its encoding was found."""
    rows = [f"row {i}: größer" for i in range(300)]
    content = {
        ".txt": TEXT,
        ".jsonl": "".join(json.dumps({"text": row}) + "\n" for row in rows),
        ".csv": "text\n" + "\n".join(rows),
        ".json": json.dumps(rows),
    }[suffix].encode()
    write_files(tmp_path, {f"a{suffix}": content, f"a{suffix}{compression}": PACK[compression](content)})
    assert documents_of(tmp_path / f"a{suffix}{compression}") == documents_of(tmp_path / f"a{suffix}")


def test_what_a_folder_reads(tmp_path):
    """Tables and compressed files are read where nothing else is; beside texts they are named, so that folders stay.

    Red when is_read is always asked with further=True.
    """
    files = {f"{i}.csv": "text\n" + "".join(f"row {i} {j} and more\n" for j in range(30)) for i in range(40)} | {
        "b.jsonl.gz": gzip.compress(b'{"text": "a"}\n')
    }
    folder, lines = write_files(tmp_path / "folder", files), []
    with record_messages(lines):
        data = prepare(str(folder))
    assert len(texts_of(data)) == 40 * 30 + 1
    assert "left_out" in data.manifest
    assert not data.manifest["left_out"]
    write_files(folder, {f"{i}.TXT": f"text {i}\n" * 60 for i in range(40)})
    with record_messages(lines):
        data = prepare(str(folder))
    assert sorted(texts_of(data)) == sorted(f"{i}.TXT" for i in range(40))
    assert data.manifest["left_out"] == {"of other kinds": 41}
    assert "data: 41 files not read: 40 .csv (0.csv, 1.csv, ...), 1 .jsonl.gz (b.jsonl.gz)" in lines
    assert any("41 tables and compressed files (0.csv, 1.csv, ...) are not read beside .txt" in line for line in lines)


def test_marks_between_rows(tmp_path):
    """Files with marks put behind each other: every row counts. Red without removeprefix in _json_lines."""
    part = b"\xef\xbb\xbf" + b"".join(b'{"text": "row %d of the text"}\n' % i for i in range(300))
    data = prepare(str(write_files(tmp_path, {"rows.jsonl": part * 2}) / "rows.jsonl"))
    assert len(texts_of(data)) == 600


def test_text_in_bytes_of_a_parquet_column(tmp_path):
    """Binary columns hold text in many a table; what is not UTF-8 names the column."""
    table = pa.table({"text": pa.array([f"größe {i} ".encode() * 40 for i in range(60)], pa.binary())})
    pq.write_table(table, tmp_path / "a.parquet")
    assert sorted(texts_of(prepare(str(tmp_path / "a.parquet"))).values()) == sorted(
        f"größe {i} " * 40 for i in range(60)
    )
    pq.write_table(pa.table({"text": pa.array([b"\xff\xfe\xff"], pa.binary())}), tmp_path / "b.parquet")
    with pytest.raises(Corrupt, match=r"b\.parquet: column 'text' is utf-16-le by its byte-order mark, but damaged"):
        prepare(str(tmp_path / "b.parquet"))


# ---------------------------------------------------------------------------------------------------------------------
# rows that cannot be used


def test_bad_rows_are_skipped_one_by_one(tmp_path):
    """No column, no text, no JSON, no object, no UTF-8: refused with line and way out, or skipped, named and counted.

    Red when Rows.refuse() raises under skip_corrupt, or a skipped row changes the others' numbers.
    """
    rows = [json.dumps({"text": f"document {i} " * 30}).encode() for i in range(60)]
    bad = [b'{"body": "x"}', b'{"text": 7}', b'{"text": ', b"[1]", b'{"text": "\xff"}', b'{"text": ["a"]}']
    for place, row in enumerate(bad):
        rows[10 * place] = row
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(rows))
    with pytest.raises(Corrupt, match=r"a\.jsonl line 1 has no column 'text'.*--data_column.*--skip_corrupt=True"):
        prepare(str(tmp_path / "a.jsonl"))
    lines: list[str] = []
    with record_messages(lines):
        data = prepare(str(tmp_path / "a.jsonl"), skip_corrupt=True)
    assert texts_of(data) == {f"a.jsonl#{i}": f"document {i} " * 30 for i in range(60) if i % 10}
    assert data.manifest["left_out"] == {"corrupt rows": 6}
    said = "\n".join(lines)
    assert "line 11: column 'text' holds int" in said
    assert "line 31 is not a JSON object" in said
    assert "... and 1 more rows that cannot be used" in said


def test_a_log_among_texts_is_named(tmp_path):
    """A jsonl of other things in a folder of texts is refused by name; with skip_corrupt the texts are used."""
    folder = write_files(tmp_path / "texts", {f"{i}.txt": f"text {i}\n" * 60 for i in range(40)})
    write_files(folder, {"log.jsonl": '{"step": 1, "loss": 2.5}\n' * 3})
    with pytest.raises(Corrupt, match=r"log\.jsonl line 1 has no column 'text'.*skip such rows with --skip_corrupt"):
        prepare(str(folder))
    data = prepare(str(folder), skip_corrupt=True)
    assert len(texts_of(data)) == 40
    assert data.manifest["left_out"] == {"corrupt rows": 3}


def test_a_parquet_file_without_the_column(tmp_path):
    folder = write_files(tmp_path / "texts", {f"{i}.txt": f"text {i}\n" * 60 for i in range(40)})
    pq.write_table(pa.table({"body": ["x"]}), folder / "a.parquet")
    with pytest.raises(Corrupt, match=r"a\.parquet has no column 'text'.*body"):
        prepare(str(folder))
    data = prepare(str(folder), skip_corrupt=True)
    assert len(texts_of(data)) == 40
    assert data.manifest["left_out"] == {"corrupt": 1}


# ---------------------------------------------------------------------------------------------------------------------
# long lines


@hypothesis.given(st.lists(st.sampled_from(["a", "é", "文", "😀", "\n", "word "]), max_size=200), st.integers(4, 9))
def test_long_lines_are_cut_between_characters(tmp_path_factory, pieces, longest):
    """Blocks are the file, each is text by itself. Red when _whole_characters hands on half a character."""
    path = tmp_path_factory.getbasetemp() / "long.txt"
    text = "".join(pieces) * 20
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_files, "LONGEST_LINE", longest)
        patch.setattr(text_files, "BLOCK_BYTES", 16)
        for encoding in ("utf-8", "utf-16"):
            path.write_bytes(text.encode(encoding))
            found = [block.decode() for block in read_blocks(path)]
            assert "".join(found) == text
            assert all(len(block.encode()) < 90 for block in found)


def test_one_line_of_many_megabytes(tmp_path):
    """A file in one line is read in pieces, not at once. Red when LONGEST_LINE has no effect."""
    path = write_files(tmp_path, {"text8.txt": "anarchism originated as a term " * 100_000}) / "text8.txt"
    assert max(map(len, read_blocks(path))) <= text_files.LONGEST_LINE + 4 * text_files.BLOCK_BYTES
    data = prepare(str(path))
    assert 0.02 < data.text_bytes("val") / 3_100_000 < 0.3
    assert data.text_bytes("val") + data.text_bytes("train") == 3_100_000
