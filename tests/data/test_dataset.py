"""Every source becomes the same kind of shards; what is damaged, changed, empty or unreachable is said in one line."""

import hashlib
import json
import os
import sys
import sysconfig
import threading
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import hypothesis
import hypothesis.strategies as st
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat.data import dataset, text_files
from nanochat.data import local_sources as sources
from nanochat.data import prepare as prepare_module
from nanochat.data.dataset import Dataset
from nanochat.data.encodings import Corrupt
from nanochat.data.hub import CLIMBMIX_REPO, Unreachable, place_caches
from nanochat.data.prepare import climbmix_is_here, prepare
from nanochat.data.splits import is_held_out
from nanochat.system.environment import UserError, base_dir
from scripts import data as data_script
from tests.forked import Forked
from tests.messages import no_messages, record_messages


@pytest.fixture(autouse=True)
def base(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    return tmp_path / "base"


@pytest.fixture
def lines():
    """What was said, one string a line; pass lines.append as say."""
    return []


def texts_of(data: Dataset) -> dict[str, str]:
    pairs = [pair for split in ("train", "val") for pair in data.documents(split)]
    assert len(pairs) == len(dict(pairs)), "a document twice"
    return dict(pairs)


def write_files(folder: Path, files: dict[str, str | bytes]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def damage(path: Path) -> None:
    """Turn one byte in the middle of a file around: same size, other content."""
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 3] ^= 0xFF
    path.write_bytes(raw)


# ---------------------------------------------------------------------------------------------------------------------
# the rule of the split


@pytest.mark.parametrize("name", ["abc.py", "json/decoder.py", "a.txt#0", "ärger.md"])
def test_held_out_is_the_stated_hash(name):
    """Red when held_out uses another hash, another remainder, or the docstrings' own name."""
    expected = int.from_bytes(hashlib.sha256(name.encode()).digest(), "big") % 10 == 0
    assert is_held_out(name) == expected == is_held_out(f"{name}#docstrings")


def test_a_tenth_is_held_out():
    assert 0.08 < sum(is_held_out(f"file#{i}") for i in range(5000)) / 5000 < 0.12


# ---------------------------------------------------------------------------------------------------------------------
# the standard library and the packages


def test_stdlib_follows_its_rules(lines):
    """The corpus equals one found by pathlib with the rules written out again.

    Red when a name leaves STDLIB_EXCLUDED, when at_least=200 goes, or when _walk does not sort.
    """
    with record_messages(lines):
        data = prepare("stdlib")
    root = Path(sysconfig.get_path("stdlib"))
    expected = {}
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).parts
        folders = "test tests ensurepip lib2to3 idlelib tkinter distutils encodings pydoc_data site-packages".split()
        if {*folders, "dist-packages", "turtledemo", "__pycache__"} & set(parts):
            continue
        if path.name == "turtle.py" or path.name.startswith("_sysconfigdata") or path.stat().st_size < 200:
            continue
        expected["/".join(parts)] = path.read_bytes()
    assert {name: text.encode() for name, text in texts_of(data).items()} == expected
    for split in ("train", "val"):
        names = [name for name, _ in data.documents(split)]
        assert names == sorted(name for name in expected if is_held_out(name) == (split == "val"))
        assert data.text_bytes(split) == sum(len(expected[name]) for name in names)
        assert data.num_documents(split) == len(names)
    assert data.fingerprint["files"] == len(expected)
    assert data.fingerprint["bytes"] == sum(map(len, expected.values()))
    if sys.version_info[:3] == (3, 11, 7):
        assert [data.num_documents(s) for s in ("train", "val")] == [330, 42]
        assert [data.text_bytes(s) for s in ("train", "val")] == [6_781_250, 893_360]


def test_prepared_once(lines, base):
    """Red when open_or_prepare does not look for the state: the second call would write again and say so."""
    with record_messages(lines):
        first = prepare("stdlib")
    said, written = len(lines), (first.directory / "manifest.json").stat().st_mtime_ns
    with record_messages(lines):
        again = prepare("stdlib")
    assert again.directory == first.directory == base / "data" / "stdlib"
    assert again.manifest == first.manifest
    assert len(lines) == said
    assert (first.directory / "manifest.json").stat().st_mtime_ns == written


def test_an_interpreter_without_sources(tmp_path, monkeypatch):
    """Red when stdlib() takes LEAST_BYTES: a zipped interpreter would train on next to nothing."""
    lib = write_files(tmp_path / "lib", {f"m{i}.py": "x = 1  # a module\n" * 100 for i in range(100)})
    monkeypatch.setattr(sources.sysconfig, "get_path", lambda name: str(lib))
    with pytest.raises(UserError, match=r"100 files with 180000 bytes.*2000000 needed.*--data=FOLDER"):
        prepare("stdlib")
    assert list((base_dir() / "data").iterdir()) == []


