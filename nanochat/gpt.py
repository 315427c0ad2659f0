"""The GPT, top to bottom.

Classic nanochat (October 2025) is the default of every GPTConfig field: rotary positions, QK norm, ReLU^2, RMSNorm
without parameters, norm after the embedding, no biases, logits softcapped at 15, untied. Newer features are fields
that are off by default, so that the keys absent from an old checkpoint mean what they meant when it was written.

Shapes: B batch, T time, C channels (n_embd), H heads, D head size, V vocabulary.
"""

from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from nanochat.attention import causal_attention
from nanochat.loss_head import chunked_cross_entropy, compile_loss_head, softcapped


@dataclass(frozen=True)
class GPTConfig:
    """Architecture of one model. Defaults are frozen for ever: they are what an absent key in old metadata means."""

    sequence_len: int = 1024
    vocab_size: int = 50304
    n_layer: int = 12
    n_head: int = 6
    n_kv_head: int = 6  # fewer than n_head: grouped-query attention (arXiv 2305.13245)
    n_embd: int = 768
    tie_weights: bool = False  # logits come from wte; there is no lm_head
    use_output_projection: bool = False  # tied only: logits = wte (P x) with P of n_embd x n_embd
    output_projection_residual: bool = False  # with it: wte (x + P x), P starting at zero
    rope_base: float = 10000.0
    qk_scale: float = 1.0  # queries and keys are multiplied by it after QK norm
    # The rest comes from modded-nanogpt by way of nanochat; lambdas and gates are learned.
    value_embeddings: bool = False  # every other layer, the last included, adds gate * embedding of the token to v
    value_gate_channels: int = 12  # the gate, one number a KV head, reads the first channels of attention's input
    value_gate_range: float = 3.0  # and is this times a sigmoid
    smear: bool = False  # each token's embedding adds lambda * gate * that of the token before
    residual_scalars: bool = False  # before each block x becomes lambda x + lambda0 x0, x0 being the embedding
    backout: bool = False  # lambda * the output of the middle block is taken off before the last norm

    def __post_init__(self):
        assert self.n_embd % self.n_head == 0 and self.n_head % self.n_kv_head == 0, self
        assert self.tie_weights or not self.use_output_projection, "an output projection needs tied weights"

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head

    def has_value_embedding(self, layer: int) -> bool:
        return self.value_embeddings and (self.n_layer - 1 - layer) % 2 == 0


def norm(x: torch.Tensor) -> torch.Tensor:
    """RMSNorm without learnable parameters over the last dimension (arXiv 1910.07467)."""
    return F.rms_norm(x, (x.size(-1),))


class Linear(nn.Linear):
    """A matrix without bias whose float32 master weight is cast to the dtype of the activations where it is used."""

    def __init__(self, fan_in: int, fan_out: int):
        super().__init__(fan_in, fan_out, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight.to(x.dtype))


def rotary_tables(length: int, head_dim: int, device, base: float = 10000.0) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [1, length, 1, D/2] of rotary positions (arXiv 2104.09864), always float32."""
    frequencies = base ** -(torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim)
    angles = torch.outer(torch.arange(length, dtype=torch.float32, device=device), frequencies)
    return angles.cos()[None, :, None, :], angles.sin()[None, :, None, :]


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn the pairs (x[d], x[d + D/2]) of [B, T, H, D] by the angle of their position, clockwise as nanochat does."""
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat([first * cos + second * sin, second * cos - first * sin], dim=-1)


