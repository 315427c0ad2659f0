"""Frozen hosts against the models that they hold, called by hand."""

import dataclasses
import hashlib
import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, BartConfig, EncodecConfig, GPT2Config, T5Config

from nanochat.adapters.hosts import load_host, state_hash
from nanochat.checkpoint_manager import checkpoints_dir, save_checkpoint
from nanochat.conversion.huggingface import write_hf
from nanochat.data.tokenizer import Tokenizer
from nanochat.modality import Modality
from nanochat.system.environment import UserError
from tests import upstream_fixtures
from tests.hosts_fixtures import tiny_llama
from tests.messages import record_messages
from tests.test_gpt import MODERN, build

KINDS = [("llama", True), ("llama", False), ("mistral", False), ("qwen2", True), ("qwen3", True), ("qwen3", False)]
OURS = {"untied": {}, "modern": {**MODERN, "tie_weights": True, "use_output_projection": True}}
TOKENIZER = Tokenizer.train(["the cat sat on the mat, some other words below it"], 290)


def load(name, dtype=torch.float32):
    return load_host(str(name), "cpu", dtype)


def ids_of(*shape: int, below: int = 264) -> torch.Tensor:
    return torch.randint(below, shape, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """(folder, model) of the plain tied host."""
    folder = tmp_path_factory.mktemp("llama")
    return folder, tiny_llama(folder)


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: f"{kind[0]}-{'tied' if kind[1] else 'untied'}")
def pair(request, tmp_path_factory):
    """(host, the model that was saved) of every kind."""
    kind, tied = request.param
    folder = tmp_path_factory.mktemp("host")
    model = tiny_llama(folder, tied, layers=3, kind=kind)
    return load(folder), model


def save_ours(tag: str, tokenizer=TOKENIZER, **config):
    """A checkpoint of ours whose matrices are all random; returns the model."""
    model = build(**{**dict(vocab_size=290), **config}).eval()
    facts = dict(model_config=dataclasses.asdict(model.config), tokenizer_hash=TOKENIZER.hash)
    save_checkpoint(checkpoints_dir() / tag, 7, model.state_dict(), None, facts, tokenizer=tokenizer)
    return model


@pytest.fixture
def base(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))


# ---------------------------------------------------------------------------------------------------------------------
# what a host computes


def test_features_and_logits_are_those_of_the_model(pair):
    """Red when features() are taken before the last norm, or text_logits() from the embedding of an untied host."""
    host, model = pair
    ids = ids_of(2, 11)
    with torch.no_grad():
        wanted = model(ids)
        assert torch.equal(host.logits(ids), wanted.logits)
        assert torch.equal(host.text_logits(host.features(ids)), wanted.logits)
        assert torch.equal(host.features(ids) @ host.output_weight.T, wanted.logits)
    assert wanted.logits.std() > 0.3
    assert host.softcap is None


def test_attributes_tell_the_shape(pair):
    """Red when `tied` is read from the configuration's default instead of the tensors."""
    host, model = pair
    config = model.config
    assert (host.width, host.n_layer, host.vocab_size, host.context) == (32, 3, 272, 512)
    assert host.tied == config.tie_word_embeddings
    assert host.tied == (host.output_weight is host.embeddings[0].weight)
    assert host.output_weight.shape == (272, 32)
    assert len(host.embeddings) == 1
    assert [type(mlp).__name__ for mlp in host.mlps] == [type(model.model.layers[0].mlp).__name__] * 3


def test_cached_is_uncached(pair):
    """A prompt in pieces of 4 + 1 + 6 tokens. Red when the cache is not given to the model."""
    host, _ = pair
    ids = ids_of(2, 11)
    with torch.no_grad():
        cache = host.new_cache(2, 11)
        pieces = [host.features(part, cache) for part in ids.split([4, 1, 6], dim=1)]
        torch.testing.assert_close(torch.cat(pieces, dim=1), host.features(ids), rtol=1e-5, atol=1e-5)