def test_packages_have_sources_and_docstrings(tmp_path, monkeypatch):
    """A stand-in distribution with the cases of the rules; the closure itself is compared below.

    Red when docstrings are not de-duplicated, when at_most=1_000_000 goes, or when PACKAGES_EXCLUDED is emptied.
    """
    long = ("A docstring that says much. " * 10).strip()
    module = f'"""{long}"""\n\ndef f():\n    """short"""\n\nclass A:\n    """{long}"""\n'
    other = f'def g():\n    r"""{long}"""\n\ndef h():\n    """Other. {long}"""\n'
    site = write_files(
        tmp_path / "site",
        {
            "pkg/a.py": module,
            "pkg/b.py": other,
            "pkg/tests/t.py": module,
            "pkg/_vendor/v.py": module,
            "pkg/test_x.py": module,
            "pkg/huge.py": "x = 1\n" * 200_000,
            "pkg/tiny.py": "x = 1\n",
            "pkg/python2.py": "print 'no longer Python'\n" * 20 + f'"""{long}"""\n',
        },
    )

    files = [path.relative_to(site) for path in site.rglob("*.py")]
    distribution = SimpleNamespace(files=files, locate_file=lambda file: site / file)
    monkeypatch.setattr(sources, "_closure", lambda own: [distribution])
    monkeypatch.setattr(sources, "_stdlib_files", lambda: [("os.py", Path(os.__file__))])
    monkeypatch.setattr(sources, "LEAST_STDLIB_BYTES", 1000)
    monkeypatch.setattr(prepare_module, "is_held_out", lambda name: name == "os.py")
    monkeypatch.setattr(prepare_module, "is_sane", lambda sizes: True)
    found = texts_of(prepare("packages"))
    assert sorted(found) == [
        "os.py",
        "pkg/a.py",
        "pkg/a.py#docstrings",
        "pkg/b.py",
        "pkg/b.py#docstrings",
        "pkg/python2.py",
    ]
    assert found["pkg/a.py#docstrings"] == long + "\n"  # once, though it is there twice
    assert found["pkg/b.py#docstrings"] == f"Other. {long}\n"


def test_packages_drop_held_out_copies(tmp_path, monkeypatch, lines):
    """A held-out module equal to one of training is skipped and counted, another one stays.

    Red without drop_copies in packages(), or when the copy of training goes instead.
    """
    files = {f"pkg/m{i}.py": f"x = {i}  # a module\n" * 100 for i in range(40)}
    outside = [name for name in files if is_held_out(name)]
    files[outside[0]] = files[next(name for name in files if not is_held_out(name))]
    site = write_files(tmp_path / "site", files)
    found = [path.relative_to(site) for path in site.rglob("*.py")]
    distribution = SimpleNamespace(files=found, locate_file=lambda file: site / file)
    monkeypatch.setattr(sources, "_closure", lambda own: [distribution])
    monkeypatch.setattr(sources, "_stdlib_files", lambda: [])
    monkeypatch.setattr(sources, "LEAST_STDLIB_BYTES", 1000)
    with record_messages(lines):
        data = prepare("packages")
    assert [name for name, _ in data.documents("val")] == sorted(outside[1:])
    assert len(outside) > 1
    assert data.num_documents("train") == 40 - len(outside)
    assert data.manifest["left_out"] == {"held-out equal to a training document": 1}
    assert data.verify() == 2
    assert "1 held-out equal to a training document" in lines[-1]


def test_packages_closure_is_that_of_pip():
    """Every requirement of a found distribution is found too, optional extras are not.

    Red when _closure does not put what it finds on its list, or evaluates markers with an extra.
    """
    from importlib import metadata

    from packaging.requirements import Requirement

    found = {d.metadata["Name"].lower().replace("_", "-") for d in sources._closure(metadata.distribution("nanochat"))}
    assert {"torch", "numpy", "datasets", "rich", "pygments", "sympy"} <= found  # pygments through rich, sympy: torch
    assert not {"nanochat", "pytest", "hypothesis", "ruff"} & found  # ours, and those of our dev extra
    for name in found:
        for requirement in map(Requirement, metadata.requires(name) or ()):
            if requirement.marker is None:
                assert requirement.name.lower().replace("_", "-").replace(".", "-") in found