class CausalSelfAttention(nn.Module):
    """Multi-head attention over the past, with rotary positions and normalised queries and keys."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        self.qk_scale, self.gate_range = config.qk_scale, config.value_gate_range
        kv_width = config.n_kv_head * config.head_dim
        self.c_q = Linear(config.n_embd, config.n_embd)
        self.c_k = Linear(config.n_embd, kv_width)
        self.c_v = Linear(config.n_embd, kv_width)
        self.c_proj = Linear(config.n_embd, config.n_embd)
        if config.has_value_embedding(layer):
            self.ve_gate = Linear(min(config.value_gate_channels, config.n_embd), config.n_kv_head)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, ve=None, kv_cache=None) -> torch.Tensor:
        """x [B, T, C], ve the tokens' value embeddings [B, T, H_kv D] or None -> [B, T, C]."""
        B, T, C = x.shape
        q, k, v = (project(x).view(B, T, -1, self.head_dim) for project in (self.c_q, self.c_k, self.c_v))
        if ve is not None:
            gate = self.gate_range * self.ve_gate(x[..., : self.ve_gate.in_features]).sigmoid()
            v = v + gate[..., None] * ve.view(v.shape)
        q, k = ((norm(rotate(z, cos, sin)) * self.qk_scale).to(x.dtype) for z in (q, k))
        if kv_cache is not None:  # keys and values of the whole past, this step's included
            k, v = kv_cache.insert(self.layer, k, v)
        return self.c_proj(causal_attention(q, k, v).reshape(B, T, C))


