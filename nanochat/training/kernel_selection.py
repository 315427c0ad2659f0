"""Which kernel trains attention on a GPU: each is tried on a tile before the run, and the first right one is used."""

import warnings
from dataclasses import dataclass

import torch

from nanochat.gpt import GPT, GPTConfig
from nanochat.model import gpu_attention as kernels
from nanochat.model.document_mask import document_block_mask
from nanochat.model.gpu_attention import Kernel, flash_attention_3, flex
from nanochat.runtime import first_line

CANDIDATES: tuple[tuple[str, Kernel], ...] = (  # by preference; cuDNN was ahead of FlashAttention 2 on an H200
    ("FlashAttention 3", flash_attention_3),
    ("cuDNN", kernels.cudnn),
    ("FlashAttention 2", kernels.flash_attention_2),
    ("torch's FlashAttention 2", kernels.torch_flash),
    ("FlexAttention", flex),
)
TILE = 256  # tokens of the trial
TILE_WINDOW = 100  # the longest window that is tried: one key too many or too few still shows
TOLERANCE = 0.02  # of output and gradients against float32, relative: bfloat16 alone costs a quarter of it


@dataclass(frozen=True)
class Choice:
    """What computes the attention of some layers in training, and why not something that is preferred.

    kernel: None where no GPU kernel was chosen. windowed: it is for the layers with a window, else for those without.
    """

    name: str
    reason: str
    layers: str = "all layers"
    kernel: Kernel | None = None
    windowed: bool = False

    def __str__(self) -> str:
        return f"attention of {self.layers}: {self.name} ({self.reason})"


def select_attention(model: GPT, compiled: bool = True) -> list[Choice]:
    """Let a model's attention be trained by the kernels that choose_attention() finds; returns the choices."""
    choices = choose_attention(model.config, model.device, model.compute_dtype, compiled)
    model.kernels.attention = {choice.windowed: choice.kernel for choice in choices if choice.kernel is not None}
    return choices


def choose_attention(
    config: GPTConfig, device: torch.device, dtype: torch.dtype, compiled: bool = True
) -> list[Choice]:
    """What trains the layers with and without a window on this device. compiled: inside torch.compile."""
    if device.type == "cpu":
        return [Choice("blocked matmuls", "on a CPU the backward of a fused kernel is slow")]
    if device.type != "cuda":
        return [Choice("SDPA", f"on {device.type} nothing else runs")]
    windows = dict.fromkeys(config.window(layer) for layer in range(config.n_layer))
    return [try_candidates(config, window, device, dtype, compiled) for window in windows]


def try_candidates(
    config: GPTConfig, window: int | None, device: torch.device, dtype: torch.dtype, compiled: bool
) -> Choice:
    """The first of the candidates that is right for layers with this window; SDPA where none is.

    compiled: they run inside torch.compile, so a kernel that breaks its graph is rejected.
    """
    layers = "layers that see everything" if window is None else f"layers with a window of {window}"
    heads = (config.n_head, config.n_kv_head, config.head_dim)
    documents = config.document_start is not None
    name, chosen, rejected = "SDPA", None, []

    for candidate, kernel in CANDIDATES:
        reason = rejection_reason(kernel, heads, device, dtype, window, documents, compiled)
        if reason is None:
            name, chosen = candidate, kernel
            break
        rejected.append(f"{candidate}: {reason}")

    if chosen is flex and not documents:
        # Ahead of the compiler, whose graphs would build their own.
        kernels.block_mask(config.sequence_len, window, device)
    return Choice(name, "; ".join(rejected) or "the first choice", layers, chosen, window is not None)


def rejection_reason(
    kernel: Kernel,
    heads: tuple[int, int, int],
    device: torch.device,
    dtype: torch.dtype,
    window: int | None = None,
    documents: bool = False,
    compiled: bool = False,
) -> str | None:
    """Why a kernel cannot be used: what one tile, forward and backward, raised or got wrong; None for a right kernel.

    heads: (H, H_kv, D) of the layers.
    """
    if kernel is flash_attention_3 and not on_hopper(device):
        return "made for Hopper GPUs"  # elsewhere it may end the process

    H, kv, D = heads
    generator = torch.Generator(device).manual_seed(0)
    q, k, v, weight = (
        torch.randn(1, TILE, n, D, device=device, generator=generator).to(dtype).requires_grad_()
        for n in (H, kv, kv, H)
    )
    window = window if window is None else min(window, TILE_WINDOW)
    begins = (torch.arange(TILE, device=device) // 150 * 150)[None] if documents else None

    with torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch explains at length why a kernel does not take these tensors
        inputs = [z.detach().float().requires_grad_() for z in (q, k, v)]
        out = plain_attention(*inputs, window, begins)
        expected = (out, *torch.autograd.grad(out, inputs, weight.float()))
        try:
            run = torch.compile(kernel, fullgraph=True, dynamic=False) if compiled else kernel
            mask = document_block_mask(begins, window) if documents and kernel is flex else begins
            out = run(q, k, v, window, mask)
            found = (out, *torch.autograd.grad(out, (q, k, v), weight))
            pairs = zip(("out", "dq", "dk", "dv"), found, expected, strict=True)
            errors = {name: ((a.float() - b).norm() / b.norm()).item() for name, a, b in pairs}
        except Exception as error:  # whatever a kernel, its compiler or its import raises, the next one is tried
            # The compiler hides what was raised: ask again without it.
            eager_reason = rejection_reason(kernel, heads, device, dtype, window, documents) if compiled else None
            return eager_reason or f"{type(error).__name__}: {first_line(error)}"

    wrong = [f"{error:.1%} in {name}" for name, error in errors.items() if not error <= TOLERANCE]  # NaN is wrong too
    return f"it is wrong by {', '.join(wrong)}" if wrong else None


def on_hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


def plain_attention(q, k, v, window: int | None = None, begins: torch.Tensor | None = None) -> torch.Tensor:
    """The definition, with all scores in memory, that the kernels are compared with. begins: as document_masks()."""
    k, v = (z.repeat_interleave(q.size(2) // z.size(2), dim=2) for z in (k, v))
    scores = torch.einsum("bthd,bshd->bhts", q, k) * q.size(-1) ** -0.5
    place = torch.arange(q.size(1), device=q.device)
    seen = kernels.visible(place[:, None], place, window, None if begins is None else begins[:, None, :, None])
    return torch.einsum("bhts,bshd->bthd", scores.masked_fill(~seen, -float("inf")).softmax(-1), v)
