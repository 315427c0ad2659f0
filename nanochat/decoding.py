"""Compiled single-token decoding with a static KV cache; a CUDA graph on GPUs.

The idea is gpt-fast's: a cache whose shapes never change and whose position is a tensor, so that the whole step is
compiled once. Here layers with a window keep no more than the window, in a ring buffer.
"""

import copy
import functools
import logging
from collections.abc import Callable

import torch
import torch.nn.functional as F

from nanochat.gpt import GPT, Block, Linear
from nanochat.hardware import compiler_problem
from nanochat.model.cpu_attention import upcast
from nanochat.model.kv_cache import KVCache
from nanochat.runtime import first_line
from nanochat.system import logs
from nanochat.system.environment import import_compiler

logger = logging.getLogger(__name__)

VIEW_BLOCK = 64  # positions by which the view of the cache grows on a CPU; a GPU sees all of it from the start

Step = Callable[[torch.Tensor], torch.Tensor]  # tokens int64 [B, 1] -> logits float32 [B, V] of the next ids


def cast_for_inference(model):
    """A copy of a GPT whose matrices have the dtype that it computes in; other models are returned as they are.

    Training keeps float32 and casts at every use, which for a single token would be most of the work. Tensors whose
    dtype does not change are shared with the model, not copied.
    """
    if not isinstance(model, GPT) or isinstance(model, DecodingGPT):
        return model
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    other = copy.deepcopy(model, shared)
    other.__class__, other.block_forward = DecodingGPT, Block.forward

    for module in other.modules():
        if isinstance(module, Linear):
            module.__class__ = DecodingLinear
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.ndim > 1 and parameter.dtype != model.compute_dtype:
                setattr(module, name, torch.nn.Parameter(parameter.detach().to(model.compute_dtype), False))
    return other


