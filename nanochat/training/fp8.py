"""Training with the large matrices multiplied in FP8, on Hopper GPUs and newer ones.

As nanochat and torchao do it ("dynamic tensorwise scaling"): each factor is scaled so that its largest entry is the
largest number of the type, rounded, multiplied with float32 sums, and scaled back. Activations and weights become e4m3
(three bits of mantissa), gradients e5m2 (two, but a wider range; arXiv 2209.05433). Master weights stay float32, and
without gradients (evaluation, generation) nothing changes.
"""

import torch
import torch.nn.functional as F

from nanochat.gpt import GPT, Linear
from nanochat.system.environment import UserError

MULTIPLE = 16  # the hardware wants every side of a product to be a multiple of it; rows are padded with zeros
SMALLEST_SIDE = 128  # below it, quantizing costs more time than the product gains (nanochat's bound)
CAPABILITY = (9, 0)


def enable_fp8(model: GPT) -> list[str]:
    """Let the large matrices of the blocks compute in FP8; returns their names. UserError on a device without FP8.

    Output matrices stay in their dtype, since the loss head has its own products, and so do the matrices of experts
    under route = "grouped", whose kernel multiplies them.
    """
    if device := unsupported_reason(model.device):
        message = "fp8=True needs a GPU of compute capability 9.0 (Hopper) or newer"
        raise UserError(f"{message}, not {device}: set fp8=False")
    return convert_linears(model)


def unsupported_reason(device: torch.device) -> str | None:
    """Name (and compute capability) of a device without FP8; None where it is supported."""
    if device.type != "cuda":
        return device.type
    major, minor = torch.cuda.get_device_capability(device)
    return f"{torch.cuda.get_device_name(device)} ({major}.{minor})" if (major, minor) < CAPABILITY else None


def convert_linears(model: GPT) -> list[str]:
    """enable_fp8() without the check of the device: torch multiplies FP8 on CPUs too, slowly."""
    names = []
    for name, module in model.transformer.h.named_modules(prefix="transformer.h"):
        sides = (module.in_features, module.out_features) if type(module) is Linear else (0,)
        large = min(sides) >= SMALLEST_SIDE and not any(side % MULTIPLE for side in sides)
        if large and not (model.route == "grouped" and _has_experts(model, name)):
            module.__class__ = Float8Linear  # the parameter stays where the optimizer and checkpoints know it
            names.append(name)
    if names:
        model.row_multiple = MULTIPLE  # pad the rows of experts once in the plan, not for each matrix
    return names


def _has_experts(model: GPT, name: str) -> bool:
    """Whether a matrix belongs to an attention or MLP in which modalities have their own."""
    part = model.get_submodule(".".join(name.split(".")[:4]))  # transformer.h.0.mlp
    return bool(getattr(part, "experts", ()))


class Float8Linear(Linear):
    """A Linear whose products in training are computed in FP8, with any number of rows."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.is_grad_enabled():
            return F.linear(x, self.weight.to(x.dtype))
        rows = x.flatten(0, -2)
        number = rows.size(0)
        if missing := MULTIPLE if number == 0 else -number % MULTIPLE:
            rows = F.pad(rows, (0, 0, 0, missing))  # zeros change neither scale nor sums
        return _Float8Product.apply(rows, self.weight)[:number].view(*x.shape[:-1], self.out_features)


def quantize(x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """x scaled to the range of an FP8 dtype and cast, and the scale (float32 scalar) that undoes it.

    One entry that is not finite makes all of them so, which the guard of the training loop notices.
    """
    largest = torch.finfo(dtype).max
    scale = x.abs().amax().float().clamp(min=1e-12) / largest
    return (x.float() / scale).clamp(-largest, largest).to(dtype), scale  # beyond the range the cast would make NaN


def product(a: torch.Tensor, b: torch.Tensor, scales: tuple, dtype: torch.dtype, fast: bool = False) -> torch.Tensor:
    """a [M, K] times the transpose of b [N, K], both FP8 and row-major -> [M, N] in dtype."""
    return torch._scaled_mm(a, b.t(), scale_a=scales[0], scale_b=scales[1], out_dtype=dtype, use_fast_accum=fast)


class _Float8Product(torch.autograd.Function):
    """x [M, K], weight [N, K] -> x weight^T [M, N] in the dtype of x."""

    @staticmethod
    def forward(ctx, x, weight):
        x8, x_scale = quantize(x, torch.float8_e4m3fn)
        w8, w_scale = quantize(weight, torch.float8_e4m3fn)
        ctx.save_for_backward(x8, x_scale, w8, w_scale)  # one byte per entry, half of bfloat16
        ctx.dtypes = x.dtype, weight.dtype
        return product(x8, w8, (x_scale, w_scale), x.dtype, fast=True)

    @staticmethod
    def backward(ctx, gradient):
        x8, x_scale, w8, w_scale = ctx.saved_tensors
        g8, g_scale = quantize(gradient, torch.float8_e5m2)
        # The hardware wants both factors contiguous along the summed dimension, hence the transposed copies.
        dx = product(g8, w8.t().contiguous(), (g_scale, w_scale), ctx.dtypes[0])
        dw = product(g8.t().contiguous(), x8.t().contiguous(), (g_scale, x_scale), ctx.dtypes[1])
        return dx, dw
