"""Which kernel trains attention on a GPU: each is tried on a tile before the run, the first that is right is taken."""

import warnings
from dataclasses import dataclass

import torch

from nanochat.gpt import GPTConfig
from nanochat.model import gpu_attention as kernels
from nanochat.model.document_mask import document_block_mask
from nanochat.model.gpu_attention import Kernel, chosen, flash_attention_3, flex
from nanochat.runtime import first_line

CANDIDATES: tuple[tuple[str, Kernel], ...] = (  # by preference; cuDNN was ahead of FlashAttention 2 on an H200
    ("FlashAttention 3", flash_attention_3),
    ("cuDNN", kernels.cudnn),
    ("FlashAttention 2", kernels.flash_attention_2),
    ("torch's FlashAttention 2", kernels.torch_flash),
    ("FlexAttention", flex),
)
TILE, TILE_WINDOW = 256, 100  # tokens of the trial; a window of at most so many, where one key more or less shows
TOLERANCE = 0.02  # of output and gradients against float32, relative: bfloat16 alone costs a quarter of it


@dataclass(frozen=True)
class Choice:
    """What computes the attention of some layers in training, and why not something that is preferred."""

    name: str
    reason: str
    layers: str = "all layers"

    def __str__(self) -> str:
        return f"attention of {self.layers}: {self.name} ({self.reason})"


def choose_attention(
    config: GPTConfig, device: torch.device, dtype: torch.dtype, compiled: bool = True
) -> list[Choice]:
    """Try the candidates for the layers with and without a window on this device; the first that is right trains them.

    compiled: they run inside torch.compile, so a kernel that breaks its graph is passed over.
    """
    documents = config.document_start is not None
    for windowed in (False, True):
        chosen.pop((device.type, windowed), None)
    if device.type != "cuda":
        if device.type == "cpu":
            return [Choice("blocked matmuls", "on a CPU the backward of a fused kernel is slow")]
        return [Choice("SDPA", f"on {device.type} nothing else runs")]
    choices = []
    for window in dict.fromkeys(config.window(layer) for layer in range(config.n_layer)):
        layers = "layers that see everything" if window is None else f"layers with a window of {window}"
        name, passed = "SDPA", []
        for candidate, kernel in CANDIDATES:
            heads = (config.n_head, config.n_kv_head, config.head_dim)
            reason = problem(kernel, heads, device, dtype, window, documents, compiled)
            if reason is None:
                name, chosen[device.type, window is not None] = candidate, kernel
                break
            passed.append(f"{candidate}: {reason}")
        if name == "FlexAttention" and not documents:
            kernels.block_mask(
                config.sequence_len, window, device
            )  # ahead of the compiler, whose graphs would build their own
        choices.append(Choice(name, "; ".join(passed) or "the first choice", layers))
    return choices


def problem(
    kernel: Kernel,
    heads: tuple[int, int, int],
    device: torch.device,
    dtype: torch.dtype,
    window: int | None = None,
    documents: bool = False,
    compiled: bool = False,
) -> str | None:
    """Why a kernel cannot be used: what one tile, forward and backward, raised or got wrong. None: nothing.

    heads: (H, H_kv, D) of the layers.
    """
    if kernel is flash_attention_3 and not on_hopper(device):
        return "made for Hopper GPUs"  # elsewhere it may end the process
    H, kv, D = heads
    own = torch.Generator(device).manual_seed(0)
    q, k, v, weight = (
        torch.randn(1, TILE, n, D, device=device, generator=own).to(dtype).requires_grad_() for n in (H, kv, kv, H)
    )
    window = window if window is None else min(window, TILE_WINDOW)
    begins = (torch.arange(TILE, device=device) // 150 * 150)[None] if documents else None
    with torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch tells at length why a kernel is none for these tensors
        inputs = [z.detach().float().requires_grad_() for z in (q, k, v)]
        out = plain_attention(*inputs, window, begins)
        wanted = (out, *torch.autograd.grad(out, inputs, weight.float()))
        try:
            run = torch.compile(kernel, fullgraph=True, dynamic=False) if compiled else kernel
            mask = document_block_mask(begins, window) if documents and kernel is flex else begins
            out = run(q, k, v, window, mask)
            found = (out, *torch.autograd.grad(out, (q, k, v), weight))
            pairs = zip(("out", "dq", "dk", "dv"), found, wanted, strict=True)
            errors = {name: ((a.float() - b).norm() / b.norm()).item() for name, a, b in pairs}
        except Exception as error:  # whatever a kernel, its compiler or its import raises, the next one is tried
            plainly = problem(kernel, heads, device, dtype, window, documents) if compiled else None
            return plainly or f"{type(error).__name__}: {first_line(error)}"  # the compiler hides what was raised
    wrong = [f"{error:.1%} in {name}" for name, error in errors.items() if not error <= TOLERANCE]  # so is NaN
    return f"it is wrong by {', '.join(wrong)}" if wrong else None


def on_hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


def plain_attention(q, k, v, window: int | None = None, begins: torch.Tensor | None = None) -> torch.Tensor:
    """The definition, with all scores in memory: what the kernels are held against. begins: as document_masks()."""
    k, v = (z.repeat_interleave(q.size(2) // z.size(2), dim=2) for z in (k, v))
    scores = torch.einsum("bthd,bshd->bhts", q, k) * q.size(-1) ** -0.5
    place = torch.arange(q.size(1), device=q.device)
    seen = kernels.visible(place[:, None], place, window, None if begins is None else begins[:, None, :, None])
    return torch.einsum("bhts,bshd->bthd", scores.masked_fill(~seen, -float("inf")).softmax(-1), v)
