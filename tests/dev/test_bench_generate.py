"""The benchmark of generation: its contenders are what they are called, and another text is found out."""

from argparse import Namespace

import pytest
import torch

from nanochat import decoding
from nanochat.system.environment import UserError
from scripts.bench import evaluate, generate


@pytest.fixture(autouse=True)
def small(monkeypatch):
    for name, value in dict(vocab_size=300, n_layer=2, n_embd=64, sequence_len=64).items():
        monkeypatch.setitem(evaluate.SHAPE, name, value)
    monkeypatch.setattr(generate, "matmul_peak", lambda *args: 1e9)
    monkeypatch.setattr(generate, "COPY_BYTES", 1 << 12)
    monkeypatch.setattr(decoding, "compiled_last_logits", lambda: decoding.last_logits)  # costs no seconds


def args(**changes) -> Namespace:
    plan = dict(rounds=2, batches="1,2", prompt=5, new=6, dtypes="float32", device_type="cpu")
    return Namespace(**{**plan, **changes}, compute=Namespace(device=torch.device("cpu")))


def test_contenders_and_the_same_text(monkeypatch, capsys):
    """Red when `compiled` is not passed on to decode(), or same_text() compares a text with itself."""
    asked = []
    drawn = generate.decode

    def watched(*arguments, **how):
        asked.append(how["compiled"])
        return drawn(*arguments, **how)

    monkeypatch.setattr(generate, "decode", watched)
    result = generate.run(args())
    assert set(result["contenders"]) == {f"{way} float32 x {rows}" for way in ("eager", "compiled") for rows in (1, 2)}
    assert sum(asked) == len(asked) / 2
    assert result["same"] == {1: True, 2: True}
    assert "by rows: {1: True, 2: True}" in capsys.readouterr().out
    monkeypatch.setattr(decoding.StaticCache, "advance", lambda self, *new: None)  # every token at one place
    assert generate.run(args())["same"] == {1: False, 2: False}


def test_bytes_of_a_step_by_hand():
    """2 layers of width 64, a head of 64 ids: matrices 2 x 12 x 64^2 + 300 x 64, and 10 positions of 2 rows."""
    model = evaluate.random_model(0, torch.device("cpu"))
    assert generate.bytes_of_a_step(model, 2, 10) == 4 * (2 * 12 * 64**2 + 300 * 64 + 2 * 2 * 2 * 10 * 64)


@pytest.mark.parametrize(
    ("changes", "words"),
    [(dict(batches="1,x"), "'1,x'"), (dict(new=1), "--new 1: at least"), (dict(prompt=635), "at most 640")],
)
def test_plans_that_cannot_be(changes, words):
    with pytest.raises(UserError, match=words):
        generate.run(args(**changes))


def test_nothing_uncompiled_is_called_compiled(monkeypatch):
    monkeypatch.setattr(generate, "compiler_problem", lambda: "no C++ compiler (g++) on PATH")
    with pytest.raises(UserError, match="nothing can be compiled here: no C"):
        generate.run(args())
