"""A text model that grows: what it knew stays, and the new parts are those of the plan."""

import dataclasses
import json

import pytest
import torch

from nanochat import checkpoint_files
from nanochat.conversion.growth import grow, grown_config
from nanochat.gpt import GPT
from nanochat.modality import Modality
from nanochat.system.environment import UserError
from scripts import base_train, convert
from tests.test_gpt import MODERN, VARIANTS, build, random_ids
from tests.tiny_run import TINY, flags, losses, metrics, tag_dir

AUDIO = Modality("audio", codebooks=2, codes=8, start=43)
IMAGE = Modality("image", codebooks=1, codes=512, start=44, expert_dim=24)


def opened(state: dict, config) -> GPT:
    model = GPT(config)
    model.init_weights()
    model.load_state_dict(state, strict=True)
    return model


@pytest.mark.parametrize("layers", ["shared", "masked", "separate"])
@pytest.mark.parametrize("untie", ["none", "mlp", "all"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_text_keeps_its_logits(variant, untie, layers):
    """Two modalities, one after the other. Red when the new ids take the first rows of a joint table."""
    text, ids = build(**VARIANTS[variant], **MODERN), random_ids(2, 9, vocab=40)
    config = grown_config(text.config, (AUDIO,), untie, layers)
    one = opened(grow(text.state_dict(), config), config)
    config = grown_config(config, (IMAGE,))
    two = opened(grow(one.state_dict(), config), config)
    expected = text(ids)
    for model in (one, two):
        torch.testing.assert_close(model(ids)[..., :50], expected, rtol=1e-5, atol=1e-5)
    audio = torch.tensor([[3, 43, 51, 60, 66, 4]])
    torch.testing.assert_close(two(audio)[..., :67], one(audio)[..., :67], rtol=1e-5, atol=1e-5)


def test_experts_begin_as_texts_or_anew():
    text = build()
    config = grown_config(text.config, (AUDIO, IMAGE))
    copied, fresh = grow(text.state_dict(), config), grow(text.state_dict(), config, copy_experts=False)
    of_text = text.state_dict()["transformer.h.1.mlp.c_proj.weight"]
    name = "transformer.h.1.mlp.experts.{}.c_proj.weight"
    assert torch.equal(copied[name.format("audio")], of_text)
    assert not fresh[name.format("audio")].any()
    assert copied[name.format("image")].shape == (24, 96)
    assert not copied["transformer.h.1.mlp.experts.image.up_proj.weight"].any()
    assert torch.equal(fresh[name.format("image")], copied[name.format("image")])  # the seed's


def test_what_cannot_be_added_is_refused():
    config = grown_config(build().config, (AUDIO,))
    for modality, said in ((AUDIO, "has audio already"), (dataclasses.replace(IMAGE, start=43), "taken or no text id")):
        with pytest.raises(UserError, match=said):
            grown_config(config, (modality,))
    with pytest.raises(UserError, match="untie='all': the model was trained with 'mlp'"):
        grown_config(config, (IMAGE,), untie="all")


def test_a_text_run_grows_and_trains_on(train, capsys):
    """By the script: the grown model begins a run whose first text loss is that of the trained one."""
    train("words", num_iterations=6)
    tag = convert.main(["--model-tag=words", "--add-modality=audio:32", "--codebooks=2"])
    assert tag == "words-audio"
    assert "audio added" in capsys.readouterr().out
    saved = json.loads((checkpoint_files.step_dir(tag_dir(tag), 0) / "state.json").read_text())
    assert saved["model_config"]["modalities"] == [
        dict(name="audio", codebooks=2, codes=32, start=TINY["vocab_size"] - 7, expert_dim=None)
    ]
    with pytest.raises(UserError, match="is there already"):
        convert.main(["--model-tag=words", "--add-modality=audio:32"])
    for words, said in (
        (["--output-tag=../q"], "no slashes"),
        (["--untie=none", "--expert-dim=48", "--output-tag=q"], "has no experts"),
        (["--output-tag=words-image", "--expert-dim=48"], None),
    ):
        if said:
            with pytest.raises(UserError, match=said):
                convert.main(["--model_tag=words", "--add-modality=image:64", *words])
    convert.main(["--model_tag=words", "--add-modality=image:64", "--output-tag=words-image", "--expert-dim=48"])
    assert "no sounds to learn from" in capsys.readouterr().out
    both = convert.main(["--model_tag=words-image", "--add-modality=audio:32"])
    modalities = json.loads((checkpoint_files.step_dir(tag_dir(both), 0) / "state.json").read_text())["model_config"][
        "modalities"
    ]
    assert [m["expert_dim"] for m in modalities] == [48, 48]  # one width, that its config.py can say
    with pytest.raises(UserError, match="experts of width 48"):
        convert.main(["--model-tag=words-image", "--add-modality=audio:32", "--output-tag=x", "--expert-dim=32"])
    with pytest.raises(UserError, match="names audio twice"):
        convert.main([f"--model-tag={tag}", "--add-modality=audio:32", "--output-tag=again"])
    short = dict(max_seq_len=128, total_batch_size=1024, clip_seconds=0.2, data_limit=60, num_iterations=1)
    base_train.main([str(tag_dir(tag) / "config.py"), *flags(short | dict(model_tag="on"))])
    assert f"initialised from the weights of {checkpoint_files.step_dir(tag_dir(tag), 0)}" in capsys.readouterr().out
    first = next(line for line in metrics("on") if "loss" in line)
    assert first["loss/text"] < losses("words")[0] - 0.2
    assert first["loss/audio"] == pytest.approx(4.17, abs=0.1)
    with pytest.raises(UserError, match=r"init_from=.words. holds another model.*modalities"):
        base_train.main([str(tag_dir(tag) / "config.py"), *flags(short | dict(model_tag="off", init_from="words"))])
