"""The model against an independent reference written from the papers, its counts against closed formulas."""

import cmath
import dataclasses
import json
import math
from itertools import pairwise

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings

from nanochat.gpt import GPT, GPTConfig
from nanochat.modality import Modality
from nanochat.system.environment import UserError

SMALL = dict(sequence_len=16, vocab_size=50, n_layer=2, n_head=4, n_kv_head=4, n_embd=32)
VARIANTS = {
    "untied": dict(),
    "tied": dict(tie_weights=True),
    "tied-proj": dict(tie_weights=True, use_output_projection=True),
    "tied-proj-res": dict(tie_weights=True, use_output_projection=True, output_projection_residual=True),
}
FEATURES = {
    "rope_base": dict(rope_base=100_000.0),
    "qk_scale": dict(qk_scale=1.2),
    "softcap": dict(softcap=4.0),
    "vocab_multiple": dict(vocab_multiple=64),
    "windows": dict(window_pattern="SSL", short_window=3),
    "value_embeddings": dict(value_embeddings=True),
    "value_embeddings-2026-01": dict(value_embeddings=True, value_gate_channels=32, value_gate_range=2.0),
    "smear": dict(smear=True),
    "residual_scalars": dict(residual_scalars=True),
    "backout": dict(backout=True),
    "bigrams": dict(bigram_rows=37),
    "documents": dict(document_start=9),
}
MODERN = {name: value for changes in FEATURES.values() for name, value in changes.items()}
VARIANTS_AND_FEATURES = {**VARIANTS, **FEATURES, "modern": {**MODERN, "tie_weights": True}}


def build(seed: int = 0, **changes) -> GPT:
    """A small model whose matrices are all random: the real initialisation has zeros that would hide mistakes."""
    model = GPT(GPTConfig(**{**SMALL, **changes}))
    model.init_weights()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter.size(-1) ** -0.5)
    return model


