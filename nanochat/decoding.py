"""A step of generation as one graph: fixed memory for keys and values, weights cast once, compiled where that pays.

The idea is gpt-fast's: a cache whose shapes never change and whose position is a tensor, so that the whole step is
compiled once, and on a GPU is a CUDA graph. Here layers with a window keep no more than the window, in a ring.
"""

import copy
import logging
from collections.abc import Callable

import torch
import torch.nn.functional as F

from nanochat.gpt import GPT, Block, Linear
from nanochat.hardware import compiler_problem
from nanochat.model.cpu_attention import upcast
from nanochat.runtime import first_line
from nanochat.system import logs
from nanochat.system.environment import import_compiler

logger = logging.getLogger(__name__)

ROOM = 64  # positions by which what a step looks at grows on a CPU; on a GPU it is all of the memory from the start

Step = Callable[[torch.Tensor], torch.Tensor]  # tokens int64 [B, 1] -> logits float32 [B, V] of what comes next


def cast_once(model):
    """A GPT for generation alone, whose matrices are in the dtype that it computes in; other models as they are.

    Training keeps float32 and casts at every use, which for a single token would be most of the work. What is float32
    anyhow is shared with the model, not copied.
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

    One row is a sum that the compiler writes itself, on a CPU: the library's product of matrices took 2 to 3 times as
    long (dev/LOG.md).
    """
    if x.device.type == "cpu" and x.numel() == x.size(-1) and torch.compiler.is_compiling():
        return (upcast(weight) * upcast(x.reshape(-1))).sum(-1).to(x.dtype).view(*x.shape[:-1], -1)
    return F.linear(x, weight)


