"""Adapters that teach a frozen language model audio codes: an expert per layer, embedding and output rows of codes.

The host keeps its modules, their names and its weights. The forwards of its MLPs and its embedding are wrapped: audio
ids take their rows from here, and audio positions go through an expert,

    up_proj(fc2(gelu(fc1(LayerNorm(down_proj x)))))

whose middle, LayerNorm included, is MusicGen's feed-forward layer (arXiv 2306.05284), frozen, between two trained
matrices. up_proj starts at zero, and so do the output rows. A batch without an audio id takes the host's own path.
Ids: the host's 0 .. V-1, the codes, `end`, and an input-only `start`; or codes alone (vocabulary "expanded").
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from nanochat.gpt import Linear
from nanochat.modality import IGNORED, Modality, Vocabulary
from nanochat.model.routing import plan_route, route
from nanochat.system.environment import UserError

CHUNK = 4096  # positions whose logits are alive at a time


@dataclass(frozen=True)
class AdapterConfig:
    """What is built around a host of this shape. C: the host's width, E: the expert's."""

    vocab_size: int  # V, rows of the host's embedding
    width: int
    n_layer: int
    sequence_len: int
    modalities: tuple[Modality, ...]  # one, audio
    expert: str = "frozen"  # "frozen", "trained", "random", or "none": adapters with a GELU between them
    expert_dim: int = 1024
    expert_hidden: int = 4096
    output_layers: str = "separate"  # a softmax over audio alone, or "shared" with the host's words
    train_output: str = "rows"  # "whole": a copy of the host's output matrix too; "none": rows that stay zero
    finetune_host: bool = False
    unfreeze: str | None = None  # parameters of the host whose names hold this text

    @property
    def vocabulary(self) -> Vocabulary:
        return Vocabulary(self.vocab_size, self.modalities)

    @property
    def trains_host(self) -> bool:
        return self.finetune_host or self.unfreeze is not None

    @property
    def changes_text(self) -> bool:
        """Whether training can change what the model makes of text; else its text path is the host's own."""
        return self.trains_host or self.train_output == "whole" or self.output_layers == "shared"

    @property
    def audio_inputs(self) -> int:
        return self.vocabulary.input_size - self.vocab_size

    @property
    def audio_outputs(self) -> int:
        return self.vocabulary.size - self.vocab_size


class Expert(nn.Module):
    """x [..., C] -> [..., C]: a feed-forward layer of width E between two adapters."""

    def __init__(self, config: AdapterConfig):
        super().__init__()
        C, E = config.width, config.expert_dim
        self.down_proj = Linear(C, E)
        if config.expert != "none":
            self.norm = nn.LayerNorm(E)
            self.fc1 = Linear(E, config.expert_hidden)
            self.fc2 = Linear(config.expert_hidden, E)
        self.up_proj = Linear(E, C)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.down_proj(x)
        if not hasattr(self, "norm"):
            return self.up_proj(F.gelu(x))
        norm = self.norm
        x = F.layer_norm(x, norm.normalized_shape, norm.weight.to(x.dtype), norm.bias.to(x.dtype), norm.eps)
        return self.up_proj(self.fc2(F.gelu(self.fc1(x))))


class AdapterModules(nn.Module):
    """All that is added to a host of this shape: experts, audio embedding, audio output; also on the meta device."""

    def __init__(self, config: AdapterConfig):
        super().__init__()
        self.experts = nn.ModuleList(Expert(config) for _ in range(config.n_layer))
        self.audio_embedding = nn.Embedding(config.audio_inputs, config.width)
        if config.train_output == "whole":
            self.output = Linear(config.width, config.vocabulary.size)  # the host's rows first
        else:
            self.audio_output = Linear(config.width, config.audio_outputs)
            self.audio_output.weight.requires_grad_(config.train_output == "rows")
        if config.expert in ("frozen", "random"):
            for expert in self.experts:
                for part in (expert.norm, expert.fc1, expert.fc2):
                    part.requires_grad_(False)


