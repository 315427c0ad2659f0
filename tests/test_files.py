"""Folders that are complete or absent."""

import os

import pytest

from nanochat.files import new_folder


def test_a_new_folder_appears_complete_and_on_the_disk(tmp_path, monkeypatch):
    """Red when the folder is renamed before a file of it is synchronised, or the parent is not synchronised after."""
    events, fsync, rename = [], os.fsync, os.rename
    monkeypatch.setattr(
        os, "fsync", lambda handle: (events.append(os.readlink(f"/proc/self/fd/{handle}")), fsync(handle))
    )
    monkeypatch.setattr(os, "rename", lambda old, new: (events.append("rename"), rename(old, new)))
    with new_folder(tmp_path / "parent" / "name") as folder:
        (folder / "file").write_text("x")
        assert not (tmp_path / "parent" / "name").exists()
    assert events == [str(folder / "file"), str(folder), "rename", str(tmp_path / "parent")]
    assert [path.name for path in (tmp_path / "parent").iterdir()] == ["name"]
    assert (tmp_path / "parent" / "name" / "file").read_text() == "x"


def test_a_new_folder_that_fails_leaves_nothing_behind(tmp_path):
    """Neither an error while it is written nor a target in use. Red without the cleaning of scratch_folder()."""
    with pytest.raises(KeyError), new_folder(tmp_path / "name") as folder:
        (folder / "file").write_text("x")
        raise KeyError
    assert not list(tmp_path.iterdir())
    (tmp_path / "name").mkdir()
    (tmp_path / "name" / "kept").write_text("x")
    with pytest.raises(OSError), new_folder(tmp_path / "name"):
        pass
    assert [path.name for path in tmp_path.rglob("*")] == ["name", "kept"]
