"""Checkpoints of every origin become ours, tied or untied, and a run goes on from each. Growth: test_growth.py."""

import dataclasses
import errno
import json
import math
import os
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from nanochat import checkpoint_files
from nanochat import checkpoint_manager as cm
from nanochat.config.config_file import read_config
from nanochat.config.settings import Settings
from nanochat.conversion import convert as conversion
from nanochat.conversion.huggingface import write_hf
from nanochat.data.tokenizer import Tokenizer
from nanochat.gpt import GPTConfig
from nanochat.system.environment import UserError
from scripts import base_train, convert, export_hf
from tests import upstream_fixtures
from tests.test_gpt import MODERN, build, random_ids
from tests.tiny_run import TIED, exit_code, flags, losses, tag_dir


def config_of(tag: str) -> dict:
    return read_config(tag_dir(tag) / "config.py")


def test_untie_and_tie_a_run(train, capsys):
    """Untied it has the same loss, and trains on from there at the tied matrix's rate; tied again it is what it was.

    Red when the config.py keeps embedding_lr, or --tie without a value does not take what costs least.
    """
    train("words", num_iterations=6, tied_weights_lr=0.03, **TIED)
    capsys.readouterr()
    assert convert.main(["--model-tag=words", "--untie"]) == "words-untied"
    told = capsys.readouterr().out
    assert "held-out tokens of corpus" in told
    assert "(+0.0000)" in told.replace("(-0.0000)", "(+0.0000)")
    settings = config_of("words-untied")
    assert not settings["tie_weights"]
    assert not settings["use_output_projection"]
    assert settings["embedding_lr"] == settings["unembedding_lr"] == 0.03
    base_train.main([str(tag_dir("words-untied") / "config.py"), *flags(dict(model_tag="on", num_iterations=1))])
    assert losses("on")[0] < losses("words")[0] - 0.2  # of the same batch, after six steps

    assert convert.main(["--model-tag=words-untied", "--tie", "--output-tag=again"]) == "again"
    told = capsys.readouterr().out
    assert "tied, keeping projection" in told
    assert told.count(" -> ") == 4
    models = [cm.build_model(tag_dir(tag), step, "cpu", "eval")[0] for tag, step in (("words", 6), ("again", 0))]
    ids = random_ids(2, 40, vocab=300)
    torch.testing.assert_close(models[1](ids), models[0](ids), rtol=1e-4, atol=1e-4)
    origin = json.loads((checkpoint_files.step_dir(tag_dir("again"), 0) / "state.json").read_text())["converted_from"]
    assert origin == dict(model_tag="words-untied", step=0)

    for words, said in (
        (["--model-tag=words", "--untie"], "words-untied is there already"),
        (["--model-tag=words", "--tie"], "words is tied already"),
        (["--model-tag=words"], "in our format already: say what to do"),
        (["--model-tag=words", "--untie=mlp"], "is of an added modality"),
        (["--model-tag=words", "--untie", "--tie"], "one at a time"),
        (["--model-tag=words", "--from-hf=x"], "drop --model-tag"),
        (["--model-tag=words", "--untie", "--output-tag=n", "--data=nowhere"], "nowhere"),
    ):
        with pytest.raises(UserError, match=said):
            convert.main(words)


def test_without_a_text_the_loss_is_not_measured(capsys):
    """Nothing is downloaded unasked. Red when the source's own data is fetched whatever it is."""
    for tokenizer, said in ((None, "has no tokenizer"), (Tokenizer([bytes([i]) for i in range(256)]), "--data=stdlib")):
        source = conversion.Source("x", 0, build().config, {}, None, tokenizer, {}, False)
        for data in ("climbmix", "hf:some/where"):
            assert conversion.held_out_loss(source, Settings(data=data), None) is None
            assert said in capsys.readouterr().out


def test_nanochats_own_files_become_ours(base, tmp_path, monkeypatch, capsys):
    """Weights, optimizer state and tokenizer as they are loaded, and a config.py that describes the model.

    Red when what no setting decides is lost, or the step's number.
    """
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(base))
    sizes, state = upstream_fixtures.make_state("2026-01-16", sequence_len=40, n_layer=2)
    folder = upstream_fixtures.write(tmp_path / "d2", sizes, state)
    memory = upstream_fixtures.moments(state)
    upstream_fixtures.write_optimizer(folder, upstream_fixtures.optimizer_files(state, memory, "one"))
    assert convert.main([f"--model-tag={folder}", "--era=2026-03-02"]) == "d2-converted"
    assert "with its optimizer state" in capsys.readouterr().out
    step = upstream_fixtures.STEP
    weights, optimizer, metadata = cm.load_checkpoint(tag_dir("d2-converted"), step, load_optimizer=True)
    assert weights.keys() == state.keys()
    assert all(torch.equal(weights[name], state[name]) for name in state)
    assert torch.equal(optimizer["lm_head.weight.exp_avg"], memory["lm_head.weight"]["exp_avg"])
    assert metadata["converted_from"] == dict(model_tag="d2", step=step, era="2026-03-02")
    config = cm.model_config(metadata)
    assert (config.softcap, config.value_gate_channels, config.vocab_multiple) == (20.0, 32, 64)
    model, tokenizer, _ = cm.build_model(tag_dir("d2-converted"), step, "cpu", "eval")
    ids = random_ids(30, vocab=265)
    expected = upstream_fixtures.reference_logits("2026-03-02", sizes, state, ids)
    torch.testing.assert_close(model(ids[None])[0], expected.float(), rtol=1e-4, atol=1e-4)
    assert tokenizer.vocab_size == 265
    assert config_of("d2-converted")["init_from"] == "d2-converted"
    with pytest.raises(UserError, match="in our format already"):
        convert.main(["--model-tag=d2-converted"])


