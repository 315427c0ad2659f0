"""Products of FP8 numbers against the nearest of all 256 numbers, and against the same model without them."""

import dataclasses

import pytest
import torch

from nanochat.config.settings import Settings
from nanochat.gpt import GPT, GPTConfig, Linear
from nanochat.modality import Modality
from nanochat.model.routing import ROUTES
from nanochat.system.environment import UserError
from nanochat.training import fp8
from nanochat.training.compilation import choose_kernels
from nanochat.training.fp8 import Float8Linear, convert_linears, enable_fp8, quantize

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def matrices(seed: int = 0) -> tuple[Linear, Linear]:
    """A matrix [256, 128], and the same one in FP8."""
    torch.manual_seed(seed)
    plain, other = Linear(128, 256), Linear(128, 256)
    other.load_state_dict(plain.state_dict())
    other.__class__ = Float8Linear
    return plain, other


def nearest(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x float64 in steps of the dtype after scaling by its largest entry, found by looking at every number there is."""
    numbers = torch.arange(256, dtype=torch.uint8).view(dtype).double()
    numbers = numbers[numbers.isfinite()].unique()
    unit = x.abs().max().float().double() / numbers.max()
    return numbers[(x[..., None] / unit - numbers).abs().argmin(-1)] * unit


@pytest.mark.parametrize("scale", [1e-7, 1.0, 1e5])
def test_products_match_those_of_the_nearest_fp8_numbers(scale):
    """Forward and both gradients, whatever the size of the activations. Red when product() does not undo the scale, a
    factor is not transposed, or the gradient is rounded to e4m3."""
    _, matrix = matrices()
    x = (scale * torch.randn(2, 16, 128)).requires_grad_()
    gradient = 1e-3 * torch.randn(2, 16, 256)
    y = matrix(x)
    dx, dw = torch.autograd.grad(y, (x, matrix.weight), gradient)
    x8, w8 = nearest(x.detach().double(), E4M3), nearest(matrix.weight.detach().double(), E4M3)
    g8 = nearest(gradient.double(), E5M2)
    wanted = (x8 @ w8.T, g8 @ w8, torch.einsum("bto,bti->oi", g8, x8))
    for a, b in zip((y, dx, dw), wanted, strict=True):
        assert (a.double() - b).norm() < 1e-3 * b.norm()  # a tie is rounded to either side


def test_gradients_stay_near_those_of_bfloat16():
    """Within a tenth (measured 0.04 forward, 0.06 backward), in the dtypes that autograd wants."""
    plain, other = matrices()
    x = torch.randn(4, 32, 128).bfloat16().requires_grad_()
    gradient = torch.randn(4, 32, 256).bfloat16()
    results = []
    for matrix in (plain, other):
        y = matrix(x)
        results.append((y, *torch.autograd.grad(y, (x, matrix.weight), gradient)))
    for ours, theirs in zip(*reversed(results), strict=True):
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
        assert (ours.float() - theirs.float()).norm() < 0.1 * theirs.float().norm()


def test_what_is_not_finite_stays_so_and_zeros_stay_zeros():
    """Red when the scale is clamped from above or the zeros are divided by nothing."""
    for bad in (torch.inf, torch.nan):
        _, matrix = matrices()
        x = torch.randn(16, 128)
        x[3, 5] = bad
        assert not matrix(x)[3].isfinite().any()
    x8, scale = quantize(torch.zeros(16, 16), E5M2)
    assert (x8.float() == 0).all()
    assert scale > 0


def test_only_training_changes():
    """Without gradients bit-equal to Linear. Red when forward() forgets it."""
    plain, other = matrices()
    x = torch.randn(2, 16, 128)
    with torch.no_grad():
        assert torch.equal(plain(x), other(x))
    assert not torch.equal(plain(x), other(x))


@pytest.mark.parametrize("rows", [1, 15, 17, 30])
def test_any_number_of_rows_is_multiplied_in_fp8(rows):
    """Forward and both gradients are those of the rows with zeros behind them up to a multiple of 16.

    Red when rows that are no multiple of 16 take F.linear, or the gradient of a padded row is kept.
    """
    plain, other = matrices()
    x, gradient = torch.randn(rows, 128, requires_grad=True), torch.randn(rows, 256)
    more = -rows % 16
    padded = torch.cat([x.detach(), torch.zeros(more, 128)]).requires_grad_()
    y, whole = other(x), other(padded)
    found = (y, *torch.autograd.grad(y, (x, other.weight), gradient))
    dx, dw = torch.autograd.grad(whole, (padded, other.weight), torch.cat([gradient, torch.zeros(more, 256)]))
    for a, b in zip(found, (whole[:rows], dx[:rows], dw), strict=True):
        assert torch.equal(a, b)
    assert not torch.allclose(y, plain(x), rtol=1e-4)


def test_no_rows_at_all():
    """An expert without tokens has a gradient of zeros. Red when nothing is added to 0 rows (amax of nothing)."""
    _, other = matrices()
    other(torch.zeros(2, 0, 128)).sum().backward()
    assert torch.equal(other.weight.grad, torch.zeros(256, 128))


MATRICES = {"none": 12, "mlp": 16, "all": 24}  # of 2 layers: 4 of attention and 2 of the MLP, twice where untied
UNTIED = {"none": 0, "mlp": 8, "all": 24}  # of them in parts that have experts, which route=grouped multiplies itself


@pytest.mark.parametrize("untie", MATRICES)
@pytest.mark.parametrize("route", ROUTES)
def test_converted_matrices_multiply_in_fp8(monkeypatch, route, untie):
    """In batches of an odd number of tokens, one of them without sound, each call of a converted matrix makes the three
    products of FP8; under route=sort experts get rows in multiples of 16, so that nothing is padded matrix by matrix.

    Red when Float8Linear takes F.linear for odd rows, when gpt.py gives plan_route() no row_multiple, or when
    convert_linears() names what route=grouped multiplies.
    """
    audio = Modality("audio", codebooks=1, codes=64, start=290)
    config = GPTConfig(17, vocab_size=300, n_layer=2, n_head=2, n_kv_head=2, n_embd=128, modalities=(audio,))
    model = GPT(dataclasses.replace(config, untie=untie))
    model.init_weights()
    model.route = route
    names, rows, products = convert_linears(model), {}, []
    assert len(names) == MATRICES[untie] - (route == "grouped") * UNTIED[untie]
    for name in names:
        seen = rows.setdefault(name, [])
        model.get_submodule(name).register_forward_hook(lambda _, x, y, seen=seen: seen.append(y[..., 0].numel()))
    product = fp8.product
    monkeypatch.setattr(fp8, "product", lambda *args, **how: products.append(1) or product(*args, **how))
    generator = torch.Generator().manual_seed(0)
    for step in range(4):
        ids = torch.randint(364 if step else 280, (3, 17), generator=generator)
        model(ids, ids.roll(-1, 1)).backward()
    assert all(rows.values())
    assert len(products) == 3 * sum(map(len, rows.values()))
    if (route, untie) == ("sort", "all"):
        assert not [(name, n) for name, seen in rows.items() for n in seen if n % 16]


def test_large_matrices_of_the_blocks_are_converted(monkeypatch):
    """Names, a state that any model loads, losses that fall alike, one graph. Red when gates, odd or small matrices are
    converted too, or SMALLEST_SIDE is not asked."""
    config = GPTConfig(
        16, vocab_size=300, n_layer=2, n_head=2, n_kv_head=1, n_embd=128, mlp_ratio=1.5, value_embeddings=True
    )
    torch.manual_seed(0)
    models = [GPT(config), GPT(config)]
    models[0].init_weights()
    models[1].load_state_dict(models[0].state_dict())
    names = convert_linears(models[1])
    parts = ("attn.c_q", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert sorted(names) == sorted(f"transformer.h.{layer}.{part}" for layer in range(2) for part in parts)
    assert convert_linears(models[1]) == []
    assert models[0].state_dict().keys() == models[1].state_dict().keys()
    assert (
        convert_linears(GPT(GPTConfig(16, n_layer=1, n_head=1, n_kv_head=1, n_embd=136, mlp_ratio=1.0))) == []
    )  # 8.5 times 16

    ids = torch.randint(300, (4, 17))
    falls = []
    for model in models:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        losses = []
        for _ in range(5):
            loss = model(ids[:, :-1], ids[:, 1:])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        falls.append(losses[0] - losses[-1])
    assert falls[1] == pytest.approx(falls[0], rel=0.05)
    assert falls[0] > 0.5

    matrix = torch.compile(models[1].transformer.h[0].mlp.c_fc, fullgraph=True, backend="aot_eager")
    x = torch.randn(16, 128)
    torch.testing.assert_close(matrix(x), models[1].transformer.h[0].mlp.c_fc(x))


@pytest.mark.parametrize(("capability", "said"), [(None, "not cpu"), ((8, 0), r"not An A100 \(8.0\)")])
def test_other_devices_are_refused(monkeypatch, capability, said):
    """Red when CAPABILITY is (8, 0)."""
    model = GPT(GPTConfig(16, vocab_size=300, n_layer=1, n_head=1, n_kv_head=1, n_embd=128))
    if capability:
        monkeypatch.setattr(GPT, "device", torch.device("cuda"))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "An A100")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    with pytest.raises(UserError, match=f"fp8=True needs .*Hopper.*{said}: set fp8=False"):
        enable_fp8(model)
    monkeypatch.setattr(GPT, "device", torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert len(enable_fp8(model)) == 6


def test_chosen_kernels_are_logged_and_fp8_is_refused_elsewhere(capsys):
    """Red when choose_kernels() leaves the setting out, or says nothing."""
    model = GPT(GPTConfig(sequence_len=8, vocab_size=32, n_layer=1, n_head=1, n_kv_head=1, n_embd=16))
    choose_kernels(model, Settings())
    assert "attention of all layers: blocked matmuls" in capsys.readouterr().out
    with pytest.raises(UserError, match="fp8=True needs a GPU"):
        choose_kernels(model, Settings(fp8=True))
