"""Muon for the matrices, AdamW for embeddings, heads and scalars, in one optimizer for 1 to N ranks.

Sharded like ZeRO-1 (arXiv 1910.02054): gradients are summed over the ranks by reduce-scatter, every rank updates the
shard it owns and keeps optimizer state only for it, all-gather brings the parameters back. The sums begin while the
backward pass still runs, as in DDP (arXiv 2006.15704). Saved state has whole tensors under parameter names, so it
loads at any number of ranks.
"""

import logging
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.optim.adamw import adamw

from nanochat.model.parameters import group_of, modality_of
from nanochat.runtime import first_line

logger = logging.getLogger(__name__)

# Newer releases of torch rename these collectives; the arguments are the same.
REDUCE_SCATTER = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
ALL_GATHER = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

# Per-step coefficients of the Polar Express, the minimax-optimal odd quintics for the polar factor
# (arXiv 2505.16932, for singular values from 1e-3, with the 2% safety margin of modded-nanogpt).
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
NEWTON_SCHULZ = ((3.4445, -4.775, 2.0315),) * 5  # Keller Jordan's Muon, also torch.optim.Muon's default


def orthogonalize(g: torch.Tensor, method: str = "polar_express", dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Push the singular values of matrices g [..., m, n] to about 1, keeping the singular vectors; returns `dtype`."""
    coefficients, margin, eps = {
        "polar_express": (POLAR_EXPRESS, 1.02, 1e-6),
        "newton_schulz": (NEWTON_SCHULZ, 1.0, 1e-7),
    }[method]
    x = g.to(dtype)
    tall = x.size(-2) > x.size(-1)
    if tall:  # the Gram matrix of the short side is the cheaper one
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) * margin).clamp(min=eps)
    shape = x.shape
    x = x.reshape(-1, *shape[-2:])
    for a, b, c in coefficients:  # x <- a x + b (x x^T) x + c (x x^T)^2 x
        gram = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    x = x.view(shape)
    return x.mT if tall else x


class MuonAdamW(torch.optim.Optimizer):
    """One optimizer over param_groups with `kind` "adamw" or "muon".

    Each group is a dict: kind, name, params, param_names, lr, weight_decay; AdamW's has betas and eps, Muon's has
    momentum, nesterov, normalize (per-neuron variance, NorMuon, arXiv 2510.05491), cautious (decay only where update
    and weight agree in sign, arXiv 2510.12402), method and dtype of the orthogonalisation. A group of one modality,
    of which a global batch may hold nothing, has its name in `modality`: without a gradient it stays as it is, since
    Muon would make a step of full size from what its momentum remembers.
    Use: `norm = optimizer.reduce_gradients()`, then `optimizer.step(scale)`, or drop_gradients() to skip a bad step.
    With ranks, send_when_ready() before the last backward() of a step lets communication overlap with it.
    """

    def __init__(self, groups: list[dict], rank: int = 0, world_size: int = 1):
        super().__init__(groups, {})
        self.muon_update: Callable[..., None] = muon_update  # compile() replaces it
        self.rank, self.world_size = rank, world_size
        self.units = [unit for group in self.param_groups for unit in _units(group, rank, world_size)]
        self.pieces = [(unit, number) for unit in self.units for number in range(unit.pieces)]
        self.order: list[int] | None = None  # in which pieces are sent; None: not known yet when each will be ready
        self.finished: list[int] = []  # pieces in the order in which this backward pass completed them
        self.sent = 0  # how many pieces, of this order
        self.hooks: list = []

    def muon_flops(self) -> int:
        """FLOPs of orthogonalising all matrices once, over all ranks: two products with the Gram matrix of the short
        side, and its square, in each iteration."""
        total = 0
        for group in self.param_groups:
            for matrix in group["params"] if group["kind"] == "muon" else ():
                short, long = sorted(matrix.shape)
                total += len(POLAR_EXPRESS) * (4 * short * short * long + 2 * short**3)
        return total

    def compile(self) -> None:
        """Make Muon's update one compiled graph a shape, each at its first use; changes results by rounding only."""
        config = torch._dynamo.config
        config.recompile_limit = max(64, config.recompile_limit)  # modalities may bring more shapes than the default
        self.muon_update = torch.compile(muon_update, dynamic=False)

    def uncompile(self) -> None:
        self.muon_update = muon_update

    # -- gradients of all ranks ---------------------------------------------------------------------------------------

    def send_when_ready(self) -> None:
        """To be called before the last backward() of a step: each piece is summed over the ranks once it is complete.

        The sums have to begin in the same order on all ranks, whatever their graphs look like: the order in which rank
        0 completed the pieces in its first such pass, in which nothing is sent early. A piece waits for those before
        it; send_gradients() sends what is left.
        """
        if self.world_size == 1:
            return
        missing = [len(unit.members(number)) for unit, number in self.pieces]
        self.finished = []

        def arrived(piece: int) -> None:
            missing[piece] -= 1
            if missing[piece] == 0:
                self.finished.append(piece)
            while self.order and self.sent < len(self.order) and not missing[self.order[self.sent]]:
                self._send_next(self.order)

        for piece, (unit, number) in enumerate(self.pieces):
            for parameter in unit.members(number):
                hook = parameter.register_post_accumulate_grad_hook(lambda _, piece=piece: arrived(piece))
                self.hooks.append(hook)

    @torch.no_grad()
    def send_gradients(self, lost: bool) -> None:
        """Begin all sums that have not begun; lost: this rank has no gradients, it sends zeros in their place.

        A rank whose backward pass failed has to send as much as the others before it does anything else with them.
        """
        if self.world_size > 1:
            self._send_rest(lost)

    def _send_rest(self, lost: bool = False) -> None:
        for hook in self.hooks:
            hook.remove()
        self.hooks = []
        if lost:
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.grad = None
        while self.sent < len(self.pieces):
            self._send_next(self.order or range(len(self.pieces)))

    def _send_next(self, order) -> None:
        unit, number = self.pieces[order[self.sent]]
        unit.send(number)
        self.sent += 1

    def _agree_on_order(self) -> None:
        """From now on pieces are sent as rank 0 completed them; those without a gradient come last."""
        rest = sorted(set(range(len(self.pieces))).difference(self.finished))
        order = torch.tensor(self.finished + rest, device=self.units[0].params[0].device)
        dist.broadcast(order, src=0)
        self.order = order.tolist()

    @torch.no_grad()
    def reduce_gradients(self) -> tuple[float, dict[str, float]]:
        """Sum the gradients over all ranks; returns the norm of the whole gradient and that of each group.

        Afterwards each rank holds the summed gradient of its own shard; p.grad is spent.
        """
        self._send_rest()
        device = self.units[0].params[0].device
        squares = torch.zeros(len(self.param_groups), dtype=torch.float32, device=device)
        index = {id(group): i for i, group in enumerate(self.param_groups)}
        for unit in self.units:
            unit.receive()
            squares[index[id(unit.group)]] += torch.linalg.vector_norm(unit.grad, dtype=torch.float32).square()
        self.sent = 0
        if self.world_size > 1:
            dist.all_reduce(squares)
            if self.order is None and self.finished:
                self._agree_on_order()
        norms = squares.sqrt().tolist()
        for unit in self.units:
            unit.idle = unit.group.get("modality") is not None and norms[index[id(unit.group)]] == 0
        return squares.sum().sqrt().item(), {g["name"]: n for g, n in zip(self.param_groups, norms, strict=True)}

    def drop_gradients(self) -> None:
        """Instead of step(): forget the reduced gradients, which would hold memory through the next backward pass.

        Also instead of reduce_gradients(), after send_gradients().
        """
        for unit in self.units:
            unit.receive()
            unit.grad = None
        self.sent = 0

    @torch.no_grad()
    def step(self, scale: float = 1.0) -> None:
        """Update all parameters from the reduced gradients times `scale` (the clipping factor)."""
        updated = []
        for unit in self.units:
            assert unit.grad is not None, "call reduce_gradients() before step()"
            gradient, unit.grad = unit.grad, None
            if unit.idle:
                continue
            shard = unit.shard()
            update = _adamw_step if unit.group["kind"] == "adamw" else self._muon_step
            update(shard, gradient, scale, unit.state, unit.group)
            updated.append((unit, *unit.begin_gather(shard)))  # while the next one is computed
        for unit, whole, work in updated:
            unit.end_gather(whole, work)

    def _muon_step(self, p: torch.Tensor, g: torch.Tensor, scale: float, state: dict, group: dict) -> None:
        """Muon (Keller Jordan, 2024), in place on the stacked shard p [k, m, n]; matrices that pad it stay zero."""
        if not state:
            state["momentum"] = torch.zeros_like(p)
        if group["normalize"] and "neuron_sq" not in state:  # the longer side counts the neurons
            k, m, n = p.shape
            state["neuron_sq"] = p.new_zeros((k, m, 1) if m >= n else (k, 1, n))
        # A tall matrix has more outputs than inputs: the same spectral change per input needs a larger step.
        rate = group["lr"] * max(1.0, p.size(-2) / p.size(-1)) ** 0.5
        # What changes from step to step is a tensor: as a number it would be compiled in. Filled on the device: a copy
        # would wait.
        changing = (scale, group["momentum"], rate, group["lr"] * group["weight_decay"])
        rates = [torch.full((), value, device=p.device) for value in changing]
        neuron_sq = state["neuron_sq"] if group["normalize"] else None
        fixed = group["nesterov"], group["cautious"], group["method"], group["dtype"]
        try:
            self.muon_update(p, g, state["momentum"], neuron_sq, rates, *fixed)
        except torch._dynamo.exc.TorchDynamoException as error:  # while compiling, before anything was changed
            logger.info(f"Muon runs without torch.compile ({type(error).__name__}: {first_line(error)})")
            self.uncompile()
            self.muon_update(p, g, state["momentum"], neuron_sq, rates, *fixed)

    # -- state under parameter names ----------------------------------------------------------------------------------

    def state_items(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Whole tensors under '<parameter>.<quantity>', one unit at a time; collectives: every rank has to take all.

        They may share memory with the optimizer: copy what has to last beyond the next step.
        """
        for unit in self.units:
            for quantity, value in unit.state.items():
                if quantity == "step":
                    yield from ((f"{name}.step", torch.tensor(value)) for name in unit.names)
                else:
                    parts = unit.split(unit.in_order(*unit.begin_gather(value)))
                    yield from ((f"{name}.{quantity}", part) for name, part in zip(unit.names, parts, strict=True))

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Copies of all state_items()."""
        return {name: tensor.clone() for name, tensor in self.state_items()}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Take this rank's shards from whole tensors; raises KeyError with the name of a missing one."""
        known = {name.rpartition(".")[0] for name in state}
        for unit in self.units:
            prefix = unit.names[0] + "."
            quantities = sorted(key[len(prefix) :] for key in state if key.startswith(prefix))
            new = unit.group.get("modality") is not None and known.isdisjoint(unit.group["param_names"])
            if not quantities and not new:  # a modality's group may not have had its first step yet
                raise KeyError(f"optimizer state of {unit.names[0]}")
            unit.state = {}
            for quantity in quantities:
                parts = [state[f"{name}.{quantity}"] for name in unit.names]
                if quantity == "step":
                    unit.state["step"] = int(parts[0])
                else:
                    unit.state[quantity] = unit.own([p.to(unit.params[0].device) for p in parts]).clone()


class _Unit:
    """What is updated together: one flattened AdamW parameter, or a stack of Muon matrices of the same shape.

    It is padded to a multiple of the ranks. Each owns an equal slice of the flat one; of a stack rank r owns the
    matrices r, r + N, ..., so that a piece, N neighbours that the backward pass completes together, can be sent early.
    """

    def __init__(self, group: dict, params: list[nn.Parameter], names: list[str], rank: int, world_size: int):
        self.group, self.params, self.names = group, params, names
        self.rank, self.world_size = rank, world_size
        self.stacked = group["kind"] == "muon"
        self.length = len(params) if self.stacked else params[0].numel()
        self.own_length = -(-self.length // world_size)
        self.pieces = self.own_length if self.stacked and world_size > 1 else 1  # a reduce-scatter each
        self.state: dict = {}
        self.grad: torch.Tensor | None = None
        self.works: list = []  # reduce-scatters on their way, with the memory that they read
        self.idle = False  # the whole group of a modality is without a gradient in this step, on all ranks

    def members(self, piece: int) -> list[nn.Parameter]:
        """The parameters whose gradients a piece holds."""
        whole = self.pieces == 1
        return self.params if whole else self.params[piece * self.world_size : (piece + 1) * self.world_size]

    def join(self, tensors: list[torch.Tensor], multiple: int) -> torch.Tensor:
        """Tensors of parameters -> one tensor, padded along its first dimension to a multiple."""
        whole = torch.stack(tensors) if self.stacked else tensors[0].reshape(-1)
        padding = -len(whole) % multiple
        return torch.cat([whole, whole.new_zeros(padding, *whole.shape[1:])]) if padding else whole

    def split(self, whole: torch.Tensor) -> list[torch.Tensor]:
        """The inverse of join; a quantity of another shape per matrix (a neuron's variance) keeps it."""
        if self.stacked:
            return list(whole[: self.length].unbind(0))
        return [whole[: self.length].view(self.params[0].shape)]

    def own(self, tensors: list[torch.Tensor]) -> torch.Tensor:
        """This rank's shard of what lies in such tensors; alone and flat it is the tensor's own memory."""
        if self.stacked:
            some = tensors[self.rank :: self.world_size]
            return torch.stack(some + [torch.zeros_like(tensors[0])] * (self.own_length - len(some)))
        whole = self.join(tensors, self.world_size)
        return whole[self.rank * self.own_length : (self.rank + 1) * self.own_length]

    def send(self, piece: int) -> None:
        """Begin to sum a piece of the gradient over the ranks; p.grad is given up."""
        members = self.members(piece)
        whole = self.join([p.grad if p.grad is not None else torch.zeros_like(p) for p in members], self.world_size)
        for parameter in members:
            parameter.grad = None
        if self.world_size == 1:
            self.grad = whole
            return
        if self.grad is None:
            self.grad = whole.new_empty(self.own_length, *whole.shape[1:])
        out = self.grad[piece : piece + 1] if self.stacked else self.grad
        self.works.append((REDUCE_SCATTER(out, whole.contiguous(), async_op=True), whole))

    def receive(self) -> None:
        """Wait for what was sent: `grad` is this rank's slice of the sum."""
        for work, _ in self.works:
            work.wait()
        self.works = []

    def begin_gather(self, shard: torch.Tensor) -> tuple[torch.Tensor, object]:
        """Collect the shards of all ranks; returns (memory for them, what to wait for)."""
        if self.world_size == 1:
            return shard, None
        whole = shard.new_empty(self.own_length * self.world_size, *shard.shape[1:])
        return whole, ALL_GATHER(whole, shard.contiguous(), async_op=True)

    def in_order(self, whole: torch.Tensor, work) -> torch.Tensor:
        """What begin_gather() collected, as join() would give it."""
        if work is not None:
            work.wait()
        if not self.stacked:
            return whole
        return whole.unflatten(0, (self.world_size, self.own_length)).transpose(0, 1).flatten(0, 1)

    def shard(self) -> torch.Tensor:
        """This rank's slice of the parameters, to be updated in place."""
        return self.own([p.detach() for p in self.params])

    def end_gather(self, whole: torch.Tensor, work) -> None:
        """Bring the updated slices of all ranks back into the parameters."""
        if self.world_size > 1 or self.stacked:  # else it was updated in place
            torch._foreach_copy_([p.detach() for p in self.params], self.split(self.in_order(whole, work)))


def _units(group: dict, rank: int, world_size: int) -> list[_Unit]:
    pairs = list(zip(group["params"], group["param_names"], strict=True))
    if group["kind"] == "adamw":
        return [_Unit(group, [p], [name], rank, world_size) for p, name in pairs]
    shapes = dict.fromkeys(tuple(p.shape) for p, _ in pairs)  # in order of first appearance, the same on every rank
    stacks = [[(p, name) for p, name in pairs if tuple(p.shape) == shape] for shape in shapes]
    return [_Unit(group, [p for p, _ in s], [name for _, name in s], rank, world_size) for s in stacks]


def _adamw_step(p: torch.Tensor, g: torch.Tensor, scale: float, state: dict, group: dict) -> None:
    """AdamW with decoupled decay (arXiv 1711.05101), in place on the flat shard p [n], in one pass over memory."""
    g = g if scale == 1.0 else g * scale
    if not state:
        state.update(step=0, exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
    beta1, beta2 = group["betas"]
    adamw(
        [p],
        [g],
        [state["exp_avg"]],
        [state["exp_avg_sq"]],
        [],
        [torch.full((), float(state["step"]), device=p.device)],
        fused=True,
        amsgrad=False,
        maximize=False,
        beta1=beta1,
        beta2=beta2,
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
    )
    state["step"] += 1


NEURON_BETA = 0.95  # decay of the running per-neuron variance


def muon_update(
    p: torch.Tensor,
    g: torch.Tensor,
    mean: torch.Tensor,
    neuron_sq: torch.Tensor | None,
    rates: list[torch.Tensor],
    nesterov: bool,
    cautious: bool,
    method: str,
    dtype: torch.dtype,
) -> None:
    """In place on p, mean (of the gradients) [k, m, n] and neuron_sq; rates: scale of g, momentum, step, decay."""
    scale, momentum, rate, decay = rates
    g = g * scale
    mean.lerp_(g, 1 - momentum)
    update = orthogonalize(g.lerp(mean, momentum) if nesterov else mean, method, dtype).to(p.dtype)
    if neuron_sq is not None:
        update = _normalize_neurons(update, neuron_sq)
    decayed = torch.where(update * p >= 0, p, 0.0) if cautious else p
    p.sub_(rate * update + decay * decayed)


def _normalize_neurons(update: torch.Tensor, neuron_sq: torch.Tensor) -> torch.Tensor:
    """Divide each neuron's update by its running rms, then restore the norm of every matrix (arXiv 2510.05491).

    neuron_sq: the running mean squares, in place, [k, m, 1] or [k, 1, n].
    """
    mean_square = update.square().mean(dim=-1 if neuron_sq.size(-1) == 1 else -2, keepdim=True)
    neuron_sq.lerp_(mean_square, 1 - NEURON_BETA)
    scaled = update * neuron_sq.clamp(min=1e-10).rsqrt()
    before = update.norm(dim=(-2, -1), keepdim=True)
    return scaled * (before / scaled.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-10))


def build_optimizer(model: nn.Module, settings, dtype: torch.dtype, rank: int = 0, world_size: int = 1) -> MuonAdamW:
    """Sort every parameter into exactly one group and give each its rate.

    dtype: of Muon's orthogonalisation unless settings.muon_dtype says otherwise.
    AdamW's rates are for width 768 and scale with (width / 768)^-0.5, as in nanochat.
    """
    kinds = {
        "wte": "tied" if model.config.tie_weights else "embedding",
        "lm_head": "unembedding",
        "value_embeds": "value_embedding",
        "bigram_embed": "bigram",
        "scalars": "scalar",
    }
    order = ("embedding", "tied", "unembedding", "value_embedding", "bigram", "matrix", "scalar")
    modalities = (None, *model.vocabulary.names)
    groups: dict[tuple[str, str | None], list[str]] = {(kind, m): [] for kind in order for m in modalities}
    named = dict(model.named_parameters())
    for name, parameter in named.items():
        kind = kinds.get(group_of(name), "matrix") if parameter.ndim > 1 else "scalar"
        groups[kind, modality_of(name, model.config)].append(name)
    assert sorted(name for names in groups.values() for name in names) == sorted(named), (
        "every parameter belongs to exactly one group"
    )
    scale = (model.config.n_embd / 768) ** -0.5
    split = settings.tie_weights and not model.config.tie_weights  # by untie_at: both tables go on at their old rate
    rates = {
        "embedding": (settings.tied_weights_lr if split else settings.embedding_lr) * scale,
        "tied": settings.tied_weights_lr * scale,
        "unembedding": (settings.tied_weights_lr if split else settings.unembedding_lr) * scale,
        "value_embedding": settings.value_embedding_lr * scale,
        "bigram": settings.bigram_lr * scale,
        "matrix": settings.matrix_lr,
        "scalar": settings.scalar_lr,
    }
    adamw = dict(kind="adamw", betas=settings.adam_betas, eps=1e-10, weight_decay=0.0)
    muon = dict(
        kind="muon",
        momentum=0.95,
        nesterov=settings.muon_nesterov,
        normalize=settings.muon_normalize,
        cautious=settings.cautious_weight_decay,
        method=settings.muon_method,
        dtype=getattr(torch, settings.muon_dtype) if settings.muon_dtype else dtype,
        weight_decay=settings.weight_decay,
    )
    param_groups = [
        dict(
            name=f"{kind}_{modality}" if modality else kind,
            modality=modality,
            params=[named[n] for n in names],
            param_names=names,
            lr=rates[kind],
            initial_lr=rates[kind],
            **(muon if kind == "matrix" else adamw),
        )
        for (kind, modality), names in groups.items()
        if names
    ]
    return MuonAdamW(param_groups, rank, world_size)


def weight_norms(model: nn.Module, optimizer: MuonAdamW) -> dict[str, float]:
    """Weight norm of each group and the mean size of the output projection's entries, for diagnosis."""
    norms = {
        f"norm/weight_{group['name']}": torch.stack([p.detach().norm() for p in group["params"]]).norm().item()
        for group in optimizer.param_groups
    }
    if model.config.use_output_projection:
        norms["norm/output_projection_mean_abs"] = model.output_projection.weight.detach().abs().mean().item()
    return norms
