"""Adapters around a frozen host: what stays, what is trained, and the three ways in which this went wrong before."""

import math

import pytest
import torch
import torch.nn.functional as F

from nanochat.adapters.counts import parameter_counts
from nanochat.adapters.hosts import load_host, state_hash
from nanochat.adapters.model import AdapterConfig, AdapterModel, Expert, FrozenHostBaseline
from nanochat.adapters.musicgen import Shape, random_experts, read_experts
from nanochat.config.adapter_settings import AdapterSettings
from nanochat.engine import decode, generate
from nanochat.modality import Modality
from nanochat.system.environment import UserError
from tests.hosts_fixtures import tiny_llama
from tests.musicgen_fixtures import tiny_musicgen

Q, K = 2, 8


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("hosts")
    tiny_llama(root / "tied", tied=True)
    tiny_llama(root / "untied", tied=False)
    tiny_llama(root / "qwen2", tied=True, kind="qwen2")
    return root


def adapters(folder, markers: bool = True, books: int = Q, dtype=torch.float32, **options) -> AdapterModel:
    """A model around the host in the folder, experts of width 16 drawn."""
    host = load_host(str(folder), "cpu", dtype)
    V = host.vocab_size
    audio = Modality("audio", books, K, V + books * K + 1 if markers else None)
    shape = dict(vocab_size=V, width=host.width, n_layer=host.n_layer, sequence_len=64, modalities=(audio,))
    config = AdapterConfig(**shape, **{**dict(expert="random", expert_dim=16, expert_hidden=32), **options})
    experts = None if config.expert == "none" else random_experts(Shape(16, 1, 32), host.n_layer, seed=0)
    return AdapterModel(host, config, experts, seed=1)


