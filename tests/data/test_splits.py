"""A tenth is held out whatever the files are called: by names where that is sane, else by bytes; or its own part."""

import hashlib
import json
import re

import hypothesis
import hypothesis.strategies as st
import pytest

from nanochat.data.prepare import prepare
from nanochat.data.splits import cut_text, find_own_split, is_held_out, is_sane, split_by_bytes
from nanochat.system.environment import UserError
from scripts import base_train
from tests.data.test_dataset import write_files
from tests.messages import record_messages
from tests.tiny_run import TINY, flags, metrics


@pytest.fixture(autouse=True)
def base(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    return tmp_path / "base"


def share(data) -> float:
    return data.text_bytes("val") / (data.text_bytes("train") + data.text_bytes("val"))


# ---------------------------------------------------------------------------------------------------------------------
# by bytes


@hypothesis.given(
    st.lists(st.integers(1, 400), min_size=1, max_size=30),
    st.lists(st.sampled_from(["word ", "line\n", "\n\n", "é", "x" * 90, "cr\r", "crlf\r\n"]), min_size=1, max_size=9),
)
def test_a_tenth_of_the_bytes_and_every_byte_once(repeats, words):
    """Documents of any sizes: all text in order, no name twice, 5 to 15% held out from 10 KB on.

    Red when a document that is cut keeps one split, when cut() drops its last piece, or with SHARE = 0.2.
    """
    documents = [(f"{i}.txt", "".join(words) * repeat) for i, repeat in enumerate(repeats)]
    total = sum(len(text.encode()) for _, text in documents)
    pieces = list(split_by_bytes(documents, total))
    joined: dict[str, str] = {}
    for name, text, _ in pieces:
        joined[re.sub("#.*", "", name)] = joined.get(re.sub("#.*", "", name), "") + text
    assert list(joined.items()) == documents
    assert len({name for name, _, _ in pieces}) == len(pieces)
    if total >= 10_000:
        held = sum(len(text.encode()) for _, text, split in pieces if split == "val")
        assert 0.04 < held / total < 0.16


@hypothesis.given(st.text(st.sampled_from("ab é\n\r"), max_size=500), st.integers(1, 40))
def test_cuts_prefer_lines(text, size):
    """Pieces are the text, at most two sizes long; with a line end in reach a piece ends there. Red without CUTS."""
    pieces = list(cut_text(text, size))
    assert "".join(pieces) == text
    assert all(len(piece) <= 2 * size for piece in pieces)
    for piece in pieces[:-1]:
        assert len(piece) >= size
        if re.search(r"[\n\r]", piece[size:]):
            assert piece.endswith(("\n", "\r", " "))
            assert re.search(r"[\n\r]\s*$", piece)


def test_bounds_of_a_sane_share():
    for val, sane in ((1, False), (2, True), (30, True), (31, False), (0, False), (100, False)):
        assert is_sane({"train": 100 - val, "val": val}) == sane
    assert not is_sane({"train": 0, "val": 0})


def texts_named(name: str) -> dict[str, str]:
    """20 KB of text in forms that are one document, or a few: as one file of this name."""
    lines = [f"line {i} of a small text, about nothing much.\n" for i in range(450)]
    return {
        "paragraphs": "".join(line + "\n" * (i % 5 == 4) for i, line in enumerate(lines)),
        "one line": "".join(lines).replace("\n", " "),
        "CR only": "".join(lines).replace("\n", "\r"),
        "no blanks": "ACGTTGCATG" * 2100,
        "11 KB": "".join(lines)[:11_000],
    }


@pytest.mark.parametrize("form", texts_named(""))
def test_a_small_text_does_not_depend_on_its_name(tmp_path, form):
    """Five usual names, each a .txt, a .jsonl of one row, and alone in a folder: all train with a tenth held out.

    Red when _write_shards does not ask is_sane: most of the names would hold out nothing, or everything.
    """
    text = texts_named("")[form]
    for name in ("input", "book", "data", "shakespeare", "train"):
        files = {f"{name}.txt": text, f"{name}.jsonl": json.dumps({"text": text}) + "\n", f"{name}/x.md": text}
        write_files(tmp_path, files)
        for source in (f"{name}.txt", f"{name}.jsonl", name):
            data = prepare(str(tmp_path / source))
            assert 0.02 <= share(data) <= 0.30, source
            assert data.text_bytes("train") + data.text_bytes("val") == len(text)
            assert len(re.sub(r"\s", "", "".join(t for _, t in data.documents("val")))) > 100


def test_one_large_file_that_is_held_out(tmp_path):
    """Thirty small files and one whose name falls to val: cut, both sides have of it, and it is said and recorded.

    Red when the rule counts documents, or _say_split is not called for a prepared dataset.
    """
    large = next(f"big{i}.txt" for i in range(99) if is_held_out(f"big{i}.txt"))
    files = {f"{i}.txt": f"small {i}\n" * 50 for i in range(30)} | {large: "a large text, paragraph.\n\n" * 40_000}
    folder, lines = write_files(tmp_path / "texts", files), []
    with record_messages(lines):
        data = prepare(str(folder))
    assert 0.09 < share(data) < 0.11
    assert {name.partition("#")[0] for name, _ in data.documents("train")} == set(files) - {
        name for name, _ in data.documents("val") if "#" not in name
    }
    message = (
        r"texts-\w+: the rule by name would hold out 9.* of the bytes: about every tenth .* instead, (9\.9|10\.0)%"
    )
    assert re.search(message, lines[-1])
    assert re.search(message, f"texts-0: {data.manifest['split_rule']}")
    lines.clear()
    with record_messages(lines):
        prepare(str(folder))
    assert len(lines) == 1
    assert re.search(message, lines[0])
    parts = [pair for split in ("train", "val") for pair in data.documents(split) if pair[0].startswith(f"{large}#")]
    parts.sort(key=lambda pair: int(pair[0].partition("#")[2]))
    assert "".join(text for _, text in parts) == files[large]


def test_a_sane_share_keeps_the_names_rule(tmp_path):
    """Red when documents are split by bytes although names do well: every old dataset would change."""
    folder = write_files(tmp_path / "texts", {f"{i}.txt": f"text {i}\n" * 60 for i in range(100)})
    data = prepare(str(folder))
    assert {name for name, _ in data.documents("val")} == {f"{i}.txt" for i in range(100) if is_held_out(f"{i}.txt")}
    assert "split_rule" not in data.manifest
    assert "held_out_copies" not in data.manifest


def test_too_little_is_still_refused(tmp_path):
    with pytest.raises(UserError, match="too little text: 1 files with 9000 bytes"):
        prepare(str(write_files(tmp_path, {"a.txt": "nine char" * 1000}) / "a.txt"))


def test_the_least_text_trains_and_is_measured(tmp_path, capsys):
    """10 KB in one line: steps, a held-out figure, and the split is said by the training itself."""
    path = write_files(tmp_path, {"book.txt": "".join(f"sentence {i} goes on. " for i in range(500))}) / "book.txt"
    settings = TINY | dict(data=path, model_tag="least", num_iterations=2, eval_every=2)
    assert base_train.main(flags(settings))["step"] == 2
    assert "the rule by name would hold out 0.0% of the bytes" in capsys.readouterr().out
    assert metrics("least", "val_bpb")[-1] > 0


# ---------------------------------------------------------------------------------------------------------------------
# a dataset's own split


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["train/a.txt", "test/b.txt", "README.md"], ["train", "val", "train"]),
        (["training/x/a.txt", "dev/b.txt", "test/c.txt"], ["train", "val", None]),
        (["Train/a.wav", "Validation/b.wav"], ["train", "val"]),
        (["data/train-00000-of-00002.parquet", "data/test-00000.parquet", "a.md"], ["train", "val", "train"]),
        (["wiki.train.txt", "wiki.valid.txt", "wiki.test.txt"], ["train", "val", None]),
        (["TinyStories-train.txt", "TinyStories-valid.txt"], ["train", "val"]),
        (["train.jsonl.gz", "val.jsonl.gz"], ["train", "val"]),
        (["train/a.txt", "other/b.txt"], None),
        (["default/train/0.parquet", "default/test/0.parquet"], ["train", "val"]),
        (
            ["en/train/a.txt", "en/dev/b.txt", "en/test/c.txt", "de/train/a.txt", "de/test/b.txt", "fr/test/c.txt"],
            ["train", "val", None, "train", "val", "train"],
        ),
        (["train/a.txt", "eval/b.txt"], ["train", "val"]),
        (["train-clean-100/a.wav", "dev-clean/b.wav", "test-clean/c.wav"], ["train", "val", None]),
        (["split=train/a.parquet", "split=test/b.parquet"], ["train", "val"]),
        (["trainset.jsonl", "testset.jsonl", "devset.jsonl"], ["train", None, "val"]),
        (["train_run/a.txt", "test_run/b.txt", "notes/c.txt"], None),  # a word, and not every folder has one
        (["src/train/a.py", "src/eval/b.py", "c.txt"], None),  # programs
        (["a/train/x.txt", "b/test/y.txt"], None),  # not beside each other
        (["train.py", "test.py"], None),  # programs
        (["train.txt", "test.txt", "notes.txt"], None),  # not every file is named for a part
        (["test/a.txt", "val/b.txt"], None),
        (["trains.txt", "testament.txt"], None),
    ],
)
def test_own_split(names, expected):
    """Red when a word may be a part of a longer one, a single file decides for a folder, only the top counts
    (`folders[:1]` in _folder_parts), or a word decides beside folders without one (no `None not in known`)."""
    assert find_own_split(names) == (expected and dict(zip(names, expected, strict=True)))


