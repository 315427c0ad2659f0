"""The optimizer against torch's AdamW and Muon, float64 references, and itself on one rank."""

import hypothesis.strategies as st
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn as nn
from hypothesis import given
from hypothesis import settings as hypothesis_settings

from nanochat.gpt import GPT, GPTConfig
from nanochat.optim import NEWTON_SCHULZ, POLAR_EXPRESS, MuonAdamW, build_optimizer, orthogonalize
from nanochat.settings import Settings

TINY = GPTConfig(sequence_len=8, vocab_size=11, n_layer=2, n_head=1, n_kv_head=1, n_embd=8)


def randn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def muon_group(params: list[nn.Parameter], **changes) -> dict:
    names = [f"m{i}" for i in range(len(params))]
    plain = dict(momentum=0.9, nesterov=True, normalize=False, cautious=False, method="newton_schulz")
    return dict(
        kind="muon", name="matrix", params=params, param_names=names, lr=0.1, weight_decay=0.0,
        **{**plain, "dtype": torch.float32, **changes},
    )  # fmt: skip


def take_step(optimizer: MuonAdamW, scale: float = 1.0) -> float:
    norm, _ = optimizer.reduce_gradients()
    optimizer.step(scale)
    return norm


# ---------------------------------------------------------------------------------------------------------------------
# AdamW


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_adamw_is_torchs(decay):
    """60 steps of changing rate. Red when the step counter starts at 1, or the betas are swapped."""
    ours = [nn.Parameter(randn(7, 5, seed=1)), nn.Parameter(randn(3, seed=2))]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    facts = dict(lr=0.03, betas=(0.8, 0.95), eps=1e-10, weight_decay=decay)
    optimizer = MuonAdamW([dict(kind="adamw", name="a", params=ours, param_names=["p", "q"], **facts)])
    reference = torch.optim.AdamW(theirs, **facts)
    for step in range(60):
        for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            a.grad = randn(*a.shape, seed=100 * step + i)
            b.grad = a.grad.clone()
        for group in optimizer.param_groups + reference.param_groups:
            group["lr"] = 0.03 * (1 - step / 60)
        take_step(optimizer)
        reference.step()
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# orthogonalisation


def reference_orthogonalize(g: torch.Tensor, method: str) -> torch.Tensor:
    """The same iteration on one matrix in float64, written as polynomials of x x^T."""
    x = g.double()
    if method == "polar_express":
        x, coefficients = x / (x.norm() * 1.02), POLAR_EXPRESS
    else:
        x, coefficients = x / x.norm(), NEWTON_SCHULZ
    for a, b, c in coefficients:
        gram = x @ x.T
        x = (a * torch.eye(len(x), dtype=x.dtype) + b * gram + c * gram @ gram) @ x
    return x


@hypothesis_settings(max_examples=30)
@given(st.integers(1, 20), st.integers(1, 20), st.sampled_from(["polar_express", "newton_schulz"]), st.integers(0, 5))
def test_float32_orthogonalisation_is_the_float64_iteration(m, n, method, seed):
    """To 1e-4, for wide, tall and stacked matrices. Red when the tall transpose is not undone."""
    stack = randn(3, m, n, seed=seed) * 1e-3
    ours = orthogonalize(stack, method)
    assert ours.shape == stack.shape
    for one, g in zip(ours, stack, strict=True):
        expected = reference_orthogonalize(g, method)
        assert (one.double() - expected).norm() <= 1e-4 * expected.norm()


@pytest.mark.parametrize(("method", "low", "high"), [("polar_express", 0.85, 1.15), ("newton_schulz", 0.65, 1.25)])
@pytest.mark.parametrize("shape", [(64, 64), (64, 256), (256, 64)])
def test_singular_values_go_to_about_one_and_vectors_stay(method, low, high, shape):
    """Against the SVD: singular values from 0.01 to 1 end inside the method's band."""
    u, _, v = torch.linalg.svd(randn(*shape, seed=3), full_matrices=False)
    g = u * torch.logspace(-2, 0, 64) @ v
    out = orthogonalize(g, method)
    values = torch.linalg.svdvals(out)
    assert low < values.min()
    assert values.max() < high
    turned = u.T @ out @ v.T
    assert (turned - turned.diagonal().diag()).abs().max() < 1e-3


