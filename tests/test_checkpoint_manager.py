"""Checkpoints under faults: a step is whole or does not count, old metadata loads, wrong metadata is refused."""

import dataclasses
import errno
import json
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from nanochat import checkpoint_files
from nanochat import checkpoint_manager as cm
from nanochat.data.tokenizer import Tokenizer
from nanochat.gpt import GPT, GPTConfig
from nanochat.runtime import run_script
from nanochat.system.environment import UserError

TOKENIZER = Tokenizer.train(["the cat sat on the mat, some other words below it"], 290)
SHAPE = dict(sequence_len=8, vocab_size=290, n_layer=1, n_head=2, n_kv_head=1, n_embd=8)
ABSENT = object()


@pytest.fixture
def root(tmp_path, monkeypatch) -> Path:
    """The folder of all checkpoints of a fresh base folder."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    monkeypatch.setattr(cm, "_logged", set())
    return cm.checkpoints_dir()


def make_model(seed: int = 0, **changes) -> GPT:
    model = GPT(GPTConfig(**{**SHAPE, **changes}))
    torch.manual_seed(seed)
    model.init_weights()
    return model


def save(folder: Path, step: int, model: GPT | None = None, tokenizer: Tokenizer | None = TOKENIZER, **metadata):
    model = model or make_model(step)
    facts = dict(model_config=dataclasses.asdict(model.config), tokenizer_hash=TOKENIZER.hash)
    optimizer = {"lm_head.weight.exp_avg": torch.ones(3), "lm_head.weight.step": torch.tensor(step)}
    return cm.save_checkpoint(folder, step, model.state_dict(), optimizer, {**facts, **metadata}, tokenizer=tokenizer)


def edit_state(folder: Path, **changes) -> None:
    """Change or remove keys of state.json ('config.x' for one inside model_config) and reseal the step."""
    state = json.loads((folder / "state.json").read_text())
    for name, value in changes.items():
        inside = state["model_config"] if name in cm.GPTConfig.__dataclass_fields__ or name == "novelty" else state
        if value is ABSENT:
            inside.pop(name, None)
        else:
            inside[name] = value
    (folder / "state.json").write_text(json.dumps(state))
    checkpoint_files.write_manifest(folder)


# ---------------------------------------------------------------------------------------------------------------------
# saving and loading


def test_what_is_saved_comes_back(root):
    """Red when a tensor, the step or a metadata key is lost on the way."""
    model = make_model(3)
    folder = save(root / "m", 100, model, run={"train_seconds": 1.5})
    assert folder == root / "m" / "step_000100"
    names = {"model.safetensors", "optimizer.safetensors", "state.json", "manifest.json", "tokenizer"}
    assert {path.name for path in folder.iterdir()} == names
    state, optimizer, metadata = cm.load_checkpoint(root / "m", 100, load_optimizer=True)
    assert checkpoint_files.weights_hash(state) == checkpoint_files.weights_hash(model.state_dict())
    assert optimizer["lm_head.weight.step"].item() == 100
    assert (metadata["step"], metadata["run"]) == (100, {"train_seconds": 1.5})
    loaded, tokenizer, metadata = cm.load_model("base", "cpu", "eval")
    assert tokenizer.hash == metadata["tokenizer_hash"] == TOKENIZER.hash
    assert not loaded.training
    ids = torch.arange(8)[None]
    assert torch.equal(loaded(ids), model(ids))
    assert cm.build_model(root / "m", 100, "cpu", "train")[0].training
    assert cm.save_checkpoint(root / "m", 200, {}, None, {}, rank=1) is None
    assert cm.list_steps(root / "m") == [100]


def test_weights_hash_is_of_the_tensors_in_name_order(root):
    a, b = torch.arange(4.0), torch.ones(2, 3)
    assert checkpoint_files.weights_hash({"a": a, "b": b}) == checkpoint_files.weights_hash({"b": b, "a": a})
    assert checkpoint_files.weights_hash({"a": a, "b": b}) != checkpoint_files.weights_hash({"a": a.neg(), "b": b})
    assert checkpoint_files.weights_hash({"a": a, "b": b}) != checkpoint_files.weights_hash({"a": a, "c": b})


def test_a_checkpoint_without_tokenizer_still_gives_its_model(root):
    save(root / "m", 1, tokenizer=None)
    model, tokenizer, _ = cm.load_model("base", "cpu", "eval")
    assert tokenizer is None
    assert model.config.vocab_size == 290


# ---------------------------------------------------------------------------------------------------------------------
# faults while saving


FAULTS = [
    (os, "rename"),
    (os, "replace"),
    (os, "fsync"),
    (checkpoint_files, "save_file"),
    (Path, "mkdir"),
    (Path, "write_text"),
]


@pytest.mark.parametrize(("owner", "name"), FAULTS, ids=[name for _, name in FAULTS])
@pytest.mark.parametrize("kind", ["raised", "killed"])
def test_a_fault_at_any_call_leaves_the_earlier_step(root, monkeypatch, owner, name, kind):
    """The n-th call of each function fails, for every n: by a full disk, or by the end of the process.

    Red when a file is written into the final folder, when the rename comes before the manifest, or when an error
    inside save is swallowed.
    """
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # of which test_fsync_order is
    real, tag, model = getattr(owner, name), root / kind, make_model()
    save(tag, 1, model)
    for fail_at in range(1, 60):
        calls = 0

        def broken(*args, fail_at=fail_at, **kwargs):
            nonlocal calls
            calls += 1
            if calls == fail_at:
                if kind == "killed":
                    raise SystemExit
                if owner is checkpoint_files:
                    raise SafetensorError("I/O error: No space left on device (os error 28)")
                raise OSError(errno.ENOSPC, "No space left on device", str(args[0]))
            return real(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(owner, name, broken)
            if kind == "killed":  # nothing is cleaned up after a kill
                patch.setattr(shutil, "rmtree", lambda *_, **__: None)
            try:
                save(tag, 2, model)
            except OSError as error:
                assert error.errno == errno.ENOSPC
            except SystemExit:
                assert kind == "killed"
        # only what fails after the rename, the parent's fsync
        committed = checkpoint_files.find_corruption(checkpoint_files.step_dir(tag, 2)) is None
        assert cm.list_steps(tag) == ([1, 2] if committed else [1])
        assert cm.newest_step(tag) == (2 if committed else 1)
        assert cm.load_checkpoint(tag, 1, load_optimizer=True)[2]["step"] == 1
        if kind == "raised":
            assert {path.name for path in tag.iterdir()} <= {"step_000001", "step_000002"}
        shutil.rmtree(checkpoint_files.step_dir(tag, 2), ignore_errors=True)
        save(tag, 2, model)  # the next save works, and clears what a killed one left
        assert not list(tag.glob(".step*"))
        shutil.rmtree(checkpoint_files.step_dir(tag, 2))
        if calls < fail_at:
            assert fail_at > 1, f"{name} was never called"
            return
    pytest.fail(f"{name} was called 60 times")


def test_a_full_disk_is_one_line_and_code_2(root, monkeypatch, capsys):
    def full(*_):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(checkpoint_files, "save_file", full)
    with pytest.raises(SystemExit) as caught:
        run_script(lambda: save(root / "m", 1))
    assert caught.value.code == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "No space left on device" in err
    assert not list((root / "m").iterdir())


def test_a_folder_of_the_same_step_is_moved_aside(root, capsys):
    """Red when os.rename onto it, or deleting it, replaces the move."""
    first = save(root / "m", 5, make_model(1))
    (first / "model.safetensors").write_bytes(b"damaged")
    save(root / "m", 5, make_model(2))
    save(root / "m", 5, make_model(3))
    assert sorted(p.name for p in (root / "m").iterdir()) == ["step_000005", "step_000005.bad-1", "step_000005.bad-2"]
    assert (root / "m" / "step_000005.bad-1" / "model.safetensors").read_bytes() == b"damaged"
    assert cm.list_steps(root / "m") == [5]
    assert "moved to step_000005.bad-1" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------------------
# damage


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGES = {
    "truncated": lambda step: truncate(step / "model.safetensors"),
    "empty": lambda step: (step / "optimizer.safetensors").write_bytes(b""),
    "bit flipped": lambda step: flip_a_bit(step / "model.safetensors"),
    "state changed": lambda step: flip_a_bit(step / "state.json"),
    "file missing": lambda step: (step / "tokenizer" / "ranks.tiktoken").unlink(),
    "manifest missing": lambda step: (step / "manifest.json").unlink(),
    "manifest torn": lambda step: truncate(step / "manifest.json"),
    "manifest empty": lambda step: (step / "manifest.json").write_text(""),
    "manifest a list": lambda step: (step / "manifest.json").write_text("[]"),
    "manifest of nothing": lambda step: (step / "manifest.json").write_text('{"files": {}}'),
    "manifest of numbers": lambda step: (step / "manifest.json").write_text('{"files": {"state.json": 3}}'),
    "folder empty": lambda step: [shutil.rmtree(step), step.mkdir()],
}


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_step_is_walked_past_with_the_reason_and_refused_when_named(root, how, capsys):
    """Red when `damage` compares sizes alone (bit flipped), or a file that the manifest lacks still counts."""
    save(root / "m", 1)
    save(root / "m", 2)
    step = checkpoint_files.step_dir(root / "m", 2)
    DAMAGES[how](step)
    assert cm.newest_step(root / "m") == 1
    reason = checkpoint_files.find_corruption(step)
    assert reason
    assert f"skipping {step}: {reason}" in capsys.readouterr().out
    assert cm.load_model("base", "cpu", "eval")[2]["step"] == 1
    with pytest.raises(UserError, match="step_000002 is corrupt"):
        cm.load_model("base", "cpu", "eval", "m", 2)


# ---------------------------------------------------------------------------------------------------------------------
# finding


def test_a_missing_checkpoint_says_what_was_looked_for_and_what_exists(root):
    with pytest.raises(UserError, match=r"no checkpoint in .*base_train"):
        cm.load_model("base", "cpu", "eval")
    save(root / "first", 3)
    save(root / "second", 4)
    with pytest.raises(UserError, match=r"model_tag='third': .*\(tags there: first, second\)"):
        cm.load_model("base", "cpu", "eval", "third")
    with pytest.raises(UserError, match=r"step 9 is not in .*first: steps there are 3"):
        cm.load_model("base", "cpu", "eval", "first", 9)
    with pytest.raises(UserError, match="source='stf' is unknown, did you mean 'sft'"):
        cm.load_model("stf", "cpu", "eval")
    (root / "empty").mkdir()
    with pytest.raises(UserError, match="empty holds no complete step"):
        cm.load_model("base", "cpu", "eval", "empty")


def test_the_newest_tag_is_the_last_saved_and_moved_runs_do_not_count(root):
    """Red when hidden folders, where --overwrite keeps the old run, are searched too."""
    for age, tag in enumerate(["c", "a", "b", ".a.old-1"]):
        os.utime(save(root / tag, 1), (1e9 + age, 1e9 + age))
    assert cm.newest_tag(root) == "b"
    os.utime(checkpoint_files.step_dir(root / "c", 1), (2e9, 2e9))
    assert cm.newest_tag(root) == "c"


def test_a_folder_that_is_not_there_holds_no_steps(root):
    """Red when own_steps() asks the folder for its entries, or gives None."""
    assert checkpoint_files.own_steps(root / "nothing") == cm.list_steps(root / "nothing") == []
    assert cm.newest_step(root / "nothing") is None


def test_prune_safety(root):
    """keep_last=k leaves k whole steps and every damaged one, wherever it stands.

    Red when pruning trusts a damaged newest step, counts damaged ones, or deletes them.
    """
    tag = root / "m"
    for step in (1, 2, 3, 10):
        save(tag, step)
    assert checkpoint_files.prune(tag, None) == checkpoint_files.prune(tag, 4) == []
    flip_a_bit(checkpoint_files.step_dir(tag, 10) / "model.safetensors")
    flip_a_bit(checkpoint_files.step_dir(tag, 1) / "model.safetensors")
    assert checkpoint_files.prune(tag, 2) == []
    truncate(checkpoint_files.step_dir(tag, 10) / "model.safetensors")
    (checkpoint_files.step_dir(tag, 2) / "manifest.json").unlink()
    save(tag, 11)
    assert checkpoint_files.prune(tag, 2) == []
    save(tag, 12)
    assert [path.name for path in checkpoint_files.prune(tag, 2)] == ["step_000003"]
    assert cm.list_steps(tag) == [1, 2, 10, 11, 12]
    assert cm.newest_step(tag) == 12


def test_prune_reads_a_verified_step_once(root, monkeypatch):
    """Each step is hashed once, whatever the number kept; one that changed is hashed again, and does not count.

    Red when prune() asks find_corruption() of every kept step each time, or _is_complete() forgets the sizes and times.
    """
    hashed, real = [], checkpoint_files.find_corruption
    monkeypatch.setattr(
        checkpoint_files,
        "find_corruption",
        lambda folder: (hashed.append(checkpoint_files.step_of(folder)), real(folder))[1],
    )
    for step in range(1, 7):
        save(root / "m", step)
        checkpoint_files.prune(root / "m", 2)
    assert sorted(hashed) == [1, 2, 3, 4, 5, 6]
    assert checkpoint_files.own_steps(root / "m") == [5, 6]
    truncate(checkpoint_files.step_dir(root / "m", 6) / "model.safetensors")
    save(root / "m", 7)
    assert checkpoint_files.prune(root / "m", 2) == []  # 5 and 7 are complete
    assert checkpoint_files.own_steps(root / "m") == [5, 6, 7]


# ---------------------------------------------------------------------------------------------------------------------
# metadata of other times


def test_absent_keys_mean_what_they_meant(root, capsys):
    """An old untied checkpoint without any newer key. Red when a GPTConfig default changes."""
    step = save(root / "m", 1, make_model(1))
    absent = dict.fromkeys(("tie_weights", "use_output_projection", "output_projection_residual"), ABSENT)
    edit_state(step, **absent, tokenizer_hash=ABSENT, step=ABSENT)
    for _ in range(2):
        model, tokenizer, metadata = cm.load_model("base", "cpu", "eval")
    out = capsys.readouterr().out
    assert out.count("model_config has no tie_weights: taken as untied") == 1
    assert "use_output_projection" not in out
    assert model.config == GPTConfig(**SHAPE)
    assert tokenizer.hash == TOKENIZER.hash
    assert metadata.keys() == {"model_config", "step"}


def test_an_absent_projection_is_mentioned_only_when_tied(root, capsys):
    """Red when it is mentioned of untied models, which have none."""
    edit_state(save(root / "untied", 1, make_model(1)), use_output_projection=ABSENT)
    cm.load_model("base", "cpu", "eval", "untied")
    assert "use_output_projection" not in capsys.readouterr().out
    step = save(root / "m", 1, make_model(1, tie_weights=True))
    edit_state(step, use_output_projection=ABSENT)
    assert not cm.load_model("base", "cpu", "eval", "m")[0].config.use_output_projection
    assert capsys.readouterr().out.count("no use_output_projection: taken as False") == 1


WRONG = {
    "novelty": (True, "fields that this version does not know: novelty"),
    "model_config": (ABSENT, "has no model_config"),
    "n_embd": ("8", "n_embd='8' is not a number > 0"),
    "n_layer": (0, "n_layer=0 is not a number > 0"),
    "vocab_size": (True, "vocab_size=True is not a number > 0"),
    "tie_weights": (1, "tie_weights=1 is not true or false"),
    "document_start": (True, "document_start=True is not an id, or null"),
    "n_head": (3, "describes no model that can be"),
    "use_output_projection": (True, "describes no model that can be"),
    "sequence_len": ([8], r"sequence_len=\[8\] is not a number"),
    "settings": ([1], r"settings is \[1\], expected a JSON object"),
    "run": ("fast", "run is 'fast', expected a JSON object"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_metadata_is_refused_by_name(root, name):
    value, message = WRONG[name]
    edit_state(save(root / "m", 1), **{name: value})
    with pytest.raises(UserError, match=message):
        cm.load_model("base", "cpu", "eval")


@pytest.mark.parametrize("text", ["[]", "null", "{", "", "\x00"])
def test_a_state_file_that_is_no_object_is_refused(root, text):
    step = save(root / "m", 1)
    (step / "state.json").write_text(text)
    checkpoint_files.write_manifest(step)
    with pytest.raises(UserError, match=r"state\.json"):
        cm.load_model("base", "cpu", "eval")


def test_weights_that_do_not_fit_are_named(root):
    """`strict` stays: a missing, extra or misshapen tensor. Red with strict=False and without the check."""
    step = save(root / "m", 1)
    edit_state(step, tie_weights=True)
    with pytest.raises(UserError, match=r"model\.safetensors holds lm_head\.weight \(tie_weights=True"):
        cm.load_model("base", "cpu", "eval")
    edit_state(step, tie_weights=False, n_layer=2)
    with pytest.raises(UserError, match=r"model\.safetensors lacks transformer\.h\.1\.attn\.c_k\.weight"):
        cm.load_model("base", "cpu", "eval")
    edit_state(step, n_layer=1, n_kv_head=2)
    with pytest.raises(UserError, match=r"c_k\.weight has shape \(4, 8\), model_config says \(8, 8\)"):
        cm.load_model("base", "cpu", "eval")
    (step / "model.safetensors").write_bytes(b"no tensors at all")
    checkpoint_files.write_manifest(step)
    with pytest.raises(UserError, match=r"model\.safetensors cannot be read"):
        cm.load_model("base", "cpu", "eval")


def test_another_tokenizer_is_refused_with_both_hashes(root):
    """Red when check_tokenizer compares sizes alone."""
    other = Tokenizer.train(["another text altogether, about things of many names"], 290)
    save(root / "m", 1, tokenizer=other)
    with pytest.raises(UserError, match=f"hash {other.hash}, the model was trained with {TOKENIZER.hash}"):
        cm.load_model("base", "cpu", "eval")
    edit_state(save(root / "small", 1, make_model(vocab_size=280)), tokenizer_hash=ABSENT)
    with pytest.raises(UserError, match="the tokenizer has 290 ids, the model only 280"):
        cm.load_model("base", "cpu", "eval", "small")


def test_training_needs_the_optimizers_state(root):
    step = save(root / "m", 1)
    (step / "optimizer.safetensors").unlink()
    checkpoint_files.write_manifest(step)
    cm.load_model("base", "cpu", "eval")
    with pytest.raises(UserError, match="no optimizer state: training cannot be resumed"):
        cm.load_checkpoint(root / "m", 1, load_optimizer=True)


def test_sealing_again_covers_edited_and_added_files(root):
    step = save(root / "m", 1)
    state = load_file(step / "model.safetensors")
    state["lm_head.weight"] += 1
    save_file(state, step / "model.safetensors")
    assert checkpoint_files.find_corruption(step)
    checkpoint_files.write_manifest(step)
    assert checkpoint_files.find_corruption(step) is None
    assert checkpoint_files.weights_hash(cm.load_checkpoint(root / "m", 1)[0]) == checkpoint_files.weights_hash(state)
    assert not (step / ".manifest.tmp").exists()


# ---------------------------------------------------------------------------------------------------------------------
# the order of what reaches the disk, which no kill can show


def test_fsync_order(root, monkeypatch):
    """Every file is written, then synced, then the manifest, then all folders, then the rename, then the parent.

    Red when any fsync() in write_manifest() or save_checkpoint() is left out or moved.
    """
    calls, names = [], {}
    real_open, real_fsync, real_rename, real_replace, real_save = (
        os.open,
        os.fsync,
        os.rename,
        os.replace,
        checkpoint_files.save_file,
    )

    def note(what, path):
        calls.append((what, re.sub(r"\.tmp-[0-9a-f-]+", "", os.path.relpath(path, root / "m"))))

    def opened(path, *args, **kwargs):
        handle = real_open(path, *args, **kwargs)
        names[handle] = path
        return handle

    def synced(handle):
        note("fsync", names[handle])
        real_fsync(handle)

    def renamed(real):
        def rename(source, target):
            real(source, target)
            note("rename", target)

        return rename

    def saved(tensors, path):
        real_save(tensors, path)
        note("write", path)

    def written(self, *args, **kwargs):
        real_write(self, *args, **kwargs)
        if self.is_relative_to(root / "m"):
            note("write", self)

    real_write = Path.write_text
    with monkeypatch.context() as patch:
        for owner, name, fake in (
            (os, "open", opened),
            (os, "fsync", synced),
            (os, "rename", renamed(real_rename)),
            (os, "replace", renamed(real_replace)),
            (checkpoint_files, "save_file", saved),
            (Path, "write_text", written),
        ):
            patch.setattr(owner, name, fake)
        folder = cm.save_checkpoint(root / "m", 1, {"w": torch.ones(2)}, {"m": torch.ones(2)}, {"settings": {}})
    files = {path.name for path in folder.iterdir()} - {"manifest.json"}
    assert files == {"model.safetensors", "optimizer.safetensors", "state.json"}
    step = ".step_000001"
    for name in files:
        assert calls.index(("write", f"{step}/{name}")) < calls.index(("fsync", f"{step}/{name}"))
        assert calls.index(("fsync", f"{step}/{name}")) < calls.index(("write", f"{step}/.manifest.tmp"))
    assert calls[-7:] == [
        ("write", f"{step}/.manifest.tmp"),
        ("fsync", f"{step}/.manifest.tmp"),
        ("rename", f"{step}/manifest.json"),
        ("fsync", step),
        ("rename", "step_000001"),
        ("fsync", "."),
        ("fsync", ".."),
    ]


def test_sounds_of_another_codec_are_refused():
    """Equal codes would mean other sounds. Red without the comparison; text, and checkpoints without one, pass."""
    data = SimpleNamespace(name="melodies", codec={"hash": "abcdefgh12"})
    for metadata in ({}, {"codec": None}, {"codec": {"hash": "abcdefgh12"}}):
        cm.check_codec(data, metadata, "here/step_000001")
    cm.check_codec(SimpleNamespace(name="text", codec=None), {"codec": {"hash": "12345678ab"}}, "here")
    words = "here/step_000001: data melodies is encoded with codec abcdefgh, the model was trained with 12345678: use"
    with pytest.raises(UserError, match=words):
        cm.check_codec(data, {"codec": {"hash": "12345678ab"}}, "here/step_000001")


def test_a_folder_that_is_no_tag_says_how_it_is_meant(tmp_path, monkeypatch):
    """Red without the hint."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    with pytest.raises(UserError, match=r"there is no .*mine.*; for the folder here write \./mine"):
        cm.find_checkpoint("mine", None)


def test_files_of_a_step_have_the_permissions_of_its_folder(tmp_path):
    """A colleague may read them all: safetensors alone would keep its own to the owner. Red without the chmod."""
    folder = save(tmp_path, 1)
    modes = {path.name: path.stat().st_mode & 0o666 for path in folder.iterdir() if path.is_file()}
    assert modes["model.safetensors"] == folder.stat().st_mode & 0o666 == modes["state.json"]