def test_packages_without_installation(monkeypatch):
    from importlib import metadata

    def absent(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", absent)
    with pytest.raises(UserError, match="pip install"):
        prepare("packages")


# ---------------------------------------------------------------------------------------------------------------------
# files and folders


def mixed_folder(folder: Path) -> tuple[Path, dict[str, str]]:
    """A folder of every kind of file, and the documents it should give."""
    documents = {f"part{i % 3}/text{i:03d}.txt": f"text {i}\r\n" * 60 for i in range(40)}
    documents |= {"top.MD": "# heading\n" * 40, "code/x.py": "x = 1\n" * 40, "ünï.txt": "\ufeffünï " * 40}
    write_files(folder, documents)
    rows = [f"row {i} of jsonl\n" * 20 for i in range(30)]
    write_files(folder, {"rows.jsonl": "".join(json.dumps({"text": row, "n": 1}) + "\n" for row in rows)})
    documents |= {f"rows.jsonl#{i}": row for i, row in enumerate(rows)}
    table = pa.table({"other": list(range(30)), "text": [f"row {i} of parquet " * 20 for i in range(30)]})
    pq.write_table(table, folder / "part0" / "rows.parquet", row_group_size=7)
    documents |= {f"part0/rows.parquet#{i}": f"row {i} of parquet " * 20 for i in range(30)}
    documents["ünï.txt"] = documents["ünï.txt"].removeprefix("\ufeff")
    write_files(folder, {"picture.png": b"\x89PNG", ".git/x.py": "hidden", ".hidden.txt": "hidden", "empty.txt": ""})
    write_files(folder, {"latin.txt": "Stra\u00dfe\n".encode("latin-1") * 50, "blank.md": " \n\n"})
    return folder, documents


def test_folder_of_every_kind_of_file(tmp_path, lines):
    """Texts are kept byte for byte (line ends) but for a BOM, rows are named path#row, the rest is counted.

    Red when a file is opened in text mode, when rows are split by their file's name, or when hidden ones are read.
    """
    folder, expected = mixed_folder(tmp_path / "my texts!")
    with record_messages(lines):
        data = prepare(str(folder))
    assert texts_of(data) == expected
    assert data.name.startswith("my-texts-")
    assert data.directory.name == data.name
    assert {name for name, _ in data.documents("val")} == {name for name in expected if is_held_out(name)}
    assert data.manifest["left_out"] == {"empty": 2, "undecodable": 1, "hidden": 2, "of other kinds": 1}
    assert "1 undecodable" in lines[-1]
    assert "data: latin.txt is not UTF-8 at byte 4, looks like latin-1" in "\n".join(lines)


def test_a_folder_elsewhere_has_the_same_fingerprint(tmp_path, tiny_corpus):
    """Red when the fingerprint takes in the path, a time, or the parquet file's own bytes."""
    copy = write_files(
        tmp_path / tiny_corpus.name,
        {p.relative_to(tiny_corpus).as_posix(): p.read_bytes() for p in tiny_corpus.rglob("*.py")},
    )
    one, two = prepare(str(tiny_corpus)), prepare(str(copy))
    assert one.directory != two.directory
    assert one.fingerprint == two.fingerprint


def test_datasets_of_text_stay_what_they_were(tmp_path):
    """Keys and fingerprint as they were before datasets could hold sounds: checkpoints of text name them.

    Red when an entry or manifest of text gains a key, or _make_fingerprint hashes anything more.
    """
    files = {f"doc_{i}.txt": f"line {i} of a document\n" * 40 for i in range(40)}
    rows = "".join(json.dumps({"text": f"row {i} " * 30}) + "\n" for i in range(60))
    data = prepare(str(write_files(tmp_path / "pinned", {**files, "sub/rows.jsonl": rows, "empty.txt": " "})))
    assert data.fingerprint["sha256"] == "58e9c48fd124661434390659edc08e02dc392b6ebe650c84f40de084e14dcd55"
    assert list(data.manifest) == ["name", "source", "licence", "fingerprint", "state", "left_out", "files"]
    for entry in data.manifest["files"]:
        assert list(entry) == ["name", "split", "size", "sha256", "documents", "text_bytes", "text_sha256"]
    assert data.codec is None
    for shard in data.shards("val"):
        assert list(data.read_clips(shard)) == [(name, text, None, None) for name, text in data.read(shard)]


def test_a_changed_folder_is_prepared_again(tmp_path, lines):
    """A changed file gives a new version, the old one stays; a touched file gives the old one.

    Red when _stat_all leaves out size and time (never noticed), or when `same` is dropped (a version for a touch).
    """
    folder, _ = mixed_folder(tmp_path / "texts")
    with record_messages(lines):
        first = prepare(str(folder))
    changed = folder / "part0" / "text000.txt"
    old = changed.read_bytes()
    changed.write_text("something else\n" * 20)
    with record_messages(lines):
        second = prepare(str(folder))
    assert any("changed since it was prepared" in line for line in lines)
    assert second.directory != first.directory
    assert second.fingerprint["sha256"] != first.fingerprint["sha256"]
    assert texts_of(second)["part0/text000.txt"] == "something else\n" * 20
    assert texts_of(first)["part0/text000.txt"] == old.decode()
    changed.write_bytes(old)
    with record_messages(lines):
        third = prepare(str(folder))
    assert third.directory == first.directory
    assert third.fingerprint == first.fingerprint
    with no_messages():
        assert prepare(str(folder)).directory == first.directory


def test_single_text_file_is_read_in_blocks(tmp_path):
    """Blocks are the file, end at a blank line, and have about 4 KB. Red when _blocks drops its last block."""
    paragraphs = [f"Paragraph {i}.\n" + "It goes on and on. " * (i % 40) + "\n\n" for i in range(400)]
    path = write_files(tmp_path, {"book.txt": "".join(paragraphs)}) / "book.txt"
    data = prepare(str(path))
    documents = sorted(texts_of(data).items(), key=lambda pair: int(pair[0].split("#")[1]))
    assert [name for name, _ in documents] == [f"book.txt#{i}" for i in range(len(documents))]
    assert "".join(text for _, text in documents) == path.read_text()
    for _, text in documents[:-1]:
        assert 4096 <= len(text) < 6000
        assert text.endswith("\n\n")


@hypothesis.given(st.lists(st.sampled_from(["\n", "a\n", "b" * 5000 + "\n", "c" * 900 + "\r\n", "\r\n"]), max_size=60))
def test_blocks_lose_nothing(tmp_path_factory, pieces):
    path = tmp_path_factory.getbasetemp() / "blocks.txt"
    path.write_bytes("".join(pieces).encode())
    blocks = list(text_files.read_blocks(path))
    assert b"".join(blocks) == path.read_bytes()
    assert all(len(block) < 16384 + 5001 for block in blocks)


def test_shards_are_cut_and_numbered(tmp_path, monkeypatch, tiny_corpus):
    """More text than one shard: several, in path order. Red when _write_shards never flushes before the end."""
    monkeypatch.setattr(prepare_module, "SHARD_BYTES", 50_000)
    data = prepare(str(tiny_corpus))
    names = [path.name for path in data.shards("train")]
    assert names == [f"shard_{i:05d}.parquet" for i in range(len(names))]
    assert len(names) > 2
    order = [name for name, _ in data.documents("train")]
    assert order == sorted(order)


def row_file(path: Path, rows: list) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_a_column_of_files_without_columns_is_said(tiny_corpus):
    """Red without the note in sources.plan_path()."""
    lines: list[str] = []
    with record_messages(lines):
        data = prepare(str(tiny_corpus), column="body")
    assert "data: note: data_column='body' has no effect: none of the 60 files has columns" in lines
    assert data.num_documents("train") + data.num_documents("val") == 60


def test_jsonl_rows(tmp_path):
    """Another column; null and blank lines keep their row numbers; a lone surrogate is counted, not fatal."""
    rows = [{"body": f"document {i} " * 30, "text": 1} for i in range(60)]
    rows[3]["body"], rows[7]["body"] = None, "\ud800 broken"
    data = prepare(row_file(tmp_path / "a.jsonl", rows), column="body")
    assert texts_of(data) == {f"a.jsonl#{i}": row["body"] for i, row in enumerate(rows) if i not in (3, 7)}
    assert data.manifest["left_out"] == {"empty": 1, "undecodable": 1}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"text": "a"}\n{"text": \n', "line 2 is not JSON"),
        ('["text"]\n', "line 1 is not a JSON object"),
        ('{"body": "a"}\n', "no column 'text'.*--data_column.*body"),
        ('{"text": 7}\n', "holds int, not text"),
        ("[" * 100_000, "line 1 is not JSON"),
        ('{"text": "a\0b"}\n', "line 1 is not JSON"),
        (b"\x89PNG\r\n\x1a\n\0\0\0", r"bad\.jsonl: binary data: NUL"),
    ],
)
def test_bad_jsonl(tmp_path, content, words):
    with pytest.raises(UserError, match=words):
        prepare(str(write_files(tmp_path, {"bad.jsonl": content}) / "bad.jsonl"))
    assert list((base_dir() / "data").iterdir()) == []


