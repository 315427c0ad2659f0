"""Predictions: counts against closed formulas, memory against tensors that torch really saves."""

import dataclasses
import math
import random

import pytest
import torch

from nanochat.config.presets import PRESET_WORLD, PRESETS
from nanochat.config.settings import Settings, preset, validate
from nanochat.data.tokenizer import Tokenizer
from nanochat.gpt import GPT, GPTConfig
from nanochat.model.loss_head import chunk_rows
from nanochat.optim import build_optimizer
from nanochat.runtime import Compute
from nanochat.training.estimate import (
    Hardware,
    checkpoint_bytes,
    describe_tying_savings,
    estimate,
    find_hardware,
    known_vocab_size,
    measure,
    measure_bytes,
    memory_parts,
    meta_model,
    parameter_table,
    report,
    usable_devices,
)
from scripts.stress.gpu import Plan

CPU = Hardware("cpu", "a processor", 1, 16 << 30, 1e11, torch.float32)
H100 = Hardware("cuda", "NVIDIA H100 80GB HBM3", 8, 80 << 30, 989e12, torch.bfloat16)


def parsed(lines: list[str]) -> dict[str, tuple[int, float]]:
    """The printed table -> {label: (count, millions)}."""
    found = {}
    for line in lines[1 : 1 + next(i for i, line in enumerate(lines) if line.startswith("total"))]:
        label, count, millions = line.rsplit(maxsplit=2)
        found[label.strip()] = int(count.replace(",", "")), float(millions.rstrip("M").replace(",", ""))
    return found


def random_settings(random_: random.Random) -> Settings:
    head_dim = random_.choice([2, 16, 64, 128])
    heads = random_.choice([1, 2, 3, 4, 6, 8, 12])
    tied = random_.random() < 0.6
    kv = random_.choice([None, *(n for n in range(1, heads + 1) if heads % n == 0)])
    return validate(
        Settings(
            vocab_size=random_.randrange(272, 70_000),
            depth=random_.randrange(1, 25),
            head_dim=head_dim,
            model_dim=heads * head_dim,
            n_kv_head=kv,
            tie_weights=tied,
            use_output_projection=tied and random_.random() < 0.5,
            output_projection_residual=random_.random() < 0.5,
            value_embeddings=random_.random() < 0.5,
            residual_scalars=random_.random() < 0.5,
        )
    )


