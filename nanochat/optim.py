"""Muon for the matrices, AdamW for embeddings, heads and scalars, in one optimizer for 1 to N ranks.

Sharded like ZeRO-1 (arXiv 1910.02054): gradients are summed over the ranks by reduce-scatter, every rank updates the
shard it owns and keeps optimizer state only for it, all-gather brings the parameters back. Reduce-scatters start while
the backward pass still runs, as in DDP (arXiv 2006.15704). Saved state has whole tensors under parameter names, so it
loads at any number of ranks.
"""

import logging
from collections.abc import Callable, Iterator, Sequence

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
    which a global batch may lack, has its name in `modality`: without a gradient it gets no update, since Muon would
    make a step of full size from its momentum.
    Use: `norm, norms = optimizer.reduce_gradients()`, then `optimizer.step(scale)`, or drop_gradients() to skip a bad
    step. With several ranks, overlap_gradient_reduction() before the last backward() of a step lets communication
    overlap with it.
    """

    def __init__(self, groups: list[dict], rank: int = 0, world_size: int = 1):
        super().__init__(groups, {})
        self.muon_update: Callable[..., None] = muon_update  # compile() replaces it
        self.rank, self.world_size = rank, world_size
        self.buckets = [bucket for group in self.param_groups for bucket in _buckets(group, rank, world_size)]
        self.chunks = [(bucket, number) for bucket in self.buckets for number in range(bucket.chunks)]
        self.order: list[int] | None = None  # in which chunks are reduced; None: not known yet when each is ready
        self.completed: list[int] = []  # chunks in the order in which this backward pass completed them
        self.launched = 0  # number of chunks, in that order, whose reduce-scatter was launched
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
        """Compile Muon's update: one graph for each shape, at its first use. Changes results by rounding only."""
        config = torch._dynamo.config
        config.recompile_limit = max(64, config.recompile_limit)  # modalities may bring more shapes than the default
        self.muon_update = torch.compile(muon_update, dynamic=False)

    def uncompile(self) -> None:
        self.muon_update = muon_update

    # -- gradients of all ranks ---------------------------------------------------------------------------------------

    def overlap_gradient_reduction(self) -> None:
        """To be called before the last backward() of a step: reduce-scatter each chunk as soon as it is complete.

        The collectives have to start in one order on all ranks, whatever their graphs look like: the order in which
        rank 0 completed the chunks in its first such pass, in which nothing starts early. A chunk waits for those
        before it; launch_reduce_scatter() starts the rest.
        """
        if self.world_size == 1:
            return
        missing = [len(bucket.members(number)) for bucket, number in self.chunks]
        self.completed = []

        def on_gradient(chunk: int) -> None:
            missing[chunk] -= 1
            if missing[chunk] == 0:
                self.completed.append(chunk)
            while self.order and self.launched < len(self.order) and not missing[self.order[self.launched]]:
                self._launch_next(self.order)

        for chunk, (bucket, number) in enumerate(self.chunks):
            for parameter in bucket.members(number):
                hook = parameter.register_post_accumulate_grad_hook(lambda _, chunk=chunk: on_gradient(chunk))
                self.hooks.append(hook)

    @torch.no_grad()
    def launch_reduce_scatter(self, failed: bool = False) -> None:
        """Start the reduce-scatter of all chunks that have not started.

        failed: this rank's backward pass failed. It contributes zeros, since all ranks have to take part in the same
        collectives before they do anything else with each other.
        """
        if self.world_size > 1:
            self._launch_rest(failed)

    def _launch_rest(self, failed: bool = False) -> None:
        for hook in self.hooks:
            hook.remove()
        self.hooks = []
        if failed:
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.grad = None
        while self.launched < len(self.chunks):
            self._launch_next(self.order or range(len(self.chunks)))

    def _launch_next(self, order: Sequence[int]) -> None:
        bucket, number = self.chunks[order[self.launched]]
        bucket.reduce_scatter(number)
        self.launched += 1

    def _agree_on_order(self) -> None:
        """From now on chunks are reduced in the order in which rank 0 completed them, those without gradient last."""
        rest = sorted(set(range(len(self.chunks))).difference(self.completed))
        order = torch.tensor(self.completed + rest, device=self.buckets[0].params[0].device)
        dist.broadcast(order, src=0)
        self.order = order.tolist()

    @torch.no_grad()
    def reduce_gradients(self) -> tuple[float, dict[str, float]]:
        """Sum the gradients over all ranks; returns the norm of the whole gradient and that of each group.

        Afterwards each rank holds the summed gradient of its own shard; p.grad is None.
        """
        self._launch_rest()
        device = self.buckets[0].params[0].device
        squares = torch.zeros(len(self.param_groups), dtype=torch.float32, device=device)
        index = {id(group): i for i, group in enumerate(self.param_groups)}
        for bucket in self.buckets:
            bucket.wait()
            squares[index[id(bucket.group)]] += torch.linalg.vector_norm(bucket.grad, dtype=torch.float32).square()
        self.launched = 0

        if self.world_size > 1:
            dist.all_reduce(squares)
            if self.order is None and self.completed:
                self._agree_on_order()

        norms = squares.sqrt().tolist()
        for bucket in self.buckets:
            bucket.idle = bucket.group.get("modality") is not None and norms[index[id(bucket.group)]] == 0
        return squares.sum().sqrt().item(), {g["name"]: n for g, n in zip(self.param_groups, norms, strict=True)}

    def drop_gradients(self) -> None:
        """Instead of step(): free the reduced gradients, which would hold memory through the next backward pass.

        Also instead of reduce_gradients(), after launch_reduce_scatter().
        """
        for bucket in self.buckets:
            bucket.wait()
            bucket.grad = None
        self.launched = 0

    @torch.no_grad()
    def step(self, scale: float = 1.0) -> None:
        """Update all parameters from the reduced gradients times `scale` (the clipping factor)."""
        gathers = []
        for bucket in self.buckets:
            assert bucket.grad is not None, "call reduce_gradients() before step()"
            gradient, bucket.grad = bucket.grad, None
            if bucket.idle:
                continue
            shard = bucket.parameter_shard()
            update = _adamw_step if bucket.group["kind"] == "adamw" else self._muon_step
            update(shard, gradient, scale, bucket.state, bucket.group)
            gathers.append((bucket, *bucket.start_all_gather(shard)))  # overlaps with the next bucket's update

        for bucket, gathered, work in gathers:
            bucket.finish_update(gathered, work)

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
        """Whole tensors under '<parameter>.<quantity>', bucket by bucket; collectives: every rank has to take all.

        They may share memory with the optimizer: copy what has to last beyond the next step.
        """
        for bucket in self.buckets:
            for quantity, value in bucket.state.items():
                if quantity == "step":
                    yield from ((f"{name}.step", torch.tensor(value)) for name in bucket.names)
                else:
                    parts = bucket.split(bucket.finish_all_gather(*bucket.start_all_gather(value)))
                    yield from ((f"{name}.{quantity}", part) for name, part in zip(bucket.names, parts, strict=True))

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Copies of all state_items()."""
        return {name: tensor.clone() for name, tensor in self.state_items()}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Take this rank's shards from whole tensors; raises KeyError with the name of a missing one."""
        known = {name.rpartition(".")[0] for name in state}
        for bucket in self.buckets:
            prefix = bucket.names[0] + "."
            quantities = sorted(key[len(prefix) :] for key in state if key.startswith(prefix))
            # A modality's group may not have had its first step yet.
            new = bucket.group.get("modality") is not None and known.isdisjoint(bucket.group["param_names"])
            if not quantities and not new:
                raise KeyError(f"optimizer state of {bucket.names[0]}")

            bucket.state = {}
            for quantity in quantities:
                parts = [state[f"{name}.{quantity}"] for name in bucket.names]
                if quantity == "step":
                    bucket.state["step"] = int(parts[0])
                else:
                    device = bucket.params[0].device
                    bucket.state[quantity] = bucket.local_shard([part.to(device) for part in parts]).clone()


