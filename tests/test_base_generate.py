"""Text from a checkpoint: what is printed is what decode() gives, character by character."""

import pytest
import torch

from nanochat import decoding
from nanochat.checkpoint_manager import load_model
from nanochat.engine import generate
from nanochat.runtime import UserError
from scripts import base_generate


@pytest.fixture
def trained(train):
    train("writer", overwrite=True)
    return "--model-tag=writer"


def test_streamed_text_is_generated_text(trained, capsys, monkeypatch):
    """One continuation as it comes, three at once, compiled or not, from nothing: the texts of generate().

    Red when the stop tokens are not asked, when --seed is not passed on, or when bytes are decoded one by one.
    """
    words = [trained, "--prompt=the cat é", "--max-tokens=40", "--temperature=1.5", "--top-k=300", "--seed=3"]
    capsys.readouterr()
    text = base_generate.main(words)
    printed = capsys.readouterr().out
    model, tokenizer, _ = load_model("base", "cpu", "eval", "writer")
    ids = tokenizer.encode("the cat é", bos=True)
    how = dict(temperature=1.5, top_k=300, seed=3, stop=(tokenizer.bos_id,))
    assert text == [tokenizer.decode(generate(model, ids, 40, **how)[0])]
    assert "the cat é" + base_generate.printable(text[0]) in printed
    monkeypatch.setattr(decoding, "compiler_problem", lambda: "left out")
    assert base_generate.main([*words, "--compile"]) == text
    three = base_generate.main([*words, "--num=3"])
    assert three == [tokenizer.decode(new) for new in generate(model, ids, 40, num_samples=3, **how)]
    assert base_generate.main([trained, "--max-tokens=1", "--temperature=0"])


def test_a_character_of_several_tokens_comes_whole(trained, monkeypatch, capsys):
    """Three bytes of a euro sign, one token each, then half a character. Red without the incremental decoder."""
    tokenizer = load_model("base", "cpu", "eval", "writer")[1]
    pieces = [tokenizer.encode(chr(0x20AC)), tokenizer.encode("x"), tokenizer.encode(chr(0x20AC))[:1]]
    tokens = [torch.tensor([token]) for piece in pieces for token in piece]
    assert len(tokens) == 5 and tokenizer.bytes_of(tokens[0].item()) == b"\xe2"
    monkeypatch.setattr(base_generate, "decode", lambda *args, **how: iter(tokens))
    assert base_generate.main([trained]) == ["€x�"]
    assert "€x" in capsys.readouterr().out


def test_what_cannot_be_written(trained, monkeypatch):
    with pytest.raises(UserError, match=r"--max-tokens=640 behind a prompt of 1 tokens .* 639 or fewer"):
        base_generate.main([trained, "--max-tokens=640"])
    with pytest.raises(UserError, match="'-1' is not a whole number"):
        base_generate.main([trained, "--seed=-1"])
    monkeypatch.setattr(base_generate, "load_model", lambda *args: (None, None, {}))
    with pytest.raises(UserError, match="no tokenizer"):
        base_generate.main([trained])
