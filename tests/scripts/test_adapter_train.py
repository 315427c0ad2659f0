"""scripts.adapter_train, adapter_generate and adapter_eval on tiny models in folders, and what is refused."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from nanochat import checkpoint_files
from nanochat import checkpoint_manager as cm
from nanochat.adapters.checkpoint import AdapterRun, open_adapters
from nanochat.adapters.counts import parameter_counts
from nanochat.adapters.hosts import load_host, state_hash
from nanochat.audio.codecs import load_codec
from nanochat.audio.generation import generate_codes
from nanochat.audio.listen_page import read_wav
from nanochat.data.packing import PackedLoader, Rows
from nanochat.data_pipeline import prepare_for
from nanochat.engine import decode
from nanochat.evaluation.bpb import bits_per_byte
from nanochat.system.environment import UserError
from scripts import adapter_eval, adapter_generate, adapter_train
from tests.audio.test_encodec import SHAPES, save_model
from tests.hosts_fixtures import tiny_llama
from tests.musicgen_fixtures import tiny_musicgen
from tests.tiny_run import exit_code, flags, losses, metrics, rows_of, start, state_hashes, tag_dir

SOUNDS = dict(
    data="synth",
    data_limit=60,
    clip_seconds=0.3,
    modalities="audio:32",
    codebooks=2,
    codec="frame",
    max_seq_len=112,
    total_batch_size=1344,
    device_batch_size=3,
    num_iterations=4,
    eval_every=2,
    eval_clips=4,
    check_text=None,
    save_every=None,
    warmup_steps=0,
    learning_rate=0.01,
    log_rows=True,
    device_type="cpu",
    dtype="float32",
)
STAGE = "adapter"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tmp_path_factory.mktemp("base")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    tiny_llama(root / "tied", tied=True)
    tiny_llama(root / "untied", tied=False)
    tiny_llama(root / "other", tied=True, seed=1)
    tiny_musicgen(root / "musicgen")
    tiny_musicgen(root / "another", seed=1)
    save_model(root / "encodec", **SHAPES["at32"])
    return root


@pytest.fixture
def teach(models, base, train):
    """teach(tag, *switches, **settings): adapter_train's main() around the tiny host and MusicGen."""

    def run(tag: str, *words: str, **settings) -> dict:
        given = dict(host=models / "tied", musicgen=models / "musicgen", **SOUNDS) | settings
        return adapter_train.main([*flags(given | dict(model_tag=tag)), *words])

    return run


@pytest.fixture
def speaks(teach, base):
    """A checkpoint to open, made once."""
    if not tag_dir("speaks", STAGE).exists():
        teach("speaks", check_text="stdlib", check_tokens=300, clip_seconds=0.5)
    return "speaks"


def same_run(tag: str, step: int, ranks: int = 1) -> list:
    return [state_hashes(tag, step, STAGE), losses(tag, STAGE), rows_of(tag, ranks, STAGE)]


def test_from_folders_to_a_sound(teach, models, tmp_path):
    """Host (tied and untied), MusicGen and EnCodec from folders: 10 steps, saved, and from them a wav of 0.4 s sharp.

    Red when the length is the codec's last whole second, or when a tensor that is trained is not saved."""
    for name in ("tied", "untied"):
        hashed = state_hash(load_host(str(models / name), "cpu", torch.float32))
        teach(
            name,
            host=models / name,
            codec=f"encodec:{models / 'encodec'}",
            modalities="audio:64",
            codebooks=4,
            clip_seconds=0.4,
            num_iterations=10,
            max_seq_len=160,
            total_batch_size=480,
            vocabulary="expanded",
            learning_rate=0.003,
        )
        assert losses(name, STAGE)[-1] < losses(name, STAGE)[0] == pytest.approx(np.log(256), abs=1e-4)
        folder = checkpoint_files.step_dir(tag_dir(name, STAGE), 10)
        state = load_file(folder / "model.safetensors")
        assert state.keys() == {
            "audio_embedding.weight",
            "audio_output.weight",
            *(f"experts.{i}.{part}_proj.weight" for i in (0, 1) for part in ("down", "up")),
        }
        size = sum(tensor.numel() * 4 for tensor in state.values())
        assert (folder / "model.safetensors").stat().st_size < size + 1000
        found = json.loads((folder / "state.json").read_text())["adapters"]
        assert found["layer_map"] == [0, 5]
        assert found["host_hash"]
        assert found["expert_hash"]
        assert found["start"] is None
        assert state_hash(load_host(str(models / name), "cpu", torch.float32)) == hashed
        words = ["--prompt=a high sine", f"--out={tmp_path / name}.wav", "--seconds=0.4", f"--model-tag={name}"]
        adapter_generate.main([*words, "--device-type=cpu"])
        wav, rate = read_wav(tmp_path / f"{name}.wav")
        assert rate == 32000
        assert len(wav) == 12800


