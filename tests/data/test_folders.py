"""What a folder holds is found once, links and loops included; our own output in it is never taken for data."""

import json
import os
import socket
from collections import Counter
from pathlib import Path

import pytest

from nanochat.config.config_file import render_config
from nanochat.config.settings import Settings
from nanochat.data import folders
from nanochat.data.encodings import Corrupt
from nanochat.data.folders import OWN_OUTPUT, find_files, find_own_output, get_suffix
from nanochat.data.prepare import prepare
from nanochat.system.environment import UserError
from tests.messages import record_messages


@pytest.fixture(autouse=True)
def base(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    return tmp_path / "base"


def write(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"the text of {name}\n" * 40)
    return folder


def names(folder: Path, **options) -> list[str]:
    return [name for name, _ in find_files(folder, **options).files]


def test_links_are_followed_once(tmp_path):
    """A linked folder and a linked file count; whatever a link reaches a second time does not, and is named.

    Red when linked folders are read before real ones (b.txt would be called a/b.txt), or identities are not compared.
    """
    elsewhere = write(tmp_path / "elsewhere", "x.txt", "deep/y.txt")
    root = write(tmp_path / "root", "real/b.txt", "c.txt")
    (root / "a").symlink_to(root / "real")
    (root / "far").symlink_to(elsewhere)
    (root / "far2").symlink_to(elsewhere / "deep")
    (root / "again.txt").symlink_to(root / "c.txt")
    (root / "other.txt").symlink_to(write(tmp_path / "third", "o.txt") / "o.txt")
    found = find_files(root)
    assert [name for name, _ in found.files] == ["c.txt", "far/deep/y.txt", "far/x.txt", "other.txt", "real/b.txt"]
    assert found.skipped == {
        "links to folders read under another name": ["a", "far2"],
        "links to files read under another name": ["again.txt"],
    }


def test_loops_end(tmp_path):
    """Links to the folder itself, to one above it, and around: each file once. Red without `above` or `entered`."""
    root = write(tmp_path / "all" / "root", "a.txt", "sub/b.txt")
    write(tmp_path / "all", "not ours.txt")
    (root / "self").symlink_to(root)
    (root / "sub" / "up").symlink_to(tmp_path / "all")
    outside = write(tmp_path / "outside", "c.txt")
    (root / "out").symlink_to(outside)
    (outside / "back").symlink_to(root / "sub")
    found = find_files(root)
    assert [name for name, _ in found.files] == ["a.txt", "out/c.txt", "sub/b.txt"]
    assert found.skipped == {
        "links to folders read under another name": ["out/back", "self"],
        "links to a folder that holds this one": ["sub/up"],
    }


def test_what_is_no_file_is_named_and_never_opened(tmp_path):
    """Broken links, links to themselves, a pipe, a socket, a link to a device. Red when a pipe is opened: it waits."""
    root = write(tmp_path / "root", "a.txt", ".hidden.txt", ".git/config.txt")
    (root / "gone.txt").symlink_to(root / "nowhere")
    (root / "me.txt").symlink_to(root / "me.txt")
    os.mkfifo(root / "pipe.txt")
    (root / "null.txt").symlink_to("/dev/null")
    short = os.open(root, os.O_RDONLY)  # a socket's path has at most 107 bytes
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(f"/proc/self/fd/{short}/socket.txt")
    os.close(short)
    found = find_files(root)
    assert [name for name, _ in found.files] == ["a.txt"]
    assert {reason: sorted(skipped) for reason, skipped in found.skipped.items()} == {
        "broken links": ["gone.txt", "me.txt"],
        "pipes, sockets or devices": ["null.txt", "pipe.txt", "socket.txt"],
        "hidden": [".git", ".hidden.txt"],
    }


def test_a_folder_that_cannot_be_listed(tmp_path, monkeypatch):
    """Refused by name like a file; under skip_corrupt named and counted. Red when the walk ignores the error."""
    root = write(tmp_path / "root", "a.txt", "locked/b.txt")
    scandir = os.scandir

    def locked(path):  # root, whom nothing stops, runs the tests of some machines
        if Path(path).name == "locked":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(folders.os, "scandir", locked)
    with pytest.raises(Corrupt, match=r"root/locked cannot be read \(Permission denied\): .*--skip_corrupt=True"):
        find_files(root)
    found = find_files(root, skip_corrupt=True)
    assert [name for name, _ in found.files] == ["a.txt"]
    assert found.skipped == {"unreadable": ["locked"]}


def test_a_folder_that_can_only_be_listed(tmp_path, monkeypatch):
    """Names alone (r--) are not enough: refused or named as a whole. Red without the look at os.X_OK."""
    root = write(tmp_path / "root", "a.txt", "listed/b.txt")
    monkeypatch.setattr(folders.os, "access", lambda path, mode: mode != os.X_OK or Path(path).name != "listed")
    with pytest.raises(Corrupt, match=r"root/listed cannot be read \(Permission denied\): .*--skip_corrupt=True"):
        find_files(root)
    found = find_files(root, skip_corrupt=True)
    assert [name for name, _ in found.files] == ["a.txt"]
    assert found.skipped == {"unreadable": ["listed"]}


def test_names_cannot_steer_a_terminal(tmp_path):
    """One line each, without control characters. Red when first_names() takes names as they are."""
    found = find_files(write(tmp_path / "root", "a\nb.pdf", "c.\x1b[2jd", "é.pdf"))
    found.choose(lambda name: False)
    assert found.describe() == [r"3 files not read: 2 .pdf (a\nb.pdf, é.pdf), 1 .\x1b[2jd (c.\x1b[2jd)"]


def test_links_to_files_of_our_own(tmp_path, base):
    """A link to a shard of a prepared dataset is our output, too. Red without in_own_output()."""
    source = write(tmp_path / "source", *(f"{i}.txt" for i in range(30)))
    shards = prepare(str(source)).shards("train")
    root = write(tmp_path / "root", "a.txt")
    (root / "linked.parquet").symlink_to(shards[0])
    found = find_files(root)
    assert [name for name, _ in found.files] == ["a.txt"]
    assert found.skipped == {folders.OWN_OUTPUT: ["linked.parquet"]}


def test_what_is_not_read_is_named_by_suffix(tmp_path):
    """One line with numbers and first names, most frequent first. Red when choose() drops what is not wanted."""
    root = write(tmp_path / "root", "a.txt", "B.TXT", "x.csv", "y.CSV", "z.csv", "t.jsonl.gz", "README", "v1.2")
    found = find_files(root)
    chosen = found.choose(lambda name: name.lower().endswith(".txt"))
    assert [name for name, _ in chosen] == ["B.TXT", "a.txt"]
    expected = (
        "6 files not read: 3 .csv (x.csv, y.CSV, ...), 1 .2 (v1.2), 1 .jsonl.gz (t.jsonl.gz), 1 no suffix (README)"
    )
    assert found.describe() == [expected]
    lines, counts = [], Counter()
    with record_messages(lines):
        found.report(counts)
    assert lines == [f"data: {expected}"]
    assert counts == {"of other kinds": 6}


@pytest.mark.parametrize(
    ("name", "suffix"),
    [("a.txt", ".txt"), ("a/b.TXT.GZ", ".txt.gz"), ("a.gz", ".gz"), ("2024.01.gz", ".gz"), ("x", "no suffix")],
)
def test_suffix_of(name, suffix):
    assert get_suffix(name) == suffix


# ---------------------------------------------------------------------------------------------------------------------
# our own output


def test_the_base_folder_inside_the_source(tmp_path, monkeypatch):
    """Prepared twice each with three base folders in it, the last one linked: the same documents all the time.

    Red when refuse() does not ask own_output (earlier base folders), or does not compare with base_dir() (the text in
    the present one).
    """
    root = write(tmp_path / "proj", *(f"{i}.txt" for i in range(40)))
    (tmp_path / "link").symlink_to(root / "new")
    fingerprints, lines = [], []
    for place in (root / "out", root / "deep" / "er" / "out", tmp_path / "link"):
        monkeypatch.setenv("NANOCHAT_BASE_DIR", str(place))
        if place.is_symlink():
            write(root / "new", "scratch.txt")
        with record_messages(lines):
            fingerprints += [prepare(str(root)).fingerprint for _ in range(2)]
    assert fingerprints == fingerprints[:1] * 6
    assert fingerprints[0]["files"] == 40
    assert any(f"3 skipped, {OWN_OUTPUT}: deep/er/out/data/proj-" in line for line in lines), lines


def run_folder(folder: Path) -> Path:
    """What a training leaves: settings, log, a step with its tokenizer."""
    write(folder, "step_000004/state.json", "step_000004/tokenizer/ranks.tiktoken", "step_000004/tokenizer/tokens.txt")
    (folder / "config.py").write_text(render_config(Settings()))
    (folder / "metrics.jsonl").write_text(json.dumps({"step": 0, "time": 1.5, "event": "start"}) + "\n")
    return folder


def test_output_of_earlier_runs(tmp_path):
    """A base folder that is no longer the base folder, pieces of one, an export: skipped and said; notes are read.

    Red when a marker goes from MARKERS, or _own_entries does not look for OUTPUT_FOLDERS.
    """
    root = write(tmp_path / "root", "a.txt", "old/notes.txt", "old/base_eval/d4_000004.csv", "old/compiled/kernel.py")
    write(root, "old/eval_bundle/core.yaml", "old/eval_bundle/eval_meta_data.csv", "old/eval_bundle/x.jsonl")
    run_folder(root / "old" / "base_checkpoints" / "d4")
    write(root, "export/config.json", "export/hf_modeling.py", "export/README.md")
    write(root, "sounds/listen.html", "sounds/a.wav", "tok/ranks.tiktoken", "tok/token_bytes.npy")
    run_folder(root / "copied run")
    write(root, "base_eval/mine.txt")  # no base folder: somebody else's
    found = find_files(root)
    assert [name for name, _ in found.files] == ["a.txt", "base_eval/mine.txt", "old/notes.txt"]
    assert sorted(found.skipped.pop(OWN_OUTPUT)) == [
        "copied run",
        "export",
        "old/base_checkpoints",
        "old/base_eval",
        "old/compiled",
        "old/eval_bundle",
        "sounds",
        "tok",
    ]
    assert not found.skipped


def test_own_files_at_the_top(tmp_path):
    """The wizard's config.py and a metrics.jsonl are ours; files of the same names of somebody else are not."""
    root = write(tmp_path / "root", "a.txt", "other/config.py", "other/metrics.jsonl")
    (root / "config.py").write_text(render_config(Settings()))
    (root / "metrics.jsonl").write_text(json.dumps({"step": 0, "time": 1.5, "event": "start"}) + "\n")
    assert names(root) == ["a.txt", "other/config.py", "other/metrics.jsonl"]


def test_a_source_that_is_our_output_is_refused(tmp_path, base):
    """A prepared dataset, a part of the base folder, a run; a folder of the user's in the base folder is read.

    Red when find_files does not look at root itself.
    """
    own = write(base / "my texts", *(f"{i}.txt" for i in range(40)))
    data = prepare(str(own))
    write(base, "base_eval/d4_000004.csv")
    run_folder(base / "base_checkpoints" / "d4")
    for folder in (data.directory, base / "base_eval", base / "base_checkpoints" / "d4"):
        assert find_own_output(folder)
        with pytest.raises(UserError, match=r"is nanochat's own output \(.*\): pass the text that it was made from"):
            prepare(str(folder))
    write(base, "top.txt", "data/of mine.txt")
    assert names(base) == sorted(["top.txt", "data/of mine.txt", *(f"my texts/{i}.txt" for i in range(40))])