def test_a_zero_gradient_stays_zero():
    """Also the matrices that pad a shard. Red without the eps below the norm."""
    for method in ("polar_express", "newton_schulz"):
        assert not orthogonalize(torch.zeros(2, 4, 6), method).any()


# ---------------------------------------------------------------------------------------------------------------------
# Muon


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("shape", [(24, 24), (16, 48), (48, 16)])
def test_muon_is_torchs(shape, nesterov):
    """bf16 Newton-Schulz without extras: every update within 1e-2 of torch.optim.Muon's.

    Red when the momentum's `lerp` weight is turned around, or the sqrt(m / n) of tall matrices is left out.
    """
    ours, theirs = nn.Parameter(randn(*shape, seed=1)), nn.Parameter(randn(*shape, seed=1))
    optimizer = MuonAdamW([muon_group([ours], nesterov=nesterov, dtype=torch.bfloat16)])
    reference = torch.optim.Muon(
        [theirs], lr=0.1, weight_decay=0.0, momentum=0.9, nesterov=nesterov, adjust_lr_fn="original"
    )
    for step in range(8):
        before = ours.detach().clone(), theirs.detach().clone()
        ours.grad = randn(*shape, seed=10 + step)
        theirs.grad = ours.grad.clone()
        take_step(optimizer)
        reference.step()
        update, expected = ours - before[0], theirs - before[1]
        assert (update - expected).norm() <= 1e-2 * expected.norm()


@pytest.mark.parametrize("shape", [(6, 10), (10, 6)])
def test_normalisation_evens_the_neurons_out_and_keeps_the_norm(shape):
    """NorMuon by hand over three steps. Red when the norm is not restored, or the short side is taken for neurons."""
    p = nn.Parameter(torch.zeros(shape))
    optimizer = MuonAdamW([muon_group([p], normalize=True, nesterov=False, momentum=0.0)])
    neurons = 1 if shape[0] > shape[1] else 0  # the dimension that is averaged away
    variance = torch.zeros_like(p.detach().mean(neurons, keepdim=True))
    for step in range(3):
        before = p.detach().clone()
        p.grad = randn(*shape, seed=step)
        plain = orthogonalize(p.grad, "newton_schulz")
        variance = 0.95 * variance + 0.05 * plain.square().mean(neurons, keepdim=True)
        scaled = plain / variance.sqrt()
        expected = scaled * plain.norm() / scaled.norm()
        take_step(optimizer)
        update = (before - p.detach()) / (0.1 * max(1, shape[0] / shape[1]) ** 0.5)
        torch.testing.assert_close(update, expected, rtol=1e-4, atol=1e-5)
        assert update.norm().item() == pytest.approx(plain.norm().item(), rel=1e-4)


@pytest.mark.parametrize("cautious", [True, False])
def test_cautious_decay_acts_only_where_update_and_weight_agree(cautious):
    """Red when the sign test is turned around, or plain decay ignores the rate."""
    with_decay, without = (nn.Parameter(randn(5, 8, seed=1)) for _ in range(2))
    start = with_decay.detach().clone()
    gradient = randn(5, 8, seed=2)
    for p, decay in ((with_decay, 0.3), (without, 0.0)):
        p.grad = gradient.clone()
        take_step(MuonAdamW([{**muon_group([p], cautious=cautious), "weight_decay": decay}]))
    update = start - without.detach()
    agree = update * start > 0 if cautious else torch.ones_like(start, dtype=torch.bool)
    assert 0 < agree.sum() < 40 or not cautious
    torch.testing.assert_close(without.detach() - with_decay.detach(), agree * start * 0.1 * 0.3)