def random_ids(*shape: int, vocab: int = 50, seed: int = 1) -> torch.Tensor:
    return torch.randint(vocab, shape, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------------------------------------------------------------
# the reference: float64, one head and one query at a time, rotation by complex numbers


def reference_logits(weights: dict[str, torch.Tensor], ids: list[int], config: GPTConfig) -> torch.Tensor:
    """Logits [T, V] of one sequence, from the state dict alone."""
    w = {name: tensor.double() for name, tensor in weights.items()}

    def rms(x: torch.Tensor) -> torch.Tensor:
        return x / (x.square().mean(-1, keepdim=True) + torch.finfo(torch.float32).eps).sqrt()

    def rotated(x: torch.Tensor, position: int) -> torch.Tensor:
        half = len(x) // 2
        turned = [
            complex(x[d], x[d + half]) * cmath.exp(-1j * position * config.rope_base ** (-2 * d / len(x)))
            for d in range(half)
        ]
        return torch.tensor([z.real for z in turned] + [z.imag for z in turned], dtype=torch.float64)

    T, D = len(ids), config.n_embd // config.n_head
    embedded = rms(w["transformer.wte.weight"][ids])
    x = embedded.clone()
    if config.smear:
        for t in range(1, T):
            if ids[t] == config.document_start:
                continue
            gate = 1 / (1 + (-embedded[t, :24] @ w["smear_gate.weight"][0]).exp())
            x[t] = embedded[t] + w["smear_lambda"] * gate * embedded[t - 1]
    x0, after = x, []
    for layer in range(config.n_layer):
        block = f"transformer.h.{layer}."
        if config.residual_scalars:
            x = w["resid_lambdas"][layer] * x + w["x0_lambdas"][layer] * x0
        if config.bigram_rows:
            pairs = [(-1 if a == config.document_start else b, a) for b, a in pairwise([-1, *ids])]
            rows = [(a * 2654435761 ^ b * 2246822519) % config.bigram_rows for b, a in pairs]
            x = x + w["bigram_lambdas"][layer] * w["bigram_embed.weight"][rows]
        h = rms(x)
        q = (h @ w[block + "attn.c_q.weight"].T).view(T, config.n_head, D)
        k = (h @ w[block + "attn.c_k.weight"].T).view(T, config.n_kv_head, D)
        v = (h @ w[block + "attn.c_v.weight"].T).view(T, config.n_kv_head, D)
        if config.value_embeddings and layer in range(config.n_layer - 1, -1, -2):
            gate = config.value_gate_range / (
                1 + (-h[:, : config.value_gate_channels] @ w[block + "attn.ve_gate.weight"].T).exp()
            )
            v = v + gate[:, :, None] * w[f"value_embeds.{layer}.weight"][ids].view(v.shape)
        heads = torch.zeros(T, config.n_head, D, dtype=torch.float64)
        for head in range(config.n_head):
            shared = head * config.n_kv_head // config.n_head
            keys = [rms(rotated(k[t, shared], t)) for t in range(T)]
            for t in range(T):
                query = rms(rotated(q[t, head], t)) * config.qk_scale**2
                scores = torch.tensor([query @ keys[s] / math.sqrt(D) for s in range(t + 1)], dtype=torch.float64)
                short = config.window_pattern[layer % len(config.window_pattern)] == "S" and layer < config.n_layer - 1
                first = max(0, t - config.short_window) if short else 0
                first = max([first, *(s for s in range(t + 1) if ids[s] == config.document_start)])
                weight = scores[first:].exp() / scores[first:].exp().sum()
                heads[t, head] = sum(weight[s - first] * v[s, shared] for s in range(first, t + 1))
        x = x + heads.view(T, -1) @ w[block + "attn.c_proj.weight"].T
        inner = (rms(x) @ w[block + "mlp.c_fc.weight"].T).clamp(min=0) ** 2
        x = x + inner @ w[block + "mlp.c_proj.weight"].T
        after.append(x)
    if config.backout:
        x = x - w["backout_lambda"] * after[config.n_layer // 2]
    x = rms(x)
    if config.use_output_projection:
        projected = x @ w["output_projection.weight"].T
        x = x + projected if config.output_projection_residual else projected
    output = w["transformer.wte.weight"] if config.tie_weights else w["lm_head.weight"]
    return config.softcap * torch.tanh(x @ output[: config.vocab_size].T / config.softcap)


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("variant", VARIANTS_AND_FEATURES)
def test_forward_matches_the_reference(variant, kv_heads):
    """Red when `rotate` turns the other way, a norm is left out, or a head reads the wrong key head."""
    model = build(n_kv_head=kv_heads, **VARIANTS_AND_FEATURES[variant])
    ids = random_ids(2, 11)
    expected = torch.stack([reference_logits(model.state_dict(), row.tolist(), model.config) for row in ids])
    for context in (torch.enable_grad(), torch.no_grad()):  # training and evaluation take different attention kernels
        with context:
            logits = model(ids)
        assert logits.dtype == torch.float32
        assert logits.shape == (2, 11, 50)
        torch.testing.assert_close(logits.double(), expected, rtol=1e-5, atol=2e-5)


@settings(max_examples=15)
@given(
    heads=st.sampled_from([(1, 1), (2, 1), (3, 3), (4, 2), (6, 3)]),
    half=st.integers(1, 5),
    length=st.integers(1, 9),
    vocab=st.integers(10, 40),  # of FEATURES document_start is 9
    layers=st.integers(1, 3),
    variant=st.sampled_from(sorted(VARIANTS)),
    features=st.lists(st.sampled_from(sorted(FEATURES)), max_size=3),
)
def test_any_shape_matches_the_reference(heads, half, length, vocab, layers, variant, features):
    shape = dict(
        n_head=heads[0],
        n_kv_head=heads[1],
        n_embd=2 * half * heads[0],
        vocab_size=vocab,
        n_layer=layers,
        sequence_len=length,
    )
    model = build(**shape, **{**VARIANTS[variant], **{k: v for name in features for k, v in FEATURES[name].items()}})
    ids = random_ids(1, length, vocab=vocab)
    expected = reference_logits(model.state_dict(), ids[0].tolist(), model.config)
    torch.testing.assert_close(model(ids)[0].double(), expected, rtol=1e-5, atol=3e-5)


@pytest.mark.parametrize("features", [{}, MODERN])
def test_the_future_does_not_matter(features):
    """Red when the attention mask lets a query see one position ahead."""
    model = build(**features)
    ids = random_ids(1, 12)
    changed = ids.clone()
    changed[0, 7:] = (changed[0, 7:] + 1) % 50
    with torch.enable_grad():
        assert torch.equal(model(ids)[:, :7], model(changed)[:, :7])
    assert not torch.equal(model(ids)[:, 7:], model(changed)[:, 7:])


@pytest.mark.parametrize("features", [{}, MODERN])
def test_compute_dtype_bfloat16_is_close_and_parameters_stay_float32(features):
    model = build(n_layer=3, **features)
    ids, targets = random_ids(2, 16), random_ids(2, 16, seed=2)
    exact = model(ids, targets)
    model.compute_dtype = torch.bfloat16
    rounded = model(ids, targets)
    rounded.backward()
    assert rounded.dtype == torch.float32
    assert {p.dtype for p in model.parameters()} == {p.grad.dtype for p in model.parameters()} == {torch.float32}
    assert 0 < abs(rounded - exact).item() < 0.02 * exact.item()
    assert model(ids).dtype == torch.float32
    assert model.cos.dtype == torch.float32


# ---------------------------------------------------------------------------------------------------------------------
# the loss


@pytest.mark.parametrize("variant", VARIANTS)
def test_loss_ignores_masked_targets(variant):
    """Every reduction against F.cross_entropy over the logits. Red when mean divides by all targets."""
    model = build(**VARIANTS[variant])
    ids, targets = random_ids(3, 8), random_ids(3, 8, seed=2)
    targets[0, :5] = targets[2] = -100
    logits = model(ids).flatten(0, 1)
    each = F.cross_entropy(logits, targets.flatten(), reduction="none").view(3, 8)
    torch.testing.assert_close(model(ids, targets), each.sum() / 11)
    torch.testing.assert_close(model(ids, targets, loss_reduction="sum"), each.sum())
    for context in (torch.enable_grad(), torch.no_grad()):
        with context:
            apart = model(ids, targets, loss_reduction="none")
        assert apart.shape == (3, 8)
        assert apart.dtype == torch.float32
        assert apart[targets == -100].eq(0).all()
        torch.testing.assert_close(apart, each)


def test_a_fully_masked_batch_has_zero_loss_and_gradient():
    """Red without `clamp(min=1)`: 0 / 0 would be NaN."""
    model = build()
    loss = model(random_ids(2, 8), torch.full((2, 8), -100))
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad.eq(0).all() for p in model.parameters())


@pytest.mark.parametrize("variant", [*VARIANTS, "modern"])
def test_gradients_are_those_of_plain_cross_entropy(variant):
    model, plain = (build(**VARIANTS_AND_FEATURES[variant]) for _ in range(2))
    ids, targets = random_ids(2, 16), random_ids(2, 16, seed=2)
    targets[1, 3:9] = -100
    model(ids, targets).backward()
    F.cross_entropy(plain(ids).flatten(0, 1), targets.flatten()).backward()
    for (name, a), b in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("residual", [False, True])
def test_a_tied_projection_is_the_untied_head_wte_times_p(residual):
    """What untying and export rely on: lm_head = wte P, or wte (1 + P) with the residual."""
    tied = build(tie_weights=True, use_output_projection=True, output_projection_residual=residual)
    untied = build()
    state = tied.state_dict()
    projection = state.pop("output_projection.weight") + (torch.eye(32) if residual else 0)
    state["lm_head.weight"] = state["transformer.wte.weight"] @ projection
    untied.load_state_dict(state)
    ids = random_ids(2, 16)
    torch.testing.assert_close(tied(ids), untied(ids), rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# names, counts, initialisation


def nanochat_keys(layers: int) -> list[str]:
    per_block = ["attn.c_q", "attn.c_k", "attn.c_v", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
    return ["transformer.wte.weight"] + [f"transformer.h.{i}.{m}.weight" for i in range(layers) for m in per_block]


@pytest.mark.parametrize("variant", VARIANTS)
def test_state_dict_keys_are_nanochats(variant):
    """Red when a buffer becomes persistent, or a tied model registers lm_head."""
    expected = nanochat_keys(2)
    if variant == "untied":
        expected.append("lm_head.weight")
    if "proj" in variant:
        expected.append("output_projection.weight")
    assert sorted(GPT(GPTConfig(**SMALL, **VARIANTS[variant])).state_dict()) == sorted(expected)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_counts_are_the_closed_formula(variant, kv_heads):
    """Red when a group forgets a parameter, tied wte leaves the matmuls, or attention's FLOPs are halved."""
    changes = {**SMALL, "n_kv_head": kv_heads, **VARIANTS[variant]}
    with torch.device("meta"):
        model = GPT(GPTConfig(**changes))
    V, C, L, T = 50, 32, 2, 16
    block = 2 * C * C + 2 * C * (C * kv_heads // 4) + 8 * C * C
    expected = {
        "wte": V * C,
        "lm_head": V * C if variant == "untied" else 0,
        "output_projection": C * C if "proj" in variant else 0,
        "value_embeds": 0,
        "bigram_embed": 0,
        "transformer": L * block,
        "experts": 0,
        "scalars": 0,
    }
    expected["total"] = sum(expected.values())
    assert model.num_parameters() == expected
    assert expected["total"] == sum(p.numel() for p in model.parameters())
    matmul = V * C + expected["output_projection"] + L * block
    assert model.num_matmul_parameters() == matmul
    assert model.flops_per_token() == 6 * matmul + 12 * L * C * T
    with torch.device("meta"):
        modern = GPT(GPTConfig(**{**changes, **MODERN, "n_layer": 5}))
    counts = modern.num_parameters()
    assert counts["wte"] == 64 * C if "tied" in variant else counts["lm_head"] == 64 * C  # 50 ids, in rows of 64
    assert counts["value_embeds"] == 3 * 64 * C * kv_heads // 4  # layers 4, 2, 0
    assert counts["bigram_embed"] == 37 * C
    assert counts["scalars"] == 3 * 32 * kv_heads + 24 + 1 + 5 + 5 + 1 + 5
    assert counts["total"] == sum(p.numel() for p in modern.parameters())
    matmul += 3 * block  # neither what is looked up nor what is a few numbers
    assert modern.flops_per_token() == 6 * matmul + 12 * C * (2 * T + 3 * 4)  # layers 0, 1, 3 see 3 tokens and one


def test_feature_keys_are_nanochats():
    """But for bigrams, which nanochat has not."""
    extra = set(GPT(GPTConfig(**{**SMALL, **MODERN, "n_layer": 4})).state_dict()) - set(nanochat_keys(4))
    extra -= {"bigram_embed.weight", "bigram_lambdas"}
    assert extra == {
        "lm_head.weight",
        "resid_lambdas",
        "x0_lambdas",
        "smear_gate.weight",
        "smear_lambda",
        "backout_lambda",
        "value_embeds.1.weight",
        "value_embeds.3.weight",
        "transformer.h.1.attn.ve_gate.weight",
        "transformer.h.3.attn.ve_gate.weight",
    }


def test_counts_of_an_example_by_hand():
    """Depth 4, width 512, vocabulary 24576: the transformer has 12.58M parameters, the projection 0.26M."""
    shape = dict(sequence_len=512, vocab_size=24576, n_layer=4, n_head=8, n_kv_head=8, n_embd=512)
    with torch.device("meta"):
        counts = [GPT(GPTConfig(**shape, **VARIANTS[v])).num_parameters() for v in ("untied", "tied-proj")]
    assert counts[0] == dict(
        wte=12_582_912,
        lm_head=12_582_912,
        output_projection=0,
        value_embeds=0,
        bigram_embed=0,
        transformer=12_582_912,
        experts=0,
        scalars=0,
        total=37_748_736,
    )
    assert counts[1] == dict(
        wte=12_582_912,
        lm_head=0,
        output_projection=262_144,
        value_embeds=0,
        bigram_embed=0,
        transformer=12_582_912,
        experts=0,
        scalars=0,
        total=25_427_968,
    )


@pytest.mark.parametrize("variant", [*VARIANTS, "modern"])
def test_initialisation_is_the_table(variant):
    """From garbage memory (to_empty) every tensor gets its start. Red when init_weights forgets one."""
    config = GPTConfig(**{**SMALL, "n_embd": 128, "vocab_size": 400}, **VARIANTS_AND_FEATURES[variant])
    with torch.device("meta"):
        model = GPT(config)
    model.to_empty(device="cpu")
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.data.fill_(math.nan if tensor.is_floating_point() else 77)
    torch.manual_seed(0)
    model.init_weights(tied_std=0.07)
    state = model.state_dict()
    stds = {"transformer.wte.weight": 1.0 if variant == "untied" else 0.07, "lm_head.weight": 0.001}
    if variant == "tied-proj-res":
        stds["output_projection.weight"] = 0.0
    starts = {"smear_lambda": 0.0, "resid_lambdas": 1.0, "x0_lambdas": 0.1, "backout_lambda": 0.2}
    starts |= {"bigram_lambdas": 0.1, "bigram_embed.weight": 0.0}
    for name, tensor in state.items():
        if name in starts or name.endswith("gate.weight"):
            assert tensor.eq(starts.get(name, 0.0)).all(), name
            continue
        std = stds.get(name, 0.0 if "c_proj" in name else 128**-0.5)
        assert tensor.std().item() == pytest.approx(std, rel=0.03), name
        assert abs(tensor.mean().item()) <= 0.03 * std, name
        if name not in stds:
            assert tensor.abs().max() <= (3 / 128) ** 0.5, name
    fresh = GPT(config)
    assert torch.equal(model.cos, fresh.cos)
    assert torch.equal(model.sin, fresh.sin)
    if variant == "untied":  # nearly uniform at first
        loss = model(random_ids(2, 16, vocab=400), random_ids(2, 16, vocab=400, seed=2))
        assert loss.item() == pytest.approx(math.log(400), abs=0.01)


def test_config_defaults_are_the_classic_model_and_impossible_values_are_refused():
    assert dataclasses.asdict(GPTConfig()) == dict(
        sequence_len=1024,
        vocab_size=50304,
        n_layer=12,
        n_head=6,
        n_kv_head=6,
        n_embd=768,
        tie_weights=False,
        use_output_projection=False,
        output_projection_residual=False,
        rope_base=10_000.0,
        qk_scale=1.0,
        value_embeddings=False,
        value_gate_channels=12,
        value_gate_range=3.0,
        smear=False,
        residual_scalars=False,
        backout=False,
        mlp_ratio=4.0,
        modalities=(),
        untie="none",
        output_layers="shared",
        softcap=15.0,
        vocab_multiple=1,
        window_pattern="L",
        short_window=1024,
        bigram_rows=0,
        document_start=None,
    )
    for wrong in (dict(n_head=5), dict(n_kv_head=4), dict(use_output_projection=True), dict(document_start=50304)):
        with pytest.raises(AssertionError):
            GPTConfig(**wrong)


def test_positions_past_the_rotary_table_are_refused():
    model = build(sequence_len=2, n_layer=1)
    model(random_ids(1, 20))
    with pytest.raises(AssertionError, match="rotary table of 20"):
        model(random_ids(1, 21))


def test_a_config_is_read_from_its_own_json():
    """Every field, tuples and modalities included. Red when from_dict() drops a field."""
    audio = Modality("audio", codebooks=2, codes=8, start=43)
    config = GPTConfig(**{**SMALL, **MODERN, "modalities": (audio,), "untie": "all", "document_start": 0})
    assert GPTConfig.from_dict(json.loads(json.dumps(dataclasses.asdict(config)))) == config
    assert GPTConfig.from_dict({}) == GPTConfig()


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        (dict(untie="random"), r"untie='random' was removed: nanochat 0\.1\.0"),
        (dict(depth=4), "does not know: depth"),
        (dict(n_embd=770), "describes no model that can be: n_head=6 does not divide n_embd=770"),
        (dict(n_layer=0), "n_layer=0 is not a number > 0"),
        (dict(softcap=float("inf")), "softcap=inf is not a number > 0"),
        (dict(smear=1), "smear=1 is not true or false"),
        (dict(document_start=1.5), "document_start=1.5 is not an id, or null"),
        (dict(modalities={}), "is not a list"),
        (dict(sequence_len=2**25), "is beyond"),
    ],
)
def test_json_that_is_no_config_is_refused_by_name(saved, message):
    with pytest.raises(UserError, match=message):
        GPTConfig.from_dict(saved)
