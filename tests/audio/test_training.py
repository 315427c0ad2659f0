"""Captioned sounds on the training loop: what every text run promises, and what is said when parts do not fit."""

import json
import re
import shutil
from itertools import pairwise

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from nanochat import checkpoint_files
from nanochat.audio import loss as audio_loss_eval
from nanochat.audio.generation import generate_codes, open_audio_model, stream_sound, to_sound
from nanochat.audio.listen_page import read_wav, write_wav
from nanochat.audio.loss import count_baselines, derangement, evaluate_audio, iterate_clips
from nanochat.audio.synth import clip
from nanochat.config.settings import Settings
from nanochat.data.token_store import TokenStore, encode_sound
from nanochat.data.tokenizer import Tokenizer
from nanochat.data_pipeline import prepare_for
from nanochat.evaluation.core import Row, score_rows
from nanochat.gpt import GPT, GPTConfig
from nanochat.modality import Vocabulary, modalities_of
from nanochat.optim import build_optimizer
from nanochat.system.environment import UserError
from scripts import audio_eval, audio_generate, base_eval, base_train
from tests.tiny_run import losses, metrics, rows_of, start, state_hashes, tag_dir

SOUNDS = dict(
    data="synth",
    data_limit=60,
    clip_seconds=0.3,
    modalities="audio:32",
    codebooks=2,
    codec="frame",
    max_seq_len=112,
    total_batch_size=1344,
    vocab_size=300,
    num_iterations=6,
    log_rows=True,
    eval_tokens=None,
)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tmp_path_factory.mktemp("base")


def test_a_run_logs_losses_of_each_modality(train):
    """And the checkpoint holds the codec. Red when the parts are not divided by their own targets."""
    train("sounds", **SOUNDS, eval_every=3)
    step = next(line for line in metrics("sounds") if "tokens" in line)
    assert step["loss/text"] == pytest.approx(np.log(300), abs=0.1)
    assert step["loss/audio"] == pytest.approx(np.log(65), abs=0.05)
    assert step["loss"] < step["loss/text"]
    assert step["loss"] > step["loss/audio"]
    evaluations = [line for line in metrics("sounds") if line.get("event") == "eval"]
    assert [line["step"] for line in evaluations] == [3, 6]
    assert evaluations[1]["val_loss/audio"] < evaluations[0]["val_loss/audio"] < np.log(65)
    folder = checkpoint_files.step_dir(tag_dir("sounds"), 6)
    metadata = checkpoint_files.read_metadata(folder)
    assert json.loads((folder / "codec" / "codec.json").read_text())["hash"] == metadata["codec"]["hash"]
    assert not str(metadata["codec"]["directory"]).startswith("/")


@pytest.mark.parametrize("changes", [dict(), dict(untie="all", output_layers="shared", tie_weights=True)])
def test_resumed_is_uninterrupted(train, changes):
    """Bit for bit. Red when the loader forgets its place."""
    tag = "whole" if changes else "whole2"
    train(f"{tag}-stopped", **SOUNDS | changes | dict(num_iterations=3, warmdown_ratio=0.0))
    train(f"{tag}-flat", **SOUNDS | changes | dict(warmdown_ratio=0.0))
    base_train.main([f"--model_tag={tag}-stopped", "--resume", "--num_iterations=6"])
    assert state_hashes(f"{tag}-stopped", 6) == state_hashes(f"{tag}-flat", 6)
    assert losses(f"{tag}-stopped") == losses(f"{tag}-flat")


def test_another_number_of_ranks(train, base, corpus):
    """The 1-rank curve and rows, with batches of two rows: sound on one rank alone, on both, on none.

    Red when a rank decides by its own tokens which experts stay as they are.
    """
    shape = SOUNDS | dict(text_data=corpus, warmdown_ratio=0.0, muon_dtype="float32", total_batch_size=224)
    train("switched", **shape)
    process = start(base, "--model_tag=switched", "--resume", "--num_iterations=14", ranks=2)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 0, output
    base_train.main(["--model_tag=switched", "--resume", "--num_iterations=18"])
    train("alone", **shape | dict(num_iterations=18))
    sounds = [line.get("norm/grad_matrix_audio") for line in metrics("alone") if "tokens" in line]
    assert 0 in sounds
    assert max(sounds) > 0
    assert losses("switched") == pytest.approx(losses("alone"), rel=1e-4)
    assert rows_of("switched", 2) == rows_of("alone", 1)