def test_clipping_scales_the_gradient_and_the_norms_are_those_of_the_whole():
    """AdamW at its first step ignores the scale, its moment does not."""
    p, q = nn.Parameter(randn(4, 4, seed=1)), nn.Parameter(randn(4, 4, seed=2))
    adamw = dict(kind="adamw", name="flat", params=[p], param_names=["p"], lr=0.1, betas=(0.5, 0.5), eps=1e-10)
    optimizer = MuonAdamW([dict(adamw, weight_decay=0.0), muon_group([q])])
    p.grad, q.grad = torch.full((4, 4), 3.0), torch.full((4, 4), 4.0)
    norm, by_group = optimizer.reduce_gradients()
    assert norm == pytest.approx(20.0)  # sqrt(16 * 9 + 16 * 16)
    assert by_group == pytest.approx({"flat": 12.0, "matrix": 16.0})
    optimizer.step(0.25)
    torch.testing.assert_close(optimizer.state_dict()["p.exp_avg"], torch.full((4, 4), 0.5 * 0.25 * 3.0))
    with pytest.raises(AssertionError, match="reduce_gradients"):
        optimizer.step()


# ---------------------------------------------------------------------------------------------------------------------
# groups


def tiny_model(**changes) -> GPT:
    model = GPT(GPTConfig(**{**TINY.__dict__, **changes}))
    torch.manual_seed(0)
    model.init_weights()
    return model


@pytest.mark.parametrize("variant", [{}, {"tie_weights": True}, {"tie_weights": True, "use_output_projection": True}])
def test_every_parameter_is_in_exactly_one_group(variant):
    """Red when a group's names are dropped, or the width scaling of AdamW's rates is."""
    model = tiny_model(**variant)
    optimizer = build_optimizer(model, Settings(weight_decay=0.2), torch.float32)
    grouped = [p for group in optimizer.param_groups for p in group["params"]]
    assert sorted(map(id, grouped)) == sorted(map(id, model.parameters()))
    by_name = {group["name"]: group for group in optimizer.param_groups}
    scale = (8 / 768) ** -0.5
    if variant:
        assert by_name.keys() == {"tied", "matrix"}
        assert by_name["tied"]["lr"] == pytest.approx(Settings.tied_weights_lr * scale)
        assert ("output_projection.weight" in by_name["matrix"]["param_names"]) == (len(variant) == 2)
    else:
        assert by_name.keys() == {"embedding", "unembedding", "matrix"}
        assert by_name["embedding"]["lr"] == pytest.approx(0.2 * scale)
        assert by_name["unembedding"]["lr"] == pytest.approx(0.004 * scale)
    assert by_name["matrix"]["lr"] == 0.02
    assert by_name["matrix"]["weight_decay"] == 0.2


def test_gates_lambdas_and_value_embeddings_have_their_own_rates():
    """Red when a gate of one row goes to Muon, which would push every update of it to full size."""
    model = tiny_model(value_embeddings=True, smear=True, residual_scalars=True, backout=True)
    optimizer = build_optimizer(model, Settings(value_embedding_lr=0.3, scalar_lr=0.02), torch.float32)
    groups = {group["name"]: group for group in optimizer.param_groups}
    lambdas = {"smear_lambda", "resid_lambdas", "x0_lambdas", "backout_lambda"}
    gates = {"smear_gate.weight", "transformer.h.1.attn.ve_gate.weight"}
    assert set(groups["scalar"]["param_names"]) == lambdas | gates
    assert groups["value_embedding"]["param_names"] == ["value_embeds.1.weight"]
    assert (groups["scalar"]["kind"], groups["value_embedding"]["kind"]) == ("adamw", "adamw")
    assert groups["scalar"]["lr"] == 0.02
    assert groups["value_embedding"]["lr"] == pytest.approx(0.3 * (8 / 768) ** -0.5)


def test_parameters_of_a_new_kind_are_not_forgotten():
    """A matrix and a vector that no rule names: Muon and the scalars take them. Red when a rule lists known names."""
    model = tiny_model()
    model.gate, model.mixer = nn.Parameter(torch.ones(3)), nn.Linear(4, 5, bias=False)
    groups = {g["name"]: g["param_names"] for g in build_optimizer(model, Settings(), torch.float32).param_groups}
    assert groups["scalar"] == ["gate"]
    assert "mixer.weight" in groups["matrix"]


# ---------------------------------------------------------------------------------------------------------------------
# state, and ranks


def train(model: GPT, optimizer: MuonAdamW, steps: range, rows: slice = slice(None)) -> None:
    """Steps on six rows that depend on the step alone; `rows` are this rank's."""
    for step in steps:
        ids = torch.randint(11, (6, 9), generator=torch.Generator().manual_seed(step))[rows]
        (model(ids[:, :-1], ids[:, 1:], loss_reduction="sum") / 48).backward()
        take_step(optimizer)
        model.zero_grad(set_to_none=True)


