"""MusicGen's experts against transformers' own modules, on small random models saved as the real ones are."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from nanochat.adapters import musicgen
from nanochat.adapters.musicgen import (
    EPS,
    SIZES,
    Shape,
    experts_hash,
    layer_map,
    log_licence,
    random_experts,
    read_experts,
    read_shape,
)
from nanochat.system.environment import UserError
from tests.messages import record_messages
from tests.musicgen_fixtures import tiny_musicgen

KEY = "decoder.model.decoder.layers.2.fc1.weight"
# Weights ten times as large as usual: else GELU is all but linear, and 1e-6 not small beside what a layer adds.
LARGE = dict(initializer_factor=0.3)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """name -> (folder, transformers' model): one file, several, the decoder alone; the melody model's decoder."""
    from transformers import MusicgenMelodyDecoderConfig, MusicgenMelodyForCausalLM

    root = tmp_path_factory.mktemp("musicgen")
    made = {
        "one": tiny_musicgen(root / "one", **LARGE),
        "shards": tiny_musicgen(root / "shards", shards=8, **LARGE),
        "decoder": tiny_musicgen(root / "decoder", decoder_only=True, **LARGE),
    }
    sizes = dict(hidden_size=16, num_hidden_layers=3, ffn_dim=64, num_attention_heads=2, vocab_size=64, num_codebooks=1)
    config = MusicgenMelodyDecoderConfig(**sizes, pad_token_id=64, bos_token_id=64, **LARGE)
    made["melody"] = MusicgenMelodyForCausalLM(config).eval()
    for layer in made["melody"].model.decoder.layers:
        torch.nn.init.normal_(layer.final_layer_norm.weight, 1, 0.3)
        torch.nn.init.normal_(layer.final_layer_norm.bias, 0, 0.3)
    made["melody"].save_pretrained(root / "melody")
    return {name: (str(root / name), model) for name, model in made.items()}


@pytest.fixture
def tiny(tmp_path):
    """A folder that a test may spoil, its tensors, and a function that writes others in their place."""
    tiny_musicgen(tmp_path / "tiny", layers=3)
    path = tmp_path / "tiny" / "model.safetensors"

    def write(tensors):
        save_file(tensors, path, metadata={"format": "pt"})

    return tmp_path / "tiny", load_file(path), write


def expert_of(expert, x):
    x = F.layer_norm(x, x.shape[-1:], expert["norm.weight"], expert["norm.bias"], EPS)
    return F.linear(F.gelu(F.linear(x, expert["fc1.weight"])), expert["fc2.weight"])


@pytest.mark.parametrize("name", ["one", "shards", "decoder", "melody"])
@torch.no_grad()
def test_an_expert_computes_what_transformers_layer_computes(models, name):
    """Acceptance: LayerNorm, fc1, exact GELU and fc2 of the tensors read are what a layer adds in its last part.

    Red when another norm of the layer is read (self_attn_layer_norm), or norm.bias from norm.weight's key.
    """
    folder, model = models[name]
    decoder = getattr(model, "decoder", model).model.decoder if name in ("one", "shards") else model.model.decoder
    count = len(decoder.layers)
    seen = []
    for layer in decoder.layers:
        layer.final_layer_norm.register_forward_hook(lambda module, inputs, output: seen.append([inputs[0]]))
        layer.register_forward_hook(lambda module, inputs, output: seen[-1].append(output))
    decoder(input_ids=torch.randint(64, (decoder.num_codebooks, 9), generator=torch.Generator().manual_seed(1)))
    experts = read_experts(folder, tuple(range(count)))
    assert len(seen) == len(experts) == count
    for expert, (before, after) in zip(experts, seen, strict=True):
        after = after[0] if isinstance(after, tuple) else after  # the melody model's layers
        added = expert_of(expert, before)
        assert added.abs().mean() > 0.1
        torch.testing.assert_close(before + added, after, atol=1e-6, rtol=1e-6)


def test_layers_come_in_the_order_asked_for_and_twice_if_asked_twice(models):
    """Red when layers are sorted or made unique, or come in the file's dtype."""
    folder, model = models["one"]
    layers = model.decoder.model.decoder.layers
    experts = read_experts(folder, (4, 1, 1), torch.bfloat16)
    for expert, number in zip(experts, (4, 1, 1), strict=True):
        assert list(expert) == ["norm.weight", "norm.bias", "fc1.weight", "fc2.weight"]
        assert torch.equal(expert["fc2.weight"], layers[number].fc2.weight.bfloat16())
    experts[1]["fc1.weight"].zero_()
    assert torch.equal(experts[2]["fc1.weight"], layers[1].fc1.weight.bfloat16())
    assert read_shape(folder) == Shape(16, 6, 64)


def test_what_happens_to_the_file_later_does_not_reach_the_experts(tiny):
    """Red when a tensor is the file itself, mapped (copy=True left out)."""
    folder, _, _ = tiny
    experts = read_experts(str(folder), (0, 2))
    before = experts_hash(experts)
    with open(folder / "model.safetensors", "r+b") as file:
        file.write(bytes(file.seek(0, 2) - file.seek(0)))
    assert experts_hash(experts) == before


def test_only_what_is_needed_is_opened(models, tmp_path):
    """Red when all shards are opened (or, of a hub model, fetched)."""
    folder, _ = models["shards"]
    places = json.loads((Path(folder) / musicgen.INDEX).read_text())["weight_map"]
    needed = {file for key, file in places.items() if ".layers.2.f" in key}
    assert len(needed) < len(set(places.values()))
    for name in (*needed, "config.json", musicgen.INDEX):
        (tmp_path / name).symlink_to(f"{folder}/{name}")
    assert experts_hash(read_experts(str(tmp_path), (2,))) == experts_hash(read_experts(folder, (2,)))
    (tmp_path / places[KEY]).unlink()
    with pytest.raises(UserError, match=f"index.json names {places[KEY]}, which is missing"):
        read_experts(str(tmp_path), (2,))


def test_the_hash_is_that_of_the_tensors_not_of_the_files(models, tmp_path):
    """Red when the order of the experts, a tensor's name, shape or dtype, or its values do not enter the hash."""
    read = [read_experts(models[name][0], (0, 2)) for name in ("one", "shards")]
    assert experts_hash(read[0]) == experts_hash(read[1])
    first, second = read[0]
    others = [
        [second, first],
        [first],
        [{**first, "norm.weight": first["norm.bias"], "norm.bias": first["norm.weight"]}, second],
        [{**first, "fc1.weight": first["fc1.weight"].reshape(16, 64)}, second],
        [{**first, "fc1.weight": first["fc1.weight"].view(torch.int32)}, second],
        [first, {**second, "norm.bias": second["norm.bias"] + 1e-3}],
    ]
    assert len({experts_hash(other) for other in [read[0], *others]}) == 1 + len(others)


def test_random_experts_are_drawn_as_an_untrained_musicgen_is(models):
    """Red with another std, one seed for all tensors, or a seed that does not count."""
    shape = Shape(96, 24, 384)
    experts = random_experts(shape, 3, seed=7)
    for expert in experts:
        assert torch.equal(expert["norm.weight"], torch.ones(96))
        assert torch.equal(expert["norm.bias"], torch.zeros(96))
        assert {name: tuple(tensor.shape) for name, tensor in expert.items()} == musicgen._sizes(shape)
        for name in ("fc1.weight", "fc2.weight"):
            assert expert[name].std().item() == pytest.approx(0.02, rel=0.02)
            assert expert[name].mean().abs() < 5e-4
    linears = [tensor.flatten() for expert in experts for name, tensor in expert.items() if name.startswith("fc")]
    assert torch.stack(linears).corrcoef().fill_diagonal_(0).abs().max() < 0.03
    hashes = [experts_hash(e) for e in (experts, random_experts(shape, 3, seed=7), random_experts(shape, 3, seed=8))]
    assert hashes[0] == hashes[1] != hashes[2]
    assert torch.equal(
        random_experts(shape, 1, 7, torch.bfloat16)[0]["fc1.weight"], linears[0].view(384, 96).bfloat16()
    )


def test_random_experts_are_the_same_on_every_machine():
    """Red when they are drawn as float32 (dtype=torch.float64 left out): its formulas depend on the processor."""
    recorded = "db2e68263d39004be77810d73847cd8d4a80d598d1ab4eef58e8f01a6b9ec7fe"
    assert experts_hash(random_experts(Shape(64, 2, 256), 2, seed=1)) == recorded


def test_layer_maps():
    """Red when even truncates instead of rounding, or last begins one layer late."""
    spread = (0, 2, 3, 5, 6, 8, 9, 11, 12, 14, 15, 17, 18, 20, 21, 23)
    assert layer_map("even", 24, 16) == spread
    assert layer_map("even", 24, 24) == layer_map("first", 24, 24) == layer_map("last", 24, 24) == tuple(range(24))
    assert layer_map("even", 2, 4) == (0, 0, 1, 1)
    assert layer_map("even", 1, 3) == (0, 0, 0)
    assert layer_map("even", 24, 1) == (12,)
    assert layer_map("even", 1, 1) == (0,)
    assert layer_map("even", 24, 2) == (0, 23)
    assert layer_map("first", 24, 3) == (0, 1, 2)
    assert layer_map("last", 24, 3) == (21, 22, 23)
    assert layer_map("5, 0,5", 6, 3) == (5, 0, 5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("first", "layer_map=first needs 4 layers.*MusicGen has 3: even"),
        ("last", "layer_map=last needs 4 layers"),
        ("0,1,2", "names 3 layers: the host has 4.*or even"),
        ("0,1,2,3", "no layer 3: name layers 0 to 2"),
        ("evn", "'evn' is neither.*did you mean 'even'"),
        ("", "'' is neither"),
        ("0,1,,2", "is neither"),
        ("0,1,2,-1", "is neither"),
        ("0,1,2,٣", "is neither"),
        ("9" * 5000, r"\(5002 characters\) is neither"),
    ],
)
def test_what_is_no_layer_map_is_named(text, message):
    """Red when a length, a range or a sign is not looked at."""
    with pytest.raises(UserError, match=message):
        layer_map(text, 3, 4)


