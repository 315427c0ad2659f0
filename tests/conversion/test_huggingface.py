"""Folders for transformers: its own NanoChat and our modelling file against our GPT, there and back."""

import copy
import dataclasses
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, DynamicCache, GenerationMixin
from transformers import __version__ as transformers_version

from nanochat.checkpoint_files import weights_hash
from nanochat.checkpoint_manager import save_checkpoint
from nanochat.conversion import huggingface as hf_format
from nanochat.conversion.huggingface import MODERN_FIELDS, drop_inactive_fields, read_hf, write_hf
from nanochat.data.tokenizer import Tokenizer
from nanochat.engine import generate
from nanochat.gpt import GPT, GPTConfig
from nanochat.modality import Modality
from nanochat.system.environment import UserError
from nanochat.upstream import hf_model_types
from scripts import export_hf
from tests.test_gpt import FEATURES, MODERN, build, random_ids
from tests.tiny_run import exit_code

TIED_PROJECTION = dict(tie_weights=True, use_output_projection=True)
CLASSIC = {
    "untied": dict(),
    "tied": dict(tie_weights=True, softcap=20.0, rope_base=100_000.0),
    "grouped": dict(n_kv_head=2, n_layer=3, mlp_ratio=2.7),
    "padded": dict(n_kv_head=1, vocab_multiple=64),
}
SHORT = dict(n_layer=3, window_pattern="SL", short_window=3)  # less than any prompt here
NEWER = {
    "value_embeddings": FEATURES["value_embeddings-2026-01"],
    "smear, tied": dict(smear=True, tie_weights=True),
    "residual": dict(residual_scalars=True, backout=True, n_layer=3),
    "windows": dict(SHORT, qk_scale=1.2, n_kv_head=2),
    "projection": TIED_PROJECTION,
    "bigrams": dict(bigram_rows=37),
    "documents": dict(document_start=16),
    "all": dict(MODERN, **SHORT, **TIED_PROJECTION, output_projection_residual=True, n_kv_head=2, vocab_multiple=64),
}
PROMPT = random_ids(2, 7, seed=5)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    text = "the cat runs behind the dog, le café déjà vu 12 123 1234\n\n  东京 it's IT'S\t\x00\n" * 9
    return Tokenizer.train([text + "  \n".join(text.split(" "))], 290)


def export(model: GPT, folder, tokenizer=None, **how):
    """Written, then loaded by transformers; (what write_hf told, transformers' model)."""
    facts = write_hf(folder, model.config, model.state_dict(), tokenizer, **how)
    return facts, load(folder, trust_remote_code=bool(facts["newer"]))


def load(folder, **how):
    from transformers import AutoModelForCausalLM  # two seconds that only this file's worker has to take

    return AutoModelForCausalLM.from_pretrained(folder, **how).eval()


def is_transformers_own(there) -> bool:
    return type(there).__name__ == "NanoChatForCausalLM" and type(there).__module__.startswith("transformers.")


@torch.inference_mode()
def assert_same_logits(model: GPT, there) -> None:
    ids = random_ids(2, 33)
    logits = model(ids)
    torch.testing.assert_close(there(ids).logits, logits, rtol=0, atol=1e-5)
    assert logits.abs().max() > 1  # all zeros would prove nothing


def assert_same_text(model: GPT, there) -> None:
    """Greedy, 12 tokens behind each prompt."""
    ours = [generate(model, row.tolist(), 12, temperature=0)[0] for row in PROMPT]
    told = there.generate(PROMPT, attention_mask=torch.ones_like(PROMPT), max_new_tokens=12, do_sample=False)
    assert told[:, PROMPT.size(1) :].tolist() == ours


def assert_comes_back(model: GPT, folder) -> None:
    """read_hf: the model that says the same, and each tensor bit for bit but for padding rows."""
    config, state, _ = read_hf(folder)
    wanted = drop_inactive_fields(model.config)
    assert dataclasses.replace(config, mlp_ratio=1.0) == dataclasses.replace(wanted, mlp_ratio=1.0)
    assert round(config.mlp_ratio * config.n_embd) == round(wanted.mlp_ratio * wanted.n_embd)
    assert state.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(state[name], tensor[: len(state[name])]), name