def test_a_cache_that_is_not_taken_is_refused(tmp_path, monkeypatch):
    """The argument's name is the model's own, and the cache must grow. Red when its length is not looked at, or the
    older name is given to a model that has the newer one."""
    tiny_llama(tmp_path)
    host, ids = load(tmp_path), ids_of(1, 5)
    forward = type(host.model.base_model).forward
    given = []

    def newer(self, input_ids=None, cache=None, use_cache=None, **swallowed):
        given.append(cache)
        return forward(self, input_ids=input_ids, use_cache=use_cache, **{host._cache_argument: cache})

    def deaf(self, input_ids=None, use_cache=None, **swallowed):
        return forward(self, input_ids=input_ids, use_cache=use_cache)

    whole = host.features(ids)
    monkeypatch.setattr(type(host.model.base_model), "forward", newer)
    with torch.no_grad():
        renamed = load(tmp_path)
        cache = renamed.new_cache(1, 5)
        steps = [renamed.features(part, cache) for part in ids.split(1, dim=1)]
        torch.testing.assert_close(torch.cat(steps, dim=1), whole, rtol=1e-5, atol=1e-5)
        assert given[-1] is cache
        monkeypatch.setattr(type(host.model.base_model), "forward", deaf)
        with pytest.raises(UserError, match=r"transformers 5\S* left 0 tokens in the cache of 5"):
            host.features(ids, host.new_cache(1, 5))


def test_a_sliding_window_holds_for_the_cache_too(tmp_path):
    """Mistral's window of 4 tokens. Red when new_cache() makes a cache without the model's configuration and the
    window is not cut, or when the window is ignored without a cache."""
    model = tiny_llama(tmp_path, kind="mistral", sliding_window=4)
    host, ids = load(tmp_path), ids_of(1, 12)
    with torch.no_grad():
        whole, cache = host.features(ids), host.new_cache(1, 12)
        steps = torch.cat([host.features(part, cache) for part in ids.split(1, dim=1)], dim=1)
        torch.testing.assert_close(steps, whole, rtol=1e-5, atol=1e-5)
        model.config.sliding_window = None
        assert not torch.allclose(model.model(ids).last_hidden_state, whole, atol=1e-3)
    assert max(layer.keys.size(2) for layer in cache.layers) <= 4


def test_greedy_text_is_that_of_generate(llama):
    """Red when a step of the cache takes the position of the first one."""
    folder, model = llama
    host, ids = load(folder), ids_of(1, 5)
    wanted = model.generate(ids, max_new_tokens=12, do_sample=False)
    with torch.no_grad():
        cache, piece = host.new_cache(1, 17), ids
        for _ in range(12):
            piece = host.text_logits(host.features(piece, cache)[:, -1:]).argmax(-1)
            ids = torch.cat([ids, piece], dim=1)
    assert torch.equal(ids, wanted)


def test_nothing_is_trainable_and_gradients_pass_through(pair):
    """A part put in front of an MLP learns. Red when a parameter keeps requires_grad, the model is left in train mode,
    or features() are computed without gradients."""
    host, _ = pair
    assert not any(p.requires_grad for p in host.model.parameters())
    assert not host.model.training
    scale, forward = torch.ones(1, requires_grad=True), host.mlps[0].forward
    before = state_hash(host)
    host.mlps[0].forward = lambda x: forward(x * scale)
    try:
        host.features(ids_of(1, 5)).sum().backward()
    finally:
        del host.mlps[0].forward
    assert scale.grad.abs() > 0
    assert all(p.grad is None for p in host.model.parameters())
    assert state_hash(host) == before


def test_ids_beyond_the_vocabulary_reach_only_the_embeddings(pair):
    """Red when anything but the embedding modules reads the ids."""
    host, _ = pair
    table, ids = host.embeddings[0], ids_of(2, 6)
    ids[0, 2], forward = 5000, table.forward
    table.forward = lambda idx: forward(idx.clamp(max=271))
    try:
        strange = host.features(ids)
    finally:
        del table.forward
    assert torch.equal(strange, host.features(ids.clamp(max=271)))


def test_other_dtypes(llama):
    """Red when the weights are loaded in the dtype of the file, or the hash is of the loaded ones."""
    folder, _ = llama
    host = load(folder, torch.bfloat16)
    assert {p.dtype for p in host.model.parameters()} == {torch.bfloat16} == {host.logits(ids_of(1, 3)).dtype}
    assert host.text_logits(host.features(ids_of(1, 3))).dtype == torch.float32
    assert host.hash == load(folder).hash


