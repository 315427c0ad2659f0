"""The data of a checkpoint is found again by its fingerprint, whatever became of its source; other data is refused."""

import json
import os
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat.checkpoint_files import step_dir
from nanochat.config.settings import Settings
from nanochat.data import prepare as prepare_module
from nanochat.data.prepare import prepare
from nanochat.data.trained_data import find_prepared, is_same, replace_data
from nanochat.data_pipeline import open_trained_data, prepare_for
from nanochat.system.environment import UserError
from scripts import base_eval, base_train
from tests.messages import record_messages
from tests.tiny_run import TINY, exit_code, flags, losses, tag_dir

FIRST, ALL = dict(num_iterations=2, warmdown_ratio=0), dict(num_iterations=4, warmdown_ratio=0)


def run(tag: str, *words: str, **settings) -> dict:
    return base_train.main(flags({**TINY, "warmdown_ratio": 0, **settings, "model_tag": tag}) + list(words))


@pytest.fixture
def source(corpus, tmp_path) -> Path:
    """A copy of the corpus that a test may spoil; its documents are not another test's."""
    copy = shutil.copytree(corpus, tmp_path / f"source-{tmp_path.name}")
    (copy / "story 0.txt").write_text(f"{tmp_path.name}\n" * 30)
    return copy


def add_file(source: Path) -> None:
    (source / "a late log.txt").write_text("one more line of text\n" * 50)


def rewrite(source: Path) -> None:
    for path in source.iterdir():
        path.write_text(path.read_text().upper())


def make_unreadable(source: Path) -> None:
    shutil.rmtree(source)
    source.write_bytes(b"\0")  # neither a folder nor text: as unreadable for root as for anybody


@pytest.mark.parametrize("spoil", [add_file, rewrite, shutil.rmtree, make_unreadable])
def test_a_run_resumes_with_its_shards_whatever_became_of_the_source(train, source, capsys, monkeypatch, spoil):
    """The losses are those of a run without interruption; nothing is prepared; one line says what is taken.

    Red when prepare_data() calls prepare_for() on resume, or open_trained_data() looks at the source first.
    """
    tag = spoil.__name__
    train(f"{tag}-control", data=source, **ALL)
    train(tag, data=source, **FIRST)
    spoil(source)
    monkeypatch.setattr(prepare_module, "_write_shards", None)
    capsys.readouterr()
    train(tag, "--resume", data=source, **ALL)
    assert losses(tag) == losses(f"{tag}-control")
    [line] = [line for line in capsys.readouterr().out.splitlines() if "taking the shards" in line]
    assert str(source) in line
    assert ("cannot be read now" if tag in ("rmtree", "make_unreadable") else "changed") in line


def test_a_relative_path_resumes_from_another_folder(train, source, tmp_path, monkeypatch):
    """Red as above."""
    monkeypatch.chdir(source.parent)
    train("relative", data=source.name, **FIRST)
    monkeypatch.chdir("/")
    assert train("relative", "--resume", data=source.name, **ALL)["step"] == 4
    assert base_eval.main(["--model-tag=relative", "--eval=bpb"])["bpb"]["val"] > 0


def test_moved_data_is_the_same_and_other_data_is_refused(train, source, capsys, monkeypatch):
    """--data=NEW on resume: equal documents resume, with the tokens at hand; others are refused in words, code 2.

    Red without PLACE in resumed_settings(), or without check_same() in open_resumed_data().
    """
    train("moved", data=source, **FIRST)
    moved = source.rename(source.with_name("elsewhere"))
    assert train("moved", "--resume", data=moved, **ALL)["step"] == 4
    state = json.loads((step_dir(tag_dir("moved"), 4) / "state.json").read_text())
    assert state["settings"]["data"] == str(moved)
    other = shutil.copytree(moved, source.with_name("other"))
    add_file(other)
    capsys.readouterr()
    words = flags({**TINY, "warmdown_ratio": 0, "model_tag": "moved", "data": other, "num_iterations": 6})
    assert exit_code(lambda: base_train.main([*words, "--resume"])) == 2
    said = capsys.readouterr().err
    now = prepare(str(other)).fingerprint["sha256"]
    assert said.count("\n") == 1
    assert "{" not in said
    for part in (state["data_fingerprint"]["sha256"][:8], now[:8], str(other), "--data=PATH", "--model_tag=NAME"):
        assert part in said
    with pytest.raises(UserError, match="cannot change data='stdlib'"):
        train("moved", "--resume", data="stdlib", **ALL)
    with pytest.raises(UserError, match="cannot change data_column='body'"):
        run("moved", "--resume", data_column="body")