def test_only_wanted_targets_are_trained(train):
    """loss_modalities=audio: the text's own matrices stay as they were. Red when the mask is dropped."""
    train("codes", **SOUNDS | dict(loss_modalities="audio", num_iterations=2))
    train("first", **SOUNDS | dict(loss_modalities="audio", num_iterations=1))
    assert "loss/text" not in metrics("codes")[2]
    two, one = (
        load_file(checkpoint_files.step_dir(tag_dir(t), n) / "model.safetensors")
        for t, n in (("codes", 2), ("first", 1))
    )
    assert torch.equal(two["lm_head.weight"], one["lm_head.weight"])
    assert not torch.equal(two["lm_heads.audio.weight"], one["lm_heads.audio.weight"])


def test_an_expert_without_tokens_in_the_whole_batch_stays_as_it_is():
    """No update out of old momentum, no decay. Red when idle groups are stepped: Muon makes full-size steps of them."""
    settings = Settings(modalities="audio:8", vocab_size=300, depth=2, model_dim=64, head_dim=32, weight_decay=0.1)
    model = GPT(GPTConfig.from_settings(settings))
    model.init_weights()
    optimizer = build_optimizer(model, settings, torch.float32)
    text = torch.randint(0, 280, (2, 12), generator=torch.Generator().manual_seed(0))
    mixed = text.clone()
    mixed[:, 6:] = 300 + mixed[:, 6:] % 8

    def step(ids: torch.Tensor) -> dict[str, torch.Tensor]:
        model.zero_grad(set_to_none=True)
        model(ids[:, :-1], ids[:, 1:]).backward()
        optimizer.reduce_gradients()
        optimizer.step()
        return {name: p.detach().clone() for name, p in model.named_parameters()}

    first = step(mixed)
    momentum = {k: v for k, v in optimizer.state_dict().items() if ".experts.audio." in k}
    second = step(text)
    audio = [name for name in first if "audio" in name]
    assert len(audio) == 6
    assert all(torch.equal(first[name], second[name]) for name in audio)
    assert all(torch.equal(optimizer.state_dict()[k], v) for k, v in momentum.items())
    assert momentum
    assert not torch.equal(first["transformer.h.0.mlp.c_fc.weight"], second["transformer.h.0.mlp.c_fc.weight"])
    third = step(300 + text % 8)  # sounds alone: then it is text's expert that stays
    assert torch.equal(third["transformer.h.0.mlp.c_fc.weight"], second["transformer.h.0.mlp.c_fc.weight"])
    assert not torch.equal(third["transformer.h.0.mlp.experts.audio.c_fc.weight"], second[audio[0]])
    state = optimizer.state_dict()
    never = {k: v for k, v in state.items() if ".audio." not in k}  # a modality that has not had its first step
    build_optimizer(model, settings, torch.float32).load_state_dict(never)
    for lost in ("transformer.h.0.mlp.c_fc.weight", "transformer.h.1.mlp.experts.audio.c_proj.weight"):
        with pytest.raises(KeyError, match=lost):
            less = {k: v for k, v in state.items() if not k.startswith(lost)}
            build_optimizer(model, settings, torch.float32).load_state_dict(less)


def opened(tag: str = "spoken"):
    return open_audio_model(tag, None, "cpu")


@pytest.fixture
def spoken(train):
    """A short run, once for the tests that generate."""
    if not tag_dir("spoken").exists():
        train("spoken", **SOUNDS | dict(num_iterations=8))
    return "spoken"


def test_the_ids_of_a_document_are_caption_start_codes_end(spoken):
    """By hand from the shard. Red when the frames are laid out codebook by codebook."""
    settings = Settings(**SOUNDS)
    dataset, tokenizer = prepare_for(settings), opened()[1]
    store = TokenStore(dataset, tokenizer, "train", vocabulary=Vocabulary(300, modalities_of(settings, 300)))
    ids, offsets = store.shard(0)
    caption, codes, attributes = next(iterate_clips(dataset, "train"))
    expected = [tokenizer.bos_id, *tokenizer.encode(caption), 293]
    expected += [300 + 32 * q + int(codes[t, q]) for t in range(len(codes)) for q in range(2)] + [364]
    assert ids[offsets[0] : offsets[1]].tolist() == expected
    assert len(codes) == 15
    assert attributes["unseen"] is False


