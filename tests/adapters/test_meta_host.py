"""Meta's files, written here from a transformers Llama, against that Llama."""

import base64
import json
import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from nanochat.adapters.counts import host_on_meta
from nanochat.adapters.hosts import load_host
from nanochat.adapters.meta_host import MetaTokenizer, _config, read_weights
from nanochat.system.environment import UserError
from tests.hosts_fixtures import tiny_llama

RANKS = [bytes([i]) for i in range(256)] + [b"th", b"the", b" the", b"in", b"ing", b" king"]
WIDTH, HEADS, KV_HEADS, HEAD = 32, 4, 2, 8
PARAMS = dict(
    dim=WIDTH,
    n_layers=2,
    n_heads=HEADS,
    n_kv_heads=KV_HEADS,
    norm_eps=1e-6,
    rope_theta=10000.0,
    multiple_of=32,
    ffn_dim_multiplier=1.2,
    vocab_size=len(RANKS) + 256,
)
NAMES = {  # ours to Meta's, written down once more
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.embed_tokens": "tok_embeddings",
    "model.norm": "norm",
    "lm_head": "output",
    "model.layers": "layers",
}


def interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Row by row: what transformers keeps at i and i + D/2 of a head, Meta has at 2i and 2i + 1."""
    out = torch.empty_like(weight)
    for head in range(heads):
        for i in range(HEAD // 2):
            out[head * HEAD + 2 * i] = weight[head * HEAD + i]
            out[head * HEAD + 2 * i + 1] = weight[head * HEAD + i + HEAD // 2]
    return out


def write_meta(folder, model, output: bool, **params) -> dict[str, torch.Tensor]:
    """Meta's three files; `output` says whether the file holds the output matrix. Returns the tensors."""
    state = {}
    for name, tensor in model.state_dict().items():
        for theirs, metas in NAMES.items():
            name = name.replace(theirs, metas)
        if ".wq." in name or ".wk." in name:
            tensor = interleaved(tensor, HEADS if ".wq." in name else KV_HEADS)
        state[name] = tensor.clone()
    if not output:
        del state["output.weight"]
    folder.mkdir(exist_ok=True)
    torch.save(state, folder / "consolidated.00.pth")
    (folder / "params.json").write_text(json.dumps({**PARAMS, **params}))
    lines = [b"%b %d" % (base64.b64encode(token), i) for i, token in enumerate(RANKS)]
    (folder / "tokenizer.model").write_bytes(b"\n".join(lines) + b"\n")
    return state


def llama(folder, tied=True, **config):
    return tiny_llama(folder / "theirs", tied, vocab=len(RANKS) + 256, tokenizer=False, intermediate_size=128, **config)


def load(folder):
    return load_host(f"meta:{folder}", "cpu", torch.float32)


