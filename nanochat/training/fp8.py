"""Training with the large matrices multiplied in FP8, on Hopper GPUs and newer ones.

As nanochat and torchao do it ("dynamic tensorwise scaling"): each factor is scaled so that its largest entry is the
largest number of the type, rounded, multiplied with float32 sums, and scaled back. Activations and weights are rounded
to e4m3 (three bits of mantissa), gradients to e5m2 (two, but a wider range; arXiv 2209.05433). Master weights stay
float32, and without gradients (evaluation, generation) nothing changes.
"""

import torch
import torch.nn.functional as F

from nanochat.gpt import GPT, Linear
from nanochat.system.environment import UserError

MULTIPLE = 16  # of every side of a product, says the hardware; missing rows are zeros
SMALLEST_SIDE = 128  # below it, rounding costs more time than the product gains (nanochat's bound)
CAPABILITY = (9, 0)


def enable_fp8(model: GPT) -> list[str]:
    """Let the matrices of the blocks that are large enough compute in FP8; returns their names.

    Output matrices stay out, since the loss head multiplies by itself, and so do the matrices of experts under
    route = "grouped", which multiplies by itself too.
    """
    if found := lacking(model.device):
        raise UserError(f"fp8=True needs a GPU of compute capability 9.0 (Hopper) or newer, not {found}: set fp8=False")
    return swap(model)


def lacking(device: torch.device) -> str | None:
    """What a device is that has no FP8; None where it has."""
    if device.type != "cuda":
        return device.type
    major, minor = torch.cuda.get_device_capability(device)
    return f"{torch.cuda.get_device_name(device)} ({major}.{minor})" if (major, minor) < CAPABILITY else None


def swap(model: GPT) -> list[str]:
    """enable_fp8() on any device: torch multiplies FP8 on CPUs too, slowly."""
    names = []
    for name, module in model.transformer.h.named_modules(prefix="transformer.h"):
        sides = (module.in_features, module.out_features) if type(module) is Linear else (0,)
        large = min(sides) >= SMALLEST_SIDE and not any(side % MULTIPLE for side in sides)
        if large and not (model.route == "grouped" and _has_experts(model, name)):
            module.__class__ = Float8Linear  # the parameter stays where the optimizer and checkpoints know it
            names.append(name)
    if names:
        model.row_multiple = MULTIPLE  # experts' rows come in multiples: none has to be padded for each matrix
    return names


def _has_experts(model: GPT, name: str) -> bool:
    """Whether a matrix belongs to the attention or MLP of a block in which modalities have their own."""
    part = model.get_submodule(".".join(name.split(".")[:4]))  # transformer.h.0.mlp
    return bool(getattr(part, "experts", ()))


class Float8Linear(Linear):
    """A Linear whose products in training are those of FP8 numbers, whatever the number of rows."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.is_grad_enabled():
            return F.linear(x, self.weight.to(x.dtype))
        rows = x.flatten(0, -2)
        number = rows.size(0)
        if missing := MULTIPLE if number == 0 else -number % MULTIPLE:
            rows = F.pad(rows, (0, 0, 0, missing))  # zeros change neither scale nor sums
        return _Float8Product.apply(rows, self.weight)[:number].view(*x.shape[:-1], self.out_features)


def rounded(x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """x in an FP8 dtype after scaling to its range, and the factor (float32, no dimension) that undoes the scaling.

    An entry that is not finite makes all of them so, which the guard of the loop notices.
    """
    largest = torch.finfo(dtype).max
    unit = x.abs().amax().float().clamp(min=1e-12) / largest
    return (x.float() / unit).clamp(-largest, largest).to(dtype), unit  # beyond the range the cast would make NaN


def product(a: torch.Tensor, b: torch.Tensor, units: tuple, dtype: torch.dtype, fast: bool = False) -> torch.Tensor:
    """a [M, K] times the transpose of b [N, K], both FP8 and in rows -> [M, N] in dtype."""
    return torch._scaled_mm(a, b.t(), scale_a=units[0], scale_b=units[1], out_dtype=dtype, use_fast_accum=fast)


class _Float8Product(torch.autograd.Function):
    """x [M, K], weight [N, K] -> x weight^T [M, N] in the dtype of x."""

    @staticmethod
    def forward(ctx, x, weight):
        x8, x_unit = rounded(x, torch.float8_e4m3fn)
        w8, w_unit = rounded(weight, torch.float8_e4m3fn)
        ctx.save_for_backward(x8, x_unit, w8, w_unit)  # a byte an entry, half of what bfloat16 keeps
        ctx.dtypes = x.dtype, weight.dtype
        return product(x8, w8, (x_unit, w_unit), x.dtype, fast=True)

    @staticmethod
    def backward(ctx, gradient):
        x8, x_unit, w8, w_unit = ctx.saved_tensors
        g8, g_unit = rounded(gradient, torch.float8_e5m2)
        # The hardware reads both factors along the summed dimension, hence the transposed copies.
        dx = product(g8, w8.t().contiguous(), (g_unit, w_unit), ctx.dtypes[0])
        dw = product(g8.t().contiguous(), x8.t().contiguous(), (g_unit, x_unit), ctx.dtypes[1])
        return dx, dw