@pytest.mark.parametrize("kind", CLASSIC)
def test_a_classic_model_is_transformers_own(kind, tmp_path):
    """Logits, greedy text, no code, and back. Red when rms_norm_eps is left at transformers' 1e-6, softcap or the
    base of the rotation is not written, or q and k change places in PARTS."""
    model = build(**CLASSIC[kind])
    facts, there = export(model, tmp_path / "out")
    assert is_transformers_own(there)
    assert there.config.rms_norm_eps == 1.1920929e-07
    assert {path.suffix for path in (tmp_path / "out").iterdir()} == {".json", ".safetensors", ".md"}
    assert_same_logits(model, there)
    assert_same_text(model, there)
    assert_comes_back(model, tmp_path / "out")
    if kind != "padded":
        assert facts["weights_hash"] == weights_hash(model.state_dict())


def test_tied_weights_are_saved_once(tmp_path):
    """Red when the state keeps an lm_head of a tied model, or tie_word_embeddings is not written."""
    _, there = export(build(tie_weights=True), tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert [name for name, t in tensors.items() if t.size(0) == 50] == ["model.embed_tokens.weight"]
    assert there.lm_head.weight is there.model.embed_tokens.weight
    there.save_pretrained(tmp_path / "again")
    assert_comes_back(build(tie_weights=True), tmp_path / "again")


@pytest.mark.parametrize("kind", ["grouped, in several files", "tied, bfloat16"])
def test_a_model_of_transformers_opens_here(kind, tmp_path):
    """NanoChat as transformers makes and saves it. Red when an absent or renamed key of its configuration is taken
    from GPTConfig's defaults: intermediate_size, num_key_value_heads, rope_parameters."""
    from transformers import NanoChatConfig, NanoChatForCausalLM

    fields = dict(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        intermediate_size=88,
        rms_norm_eps=1.1920929e-07,
        initializer_range=0.15,
        pad_token_id=None,
    )
    if "grouped" in kind:
        fields |= dict(num_key_value_heads=2, rope_parameters=dict(rope_type="default", rope_theta=500.0))
    else:
        fields |= dict(tie_word_embeddings=True, final_logit_softcapping=9.0)
    torch.manual_seed(0)
    there = NanoChatForCausalLM(NanoChatConfig(**fields)).eval()
    if "bfloat16" in kind:
        there.to(torch.bfloat16).save_pretrained(tmp_path)
        there = load(tmp_path, dtype=torch.float32)
    else:
        there.save_pretrained(tmp_path, max_shard_size=20_000)
        assert (tmp_path / "model.safetensors.index.json").is_file()
    config, state, tokenizer = read_hf(tmp_path)
    assert tokenizer is None
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    model = GPT(config)
    model.load_state_dict(state, strict=True)
    assert_same_logits(model, there)
    assert_same_text(model, there)


@pytest.mark.parametrize("kind", NEWER)
def test_a_newer_model_runs_by_our_file(kind, tmp_path):
    """Logits, greedy text with the cache, and back. Red when hf_modeling.py leaves out any one of the features."""
    model = build(**NEWER[kind])
    facts, there = export(model, tmp_path / "out")
    assert facts["newer"]
    assert type(there).__name__ == facts["architecture"] == "ModernNanoChatForCausalLM"
    assert_same_logits(model, there)
    assert_same_text(model, there)
    assert_comes_back(model, tmp_path / "out")


@torch.inference_mode()
def test_the_cache_of_our_file(tmp_path):
    """Pieces of 4 + 1 + 6 tokens, beams, padding on the left. Red when the smeared embedding, or where documents start,
    is not kept in the cache, when a window is counted from the piece's beginning, when padding is smeared into the
    first token, or when padding starts a document."""
    model = build(**NEWER["all"])
    _, there = export(model, tmp_path / "out")
    ids = random_ids(2, 11)
    ids[:, 2] = model.config.document_start
    whole = model(ids)
    for cache in (DynamicCache(), DynamicCache(config=there.config)):
        pieces = [there(part, past_key_values=cache).logits for part in ids.split([4, 1, 6], dim=1)]
        torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=0, atol=1e-5)
    how = dict(attention_mask=torch.ones_like(ids), num_beams=3, max_new_tokens=6, do_sample=False)
    assert torch.equal(there.generate(ids, **how), there.generate(ids, **how, use_cache=False))
    padded = torch.cat([torch.full((2, 3), 7), ids], dim=1)
    mask = (torch.arange(14) >= 3).long().repeat(2, 1)
    torch.testing.assert_close(there(padded, attention_mask=mask).logits[:, 3:], whole, rtol=0, atol=1e-5)
    text = there.generate(padded, attention_mask=mask, max_new_tokens=6, do_sample=False)[:, 14:]
    assert text.tolist() == [generate(model, row.tolist(), 6, temperature=0)[0] for row in ids]
    with pytest.raises(ValueError, match=r"attention_mask has shape \[2, 3\]"):
        there(ids, attention_mask=mask[:, :3])
    loss = there(ids, labels=ids, logits_to_keep=0).loss
    torch.testing.assert_close(loss, model(ids[:, :-1], ids[:, 1:].contiguous()), rtol=1e-5, atol=1e-5)