def test_without_shards_changed_data_is_refused_before_tokenising(train, source, capsys, monkeypatch):
    """Shards gone and the source changed, or gone too: one line with source, version and both hashes, and a way out.

    Red when the comparison is left to restore_progress(), behind the token store.
    """
    train("shardless", data=source, **FIRST)
    where = prepare(str(source)).directory
    sha256 = prepare(str(source)).fingerprint["sha256"][:8]
    shutil.rmtree(where)
    add_file(source)
    monkeypatch.setattr("nanochat.data_pipeline.TokenStore", None)
    with pytest.raises(UserError, match=rf"trained on .*\(text, sha256 {sha256}\), data=.* now is .*--data=PATH"):
        train("shardless", "--resume", data=source, **ALL)
    shutil.rmtree(source)
    with pytest.raises(UserError, match=rf"no such file.*no shards prepared from .*{sha256}.*--data=PATH"):
        train("shardless", "--resume", data=source, **ALL)


def test_equal_texts_under_another_version_are_the_same(train, source):
    """A new release of Python names another version of the stdlib; what counts is the sha256.

    Red when is_same() compares the whole fingerprint.
    """
    train("version", data=source, **FIRST)
    manifest = prepare(str(source)).directory / "manifest.json"
    renamed = json.loads(manifest.read_text())
    renamed["fingerprint"] |= {"version": "9.9.9", "files": 1}
    manifest.write_text(json.dumps(renamed))
    assert train("version", "--resume", data=source, **ALL)["step"] == 4


def test_evaluation_takes_the_shards_of_the_training(train, source, capsys):
    """Red when base_eval prepares what its settings name: there is nothing any more."""
    train("evaluated", data=source, **FIRST)
    before = base_eval.main(["--model-tag=evaluated", "--eval=bpb"])["bpb"]["val"]
    shutil.rmtree(source)
    capsys.readouterr()
    found = base_eval.main(["--model-tag=evaluated", "--eval=bpb"])
    assert found["bpb"]["val"] == before
    said = capsys.readouterr().out
    assert "cannot be read now" in said
    assert "warning: trained on" not in said


def test_a_named_tokenizer_that_is_gone_does_not_end_a_run(train, source, tmp_path):
    """The checkpoint holds it. Red when prepare_data() looks for settings.tokenizer first."""
    train("tokenizer-1", data=source, **FIRST)
    copy = shutil.copytree(step_dir(tag_dir("tokenizer-1"), 2) / "tokenizer", tmp_path / "tokenizer")
    train("tokenizer-2", data=source, tokenizer=copy, **FIRST)
    shutil.rmtree(copy)
    assert train("tokenizer-2", "--resume", data=source, tokenizer=copy, **ALL)["step"] == 4