@pytest.mark.parametrize("expert", ["frozen", "trained", "random", "none"])
def test_opened_is_what_was_trained(teach, base, models, expert):
    """The held-out loss of an opened checkpoint is the one that the training saw at its end. Red when the experts that
    are trained come from MusicGen again."""
    from nanochat.audio.loss import evaluate_audio

    further = dict(musicgen=None, expert_dim=24) if expert in ("random", "none") else {}
    found = teach(f"kinds-{expert}", expert=expert, **further)
    model, _, metadata, settings, _ = open_adapters(f"kinds-{expert}", None, "cpu")
    again = evaluate_audio(model, model.host.tokenizer, prepare_for(settings), rows=4, max_clips=4)
    assert again["nats"] == pytest.approx(found["val_loss/audio"], abs=1e-6)
    counts = metadata["derived"]["parameters"]
    assert counts["trained"] == sum(p.numel() for _, p in model.trained())
    assert parameter_counts(settings) == counts | {"whole output": (272 + 65) * 32}  # what the wizard shows
    expected = None if expert in ("none", "trained") else 64
    assert expected is None or len(metadata["adapters"]["expert_hash"]) == expected


def test_resumed_is_uninterrupted(teach):
    """Bit for bit, caption dropout included. Red when the optimizer's state or the loader's place is forgotten."""
    teach("bits", save_every=2, caption_dropout=0.5)
    whole = same_run("bits", 4)
    shutil.rmtree(tag_dir("bits", STAGE) / "step_000004")
    adapter_train.main(["--model_tag=bits", "--resume"])
    assert same_run("bits", 4) == whole


def test_the_text_of_a_resumed_run_is_found_again(teach, tiny_corpus, tmp_path, capsys):
    """check_text's folder is gone: its prepared shards are the ones that were measured before the training.

    Red when make_text_loss() prepares what check_text names.
    """
    source = shutil.copytree(tiny_corpus, tmp_path / "checked")
    text = dict(check_text=source, check_tokens=300)
    first = teach("checked", num_iterations=2, **text)
    shutil.rmtree(source)
    again = teach("checked", "--resume", num_iterations=4, **text)
    assert again["step"] == 4
    assert again["val_loss/text"] == first["val_loss/text"]
    assert "warning: check_text" not in capsys.readouterr().out


@pytest.fixture
def ours(train, base):
    """Settings with a text model of ours as host, made once: processes that need no transformers start in a second."""
    if not tag_dir("host").exists():
        modern = dict(value_embeddings=True, smear=True, residual_scalars=True, tie_weights=True, max_seq_len=112)
        train("host", **modern, total_batch_size=1344, num_iterations=6)
    return SOUNDS | dict(host="nanochat:host", expert="random", musicgen=None, expert_dim=32)


def test_two_ranks_are_one(teach, base, ours):
    """Losses within 1e-5, the same rows; then on from there with one rank. Red when gradients are not summed."""
    teach("one", **ours | dict(num_iterations=6))
    words = flags(ours | dict(model_tag="two"))
    process = start(base, *words, ranks=2, module="scripts.adapter_train")
    assert process.wait(timeout=240) == 0, process.output()
    assert losses("two", STAGE) == pytest.approx(losses("one", STAGE)[:4], abs=1e-5)
    assert rows_of("two", 2, STAGE) == {k: v for k, v in rows_of("one", 1, STAGE).items() if k <= 4}
    adapter_train.main(["--model_tag=two", "--resume", "--num_iterations=5"])
    assert len(losses("two", STAGE)) == 5


def test_killed_at_once_and_resumed(teach, base, ours):
    """SIGKILL after the first save; the resumed run ends as the whole one does. Red when the loader starts anew."""
    teach("whole", **ours | dict(num_iterations=8, save_every=2))
    words = flags(ours | dict(model_tag="killed", num_iterations=8, save_every=2))
    process = start(base, *words, module="scripts.adapter_train")
    folder = tag_dir("killed", STAGE)
    while not cm.list_steps(folder):
        assert process.poll() is None, process.output()
    process.kill()
    process.wait()
    adapter_train.main(["--model_tag=killed", "--resume"])
    assert same_run("killed", 8) == same_run("whole", 8)


