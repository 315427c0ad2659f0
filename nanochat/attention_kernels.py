"""Kernels that train attention on a GPU: each is tried on a tile before the run, the first that is right is taken.

All take q [B, T, H, D], k and v [B, T, H_kv, D] with H_kv dividing H, the window (None: all that came before) and a
mask of documents (None: no boundaries), and return [B, T, H, D]. What one cannot do it raises. FlashAttention
(arXiv 2307.08691, 2407.08608) is used where it is installed; FlexAttention (arXiv 2412.05496) is torch's.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from nanochat.runtime import first_line

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

    from nanochat.gpt import GPTConfig

Kernel = Callable[..., torch.Tensor]
Mask = "torch.Tensor | BlockMask | None"  # what document_masks() makes
chosen: dict[tuple[str, bool], Kernel] = {}  # by device type and whether the layer has a window; else SDPA
block_masks: dict[tuple, "BlockMask"] = {}  # of FlexAttention, by length, window and device

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
    config: "GPTConfig", device: torch.device, dtype: torch.dtype, documents: bool = False, compiled: bool = True
) -> list[Choice]:
    """Try the candidates for the layers with and without a window on this device; the first that is right trains them.

    documents: the layers will be given document_masks(). compiled: they run inside torch.compile, so a kernel that
    breaks its graph is passed over.
    """
    for windowed in (False, True):
        chosen.pop((device.type, windowed), None)
    if device.type != "cuda":
        if device.type == "cpu" and not documents:
            return [Choice("blocked matmuls", "on a CPU the backward of a fused kernel is slow")]
        return [Choice("SDPA", f"on {device.type}{' with document boundaries' if documents else ''} nothing else runs")]
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
            block_mask(config.sequence_len, window, device)  # ahead of the compiler, whose graphs would build their own
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
    numbers = (torch.arange(TILE, device=device) // 150)[None] if documents else None
    with torch.enable_grad():
        inputs = [z.detach().float().requires_grad_() for z in (q, k, v)]
        out = plain_attention(*inputs, window, numbers)
        wanted = (out, *torch.autograd.grad(out, inputs, weight.float()))
        try:
            run = torch.compile(kernel, fullgraph=True, dynamic=False) if compiled else kernel
            out = run(q, k, v, window, None if numbers is None else _document_mask(numbers, window, kernel is flex))
            found = (out, *torch.autograd.grad(out, (q, k, v), weight))
            pairs = zip(("out", "dq", "dk", "dv"), found, wanted, strict=True)
            errors = {name: ((a.float() - b).norm() / b.norm()).item() for name, a, b in pairs}
        except Exception as error:  # whatever a kernel, its compiler or its import raises, the next one is tried
            return f"{type(error).__name__}: {first_line(error)}"
    wrong = [f"{error:.1%} in {name}" for name, error in errors.items() if not error <= TOLERANCE]  # so is NaN
    return f"it is wrong by {', '.join(wrong)}" if wrong else None


def on_hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


def plain_attention(q, k, v, window: int | None = None, documents: torch.Tensor | None = None) -> torch.Tensor:
    """The definition, with all scores in memory: what the kernels are held against. documents: int [B, T] numbers."""
    k, v = (z.repeat_interleave(q.size(2) // z.size(2), dim=2) for z in (k, v))
    scores = torch.einsum("bthd,bshd->bhts", q, k) * q.size(-1) ** -0.5
    place = torch.arange(q.size(1), device=q.device)
    seen = visible(place[:, None], place, window)
    if documents is not None:
        seen = seen & (documents[:, None, :, None] == documents[:, None, None, :])
    return torch.einsum("bhts,bshd->bthd", scores.masked_fill(~seen, -float("inf")).softmax(-1), v)


def visible(query: torch.Tensor, key: torch.Tensor, window: int | None) -> torch.Tensor:
    """Whether the query at one position sees the key at another."""
    return key <= query if window is None else (key <= query) & (query - key <= window)


# ---------------------------------------------------------------------------------------------------------------------
# documents


def document_masks(documents: torch.Tensor, windows: Iterable[int | None]) -> dict[int | None, Mask]:
    """{window: mask} that all layers of one forward pass share, so that tokens see only their own document.

    documents int [B, T]: the number of each token's document, as in (ids == bos).cumsum(1).
    """
    masks = {}
    for window in set(windows):
        kernel = chosen.get((documents.device.type, window is not None)) if torch.is_grad_enabled() else None
        masks[window] = _document_mask(documents, window, kernel is flex)
    return masks


def _document_mask(documents: torch.Tensor, window: int | None, blocks: bool) -> Mask:
    """A BlockMask for FlexAttention, or bool [B, 1, T, T] with True where something is seen."""
    B, T = documents.shape
    if not blocks:
        place = torch.arange(T, device=documents.device)
        return visible(place[:, None], place, window) & (documents[:, None, :, None] == documents[:, None, None, :])

    def seen(b, h, query, key):
        return visible(query, key, window) & (documents[b, query] == documents[b, key])

    from torch.nn.attention.flex_attention import create_block_mask

    return create_block_mask(seen, B, None, T, T, device=documents.device)


# ---------------------------------------------------------------------------------------------------------------------
# the kernels


def flash_attention_3(q, k, v, window: int | None, mask: Mask = None) -> torch.Tensor:
    """Of the package flash_attn_interface."""
    from flash_attn_interface import flash_attn_func

    return _flash(flash_attn_func, q, k, v, window, mask)


def flash_attention_2(q, k, v, window: int | None, mask: Mask = None) -> torch.Tensor:
    """Of the package flash_attn."""
    from flash_attn import flash_attn_func

    return _flash(flash_attn_func, q, k, v, window, mask)


def _flash(function: Callable, q, k, v, window: int | None, mask: Mask) -> torch.Tensor:
    if mask is not None:
        raise NotImplementedError("it knows no document boundaries")
    out = function(
        q, k, v, causal=True, window_size=(-1 if window is None else window, 0),
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )  # fmt: skip
    return out[0] if isinstance(out, tuple) else out  # older ones return the log-sum-exp too


def cudnn(q, k, v, window: int | None, mask: Mask = None) -> torch.Tensor:
    from torch.nn.attention import SDPBackend

    return _sdpa(SDPBackend.CUDNN_ATTENTION, q, k, v, window, mask)


def torch_flash(q, k, v, window: int | None, mask: Mask = None) -> torch.Tensor:
    from torch.nn.attention import SDPBackend

    return _sdpa(SDPBackend.FLASH_ATTENTION, q, k, v, window, mask)


def _sdpa(backend, q, k, v, window: int | None, mask: Mask) -> torch.Tensor:
    from torch.nn.attention import sdpa_kernel

    if window is not None or mask is not None:
        raise NotImplementedError("it knows no windows and no document boundaries")
    q, k, v = (z.transpose(1, 2) for z in (q, k, v))
    with sdpa_kernel(backend):
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.size(1) != k.size(1))
    return out.transpose(1, 2)


def flex(q, k, v, window: int | None, mask: Mask = None) -> torch.Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    if mask is None:
        mask = block_mask(q.size(1), window, q.device)
    run = flex_attention if torch.compiler.is_compiling() else _compiled(flex_attention)
    q, k, v = (z.transpose(1, 2) for z in (q, k, v))
    return run(q, k, v, block_mask=mask, enable_gqa=q.size(1) != k.size(1)).transpose(1, 2)


compiled_functions: dict[Callable, Callable] = {}


def _compiled(function: Callable) -> Callable:
    """Outside a compiled block FlexAttention is compiled by itself: as it stands it would hold all scores."""
    if function not in compiled_functions:
        compiled_functions[function] = torch.compile(function, dynamic=False)
    return compiled_functions[function]


def block_mask(length: int, window: int | None, device: torch.device) -> "BlockMask":
    """Which blocks of 128 x 128 scores FlexAttention computes; kept, but for those that a compiled graph builds."""
    from torch.nn.attention.flex_attention import create_block_mask

    if (length, window, device) in block_masks:
        return block_masks[length, window, device]
    mask = create_block_mask(lambda b, h, q, k: visible(q, k, window), None, None, length, length, device=device)
    if not torch.compiler.is_compiling():
        block_masks[length, window, device] = mask
    return mask


CANDIDATES: tuple[tuple[str, Kernel], ...] = (  # in order of preference: on Hopper cuDNN is ahead of FlashAttention 2
    ("FlashAttention 3", flash_attention_3),
    ("cuDNN", cudnn),
    ("FlashAttention 2", flash_attention_2),
    ("torch's FlashAttention 2", torch_flash),
    ("FlexAttention", flex),
)