def test_sounds_are_found_though_the_text_beside_them_is_gone(source, base, monkeypatch):
    """Red when _change() prepares the text to see whether it has changed."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(base))
    sounds = Settings(
        data="synth", data_limit=40, clip_seconds=0.2, modalities="audio:16", codebooks=2, text_data=str(source)
    )
    dataset, lines = prepare_for(sounds), []
    for spoil, word in ((None, None), (add_file, "has changed since"), (shutil.rmtree, "cannot be read now")):
        if spoil:
            spoil(source)
        with record_messages(lines):
            found = open_trained_data(sounds, dataset.fingerprint)
        assert found.directory == dataset.directory
        assert lines == [] if spoil is None else word in lines[-1]


def test_climbmix_is_found_by_the_fingerprint_of_its_limit(base, monkeypatch, tmp_path):
    """Its folder may hold more shards than a run took. Red without _find_climbmix()."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    folder = tmp_path / "data" / "climbmix"
    folder.mkdir(parents=True)
    entries = []
    for number in (0, 1, 2, prepare_module.CLIMBMIX_LAST):
        path = folder / f"shard_{number:05d}.parquet"
        pq.write_table(pa.table({"text": [f"document {number}"]}), path)
        entries.append(
            prepare_module._describe_shard(path, "val" if number == prepare_module.CLIMBMIX_LAST else "train")
        )
    whole = prepare_module._make_fingerprint("climbmix", "repo", 4, entries)
    manifest = dict(name="climbmix", source="climbmix", licence="", left_out={}, files=entries, fingerprint=whole)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    two = prepare("climbmix", limit=2)
    assert two.fingerprint["sha256"] != whole["sha256"]
    found = find_prepared(two.fingerprint)
    assert found.num_documents("train") == 2
    assert found.fingerprint == two.fingerprint
    assert find_prepared(whole).num_documents("train") == 3
    assert find_prepared({**two.fingerprint, "sha256": "0" * 64}) is None
    os.unlink(folder / "shard_00001.parquet")
    assert find_prepared(two.fingerprint) is None
    assert is_same(None, whole)
    assert not is_same(two.fingerprint, whole)


def test_other_data_inherits_nothing_of_the_trainings():
    """Red when a name is missing from OWN."""
    trained = Settings(
        data="hf:a",
        data_limit=24,
        data_column="body",
        data_split="test",
        data_config="de",
        skip_corrupt=True,
        text_data="stdlib",
        data_audio_column="wav",
        seed=7,
    )
    other = replace_data(trained, "hf:b", data_column="story", data_limit=None)
    assert other == Settings(data="hf:b", data_column="story", seed=7)


def test_evaluation_on_other_data_says_how_that_is_read(train, source, tmp_path, capsys):
    """data_limit and data_column of the training mean nothing to --data, which has flags of its own.

    Red when base_eval replaces `data` alone: 24 documents would be read, from a column that is not there.
    """
    train("limited", data=source, data_limit=24, data_column="nowhere", skip_corrupt=True, **FIRST)
    folder = tmp_path / "rows"
    folder.mkdir()
    rows = [{"text": f"document {n} " + "of some words " * 20, "other": f"another column {n} " * 9} for n in range(300)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--model-tag=limited", "--eval=bpb", f"--data=hf:{folder}"]
    whole = base_eval.main(words)
    expected = prepare(f"hf:{folder}")
    assert whole["bpb"]["val_bytes"] == expected.text_bytes("val")
    assert whole["data_settings"]["data_limit"] is None
    capsys.readouterr()
    part = base_eval.main([*words, "--data-limit=100", "--data_column=other"])
    assert part["bpb"]["val_bytes"] == prepare(f"hf:{folder}", column="other", limit=100).text_bytes("val")
    assert part["data_settings"] == dict(
        data=f"hf:{folder}", data_limit=100, data_column="other", data_split="train", data_config=None
    )
    assert f"read with data='hf:{folder}', data_limit=100, data_column='other'" in capsys.readouterr().out
    with pytest.raises(UserError, match="--data-limit says how to read other data: name it with --data"):
        base_eval.main([*words[:2], "--data-limit=3"])


def test_other_data_is_seen_by_its_beginning(train, source, tmp_path, monkeypatch):
    """A path that begins with other documents is refused before a shard is written.

    Red without _begins_differently().
    """
    train("beginning", data=source, **FIRST)
    other = tmp_path / "other"
    other.mkdir()
    for path in source.iterdir():
        (other / path.name).write_text(path.read_text() + "one line more\n")
    monkeypatch.setattr(prepare_module, "_write_shards", None)
    with pytest.raises(UserError, match=r"was trained on .*sha256 .*begins with other documents: .*--data=PATH"):
        train("beginning", "--resume", data=other, **ALL)