@pytest.mark.parametrize("seed", range(50))
def test_the_printed_table_equals_a_closed_formula(seed):
    """Red when a group is left out of the table, or the model grows a matrix that the formula does not know."""
    s = random_settings(random.Random(seed))
    width, key_value = s.model_dim, (s.n_kv_head or s.model_dim // s.head_dim) * s.head_dim
    wte = s.vocab_size * width
    expected = {
        "wte (tied with lm_head)" if s.tie_weights else "wte": wte,
        "lm_head": 0 if s.tie_weights else wte,
        "output projection": width**2 if s.use_output_projection else 0,
        "transformer": s.depth * (2 * width**2 + 2 * width * key_value + 8 * width**2),
    }
    layers = (s.depth + 1) // 2 if s.value_embeddings else 0
    gates = layers * min(12, width) * (key_value // s.head_dim)
    optional = {
        "value embeddings": layers * s.vocab_size * key_value,
        "gates and scalars": gates + (2 * s.depth if s.residual_scalars else 0),
    }
    expected |= {label: count for label, count in optional.items() if count}  # no row of zeros
    expected["total"] = sum(expected.values())
    for lines in (parameter_table(s), report(s, CPU)):
        table = parsed(lines)
        assert {label: count for label, (count, _) in table.items()} == expected
        assert all(abs(count / 1e6 - shown) <= 0.005 + 1e-9 for count, shown in table.values())


def test_the_orientation_of_the_design():
    s = Settings(depth=4, model_dim=512, vocab_size=24576)
    untied, tied = parsed(parameter_table(s)), parsed(parameter_table(dataclasses.replace(s, tie_weights=True)))
    assert untied["wte"][1] == untied["lm_head"][1] == tied["wte (tied with lm_head)"][1] == 12.58
    assert tied["lm_head"] == (0, 0.0)
    assert untied["transformer"] == (4 * 12 * 512**2, 12.58)
    projected = dataclasses.replace(s, tie_weights=True, use_output_projection=True)
    assert parsed(parameter_table(projected))["output projection"] == (512**2, 0.26)
    assert describe_tying_savings(s) == "saves 24,576 x 512 = 12.58M of 37.75M parameters (33%)"


def test_steps_tokens_and_flops_by_hand():
    s = Settings(depth=2, model_dim=128, head_dim=64, vocab_size=1000, max_seq_len=64, total_batch_size=1024)
    matmul = 1000 * 128 + 2 * 12 * 128**2
    e = estimate(dataclasses.replace(s, target_param_data_ratio=3.0), CPU)
    assert e.flops_per_token == 6 * matmul + 12 * 2 * 128 * 64
    assert e.steps == round(3 * matmul / 1024)
    assert e.tokens == e.steps * 1024
    # Muon's five iterations: 4 square matrices and 2 of 128 x 512 a layer
    muon = 2 * 5 * (4 * (4 * 128**3 + 2 * 128**3) + 2 * (4 * 128 * 128 * 512 + 2 * 128**3))
    passes = e.tokens * e.flops_per_token
    assert e.seconds == pytest.approx((passes + e.steps * muon) / (0.5 * 1e11))
    measured = [
        estimate(dataclasses.replace(s, target_param_data_ratio=3.0, compile=on), CPU, flops=2e9)
        for on in (False, True)
    ]
    assert measured[0].seconds == pytest.approx((passes + e.steps * muon) / 2e9)  # as eager as what was measured
    head = e.tokens * 6 * 128 * s.vocab_size  # which compiling makes hardly faster
    assert measured[1].seconds == pytest.approx((0.78 * (passes - head) + 0.98 * head + e.steps * muon) / 2e9)
    budget = estimate(dataclasses.replace(s, target_flops=1e12), CPU)
    assert budget.steps == round(1e12 / e.flops_per_token / 1024)


def test_time_divides_among_the_devices_that_the_batch_allows():
    s = Settings(max_seq_len=512, total_batch_size=512 * 12, device_batch_size=2)
    assert [usable_devices(s, n) for n in (0, 1, 2, 3, 4, 5, 8)] == [1, 1, 2, 3, 3, 3, 6]
    for n in range(1, 9):
        s.batch_plan(usable_devices(s, n))
    one, six = (estimate(s, dataclasses.replace(H100, count=n)).seconds for n in (1, 8))
    assert one == pytest.approx(6 * six)


@pytest.mark.parametrize("tied", [False, True])
def test_the_disk_prediction_is_the_size_of_a_real_checkpoint_s_tensors(tied):
    """Red when a quantity of the optimizer's state is not counted."""
    s = Settings(depth=2, model_dim=48, head_dim=16, n_kv_head=1, vocab_size=300, max_seq_len=8, tie_weights=tied)
    model = GPT(GPTConfig.from_settings(s))
    model.init_weights()
    optimizer = build_optimizer(model, s, torch.float32)
    model(torch.ones(1, 8, dtype=torch.long), torch.ones(1, 8, dtype=torch.long)).backward()
    optimizer.reduce_gradients()
    optimizer.step()
    tensors = [*model.state_dict().values(), *(v for k, v in optimizer.state_dict().items() if not k.endswith(".step"))]
    assert checkpoint_bytes(s) == sum(t.numel() * t.element_size() for t in tensors)
    state = memory_parts(s, CPU)["optimizer"]
    assert state == checkpoint_bytes(s) - 4 * sum(p.numel() for p in model.parameters())


def test_saves_and_kept_checkpoints():
    s = Settings(num_iterations=1001, save_every=100)
    count = [estimate(dataclasses.replace(s, **c), CPU) for c in ({}, dict(keep_last=2), dict(save_every=None))]
    assert [(e.saves, e.kept) for e in count] == [(11, 11), (11, 3), (1, 1)]


def test_optimizer_state_is_shared_by_the_ranks():
    s = Settings(depth=4, model_dim=256, vocab_size=4096, max_seq_len=64, total_batch_size=64 * 8)
    one, four = (memory_parts(s, H100, world)["optimizer"] for world in (1, 4))
    assert one / 4 == pytest.approx(four, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("depth", "heads", "kv", "length"), [(4, 4, 4, 256), (2, 8, 2, 128), (3, 4, 1, 512)])
def test_predicted_activations_are_what_torch_saves_for_backward(dtype, depth, heads, kv, length):
    """Within 15%, and the newer features' share within 25%. Red when a term of the formula is dropped."""
    saved = {}
    for modern in (False, True):
        s, saved[modern] = saved_activations(dtype, depth, heads, kv, length, modern)
        predicted = memory_parts(s, CPU)["activations"]
        assert predicted == pytest.approx(saved[modern], rel=0.15)
    classic = dataclasses.replace(s, value_embeddings=False, smear=False, residual_scalars=False, backout=False)
    share = predicted - memory_parts(classic, CPU)["activations"]
    assert share == pytest.approx(saved[True] - saved[False], rel=0.25)


def test_windows_save_the_memory_that_is_predicted():
    """Red when the prediction forgets the window (`end - max(0, start - w)`)."""
    whole, narrow = (saved_activations(torch.float32, 3, 4, 4, 1024, False, p) for p in ("L", "S"))
    for s, saved in (whole, narrow):
        assert memory_parts(s, CPU)["activations"] == pytest.approx(saved, rel=0.15)
    assert narrow[1] < 0.9 * whole[1]


def saved_activations(dtype, depth, heads, kv, length, modern, pattern="L") -> tuple[Settings, int]:
    """The settings, and the bytes that torch keeps between forward and backward, the loss head's left out."""
    tokens, name = max(256, length), str(dtype).removeprefix("torch.")
    s = Settings(
        depth=depth,
        head_dim=32,
        model_dim=32 * heads,
        n_kv_head=kv,
        max_seq_len=length,
        dtype=name,
        vocab_size=500,
        total_batch_size=tokens,
        device_batch_size=tokens,
        tie_weights=True,
        value_embeddings=modern,
        smear=modern,
        residual_scalars=modern,
        backout=modern,
        window_pattern=pattern,
        short_window=64,
    )
    model = GPT(GPTConfig.from_settings(s))
    model.init_weights()
    model.compute_dtype = dtype
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    saved: dict[int, int] = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids = torch.zeros(tokens // length, length, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(ids, ids)  # the graph keeps the storages alive, so that no address is used twice
    head = 4 * 500 * s.n_embd + dtype.itemsize * tokens * s.n_embd
    assert loss.isfinite()
    return s, sum(saved.values()) - head


def test_memory_does_not_grow_with_accumulation_and_logits_stay_a_chunk():
    s = Settings(max_seq_len=256, device_batch_size=4, total_batch_size=256 * 4, vocab_size=50_000)
    more = dataclasses.replace(s, total_batch_size=256 * 64)
    assert memory_parts(s, CPU) == memory_parts(more, CPU)
    assert memory_parts(s, CPU)["logits"] < 5 * 4 * chunk_rows("cpu", 50_000) * 50_000 * 2
    assert chunk_rows("cpu", 50_000) < chunk_rows("cpu", 5_000)


def test_the_first_pass_that_is_measured_pays_for_the_others(monkeypatch):
    """Red when it counts: passes of 10 s and 1 s are not one of 5.5."""
    clock = iter((0.0, 0.0, 10.0, 10.0, 11.0, 99.0))  # the deadline, begin and end of both, and it is over
    monkeypatch.setattr("nanochat.training.estimate.time.perf_counter", lambda: next(clock))
    s = Settings(depth=1, model_dim=16, head_dim=8, max_seq_len=16, vocab_size=300, total_batch_size=16)
    assert measure(s, CPU, 20.0) == pytest.approx(16 * meta_model(s).flops_per_token())


# GiB that two steps of each of gpu_check's settings took at most on an H200 (dev/LOG.md).
MEASURED = {
    "classic": 6.89,
    "two micro-batches": 7.605,
    "grouped queries": 6.417,
    "short context": 6.881,
    "tied, small vocabulary": 3.846,
    "as the presets": 9.795,
    "float32": 10.63,
    "without compiling": 11.16,
}


def test_memory_of_a_gpu_is_what_was_measured():
    """Red without `3 * kv`, when a first micro-batch is counted with gradients, or with one array of logits."""
    plan = Plan(Compute(torch.device("cuda"), torch.bfloat16))
    gpu = dataclasses.replace(H100, count=1)
    predicted = {name: estimate(settings, gpu).peak_memory / 2**30 for name, settings in plan.memories()}
    assert {name: predicted[name] for name in MEASURED} == pytest.approx(MEASURED, rel=0.03)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_at_full_size_on_the_meta_device(name):
    s = preset(name)
    model = meta_model(s)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert model.num_parameters()["total"] == sum(p.numel() for p in model.parameters())
    lines = report(s, CPU if name == "cpu" else dataclasses.replace(H100, count=PRESET_WORLD[name]))
    assert max(map(len, lines)) <= 80
    e = estimate(s, CPU)
    assert e.steps > 1
    assert 0 < e.peak_memory < math.inf


def test_a_run_that_does_not_fit_is_warned_about():
    s = Settings(depth=20, max_seq_len=2048, total_batch_size=2048 * 64, device_batch_size=64, head_dim=128)
    small = dataclasses.replace(H100, memory=8 << 30)
    assert "warning: a device has 8.00 GiB: lower device_batch_size" in report(s, small)[-1]
    assert not any("warning" in line for line in report(preset("cpu"), CPU))


def test_extreme_settings_are_still_estimated():
    for s in (
        Settings(num_iterations=10**30),
        Settings(target_flops=1e300),
        Settings(depth=1, model_dim=2, head_dim=2, max_seq_len=2, total_batch_size=2, vocab_size=272),
        Settings(model_dim=1_000_000, head_dim=10_000, vocab_size=1_000_000),
    ):
        lines = report(validate(s), CPU)
        assert lines[0].startswith("parameters")
        assert any(line.startswith("disk") for line in lines)


def test_measuring_takes_seconds_even_for_a_model_far_too_large():
    """Red when _shrink_to_budget stops shrinking the layers."""
    large = preset("gpu1", vocab_size=512, dtype="float32")
    slow = dataclasses.replace(CPU, peak=2e9)
    assert 1e6 < measure(large, slow, seconds=0.2) < 1e14


def test_a_measurement_counts_the_activations_of_what_it_measures():
    """Red when measure_bytes leaves out the activations, or counts those of the whole batch on a slow device."""
    small, large = (preset("gpu1", device_batch_size=rows) for rows in (2, 64))
    parts = memory_parts(large, H100)
    assert measure_bytes(large, H100) > parts["activations"] > 10 * parts["parameters"]
    assert measure_bytes(large, H100) > 5 * measure_bytes(small, H100)
    slow = dataclasses.replace(H100, peak=1e11)
    assert measure_bytes(large, slow) == measure_bytes(small, slow)


def test_the_hardware_found_is_this_one():
    hardware = find_hardware("cpu")
    assert hardware.device_type == "cpu"
    assert hardware.count == 1
    assert 1e8 < hardware.peak < 1e14
    assert hardware.memory > 1 << 28


def test_the_size_of_a_named_tokenizer_counts(tmp_path, monkeypatch):
    """A tokenizer of 272 ids beside vocab_size=8192: what is predicted is the model that a run would have.

    Red when meta_model() takes settings.vocab_size.
    """
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    Tokenizer([bytes([i]) for i in range(256)]).save(tmp_path / "small")
    shape = dict(depth=2, model_dim=64, head_dim=32, max_seq_len=64)
    named = Settings(vocab_size=8192, tokenizer=str(tmp_path / "small"), **shape)
    assert known_vocab_size(named) == 272
    assert meta_model(named).num_parameters() == meta_model(Settings(vocab_size=272, **shape)).num_parameters()
    assert describe_tying_savings(named).startswith("saves 272 x 64")
    assert known_vocab_size(Settings(vocab_size=8192, tokenizer="nowhere")) == 8192  # the run will refuse it
