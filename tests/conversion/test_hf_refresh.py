"""Exports of earlier commits get the code of today."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from nanochat.conversion import huggingface as hf_format
from nanochat.conversion.hf_refresh import refresh
from nanochat.conversion.huggingface import read_hf, write_hf
from nanochat.engine import generate
from nanochat.gpt import GPT
from nanochat.system.environment import UserError
from nanochat.upstream import hf_model_types
from nanochat.upstream.hf_model_types import MODELING
from scripts import export_hf
from tests.conversion.test_huggingface import load
from tests.test_gpt import build

FIRST = Path(__file__).parents[1] / "exports" / "first"  # by the commit that brought export_hf, with the logits of then


@pytest.fixture
def first(tmp_path) -> Path:
    return Path(shutil.copytree(FIRST, tmp_path / "first"))


def test_an_export_of_the_first_commit_is_refreshed(first, capsys, monkeypatch):
    """Its logits of then, greedy text with the cache, and its tokenizer without a question. Red when refresh() leaves
    out a file, drops the old code, or writes a field that this model has not."""
    before = {path.name: path.read_bytes() for path in first.iterdir()}
    changes = export_hf.main([f"--refresh={first}"])["changes"]
    printed = capsys.readouterr().out
    assert len(changes) == 3
    assert all(line in printed for line in changes)
    assert 'config.json: model_type "nanochat_modern" -> "nanochat"' in changes
    after = {path.name: path.read_bytes() for path in first.iterdir()}
    kept = after.keys() - before.keys()
    assert [after[name] for name in kept] == [before[MODELING]]
    assert changes[0].endswith(*kept)
    assert after[MODELING] == Path(hf_format.__file__).with_name(MODELING).read_bytes()
    changed = {name for name in before if after[name] != before[name]}
    assert changed == {MODELING, "config.json"}
    old, new = (json.loads(files["config.json"]) for files in (before, after))
    assert new == old | dict(model_type="nanochat", hidden_act=hf_model_types.NEEDS_CODE)

    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question was asked"))
    assert AutoTokenizer.from_pretrained(first)("the cat").input_ids == read_hf(first)[2].encode("the cat")
    expected = load_file(FIRST.with_name("first-expected.safetensors"))
    there = load(first, trust_remote_code=True, dtype=torch.float32)
    ids = expected["ids"]
    with torch.inference_mode():
        torch.testing.assert_close(there(ids).logits, expected["logits"], rtol=0, atol=1e-5)
    config, state, _ = read_hf(first)
    model = GPT(config).eval()
    model.load_state_dict(state)
    told = there.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=9, do_sample=False, eos_token_id=None
    )
    assert told[0, 12:].tolist() == generate(model, ids[0].tolist(), 9, temperature=0)[0]

    assert export_hf.main([f"--refresh={first}"])["changes"] == []
    assert "up to date" in capsys.readouterr().out
    assert len(list(first.iterdir())) == len(after)


def test_an_export_of_today_is_up_to_date(tmp_path):
    """Red when write_hf and refresh() disagree on a field."""
    model = build(smear=True)
    write_hf(tmp_path / "out", model.config, model.state_dict())
    assert refresh(tmp_path / "out") == []
    (tmp_path / "out" / MODELING).unlink()
    assert refresh(tmp_path / "out") == [f"{MODELING}: new"]
    assert refresh(tmp_path / "out") == []


def test_a_refresh_that_fails_leaves_a_folder_that_works(first, monkeypatch):
    """Red when config.json is written before the code that it needs, or either by halves."""
    wanted = Path(hf_format.__file__).with_name(MODELING).read_bytes()
    monkeypatch.setattr("nanochat.conversion.hf_refresh.write", failing := Failing())
    for at in (1, 2, 3):
        failing.at, failing.count = at, 0
        with pytest.raises(OSError, match="full"):
            refresh(first)
        assert (first / "config.json").read_bytes() == (FIRST / "config.json").read_bytes()
        assert (first / MODELING).read_bytes() in (wanted, (FIRST / MODELING).read_bytes())
        shutil.copy(FIRST / MODELING, first)
    assert not [path for path in first.iterdir() if path.name.endswith(".tmp")]


class Failing:
    """write() that finds the disk full at its at-th call."""

    from nanochat.conversion.hf_refresh import write as original

    def __call__(self, path, content):
        self.count += 1
        if self.count == self.at:
            raise OSError(28, "disk full", str(path))
        Failing.original(path, content)


def test_what_is_no_such_export_is_refused(first, tmp_path):
    """Red when format_of() takes any config.json, or a newer program's code is replaced by ours."""
    model = build()
    write_hf(tmp_path / "classic", model.config, model.state_dict())
    for folder, told in ((tmp_path / "classic", "classic NanoChat.*nothing to refresh"), (tmp_path, "no config.json")):
        with pytest.raises(UserError, match=told):
            refresh(folder)
    assert MODELING not in [path.name for path in (tmp_path / "classic").iterdir()]
    code = first / MODELING
    newer = code.read_text().replace(
        "        smear: bool = False,\n", "        smear: bool = False,\n        news: int = 0,\n"
    )
    code.write_text(newer)
    with pytest.raises(UserError, match="has news, which this program does not know"):
        refresh(first)
    assert code.read_text() == newer
    config = json.loads((first / "config.json").read_text())
    for changes, told in ((dict(model_type="llama"), "model_type is 'llama'"), (dict(smear="yes"), "smear='yes'")):
        (first / "config.json").write_text(json.dumps(config | changes))
        with pytest.raises(UserError, match=told):
            refresh(first)
    for words, told in (
        ([f"--refresh={first}", "--out=x"], "goes without --out"),
        ([f"--refresh={first}", "--dtype=float32"], "goes without --dtype"),
        ([], "--out=FOLDER"),
    ):
        with pytest.raises(UserError, match=told):
            export_hf.main(words)
