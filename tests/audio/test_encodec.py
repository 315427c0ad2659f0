"""EnCodec against transformers called by hand, on small random models saved locally."""

import numpy as np
import pytest
import torch
from transformers import EncodecConfig, EncodecModel, LlamaConfig

from nanochat.audio.codecs import load_codec, open_codec
from nanochat.audio.fitted_codec import one_core
from nanochat.system.environment import UserError

SMALL = dict(num_filters=4, hidden_size=16, codebook_dim=16, num_lstm_layers=1, codebook_size=64)
SHAPES = {  # 50 frames a second and one bandwidth of 4 codebooks, as at 32 kHz; 75 and several, as at 24 kHz
    "at32": dict(sampling_rate=32000, upsampling_ratios=[8, 5, 4, 4], target_bandwidths=[1.2]),
    "at24": dict(sampling_rate=24000, upsampling_ratios=[8, 5, 4, 2], target_bandwidths=[0.9, 1.8, 3.6]),
}


def save_model(folder, **options):
    torch.manual_seed(0)
    model = EncodecModel(EncodecConfig(**{**SMALL, **options})).eval()
    with torch.no_grad():  # codebooks as wide as what they code: transformers' own start at zero
        made = model.encoder(torch.randn(1, model.config.audio_channels, 24000) * 0.1)[0]
        for number, layer in enumerate(model.quantizer.layers):
            mean = made.mean(1) if number == 0 else 0.0
            layer.codebook.embed.copy_(mean + torch.randn(64, 16) * made.std(1))
    model.save_pretrained(folder)
    return model


@pytest.fixture(scope="module", autouse=True)
def quick():
    with one_core():  # as quick on a busy machine
        yield


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("encodec")
    return {name: (str(root / name), save_model(root / name, **shape)) for name, shape in SHAPES.items()}


@pytest.fixture(scope="module")
def wavs():
    return np.random.default_rng(0).normal(0, 0.1, (3, 24000)).astype(np.float32)


def same(codes, others):
    """Equal but for a tie or two, which fall either way with the number of threads."""
    return codes.shape == others.shape and (codes == others).mean() > 0.98


@pytest.mark.parametrize(("name", "rate", "frame_rate", "most"), [("at32", 32000, 50, 4), ("at24", 24000, 75, 8)])
def test_codes_and_sounds_are_those_of_transformers(models, wavs, name, rate, frame_rate, most):
    """All codebooks and a prefix of them. Red when the prefix is cut from the wrong axis, or the smallest bandwidth is
    always taken."""
    folder, model = models[name]
    whole = model.encode(torch.from_numpy(wavs)[:, None], bandwidth=model.config.target_bandwidths[-1]).audio_codes
    assert whole.shape[2] == most
    assert len(whole.unique()) > 20
    for codebooks in (1, most - 1, most):
        codec = open_codec(f"encodec:{folder}", codebooks, 64)
        assert (codec.sample_rate, codec.frame_rate, codec.codebooks, codec.codes) == (rate, frame_rate, codebooks, 64)
        assert codec.name == name
        codes = codec.encode_batch(wavs)
        assert same(codes, whole[0, :, :codebooks].numpy())
        assert same(codec.encode(wavs[1]), codes[1])
        sound = model.decode(torch.from_numpy(codes)[None], [None]).audio_values[:, 0].detach().numpy()
        np.testing.assert_allclose(codec.decode_batch(codes), sound, atol=1e-5)
        np.testing.assert_allclose(codec.decode(codes[2]), sound[2], atol=1e-5)


def test_any_length_gives_whole_frames(models):
    """Red when a sound shorter than a hop is not filled up to one."""
    codec = open_codec(f"encodec:{models['at24'][0]}", 2, 64)
    for samples, count in ((0, 1), (1, 1), (319, 1), (320, 1), (321, 2), (6400, 20)):
        codes = codec.encode(np.zeros(samples, np.float32))
        assert codes.shape == (2, count)
        assert codec.decode(codes).shape == (320 * count,)


def test_a_gpu_is_used_where_there_is_one(models, wavs, monkeypatch):
    """A device that records what is moved to it, and that what comes back is on the CPU. Red without model.to(), or
    with a group or a result that stays where it is."""
    moved = []
    gpu = torch.device("cuda")

    def to(kind, real):
        def move(self, *args, **options):
            if args and args[0] == gpu:
                moved.append(kind)
                return self
            return real(self, *args, **options)

        return move

    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.Tensor, "to", to("batch", torch.Tensor.to))
        patch.setattr(torch.nn.Module, "to", to("model", torch.nn.Module.to))
        patch.setattr(torch.Tensor, "cpu", lambda self: moved.append("back") or self)
        codec = open_codec(f"encodec:{models['at24'][0]}", 2, 64)
        assert codec.device == gpu
        assert moved[-1] == "model"
        moved.clear()
        codes = codec.encode_batch(np.tile(wavs, 14))  # 14 s each: one a group
        assert moved == ["batch", "back"] * 3
        codec.decode_batch(codes[:, :, :300])
        assert moved[6:] == ["batch", "back"] * len(moved[6:][::2])
        assert len(moved) > 7
    assert same(codes[:, :, :50], open_codec(f"encodec:{models['at24'][0]}", 2, 64).encode_batch(wavs)[:, :, :50])