def check_logits(host, model, length=20):
    ids = torch.randint(len(RANKS), (2, length), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        torch.testing.assert_close(host.logits(ids), model(ids).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("tied", "output"), [(True, False), (True, True), (False, True)])
def test_logits_are_those_of_the_same_model_in_transformers(tmp_path, tied, output):
    """Without the output matrix, with one that repeats the embedding, and with one of its own. Red when the rows of wq
    or wk are left interleaved, w1 and w3 are exchanged, or an equal output is not taken as tied."""
    model = llama(tmp_path, tied)
    write_meta(tmp_path / "meta", model, output)
    host = load(tmp_path / "meta")
    check_logits(host, model)
    assert host.tied == tied
    assert (host.width, host.n_layer, host.vocab_size) == (WIDTH, 2, len(RANKS) + 256)
    assert host.context == 4096
    assert host.model.config.intermediate_size == 128
    without, shape, layers = host_on_meta(f"meta:{tmp_path / 'meta'}")  # for the wizard's counts
    assert (tuple(shape), layers) == ((host.vocab_size, WIDTH), 2)
    assert sum(p.numel() for p in without.parameters()) == sum(p.numel() for p in host.model.parameters())


def test_the_rows_matter(tmp_path):
    """The check above can fail: without the permutation, and with its inverse, the logits differ."""
    model = llama(tmp_path)
    state = write_meta(tmp_path / "meta", model, False)
    for change in (lambda w, heads: interleaved(interleaved(w, heads), heads), lambda w, heads: w):
        wrong = state | {
            f"layers.{i}.attention.{name}.weight": change(
                model.get_parameter(f"model.layers.{i}.self_attn.{theirs}.weight").detach(), heads
            ).clone()
            for i in range(2)
            for name, theirs, heads in (("wq", "q_proj", HEADS), ("wk", "k_proj", KV_HEADS))
        }
        torch.save(wrong, tmp_path / "meta" / "consolidated.00.pth")
        with pytest.raises(AssertionError, match="not close"):
            check_logits(load(tmp_path / "meta"), model)


def test_scaled_rotary_positions(tmp_path):
    """A 3.2 with factor 32. Red when use_scaled_rope is passed over, or its frequencies are stretched 8 times."""
    rope = dict(
        rope_type="llama3",
        rope_theta=500000.0,
        factor=32.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=8192,
    )
    model = llama(tmp_path, rope_parameters=rope, max_position_embeddings=131072)
    write_meta(tmp_path / "meta", model, False, rope_theta=500000.0, use_scaled_rope=True)
    host = load(tmp_path / "meta")
    check_logits(host, model)
    frequencies = [m.model.rotary_emb.inv_freq for m in (host.model, model)]
    assert torch.equal(*frequencies)
    assert host.context == 131072
    plain = 500000.0 ** -(torch.arange(0, HEAD, 2) / HEAD)
    torch.testing.assert_close(frequencies[0][-1], plain[-1] / 32)
    torch.testing.assert_close(frequencies[0][0], plain[0])


@pytest.mark.parametrize(
    ("params", "hidden", "factor", "context"),
    [  # as Meta published them, and the widths that transformers' configurations of the same models have
        (
            dict(
                dim=2048,
                n_layers=16,
                n_heads=32,
                n_kv_heads=8,
                vocab_size=128256,
                ffn_dim_multiplier=1.5,
                multiple_of=256,
                norm_eps=1e-5,
                rope_theta=5e5,
                use_scaled_rope=True,
            ),
            8192,
            32.0,
            131072,
        ),
        (
            dict(
                dim=3072,
                n_layers=28,
                n_heads=24,
                n_kv_heads=8,
                vocab_size=128256,
                ffn_dim_multiplier=1.0,
                multiple_of=256,
                norm_eps=1e-5,
                rope_theta=5e5,
                use_scaled_rope=True,
            ),
            8192,
            32.0,
            131072,
        ),
        (
            dict(
                dim=4096,
                n_layers=32,
                n_heads=32,
                n_kv_heads=8,
                vocab_size=128256,
                ffn_dim_multiplier=1.3,
                multiple_of=1024,
                norm_eps=1e-5,
                rope_theta=5e5,
                use_scaled_rope=True,
            ),
            14336,
            8.0,
            131072,
        ),
        (
            dict(
                dim=4096,
                n_layers=32,
                n_heads=32,
                n_kv_heads=8,
                vocab_size=128256,
                ffn_dim_multiplier=1.3,
                multiple_of=1024,
                norm_eps=1e-5,
                rope_theta=5e5,
            ),
            14336,
            None,
            8192,
        ),
        (
            dict(
                dim=8192,
                n_layers=80,
                n_heads=64,
                n_kv_heads=8,
                vocab_size=128256,
                ffn_dim_multiplier=1.3,
                multiple_of=4096,
                norm_eps=1e-5,
                rope_theta=5e5,
                use_scaled_rope=True,
                rope_scaling_factor=16,
            ),
            28672,
            16.0,
            131072,
        ),
        (dict(dim=4096, n_layers=32, n_heads=32, vocab_size=-1, multiple_of=256, norm_eps=1e-5), 11008, None, 4096),
    ],
    ids=["3.2-1B", "3.2-3B", "3.1-8B", "3-8B", "named factor", "2-7B"],
)
def test_shapes_of_the_published_models(tmp_path, params, hidden, factor, context):
    """Red when the width is not rounded up, ffn_dim_multiplier comes before the 2/3, or 3.2's factor serves 3.1."""
    (tmp_path / "params.json").write_text(json.dumps(params))
    config = _config(tmp_path / "params.json")
    assert config["intermediate_size"] == hidden
    assert config["rope_parameters"].get("factor") == factor
    assert config["max_position_embeddings"] == context
    assert config["num_key_value_heads"] == params.get("n_kv_heads", params["n_heads"])
    if (params["dim"], factor) == (2048, 32.0):
        with torch.device("meta"):
            model = LlamaForCausalLM(LlamaConfig(**config, vocab_size=128256, tie_word_embeddings=True))
        assert math.isclose(sum(p.numel() for p in model.parameters()), 1235.8e6, rel_tol=1e-4)


def test_the_hash_is_of_the_tensors_as_the_file_has_them(tmp_path):
    """Red when the permuted rows are hashed, or the dtype that they are loaded in counts."""
    from nanochat.checkpoint_files import weights_hash

    state = write_meta(tmp_path / "meta", llama(tmp_path), True)
    host = load_host(f"meta:{tmp_path / 'meta'}", "cpu", torch.bfloat16)
    assert host.hash == weights_hash(state) == read_weights(tmp_path / "meta")[2]
    assert {p.dtype for p in host.model.parameters()} == {torch.bfloat16}
    assert not host.model.training


# ---------------------------------------------------------------------------------------------------------------------
# the tokenizer


def test_ids_are_the_longest_ranks_and_specials_never_come_from_text(tmp_path):
    """Red when the text's special tokens are encoded as such, or the special ids do not begin behind the ranks."""
    write_meta(tmp_path, llama(tmp_path), False)
    ours = MetaTokenizer(tmp_path)
    text = "the king\n\n 1234 <|begin_of_text|> être 東"
    ids = ours.encode(text)
    assert max(ids) < len(RANKS)
    assert ours.decode(ids) == text
    assert ids[:2] == [257, 261]
    assert ours.encode(text, bos=True)[0] == ours.bos_id == len(RANKS)
    assert ours.vocab_size == len(RANKS) + 256
    assert ours.encode_batch([text, "", "x" * 30_000], 2) == [ids, [], ours.encode("x" * 30_000)]
    assert ours.decode([ours.bos_id, *ids[:1], ours.bos_id + 1]) == "<|begin_of_text|>the<|end_of_text|>"
    assert [ours.decode([ours.bos_id + i]) for i in (6, 9, 10, 255)] == [
        "<|start_header_id|>",
        "<|eot_id|>",
        "<|python_tag|>",
        "<|reserved_special_token_247|>",
    ]
    assert ours.decode([*ids, 9999]) == text
    assert ours.encode("ÿ東") == list("ÿ東".encode())  # bytes without merges
    assert ours.encode("1234567") == [ord(digit) for digit in "1234567"]
    assert ours.encode("a\ud83d") == ours.encode("a\ufffd")


def test_texts_that_tiktoken_cannot_take_whole(tmp_path):
    """Megabytes without a break, which would take the process down. Red when texts are not cut into pieces."""
    write_meta(tmp_path, llama(tmp_path), False)
    ours = MetaTokenizer(tmp_path)
    for text in (" " * 1_000_000, "the" * 300_000, "\n" * 25_001 + "a" * 25_000 + " a"):
        ids = ours.encode(text)
        assert ours.decode(ids) == text
        assert ours.encode_batch([text]) == [ids]


# ---------------------------------------------------------------------------------------------------------------------
# bad input


def refusal(name) -> str:
    with pytest.raises(UserError) as caught:
        load_host(str(name), "cpu", torch.float32)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("host='meta:")
    return str(caught.value)


def test_what_cannot_be_read_is_named(tmp_path):
    """Red when a part of a model, a damaged file or a Llama 2 tokenizer ends in another error than the user's."""
    folder = tmp_path / "meta"
    name = f"meta:{folder}"
    assert "there is no folder" in refusal(name)
    assert "there is no folder" in refusal("meta:")
    state = write_meta(folder, llama(tmp_path), False)
    weights, params, ranks = (folder / file for file in ("consolidated.00.pth", "params.json", "tokenizer.model"))

    (folder / "consolidated.01.pth").touch()
    assert "consolidated.01.pth: the model is cut into parts for several GPUs" in refusal(name)
    (folder / "consolidated.01.pth").unlink()
    for text in ("{", "[]", '{"dim": 32}', json.dumps({**PARAMS, "n_heads": 0}), json.dumps({**PARAMS, "dim": "a"})):
        params.write_text(text)
        assert "is not Meta's params.json" in refusal(name)
    for change, told in (
        (dict(n_layers=3), "lacks 9 tensors"),
        (dict(multiple_of=256), "its configuration says (32, 256)"),
    ):
        params.write_text(json.dumps({**PARAMS, **change}))
        assert told in refusal(name)
    params.write_text(json.dumps({**PARAMS, "n_heads": 2, "n_kv_heads": 1, "dim": 36}))
    assert "heads of 18" in refusal(name)
    params.unlink()
    assert "params.json cannot be read (No such file" in refusal(name)
    params.write_text(json.dumps(PARAMS))

    ranks.write_bytes(b"\x0a\x0e\x0a\x05<unk>\x15\x00")
    assert "is not Llama 3's" in refusal(name)
    assert "Llama 2's is not read" in refusal(name)
    ranks.write_bytes(b"YQ== 0\n")
    assert "255 of the 256 single bytes are missing" in refusal(name)
    ranks.unlink()
    assert "tokenizer.model cannot be read" in refusal(name)

    for broken, told in (
        ({"novelty": torch.ones(1)}, "holds 'novelty', which no Llama has"),
        ({"layers.0.feed_forward.experts.w1.weight": torch.ones(1)}, "which no Llama has"),
        ({"layers.0.attention.wq.weight": torch.ones(30, 32)}, "heads of 8"),
        ({"norm.weight": print}, "it asks for 'print'"),
    ):
        torch.save(state | broken, weights)
        assert told in refusal(name)
    torch.save({key: value for key, value in state.items() if key != "tok_embeddings.weight"}, weights)
    assert "lacks tok_embeddings.weight" in refusal(name)
    torch.save(state, weights)
    weights.write_bytes(weights.read_bytes()[:-1000])
    assert "is refused: it is damaged" in refusal(name)
    weights.unlink()
    assert "holds no consolidated.00.pth" in refusal(name)
    assert "transformers' format" in refusal(name)