class _Bucket:
    """Parameters that are updated together: one flattened AdamW parameter, or a stack of Muon matrices of one shape.

    Padded to a multiple of the ranks. Each rank owns an equal slice of a flat one; of a stack rank r owns the matrices
    r, r + N, ..., so that a chunk, N neighbours that the backward pass completes together, can be reduced early.
    """

    def __init__(self, group: dict, params: list[nn.Parameter], names: list[str], rank: int, world_size: int):
        self.group, self.params, self.names = group, params, names
        self.rank, self.world_size = rank, world_size
        self.stacked = group["kind"] == "muon"
        self.length = len(params) if self.stacked else params[0].numel()
        self.shard_length = -(-self.length // world_size)
        self.chunks = self.shard_length if self.stacked and world_size > 1 else 1  # one reduce-scatter each
        self.state: dict = {}
        self.grad: torch.Tensor | None = None
        self.works: list = []  # reduce-scatters in flight, with the memory that they read
        self.idle = False  # the whole group of a modality has no gradient in this step, on all ranks

    def members(self, chunk: int) -> list[nn.Parameter]:
        """The parameters whose gradients a chunk holds."""
        if self.chunks == 1:
            return self.params
        return self.params[chunk * self.world_size : (chunk + 1) * self.world_size]

    def flatten_and_pad(self, tensors: list[torch.Tensor]) -> torch.Tensor:
        """Tensors of parameters -> one tensor, padded along its first dimension to a multiple of the ranks."""
        whole = torch.stack(tensors) if self.stacked else tensors[0].reshape(-1)
        padding = -len(whole) % self.world_size
        return torch.cat([whole, whole.new_zeros(padding, *whole.shape[1:])]) if padding else whole

    def split(self, whole: torch.Tensor) -> list[torch.Tensor]:
        """The inverse of flatten_and_pad(); a quantity with another shape per matrix (neuron variance) keeps it."""
        if self.stacked:
            return list(whole[: self.length].unbind(0))
        return [whole[: self.length].view(self.params[0].shape)]

    def local_shard(self, tensors: list[torch.Tensor]) -> torch.Tensor:
        """This rank's shard of tensors of all parameters; a flat one on a single rank shares the tensor's memory."""
        if self.stacked:
            owned = tensors[self.rank :: self.world_size]
            return torch.stack(owned + [torch.zeros_like(tensors[0])] * (self.shard_length - len(owned)))
        whole = self.flatten_and_pad(tensors)
        return whole[self.rank * self.shard_length : (self.rank + 1) * self.shard_length]

    def parameter_shard(self) -> torch.Tensor:
        """This rank's shard of the parameters, to be updated in place."""
        return self.local_shard([p.detach() for p in self.params])

    def reduce_scatter(self, chunk: int) -> None:
        """Start to sum a chunk of the gradient over the ranks; p.grad becomes None."""
        members = self.members(chunk)
        whole = self.flatten_and_pad([p.grad if p.grad is not None else torch.zeros_like(p) for p in members])
        for parameter in members:
            parameter.grad = None
        if self.world_size == 1:
            self.grad = whole
            return
        if self.grad is None:
            self.grad = whole.new_empty(self.shard_length, *whole.shape[1:])
        out = self.grad[chunk : chunk + 1] if self.stacked else self.grad
        self.works.append((REDUCE_SCATTER(out, whole.contiguous(), async_op=True), whole))

    def wait(self) -> None:
        """Wait for the reduce-scatters: then `grad` is this rank's shard of the sum."""
        for work, _ in self.works:
            work.wait()
        self.works = []

    def start_all_gather(self, shard: torch.Tensor) -> tuple[torch.Tensor, object]:
        """Collect the shards of all ranks; returns (memory for them, what to wait for)."""
        if self.world_size == 1:
            return shard, None
        gathered = shard.new_empty(self.shard_length * self.world_size, *shard.shape[1:])
        return gathered, ALL_GATHER(gathered, shard.contiguous(), async_op=True)

    def finish_all_gather(self, gathered: torch.Tensor, work) -> torch.Tensor:
        """Wait for start_all_gather(); returns its result in the order of flatten_and_pad()."""
        if work is not None:
            work.wait()
        if not self.stacked:
            return gathered
        return gathered.unflatten(0, (self.world_size, self.shard_length)).transpose(0, 1).flatten(0, 1)

    def finish_update(self, gathered: torch.Tensor, work) -> None:
        """Copy the updated shards of all ranks back into the parameters."""
        if self.world_size > 1 or self.stacked:  # else they were updated in place
            torch._foreach_copy_([p.detach() for p in self.params], self.split(self.finish_all_gather(gathered, work)))


def _buckets(group: dict, rank: int, world_size: int) -> list[_Bucket]:
    pairs = list(zip(group["params"], group["param_names"], strict=True))
    if group["kind"] == "adamw":
        return [_Bucket(group, [p], [name], rank, world_size) for p, name in pairs]
    shapes = dict.fromkeys(tuple(p.shape) for p, _ in pairs)  # in order of first appearance, the same on every rank
    stacks = [[(p, name) for p, name in pairs if tuple(p.shape) == shape] for shape in shapes]
    return [_Bucket(group, [p for p, _ in s], [name for _, name in s], rank, world_size) for s in stacks]


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
    """In place on p, mean (of the gradients) [k, m, n] and neuron_sq.

    rates: scalar tensors, the scale of g, the momentum, the learning rate, and learning rate times weight decay.
    """
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


# The kind of a parameter's group by group_of(); matrices of any other group are Muon's.
KINDS = {"lm_head": "unembedding", "value_embeds": "value_embedding", "bigram_embed": "bigram", "scalars": "scalar"}
KIND_ORDER = ("embedding", "tied", "unembedding", "value_embedding", "bigram", "matrix", "scalar")


def build_optimizer(model: nn.Module, settings, dtype: torch.dtype, rank: int = 0, world_size: int = 1) -> MuonAdamW:
    """Sort every parameter into exactly one group and give each its learning rate.

    dtype: of Muon's orthogonalisation unless settings.muon_dtype says otherwise.
    """
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
    parameters, learning_rates = dict(model.named_parameters()), _learning_rates(model.config, settings)
    param_groups = [
        dict(
            name=f"{kind}_{modality}" if modality else kind,
            modality=modality,
            params=[parameters[name] for name in names],
            param_names=names,
            lr=learning_rates[kind],
            initial_lr=learning_rates[kind],
            **(muon if kind == "matrix" else adamw),
        )
        for (kind, modality), names in _names_by_group(model).items()
    ]
    return MuonAdamW(param_groups, rank, world_size)


def _names_by_group(model: nn.Module) -> dict[tuple[str, str | None], list[str]]:
    """{(kind, modality that alone uses them or None): names of parameters}, without empty ones, in a fixed order."""
    kinds = {**KINDS, "wte": "tied" if model.config.tie_weights else "embedding"}
    groups = {(kind, modality): [] for kind in KIND_ORDER for modality in (None, *model.vocabulary.names)}
    for name, parameter in model.named_parameters():
        kind = kinds.get(group_of(name), "matrix") if parameter.ndim > 1 else "scalar"
        groups[kind, modality_of(name, model.config)].append(name)
    return {key: names for key, names in groups.items() if names}


def _learning_rates(config, settings) -> dict[str, float]:
    """By kind. AdamW's are given for width 768 and scale with (width / 768)^-0.5, as in nanochat."""
    scale = (config.n_embd / 768) ** -0.5
    untied = settings.tie_weights and not config.tie_weights  # by untie_at: both tables keep the tied learning rate
    return {
        "embedding": (settings.tied_weights_lr if untied else settings.embedding_lr) * scale,
        "tied": settings.tied_weights_lr * scale,
        "unembedding": (settings.tied_weights_lr if untied else settings.unembedding_lr) * scale,
        "value_embedding": settings.value_embedding_lr * scale,
        "bigram": settings.bigram_lr * scale,
        "matrix": settings.matrix_lr,
        "scalar": settings.scalar_lr,
    }


def weight_norms(model: nn.Module, optimizer: MuonAdamW) -> dict[str, float]:
    """Weight norm of each group and the mean size of the output projection's entries, for diagnosis."""
    norms = {
        f"norm/weight_{group['name']}": torch.stack([p.detach().norm() for p in group["params"]]).norm().item()
        for group in optimizer.param_groups
    }
    if model.config.use_output_projection:
        norms["norm/output_projection_mean_abs"] = model.output_projection.weight.detach().abs().mean().item()
    return norms