def prepared(change):
    """GenerationMixin's function, followed by change(the ids of the whole text, its result)."""
    original = GenerationMixin.prepare_inputs_for_generation

    def prepare(self, input_ids, **kwargs):
        return change(input_ids, original(self, input_ids, **kwargs))

    return prepare


def taken_out(inputs: dict) -> tuple[dict, object]:
    """(inputs without a cache, the cache or None)."""
    caches = [name for name in ("cache", "past_key_values") if inputs.get(name) is not None]
    return {name: value for name, value in inputs.items() if name not in caches}, inputs.get((*caches, "none")[0])


def test_the_cache_has_any_name(tmp_path, monkeypatch):
    """A release that renames the argument once more generates the same text. Red when prepare_inputs_for_generation()
    looks for the cache by its name: it would begin a new one at every token."""

    def renamed(ids, inputs):
        others, cache = taken_out(inputs)
        return others | dict(memory=cache)

    model = build(**NEWER["all"])
    _, there = export(model, tmp_path / "out")
    monkeypatch.setattr(GenerationMixin, "prepare_inputs_for_generation", prepared(renamed))
    assert_same_text(model, there)
    with torch.no_grad(), pytest.raises(ValueError, match=r"argument memory is unknown: transformers 5.*--refresh"):
        there(PROMPT, memory=DynamicCache())


CONTRACTS = {  # what a release could do at the second token, where ids are one and the mask is gone
    "cache lost": lambda ids, inputs: taken_out(inputs)[0],
    "ids not cut": lambda ids, inputs: inputs | dict(input_ids=ids, position_ids=None),
    "two caches": lambda ids, inputs: inputs | dict(one=DynamicCache(), two=DynamicCache()),
    "a flag": lambda ids, inputs: inputs | dict(fresh_contract=True),
}


@pytest.mark.parametrize("kind", CONTRACTS)
def test_generation_that_is_not_understood_is_refused(kind, tmp_path, monkeypatch):
    """Instead of other text in silence; without a cache it goes on. Red for "cache lost" when prepare_inputs accepts
    extra < 0, for "ids not cut" when it does not compare `extra` with the first step's, for "a flag" when
    checked_cache() lets unknown arguments through."""
    model = build(**NEWER["windows"])
    _, there = export(model, tmp_path / "out")

    def later(ids, inputs):
        inputs.pop("attention_mask", None)
        return CONTRACTS[kind](ids, inputs) if ids.size(1) > PROMPT.size(1) else inputs

    monkeypatch.setattr(GenerationMixin, "prepare_inputs_for_generation", prepared(later))
    how = dict(attention_mask=torch.ones_like(PROMPT), max_new_tokens=4, do_sample=False)
    with pytest.raises(
        ValueError, match=r"transformers 5\S* generates in a way that hf_modeling.py does not understand"
    ):
        there.generate(PROMPT, **how)