def test_files_called_as_parts_beside_others_are_said(tmp_path):
    """Red when train.txt, test.txt and vocab.txt are mixed without a word."""
    files = {name: f"{name}\n" * 900 for name in ("train.txt", "test.txt", "vocab.txt")}
    lines: list[str] = []
    with record_messages(lines):
        data = prepare(str(write_files(tmp_path / "own", files)))
    assert any("test.txt, train.txt are called as parts of a split, vocab.txt not: all are read" in li for li in lines)
    assert {name.partition("#")[0] for name, _ in data.documents("train")} == set(files)
    lines.clear()
    (tmp_path / "own" / "vocab.txt").unlink()
    with record_messages(lines):
        prepare(str(tmp_path / "own"))
    assert not any("called as parts" in line for line in lines)


def test_a_folders_own_split_is_kept(tmp_path):
    """Nothing of test/ is trained on and nothing of train/ is held out, and it is said. Red without own_split."""
    files = {f"{part}/{i}.txt": f"{part} {i}\n" * 60 for part in ("train", "test") for i in range(20)}
    lines: list[str] = []
    with record_messages(lines):
        data = prepare(str(write_files(tmp_path / "own", files)))
    assert {name for name, _ in data.documents("train")} == {name for name in files if name.startswith("train/")}
    assert {name for name, _ in data.documents("val")} == {name for name in files if name.startswith("test/")}
    assert "its own validation or test part is held out: 4" in lines[-1]
    write_files(tmp_path / "own", {"validation/v.txt": "validation\n" * 60})
    with record_messages(lines):
        data = prepare(str(tmp_path / "own"))
    assert [name for name, _ in data.documents("val")] == ["validation/v.txt"]
    assert any("20 skipped, a test part beside the validation part" in line for line in lines)