def test_published_sizes_are_known_without_a_file(models, tmp_path, monkeypatch):
    """Small is transformers' default decoder, and its 24 networks have 201.3M weights in fc1 and fc2.

    Red when a size's figure is changed, or known_ok is not looked at (there is no network here).
    """
    from transformers import MusicgenDecoderConfig

    config = MusicgenDecoderConfig()
    small = read_shape("small", known_ok=True)
    assert small == Shape(config.hidden_size, config.num_hidden_layers, config.ffn_dim)
    assert 2 * small.width * small.hidden * small.layers == 201_326_592
    for size, shape in SIZES.items():
        assert read_shape(f"facebook/musicgen-{size}", known_ok=True) == read_shape(size, known_ok=True) == shape
        assert shape.hidden == 4 * shape.width
    (tmp_path / "facebook").mkdir()
    (tmp_path / "facebook" / "musicgen-large").symlink_to(models["one"][0])
    monkeypatch.chdir(tmp_path)
    assert read_shape("facebook/musicgen-large", known_ok=True) == Shape(16, 6, 64)  # a folder comes first


def test_the_licence_is_told_once_and_only_when_weights_are_read(models, monkeypatch):
    """Red when read_shape or random_experts tell it, or it is told each time."""
    monkeypatch.setattr(musicgen, "_licence_logged", False)
    lines = []
    with record_messages(lines):
        read_shape(models["one"][0])
    random_experts(Shape(8, 2, 8), 1, 0)
    with pytest.raises(UserError), record_messages(lines):
        read_experts(models["one"][0], (6,))
    assert lines == []
    with record_messages(lines):
        read_experts(models["one"][0], (0,))
    with record_messages(lines):
        read_experts(models["decoder"][0], (0,))
    with record_messages(lines):
        log_licence()
    assert len(lines) == 1
    assert "CC-BY-NC 4.0" in lines[0]
    assert lines[0].count("\n") <= 1