@pytest.mark.parametrize("kind", ["windows", "smear, tied"])
def test_a_cache_that_forgets_is_refused(kind, tmp_path, monkeypatch):
    """One that keeps the last three tokens, of keys or of what is remembered beside them. Red when Attention or
    remembered() takes what the cache returns without counting it."""
    model = build(**NEWER[kind])
    _, there = export(model, tmp_path / "out")
    update = DynamicCache.update

    def forgetful(self, keys, values, layer, *rest, **named):
        keys, values = update(self, keys, values, layer, *rest, **named)
        cut = layer == (1 if kind == "windows" else model.config.n_layer)
        return (keys[:, :, -3:], values[:, :, -3:]) if cut else (keys, values)

    monkeypatch.setattr(DynamicCache, "update", forgetful)
    with torch.no_grad(), pytest.raises(ValueError, match="of 3 tokens, the text has 7: transformers 5"):
        there(PROMPT)


def test_a_cache_goes_through_several_texts(tmp_path):
    """Two turns with one cache, by all ids and by the new ones alone; in pieces; with an assistant. Red when generate()
    does not forget the text before, or assisted generation's shorter ids are refused."""
    model = build(**NEWER["all"])
    _, there = export(model, tmp_path / "out")
    ones = torch.ones_like(PROMPT)
    how = dict(max_new_tokens=8, do_sample=False)
    whole = there.generate(PROMPT, attention_mask=ones, use_cache=False, **how)
    cache = DynamicCache()
    first = there.generate(PROMPT, attention_mask=ones, past_key_values=cache, **how | dict(max_new_tokens=3))
    ones = torch.ones_like(first)
    assert torch.equal(
        there.generate(first, attention_mask=ones, past_key_values=cache, **how | dict(max_new_tokens=5)), whole
    )
    if int(transformers_version.split(".")[1]) >= 12:  # 5.0 itself fails at new ids alone, and at pieces
        cache = DynamicCache()
        with torch.no_grad():
            there(PROMPT[:, :4], past_key_values=cache)
        ones = torch.ones_like(PROMPT)
        told = there.generate(PROMPT[:, 4:], attention_mask=ones, past_key_values=cache, **how)
        assert torch.equal(told[:, 3:], whole[:, 7:])
        told = there.generate(PROMPT, attention_mask=ones, prefill_chunk_size=3, **how)
        assert torch.equal(told, whole)
    told = there.generate(PROMPT[:1], attention_mask=ones[:1, :7], assistant_model=copy.deepcopy(there), **how)
    assert torch.equal(told, whole[:1])
    with pytest.raises(ValueError, match="the cache is a StaticCache: only a DynamicCache"):
        there.generate(PROMPT, cache_implementation="static", **how)


def test_padding_starts_no_document(tmp_path):
    """On the right, by the id that starts documents, as the exported tokenizer pads. Red when `starts` is not cut to
    what is real: the next token would see no prompt."""
    model = build(**NEWER["documents"])
    _, there = export(model, tmp_path / "out")
    ids, cache = random_ids(2, 10), DynamicCache()
    padded = torch.cat([ids[:, :9], torch.full((2, 2), model.config.document_start)], dim=1)
    mask = torch.ones(2, 12).index_fill(1, torch.tensor([9, 10]), 0)
    there(padded, attention_mask=mask[:, :11], past_key_values=cache)
    told = there(ids[:, 9:], attention_mask=mask, past_key_values=cache, position_ids=torch.tensor([[9]])).logits
    torch.testing.assert_close(told[:, 0], model(ids)[:, 9], rtol=0, atol=1e-5)