def test_generated_sound(spoken, tmp_path, capsys):
    """Files as many as asked, the same for the same seed; codes legal and not longer than asked. Red without a seed."""
    prompt = next(iterate_clips(prepare_for(Settings(**SOUNDS)), "val"))[0]
    out = tmp_path / "x.wav"
    words = ["--prompt", prompt, "--out", str(out), "--model-tag=spoken", "--seconds=0.4"]
    assert audio_generate.main(words) == [out]
    first, rate = read_wav(out)
    assert rate == 16_000
    assert 0.02 <= len(first) / rate <= 0.4
    three = audio_generate.main([*words, "--num=3"])
    assert [path.name for path in three] == ["x-1.wav", "x-2.wav", "x-3.wav"]
    audio_generate.main(words)
    assert np.array_equal(read_wav(out)[0], first)
    audio_generate.main([*words, "--seed=5", "--temperature=3"])
    assert not np.array_equal(read_wav(out)[0][: len(first)], first)
    model, tokenizer, codec, _, _ = opened()
    codes = generate_codes(model, tokenizer, [prompt, prompt + ".", prompt], frames=6, temperature=3.0, seed=1)
    assert all(one.shape[0] == 2 and 1 <= one.shape[1] <= 6 and 0 <= one.min() <= one.max() < 32 for one in codes)
    alone = generate_codes(model, tokenizer, [prompt] * 2, frames=6, temperature=3.0, seed=1, batch=1)
    for one, other in ((codes[0], codes[2]), alone):  # one caption twice is two sounds
        assert not np.array_equal(one, other)
    assert [len(wav) for wav in to_sound(codec, codes)] == [320 * one.shape[1] for one in codes]


class Steps:
    """A codec whose frames know nothing of each other: 100 equal samples each, the first book's code."""

    sample_rate, frame_rate, codebooks, codes = 5000, 50.0, 2, 32

    def decode(self, codes: np.ndarray) -> np.ndarray:
        return np.repeat(codes[0], 100).astype(np.float32)


def test_streamed_sound_is_the_sound(spoken, monkeypatch):
    """Sample by sample where the codec guesses nothing, and as long with one that does.

    Red when the last frames are not flushed, or the run-up is not cut off.
    """
    model, tokenizer, codec, _, _ = opened()
    prompt = next(iterate_clips(prepare_for(Settings(**SOUNDS)), "val"))[0]
    monkeypatch.setattr("nanochat.audio.generation.STREAM_FRAMES", 4)
    drawn = (generate_codes(model, tokenizer, [prompt], frames=14, seed=seed, temperature=1.0)[0] for seed in range(40))
    seed, codes = next((seed, codes) for seed, codes in enumerate(drawn) if codes.shape[1] in (10, 11))
    pieces = list(stream_sound(model, tokenizer, codec, prompt, frames=14, seed=seed, temperature=1.0))
    whole = codec.decode(codes)
    assert len(pieces) > 2
    assert sum(map(len, pieces)) == len(whole)
    monkeypatch.setattr("nanochat.audio.generation.STREAM_CONTEXT", 3)
    pieces = list(stream_sound(model, tokenizer, Steps(), prompt, frames=14, seed=seed, temperature=1.0))
    assert np.allclose(np.concatenate(pieces), Steps().decode(codes), atol=1e-4)