# ---------------------------------------------------------------------------------------------------------------------
# hashes


def by_hand(state: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode() + state[name].view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def test_the_hash_is_of_the_weights_not_of_the_files(llama, tmp_path):
    """Shards, another header and another order give the same hash, one changed bit another. Red when a shard is left
    out, or the file's bytes are hashed."""
    folder, _ = llama
    state = load_file(folder / "model.safetensors")
    tiny_llama(tmp_path / "shards", shard_bytes=20_000)
    assert len(list((tmp_path / "shards").glob("model-*"))) > 3
    assert load(tmp_path / "shards").hash == load(folder).hash == by_hand(state)
    tiny_llama(tmp_path / "other")
    state["model.layers.1.mlp.up_proj.weight"].view(torch.int32)[5, 7] ^= 1
    save_file(state, tmp_path / "other" / "model.safetensors", metadata={"format": "pt"})
    assert load(tmp_path / "other").hash == by_hand(state) != load(folder).hash


def test_the_state_hash_sees_every_tensor(llama):
    """Red when buffers are not part of it."""
    host = load(llama[0])
    before = state_hash(host)
    assert before == state_hash(load(llama[0]))
    for tensor in (*host.model.parameters(), *host.model.buffers()):
        value = tensor.data.view(-1)[0].clone()
        tensor.data.view(-1)[0] += 1
        assert state_hash(host) != before
        tensor.data.view(-1)[0] = value
    assert state_hash(host) == before
    assert len(list(host.model.buffers())) > 0


# ---------------------------------------------------------------------------------------------------------------------
# checkpoints of ours


@pytest.mark.parametrize("variant", OURS)
def test_a_checkpoint_of_ours_is_a_host(base, variant):
    """Red when the logits are not softcapped, the value embeddings are left out of `embeddings`, or a step behind the
    cache takes position 0."""
    model = save_ours("small", **OURS[variant])
    said = []
    with record_messages(said):
        host, ids = load("nanochat:small"), ids_of(2, 11, below=290)
    assert "GPT" in said[0]
    assert host.hash[:8] in said[0]
    assert len(said) == 1
    with torch.no_grad():
        wanted = model(ids)
        assert torch.equal(host.logits(ids), wanted)
        assert torch.equal(host.text_logits(host.features(ids)), wanted)
        plain = host.features(ids) @ host.output_weight.T
        torch.testing.assert_close(host.softcap * torch.tanh(plain / host.softcap), wanted, rtol=1e-5, atol=1e-5)
        cache = host.new_cache(2, 11)
        pieces = [host.features(part, cache) for part in ids.split([4, 1, 6], dim=1)]
        torch.testing.assert_close(torch.cat(pieces, dim=1), host.features(ids), rtol=1e-5, atol=1e-5)
    config = model.config
    assert (host.width, host.n_layer, host.vocab_size) == (config.n_embd, config.n_layer, 290)
    assert host.context == config.sequence_len
    assert host.tied == config.tie_weights
    assert len(host.mlps) == config.n_layer
    assert not any(p.requires_grad for p in host.model.parameters())
    called = []
    for table in host.embeddings:
        table.register_forward_hook(lambda module, *_: called.append(module))
    host.features(ids)
    tables = {id(module) for module in host.model.modules() if isinstance(module, torch.nn.Embedding)}
    if variant != "untied":  # that of bigrams is not called with ids
        tables -= {id(host.model.bigram_embed)}
    assert {id(module) for module in called} == tables
    assert len(tables) == (1 if variant == "untied" else 2)
    assert host.hash == by_hand(model.state_dict())
    assert host.tokenizer.hash == TOKENIZER.hash


def test_a_checkpoint_of_ours_computes_in_the_dtype_asked_for(base):
    """Red when compute_dtype stays float32."""
    save_ours("small")
    host = load("nanochat:small", torch.bfloat16)
    assert host.features(ids_of(1, 3)).dtype == torch.bfloat16


def test_nanochats_own_files_are_a_host(base):
    """Padded tables included. Red when the padding counts as the host's ids, or its softcap is ours."""
    sizes, state = upstream_fixtures.make_state("2026-03-14")
    upstream_fixtures.write(checkpoints_dir() / "theirs", sizes, state)
    host, ids = load("nanochat:theirs"), ids_of(1, 9, below=265)
    expected = upstream_fixtures.reference_logits("2026-03-14", sizes, state, ids[0])
    torch.testing.assert_close(host.logits(ids)[0], expected.float(), rtol=1e-4, atol=1e-4)
    assert host.vocab_size == 265
    assert host.output_weight.shape == (265, 64)
    assert host.hash == by_hand(state)


def test_checkpoints_that_are_no_text_hosts(base):
    """Red when a model with modalities or without a tokenizer gets through."""
    save_ours("sounds", modalities=(Modality("audio", 1, 8, 289),))
    save_ours("mute", tokenizer=None)
    for tag, told in (
        ("sounds", r"modalities of its own \(audio\).*text only"),
        ("mute", "no tokenizer"),
        ("nowhere", "there is no .*nowhere"),
        ("", "names no model_tag, as in nanochat:d4-tied"),
    ):
        with pytest.raises(UserError, match=told) as caught:
            load(f"nanochat:{tag}")
        assert "\n" not in str(caught.value)


# ---------------------------------------------------------------------------------------------------------------------
# other architectures


def test_architectures_that_do_not_fit_are_named(tmp_path):
    """From the configuration alone: no weights lie beside it. Red when the modules are not looked at, or an
    encoder-decoder that transformers also knows as a decoder (Bart) gets through."""
    small = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, vocab_size=50)
    for config, told in (
        (GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=50), "GPT2LMHeadModel.*gate_proj.*: take a decoder"),
        (AutoConfig.for_model("phi3", **small, pad_token_id=0), "Phi3ForCausalLM.*gate_proj"),
        (AutoConfig.for_model("mixtral", **small), "MixtralForCausalLM.*gate_proj"),
        (T5Config(), "type t5, no text decoder.*Llama, Mistral"),
        (BartConfig(), "type bart, no text decoder"),
        (EncodecConfig(), "type encodec, no text decoder"),
    ):
        config.save_pretrained(tmp_path / config.model_type)
        with pytest.raises(UserError, match=told) as caught:
            load(tmp_path / config.model_type)
        assert "\n" not in str(caught.value)