def test_only_the_model_needs_code(tokenizer, tmp_path, monkeypatch):
    """A tokenizer is loaded without a question; a model without trust is refused, by a line that says what to do, and
    no code runs. Red when model_type is one that transformers does not know, or hidden_act one that it does."""
    from transformers import AutoModel, AutoModelForCausalLM

    def asked(question=""):
        raise AssertionError(f"asked: {question}")

    monkeypatch.setattr("builtins.input", asked)
    model = build(**NEWER["all"] | dict(vocab_size=tokenizer.vocab_size))
    write_hf(tmp_path / "out", model.config, model.state_dict(), tokenizer)
    code = tmp_path / "out" / "hf_modeling.py"
    good = code.read_text()
    code.write_text("raise SystemExit('code was run')")
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("the cat").input_ids == tokenizer.encode("the cat")
    for kind in (AutoModelForCausalLM, AutoModel):
        with pytest.raises((KeyError, ValueError), match="load it with trust_remote_code=True"):
            kind.from_pretrained(tmp_path / "out")
    code.write_text(good)
    described = json.loads((tmp_path / "out" / "config.json").read_text())
    del described["hidden_act"]  # as earlier exports, by the code of today
    (tmp_path / "out" / "config.json").write_text(json.dumps(described))
    there = load(tmp_path / "out", trust_remote_code=True)
    there.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["hidden_act"] == hf_model_types.NEEDS_CODE
    assert_comes_back(model, tmp_path / "again")


@pytest.mark.parametrize("residual", [False, True])
def test_a_folded_projection_is_plain(residual, tmp_path):
    """Red when write_hf folds nothing, or says tie_weights after that."""
    model = build(**TIED_PROJECTION, output_projection_residual=residual)
    facts, there = export(model, tmp_path / "out", fold=True)
    assert is_transformers_own(there)
    assert not facts["newer"]
    assert_same_logits(model, there)
    assert_same_text(model, there)
    with pytest.raises(UserError, match="no output projection"):
        write_hf(tmp_path / "other", GPTConfig(), {}, fold=True)


def test_bfloat16_halves_the_weights(tmp_path):
    model = build()
    facts, there = export(model, tmp_path / "out", dtype=torch.bfloat16)
    assert there.dtype == torch.bfloat16
    assert facts["bytes"] < 2 * facts["parameters"] + 3000
    for name, tensor in read_hf(tmp_path / "out")[1].items():
        assert torch.equal(tensor, model.state_dict()[name].bfloat16().float())


NASTY = [
    "",
    " ",
    "   the  cat\n\n\t it's IT'S ",
    "<|bos|>the<|user_start|> <|bos",
    "déjà 东京 \U0001f600 e\u0301 \x00",
    "a" * 90 + " " * 300 + "\r\n",
    "１２３ 12345 ½",
    "\ufeff\ufffd",
    "\n" * 5,
]


def test_the_tokenizer_gives_the_same_ids(tokenizer, tmp_path):
    """And comes back. Red when split_special_tokens is left out, which takes <|bos|> in a text for the token, and when
    anything adds <|bos|>."""
    write_hf(tmp_path / "out", build(vocab_size=300).config, build(vocab_size=300).state_dict(), tokenizer)
    there = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert there.bos_token_id == there.eos_token_id == tokenizer.bos_id
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"] == tokenizer.bos_id
    assert there(NASTY).input_ids == [tokenizer.encode(text) for text in NASTY]
    for text in NASTY:
        assert there.decode(tokenizer.encode(text, bos=True)) == "<|bos|>" + text
    again = read_hf(tmp_path / "out")[2]
    assert again.hash == tokenizer.hash
    there.save_pretrained(tmp_path / "out")  # as transformers spells it
    assert read_hf(tmp_path / "out")[2].hash == tokenizer.hash


# ---------------------------------------------------------------------------------------------------------------------
# what cannot be


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tokenizer):
    """A classic folder with a tokenizer, and a newer one."""
    root = tmp_path_factory.mktemp("folders")
    for name, features in (("classic", {}), ("newer", dict(smear=True))):
        model = build(vocab_size=tokenizer.vocab_size, **features)
        write_hf(root / name, model.config, model.state_dict(), tokenizer)
    return root


