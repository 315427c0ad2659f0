"""The optimizer against torch's AdamW and Muon, float64 references, and itself on one rank."""

import functools
from datetime import timedelta

import hypothesis.strategies as st
import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from torch._dynamo.testing import CompileCounter

from nanochat.config.settings import Settings
from nanochat.gpt import GPT, GPTConfig
from nanochat.optim import NEWTON_SCHULZ, POLAR_EXPRESS, MuonAdamW, build_optimizer, muon_update, orthogonalize
from nanochat.training.grad_accumulation import forward_backward
from tests.forked import spawn

TINY = GPTConfig(sequence_len=8, vocab_size=11, n_layer=2, n_head=1, n_kv_head=1, n_embd=8)


def randn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def muon_group(params: list[nn.Parameter], **changes) -> dict:
    names = [f"m{i}" for i in range(len(params))]
    plain = dict(momentum=0.9, nesterov=True, normalize=False, cautious=False, method="newton_schulz")
    return dict(
        kind="muon",
        name="matrix",
        params=params,
        param_names=names,
        lr=0.1,
        weight_decay=0.0,
        **{**plain, "dtype": torch.float32, **changes},
    )


def take_step(optimizer: MuonAdamW, scale: float = 1.0) -> float:
    norm, _ = optimizer.reduce_gradients()
    optimizer.step(scale)
    return norm


# ---------------------------------------------------------------------------------------------------------------------
# AdamW


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_adamw_matches_torch(decay):
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
def test_float32_orthogonalisation_matches_the_float64_iteration(m, n, method, seed):
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
def test_muon_matches_torch(shape, nesterov):
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


@pytest.mark.parametrize("shape", [(5, 8), (8, 5)])
@pytest.mark.parametrize("cautious", [True, False])
def test_cautious_decay_acts_only_where_update_and_weight_agree(cautious, shape):
    """By the plain rate for tall matrices, too. Red when the sign test is turned around, plain decay ignores the rate,
    or decay is times the tall matrices' factor."""
    with_decay, without = (nn.Parameter(randn(*shape, seed=1)) for _ in range(2))
    start = with_decay.detach().clone()
    gradient = randn(*shape, seed=2)
    for p, decay in ((with_decay, 0.3), (without, 0.0)):
        p.grad = gradient.clone()
        take_step(MuonAdamW([{**muon_group([p], cautious=cautious), "weight_decay": decay}]))
    update = start - without.detach()
    agree = update * start > 0 if cautious else torch.ones_like(start, dtype=torch.bool)
    assert 0 < agree.sum() < 40 or not cautious
    torch.testing.assert_close(without.detach() - with_decay.detach(), agree * start * 0.1 * 0.3)


def test_clipping_scales_the_gradient_and_the_norms_are_those_of_the_whole():
    """AdamW at its first step ignores the scale, and so does Muon at any; what they remember does not.

    Red when one of the two updates takes the gradient as it is.
    """
    p, q = nn.Parameter(randn(4, 4, seed=1)), nn.Parameter(randn(4, 4, seed=2))
    adamw = dict(kind="adamw", name="flat", params=[p], param_names=["p"], lr=0.1, betas=(0.5, 0.5), eps=1e-10)
    optimizer = MuonAdamW([dict(adamw, weight_decay=0.0), muon_group([q])])
    p.grad, q.grad = torch.full((4, 4), 3.0), torch.full((4, 4), 4.0)
    norm, by_group = optimizer.reduce_gradients()
    assert p.grad is None
    assert q.grad is None
    assert norm == pytest.approx(20.0)  # sqrt(16 * 9 + 16 * 16)
    assert by_group == pytest.approx({"flat": 12.0, "matrix": 16.0})
    optimizer.step(0.25)
    state = optimizer.state_dict()
    torch.testing.assert_close(state["p.exp_avg"], torch.full((4, 4), 0.5 * 0.25 * 3.0))
    torch.testing.assert_close(state["m0.momentum"], torch.full((4, 4), 0.1 * 0.25 * 4.0))
    with pytest.raises(AssertionError, match="reduce_gradients"):
        optimizer.step()


def test_flops_of_orthogonalising_by_hand():
    """5 iterations of two products of 4 x 4 with 4 x 6 and a square of 4 x 4, 2 FLOPs a term; AdamW's do not count.

    Red when the long side is taken for the Gram matrix.
    """
    wide, tall, flat = nn.Parameter(torch.zeros(4, 6)), nn.Parameter(torch.zeros(6, 4)), nn.Parameter(torch.zeros(9, 9))
    facts = dict(kind="adamw", name="a", lr=0.1, betas=(0.5, 0.5), eps=1e-10, weight_decay=0.0)
    optimizer = MuonAdamW([muon_group([wide, tall]), dict(facts, params=[flat], param_names=["p"])])
    assert optimizer.muon_flops() == 2 * 5 * (2 * 2 * 4 * 4 * 6 + 2 * 4 * 4 * 4)