def test_sound_is_judged(spoken, base, capsys):
    """base_eval has the loss beside its baselines; audio_eval the table, the figures and the page."""
    result = base_eval.main(["--model-tag=spoken", "--eval=bpb,audio,sample"])
    audio = result["audio"]
    assert audio["baselines"]["uniform"] == pytest.approx((15 * np.log(32) + 16 * np.log(33)) / 31)
    assert audio["baselines"]["unigram"] < audio["baselines"]["uniform"]
    assert audio["bits_per_second"] == pytest.approx(audio["nats"] / np.log(2) * 100)
    assert set(audio["splits"]) == {"seen", "unseen"}
    assert result["bpb"]["val"] == pytest.approx(metrics("spoken", "val_bpb")[-1])
    for name in ("text", "audio"):
        assert result["bpb"]["val_losses"][name]["nats"] == pytest.approx(metrics("spoken", f"val_loss/{name}")[-1])
    assert "shuffled captions" in capsys.readouterr().out
    found = audio_eval.main(["--model-tag=spoken", "--num=8"])
    assert found["adherence"]["seen"]["generated"]["n"] + found["adherence"]["unseen"]["generated"]["n"] == 8
    page = (base / "audio" / "spoken" / "listen.html").read_text()
    assert page.count("<audio") == 16
    assert "combinations never heard" in page
    assert json.loads((base / "audio_eval" / "spoken_000008.json").read_text())["clips"] == 8


def test_a_bounded_loss_reads_no_more_sounds_than_it_scores(spoken, monkeypatch):
    """Red when evaluate_audio() goes through the whole split for three sounds."""
    model, tokenizer, _, _, _ = opened()
    dataset, read, every = prepare_for(Settings(**SOUNDS)), [], audio_loss_eval.iterate_clips

    def counted(dataset, split):
        yield from (read.append(split) or clip for clip in every(dataset, split))

    monkeypatch.setattr(audio_loss_eval, "iterate_clips", counted)
    found = evaluate_audio(model, tokenizer, dataset, rows=5, max_clips=3, counted=dict(uniform=1.0))
    assert found["clips"] == 3
    assert read == ["val"] * 4
    assert sum(1 for _ in every(dataset, "val")) > 4


def test_the_loss_over_codes_by_hand(spoken):
    """Against one forward a clip, and a bigram counted with a dictionary. Red when `end` is not scored."""
    model, tokenizer, _, _, _ = opened()
    dataset = prepare_for(Settings(**SOUNDS))
    found = evaluate_audio(model, tokenizer, dataset, rows=5)
    nats = count = 0
    for caption, codes, _ in iterate_clips(dataset, "val"):
        prompt, sound = tokenizer.encode(caption, bos=True), encode_sound(model.vocabulary, codes)
        ids = torch.tensor([[*prompt, *sound]])
        logits = model(ids[:, :-1])[0, len(prompt) :, 300:].log_softmax(dim=-1)
        nats -= logits[range(len(sound) - 1), torch.tensor(sound[1:]) - 300].sum().item()
        count += len(sound) - 1
    assert found["nats"] == pytest.approx(nats / count, rel=1e-5)
    assert found["codes"] == count
    assert found["baselines"]["shuffled_captions"] != found["nats"]
    captions = ["a", "b", "a", "c", "d", "c"]
    assert all(captions[i] != captions[other] for i, other in enumerate(derangement(captions, 0)))
    table: dict[tuple[int, int], int] = {}
    for _, codes, _ in iterate_clips(dataset, "train"):
        ids = encode_sound(model.vocabulary, codes)
        for pair in pairwise(ids):
            table[pair] = table.get(pair, 0) + 1
    followed = {b: sum(n for (_, y), n in table.items() if y == b) for b in range(300, 365)}

    def unigram(b: int) -> float:
        legal = [*range(300, 332), 364] if b < 332 or b == 364 else range(332, 364)
        return (followed[b] + 0.5) / sum(followed[i] + 0.5 for i in legal)

    sounds = [encode_sound(model.vocabulary, codes) for _, codes, _ in iterate_clips(dataset, "val")]
    expected = total = 0.0
    for ids in sounds:
        for a, b in pairwise(ids):
            seen = sum(n for (x, _), n in table.items() if x == a)
            expected -= np.log((table.get((a, b), 0) + 4 * unigram(b)) / (seen + 4))
            total += 1
    behind = [ids[1:] for ids in sounds]  # `start` is given
    assert count_baselines(dataset, model.vocabulary, behind)["bigram"] == pytest.approx(expected / total)