def refusal(folder) -> str:
    with pytest.raises(UserError) as caught:
        read_hf(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)
    return str(caught.value)


REFUSED = [
    ("classic", dict(rms_norm_eps=1e-6), "rms_norm_eps=1e-06"),
    ("classic", dict(rms_norm_eps=None), "rms_norm_eps=1e-06"),
    ("classic", dict(hidden_act="silu"), "hidden_act='silu'"),
    ("classic", dict(attention_bias=True), "attention_bias=True"),
    ("classic", dict(final_logit_softcapping=None), "final_logit_softcapping=null"),
    ("classic", dict(rope_parameters=dict(rope_type="yarn", factor=4.0)), "rope_type='yarn'"),
    ("classic", dict(head_dim=16), "head_dim=16"),
    ("classic", dict(hidden_size="32"), "hidden_size='32'"),
    ("classic", dict(num_hidden_layers=3), "config.json says 3 layers, the weights hold 2"),
    ("classic", dict(vocab_size=10**30), "config.json describes no model that can be"),
    ("classic", dict(num_attention_heads=5), "describes no model that can be"),
    ("classic", dict(intermediate_size=8192), "model.layers.0.mlp.fc1.weight has shape [128, 32], config.json says"),
    ("classic", dict(vocab_size=200), "tokenizer.json has 290 ids, the model only 200"),
    ("classic", dict(tie_word_embeddings=True), "lm_head.weight is not the embedding"),
    ("classic", dict(quantization_config=dict(bits=4)), "quantization_config"),
    ("classic", dict(model_type="llama"), "model_type='llama' is not read: only nanochat"),
    ("newer", dict(smear=None), "lacks smear"),
    ("newer", dict(smear="yes"), "smear='yes'"),
    ("newer", dict(backout=True), "the weights lack backout_lambda"),
    ("newer", dict(smear=False), "the weights hold smear_gate.weight"),
    ("newer", dict(window_pattern="LX"), "window_pattern"),
]


@pytest.mark.parametrize(("name", "changes", "told"), REFUSED, ids=[told for _, _, told in REFUSED])
def test_what_is_not_ours_is_named(name, changes, told, folders, tmp_path):
    """Red when read_config skips the check, by which another function than the model's would be opened silently."""
    folder = shutil.copytree(folders / name, tmp_path / "copy")
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    assert told in refusal(folder)


def test_damaged_folders_are_named(folders, tmp_path):
    """Weights and tokenizers. Red when a tensor's dtype, or the order of a tokenizer's ids or merges, is not
    looked at."""
    folder = shutil.copytree(folders / "classic", tmp_path / "copy")
    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    save_file({**tensors, "model.embed_tokens.weight": tensors["model.embed_tokens.weight"].to(torch.int8)}, weights)
    assert "model.embed_tokens.weight is torch.int8" in refusal(folder)
    weights.write_bytes(weights.read_bytes()[:-9])
    assert "model.safetensors cannot be read" in refusal(folder)
    weights.unlink()
    assert "model.safetensors cannot be read" in refusal(folder)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps(dict(weight_map={"a": "../model.safetensors"})))
    assert "weight_map" in refusal(folder)
    path = folder / "tokenizer.json"
    found = json.loads(path.read_text())
    merges = found["model"]["merges"]
    for wrong in (merges[::-1], merges[:-1]):
        path.write_text(json.dumps(found | dict(model=found["model"] | dict(merges=wrong))))
        assert "merges are not in the order of the ids" in refusal(folder)
    specials = [token | dict(id=i) for i, token in enumerate(found["added_tokens"])]  # before all others
    path.write_text(json.dumps(found | dict(added_tokens=specials)))
    assert "the ids are not 0, 1, 2" in refusal(folder)
    path.write_text(json.dumps(found | dict(model=dict(type="Unigram"))))
    assert "no byte-level BPE" in refusal(folder)
    path.write_text("{")
    assert "is not JSON" in refusal(folder)