def make(rank: int = 0, world_size: int = 1) -> tuple[GPT, MuonAdamW]:
    # weight decay, variance normalisation and momentum all have to survive sharding
    model = tiny_model()
    return model, build_optimizer(model, Settings(weight_decay=0.1), torch.float32, rank, world_size)


def test_saved_state_continues_the_same_run():
    """4 steps, or 2, state into a fresh optimizer, 2 more: equal to the bit. Red when one quantity is not saved."""
    straight, optimizer = make()
    train(straight, optimizer, range(4))
    model, optimizer = make()
    train(model, optimizer, range(2))
    copy, fresh = make()
    copy.load_state_dict(model.state_dict())
    fresh.load_state_dict({name: t.clone() for name, t in optimizer.state_dict().items()})
    train(copy, fresh, range(2, 4))
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), copy.parameters(), strict=True))
    quantities = {name.rsplit(".", 1)[1] for name in fresh.state_dict()}
    assert quantities == {"momentum", "neuron_sq", "exp_avg", "exp_avg_sq", "step"}
    with pytest.raises(KeyError, match=r"optimizer state of transformer\.wte\.weight"):
        fresh.load_state_dict({})


def one_of_three(rank: int, folder: str) -> None:
    """Rank `rank` of 3: 2 steps, save, load into a fresh optimizer, 1 more step; rank 0 writes what came out."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=3)
    model, optimizer = make(rank, 3)
    rows = slice(2 * rank, 2 * rank + 2)
    train(model, optimizer, range(2), rows)
    state = optimizer.state_dict()
    resumed = build_optimizer(model, Settings(weight_decay=0.1), torch.float32, rank, 3)
    resumed.load_state_dict(state)
    shards = [unit.state["exp_avg"].numel() for unit in resumed.units if "exp_avg" in unit.state]
    assert shards == [30, 30], shards  # a third of 88 numbers, rounded up: state is sharded, not copied
    train(model, resumed, range(2, 3), rows)
    if rank == 0:
        torch.save({"two": state, "model": model.state_dict()}, f"{folder}/out.pt")
    dist.barrier()
    dist.destroy_process_group()


def test_three_ranks_are_one(tmp_path):
    """Stacks of 8, 2 and 2 matrices and 88 numbers over 3 ranks; state saved by 3 loaded by 1 and by 3.

    Red when REDUCE_SCATTER is left out of `_Unit.scatter` (each rank would go its own way), when the padding is not
    cut off again, or when state_dict saves one rank's shard alone.
    """
    mp.spawn(one_of_three, args=(str(tmp_path),), nprocs=3)
    out = torch.load(tmp_path / "out.pt", weights_only=True)
    model, optimizer = make()
    train(model, optimizer, range(2))
    for name, value in optimizer.state_dict().items():
        torch.testing.assert_close(out["two"][name], value, rtol=1e-4, atol=1e-7, msg=name)
    optimizer.load_state_dict(out["two"])
    train(model, optimizer, range(2, 3))
    for name, value in model.state_dict().items():
        torch.testing.assert_close(out["model"][name], value, rtol=1e-4, atol=2e-6, msg=name)


def test_a_step_that_is_left_out_leaves_nothing_behind():
    """Red without drop_gradients: the gradients of a bad step would be held through the next backward pass."""
    matrix = torch.nn.Parameter(torch.ones(4, 4))
    groups = [dict(name="m", kind="muon", params=[matrix], param_names=["m"], lr=0.1, initial_lr=0.1, weight_decay=0.0)]
    groups[0] |= dict(momentum=0.95, nesterov=True, normalize=True, cautious=True, method="polar_express")
    optimizer = MuonAdamW([groups[0] | dict(dtype=torch.float32)])
    matrix.grad = torch.full((4, 4), torch.nan)
    optimizer.reduce_gradients()
    optimizer.drop_gradients()
    assert all(unit.grad is None for unit in optimizer.units)
    assert matrix.eq(1).all() and optimizer.state_dict() == {}
