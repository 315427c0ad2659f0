"""The inspector: what it says of a complete and a corrupt step, and resealing after an edit by hand."""

import json
from pathlib import Path

import pytest
import torch

from nanochat import checkpoint_files
from nanochat import checkpoint_manager as cm
from nanochat.system.environment import UserError
from scripts.inspect_checkpoint import check, main
from tests.test_checkpoint_manager import TOKENIZER, edit_state, make_model, save, truncate


@pytest.fixture
def root(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    return cm.checkpoints_dir()


def test_a_complete_step_is_described(root, capsys):
    model = make_model(1)
    step = save(root / "m", 1, model, rng="long noise")
    report = main(["--tensors"])
    assert main(["m"])["folder"] == main([str(step.parent)])["folder"] == report["folder"] == str(step)
    assert report["corruption"] is None
    assert report["weights_hash"] == checkpoint_files.weights_hash(model.state_dict())
    assert report["metadata"]["tokenizer_hash"]
    out = capsys.readouterr().out
    assert f"{step}: complete" in out
    assert "transformer.h.0.mlp.c_fc.weight" in out
    assert report["weights_hash"] in out
    assert "long noise" not in out
    assert "1 layers of width 8, 2 heads of 4 (1 of keys and values), 290 ids, context 8" in out
    assert "parameters 5,344: wte 2,320, lm_head 2,320, transformer 704" in out
    assert report["tokenizer"] == f"290 ids, hash {TOKENIZER.hash[:8]}"
    assert report["optimizer"] == "complete"


def test_corruption_is_named_and_an_edit_by_hand_is_resealed(root, capsys):
    """Red when --reseal seals a file that cannot be loaded."""
    step = save(root / "m", 1)
    state = json.loads((step / "state.json").read_text())
    del state["tokenizer_hash"]
    (step / "state.json").write_text(json.dumps(state))
    report = main([str(step)])
    assert "state.json has" in report["corruption"]
    assert "weights_hash" not in report
    report = main([str(step), "--reseal"])
    assert report["corruption"] is None
    assert "tokenizer_hash" not in report["metadata"]
    cm.load_model("base", "cpu", "eval")
    for damage, name in ((truncate, "model.safetensors"), (truncate, "state.json")):
        damage(step / name)
        manifest = (step / "manifest.json").read_bytes()
        with pytest.raises(UserError, match=name):
            main([str(step), "--reseal"])
        assert (step / "manifest.json").read_bytes() == manifest


def test_other_folders_are_refused(root, tmp_path):
    with pytest.raises(UserError, match="no checkpoint in"):
        main([])
    for path, reason in (
        (tmp_path, "no checkpoint that is known: name a step's folder"),
        (tmp_path / "x", "there is no"),
    ):
        with pytest.raises(UserError, match=reason):
            main([str(path)])
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"model\.safetensors alone is no checkpoint: name a step's folder"):
        main([str(tmp_path / "model.safetensors")])
    with pytest.raises(UserError, match=r"not the folder of a step: it has no state\.json"):
        main([str(tmp_path), "--reseal"])


def test_a_complete_step_that_cannot_be_a_model_is_reported(root, capsys):
    """Fields of the future, NaN in the weights. Red when main() does not ask isfinite(), or catches no UserError."""
    edit_state(save(root / "m", 1), novelty=True)
    assert "does not know: novelty. A newer one wrote it: update this repository" in main([])["corruption"]
    model = make_model(2)
    with torch.no_grad():
        model.lm_head.weight[3, 1] = float("nan")
    step = save(root / "m", 2, model)
    of = f"(1 of its {model.lm_head.weight.numel():,} values)"
    assert main([])["corruption"] == f"1 tensors are not finite, lm_head.weight the first {of}: take an earlier step"
    assert f"{step}: 1 tensors are not finite" in capsys.readouterr().out


def test_the_exit_code_tells_whether_a_step_is_complete(root):
    """Of a tag, too, whose newest step is corrupt. Red when check() returns without sys.exit(1) for a corrupt step,
    or goes by the step that is shown alone.
    """
    step = save(root / "m", 1)
    check([str(step)])
    with pytest.raises(SystemExit) as caught:
        truncate(step / "model.safetensors")
        check([str(step)])
    assert caught.value.code == 1
    save(root / "m", 0)
    for words in (["m"], [str(root / "m")], []):
        with pytest.raises(SystemExit) as caught:
            check(words)
        assert caught.value.code == 1