def test_bad_parquet(tmp_path):
    pq.write_table(pa.table({"body": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"no column 'text'.*body"):
        prepare(str(tmp_path / "a.parquet"))
    write_files(tmp_path, {"b.parquet": b"PAR1 but not really"})
    with pytest.raises(Corrupt, match=r"b\.parquet cannot be read"):
        prepare(str(tmp_path / "b.parquet"))


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({}, "no text found: 0 files"),
        (
            {"a.png": b"\x89", "b.Z": "1,2"},
            r"no text found: 2 files not read: 1 \.png \(a\.png\), 1 \.z \(b\.Z\); what",
        ),
        ({"a.txt": ""}, r"1 files with 0 bytes of text \(skipped: 1 empty\)"),
        ({f"{i}.txt": "little" for i in range(20)}, "too little text: 20 files with 120 bytes"),
    ],
)
def test_folders_without_enough_text(tmp_path, files, words):
    """One counted line, and nothing left on disk. Red when _check_enough is not called."""
    folder = tmp_path / "few"
    folder.mkdir()
    with pytest.raises(UserError, match=words) as caught:
        prepare(str(write_files(folder, files)))
    assert "\n" not in str(caught.value)
    assert not (base_dir() / "data").exists() or list((base_dir() / "data").iterdir()) == []


@pytest.mark.parametrize(
    ("source", "words"),
    [("stdlb", "did you mean 'stdlib'"), ("/no/such/place", "no such file or folder; one of"), ("hf:", "lacks")],
)
def test_unknown_source(source, words):
    with pytest.raises(UserError, match=words):
        prepare(source)


def test_a_file_of_another_kind(tmp_path):
    with pytest.raises(UserError, match=r"cannot read \.html: one of \.txt"):
        prepare(str(write_files(tmp_path, {"page.html": "<p>"}) / "page.html"))