def sounds(model: AdapterModel, rows: int = 4, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Captions of different lengths, then codes: inputs and audio-only targets [rows, 19]."""
    generator = torch.Generator().manual_seed(seed)
    audio, V = model.vocabulary.modality("audio"), model.config.vocab_size
    ids, targets = torch.zeros(rows, 20, dtype=torch.long), torch.full((rows, 20), -100)
    for row in range(rows):
        caption = torch.randint(0, V, (3 + row,), generator=generator)
        codes = torch.randint(0, K, (6, audio.codebooks), generator=generator) + K * torch.arange(audio.codebooks)
        sound = [*([] if audio.start is None else [audio.start]), *(V + codes.flatten()).tolist()]
        if audio.start is not None:
            sound.append(model.vocabulary.end("audio"))
        line = [*caption.tolist(), *sound]
        ids[row, : len(line)] = torch.tensor(line)
        first = len(caption) + (audio.start is not None)
        targets[row, first : len(line)] = ids[row, first : len(line)]
    return ids[:, :-1], targets[:, 1:]


def fit(model: AdapterModel, steps: int = 20, rate: float = 1e-2) -> float:
    optimizer = torch.optim.AdamW([p for _, p in model.trained()], rate)
    inputs, targets = sounds(model)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(inputs, targets)
        loss.backward()
        optimizer.step()
    return loss.item()


@pytest.mark.parametrize("name", ["tied", "untied", "qwen2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_text_is_the_hosts(folders, name, dtype, monkeypatch):
    """Logits of text, its tensors, its words: equal before and after 20 steps. Red when text takes the routed path, or
    when a tensor of the host is trained."""
    alone = load_host(str(folders / name), "cpu", dtype)
    text = torch.randint(0, alone.vocab_size, (3, 11), generator=torch.Generator().manual_seed(5))
    wanted, hashed = alone.logits(text), state_hash(alone)
    model = adapters(folders / name, dtype=dtype)
    for trained in (False, True):
        if trained:
            assert fit(model) < 1.5
            monkeypatch.setattr("nanochat.adapters.model.plan_route", None)  # text has no need of it
        assert torch.equal(model.host.logits(text), wanted)
        V = model.config.vocab_size
        assert torch.equal(model(text)[..., :V], wanted.float())
        assert state_hash(model.host) == hashed
        assert all(p.grad is None and not p.requires_grad for p in model.host.model.parameters())
    prompt = [5, 9, 3]
    theirs = alone.model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False, pad_token_id=0)
    assert generate(model, prompt, 12, temperature=0)[0] == theirs[0, 3:].tolist()


def test_text_loss_is_the_hosts_to_the_last_bit(folders):
    """Red when text positions are normalised over more than the host's ids."""
    model = adapters(folders / "tied")
    text = torch.randint(0, 200, (2, 12))
    targets = text.roll(-1, 1).masked_fill(torch.arange(12) == 11, -100)
    with torch.no_grad():
        before = FrozenHostBaseline(model)(text, targets, "none")
        with torch.enable_grad():
            fit(model)
        after = model(text, targets, loss_reduction="none")
    assert torch.equal(before, after)
    by_hand = F.cross_entropy(model.host.logits(text).flatten(0, 1), targets.flatten(), reduction="none")
    assert before.flatten() == pytest.approx(by_hand, abs=1e-5)


def test_the_expert_between_identities_is_musicgens_layer(tmp_path):
    """Against transformers' own modules. Red when LayerNorm, its bias, or exact GELU is left out."""
    theirs = tiny_musicgen(tmp_path / "musicgen", width=32, ffn_dim=64, layers=3)
    config = AdapterConfig(
        vocab_size=10,
        width=32,
        n_layer=1,
        sequence_len=8,
        modalities=(Modality("audio", 1, 4, None),),
        expert_dim=32,
        expert_hidden=64,
    )
    expert, layer = Expert(config), theirs.decoder.model.decoder.layers[2]
    with torch.no_grad():
        for name, tensor in read_experts(str(tmp_path / "musicgen"), (2,))[0].items():
            expert.get_parameter(name).copy_(tensor)
        expert.down_proj.weight.copy_(torch.eye(32))
        expert.up_proj.weight.copy_(torch.eye(32))
        x = 3 * torch.randn(2, 5, 32)
        wanted = layer.fc2(layer.activation_fn(layer.fc1(layer.final_layer_norm(x))))
        assert (expert(x) - wanted).abs().max() < 1e-6 * max(1, wanted.abs().max())


TRAINED = {
    "experts.0.down_proj.weight",
    "experts.0.up_proj.weight",
    "experts.1.down_proj.weight",
    "experts.1.up_proj.weight",
    "audio_embedding.weight",
}
EXPERT = {f"experts.{i}.{part}" for i in (0, 1) for part in ("norm.weight", "norm.bias", "fc1.weight", "fc2.weight")}


@pytest.mark.parametrize("name", ["tied", "untied"])
@pytest.mark.parametrize(
    ("options", "further"),
    [
        (dict(), {"audio_output.weight"}),
        (dict(expert="none"), {"audio_output.weight"}),
        (dict(expert="trained"), {"audio_output.weight"} | EXPERT),
        (dict(train_output="whole", output_layers="shared"), {"output.weight"}),
        (dict(train_output="none"), set()),
    ],
)
def test_what_is_trained_is_this_list(folders, name, options, further):
    """And all of it has a gradient, nothing else has one. Red when a frozen expert keeps its gradient."""
    model = adapters(folders / name, **options)
    assert {name for name, _ in model.trained()} == TRAINED | further
    inputs, targets = sounds(model)
    with torch.no_grad():
        for expert in model.experts:
            expert.up_proj.weight.normal_(std=0.1)  # at zero it lets nothing through
    model(inputs, targets).backward()
    with_gradient = {n for n, p in model.named_parameters() if p.grad is not None}
    assert with_gradient == {n for n, p in model.named_parameters() if p.requires_grad}
    assert all(p.grad is None for p in model.host.model.parameters())


def test_a_filter_by_name_that_matches_nothing_is_refused(folders):
    """The old recipe's fix: every parameter with "output" in its name. Red when an empty list is trained in silence."""
    with pytest.raises(UserError, match=r"unfreeze='output' names no parameter of .*its output is its embedding"):
        adapters(folders / "tied", unfreeze="output")
    with pytest.raises(UserError, match="names no parameter"):
        adapters(folders / "tied", unfreeze="lm_head")
    with pytest.raises(UserError, match="takes in the host's output matrix, which no sound's loss meets"):
        adapters(folders / "untied", unfreeze="lm_head")
    options = dict(unfreeze="lm_head", output_layers="shared")
    names = {name for name, _ in adapters(folders / "untied", **options).trained()}
    assert names == TRAINED | {"audio_output.weight", "host_model.lm_head.weight"}
    everything = adapters(folders / "tied", finetune_host=True)
    theirs = {f"host_model.{name}" for name, _ in everything.host.model.named_parameters()}
    assert {name for name, _ in everything.trained()} == TRAINED | {"audio_output.weight"} | theirs


def test_frozen_output_rows_never_learn(folders):
    """Rows that start at zero and stay there: ln K, whatever the adapters do. Red when the rows are trained."""
    model = adapters(folders / "tied", markers=False, books=1, train_output="none")
    assert fit(model, 30) == pytest.approx(math.log(K), abs=1e-5)
    assert fit(adapters(folders / "tied", markers=False, books=1), 30) < 1.5


def test_training_the_whole_output_on_sounds_alone_costs_the_text(tmp_path):
    """A host that knows a text by heart. Red when the host's rows are left out of the trained copy, or the copy is the
    host's own tensor."""
    text = torch.randint(0, 200, (4, 16), generator=torch.Generator().manual_seed(2))
    targets = text.roll(-1, 1)
    learnt = tiny_llama(tmp_path, tied=True)
    optimizer = torch.optim.AdamW(learnt.parameters(), 1e-2)
    for _ in range(40):
        optimizer.zero_grad()
        F.cross_entropy(learnt(text).logits.flatten(0, 1), targets.flatten()).backward()
        optimizer.step()
    learnt.save_pretrained(tmp_path)
    model = adapters(tmp_path, train_output="whole", output_layers="shared")
    hashed = state_hash(model.host)
    with torch.no_grad():
        alone = FrozenHostBaseline(model)(text, targets, "none").mean()
        before = model(text, targets, loss_reduction="none").mean()
    fit(model, 60)
    with torch.no_grad():
        after = model(text, targets, loss_reduction="none").mean()
    # the shared softmax alone: the new rows, all zero, take their part
    assert alone < before < after / 2
    assert state_hash(model.host) == hashed


def test_one_softmax_leaks_and_two_do_not(folders):
    """New rows alone under a shared softmax: the text logits stay and the text loss does not. Red when `shared` is
    taken as separate."""
    text = torch.randint(0, 200, (4, 16), generator=torch.Generator().manual_seed(2))
    model = adapters(folders / "tied", output_layers="shared")
    wanted = model.host.logits(text)
    fit(model)
    with torch.no_grad():
        assert torch.equal(model(text)[..., : model.config.vocab_size], wanted)
        leaking = model(text, text.roll(-1, 1), loss_reduction="none").mean()
        assert leaking > FrozenHostBaseline(model)(text, text.roll(-1, 1), "none").mean()


@pytest.mark.parametrize("output_layers", ["separate", "shared"])
def test_losses_by_hand(folders, output_layers):
    """From the logits, per modality, over ignored targets and rows of different captions. Red when a target is taken
    for its neighbour."""
    model = adapters(folders / "tied", output_layers=output_layers)
    fit(model, 5)
    inputs, targets = sounds(model, seed=3)
    targets[0, :2] = inputs[0, 1:3]  # two words count, too
    V = model.config.vocab_size
    with torch.no_grad():
        logits = model(inputs)
        sums, counts = [0.0, 0.0], model.count_targets(targets)
        for row, t in (targets != -100).nonzero().tolist():
            audio = int(targets[row, t] >= V)
            part = logits[row, t] if output_layers == "shared" else (logits[row, t, :V], logits[row, t, V:])[audio]
            target = targets[row, t] if output_layers == "shared" else targets[row, t] - V * audio
            sums[audio] -= part.log_softmax(-1)[target].item()
        found = model(inputs, targets, loss_reduction="modalities")
        assert found.tolist() == pytest.approx(sums, rel=1e-5)
        assert model(inputs, targets).item() == pytest.approx(sum(sums) / counts.sum().item(), rel=1e-5)
        none = model(inputs, targets, loss_reduction="none")
        assert none.sum().item() == pytest.approx(sum(sums), rel=1e-5)
        assert (none[targets == -100] == 0).all()
    told = model.loss_by_modality(found / counts.sum(), counts)
    assert told == pytest.approx({"loss/text": sums[0] / 2, "loss/audio": sums[1] / counts[1].item()}, rel=1e-5)


def test_chunked_loss_has_the_same_gradient(folders, monkeypatch):
    """Red when a chunk is left out of the backward pass."""
    model = adapters(folders / "tied", output_layers="shared")
    inputs, targets = sounds(model)
    model(inputs, targets).backward()
    whole = {name: p.grad.clone() for name, p in model.trained()}
    model.zero_grad()
    monkeypatch.setattr("nanochat.adapters.model.CHUNK", 5)
    model(inputs, targets).backward()
    assert all(torch.allclose(p.grad, whole[name], atol=1e-6) for name, p in model.trained())


def test_a_batch_without_sounds_trains_nothing_and_does_not_fail(folders):
    """Zero gradients, not None: with several ranks all have to bring the same. Red without a graph for it."""
    model = adapters(folders / "tied")
    text = torch.randint(0, 200, (2, 8))
    loss = model(text, torch.full_like(text, -100))
    loss.backward()
    assert loss.item() == 0
    assert all((p.grad == 0).all() for _, p in model.trained())


def test_audio_goes_through_the_expert_and_text_does_not(folders):
    """Spoiling the experts changes codes from the first on, and no text before them. Red when `start` is the host's."""
    model = adapters(folders / "tied")
    fit(model)
    inputs, _ = sounds(model, rows=1)
    with torch.no_grad():
        before = model(inputs)
        for expert in model.experts:
            expert.up_proj.weight.add_(1.0)
        after = model(inputs)
    start = inputs[0].tolist().index(model.vocabulary.modality("audio").start)
    assert torch.equal(before[:, :start], after[:, :start])
    assert (before[:, start:] != after[:, start:]).any(dim=-1).all()


@pytest.mark.parametrize("markers", [True, False])
def test_cached_is_uncached(folders, markers):
    """Mixed modalities, rows in different codebooks. Red when the cache forgets a position."""
    model = adapters(folders / "qwen2", markers=markers)
    fit(model)
    inputs, _ = sounds(model)
    with torch.no_grad():
        whole, cache = model(inputs), model.new_cache(4, 19)
        parts = [model(piece, kv_cache=cache) for piece in inputs.split([7, 1, 1, 4, 1, 5], dim=1)]
    assert torch.allclose(whole, torch.cat(parts, dim=1), atol=1e-4)


def test_generation_is_legal_and_learnt(folders):
    """Four captions learnt by heart come back whole; every code in its codebook's turn. Red without the grammar."""
    model = adapters(folders / "tied")
    assert fit(model, 150) < 0.05
    inputs, targets = sounds(model)
    start = model.vocabulary.modality("audio").start
    for row, wanted in zip(inputs.tolist(), targets.tolist(), strict=True):
        prompt = row[: row.index(start) + 1]
        drawn = [int(t) for t in decode(model, torch.tensor([prompt]), 13, temperature=0, frames=6)]
        assert drawn == [t for t in wanted if t != -100]
    wild = adapters(folders / "tied")
    drawn = [int(t) for t in decode(wild, torch.tensor([[1, start]]), 13, temperature=5.0, frames=6)]
    V, end = wild.config.vocab_size, wild.vocabulary.end("audio")
    books = [(t - V) // K for t in drawn[: drawn.index(end)] if t != end]
    assert books == [i % Q for i in range(len(books))]
    assert len(books) % Q == 0


def test_guidance_is_its_formula(folders):
    """Against two uncached forwards a step. Red when the two logits change places."""
    model = adapters(folders / "tied")
    fit(model, 60)
    inputs, _ = sounds(model)
    V, start = model.config.vocab_size, model.vocabulary.modality("audio").start
    prompt = inputs[1].tolist()[: inputs[1].tolist().index(start) + 1]
    free = [prompt[0], start]
    drawn = [
        int(t) for t in decode(model, torch.tensor([prompt]), 8, temperature=0, frames=4, unguided=free, guidance=3.0)
    ]
    with torch.no_grad():
        for place, token in enumerate(drawn):
            with_caption = model(torch.tensor([prompt + drawn[:place]]))[0, -1]
            without = model(torch.tensor([free + drawn[:place]]))[0, -1]
            guided = without + 3.0 * (with_caption - without)
            book = place % Q
            legal = list(range(V + book * K, V + (book + 1) * K)) + ([V + Q * K] if book == 0 and place else [])
            assert token == max(legal, key=lambda i: guided[i])


def test_an_expanded_vocabulary_has_rows_for_codes_alone(folders):
    """K rows each, for codes alone; one product with all output rows gives the logits. Red with an `end` row."""
    model = adapters(folders / "untied", markers=False, books=1)
    fit(model)
    V, C = model.config.vocab_size, model.config.width
    output = torch.cat([model.host.model.lm_head.weight, model.audio_output.weight])
    assert model.audio_embedding.weight.shape == model.audio_output.weight.shape == (K, C)
    inputs, _ = sounds(model)
    with torch.no_grad():
        features = model.features(inputs)
        assert torch.allclose(model.logits(features), features @ output.T, atol=1e-5)
    drawn = decode(model, torch.tensor([[1, 2]]), 5, inside="audio")
    assert all(V <= int(t) < V + K for t in drawn)


def test_what_starts_where(folders):
    """down_proj keeps the variance, up_proj and rows are zero, embedding rows have the host's scale; by seed alone."""
    model, again = adapters(folders / "tied"), adapters(folders / "tied")
    for (name, a), (_, b) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    assert (model.audio_output.weight == 0).all()
    assert all((e.up_proj.weight == 0).all() for e in model.experts)
    host = model.host.model.get_input_embeddings().weight.std().item()
    assert model.audio_embedding.weight.std().item() == pytest.approx(host, rel=0.1)
    assert model.experts[0].down_proj.weight.std().item() == pytest.approx(32**-0.5, rel=0.1)
    inputs, targets = sounds(model)
    assert model(inputs, targets).item() == pytest.approx(math.log(Q * K + 1), abs=1e-6)


@pytest.mark.parametrize("name", ["tied", "untied"])
@pytest.mark.parametrize("output_layers", ["separate", "shared"])
def test_flops_by_the_closed_formula(folders, name, output_layers):
    """4 a frozen weight met, 6 a trained one. Red when the host's MLP, which no sound goes through, is counted."""
    model = adapters(folders / name, output_layers=output_layers)
    V, C, E, hidden, layers = 272, 32, 16, 32, 2
    attention = C * C * 2 + 2 * C * 16  # q, o; k and v of 2 heads of 8
    norms = (2 * layers + 1) * C
    frozen = layers * (attention + 2 * E * hidden + 2 * E) + norms + (V * C if output_layers == "shared" else 0)
    trained = layers * 2 * C * E + (Q * K + 1) * C
    assert model.flops_per_token() == 4 * frozen + 6 * trained + 12 * layers * C * 64


def test_the_host_never_drops_out(folders):
    """Red when train() reaches a host that is trained."""
    model = adapters(folders / "tied", finetune_host=True)
    model.eval().train()
    assert model.training
    assert not any(module.training for module in model.host.model.modules())


def test_counts_at_real_size():
    """Llama-3.2-1B and MusicGen-small on the meta device, against the closed formulas."""
    rows = parameter_counts(AdapterSettings(codebooks=4))
    assert rows["adapters"] == 16 * 2 * 2048 * 1024 == 67_108_864
    assert rows["experts"] == 16 * (2 * 1024 * 4096 + 2 * 1024)
    assert rows["audio embedding"] == (4 * 2048 + 2) * 2048
    assert rows["audio output"] == (4 * 2048 + 1) * 2048
    recipe = dict(vocabulary="expanded", train_output="whole", output_layers="shared")
    whole = parameter_counts(AdapterSettings(**recipe))
    assert whole["whole output"] == 130304 * 2048 == 266_862_592
    assert whole["audio embedding"] == 2048 * 2048
    assert whole["trained"] == 67_108_864 + 2048 * 2048 + 266_862_592
    assert whole["host"] == 1_235_814_400
