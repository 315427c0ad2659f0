"""Trainings that begin with another's weights, and tied tables that a run splits on its way."""

import shutil

import pytest
import torch
from safetensors.torch import load_file

from nanochat import checkpoint_files
from nanochat import checkpoint_manager as cm
from nanochat.config.settings import Settings
from nanochat.conversion.tying import untied
from nanochat.system.environment import UserError, base_dir
from scripts import base_train
from tests import upstream_fixtures as theirs
from tests.tiny_run import TIED, TINY, flags, losses, metrics, state_hashes, tag_dir

ERA = "2026-01-16"


def folder_bytes(folder) -> dict:
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_run_splits_its_tied_tables(train):
    """Before the split the tied run, at the split the same function and moments by hand, afterwards another way.

    Red when the split comes a step late, or the optimizer begins anew.
    """
    how = dict(**TIED, num_iterations=6, save_every=1)
    train("tied", **how)
    train("split", **how, untie_at=0.5)
    same, split = losses("tied"), losses("split")
    assert split[:3] == same[:3]
    assert split[3] == pytest.approx(same[3], rel=1e-6)
    assert split[5] != same[5]
    assert [line["step"] for line in metrics("split") if line.get("event") == "untie"] == [3]
    states = {step: cm.load_checkpoint(tag_dir("split"), step, load_optimizer=True) for step in (3, 4)}
    config, weights, moments = untied(cm.model_config(states[3][2]), *states[3][:2])
    assert config == cm.model_config(states[4][2])
    assert weights.keys() == states[4][0].keys()
    assert states[4][1]["lm_head.weight.step"] == moments["lm_head.weight.step"] + 1
    assert states[4][1]["transformer.wte.weight.step"] == 4
    rate = Settings.tied_weights_lr * (64 / 768) ** -0.5
    for name in ("lm_head.weight", "transformer.wte.weight"):
        moved = (states[4][0][name] - weights[name]).abs().max().item()
        assert 0.1 * rate < moved < 1.1 * rate, name
    assert cm.load_model("base", "cpu", "eval", "split", 6)[0].config.tie_weights is False
    groups = states[4][2]["derived"]["parameters"]
    assert groups["lm_head"] == groups["wte"]
    assert groups["output_projection"] == 0


@pytest.mark.parametrize(("untie_at", "step"), [(0.01, 1), (0.999, 2)])
def test_a_split_is_never_first_nor_left_out(train, untie_at, step):
    """Red when it may come before the first step, from which alone the optimizer has a state to split."""
    train(f"split-at-{untie_at}", **TIED, num_iterations=3, untie_at=untie_at)
    assert [m["step"] for m in metrics(f"split-at-{untie_at}") if m.get("event") == "untie"] == [step]


@pytest.mark.parametrize("step", [2, 3, 5])
def test_a_run_resumes_across_the_split(train, step):
    """From before, at and after it: the same weights and state, bit for bit. Red when a resumed model stays tied."""
    how = dict(**TIED, untie_at=0.5, save_every=1, target_param_data_ratio=0.0384, num_iterations=None)
    if not tag_dir("whole").is_dir():
        train("whole", **how)
    last = cm.list_steps(tag_dir("whole"))[-1]
    assert last == 6  # the horizon counts the projection, which the split drops
    shutil.copytree(tag_dir("whole"), tag_dir(f"cut-{step}"))
    for later in range(step + 1, last + 1):
        shutil.rmtree(checkpoint_files.step_dir(tag_dir(f"cut-{step}"), later))
    train(f"cut-{step}", "--resume", **how)
    assert state_hashes(f"cut-{step}", last) == state_hashes("whole", last)


def test_training_goes_on_from_nanochats_files(train, corpus, capsys):
    """Model, constants, tokenizer and optimizer state are theirs; the folder stays as it is.

    Red when the optimizer begins anew, or the gate's range is this version's.
    """
    sizes, state = theirs.make_state(ERA, n_layer=2, sequence_len=64)
    folder = theirs.write(base_dir() / "base_checkpoints" / "theirs", sizes, state)
    theirs.write_optimizer(folder, theirs.optimizer_files(state, theirs.moments(state), "one"))
    before = folder_bytes(folder)
    quiet = dict(embedding_lr=1e-9, unembedding_lr=1e-9, value_embedding_lr=1e-9, matrix_lr=1e-9, scalar_lr=1e-9)
    shape = ("depth", "model_dim", "head_dim", "vocab_size", "max_seq_len")

    def go_on(tag: str, **settings) -> None:
        told = {name: value for name, value in TINY.items() if name not in shape}
        base_train.main(
            flags({**told, "data": corpus, "init_from": "theirs", "num_iterations": 1, "model_tag": tag} | settings)
        )

    go_on("on", **quiet)
    go_on("capped", **quiet, init_era="2026-03-02")
    assert cm.load_model("base", "cpu", "eval", "capped")[0].config.softcap == 20.0
    out = capsys.readouterr().out
    assert "and its optimizer's state" in out
    assert 'window_pattern = "SSSL" (default "L", from init_from=theirs)' in out
    weights, moments, metadata = cm.load_checkpoint(tag_dir("on"), 1, load_optimizer=True)
    assert moments["transformer.wte.weight.step"] == theirs.STEP + 1
    config = cm.model_config(metadata)
    assert (config.value_gate_channels, config.value_gate_range, config.short_window) == (32, 2.0, 32)
    torch.testing.assert_close(weights["lm_head.weight"], state["lm_head.weight"], rtol=0, atol=1e-5)
    assert folder_bytes(folder) == before
    (folder / f"optim_{theirs.STEP:06d}_rank0.pt").unlink()
    go_on("afresh")
    assert "and its optimizer's state" not in capsys.readouterr().out
    assert (
        load_file(checkpoint_files.step_dir(tag_dir("afresh"), 1) / "optimizer.safetensors")["lm_head.weight.step"] == 1
    )
    with pytest.raises(UserError, match="n_layer=2 there, 3 here"):
        go_on("other", depth=3)
    (folder / "tokenizer.pkl").unlink()
    with pytest.raises(UserError, match="holds no tokenizer: name the one of its training with --tokenizer"):
        go_on("mute")


def test_the_checkpoint_to_start_from_is_looked_up_once(train, corpus, capsys):
    """Its newest step is corrupt, which is logged once. Red when train() looks for it again."""
    train("source", num_iterations=2, save_every=1)
    corrupt = checkpoint_files.step_dir(tag_dir("source"), 2)
    (corrupt / "state.json").unlink()
    capsys.readouterr()
    base_train.main(flags({**TINY, "data": corpus, "init_from": "source", "num_iterations": 1, "model_tag": "next"}))
    lines = capsys.readouterr().out
    assert lines.count(f"skipping {corrupt}: state.json is missing") == 1
    assert f"initialised from the weights of {checkpoint_files.step_dir(tag_dir('source'), 1)}" in lines