def test_long_sounds_are_coded_in_pieces(models, wavs, monkeypatch):
    """What the model computes at a time has an end. Red when a sound is never cut, or cut within a frame."""
    monkeypatch.setattr("nanochat.audio.encodec.LONGEST_SECONDS", 2)
    codec = open_codec(f"encodec:{models['at24'][0]}", 2, 64)
    lengths, real = [], codec._model.encode
    monkeypatch.setattr(codec._model, "encode", lambda x, **more: lengths.append(x.shape[2]) or real(x, **more))
    sound = np.concatenate([*wavs, *wavs])[: 5 * 24000 + 7]
    codes = codec.encode(sound)
    assert lengths == [48000, 48000, 24007]
    assert codes.shape == (2, 5 * 75 + 1)
    assert same(codes[:, 150:300], codec.encode(sound[48000:96000]))
    decoded = codec.decode(codes)
    assert decoded.shape == (376 * 320,)
    np.testing.assert_allclose(decoded[48000:96000], codec.decode(codes[:, 150:300]), atol=1e-5)


def test_a_saved_codec_refers_to_its_model_and_knows_it_again(models, wavs, tmp_path):
    """Red when load_codec does not compare the hash, or the number of codebooks is not part of it."""
    folder = tmp_path / "model"
    save_model(folder, **SHAPES["at32"])
    codec = open_codec(f"encodec:{folder}", 3, 64)
    codec.save(tmp_path / "codec")
    again = load_codec(tmp_path / "codec")
    assert again.hash == codec.hash
    assert same(again.encode(wavs[0]), codec.encode(wavs[0]))
    assert open_codec(str(tmp_path / "codec"), 3, 64).hash == codec.hash
    assert open_codec(f"encodec:{folder}", 2, 64).hash != codec.hash
    assert [path.name for path in (tmp_path / "codec").iterdir()] == ["codec.json"]
    torch.manual_seed(1)
    EncodecModel(EncodecConfig(**{**SMALL, **SHAPES["at32"]})).save_pretrained(folder)
    with pytest.raises(UserError, match=r"not what it was.*model that it was made with"):
        load_codec(tmp_path / "codec")


def test_what_cannot_be_used_is_named(models, tmp_path):
    """Red when a missing model, one of another kind, a stereo one or a fifth codebook of four gets through."""
    folder = models["at32"][0]
    with pytest.raises(UserError, match=r"4 codebooks, not 5: --codebooks=4"):
        open_codec(f"encodec:{folder}", 5, 64)
    with pytest.raises(UserError, match=r"codebooks of 64 codes.*of 128: .*audio:64"):
        open_codec(f"encodec:{folder}", 4, 128)
    save_model(tmp_path / "stereo", **SHAPES["at24"], audio_channels=2)
    with pytest.raises(UserError, match="stereo"):
        open_codec(f"encodec:{tmp_path / 'stereo'}", 2, 64)
    LlamaConfig().save_pretrained(tmp_path / "llama")
    with pytest.raises(UserError, match="type llama, not an EnCodec"):
        open_codec(f"encodec:{tmp_path / 'llama'}", 2, 64)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="cannot be read"):
        open_codec(f"encodec:{tmp_path / 'empty'}", 2, 64)
    with pytest.raises(UserError, match=r"config.json and model.safetensors.*encodec:FOLDER"):
        open_codec("encodec:some/model", 2, 64)
    codec = open_codec(f"encodec:{folder}", 2, 64)
    with pytest.raises(UserError, match=r"outside 0 .. 63"):
        codec.decode(np.full((2, 3), 64))
    with pytest.raises(UserError, match=r"takes \[2, T\]"):
        codec.decode(np.zeros((4, 3), int))


def test_a_model_without_all_its_weights_is_refused(tmp_path):
    """transformers would fill the gap with random numbers. Red when its list of missing tensors is not read."""
    from safetensors.torch import load_file, save_file

    save_model(tmp_path / "model", **SHAPES["at32"])
    path = tmp_path / "model" / "model.safetensors"
    tensors = load_file(path)
    del tensors[next(name for name in tensors if name.startswith("decoder"))]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lacks \d tensors?"):
        open_codec(f"encodec:{tmp_path / 'model'}", 2, 64)