def product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x [..., K] times the transpose of weight [N, K].

    On a CPU one row is a sum for which the compiler generates code: the library's matrix product took 2 to 3 times as
    long (dev/LOG.md).
    """
    if x.device.type == "cpu" and x.numel() == x.size(-1) and torch.compiler.is_compiling():
        return (upcast(weight) * upcast(x.reshape(-1))).sum(-1).to(x.dtype).view(*x.shape[:-1], -1)
    return F.linear(x, weight)


class DecodingLinear(Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return product(x, self.weight.to(x.dtype))


class DecodingGPT(GPT):
    """What cast_for_inference() makes of a GPT."""

    def logits(self, features: torch.Tensor, product=product) -> torch.Tensor:
        return super().logits(features, product)


class StaticCache:
    """Keys and values in memory of a fixed size, for one new token per row and step.

    A layer's are [2, B, H_kv, S, D]. S has room for all positions; in a layer with a window S is window + 1, a ring in
    which a token overwrites the one that no later token sees. Keys are rotated already, so their order does not matter.
    """

    route = "where"  # to experts: by shapes that do not depend on the ids

    def __init__(self, model: GPT, cache: KVCache, length: int):
        """Takes over what is in the cache; up to `length` positions in all."""
        config, filled = model.config, cache.position
        assert filled < length <= model.rotary_length, f"{length} positions behind {filled} of {model.rotary_length}"
        self.position = torch.full((1,), filled, device=model.device)
        # Contiguous whatever the prompt's length was: strides are compiled in.
        self.last = cache.last.clone(memory_format=torch.contiguous_format)
        self.document_begin = cache.document_begin.clone(memory_format=torch.contiguous_format)
        self.filled, self.length = filled, length

        # A power of two shares its graph among many lengths; never seen whole, it keeps its strides in any view.
        capacity = 1 << (-(-length // VIEW_BLOCK) * VIEW_BLOCK).bit_length()
        batch = cache.store.size(2)
        self.store, self.rings = [], []
        for layer in range(config.n_layer):
            window = config.window(layer)
            self.rings.append(window is not None and window + 1 < length)
            size = window + 1 if self.rings[-1] else capacity
            shape = (2, batch, config.n_kv_head, size, config.head_dim)
            store = torch.zeros(shape, dtype=model.compute_dtype, device=model.device)
            kept = torch.arange(max(0, filled - size), filled, device=model.device)
            store[:, :, :, kept % size] = cache.store[layer][:, :, kept].transpose(2, 3)
            self.store.append(store)

        self.views: list[torch.Tensor] = []  # of each layer's store, what a step sees
        self.view_end = 0  # positions in the views
        self.extend_view()

    def extend_view(self) -> None:
        """Before each step: let it see as far as it has to write. On a CPU one graph takes views of any size."""
        assert self.filled < self.length, f"cache of {self.length} positions is full"
        if self.filled < self.view_end:
            return
        gpu = self.position.device.type == "cuda"
        self.view_end = self.length if gpu else (self.filled // VIEW_BLOCK + 1) * VIEW_BLOCK
        self.views = []
        for store, ring in zip(self.store, self.rings, strict=True):
            view = store if ring or gpu else store[:, :, :, : self.view_end]
            if not (ring or gpu):
                torch._dynamo.maybe_mark_dynamic(view, 3)
            self.views.append(view)

    def positions(self, count: int) -> torch.Tensor:
        return self.position

    def advance(self, ids: torch.Tensor, begins: torch.Tensor | None) -> None:
        self.position += 1
        self.last.copy_(ids)
        if begins is not None:
            self.document_begin.copy_(begins)

    def attend(self, layer: int, q, k, v, window: int | None, mask: torch.Tensor | None) -> torch.Tensor:
        """q [B, 1, H, D] to all positions so far, of which the newest has k and v [B, 1, H_kv, D] -> [B, 1, H, D]."""
        store = self.views[layer]
        size = store.size(3)
        store.index_copy_(3, self.position % size, torch.stack([k, v]).transpose(2, 3))

        keys, values = upcast(store[:, :, :, None]).unbind(0)  # [B, H_kv, 1, S, D]
        queries = upcast(q).view(*keys.shape[:2], -1, 1, q.size(3)) * q.size(3) ** -0.5  # [B, H_kv, H / H_kv, 1, D]
        places = torch.arange(size, device=q.device)
        hidden = places > self.position  # not written yet
        if mask is not None:
            hidden = hidden | (self.position - (self.position - places) % size < mask[:, None, None])
        weights = (queries * keys).sum(-1).masked_fill(hidden, -float("inf")).softmax(dim=-1)
        return (weights[..., None] * values).sum(-2).to(q.dtype).view(q.shape)


def make_decode_step(model, cache, length: int, compiled: bool = False) -> Step:
    """A function that takes the next token of each row in the cache of a prompt and returns the logits behind it.

    length: positions in all. compiled: as one graph over a static cache, for models of ours; falls back to eager,
    logging why, if compilation fails.
    """
    if compiled and isinstance(model, DecodingGPT):
        return CompiledStep(model, StaticCache(model, cache, length))
    if compiled:
        message = f"generating without torch.compile ({type(model).__name__} has a cache of its own)"
        logger.info(message, extra=logs.TO_STDERR)
    return lambda tokens: last_logits(model, tokens, cache)


def last_logits(model, ids: torch.Tensor, cache) -> torch.Tensor:
    """ids int64 [B, T] behind what is in the cache -> logits [B, V] of the next ids alone."""
    return model.logits(model.features(ids, cache)[:, -1])


@functools.cache
def compiled_last_logits() -> Callable[..., torch.Tensor]:
    """last_logits() compiled: one function for the process, which knows the graphs of all models and batches so far."""
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    return torch.compile(last_logits, dynamic=False, fullgraph=True)


class CompiledStep:
    """A Step over a static cache: compiled, and on a GPU captured as a CUDA graph after the first step."""

    def __init__(self, model: DecodingGPT, cache: StaticCache):
        self.model, self.cache = model, cache
        self.capture_due = model.device.type == "cuda"
        self.graph: torch.cuda.CUDAGraph | None = None
        problem = compiler_problem() if model.device.type == "cpu" else None
        if problem is None:
            import_compiler()
            self.run = compiled_last_logits()
        else:
            self._fall_back_to_eager(problem)

    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        self.cache.extend_view()
        if self.graph is not None:
            self.tokens.copy_(tokens)
            self.graph.replay()
            logits = self.logits
        else:
            logits = self._run(tokens)
            if self.capture_due:
                self.capture_due = False
                self._capture_cuda_graph(tokens)
        self.cache.filled += 1
        return logits

    def _run(self, tokens: torch.Tensor) -> torch.Tensor:
        try:
            return self.run(self.model, tokens, self.cache)
        except torch._dynamo.exc.TorchDynamoException as error:  # while compiling, before anything was changed
            self._fall_back_to_eager(f"{type(error).__name__}: {first_line(error)}")
            return self.run(self.model, tokens, self.cache)

    def _fall_back_to_eager(self, problem: str) -> None:
        self.run = last_logits
        logger.info(f"generating without torch.compile ({problem})", extra=logs.TO_STDERR)

    def _capture_cuda_graph(self, tokens: torch.Tensor) -> None:
        """For the tokens to come. Capturing runs nothing: the cache stays as it is."""
        self.tokens, graph = tokens.clone(), torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        outer = torch.cuda.stream(torch.cuda.current_stream())  # restores the stream also where capturing fails
        try:
            with outer, torch.cuda.graph(graph):
                self.logits = self.run(self.model, self.tokens, self.cache)
        except RuntimeError as error:
            logger.info(f"generating without a CUDA graph ({first_line(error)})", extra=logs.TO_STDERR)
        else:
            self.graph = graph