def test_unreadable_file_is_skipped_only_when_asked(tmp_path, lines):
    """Named and fatal, or named and counted: a file is skipped whole, a row alone; asking once lasts for once.

    Red when skip_corrupt is not part of the folder's state, when _read_files does not read a file through first, or
    when Rows.refuse always raises.
    """
    folder, expected = mixed_folder(tmp_path / "texts")
    whole = (folder / "part0" / "rows.parquet").read_bytes()
    (folder / "part0" / "rows.parquet").write_bytes(whole[: len(whole) // 2])
    write_files(folder, {"bad.jsonl": '{"text": "good row"}\n{"text": \n'})
    with pytest.raises(Corrupt, match=r"bad\.jsonl line 2"), record_messages(lines):
        prepare(str(folder))
    with record_messages(lines):
        data = prepare(str(folder), skip_corrupt=True)
    usable = {name: text for name, text in expected.items() if "rows.parquet" not in name}
    assert texts_of(data) == usable | {"bad.jsonl#0": "good row"}
    assert data.manifest["left_out"]["corrupt"] == data.manifest["left_out"]["corrupt rows"] == 1
    assert any("bad.jsonl line 2" in line for line in lines)
    assert any("rows.parquet cannot" in line for line in lines)
    with pytest.raises(Corrupt), record_messages(lines):
        prepare(str(folder))


# ---------------------------------------------------------------------------------------------------------------------
# damage to what was prepared


@pytest.fixture
def many_shards(monkeypatch, tiny_corpus) -> Dataset:
    monkeypatch.setattr(prepare_module, "SHARD_BYTES", 50_000)
    return prepare(str(tiny_corpus))


@pytest.mark.parametrize("harm", ["cut", "gone", "flipped"])
def test_corrupt_shard(many_shards, lines, harm):
    """Named and fatal; under skip_corrupt it alone is missing, and counted.

    Red when entries() does not compare sizes (cut), or read() does not turn pyarrow's error into Corrupt (flipped).
    """
    victim = many_shards.shards("train")[1]
    lost = {name for name, _ in dataset.read_shard(victim)}
    everything = texts_of(many_shards)
    if harm == "flipped":
        damage(victim)
    elif harm == "cut":
        victim.write_bytes(victim.read_bytes()[:-100])
    else:
        victim.unlink()
    with pytest.raises(Corrupt, match=r"shard_00001\.parquet.*--skip_corrupt"):
        texts_of(many_shards) if harm == "flipped" else many_shards.shards("train")
    with record_messages(lines):
        tolerant = Dataset(many_shards.directory, many_shards.manifest, skip_corrupt=True)
        found = texts_of(tolerant)
    assert found == {name: text for name, text in everything.items() if name not in lost}
    assert list(tolerant.skipped) == ["shard_00001.parquet"]
    assert len(lines) == 1
    assert "skipped" in lines[0]
    assert victim not in tolerant.shards("train")
    assert tolerant.text_bytes("train") == sum(len(text.encode()) for _, text in tolerant.documents("train"))


def test_verify_rehashes(many_shards):
    """A flipped byte keeps the size and is found by --verify. Red when verify() compares a hash with itself."""
    assert many_shards.verify() == len(many_shards.shards("train")) + len(many_shards.shards("val"))
    damage(many_shards.shards("val")[0])
    with pytest.raises(Corrupt, match=r"val_00000\.parquet does not have the sha256"):
        many_shards.verify()


def test_unreadable_manifest(many_shards, tiny_corpus):
    for content in ("{", "[]", '{"files": 3}'):
        (many_shards.directory / "manifest.json").write_text(content)
        with pytest.raises(UserError, match=r"manifest\.json.*delete"):
            prepare(str(tiny_corpus))


@pytest.mark.parametrize("moment", ["while writing shards", "before the rename"])
def test_a_kill_leaves_nothing_that_counts(tmp_path, tiny_corpus, moment, base):
    """A process that ends without cleaning up leaves only a hidden folder; the next one prepares everything.

    Red when open_or_prepare writes into the target folder instead of the scratch folder.
    """
    patch = {"while writing shards": "prepare._describe_shard", "before the rename": "prepare.commit_folder"}[moment]
    code = f"import os, sys\nfrom nanochat.data import prepare\n{patch} = lambda *a: os._exit(9)\n"
    code += "prepare.prepare(sys.argv[1])\n"
    process = Forked([sys.executable, "-c", code, tiny_corpus])
    assert process.wait(timeout=60) == 9, process.output()
    left = list((base / "data").iterdir())
    assert len(left) == 1
    assert left[0].name.startswith(".")
    assert left[0].name.endswith(".tmp")
    assert len(texts_of(prepare(str(tiny_corpus)))) == 60
    assert not left[0].exists()  # its owner is dead: it goes, however young it is


def test_two_processes_make_one_dataset(tiny_corpus, monkeypatch, base):
    """Another process finishes first: its folder is taken. Red when open_or_prepare does not look again at the end."""
    write, others = prepare_module._write_shards, []

    def overtaken(*args):
        entries = write(*args)
        if not others:
            others.append("now running")
            others.append(prepare(str(tiny_corpus)))
        return entries

    monkeypatch.setattr(prepare_module, "_write_shards", overtaken)
    mine = prepare(str(tiny_corpus))
    assert mine.directory == others[1].directory
    assert mine.fingerprint == others[1].fingerprint
    assert len(list((base / "data").iterdir())) == 1


def test_unusable_base_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(write_files(tmp_path, {"file": "x"}) / "file"))
    with pytest.raises(UserError, match=r"NANOCHAT_BASE_DIR=.* is a file: name a folder"):
        prepare("stdlib")


def test_full_disk_leaves_nothing(tiny_corpus, monkeypatch, base):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(prepare_module.pq, "write_table", full)
    with pytest.raises(OSError, match="No space left"):
        prepare(str(tiny_corpus))
    assert list((base / "data").iterdir()) == []


# ---------------------------------------------------------------------------------------------------------------------
# the hub


class Hub:
    """A local stand-in for the hub: climbmix shards over HTTP with ETag, commit and ranges, and faults on demand."""

    def __init__(self):
        self.requests: list[tuple[str, str, str | None]] = []  # method, file, range
        self.cut: dict[str, int] = {}  # file -> bytes after which its connections die
        self.altered: set[str] = set()  # files whose bytes do not have the announced sha256
        self.longer: dict[str, int] = {}  # file -> MB that follow its bytes, without a Content-Length
        self.announced: dict[str, int] = {}  # file -> size that the answer to HEAD tells
        self.files: dict[str, bytes] = {}
        self.surplus = 0  # MB sent beyond the files
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self):
                self.answer(send=False)

            def do_GET(self):
                self.answer(send=True)

            def answer(self, send: bool) -> None:
                folder, _, name = self.path.rpartition("/")
                hub.requests.append((self.command, name, self.headers.get("Range")))
                if folder != f"/datasets/{CLIMBMIX_REPO}/resolve/main":
                    self.send_response(404)
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                content = hub.content(name)
                etag = hashlib.sha256(content).hexdigest()
                if name in hub.altered:
                    content = content[:-1] + b"?"
                start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").split("-")[0])
                self.send_response(206 if start else 200)
                self.send_header("ETag", f'"{etag}"')
                self.send_header("X-Repo-Commit", "0" * 40)
                self.send_header("Accept-Ranges", "bytes")
                size = len(content) if send else hub.announced.get(name, len(content))
                if not (send and name in hub.longer):
                    self.send_header("Content-Length", str(size - start))
                if start:
                    self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
                self.end_headers()
                if send:
                    self.wfile.write(content[start : hub.cut.get(name)])
                    with suppress(ConnectionError):  # the client gave up
                        for _ in range(hub.longer.get(name, 0)):
                            self.wfile.write(bytes(1_000_000))
                            hub.surplus += 1
                    self.close_connection = name in hub.cut or name in hub.longer

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def content(self, name: str) -> bytes:
        if name not in self.files:
            sink = pa.BufferOutputStream()
            texts = [f"{name} document {i}: {hashlib.sha256(f'{name}{i}'.encode()).hexdigest()}" for i in range(300)]
            pq.write_table(pa.table({"text": texts}), sink, row_group_size=100)
            self.files[name] = sink.getvalue().to_pybytes()
        return self.files[name]

    def fetched(self) -> list[str]:
        return sorted(name for method, name, _ in self.requests if method == "GET" and name)