def refused(folder, message, layers=(2,)):
    with pytest.raises(UserError, match=message) as caught:
        read_experts(str(folder), layers)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "source", ["./nowhere", "~/nowhere/at/all", "/nowhere", "smal", "a/b/c", "~nobody-here/x", __file__]
)
def test_a_folder_that_is_not_there_is_named(source):
    """Red when such a name is taken for one of the hub's (the message would be about the network)."""
    with pytest.raises(UserError, match=r"no folder; MusicGen is small, medium|cannot be looked up"):
        read_shape(source)


def test_without_network_the_way_out_is_a_folder():
    """Red when WAY_OUT is left off what probe says."""
    for source in ("small", "facebook/musicgen-small", "somebody/musicgen"):
        refused(source, "config.json.*HF_HUB_OFFLINE.*a folder with its config.json and model.safetensors")
    refused("a b/c", "a folder with")


def test_configs_of_other_models_are_refused(tiny):
    """Red when model_type, activation_function or a size is not looked at."""
    folder, _, _ = tiny
    config = json.loads((folder / "config.json").read_text())

    def with_config(message, layers=(2,), **changes):
        (folder / "config.json").write_text(json.dumps({**config, **changes}))
        refused(folder, message, layers)

    def decoder(**changes):
        return dict(decoder={**config["decoder"], **changes})

    with_config("lacks the tensor .*layers.3.final_layer_norm.weight", (3,), **decoder(num_hidden_layers=4))
    with_config("of type llama, not a MusicGen; MusicGen is small", model_type="llama")
    with_config("of type None, not a MusicGen", model_type=None)
    with_config("of type musicgen, not a MusicGen", decoder=None)
    with_config("activation_function is 'relu'.*'gelu'", **decoder(activation_function="relu"))
    with_config("'gelu_new'", **decoder(activation_function="gelu_new"))
    with_config(r"\[16, 3, '64'\], not whole numbers", **decoder(ffn_dim="64"))
    with_config(r"\[0, 3, 64\], not whole numbers", **decoder(hidden_size=0))
    with_config(r"\[64, 16\], and config.json says \[128, 16\]", **decoder(ffn_dim=128))
    with_config("has no layer 2: name layers 0 to 1", **decoder(num_hidden_layers=2))
    for text in ("{", "[]", "\xff"):
        (folder / "config.json").write_text(text, encoding="latin-1")
        refused(folder, r"config.json (cannot be read|is not JSON|does not hold a JSON object).*fetch it again")
    (folder / "config.json").unlink()
    refused(folder, "has no config.json; MusicGen is")


