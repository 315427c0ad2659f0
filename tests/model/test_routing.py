"""Modality experts: every way of routing against one token at a time, and what must not leak between modalities."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from nanochat import gpt
from nanochat.engine import decode, generate
from nanochat.gpt import GPT, GPTConfig
from nanochat.modality import Grammar, Modality
from nanochat.model import routing
from nanochat.model.routing import ROUTES, grouped_linear, plan_route, route
from tests.test_gpt import MODERN, VARIANTS, build, random_ids

TEXT = 50
AUDIO = Modality("audio", codebooks=2, codes=8, start=43)  # ids 50..65, end 66
IMAGE = Modality("image", codebooks=1, codes=512, start=44)  # ids 67..578, end 579: nothing in the code knows its name
BOTH = dict(modalities=(AUDIO, IMAGE), untie="mlp", output_layers="separate")
# Sums of |weight| at the start, loss, and sum of |gradient| of the text-only model before there were modalities.
PLAIN = (25520.287301063538, 5.689936637878418, 132.73730024695396)
PLAIN_MODERN = (12935.947427377105, 5.905224800109863, 327.41223472636193)


def mixture(kind: str, rows: int = 3, length: int = 12) -> torch.Tensor:
    """Ids of a batch [rows, length], of one layout in all rows."""
    text, audio, image = (
        random_ids(rows, length, vocab=40),
        50 + random_ids(rows, length, vocab=16),
        67 + random_ids(rows, length, vocab=512),
    )
    if kind == "text":
        return text
    if kind == "audio":
        return audio
    ids = text.clone()
    if kind == "prefix":
        ids[:, 5] = AUDIO.start
        ids[:, 6:] = audio[:, 6:]
    else:
        ids[:, 1::3], ids[:, 2::3] = audio[:, 1::3], image[:, 2::3]
        ids[:, 3] = IMAGE.start
    return ids


def plain_features(model: GPT, ids: torch.Tensor) -> torch.Tensor:
    """features() with every routed matrix applied to one token at a time, chosen by a look at its id."""

    def modality(token: int) -> int:
        if token in (AUDIO.start, IMAGE.start):
            return 1 if token == AUDIO.start else 2
        return 0 if token < TEXT else 1 if token < 67 else 2

    which = [[modality(token) for token in row] for row in ids.tolist()]

    def slowly(x, plan, experts):
        rows = [[experts[which[b][t]](x[b : b + 1, t : t + 1]) for t in range(x.size(1))] for b in range(x.size(0))]
        return torch.cat([torch.cat(row, dim=1) for row in rows])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpt, "route", slowly)
        patch.setattr(routing, "route", slowly)
        return model.features(ids)


@pytest.mark.parametrize("expert_dim", [None, 24])
@pytest.mark.parametrize("untie", ["mlp", "all"])
@pytest.mark.parametrize("kind", ["text", "audio", "prefix", "interleaved"])
def test_all_routes_match_routing_one_token_at_a_time(kind, untie, expert_dim):
    """Outputs and gradients in float64 to 1e-12. Red when the way back from sorted order uses the way there."""
    modalities = tuple(dataclasses.replace(m, expert_dim=expert_dim) for m in (AUDIO, IMAGE))
    model = build(**{**BOTH, "modalities": modalities, "untie": untie}, **MODERN).double()
    model.compute_dtype = torch.float64
    ids = mixture(kind)
    weights = torch.randn(*ids.shape, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(3))

    def results(features: torch.Tensor) -> list[torch.Tensor]:
        model.zero_grad(set_to_none=True)
        (features * weights).sum().backward()
        grads = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]
        return [features.detach(), *grads]

    expected = results(plain_features(model, ids))
    routes = ROUTES if expert_dim is None else ("sort", "where")
    for name in routes:
        model.route = name
        for found, wanted in zip(results(model.features(ids)), expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
        with torch.no_grad():  # no padding there, and experts without tokens are left out
            torch.testing.assert_close(model.features(ids), expected[0], rtol=1e-12, atol=1e-12)


def test_empty_batch_and_experts_without_tokens_have_zero_gradients():
    """Not None. Red when an expert without tokens is left out in training."""
    model = build(**BOTH)
    for name in ROUTES:
        model.route = name
        model.zero_grad(set_to_none=True)
        model(mixture("text"), mixture("text"), loss_reduction="sum").backward()
        for key, parameter in model.named_parameters():
            if ".experts." in key:
                assert parameter.grad is not None, (name, key)
                assert not parameter.grad.any(), (name, key)
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                plan = plan_route(name, torch.zeros(0, 4, dtype=torch.uint8), 3)
                assert model.transformer.h[0].mlp(torch.zeros(0, 4, 32), plan).shape == (0, 4, 32)


THEN = dict(softcap=15.0, vocab_multiple=1, window_pattern="L", bigram_rows=0, document_start=None)  # no fields yet


@pytest.mark.parametrize(
    ("features", "expected"), [({}, PLAIN), ({**MODERN, **THEN, "tie_weights": True}, PLAIN_MODERN)]
)
def test_text_only_model_matches_recorded_values(features, expected):
    """Start, loss and gradient recorded before there were modalities, under the same seed."""
    torch.manual_seed(1)
    model = GPT(GPTConfig(sequence_len=32, vocab_size=293, n_layer=4, n_head=2, n_kv_head=1, n_embd=64, **features))
    model.init_weights()
    found = [sum(p.abs().sum().item() for p in model.parameters())]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.arange(parameter.numel()).view(parameter.shape).sin())
    ids = torch.arange(4 * 33).view(4, 33) * 7 % 293
    loss = model(ids[:, :-1], ids[:, 1:])
    loss.backward()
    found += [loss.item(), sum(p.grad.abs().sum().item() for p in model.parameters())]
    assert found == pytest.approx(expected, rel=1e-5)


def test_modality_settings_do_not_change_a_text_only_model():
    """Keys, parameters and logits of the plain model, whatever untie and output_layers say."""
    plain, same = build(), build(untie="all", output_layers="separate")
    assert plain.state_dict().keys() == same.state_dict().keys()
    assert torch.equal(plain(random_ids(2, 9)), same(random_ids(2, 9)))
    keys = {"transformer.wte.weight", "lm_head.weight"}
    assert keys < plain.state_dict().keys()
    assert not any("experts" in key for key in plain.state_dict())


@pytest.mark.parametrize("untie", ["none", "mlp", "all"])
def test_keys_and_text_experts_keep_their_names(untie):
    model = GPT(GPTConfig(**{**dataclasses.asdict(build().config), **BOTH, "untie": untie}))
    extra = model.state_dict().keys() - build().state_dict().keys()
    expected = {f"transformer.wtes.{m}.weight" for m in ("audio", "image")}
    expected |= {f"lm_heads.{m}.weight" for m in ("audio", "image")}
    matrices = {"none": [], "mlp": ["mlp.c_fc", "mlp.c_proj"], "all": ["mlp.c_fc", "mlp.c_proj"]}[untie]
    if untie == "all":
        matrices = [*matrices, "attn.c_q", "attn.c_k", "attn.c_v", "attn.c_proj"]
    for name in matrices:
        part, matrix = name.split(".")
        for layer in range(2):
            expected |= {f"transformer.h.{layer}.{part}.experts.{m}.{matrix}.weight" for m in ("audio", "image")}
    assert extra == expected
    assert model.transformer.wte.weight.size(0) == TEXT
    assert model.transformer.wtes["audio"].weight.size(0) == 17


@pytest.mark.parametrize("layers", ["shared", "masked", "separate"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_losses_are_those_of_the_logits(variant, layers):
    """Cross-entropy by hand over the whole vocabulary or the target's range, and the gradients of it.

    Red when a target keeps its joint id in a layer of its own, or the mask goes by the input's modality.
    """
    model = build(**{**BOTH, "output_layers": layers}, **VARIANTS[variant])
    ids = mixture("interleaved")
    targets = torch.roll(ids, -1, dims=1)
    targets[0, :4] = -100
    logits = model(ids)
    assert logits.shape == (3, 12, 580)
    if layers != "shared":
        ranges = torch.tensor([[0, 50], [50, 67], [67, 580]])
        own = ranges[(targets >= 50).long() + (targets >= 67).long()]
        columns = torch.arange(580)
        logits = logits.masked_fill((columns < own[..., :1]) | (columns >= own[..., 1:]), -float("inf"))
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)
    model.zero_grad()
    expected.sum().backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model(ids, targets, loss_reduction="sum").backward()
    for name, grad in wanted.items():
        torch.testing.assert_close(dict(model.named_parameters())[name].grad, grad, rtol=2e-4, atol=2e-5, msg=name)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            found = model(ids, targets, loss_reduction="none")
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
            parts = model(ids, targets, loss_reduction="modalities")
    by_hand = [expected[(targets >= a) & (targets < b)].sum() for a, b in ((0, 50), (50, 67), (67, 580))]
    torch.testing.assert_close(parts, torch.stack(by_hand), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model(ids, targets), expected.sum() / (targets >= 0).sum(), rtol=1e-5, atol=1e-5)


def test_an_all_masked_batch_is_zero():
    model, ids = build(**BOTH), mixture("prefix")
    loss = model(ids, torch.full_like(ids, -100))
    loss.backward()
    assert loss.item() == 0
    assert all(not p.grad.any() for p in model.parameters() if p.grad is not None)


def test_the_audio_expert_changes_no_text_before_the_first_audio_token():
    """And each later logit. Red when `start` or a text token goes through the audio expert."""
    model, ids = build(**BOTH), mixture("prefix")
    before = model(ids)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".experts.audio." in name:
                parameter.mul_(1.5)
    after = model(ids)
    assert torch.equal(after[:, :5], before[:, :5])  # the start at 5 is the audio expert's
    assert ((after - before).abs().amax(dim=-1)[:, 5:] > 0).all()


def test_a_text_only_loss_gives_audio_exactly_zero():
    """Captions, then sound, targets of text alone: zero, not small. Red when one softmax is over all ids."""
    model, ids = build(**BOTH), mixture("prefix")
    targets = torch.roll(ids, -1, dims=1)
    targets[:, 5:] = -100
    model(ids, targets, loss_reduction="sum").backward()
    audio = {name: p.grad for name, p in model.named_parameters() if "audio" in name}
    assert len(audio) == 6
    assert all(grad is not None and not grad.any() for grad in audio.values())


@pytest.mark.parametrize("untie", ["none", "mlp", "all"])
def test_later_tokens_of_any_modality_change_no_earlier_logit(untie):
    model, ids = build(**{**BOTH, "untie": untie}, **MODERN), mixture("interleaved")
    changed = ids.clone()
    changed[:, 8] = torch.where(ids[:, 8] < 50, 60, 3)  # another modality, so that the sorted order changes too
    torch.testing.assert_close(model(changed)[:, :8], model(ids)[:, :8], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(model(changed)[:, 8:], model(ids)[:, 8:])


@pytest.mark.parametrize("name", ["sort", "where"])
@pytest.mark.parametrize("untie", ["none", "mlp", "all"])
def test_cached_generation_matches_uncached_with_mixed_modalities(untie, name):
    """Rows of different modalities at the same step. Red when the cached step takes row 0's expert for all."""
    model = build(**{**BOTH, "untie": untie}, **MODERN)
    model.route = name
    ids = mixture("interleaved")
    ids[1] = mixture("text")[1]
    with torch.inference_mode():
        cache = model.new_cache(3, 12)
        pieces = [model(part, kv_cache=cache) for part in ids.split([4, *[1] * 8], dim=1)]
        torch.testing.assert_close(torch.cat(pieces, dim=1), model(ids), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layers", ["shared", "separate"])
def test_generation_emits_legal_ids_only(layers):
    """At high temperature, text first or from a start. Red when the grammar does not see the prompt."""
    model = build(**{**BOTH, "output_layers": layers}, sequence_len=32)
    prompts = torch.tensor([[3, 9, 7], [3, 9, AUDIO.start], [IMAGE.start, 70, 579], [3, AUDIO.start, 51]])
    drawn = torch.stack(list(decode(model, prompts, 60, temperature=5.0, frames=4)), dim=1)
    seen = set()
    for prompt, row in zip(prompts.tolist(), drawn.tolist(), strict=True):
        grammar = Grammar(model.vocabulary, 1, frames=4)
        for token in prompt:
            grammar.advance(torch.tensor([token]))
        for token in row:
            assert grammar.allowed()[0, token], (prompt, row)
            grammar.advance(torch.tensor([token]))
        seen |= set(row)
    assert {66} < seen
    assert seen & set(range(50))
    assert seen & set(range(50, 66))


def test_several_samples_continue_where_the_prompt_stops():
    """Within a sound, from one prefill. Red when the copies of the grammar begin anew."""
    model = build(**BOTH, sequence_len=32)
    samples = generate(model, [3, AUDIO.start, 51], 9, num_samples=3, temperature=5.0, frames=5)
    assert all(58 <= row[0] <= 65 and (50 <= row[1] <= 57 or row[1] == 66) for row in samples)
    assert samples[0] != samples[1]


def test_parts_start_and_work_as_the_tables_say():
    """An expert between adapters begins at zero and can learn; ids are looked up in their own table.

    Red when c_proj starts at zero as well, or when the norm between the adapters is left out.
    """
    narrow = dataclasses.replace(AUDIO, expert_dim=24)
    model = GPT(GPTConfig(**{**dataclasses.asdict(build().config), **BOTH, "modalities": (narrow, IMAGE)}))
    model.init_weights()
    expert = model.transformer.h[0].mlp.experts["audio"]
    assert not expert.up_proj.weight.any()
    assert expert.c_proj.weight.any()
    assert expert.down_proj.weight.any()
    assert not model.transformer.h[0].mlp.experts["image"].c_proj.weight.any()
    with torch.no_grad():
        expert.up_proj.weight.normal_()
    x = torch.randn(5, 32)
    hidden = x @ expert.down_proj.weight.T
    hidden = hidden / (hidden.square().mean(-1, keepdim=True) + torch.finfo(torch.float32).eps).sqrt()
    by_hand = (hidden @ expert.c_fc.weight.T).relu().square() @ expert.c_proj.weight.T @ expert.up_proj.weight.T
    torch.testing.assert_close(expert(x), by_hand, rtol=1e-4, atol=1e-4)
    ids = torch.tensor([[0, 49, 50, 66, 67, 579]])
    tables = (
        model.transformer.wte.weight,
        model.transformer.wtes["audio"].weight,
        model.transformer.wtes["image"].weight,
    )
    assert torch.equal(model.lookup(ids)[0], torch.stack([table[row] for table in tables for row in (0, -1)]))


def test_grouped_mm_is_a_matmul_for_each_expert():
    """The kernel itself in float32, with an empty group."""
    x, weights = torch.randn(7, 16), [torch.randn(8, 16) for _ in range(3)]
    out = grouped_linear(x, weights, torch.tensor([3, 3, 7], dtype=torch.int32))
    torch.testing.assert_close(out, torch.cat([x[:3] @ weights[0].T, x[3:] @ weights[2].T]), rtol=1e-5, atol=1e-5)


def test_eight_clips_are_memorised():
    """Captions of different lengths, then codes: the loss over codes falls under 0.05 nats."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{**dataclasses.asdict(build().config), **BOTH, "n_embd": 64, "sequence_len": 24}))
    model.init_weights()
    rows = torch.full((8, 24), -1)
    for clip in range(8):
        caption, codes = random_ids(3 + clip % 3, vocab=40, seed=clip), random_ids(8, 2, vocab=8, seed=100 + clip)
        caption[0] = clip  # all captions differ
        sound = model.vocabulary.ids_of("audio", codes.numpy()).tolist()
        ids = [*caption.tolist(), AUDIO.start, *sound, model.vocabulary.end("audio")]
        rows[clip, : len(ids)] = torch.tensor(ids)
    inputs, targets = rows[:, :-1].clamp(min=0), rows[:, 1:].masked_fill(rows[:, 1:] < 0, -100)
    targets = model.vocabulary.mask_targets(targets, ("audio",))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.03)
    for _ in range(45):
        loss = model(inputs, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05


def test_padded_rows_keep_one_total_size():
    """Every expert's rows in training are a multiple, and batches of one size keep one size; results are equal.

    Red when the last expert takes what is missing to its own multiple only (the sum then changes with the batch).
    """
    experts = [lambda x, k=k: x * (k + 1) for k in range(5)]
    sizes = set()
    for seed in range(20):
        modality = torch.randint(0, 1 + seed % 5, (3, 7), generator=torch.Generator().manual_seed(seed))
        plan = plan_route("sort", modality, 5, multiple=16)
        counts = [len(count) for count in plan.counts]
        assert sum(counts) == len(plan.perm) == 21 + plan.padding
        assert all(count % 16 == 0 and count >= 16 for count in counts), counts
        sizes.add(plan.padding)
        x = torch.randn(3, 7, 2)
        assert torch.equal(route(x, plan, experts), x * (modality + 1)[..., None])
    assert len(sizes) == 1