def test_folders_of_before_later_fields(folders, tmp_path):
    """What was exported before a feature was there has it not. Red when LATER_FIELDS loses one of them."""
    folder = shutil.copytree(folders / "newer", tmp_path / "copy")
    wanted = read_hf(folder)[0]
    path = folder / "config.json"
    kept = {
        key: value
        for key, value in json.loads(path.read_text()).items()
        if key not in ("bigram_rows", "document_start")
    }
    path.write_text(json.dumps(kept))
    assert read_hf(folder)[0] == wanted


def test_no_field_is_left_out(tmp_path):
    """A field that GPTConfig gains is written, or in the way by its name. Red when write_hf does not look at `lost`."""
    others = {"vocab_multiple", "modalities", "untie", "output_layers"}
    assert {field.name for field in dataclasses.fields(GPTConfig)} == {*MODERN_FIELDS, *others}
    audio = GPTConfig(modalities=(Modality("audio", codebooks=1, codes=8, start=43),))
    with pytest.raises(UserError, match=r"modalities=audio has no equivalent"):
        write_hf(tmp_path / "out", audio, {})
    model = build(smear=True)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(UserError, match="smear=True has no equivalent"):
        patch.setattr(hf_format, "MODERN_FIELDS", tuple(name for name in MODERN_FIELDS if name != "smear"))
        write_hf(tmp_path / "out", model.config, model.state_dict())
    assert list(tmp_path.iterdir()) == []


def test_a_folder_appears_whole_or_not_at_all(tokenizer, tmp_path, monkeypatch):
    """Red when write_hf writes into the folder itself, or does not compare what it reads back."""
    model = build()
    state = model.state_dict()
    for again, words in (({name: tensor + 1 for name, tensor in state.items()}, None), (state, tokenizer)):

        def read_back(folder, found=(model.config, again, words)):
            assert not (tmp_path / "out").exists()
            return found

        monkeypatch.setattr(hf_format, "read_hf", read_back)
        with pytest.raises(UserError, match="reads back differently"):
            write_hf(tmp_path / "out", model.config, state)
        assert list(tmp_path.iterdir()) == []
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="is there already"):
        write_hf(tmp_path / "out", model.config, model.state_dict())


def test_the_script(tokenizer, tmp_path, monkeypatch, capsys):
    """A checkpoint by its tag; the card tells how to load it. Red when the script drops the tokenizer or the flags."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    model = build(vocab_size=290, **TIED_PROJECTION)
    facts = dict(model_config=dataclasses.asdict(model.config))
    folder = tmp_path / "base_checkpoints" / "tiny"
    save_checkpoint(folder, 3, model.state_dict(), None, facts, tokenizer=tokenizer)
    save_checkpoint(folder, 4, model.state_dict(), None, facts)
    out = tmp_path / "deep" / "out"
    told = export_hf.main(["--model-tag=tiny", "--step=3", f"--out={out}"])
    printed = capsys.readouterr().out
    assert told["weights_hash"] == weights_hash(model.state_dict())
    assert told["weights_hash"] in printed
    assert "use_output_projection" in printed
    assert "trust_remote_code=True" in printed
    assert "--fold-proj" in printed
    assert "trust_remote_code=True" in (out / "README.md").read_text()
    assert AutoTokenizer.from_pretrained(out)("the <|bos|>").input_ids == tokenizer.encode("the <|bos|>")
    told = export_hf.main(["--model-tag=tiny", f"--out={out}-2", "--fold-projection", "--dtype=bfloat16"])
    assert told["architecture"] == "NanoChatForCausalLM"
    assert told["bytes"] < 2.5 * told["parameters"]
    assert "no tokenizer" in capsys.readouterr().out
    assert "trust" not in (tmp_path / "deep" / "out-2" / "README.md").read_text()
    assert exit_code(lambda: export_hf.main(["--model-tag=tiny", f"--out={out}"])) == 2