def muon_steps(compiled: bool = False) -> tuple[list[torch.Tensor], MuonAdamW]:
    """Two shapes, three steps of changing rates: the weights, and the optimizer."""
    ps = [nn.Parameter(randn(*shape, seed=1)) for shape in ((4, 6), (6, 4), (4, 6))]
    optimizer = MuonAdamW([{**muon_group(ps, normalize=True, cautious=True), "weight_decay": 0.1}])
    if compiled:
        optimizer.compile()
    for step in range(3):
        optimizer.param_groups[0].update(lr=0.1 / (step + 1), momentum=0.8 + step / 20)
        for i, p in enumerate(ps):
            p.grad = randn(*p.shape, seed=10 * step + i)
        take_step(optimizer, 0.5 + step)
    return [p.detach() for p in ps], optimizer


@pytest.fixture
def compile_by(monkeypatch):
    """compile_by(backend): torch.compile() uses it from now on."""
    torch._dynamo.reset()

    def use(backend) -> None:
        monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))

    yield use
    torch._dynamo.reset()


def test_muon_is_one_graph_a_shape_at_all_rates(compile_by):
    """And other optimizers stay eager. Red when a rate goes in as a number (a graph for every step), when the stacks
    are taken apart, or when compile() replaces the update of all optimizers."""
    counter = CompileCounter()
    compile_by(counter)
    found, optimizer = muon_steps(compiled=True)
    assert counter.frame_count == 2
    eager, other = muon_steps()
    for a, b in zip(found, eager, strict=True):
        torch.testing.assert_close(a, b)
    assert counter.frame_count == 2
    assert optimizer.muon_update is not muon_update
    assert other.muon_update is muon_update
    optimizer.uncompile()
    assert optimizer.muon_update is muon_update


def test_muon_falls_back_to_eager_where_its_compiler_fails(compile_by, capsys):
    """Red when the update is not repeated after the failure, or is tried compiled at every step."""

    def broken(graph, inputs):
        raise ValueError("no such instruction")

    eager, _ = muon_steps()
    compile_by(broken)
    found, optimizer = muon_steps(compiled=True)
    assert all(torch.equal(a, b) for a, b in zip(found, eager, strict=True))
    assert capsys.readouterr().out.count("Muon runs without torch.compile (BackendCompilerFailed: ") == 1
    assert optimizer.muon_update is muon_update


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


def test_gates_lambdas_and_value_embeddings_have_their_own_learning_rates():
    """Red when a gate of one row goes to Muon, which would push every update of it to full size."""
    model = tiny_model(value_embeddings=True, smear=True, residual_scalars=True, backout=True, bigram_rows=11)
    optimizer = build_optimizer(model, Settings(value_embedding_lr=0.3, bigram_lr=0.4, scalar_lr=0.02), torch.float32)
    groups = {group["name"]: group for group in optimizer.param_groups}
    lambdas = {"smear_lambda", "resid_lambdas", "x0_lambdas", "backout_lambda", "bigram_lambdas"}
    gates = {"smear_gate.weight", "transformer.h.1.attn.ve_gate.weight"}
    assert set(groups["scalar"]["param_names"]) == lambdas | gates
    assert groups["value_embedding"]["param_names"] == ["value_embeds.1.weight"]
    assert groups["bigram"]["param_names"] == ["bigram_embed.weight"]
    assert groups["bigram"]["lr"] == pytest.approx(0.4 * (8 / 768) ** -0.5)
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
        loss = model(ids[:, :-1], ids[:, 1:], loss_reduction="sum") / 48
        optimizer.overlap_gradient_reduction()
        loss.backward()
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


def meet(rank: int, ranks: int, folder: str) -> None:
    torch.set_num_threads(1)
    where = f"file://{folder}/meeting"
    dist.init_process_group("gloo", init_method=where, rank=rank, world_size=ranks, timeout=timedelta(seconds=20))


def one_of_three(rank: int, folder: str) -> None:
    """Rank `rank` of 3: 2 steps, save, load into a fresh optimizer, 2 more steps; rank 0 writes what came out."""
    meet(rank, 3, folder)
    model, optimizer = make(rank, 3)
    rows = slice(2 * rank, 2 * rank + 2)
    train(model, optimizer, range(2), rows)
    state = optimizer.state_dict()
    resumed = build_optimizer(model, Settings(weight_decay=0.1), torch.float32, rank, 3)
    resumed.load_state_dict(state)
    shards = [bucket.state["exp_avg"].numel() for bucket in resumed.buckets if "exp_avg" in bucket.state]
    assert shards == [30, 30], shards  # a third of 88 numbers, rounded up: state is sharded, not copied
    train(model, resumed, range(2, 3), rows)
    if rank == 0:
        torch.save({"two": state, "model": model.state_dict()}, f"{folder}/out.pt")
    without_memory(rank, model, resumed, rows)
    if rank == 0:
        torch.save(model.state_dict(), f"{folder}/four.pt")
    dist.barrier()
    dist.destroy_process_group()