def test_a_host_of_ours(teach, base, ours, capsys):
    """A text model trained here: its bits per byte are the same to the last bit, and the held-out loss falls.

    Red when a value embedding or the smear of the host looks up an id that is not its own.
    """
    host = load_host("nanochat:host@6", "cpu", torch.float32)
    for place, said in (("host@7", "step 7 is not in"), ("host@", "nanochat:d4-tied@800"), ("nobody", "no .*nobody")):
        with pytest.raises(UserError, match=said):
            load_host(f"nanochat:{place}", "cpu", torch.float32)
    tokenizer, stream = host.tokenizer, np.array(host.tokenizer.encode("It was a bright cold day. " * 20, bos=True))
    how = dict(rows=2, seq_len=64)
    before = bits_per_byte(host.model, stream, tokenizer.token_bytes, **how)
    found = teach("ours", **ours | dict(num_iterations=12, check_text="stdlib", check_tokens=500))
    out = capsys.readouterr().out
    assert "unchanged" in out
    assert "the host's tensors are unchanged" in out
    assert found["val_loss/audio"] < np.log(65) - 0.05
    model, _, metadata, settings, _ = open_adapters("ours", None, "cpu")
    counts = metadata["derived"]["parameters"]
    assert parameter_counts(settings) == counts | {"whole output": (300 + 65) * 64}
    assert bits_per_byte(model.host.model, stream, tokenizer.token_bytes, **how) == before
    assert bits_per_byte(model, stream, tokenizer.token_bytes, **how)["bpb"] == pytest.approx(before["bpb"], abs=1e-6)
    model.plan = True  # as inside of features()
    values = model.host.embeddings[1](torch.tensor([[3, 302]]))
    model.plan = None
    assert torch.equal(values[0, 0], model.host.embeddings[1].weight[3])
    assert (values[0, 1] == 0).all()
    with torch.no_grad():
        model.audio_output.weight.normal_(std=100.0)
        assert 14 < model(torch.tensor([[3, 302]])).abs().max() <= 15  # capped like the host's words


def test_whole_output_is_warned_about(teach, capsys):
    """With the measured change. Red when the text is measured by the host alone afterwards."""
    teach("whole-output", train_output="whole", output_layers="shared", check_text="stdlib", check_tokens=500)
    out = capsys.readouterr().out
    assert "warning: train_output=whole" in out
    assert "changed by" in out
    assert "by the shared softmax" in out
    (line,) = [m for m in metrics("whole-output", stage=STAGE) if m.get("event") == "done"]
    assert line["val_loss/text"] > 0


def test_refused_filter_trains_nothing(models, base, teach):
    """The filter "output" on a tied host: refused before a folder of the run holds a step."""
    with pytest.raises(UserError, match="unfreeze='output' names no parameter"):
        teach("filter", unfreeze="output")
    assert not cm.list_steps(tag_dir("filter", STAGE))


def test_generation_and_evaluation(speaks, base, tmp_path, capsys):
    """Words equal the host's; several sounds; guidance; the evaluation's file tells loss, text and captions obeyed.

    Red when the evaluation takes the text loss of the training's first step for the present one.
    """
    model, *_ = open_adapters("speaks", None, "cpu")
    prompt = model.host.tokenizer.encode("the king", bos=True)
    theirs = model.host.model.generate(torch.tensor([prompt]), max_new_tokens=6, do_sample=False, pad_token_id=0)
    how = ["--model-tag=speaks", "--device-type=cpu", "--temperature=0"]
    (words,) = adapter_generate.main(["--prompt=the king", "--text", "--max-tokens=6", *how])
    wanted = theirs[0, len(prompt) :].tolist()
    stop = wanted.index(model.host.tokenizer.bos_id) if model.host.tokenizer.bos_id in wanted else 6
    assert words == model.host.tokenizer.decode(wanted[:stop])
    paths = adapter_generate.main(
        ["--prompt=low", f"--out={tmp_path / 'a.wav'}", "--num=2", "--guidance=2.5", "--seconds=0.1", how[0]]
    )
    assert [path.name for path in paths] == ["a-1.wav", "a-2.wav"]
    assert all(len(read_wav(path)[0]) <= 1600 for path in paths)
    result = adapter_eval.main(["--num=4", *how])
    assert result["text"]["before"] == result["text"]["after"]
    assert result["loss"]["baselines"].keys() == {"uniform", "unigram", "bigram", "shuffled_captions"}
    gains = result["adherence"]["seen"]["above shuffled"]["pitch"]
    assert gains["low"] <= gains["mean"] <= gains["high"]
    assert "the same to the last bit" in capsys.readouterr().out