def test_a_model_that_scales_its_logits_is_refused(tmp_path):
    """Granite divides them, and would not those of sounds. Red when text_logits() are not compared with logits()."""
    tiny_llama(tmp_path, kind="granite", logits_scaling=4.0)
    with pytest.raises(UserError, match="GraniteForCausalLM, which scales or caps its logits"):
        load(tmp_path)


@pytest.mark.parametrize(("value", "dtype"), [(math.nan, torch.float32), (-math.inf, torch.float32), (1e39, None)])
def test_a_host_with_numbers_that_are_none_is_named(value, dtype, tmp_path, base):
    """By its tensor and how many, whether they lie on disk or arise in the dtype asked for. Red when check_finite()
    comes after the comparison of logits, which would speak of scaled ones, or is left out for checkpoints of ours."""
    tiny_llama(tmp_path / "llama")
    path, norm = tmp_path / "llama" / "model.safetensors", "model.layers.1.input_layernorm.weight"
    state = load_file(path)
    state[norm][3:5] = value if dtype else 1e5
    save_file(state, path, metadata={"format": "pt"})
    said = rf"holds non-finite values in {norm} \(2 of 32\), as float(32|16): take another"
    with pytest.raises(UserError, match=said):
        load(tmp_path / "llama", dtype or torch.float16)
    if dtype:
        model = save_ours("small")
        state = model.state_dict()
        state["lm_head.weight"][7, 1] = value
        facts = dict(model_config=dataclasses.asdict(model.config), tokenizer_hash=TOKENIZER.hash)
        save_checkpoint(checkpoints_dir() / "ill", 7, state, None, facts, tokenizer=TOKENIZER)
        with pytest.raises(UserError, match=r"non-finite values in lm_head.weight \(1 of 9,280\)"):
            load("nanochat:ill")


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod.", "_forward_module.module."])
def test_a_host_that_was_saved_wrapped(prefix, llama, tmp_path):
    """By torch.compile, DDP or both: the same model with the same hash, which ends its text with the same ids. Red when
    the names stay as they are, or generation_config.json is not read."""
    folder, model = llama
    shutil.copytree(folder, tmp_path / "host")
    state = load_file(folder / "model.safetensors")
    save_file({prefix + name: t for name, t in state.items()}, tmp_path / "host" / "model.safetensors")
    (tmp_path / "host" / "generation_config.json").write_text(json.dumps(dict(eos_token_id=[5, 6])))
    said = []
    with record_messages(said):
        host, ids = load(tmp_path / "host"), ids_of(2, 11)
    with torch.no_grad():
        assert torch.equal(host.logits(ids), model(ids).logits)
    assert host.hash == load(folder).hash
    assert host.tied
    assert host.stop == (5, 6)
    count = len(state)
    assert all(
        f"{count} of {count} tensors are named with `{part}.`" in "".join(said) for part in prefix[:-1].split(".")
    )