class DecodingLinear(Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return product(x, self.weight.to(x.dtype))


class DecodingGPT(GPT):
    """What cast_once() makes of a GPT."""

    def logits(self, features: torch.Tensor, product=product) -> torch.Tensor:
        return super().logits(features, product)


class StaticCache:
    """Keys and values in memory of a fixed size, for one new token a row at a time.

    A layer's are [2, B, H_kv, S, D]: S has room for all positions, or is window + 1 in a ring, where a token takes the
    place of the one that no later token sees. Rotary positions are in the keys, so their order does not matter.
    """

    route = "where"  # to experts: by shapes that do not depend on the ids

    def __init__(self, model: GPT, cache, length: int):
        """Takes over what is in an engine.KVCache; up to `length` positions in all."""
        config, filled = model.config, cache.position
        assert filled < length <= model.rotary_length, f"{length} positions behind {filled} of {model.rotary_length}"
        # A power of two has one graph for many lengths, and one that is never seen whole keeps its strides in any part.
        capacity = 1 << (-(-length // ROOM) * ROOM).bit_length()
        batch = cache.store.size(2)
        self.position = torch.full((1,), filled, device=model.device)
        self.last = cache.last.clone(memory_format=torch.contiguous_format)  # whatever the prompt's length was
        self.begun = cache.begun.clone(memory_format=torch.contiguous_format)
        self.filled, self.length = filled, length
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
        self.seen: list[torch.Tensor] = []  # of each layer's store what a step looks at
        self.room = 0  # positions of it
        self.make_room()

    def make_room(self) -> None:
        """Before each step: let it see as far as it has to write, in parts of any size by one graph."""
        assert self.filled < self.length, f"cache of {self.length} positions is full"
        if self.filled < self.room:
            return
        gpu = self.position.device.type == "cuda"
        self.room = self.length if gpu else (self.filled // ROOM + 1) * ROOM
        self.seen = []
        for store, ring in zip(self.store, self.rings, strict=True):
            seen = store if ring or gpu else store[:, :, :, : self.room]
            if not (ring or gpu):
                torch._dynamo.maybe_mark_dynamic(seen, 3)
            self.seen.append(seen)

    def places(self, count: int) -> torch.Tensor:
        return self.position

    def advance(self, ids: torch.Tensor, begins: torch.Tensor | None) -> None:
        self.position += 1
        self.last.copy_(ids)
        if begins is not None:
            self.begun.copy_(begins)

    def attend(self, layer: int, q, k, v, window: int | None, mask: torch.Tensor | None) -> torch.Tensor:
        """q [B, 1, H, D] to all positions so far, of which the newest has k and v [B, 1, H_kv, D] -> [B, 1, H, D]."""
        store = self.seen[layer]
        size = store.size(3)
        store.index_copy_(3, self.position % size, torch.stack([k, v]).transpose(2, 3))
        keys, values = upcast(store[:, :, :, None]).unbind(0)  # [B, H_kv, 1, S, D]
        queries = upcast(q).view(*keys.shape[:2], -1, 1, q.size(3)) * q.size(3) ** -0.5  # [B, H_kv, H / H_kv, 1, D]
        places = torch.arange(size, device=q.device)
        free = places > self.position  # not written yet
        if mask is not None:
            free = free | (self.position - (self.position - places) % size < mask[:, None, None])
        weights = (queries * keys).sum(-1).masked_fill(free, -float("inf")).softmax(dim=-1)
        return (weights[..., None] * values).sum(-2).to(q.dtype).view(q.shape)


def stepper(model, cache, length: int, compiled: bool = False) -> Step:
    """What gives the logits behind each next token of the rows in the cache of a prompt, one token a row at a time.

    length: positions in all. compiled: as one graph over a static cache, for models of ours; where that fails it is
    said, and eager goes on.
    """
    if compiled and isinstance(model, DecodingGPT):
        return CompiledStep(model, StaticCache(model, cache, length))
    if compiled:
        message = f"generating without torch.compile ({type(model).__name__} has a cache of its own)"
        logger.info(message, extra=logs.TO_STDERR)
    return lambda tokens: last_logits(model, tokens, cache)


def last_logits(model, ids: torch.Tensor, cache) -> torch.Tensor:
    """ids int64 [B, T] behind what is in the cache -> logits [B, V] of what comes next, and no others."""
    return model.logits(model.features(ids, cache)[:, -1])


class CompiledStep:
    """A step over a static cache: compiled, and on a GPU recorded as a CUDA graph once it is."""

    compiled = None  # last_logits after torch.compile, which knows the graphs of all models and batches so far

    def __init__(self, model: DecodingGPT, cache: StaticCache):
        self.model, self.cache = model, cache
        self.run = last_logits
        problem = compiler_problem() if model.device.type == "cpu" else None
        if problem is None:
            import_compiler()
            if CompiledStep.compiled is None:
                torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
                CompiledStep.compiled = torch.compile(last_logits, dynamic=False, fullgraph=True)
            self.run = CompiledStep.compiled
        else:
            self._without(problem)
        self.tried = False  # to record
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        self.cache.make_room()
        if self.graph is not None:
            self.tokens.copy_(tokens)
            self.graph.replay()
            logits = self.logits
        else:
            logits = self._run(tokens)
            if self.model.device.type == "cuda" and not self.tried:
                self.tried = True
                self._record(tokens)
        self.cache.filled += 1
        return logits

    def _run(self, tokens: torch.Tensor) -> torch.Tensor:
        try:
            return self.run(self.model, tokens, self.cache)
        except torch._dynamo.exc.TorchDynamoException as error:  # while compiling, before anything was changed
            self._without(f"{type(error).__name__}: {first_line(error)}")
            return self.run(self.model, tokens, self.cache)

    def _without(self, problem: str) -> None:
        self.run = last_logits
        logger.info(f"generating without torch.compile ({problem})", extra=logs.TO_STDERR)

    def _record(self, tokens: torch.Tensor) -> None:
        """Record the step for the tokens to come. Recording runs nothing: the cache stays as it is."""
        self.tokens, graph = tokens.clone(), torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        outer = torch.cuda.stream(torch.cuda.current_stream())  # come back to also where recording fails
        try:
            with outer, torch.cuda.graph(graph):
                self.logits = self.run(self.model, self.tokens, self.cache)
        except RuntimeError as error:
            logger.info(f"generating without a CUDA graph ({first_line(error)})")
        else:
            self.graph = graph