@pytest.fixture
def hub(monkeypatch):
    served = Hub()
    monkeypatch.setenv("HF_ENDPOINT", served.url)
    monkeypatch.setenv("HF_HOME", str(base_dir() / "huggingface"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    yield served
    served.server.shutdown()
    served.server.server_close()


LAST = "shard_06542.parquet"


def test_climbmix(hub, lines):
    """Shards are fetched once, the last is held out, more shards are added to those there, fewer need no network.

    Red when _climbmix holds out by name, when the fingerprint covers all downloaded shards, or fetches known ones;
    or when climbmix_is_here does not look for the files.
    """
    with record_messages(lines):
        two = prepare("climbmix", limit=2, workers=2)
    assert [path.name for path in two.shards("train")] == ["shard_00000.parquet", "shard_00001.parquet"]
    assert [path.name for path in two.shards("val")] == [LAST]
    assert two.num_documents("train") == 600
    assert next(two.documents("val"))[0] == f"{LAST}#0"
    assert two.text_bytes("val") == sum(len(text) for _, text in two.documents("val"))
    for entry in two.manifest["files"]:
        assert entry["sha256"] == hashlib.sha256(hub.content(entry["name"])).hexdigest()
    assert hub.fetched() == ["shard_00000.parquet", "shard_00001.parquet", LAST]
    assert sum(line.startswith("data: 3/3") for line in lines) == 1

    three = prepare("climbmix", limit=3)
    assert hub.fetched() == ["shard_00000.parquet", "shard_00001.parquet", "shard_00002.parquet", LAST]
    assert three.fingerprint["files"] == 4
    assert three.fingerprint != two.fingerprint
    requests = len(hub.requests)
    again = prepare("climbmix", limit=2)
    assert again.fingerprint == two.fingerprint
    assert again.verify() == 3
    assert len(hub.requests) == requests
    assert climbmix_is_here(3)
    assert not climbmix_is_here(4)
    (three.directory / "shard_00001.parquet").unlink()
    assert not climbmix_is_here(3)


def test_climbmix_goes_on_after_a_cut(hub, lines):
    """A connection that dies in the middle is one line; the next run asks only for the bytes it lacks.

    Red when _fetch opens the partial file with "wb", or when the manifest is written only at the end.
    """
    hub.cut["shard_00001.parquet"] = half = 5000
    with pytest.raises(Unreachable, match=r"the download stopped .* run again to resume"), record_messages(lines):
        prepare("climbmix", limit=2, workers=1)
    done = {entry["name"] for entry in dataset.read_manifest(base_dir() / "data" / "climbmix")["files"]}
    assert "shard_00000.parquet" in done
    assert "shard_00001.parquet" not in done
    assert not climbmix_is_here(2)
    hub.cut.clear()
    hub.requests.clear()
    with record_messages(lines):
        data = prepare("climbmix", limit=2, workers=1)
    assert data.verify() == 3
    assert "shard_00000.parquet" not in hub.fetched()
    ranges = [wanted for method, name, wanted in hub.requests if (method, name) == ("GET", "shard_00001.parquet")]
    assert ranges == [f"bytes={half}-"]


def test_climbmix_with_other_bytes_than_announced(hub):
    """Red when fetch() does not compare sha256 with the hub's, or with the record for a shard fetched again."""
    hub.altered.add(LAST)
    with pytest.raises(Corrupt, match=rf"{LAST}: downloaded sha256 \w+, the hub says"):
        prepare("climbmix", limit=1, workers=1)
    assert not (base_dir() / "data" / "climbmix" / LAST).exists()
    hub.altered.clear()
    data = prepare("climbmix", limit=1)
    assert data.verify() == 2

    data.shards("val")[0].unlink()
    hub.files[LAST] = hub.content("shard_00009.parquet")  # the hub's file changed since
    with pytest.raises(Corrupt, match="its first download says"):
        prepare("climbmix", limit=1)


def test_climbmix_sends_more_than_it_may(hub, monkeypatch):
    """An endless answer without a length is cut off at the announced size, an announced terabyte is not asked for.

    Red without the comparison in _fetch (the surplus is read to its end), or the one of announced.size.
    """
    hub.longer[LAST] = 300
    with pytest.raises(Corrupt, match=rf"{LAST}: the hub sends more than the [\d,]+ bytes allowed"):
        prepare("climbmix", limit=1, workers=1)
    assert hub.surplus < 100
    assert LAST not in {path.name for path in (base_dir() / "data" / "climbmix").iterdir()}
    assert not (base_dir() / "data" / "climbmix" / f".{LAST}.partial").exists()
    hub.longer.clear()  # else trying the second breakage fills the disk
    hub.requests.clear()
    hub.announced[LAST] = 10**12
    with pytest.raises(Corrupt, match=r"announces 1,000,000,000,000 bytes"):
        prepare("climbmix", limit=1, workers=1)
    assert LAST not in hub.fetched()
    hub.announced.clear()
    monkeypatch.setattr("nanochat.data.hub.LARGEST_SHARD", 10)
    with pytest.raises(Corrupt, match="more than any shard"):
        prepare("climbmix", limit=1, workers=1)


def test_the_hubs_caches_lie_in_the_base_folder(monkeypatch, tmp_path):
    """Unless the user placed them; a stored token is still found. Red without HF_TOKEN_PATH, or without the if."""
    for name in ("HF_HOME", "HF_TOKEN_PATH", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, "put back in the end")
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    place_caches()
    assert os.environ["HF_HOME"] == str(tmp_path / "base" / "huggingface")
    assert os.environ.pop("HF_TOKEN_PATH") == str(tmp_path / ".cache" / "huggingface" / "token")
    monkeypatch.setenv("HF_HOME", "elsewhere")
    place_caches()
    assert os.environ["HF_HOME"] == "elsewhere"
    assert "HF_TOKEN_PATH" not in os.environ


def test_climbmix_has_an_end():
    with pytest.raises(UserError, match="6542 training shards"):
        prepare("climbmix", limit=7000)


@pytest.fixture
def no_hub(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)


@pytest.mark.parametrize("source", ["climbmix", "hf:some/dataset"])
def test_no_network_is_one_line(no_hub, source):
    """Red when _probe is not called: the clients' own retries take minutes."""
    with pytest.raises(Unreachable, match=r"not here and http://127\.0\.0\.1:9 cannot be reached") as caught:
        prepare(source)
    assert "\n" not in str(caught.value)
    assert not list((base_dir() / "data").glob("[!.]*")) if (base_dir() / "data").exists() else True


@pytest.mark.parametrize("source", ["~nosuchuser/x", "x" * 300, "hf:~nosuchuser/x", "hf:" + "x" * 300])
def test_a_path_that_cannot_be_looked_up_is_one_line(source):
    """Red when path_errors_as_user_errors catches no RuntimeError (no such home) or no OSError (a name too long)."""
    with pytest.raises(UserError, match=r"^data='.* cannot be looked up \(.*\): name one that exists$"):
        prepare(source)


def test_hub_dataset_through_datasets(tmp_path, lines, monkeypatch):
    """A folder read by the datasets library as a hub dataset: streamed, cut at the limit, then found unless changed.

    Red when the limit is off by one, when a prepared dataset is streamed again, or local_state is not in the state.
    """
    folder = tmp_path / "hubset"
    folder.mkdir()
    row_file(folder / "train.jsonl", [{"body": f"document {i} " * 50} for i in range(80)])
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    source = f"hf:{folder}"
    with record_messages(lines):
        data = prepare(source, column="body", limit=50)
    found = texts_of(data)
    assert {name.rpartition("#")[2] for name in found} == {str(i) for i in range(50)}
    assert all(text == f"document {name.rpartition('#')[2]} " * 50 for name, text in found.items())
    assert {name for name, _ in data.documents("val")} == {name for name in found if is_held_out(name)}
    assert any("stopped after 50 documents" in line for line in lines)
    with no_messages():
        assert prepare(source, column="body", limit=50).fingerprint == data.fingerprint
    row_file(folder / "train.jsonl", [{"body": f"another {i} " * 50} for i in range(80)])
    changed = texts_of(prepare(source, column="body", limit=50))
    assert len(changed) == 50
    assert all(text.startswith("another") for text in changed.values())


@pytest.mark.parametrize("kind", ["Dataset", "DatasetDict"])
def test_a_dataset_saved_to_disk(tmp_path, monkeypatch, kind):
    """What save_to_disk writes is read as it is, its own test part held out. Red when load_dataset is asked for it."""
    import datasets

    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    parts = {part: [f"{part} {i} " * 50 for i in range(60)] for part in ("train", "test")}
    saved = datasets.DatasetDict({part: datasets.Dataset.from_dict({"text": texts}) for part, texts in parts.items()})
    (saved if kind == "DatasetDict" else saved["train"]).save_to_disk(tmp_path / "saved")
    data = prepare(f"hf:{tmp_path / 'saved'}")
    if kind == "DatasetDict":
        assert [text for _, text in data.documents("train")] == parts["train"]
        assert [text for _, text in data.documents("val")] == parts["test"]
    else:
        assert sorted(texts_of(data).values()) == sorted(parts["train"])
        assert 0 < data.num_documents("val") < 15


def test_a_hub_datasets_own_split(tmp_path, lines, monkeypatch):
    """Training documents are those of the training split alone, held out are those of validation, test is not read.

    Red when _open_splits gives the named split alone, or when the held-out one has no limit.
    """
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    folder = tmp_path / "hubset"
    folder.mkdir()
    for part, number in (("train", 100), ("validation", 30), ("test", 50)):
        row_file(folder / f"{part}.jsonl", [{"text": f"{part} {i} " * 40} for i in range(number)])
    with record_messages(lines):
        data = prepare(f"hf:{folder}", limit=200)
    assert [text for _, text in data.documents("train")] == [f"train {i} " * 40 for i in range(100)]
    assert [text for _, text in data.documents("val")] == [f"validation {i} " * 40 for i in range(20)]
    assert any("its own split 'validation' is held out: 23.3% of the bytes" in line for line in lines)
    with pytest.raises(UserError, match=r"no split 'valid': choose one with --data_split \(.*validation.*\)"):
        prepare(f"hf:{folder}", split="valid")


def test_unlike_files_of_a_hub_dataset(tmp_path, monkeypatch):
    """Red when the advice is not said: "Couldn't cast" names neither the file nor a way out."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    folder = tmp_path / "hubset"
    folder.mkdir()
    row_file(folder / "a.jsonl", [{"text": f"document {i} " * 40} for i in range(40)])
    row_file(folder / "b.jsonl", [{"text": f"document {i} " * 40, "n": i} for i in range(40, 80)])
    with pytest.raises(UserError, match=r"after 40 documents.*unlike columns.*: pass --data=.* without hf:"):
        prepare(f"hf:{folder}")
    assert len(texts_of(prepare(str(folder)))) == 80


def test_a_hub_dataset_has_a_limit_of_text(tmp_path, monkeypatch):
    """Red without the comparison of room."""
    folder = tmp_path / "hubset"
    folder.mkdir()
    row_file(folder / "train.jsonl", [{"text": "long " * 1000} for _ in range(20)])
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setattr("nanochat.data.hub.LARGEST_MEAN", 1000)
    with pytest.raises(UserError, match=r"over 30,000 characters in 7 documents: lower --data_limit"):
        prepare(f"hf:{folder}", limit=30)


@pytest.mark.parametrize(
    ("options", "words"), [({}, "no column 'text'.*body"), ({"column": "body", "split": "nonsense"}, "nonsense")]
)
def test_bad_hub_options(tmp_path, monkeypatch, options, words):
    folder = tmp_path / "hubset"
    folder.mkdir()
    row_file(folder / "train.jsonl", [{"body": "text"}])
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    with pytest.raises(UserError, match=words) as caught:
        prepare(f"hf:{folder}", **options)
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------------------------------------------------------------
# the script


def test_script(tiny_corpus, capsys):
    data = data_script.main([f"--data={tiny_corpus}", "--verify"])
    out = capsys.readouterr().out
    assert f"sha256 {data.fingerprint['sha256']}" in out
    assert str(data.directory) in out
    assert f"{data.num_documents('val'):>9,} documents" in out
    assert "2 shards compared" in out


def test_script_ends_with_2_and_one_line(tmp_path):
    process = Forked([sys.executable, "-m", "scripts.data", f"--data={tmp_path / 'none'}"])
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 2
    assert printed.count("\n") == 1
    assert printed.startswith("error: data=")
    assert "Traceback" not in printed
