"""Text from a checkpoint: what is printed is what decode() gives, character by character."""

import os

import pytest
import torch

from nanochat import decoding, engine
from nanochat.checkpoint_manager import load_model
from nanochat.engine import generate
from nanochat.system.environment import UserError
from scripts import audio_generate, base_generate


@pytest.fixture
def trained(train):
    train("writer", overwrite=True)
    return "--model-tag=writer"


def test_streamed_text_is_generated_text(trained, capsys, monkeypatch):
    """One continuation as it comes, three at once, compiled or not, from nothing: the texts of generate().

    Red when --seed is not passed on, or when anything but the text goes to the standard output.
    """
    words = [trained, "--prompt=the cat é", "--max-tokens=40", "--temperature=1.5", "--top-k=300", "--seed=3"]
    capsys.readouterr()
    text = base_generate.main(words)
    assert capsys.readouterr().out == base_generate.printable("the cat é" + text[0]) + "\n"
    model, tokenizer, _ = load_model("base", "cpu", "eval", "writer")
    ids = tokenizer.encode("the cat é", bos=True)
    how = dict(temperature=1.5, top_k=300, seed=3, stop=(tokenizer.bos_id,))
    assert text == [tokenizer.decode(generate(model, ids, 40, **how)[0])]
    monkeypatch.setattr(decoding, "compiler_problem", lambda: "left out")
    capsys.readouterr()
    assert base_generate.main([*words, "--compile"]) == text
    out, notes = capsys.readouterr()
    assert out == base_generate.printable("the cat é" + text[0]) + "\n"
    assert "left out" in notes
    three = base_generate.main([*words, "--num=3"])
    assert three == [tokenizer.decode(new) for new in generate(model, ids, 40, num_samples=3, **how)]
    assert base_generate.main([trained, "--max-tokens=1", "--temperature=0"])


@pytest.mark.parametrize("num", [1, 2])
def test_a_text_ends_before_the_next_begins(num, trained, monkeypatch):
    """Red when the stop tokens are not asked, or when the dtype of the training is not that of the text."""
    tokenizer = load_model("base", "cpu", "eval", "writer")[1]
    drawn = [*tokenizer.encode("cat"), tokenizer.bos_id, *tokenizer.encode("dog")]
    dtypes = []

    def decode(model, *args, num_samples=1, **how):
        dtypes.append(model.compute_dtype)
        return iter(torch.tensor([[token] * num_samples for token in drawn]))

    monkeypatch.setattr(base_generate, "decode", decode)
    monkeypatch.setattr(engine, "decode", decode)
    monkeypatch.setattr(base_generate, "pick_dtype", lambda *args: torch.bfloat16)
    assert base_generate.main([trained, f"--num={num}"]) == ["cat"] * num
    assert dtypes == [torch.bfloat16]


def test_a_character_of_several_tokens_comes_whole(trained, monkeypatch, capsys):
    """Three bytes of a euro sign, one token each, then half a character. Red without the incremental decoder."""
    tokenizer = load_model("base", "cpu", "eval", "writer")[1]
    pieces = [tokenizer.encode(chr(0x20AC)), tokenizer.encode("x"), tokenizer.encode(chr(0x20AC))[:1]]
    tokens = [torch.tensor([token]) for piece in pieces for token in piece]
    assert len(tokens) == 5
    assert tokenizer.bytes_of(tokens[0].item()) == b"\xe2"
    monkeypatch.setattr(base_generate, "decode", lambda *args, **how: iter(tokens))
    assert base_generate.main([trained]) == ["€x�"]
    assert "€x" in capsys.readouterr().out


def test_what_cannot_be_written(trained, monkeypatch):
    with pytest.raises(UserError, match=r"--max-tokens=640 behind a prompt of 1 tokens .* 639 or fewer"):
        base_generate.main([trained, "--max-tokens=640"])
    with pytest.raises(UserError, match="'-1' is not a whole number"):
        base_generate.main([trained, "--seed=-1"])
    with pytest.raises(UserError, match=r"--prompt is \d+ tokens long, the rotary table 640: shorten it"):
        base_generate.main([trained, "--prompt", "1 " * 700])
    monkeypatch.setattr(base_generate, "load_model", lambda *args: (None, None, {}))
    with pytest.raises(UserError, match="no tokenizer"):
        base_generate.main([trained])


@pytest.mark.parametrize("script", [base_generate, audio_generate])
@pytest.mark.parametrize(
    ("flag", "value", "reason"),
    [
        ("--top-k", "0", "'0' is not a whole number of at least 1, or None: among all"),
        ("--top-k", "-1", "or None: among all"),
        ("--seed", str(2**63), f"is larger than {2**63 - 1:,}"),
        ("--seed", "1.5", "is not a whole number of at least 0"),
        ("--num", "1000000000", "is larger than 999,999,999"),
    ],
)
def test_a_number_out_of_range_is_told_its_bound_and_the_way_to_switch_off(script, flag, value, reason, tmp_path):
    """Red when the upper bound shares the message of the lower one, or None is not proposed."""
    with pytest.raises(UserError) as caught:
        script.parse(["--prompt=x", f"{flag}={value}"])
    assert reason in str(caught.value)


def test_large_seeds_and_no_top_k_are_taken(tmp_path):
    """Red when seeds end at 1e9, or None is no value of --top-k."""
    out = [f"--out={tmp_path / 'x.wav'}"]
    for script, further in ((base_generate, []), (audio_generate, out)):
        args = script.parse(["--prompt=x", *further, "--seed=99999999999", "--top-k=None"])
        assert (args.seed, args.top_k) == (99_999_999_999, None)


def test_a_prompt_is_read_as_utf8_whatever_the_locale(monkeypatch):
    """Red without prompt(): under LC_ALL=C an umlaut became two signs for undecodable bytes."""
    escaped = "über".encode().decode("ascii", "surrogateescape")  # what Python makes of it there
    monkeypatch.setattr(os, "fsencode", lambda text: text.encode("ascii", "surrogateescape"))
    assert base_generate.parse([f"--prompt={escaped}"]).prompt == "über"
    assert base_generate.parse(["--prompt=über"]).prompt == "über"
    with pytest.raises(UserError, match="is not UTF-8"):
        base_generate.parse(["--prompt=a\udcffb"])