def test_guidance_between_none_and_without_caption(speaks, base):
    """0 is the sound of no caption, 1 that of the caption alone. Red when 0 is taken as off."""
    model, *_ = open_adapters(speaks, None, "cpu")
    with torch.no_grad():
        for expert in model.experts:
            expert.up_proj.weight.normal_(std=0.5)  # captions matter
        model.audio_output.weight.normal_(std=0.5)
    caption, how = "a low organ plays", dict(frames=6, temperature=0)

    def codes(words: str, guidance: float) -> np.ndarray:
        return generate_codes(model, model.host.tokenizer, [words], guidance=guidance, **how)[0]

    assert np.array_equal(codes(caption, 0.0), codes("", 1.0))
    start = model.vocabulary.modality("audio").start
    prompt = torch.tensor([[*model.host.tokenizer.encode(caption, bos=True), start]])
    plain = [int(t) for t in decode(model, prompt, 13, frames=6, temperature=0)]
    drawn = model.vocabulary.ids_of("audio", codes(caption, 1.0).T).tolist()
    assert drawn == plain[: len(drawn)]
    assert not np.array_equal(codes(caption, 1.0), codes("", 1.0))


def test_several_words_from_one_prompt(speaks, base):
    """Each sample as decoded alone, at temperature 0 all the same. Red when the cache is not repeated."""
    words = adapter_generate.main(
        ["--prompt=the king", "--text", "--num=3", "--max-tokens=5", f"--model-tag={speaks}", "--temperature=0"]
    )
    assert len(words) == 3
    assert len(set(words)) == 1
    with pytest.raises(UserError, match="beyond the 512 positions"):
        adapter_generate.main(["--prompt=the", "--text", "--max-tokens=600", f"--model-tag={speaks}"])


def test_words_end_where_the_host_ends_them(teach, models, base, tmp_path):
    """At its eos, as transformers' generate(). Red when only BOS ends a text."""
    model = tiny_llama(tmp_path, tied=True, seed=3)
    prompt = load_host(str(tmp_path), "cpu", torch.float32).tokenizer.encode("so", bos=True)
    free = model.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False, pad_token_id=0)[0, len(prompt) :]
    eos = free[3].item()
    model.config.eos_token_id = model.generation_config.eos_token_id = eos
    model.save_pretrained(tmp_path)
    teach("ends", host=tmp_path, num_iterations=1)
    ended = model.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=eos)
    wanted = [token for token in ended[0, len(prompt) :].tolist() if token != eos]
    (words,) = adapter_generate.main(["--prompt=so", "--text", "--max-tokens=8", "--model-tag=ends", "--temperature=0"])
    assert words == load_host(str(tmp_path), "cpu", torch.float32).tokenizer.decode(wanted)


# ---------------------------------------------------------------------------------------------------------------------
# what does not belong together


def test_another_host_expert_or_codec_is_refused(teach, speaks, base, models, tmp_path):
    """Each by name, with the way out. Red when hashes are not compared."""
    teach("owned")
    for options, said in (
        (dict(host=str(models / "other")), "was trained on host .* name the same host with --host"),
        (dict(musicgen=str(models / "another")), "was trained around experts .* --musicgen"),
        (dict(host=str(models / "nowhere")), "nowhere"),
    ):
        with pytest.raises(UserError, match=said):
            open_adapters("owned", None, "cpu", **options)
    moved = shutil.copytree(models / "tied", tmp_path / "moved")
    assert open_adapters("owned", None, "cpu", host=str(moved))[0].host.name == str(moved)
    folder = checkpoint_files.step_dir(tag_dir("owned", STAGE), 4)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    other = load_codec(checkpoint_files.step_dir(tag_dir("speaks", STAGE), 4) / "codec")
    shutil.rmtree(folder / "codec")
    other.save(folder / "codec")
    checkpoint_files.write_manifest(folder)
    with pytest.raises(UserError, match="is not the codec of the training data"):
        open_adapters("owned", None, "cpu")
    shutil.rmtree(folder / "codec")
    for path, content in before.items():
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)