class AdapterModel(AdapterModules):
    """Host and parts as one model, called like GPT: ids in, float32 logits of all ids or a loss out."""

    def __init__(self, host, config: AdapterConfig, experts: list[dict[str, torch.Tensor]] | None, seed: int = 0):
        """host: from hosts.load_host(); its MLPs and embeddings are routed through this model from now on.

        experts: for each layer norm.weight, norm.bias, fc1.weight and fc2.weight, None without (expert "none").
        UserError: the trained parameters would not be those that the settings name.
        """
        super().__init__(config)
        self.host, self.config, self.vocabulary = host, config, config.vocabulary
        self.plan = None
        self.to(host.output_weight.device)
        self.register_buffer("expert_of_id", self.vocabulary.table(by_expert=True).to(self.device), persistent=False)
        self.register_buffer("head_of_id", self.vocabulary.table(by_expert=False).to(self.device), persistent=False)
        self.init_weights(seed)
        self.copy_experts(experts)
        if config.trains_host:
            self.host_model = host.model.float()  # what is trained is float32
            for name, parameter in host.model.named_parameters():
                parameter.requires_grad_(config.finetune_host or config.unfreeze in name)
        check_trained(self)
        for mlp, expert in zip(host.mlps, self.experts, strict=True):
            mlp.forward = partial(self._run_mlp, mlp.forward, expert)
        for number, embedding in enumerate(host.embeddings):
            embedding.forward = partial(self._embed, embedding.forward, number == 0)

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Drawn on the CPU from the seed.

        | tensor | start |
        | down_proj | U(-s, s) with s = sqrt(3 / C): what it gives out has the variance of what it reads |
        | up_proj | 0: every layer begins as the host's attention alone for audio positions |
        | audio embedding | normal, with the standard deviation of the host's embedding |
        | audio output | 0: a uniform first prediction; under "whole" beside a copy of the host's rows |
        """
        generator = torch.Generator().manual_seed(seed)

        def draw(target: torch.Tensor, how: str, scale: float) -> None:
            values = torch.empty(target.shape)
            getattr(values, how)(*((-scale, scale) if how == "uniform_" else (0, scale)), generator=generator)
            target.copy_(values)

        for expert in self.experts:
            draw(expert.down_proj.weight, "uniform_", (3 / self.config.width) ** 0.5)
            nn.init.zeros_(expert.up_proj.weight)
        # The module's output, not its weight: some scale the embedding.
        rows = self.host.embeddings[0](torch.arange(min(self.config.vocab_size, 8192), device=self.device))
        draw(self.audio_embedding.weight, "normal_", rows.float().std().item())
        if self.config.train_output == "whole":
            nn.init.zeros_(self.output.weight)
            self.output.weight[: self.config.vocab_size] = self.host.output_weight.float()
        else:
            nn.init.zeros_(self.audio_output.weight)

    @torch.no_grad()
    def copy_experts(self, experts: list[dict[str, torch.Tensor]] | None) -> None:
        if self.config.expert == "none":
            return
        for expert, tensors in zip(self.experts, experts, strict=True):
            for name, tensor in tensors.items():
                expert.get_parameter(name).copy_(tensor)
            if self.config.expert != "trained":  # frozen: no float32 needed
                for part in (expert.norm, expert.fc1, expert.fc2):
                    part.to(self.host.output_weight.dtype)

    # -- routing inside the host --------------------------------------------------------------------------------------

    def _run_mlp(self, original, expert: Expert, x: torch.Tensor) -> torch.Tensor:
        return original(x) if self.plan is None else route(x, self.plan, (original, expert))

    def _embed(self, original, first: bool, ids: torch.Tensor) -> torch.Tensor:
        """The host's rows, and ours for audio ids; further tables of a nanochat host (value embeddings) give zero."""
        if self.plan is None:
            return original(ids)
        V = self.config.vocab_size
        x = original(ids.clamp(max=V - 1))
        own = self.audio_embedding((ids - V).clamp(min=0)).to(x.dtype) if first else torch.zeros_like(x)
        return torch.where((ids >= V)[..., None], own, x)

    def features(self, idx: torch.Tensor, kv_cache=None, always: bool = False) -> torch.Tensor:
        """idx int64 [B, T] -> what the output matrices read, [B, T, C]; always: even text alone is routed."""
        modality = self.expert_of_id[idx]
        self.plan = plan_route("sort", modality, 2) if always or modality.any() else None
        try:
            return self.host.features(idx, kv_cache)
        finally:
            self.plan = None

    def forward(
        self, idx: torch.Tensor, targets: torch.Tensor | None = None, kv_cache=None, loss_reduction: str = "mean"
    ) -> torch.Tensor:
        """As GPT.forward: logits [B, T, all ids], or the loss of targets [B, T] (-100: ignored) in nats."""
        if targets is None:
            return self.logits(self.features(idx, kv_cache))
        # In training every batch needs a graph, and every expert a gradient.
        x = self.features(idx, kv_cache, always=torch.is_grad_enabled()).flatten(0, 1)
        flat = targets.flatten()
        modality = self.head_of_id[flat.clamp(min=0)].long().masked_fill(flat == IGNORED, -1)
        losses = [self._losses(x[modality == number], flat[modality == number], number) for number in (0, 1)]
        if loss_reduction == "none":
            out = x.new_zeros(len(flat), dtype=torch.float32)
            for number, part in enumerate(losses):
                out[modality == number] = part
            return out.view_as(targets)
        sums = torch.stack([part.sum() for part in losses])
        if loss_reduction == "modalities":
            return sums
        return sums.sum() / (flat != IGNORED).sum().clamp(min=1) if loss_reduction == "mean" else sums.sum()

    def _losses(self, x: torch.Tensor, targets: torch.Tensor, number: int) -> torch.Tensor:
        """Cross-entropy float32 [n] of features x [n, C] to targets of one modality, among all ids or that one's."""

        def losses(x: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            if self.config.output_layers == "shared":
                return F.cross_entropy(self.logits(x), targets, reduction="none")
            logits = (self.text_logits, self.audio_logits)[number](x)
            return F.cross_entropy(logits, targets - self.vocabulary.ranges[number][0], reduction="none")

        chunks = zip(x.split(CHUNK), targets.split(CHUNK), strict=True)
        if len(x) > CHUNK and torch.is_grad_enabled():  # the logits of one chunk at a time, made again for the gradient
            return torch.cat([checkpoint(losses, *chunk, use_reentrant=False) for chunk in chunks])
        return torch.cat([losses(*chunk) for chunk in chunks])

    def text_logits(self, x: torch.Tensor) -> torch.Tensor:
        """features [..., C] -> float32 [..., V]: the host's own, or those of the trained copy."""
        if self.config.train_output != "whole":
            return self.host.text_logits(x)
        return self._softcap(F.linear(x, self.output.weight[: self.config.vocab_size].to(x.dtype)))

    def audio_logits(self, x: torch.Tensor) -> torch.Tensor:
        whole = self.config.train_output == "whole"
        rows = self.output.weight[self.config.vocab_size :] if whole else self.audio_output.weight
        return self._softcap(F.linear(x, rows.to(x.dtype)))

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.text_logits(x), self.audio_logits(x)], dim=-1)

    def _softcap(self, logits: torch.Tensor) -> torch.Tensor:
        logits, cap = logits.float(), self.host.softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def new_cache(self, batch: int, length: int):
        return self.host.new_cache(batch, length)

    # -- interface of the training loop -------------------------------------------------------------------------------

    def train(self, mode: bool = True) -> "AdapterModel":
        """The host stays in eval mode, trained or not: no dropout."""
        super().train(mode)
        self.host.model.eval()
        return self

    @property
    def device(self) -> torch.device:
        return self.audio_embedding.weight.device

    def trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(name, parameter) of all that is trained, and that a checkpoint holds."""
        return ((name, p) for name, p in self.named_parameters() if p.requires_grad)

    def count_targets(self, targets: torch.Tensor) -> torch.Tensor:
        return torch.bincount(self.head_of_id[targets[targets != IGNORED]], minlength=2)

    def loss_by_modality(self, loss: torch.Tensor, counts: torch.Tensor) -> dict[str, float]:
        parts = zip(self.vocabulary.names, (loss * counts.sum()).tolist(), counts.tolist(), strict=True)
        return {f"loss/{name}": part / n for name, part, n in parts if n}

    def num_parameters(self) -> dict[str, int]:
        return count_parameters(self, sum(p.numel() for p in self.host.model.parameters()))

    def flops_per_token(self) -> int:
        """Of an audio position, forward and backward: 4 for each frozen weight it meets, 6 for each trained one.

        A frozen matrix has no weight gradient, but the gradient goes through it. Attention as in gpt.py.
        """
        config, host = self.config, self.host
        met = sum(p.numel() for p in host.model.parameters())
        if config.output_layers == "shared" and config.train_output != "whole" and host.tied:
            met += host.output_weight.numel()  # both embedding and output matrix
        met -= sum(m.weight.numel() for m in host.model.modules() if isinstance(m, nn.Embedding))
        met -= sum(p.numel() for mlp in host.mlps for p in mlp.parameters())
        if not host.tied and (config.output_layers == "separate" or config.train_output == "whole"):
            met -= host.output_weight.numel()
        named = self.named_parameters()
        ours = [(p.numel(), p.requires_grad) for name, p in named if not name.startswith("host_model.")]
        flops = sum((6 if trained else 4) * count for count, trained in ours) - 6 * self.audio_embedding.weight.numel()
        attention = 12 * config.n_layer * config.width * config.sequence_len
        return flops + (6 if config.finetune_host else 4) * met + attention


def list_trained_names(config: AdapterConfig) -> set[str]:
    """Names of our trained parameters, written out independently of requires_grad."""
    parts = {
        "frozen": ("down_proj", "up_proj"),
        "random": ("down_proj", "up_proj"),
        "none": ("down_proj", "up_proj"),
        "trained": ("down_proj", "norm", "fc1", "fc2", "up_proj"),
    }[config.expert]
    names = {f"experts.{layer}.{part}.weight" for layer in range(config.n_layer) for part in parts}
    if config.expert == "trained":
        names |= {f"experts.{layer}.norm.bias" for layer in range(config.n_layer)}
    names.add("audio_embedding.weight")
    return names | {"rows": {"audio_output.weight"}, "whole": {"output.weight"}, "none": set()}[config.train_output]


def check_trained(model: AdapterModel) -> None:
    """UserError when a rule for the host's parameters matches none; AssertionError when ours are not the list."""
    config = model.config
    found = {name for name, _ in model.trained()}
    of_host = {name for name in found if name.startswith("host_model.")}
    assert found - of_host == list_trained_names(config), (found - of_host) ^ list_trained_names(config)
    if config.unfreeze and not of_host:
        names = [name for name, _ in model.host.model.named_parameters()]
        tied = " (its output is its embedding: there is no parameter of that name)" if model.host.tied else ""
        raise UserError(
            f"unfreeze={config.unfreeze!r} names no parameter of {model.host.name}{tied}: nothing of the host would be "
            f"trained. Its parameters are {names[0]}, ..., {names[-1]}; train_output=rows trains new audio rows alone, "
            "train_output=whole a copy of the whole output"
        )
    idle = config.output_layers == "separate" or config.train_output == "whole"
    if config.unfreeze and idle and not model.host.tied and model.host.output_weight.requires_grad:
        raise UserError(
            f"unfreeze={config.unfreeze!r} takes in the host's output matrix, which no sound's loss meets with "
            f"output_layers={config.output_layers}, train_output={config.train_output}: it would stay as it is; take "
            "output_layers=shared, train_output=rows"
        )