# ---------------------------------------------------------------------------------------------------------------------
# what does not fit


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (dict(modalities=None), "data=synth is captioned sounds: set modalities"),
        (dict(modalities="audio"), "'audio' is not name:codes"),
        (dict(loss_modalities="sound"), "no modality 'sound' among text, audio"),
        (dict(modalities="audio:32,image:64", loss_modalities="image"), "nothing would be learnt"),
        (dict(modalities="audio:32,audio:64"), "names audio twice"),
        (dict(modalities="image:64", data="stdlib", route="grouped", expert_dim=48), "expert_dim=48 is not 64"),
        (dict(codec="pitch", codebooks=1), "codebooks must be at least 2"),
        (dict(route="grouped", expert_dim=48), "expert_dim=48 is not 64"),
        (dict(max_seq_len=24, total_batch_size=288), "fits a row of max_seq_len=24.*--clip_seconds"),
        (dict(init_from="nobody"), "there is no .*nobody"),
    ],
)
def test_settings_that_do_not_fit(train, changes, said):
    with pytest.raises(UserError, match=f"(?s){said}"):
        train("never", **SOUNDS | changes)


def test_all_routes_train_with_the_losses_of_sort(train):
    """Red when base_train does not give the setting to the model, or a route mixes experts up."""
    for route in ("sort", "where", "grouped"):
        train(route, **SOUNDS | dict(route=route))
    for route in ("where", "grouped"):
        assert losses(route) == pytest.approx(losses("sort"), rel=1e-4)


def test_a_tokenizer_without_reserved_ids_cannot_start_a_modality(train, base):
    ranks = [bytes([i]) for i in range(256)]
    Tokenizer(ranks, specials=("<|bos|>",)).save(base / "bare")
    with pytest.raises(UserError, match=r"no <\|reserved_0\|> at id 250 to start audio"):
        train("bare", **SOUNDS | dict(tokenizer=str(base / "bare")))


def test_a_checkpoint_whose_parts_do_not_belong_together(spoken, train):
    """Another codec, none, a model of text: one line each. Red when the hash is not compared."""
    folder = checkpoint_files.step_dir(tag_dir("spoken"), 8)
    train("other", **SOUNDS | dict(data_limit=70, num_iterations=1))
    with pytest.raises(UserError, match=r"holds no complete step|there is no"):
        opened("nobody")
    copy = tag_dir("mixed") / folder.name
    shutil.copytree(folder, copy)
    shutil.rmtree(copy / "codec")
    shutil.copytree(checkpoint_files.step_dir(tag_dir("other"), 1) / "codec", copy / "codec")
    checkpoint_files.write_manifest(copy)
    with pytest.raises(UserError, match="is not the codec of the training data"):
        opened("mixed")
    shutil.rmtree(copy / "codec")
    checkpoint_files.write_manifest(copy)
    with pytest.raises(UserError, match="holds no codec"):
        opened("mixed")
    train("words", num_iterations=1)
    with pytest.raises(UserError, match="is a model of text: train one"):
        opened("words")
    model, tokenizer, _, _, _ = opened()
    with pytest.raises(UserError, match="no room for sound"):
        generate_codes(model, tokenizer, ["a word " * 100])


def test_sounds_of_another_codec(spoken, train, tmp_path, capsys):
    """Equal codes would mean other sounds: refused, with the way out; base_eval codes other sounds with the model's.

    Red when check_codec is left out.
    """
    more = SOUNDS | dict(data_limit=70)
    with pytest.raises(UserError, match=r"--codec=.*step_000008/codec"):
        train("astray", **more | dict(init_from="spoken"))
    train("words2", num_iterations=1)
    words = checkpoint_files.step_dir(tag_dir("words2"), 1) / "tokenizer"
    with pytest.raises(UserError, match="the tokenizer has hash"):
        train("astray", **SOUNDS | dict(init_from="spoken", tokenizer=str(words), overwrite=True))
    codec = str(checkpoint_files.step_dir(tag_dir("spoken"), 8) / "codec")
    train("on", **more | dict(init_from="spoken", codec=codec, num_iterations=1))
    assert "initialised from the weights of" in capsys.readouterr().out
    sounds = tmp_path / "sounds"
    sounds.mkdir()
    for number in range(40):
        one = clip(900 + number, seconds=0.3)
        write_wav(sounds / f"sound {number}.wav", one.wav, 16_000)
        (sounds / f"sound {number}.txt").write_text(one.caption)
    result = base_eval.main(["--model-tag=spoken", "--eval=audio", f"--data={sounds}"])
    assert 0 < result["audio"]["nats"] < np.log(33)