def without_memory(rank: int, model: GPT, optimizer: MuonAdamW, rows: slice) -> None:
    """Step 3, at which rank 1 fails in the middle of its last backward pass, and all try again in smaller parts."""
    ids = torch.randint(11, (6, 9), generator=torch.Generator().manual_seed(3))[rows]
    batch = ids[:, :-1], ids[:, 1:]

    def starved(_):
        assert 0 < optimizer.launched < len(optimizer.chunks)
        raise torch.OutOfMemoryError("CUDA out of memory.")

    middle = model.transformer.h[1].attn.c_q.weight
    hook = middle.register_hook(starved) if rank == 1 else None
    loss = forward_backward(model, *batch, 2, torch.tensor(48), optimizer)
    failed = torch.tensor(float(loss is None))
    dist.all_reduce(failed)
    assert failed == 1
    if hook is not None:
        hook.remove()
    else:
        assert all(p.grad is None for p in model.parameters())  # they were sent, and their memory is free
    optimizer.drop_gradients()
    model.zero_grad(set_to_none=True)
    assert forward_backward(model, *batch, 1, torch.tensor(48), optimizer) is not None
    assert optimizer.launched == len(optimizer.chunks)
    take_step(optimizer)


def test_three_ranks_match_one(tmp_path):
    """Stacks of 8, 2 and 2 matrices and 88 numbers over 3 ranks; state saved by 3 loaded by 1 and by 3.

    Red when `_Bucket.reduce_scatter` does not call REDUCE_SCATTER (each rank would go its own way), when the padding is
    not cut off again, or when state_dict saves one rank's shard alone. And the rank without memory: red when
    launch_reduce_scatter() does nothing on a rank that `failed` (the others wait for their sums), or when
    drop_gradients() keeps what was reduced (the step would take the sums of the failed pass).
    """
    spawn(one_of_three, (str(tmp_path),), ranks=3)
    out = torch.load(tmp_path / "out.pt", weights_only=True)
    model, optimizer = make()
    train(model, optimizer, range(2))
    for name, value in optimizer.state_dict().items():
        torch.testing.assert_close(out["two"][name], value, rtol=1e-4, atol=1e-7, msg=name)
    optimizer.load_state_dict(out["two"])
    train(model, optimizer, range(2, 3))
    for name, value in model.state_dict().items():
        torch.testing.assert_close(out["model"][name], value, rtol=1e-4, atol=2e-6, msg=name)
    train(model, optimizer, range(3, 4))
    four = torch.load(tmp_path / "four.pt", weights_only=True)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(four[name], value, rtol=1e-4, atol=5e-6, msg=name)


def one_of_two(rank: int, folder: str) -> None:
    """Two parameters whose gradients the ranks complete in opposite orders; at the last step rank 1 lacks one."""
    meet(rank, 2, folder)
    a, b = nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(6))
    facts = dict(kind="adamw", name="a", params=[a, b], param_names=["a", "b"], weight_decay=0.0)
    optimizer = MuonAdamW([dict(facts, lr=0.1, betas=(0.5, 0.5), eps=1e-10)], rank, 2)
    early = []
    for step in range(3):
        first, second = (a, b) if rank else (b, a)
        terms = [(rank + 1) * (first * 1).sum()] + [(rank + 1) * (second * 1).sum()] * (step < 2 or rank == 0)
        optimizer.overlap_gradient_reduction()
        sum(terms).backward()
        early.append(optimizer.launched)
        if step == 2:
            optimizer.launch_reduce_scatter()  # what is left, with this rank's gradients
            assert optimizer.launched == 2
        norm, _ = optimizer.reduce_gradients()
        assert optimizer.hooks == []  # else every step would keep its own
        assert norm == pytest.approx((10 * 9) ** 0.5 if step < 2 else (4 * 9 + 6) ** 0.5)
        optimizer.step()
        a.grad = b.grad = None
    assert optimizer.order == [0, 1]  # as rank 0 completed them
    assert early == ([0, 2, 2] if rank == 0 else [0, 2, 1]), early
    dist.barrier()
    dist.destroy_process_group()


def test_gradients_are_summed_while_the_backward_pass_runs_in_one_order_on_all_ranks(tmp_path):
    """Red when each rank sends what is complete, whatever the others do: gradients of 4 numbers meet those of 6."""
    spawn(one_of_two, (str(tmp_path),), ranks=2)


def test_a_skipped_step_leaves_nothing_behind():
    """Red without drop_gradients: the gradients of a bad step would be held through the next backward pass."""
    matrix = torch.nn.Parameter(torch.ones(4, 4))
    groups = [dict(name="m", kind="muon", params=[matrix], param_names=["m"], lr=0.1, initial_lr=0.1, weight_decay=0.0)]
    groups[0] |= dict(momentum=0.95, nesterov=True, normalize=True, cautious=True, method="polar_express")
    optimizer = MuonAdamW([groups[0] | dict(dtype=torch.float32)])
    matrix.grad = torch.full((4, 4), torch.nan)
    optimizer.reduce_gradients()
    optimizer.drop_gradients()
    assert all(bucket.grad is None for bucket in optimizer.buckets)
    assert matrix.eq(1).all()
    assert optimizer.state_dict() == {}