def test_spoiled_weights_are_refused(tiny):
    """Red when shapes, dtypes, biases or non-finite values are let through, or the file's errors are not caught."""
    folder, tensors, write = tiny

    def with_tensors(message, dtype=torch.float32, **changes):
        changed = {**tensors, **{KEY.replace("fc1.weight", key.replace("__", ".")): t for key, t in changes.items()}}
        write({key: tensor for key, tensor in changed.items() if tensor is not None})
        with pytest.raises(UserError, match=message):
            read_experts(str(folder), (2,), dtype)

    with_tensors("lacks the tensor .*layers.2.fc2.weight", fc2__weight=None)
    with_tensors("lacks the tensor .*layers.2.final_layer_norm.bias", final_layer_norm__bias=None)
    with_tensors("layers.2.fc1.bias is there", fc1__bias=torch.zeros(64))
    with_tensors("layers.2.fc2.bias is there", fc2__bias=torch.zeros(16))
    with_tensors(r"fc1.weight is \[16, 64\], and config.json says \[64, 16\]", fc1__weight=torch.zeros(16, 64))
    with_tensors("torch.int8.*before its quantization", fc1__weight=torch.zeros(64, 16, dtype=torch.int8))
    for value in (torch.nan, torch.inf):
        spoiled = tensors[KEY].clone()
        spoiled[63, 15] = value
        with_tensors("layers.2.fc1.weight holds values that are no finite numbers", fc1__weight=spoiled)
    with_tensors(r"no finite numbers \(as torch.float16", torch.float16, fc1__weight=torch.full((64, 16), 1e5))
    write(tensors)
    read_experts(str(folder), (2,))
    path = folder / "model.safetensors"
    for content in (
        path.read_bytes()[:-100],
        path.read_bytes()[:20],
        b"",
        b"version https://git-lfs.github.com/spec/v1",
    ):
        path.write_bytes(content)
        refused(folder, r"model.safetensors cannot be read \(.*delete it and fetch it again")
    path.unlink()
    refused(folder, "has no model.safetensors; MusicGen is")
    (folder / "state_dict.bin").touch()
    refused(folder, "audiocraft's state_dict.bin.*the hub has the same weights as safetensors")
    (folder / "pytorch_model.bin").touch()
    refused(folder, "only pytorch_model.bin, a pickle.*save_pretrained.*converts it")