class MLP(nn.Module):
    """Two matrices with ReLU^2 between them (arXiv 2109.08668)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c_proj(F.relu(self.c_fc(x)).square())


class Block(nn.Module):
    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.attn = CausalSelfAttention(config, layer)
        self.mlp = MLP(config)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, ve=None, kv_cache=None) -> torch.Tensor:
        x = x + self.attn(norm(x), cos, sin, ve, kv_cache)
        return x + self.mlp(norm(x))


SMEAR_CHANNELS = 24  # that the smear gate reads
LAMBDAS = {"smear_lambda": 0.0, "resid_lambdas": 1.0, "x0_lambdas": 0.1, "backout_lambda": 0.2}  # at the start


def is_scalar(name: str) -> bool:
    """Lambdas and gates: parameters of a few numbers, trained by AdamW and not counted in the FLOPs."""
    return name in LAMBDAS or name.endswith("gate.weight")


class GPT(nn.Module):
    """Token ids in, softcapped logits or a loss out. Activations have `compute_dtype`, parameters stay float32."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.compute_dtype = torch.float32
        self.block_forward = Block.forward  # compile() replaces it
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.vocab_size, config.n_embd),
                "h": nn.ModuleList(Block(config, layer) for layer in range(config.n_layer)),
            }
        )
        if not config.tie_weights:
            self.lm_head = Linear(config.n_embd, config.vocab_size)
        if config.use_output_projection:
            self.output_projection = Linear(config.n_embd, config.n_embd)
        kv_width = config.n_kv_head * config.head_dim
        layers = [layer for layer in range(config.n_layer) if config.has_value_embedding(layer)]
        if layers:
            self.value_embeds = nn.ModuleDict({str(i): nn.Embedding(config.vocab_size, kv_width) for i in layers})
        if config.smear:
            self.smear_gate = Linear(min(SMEAR_CHANNELS, config.n_embd), 1)
            self.smear_lambda = nn.Parameter(torch.empty(1))
        if config.residual_scalars:
            self.resid_lambdas = nn.Parameter(torch.empty(config.n_layer))
            self.x0_lambdas = nn.Parameter(torch.empty(config.n_layer))
        if config.backout:
            self.backout_lambda = nn.Parameter(torch.empty(1))
        self.rotary_length = 10 * config.sequence_len  # generation may run past the training context
        cos, sin = rotary_tables(self.rotary_length, config.head_dim, self.device, config.rope_base)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    @torch.no_grad()
    def init_weights(self, tied_std: float = 0.02) -> None:
        """All initialisation in one place.

        | tensor | start |
        | wte, untied | N(0, 1): its rows are normalised after the lookup, only their direction counts |
        | wte, tied | N(0, tied_std): as the output matrix it makes logits of size tied_std sqrt(C) (dev/LOG.md) |
        | lm_head | N(0, 0.001): a nearly uniform first prediction |
        | matrices that read the stream | U(-s, s) with s = sqrt(3 / C), standard deviation 1 / sqrt(C) |
        | c_proj of attention and MLP, residual projection | 0: every block starts as the identity |
        | value embeddings | like the values that they are added to |
        | gates | 0: half open |
        | lambdas | smear 0, residual 1 and 0.1 of x0, backout 0.2, as in nanochat |
        """
        C = self.config.n_embd
        nn.init.normal_(self.transformer.wte.weight, std=tied_std if self.config.tie_weights else 1.0)
        if not self.config.tie_weights:
            nn.init.normal_(self.lm_head.weight, std=0.001)
        bound = (3 / C) ** 0.5
        for block in self.transformer.h:
            for matrix in (block.attn.c_q, block.attn.c_k, block.attn.c_v, block.mlp.c_fc):
                nn.init.uniform_(matrix.weight, -bound, bound)
            nn.init.zeros_(block.attn.c_proj.weight)
            nn.init.zeros_(block.mlp.c_proj.weight)
        if self.config.use_output_projection:
            bound = 0.0 if self.config.output_projection_residual else bound
            nn.init.uniform_(self.output_projection.weight, -bound, bound)
        for name, parameter in self.named_parameters():
            if name.startswith("value_embeds."):
                nn.init.uniform_(parameter, -((3 / C) ** 0.5), (3 / C) ** 0.5)
            elif is_scalar(name):
                nn.init.constant_(parameter, LAMBDAS.get(name, 0.0))
        cos, sin = rotary_tables(self.rotary_length, self.config.head_dim, self.device, self.config.rope_base)
        self.cos, self.sin = cos, sin

    @property
    def device(self) -> torch.device:
        return self.transformer.wte.weight.device

    @property
    def output_weight(self) -> torch.Tensor:
        """The matrix [V, C] that makes the logits."""
        return self.transformer.wte.weight if self.config.tie_weights else self.lm_head.weight

    def embed(self, idx: torch.Tensor, kv_cache=None) -> torch.Tensor:
        """idx int64 [B, T] -> normalised embeddings [B, T, C], smeared over the token before if the model does that."""
        x = norm(self.transformer.wte(idx).to(self.compute_dtype))
        if not self.config.smear:
            return x
        past = torch.zeros_like(x[:, :1]) if kv_cache is None or kv_cache.last is None else kv_cache.last
        if kv_cache is not None:
            kv_cache.last = x[:, -1:]
        gate = self.smear_gate(x[..., : self.smear_gate.in_features]).sigmoid()
        return x + self.smear_lambda.to(x.dtype) * gate * torch.cat([past, x[:, :-1]], dim=1)

    def features(self, idx: torch.Tensor, kv_cache=None) -> torch.Tensor:
        """idx int64 [B, T] -> what the output matrix is multiplied with, [B, T, C]."""
        start = 0 if kv_cache is None else kv_cache.position
        T = idx.size(1)
        assert start + T <= self.rotary_length, (
            f"position {start + T} is beyond the rotary table of {self.rotary_length}"
        )
        cos, sin = self.cos[:, start : start + T], self.sin[:, start : start + T]
        x = x0 = self.embed(idx, kv_cache)
        # Only training runs compiled: evaluation and generation come in too many shapes.
        run = self.block_forward if torch.is_grad_enabled() else Block.forward
        for layer, block in enumerate(self.transformer.h):
            ve = None
            if self.config.has_value_embedding(layer):
                ve = self.value_embeds[str(layer)](idx).to(x.dtype)
            if self.config.residual_scalars:
                x = self.resid_lambdas[layer] * x + self.x0_lambdas[layer] * x0
            x = run(block, x, cos, sin, ve, kv_cache)
            if layer == self.config.n_layer // 2:
                middle = x
        if kv_cache is not None:
            kv_cache.position += T
        if self.config.backout:
            x = x - self.backout_lambda.to(x.dtype) * middle
        x = norm(x)
        if self.config.use_output_projection:
            projected = self.output_projection(x)
            x = x + projected if self.config.output_projection_residual else projected
        return x

    def logits(self, features: torch.Tensor) -> torch.Tensor:
        """features [..., C] of any positions -> softcapped float32 logits [..., V]."""
        return softcapped(F.linear(features, self.output_weight.to(features.dtype)).float())

    def forward(
        self, idx: torch.Tensor, targets: torch.Tensor | None = None, kv_cache=None, loss_reduction: str = "mean"
    ) -> torch.Tensor:
        """idx int64 [B, T] -> float32 logits [B, T, V]; with targets [B, T] (-100: ignored) the cross-entropy in nats.

        loss_reduction: "mean" over the valid targets (0 without any), "sum", or "none" ([B, T], 0 where ignored).
        """
        x = self.features(idx, kv_cache)
        if targets is None:
            return self.logits(x)
        if loss_reduction == "none" and torch.is_grad_enabled():
            logits = self.logits(x).flatten(0, 1)
            return F.cross_entropy(logits, targets.flatten(), reduction="none").view_as(targets)
        losses = chunked_cross_entropy(x.flatten(0, 1), self.output_weight, targets.flatten(), loss_reduction)
        return losses.view_as(targets) if loss_reduction == "none" else losses

    def compile(self) -> None:
        """Compile one block, which all layers share, and the elementwise part of the loss: seconds, not minutes."""
        self.block_forward = torch.compile(Block.forward, dynamic=False)
        compile_loss_head(True)

    def uncompile(self) -> None:
        self.block_forward = Block.forward
        compile_loss_head(False)

    # -- counts -------------------------------------------------------------------------------------------------------

    def num_parameters(self) -> dict[str, int]:
        """Parameters by group; every parameter is in exactly one (lm_head is 0 when tied)."""
        count = {"wte": 0, "lm_head": 0, "output_projection": 0, "value_embeds": 0, "transformer": 0, "scalars": 0}
        for name, parameter in self.named_parameters():
            if is_scalar(name):
                group = "scalars"
            else:
                tables = ("wte", "lm_head", "output_projection", "value_embeds")
                group = next((table for table in tables if table in name), "transformer")
            count[group] += parameter.numel()
        return {**count, "total": sum(count.values())}

    def num_matmul_parameters(self) -> int:
        """Parameters that every token is multiplied with: all but embeddings that are only looked up, and scalars."""
        count = self.num_parameters()
        looked_up = count["value_embeds"] + (0 if self.config.tie_weights else count["wte"])
        return count["total"] - looked_up - count["scalars"]

    def flops_per_token(self) -> int:
        """Training FLOPs a token, forward and backward: 6 N_matmul + 12 L C T (arXiv 2204.02311, appendix B).

        Attention is counted over the whole square, as nanochat does: causality is not halved.
        """
        config = self.config
        return 6 * self.num_matmul_parameters() + 12 * config.n_layer * config.n_embd * config.sequence_len

    # -- generation ---------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def generate(self, ids: list[int], max_tokens: int, temperature: float = 1.0, top_k: int | None = None, seed=42):
        """Yield new token ids one by one without a cache: the plain reference that engine.py is tested against."""
        generator = torch.Generator(device=self.device).manual_seed(seed)
        idx = torch.tensor([ids], dtype=torch.long, device=self.device)
        for _ in range(max_tokens):
            token = sample(self(idx)[:, -1], generator, temperature, top_k)
            idx = torch.cat([idx, token], dim=1)
            yield token.item()


def sample(logits: torch.Tensor, generator: torch.Generator, temperature: float, top_k: int | None) -> torch.Tensor:
    """Draw one id per row of logits [B, V] -> int64 [B, 1]; temperature 0 is greedy, top_k keeps the k best."""
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    if top_k is not None:
        worst = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
        logits = logits.masked_fill(logits < worst, -float("inf"))
    return torch.multinomial((logits / temperature).softmax(dim=-1), 1, generator=generator)