def count_parameters(parts: AdapterModules, of_host: int) -> dict[str, int]:
    """Parameters by kind; "trained" and "total" over all."""
    kinds = dict.fromkeys(("experts", "adapters", "audio embedding", "audio output", "whole output"), 0)
    prefixes = {"audio_embedding": "audio embedding", "audio_output": "audio output", "output": "whole output"}
    for name, parameter in parts.named_parameters():
        if name.startswith("host_model."):
            continue
        first = name.split(".")[0]
        kind = prefixes.get(first) or ("adapters" if name.split(".")[2].endswith("_proj") else "experts")
        kinds[kind] += parameter.numel()
    trained = sum(p.numel() for p in parts.parameters() if p.requires_grad)
    return {"host": of_host, **kinds, "trained": trained, "total": of_host + sum(kinds.values())}


class FrozenHostBaseline:
    """The untouched host behind the interface of bits_per_byte(): nats of text targets [B, T], 0 where ignored."""

    training = False

    def __init__(self, model: AdapterModel):
        self.host, self.device = model.host, model.device

    def eval(self) -> None:
        pass

    def train(self, on: bool) -> None:
        pass

    def __call__(self, idx: torch.Tensor, targets: torch.Tensor, loss_reduction: str) -> torch.Tensor:
        x, flat = self.host.features(idx).flatten(0, 1), targets.flatten()
        valid = flat != IGNORED
        out = torch.zeros(len(flat), device=x.device)
        chunks = zip(x[valid].split(CHUNK), flat[valid].split(CHUNK), strict=True)
        out[valid] = torch.cat([F.cross_entropy(self.host.text_logits(x), y, reduction="none") for x, y in chunks])
        return out.view_as(targets)