def test_a_spoiled_index_is_refused(tmp_path):
    """Red when a shard may lie outside the folder, or a key that its shard lacks is not caught."""
    tiny_musicgen(tmp_path, layers=3, shards=3)
    path = tmp_path / musicgen.INDEX
    index = json.loads(path.read_text())
    other = next(file for file in index["weight_map"].values() if file != index["weight_map"][KEY])
    for places, message in (
        ({KEY: other}, f"{other} cannot be read .*{KEY}"),
        ({KEY: f"../{other}"}, "weight_map does not name files beside it"),
        ({KEY: 3}, "weight_map does not name"),
    ):
        path.write_text(json.dumps({**index, "weight_map": {**index["weight_map"], **places}}))
        refused(tmp_path, message)
    path.write_text(json.dumps({"weight_map": None}))
    refused(tmp_path, "weight_map does not name")


class Hub(ThreadingHTTPServer):
    """Serves a folder as the hub serves the model tests/musicgen, and notes what was fetched."""

    def __init__(self, folder):
        self.fetched: list[str] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def answer(self):
                name = self.path.rpartition("/resolve/main/")[2]
                known = self.path.startswith("/tests/musicgen/") and (folder / name).is_file()
                content = (folder / name).read_bytes() if known else b""
                self.send_response(200 if known else 404)
                self.send_header("X-Repo-Commit", "0" * 40)
                self.send_header("X-Error-Code", "" if known else "EntryNotFound")
                self.send_header("ETag", f'"{name}"')
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                if self.command == "GET":
                    hub.fetched.append(name)
                    self.wfile.write(content)

            do_HEAD = do_GET = answer

            def log_message(self, *args):
                pass

        super().__init__(("127.0.0.1", 0), Handler)


def test_of_a_hub_model_the_needed_files_are_fetched_once(models, tmp_path, monkeypatch):
    """Red when the cache is not asked first, or a missing model.safetensors ends the search for the index."""
    folder = Path(models["shards"][0])
    places = json.loads((folder / musicgen.INDEX).read_text())["weight_map"]
    needed = {file for key, file in places.items() if ".layers.2.f" in key}
    hub = Hub(folder)
    threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    url = f"http://127.0.0.1:{hub.server_port}"
    monkeypatch.setenv("HF_ENDPOINT", url)
    monkeypatch.setattr(
        "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", url)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    try:
        read = read_experts("tests/musicgen", (2,))
        assert experts_hash(read) == experts_hash(read_experts(str(folder), (2,)))
        assert sorted(hub.fetched) == sorted([*needed, "config.json", musicgen.INDEX])
        refused("tests/other", "no config.json|404|a folder with")
    finally:
        hub.shutdown()
        hub.server_close()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert experts_hash(read_experts("tests/musicgen", (2,))) == experts_hash(read)
    refused("tests/musicgen", r"HF_HUB_OFFLINE forbids the network", layers=(0, 5))