@pytest.mark.parametrize("name", ["tokenizer_hash", "expert", "layer_map", "ranges", "start"])
def test_what_else_must_agree(speaks, base, name):
    """Red when one of these is not compared."""
    folder = checkpoint_files.step_dir(tag_dir(speaks, STAGE), 4)
    before = (folder / "state.json").read_bytes()
    state = json.loads(before)
    state["adapters"][name] = "another"
    (folder / "state.json").write_text(json.dumps(state))
    checkpoint_files.write_manifest(folder)
    with pytest.raises(UserError, match=f"{name} is .* here, 'another' in the checkpoint"):
        open_adapters(speaks, None, "cpu")
    (folder / "state.json").write_bytes(before)
    checkpoint_files.write_manifest(folder)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: s.pop("experts.1.up_proj.weight"), "lacks experts.1.up_proj.weight"),
        (lambda s: s.update({"lm_head.weight": torch.zeros(2)}), "holds an unexpected lm_head.weight"),
        (lambda s: s.update({"audio_output.weight": torch.zeros(3, 32)}), r"has shape \(3, 32\), expected \(65, 32\)"),
    ],
)
def test_tensors_that_do_not_fit_are_named(teach, base, change, said):
    """Red when tensors are loaded without strictness."""
    teach("tensors", num_iterations=1, overwrite=True)
    folder = checkpoint_files.step_dir(tag_dir("tensors", STAGE), 1)
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors")
    checkpoint_files.write_manifest(folder)
    with pytest.raises(UserError, match=said):
        open_adapters("tensors", None, "cpu")


def test_resume_keeps_to_its_host(teach, base, models):
    """A host whose weights changed under the same name. Red when --resume does not compare."""
    place = shutil.copytree(models / "tied", base / "mine")
    teach("mine", host=place)
    shutil.rmtree(place)
    shutil.copytree(models / "other", place)
    with pytest.raises(UserError, match="was trained on host"):
        adapter_train.main(["--model_tag=mine", "--resume", "--num_iterations=6"])


def test_contexts_and_stages_are_checked(teach, base, train, models):
    with pytest.raises(UserError, match="max_seq_len=1024 is beyond the 512 positions"):
        teach("long", max_seq_len=1024, total_batch_size=3072)
    with pytest.raises(UserError, match=r"there is no .*adapter_checkpoints/nobody"):
        open_adapters("nobody", None, "cpu")
    assert exit_code(lambda: adapter_generate.main(["--prompt=x"])) == 2
    assert exit_code(lambda: adapter_generate.main(["--prompt=x", "--out=x.mp3"])) == 2


def test_stalling_and_over_fitting_are_said_once(capsys):
    """Red when a stall is told at every evaluation."""
    run = AdapterRun()
    for step, (train_loss, val) in enumerate([(5, 4.0), (4, 3.0), (3, 3.5), (2, 3.4), (1, 3.3), (0.5, 3.2)]):
        run.step = step
        run.note_loss(train_loss)
        run.record_val_loss(val, stall_evals=2)
    out = capsys.readouterr().out
    assert out.count("over-fitting") == 1
    assert out.count("it stalls") == 1
    assert "has not been below 3.0000 for 2 evaluations" in out


def test_captions_are_left_out_at_the_rate(speaks, base, models):
    """Sounds keep their start and codes, about half lose their words, always the same ones. Red at a wrong end."""
    from nanochat.data.token_store import TokenStore

    model, _, _, settings, _ = open_adapters("speaks", None, "cpu")
    dataset = prepare_for(settings)
    store = TokenStore(dataset, model.host.tokenizer, "train", vocabulary=model.vocabulary)
    rows = Rows(store, settings.max_seq_len)
    loader = PackedLoader(rows, 12, settings.max_seq_len, 3, count=("audio",), caption_dropout=0.5)
    plain = PackedLoader(rows, 12, settings.max_seq_len, 3, count=("audio",))
    bos, start_id = model.host.tokenizer.bos_id, model.vocabulary.modality("audio").start
    kept = total = 0
    for _ in range(6):
        (ids, targets), (_, all_targets) = loader.next(), plain.next()
        for row in ids.tolist():
            places = [i for i, t in enumerate(row) if t == start_id]
            kept += sum(row[i - 1] != bos for i in places)
            total += len(places)
        assert sorted(targets[targets >= 0].tolist()) == sorted(all_targets[all_targets >= 0].tolist())
    assert 0.3 < kept / total < 0.7
    again, third = (
        PackedLoader(rows, 12, settings.max_seq_len, 3, count=("audio",), caption_dropout=0.5) for _ in range(2)
    )
    third.load_state_dict(again.state_dict() | {"cursor": 12})
    again.next()
    assert torch.equal(again.next()[0], third.next()[0])