def test_a_hugging_face_folder_becomes_ours(base, tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(base))
    model = build(**MODERN | dict(tie_weights=True, vocab_multiple=1))  # an export has no padding
    write_hf(tmp_path / "friend", model.config, model.state_dict())
    tag = convert.main([f"--from-hf={tmp_path / 'friend'}"])
    state = load_file(checkpoint_files.step_dir(tag_dir(tag), 0) / "model.safetensors")
    assert tag == "friend-converted"
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())


@pytest.mark.parametrize("wrapped", ["", "_orig_mod.", "module.", "module._orig_mod."])
def test_a_wrapped_folder_with_nan(wrapped, tmp_path, monkeypatch, capsys):
    """Wrappers' names are taken off, values that are no number are named and counted, and kept. Red when convert does
    not look at the values, or read_hf at the names; tied tables with a NaN count as equal."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    model = build(tie_weights=True)
    folder = tmp_path / "friend"
    write_hf(folder, model.config, model.state_dict())
    state = load_file(folder / "model.safetensors")
    state["model.embed_tokens.weight"][3, 1:4] = torch.tensor([math.nan, math.inf, -math.inf])
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()  # as some programs save a tied model
    save_file({wrapped + name: tensor for name, tensor in state.items()}, folder / "model.safetensors")
    convert.main([f"--from-hf={folder}"])
    told = capsys.readouterr().out
    assert "warning: the weights of friend hold NaN or infinite values: transformer.wte.weight (3 of 1,600)" in told
    assert "bit for bit, NaN and infinite values too" in told
    for part in wrapped.split(".")[:-1]:
        assert f"{len(state)} of {len(state)} tensors are named with `{part}.` of " in told
    new = load_file(checkpoint_files.step_dir(tag_dir("friend-converted"), 0) / "model.safetensors")
    there = state["model.embed_tokens.weight"].view(torch.int32)
    assert torch.equal(new["transformer.wte.weight"].view(torch.int32), there)

    export_hf.main(["--model-tag=friend-converted", f"--out={tmp_path / 'back'}"])
    assert "warning: the weights hold NaN or infinite values: transformer.wte.weight (3" in capsys.readouterr().out
    sane = build()
    write_hf(tmp_path / "sane", sane.config, sane.state_dict())
    convert.main([f"--from-hf={tmp_path / 'sane'}"])
    told = capsys.readouterr().out
    assert "bit for bit, without" in told
    assert "warning" not in told


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_disk_that_takes_no_more(code, tmp_path, monkeypatch, capsys):
    """One line with the way out, exit code 2, and nothing under the final name; with room it works. Red when a
    tag folder with its config.py stays, or export_hf passes the library's own words on."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    write_hf(tmp_path / "friend", build().config, build().state_dict())
    convert.main([f"--from-hf={tmp_path / 'friend'}", "--output-tag=there"])

    def full(tensors, path, metadata=None):
        Path(path).write_bytes(b"half")
        raise SafetensorError(f"Error while serializing: I/O error: {os.strerror(code)} (os error {code})")

    words = (
        (export_hf.main, ["--model-tag=there", f"--out={tmp_path / 'out'}"], tmp_path),
        (convert.main, [f"--from-hf={tmp_path / 'friend'}"], tmp_path / "base" / "base_checkpoints"),
    )
    for main, argv, parent in words:
        before = sorted(parent.rglob("*"))
        with monkeypatch.context() as patch:
            patch.setattr("nanochat.conversion.huggingface.save_file", full)
            patch.setattr("nanochat.checkpoint_files.save_file", full)
            capsys.readouterr()
            assert exit_code(lambda main=main, argv=argv: main(argv)) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        assert os.strerror(code) in said
        assert "elsewhere" in said or "another place" in said
        assert sorted(parent.rglob("*")) == before
        main(argv)
        assert sorted(parent.rglob("*")) != before


def test_a_model_keeps_its_codec(tmp_path, monkeypatch):
    """Without it, its sounds could not be heard. Red when write() leaves out the folder or what it says of it."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    (tmp_path / "codec").mkdir()
    (tmp_path / "codec" / "codec.json").write_text("{}")
    model, metadata = build(), dict(codec=dict(hash="ab"), data_fingerprint=dict(sha256="cd"))
    source = conversion.Source(
        "x", 5, model.config, model.state_dict(), None, None, metadata, False, tmp_path / "codec"
    )
    step = conversion.write(source, "y", 0, source.config, source.state, conversion.settings_for(source.config))
    assert (step / "codec" / "codec.json").is_file()
    assert checkpoint_files.find_corruption(step) is None
    assert metadata.items() <= checkpoint_files.read_metadata(step).items()


@pytest.mark.parametrize("changes", [{}, MODERN, dict(n_kv_head=2, tie_weights=True, use_output_projection=True)])
@pytest.mark.parametrize("length", [16, 100, 3000])
def test_settings_describe_the_model(changes, length):
    """Red when a field of GPTConfig that has a setting is left out of settings_for, or its batch is not legal."""
    config = dataclasses.replace(build(**changes).config, sequence_len=length, n_layer=3)
    free = dict(value_gate_channels=config.value_gate_channels, value_gate_range=config.value_gate_range)
    settings = conversion.settings_for(config)
    assert (
        dataclasses.replace(GPTConfig.from_settings(settings, config.vocab_size, config.document_start), **free)
        == config
    )
    assert 8192 * 0.6 < settings.total_batch_size <= 8192
    assert settings.batch_plan()