def test_an_export_of_ours_is_no_host_of_transformers(tmp_path):
    """Red when it is told to be of another kind, without the way in."""
    for name, features in (("classic", {}), ("newer", dict(smear=True))):
        model = build(**features)
        write_hf(tmp_path / name, model.config, model.state_dict())
        with pytest.raises(UserError, match=rf"convert --from-hf {tmp_path / name}` makes a checkpoint"):
            load(tmp_path / name)


def test_a_further_embedding_is_refused(llama, monkeypatch):
    """Red when only one table is looked for: the ids beyond V would reach the other."""
    from transformers.models.llama.modeling_llama import LlamaForCausalLM

    init = LlamaForCausalLM.__init__

    def with_another(self, config):
        init(self, config)
        self.positions = torch.nn.Embedding(8, 4)

    monkeypatch.setattr(LlamaForCausalLM, "__init__", with_another)
    with pytest.raises(UserError, match="1 further embedding tables"):
        load(llama[0])


def test_quantized_models_are_refused(llama, tmp_path):
    """Red when transformers is asked to load them."""
    config = json.loads((llama[0] / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="is quantized: take the weights that it was made from"):
        load(tmp_path)


def test_tensors_that_do_not_fit_the_configuration(tmp_path):
    """transformers would fill a gap with random numbers. Red when its list of missing or misshapen tensors is not
    read; a tensor too many is only said."""
    tiny_llama(tmp_path, tied=False)
    path = tmp_path / "model.safetensors"
    whole, said = load_file(path), []

    def write(**changes):
        state = {name: tensor for name, tensor in (whole | changes).items() if tensor is not None}
        save_file(state, path, metadata={"format": "pt"})

    norm = "model.layers.1.input_layernorm.weight"
    for changes, told in (
        ({norm: None}, f"lacks 1 tensors, {norm}"),
        ({"lm_head.weight": None}, "lacks 1 tensors, lm_head.weight"),
        ({norm: torch.ones(16)}, rf"{norm} has shape \(16,\), its configuration says \(32,\)"),
    ):
        write(**changes)
        with pytest.raises(UserError, match=told) as caught:
            load(tmp_path)
        assert "fetch" in str(caught.value)
        assert "\n" not in str(caught.value)
    write(novelty=torch.ones(2))
    with record_messages(said):
        load(tmp_path)
    assert "1 tensors are no part of a LlamaForCausalLM and not used, novelty" in said[0]


def test_a_tied_configuration_with_an_output_of_its_own_is_untied(tmp_path):
    """As transformers has it. Red when `tied` is read from the configuration."""
    tiny_llama(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state["lm_head.weight"] = state["model.embed_tokens.weight"] * 2
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    host = load(tmp_path)
    assert not host.tied
    assert torch.equal(host.output_weight, state["lm_head.weight"])


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    """Red when ids beyond the embedding's rows may come out of the tokenizer."""
    tiny_llama(tmp_path, vocab=200)
    with pytest.raises(UserError, match="tokenizer has 264 ids, the embedding 200 rows"):
        load(tmp_path)