# ---------------------------------------------------------------------------------------------------------------------
# copies across the split, and the standard library


def test_copies_across_the_split_are_counted(tmp_path):
    """A held-out document equal to a training one is said, and stays. Red when hashes are of one split only."""
    inside = next(f"{i}.txt" for i in range(99) if not is_held_out(f"{i}.txt"))
    outside = next(f"{i}.txt" for i in range(99) if is_held_out(f"{i}.txt"))
    files = {f"{i}.txt": f"text {i}\n" * 60 for i in range(60)} | {
        inside: "the same\n" * 60,
        outside: "the same\n" * 60,
    }
    lines: list[str] = []
    with record_messages(lines):
        data = prepare(str(write_files(tmp_path / "texts", files)))
    assert data.manifest["held_out_copies"] == 1
    assert outside in {name for name, _ in data.documents("val")}
    number = data.num_documents("val")
    assert any(f"warning: 1 of {number} held-out documents are equal to a training document" in line for line in lines)


def test_the_split_of_the_standard_library_is_pinned():
    """Names and their hashes: red when held_out changes in any way, on every Python."""
    names = ["abc.py", "argparse.py", "ast.py", "json/decoder.py", "os.py", "typing.py", "zipfile.py", "re/_parser.py"]
    names += [f"module_{i}.py" for i in range(1000)]
    chosen = [name for name in names if is_held_out(name)]
    digest = hashlib.sha256("\n".join(chosen).encode()).hexdigest()
    assert (len(chosen), digest[:16]) == (107, "5c1e7ab1c19e669a")