def test_a_model_with_audio_on_text_alone(spoken, corpus):
    """Its text can be compared with any other model's. Red when a folder of text is searched for sounds."""
    result = base_eval.main(["--model-tag=spoken", "--eval=bpb,audio", f"--data={corpus}"])
    assert result["bpb"]["val"] > 0
    assert "audio" not in result


def test_an_audio_head_has_no_say_in_a_suite(spoken):
    """Text is scored among text, as in the loss. Red when the suite's softmax is over all ids."""
    model, tokenizer, _, _, _ = opened()
    rows = [Row(0, tokenizer.encode("a rising line in minor", bos=True), 3, 9)]
    before = score_rows(model, rows, 0, 1000)
    with torch.no_grad():
        model.lm_heads["audio"].weight.normal_(std=3.0)
    assert score_rows(model, rows, 0, 1000) == before
    ids = torch.tensor([rows[0].tokens])
    loss = model(ids[:, :-1], ids[:, 1:], loss_reduction="none")[0, 2:8].mean().item()
    assert before[0][0] == pytest.approx(loss, rel=1e-5)


def test_resume_needs_no_other_checkpoint(spoken, train):
    """A run that began with another's weights goes on without it. Red when the tokenizer comes from init_from."""
    train("child", **SOUNDS | dict(init_from="spoken", num_iterations=1))
    shutil.move(tag_dir("spoken"), tag_dir("gone"))
    try:
        base_train.main(["--model_tag=child", "--resume", "--num_iterations=2"])
    finally:
        shutil.move(tag_dir("gone"), tag_dir("spoken"))
    assert len(losses("child")) == 2


def test_what_the_data_has_nothing_of_is_said(train, capsys):
    train("image", **SOUNDS | dict(modalities="audio:32,image:64", num_iterations=1))
    assert "has no image data" in capsys.readouterr().out


def test_ids_are_made_anew_for_another_layout(spoken):
    """Red when the stamp does not know where audio begins."""
    dataset, tokenizer = prepare_for(Settings(**SOUNDS)), opened()[1]
    for spec, first in (("audio:32", 300), ("image:64, audio:32", 365)):
        vocabulary = Vocabulary(300, modalities_of(Settings(**SOUNDS | dict(modalities=spec)), 300))
        ids, offsets = TokenStore(dataset, tokenizer, "train", vocabulary=vocabulary).shard(0)
        assert ids[offsets[1] - 1] == vocabulary.end("audio")
        assert ids.max() < first + 65


def test_sounds_need_a_model_with_audio(spoken):
    dataset, tokenizer = prepare_for(Settings(**SOUNDS)), opened()[1]
    for vocabulary, said in (
        (None, "set --modalities=audio:32 --codebooks=2"),
        (Vocabulary(300, modalities_of(Settings(**SOUNDS | dict(modalities="audio:16")), 300)), "the model has 2 x 16"),
    ):
        with pytest.raises(UserError, match=said):
            TokenStore(dataset, tokenizer, vocabulary=vocabulary)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--out=x.wav", "--prompt"),
        ("--prompt=x", "name a file"),
        ("--prompt=x --out=x.au", ".au"),
        ("--prompt=x --out=x.wav --num=0", "'0' is not a whole number of at least 1"),
        ("--prompt=x --nim=1", "see --help"),
        ("--prompt=x --stream --num=2", "leave --num out"),
        ("--prompt=x --out=x.wav --temperature=nan", "'nan' is not a number of at least 0"),
        ("--prompt=x --out=x.wav --temperature=1e-40", "neither 0 nor at least 0.001"),
        ("--prompt=x --out=/dev/null/x.wav", "cannot be written"),
        ("--prompt=x --out=x.wav --model_tag=nobody", "there is no"),  # underscores are dashes
    ],
)
def test_words_that_are_refused(words, said):
    with pytest.raises(UserError, match=re.escape(said)):
        audio_generate.main(words.split())
