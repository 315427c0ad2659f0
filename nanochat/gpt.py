"""The GPT, top to bottom.

Classic nanochat (October 2025) is the default of every GPTConfig field: rotary positions, QK norm, ReLU^2, RMSNorm
without parameters, norm after the embedding, no biases, logits softcapped at 15, untied. Newer features are fields
that are off by default, so that the keys absent from an old checkpoint mean what they meant when it was written.

Shapes: B batch, T time, C channels (n_embd), H heads, D head size, V vocabulary, E experts.
"""

import math
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from nanochat.modality import IGNORED, Modality, Vocabulary
from nanochat.model import modality_tables, parameters
from nanochat.model.attention import causal_attention
from nanochat.model.cpu_attention import upcast
from nanochat.model.document_mask import document_begins, document_masks, previous
from nanochat.model.kernels import Kernels
from nanochat.model.kv_cache import KVCache
from nanochat.model.loss_head import chunk_gradient, chunked_cross_entropy, compile_chunk_gradient, token_losses
from nanochat.model.parameters import is_scalar
from nanochat.model.routing import (
    Grouped,
    Plan,
    by_target,
    grouped_linear,
    plan_route,
    route,
    route_grouped,
    route_linears,
)
from nanochat.system.environment import UserError

LONGEST = 2**24  # the largest sequence_len of a checkpoint: rotary tables are made before anything is computed


@dataclass(frozen=True)
class GPTConfig:
    """Architecture of one model. Defaults are frozen for ever: they are what an absent key in old metadata means."""

    sequence_len: int = 1024
    vocab_size: int = 50304  # of the text; the modalities' ids come behind
    n_layer: int = 12
    n_head: int = 6
    n_kv_head: int = 6  # fewer than n_head: grouped-query attention (arXiv 2305.13245)
    n_embd: int = 768
    mlp_ratio: float = 4.0  # hidden units of an MLP over its width
    tie_weights: bool = False  # logits come from wte; there is no lm_head
    use_output_projection: bool = False  # tied only: logits = wte (P x) with P of n_embd x n_embd
    output_projection_residual: bool = False  # with it: wte (x + P x), P starting at zero
    rope_base: float = 10000.0
    qk_scale: float = 1.0  # queries and keys are multiplied by it after QK norm
    softcap: float = 15.0  # logits are squashed into (-softcap, softcap)
    vocab_multiple: int = 1  # rows of the tables are rounded up to a multiple of it; the padding gets no logits
    # Attention's range, a pattern of letters tiled over the layers: L sees everything before a token, S at most
    # short_window tokens before it (Longformer, arXiv 2004.05150). The last layer always sees everything.
    window_pattern: str = "L"
    short_window: int = 1024
    document_start: int | None = None  # id that begins a document; if set, no token attends beyond its document
    # The rest comes from modded-nanogpt by way of nanochat; lambdas and gates are learned.
    value_embeddings: bool = False  # every other layer, the last included, adds gate * embedding of the token to v
    value_gate_channels: int = 12  # the gate, one number a KV head, reads the first channels of attention's input
    value_gate_range: float = 3.0  # and is this times a sigmoid
    smear: bool = False  # each token's embedding adds lambda * gate * that of the token before
    residual_scalars: bool = False  # before each block x becomes lambda x + lambda0 x0, x0 being the embedding
    backout: bool = False  # lambda * the output of the middle block is taken off before the last norm
    bigram_rows: int = 0  # each pair of neighbouring ids is hashed to a row of a table, which goes into every block
    # Further modalities in one stream, after Mixture-of-Transformers (arXiv 2411.04996): attention sees all tokens.
    modalities: tuple[Modality, ...] = ()
    # What each modality has of its own: "none", its "mlp", or "all": attention's matrices too.
    untie: str = "none"
    # Logits: "shared", one softmax over all ids; "masked", one matrix, but the loss is over the ids of the target's
    # modality; "separate", an embedding and an output matrix for each modality, with the same loss as "masked".
    output_layers: str = "shared"

    def __post_init__(self):
        assert self.untie in ("none", "mlp", "all"), f"untie={self.untie!r}"
        assert self.output_layers in ("shared", "masked", "separate"), f"output_layers={self.output_layers!r}"
        assert self.n_embd % self.n_head == 0, f"n_head={self.n_head} does not divide n_embd={self.n_embd}"
        assert self.n_head % self.n_kv_head == 0, f"n_kv_head={self.n_kv_head} does not divide n_head={self.n_head}"
        assert self.tie_weights or not self.use_output_projection, "an output projection needs tied weights"
        assert set(self.window_pattern) in ({"L"}, {"S"}, {"L", "S"}), f"window_pattern={self.window_pattern!r}"
        assert (self.document_start or 0) in range(self.vocab_size), f"document_start={self.document_start}"

    @classmethod
    def from_dict(cls, saved: dict) -> "GPTConfig":
        """From the JSON object `model_config` of a checkpoint; UserError names the field that is wrong in it."""
        defaults = {field.name: field.default for field in fields(cls)}
        if unknown := sorted(saved.keys() - defaults.keys()):
            raise UserError(
                f"model_config has fields that this version does not know: {', '.join(unknown)}. A newer one wrote it: "
                "update this repository"
            )
        if saved.get("untie") == "random":
            raise UserError("model_config: untie='random' was removed: nanochat 0.1.0 is the last version that runs it")
        if "modalities" in saved:
            if not isinstance(saved["modalities"], list):
                raise UserError(f"model_config: modalities={saved['modalities']!r} is not a list")
            saved = saved | {"modalities": tuple(map(Modality.read, saved["modalities"]))}

        for name, value in saved.items():
            if expected := _mismatch(value, defaults[name]):
                raise UserError(f"model_config: {name}={value!r} is not {expected}")
        try:
            config = cls(**saved)
            assert config.vocabulary.size > 0
            assert config.sequence_len <= LONGEST, f"sequence_len={config.sequence_len} is beyond {LONGEST}"
        except AssertionError as error:
            raise UserError(f"model_config describes no model that can be: {error}") from error
        return config

    @classmethod
    def from_settings(cls, settings, vocab_size: int | None = None, bos_id: int = 0) -> "GPTConfig":
        """Settings of the same name are copied; settings.model_arguments() has the others and what follows from them.

        vocab_size, bos_id: the tokenizer's, whose size may differ from the one that was asked for.
        """
        same_name = {
            field.name: getattr(settings, field.name) for field in fields(cls) if hasattr(settings, field.name)
        }
        return cls(**same_name | settings.model_arguments(vocab_size, bos_id))

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head

    def has_value_embedding(self, layer: int) -> bool:
        return self.value_embeddings and (self.n_layer - 1 - layer) % 2 == 0

    def window(self, layer: int) -> int | None:
        """The number of tokens before a token that the layer sees; None: all."""
        short = self.window_pattern[layer % len(self.window_pattern)] == "S" and layer < self.n_layer - 1
        return self.short_window if short else None

    def padded(self, ids: int) -> int:
        """Rows of a table for this number of ids."""
        return -(-ids // self.vocab_multiple) * self.vocab_multiple

    @property
    def vocabulary(self) -> Vocabulary:
        return Vocabulary(self.vocab_size, self.modalities)

    @property
    def has_experts(self) -> bool:
        return self.untie != "none" and bool(self.modalities)

    @property
    def separate(self) -> bool:
        return self.output_layers == "separate" and bool(self.modalities)


def _mismatch(value: object, default: object) -> str | None:
    """What a value from JSON should have been, given the default of its field; None: it fits."""
    kind = type(default)
    if default is None:
        return None if value is None or type(value) is int else "an id, or null"
    if kind is bool:
        return None if type(value) is bool else "true or false"
    positive = kind not in (int, float) or value == default or (type(value) is kind and 0 < value < math.inf)
    return None if type(value) is kind and positive else "a number > 0"


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
    """cos and sin [1, length, 1, D] of rotary positions (arXiv 2104.09864) as rotate() wants them, always float32."""
    # As transformers divides, to the last bit: at far positions another rounding of the angle shows in the logits.
    frequencies = 1.0 / base ** (torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim)
    angles = torch.outer(torch.arange(length, dtype=torch.float32, device=device), frequencies)
    cos, sin = torch.cat([angles.cos()] * 2, dim=-1), torch.cat([angles.sin(), -angles.sin()], dim=-1)
    return cos[None, :, None, :], sin[None, :, None, :]


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn the pairs (x[d], x[d + D/2]) of [B, T, H, D] by the angle of their position, clockwise as nanochat does."""
    swapped = x.unflatten(-1, (2, -1)).flip(-2).flatten(-2)  # flip compiles to index arithmetic; slicing + cat copies
    return x * cos + swapped * sin


class AttentionMatrices(nn.Module):
    """The four matrices of attention; a modality has its own under untie = "all"."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        kv_width = config.n_kv_head * config.head_dim
        self.c_q = Linear(config.n_embd, config.n_embd)
        self.c_k = Linear(config.n_embd, kv_width)
        self.c_v = Linear(config.n_embd, kv_width)
        self.c_proj = Linear(config.n_embd, config.n_embd)


class CausalSelfAttention(AttentionMatrices):
    """Multi-head attention over the past, with rotary positions and normalised queries and keys."""

    def __init__(self, config: GPTConfig, layer: int, kernels: Kernels):
        super().__init__(config)
        self.layer, self.head_dim, self.window, self.kernels = layer, config.head_dim, config.window(layer), kernels
        self.qk_scale, self.gate_range = config.qk_scale, config.value_gate_range
        self.bound = config.head_dim**0.5 * config.qk_scale**2  # of the scores of normalised queries and keys
        if config.has_value_embedding(layer):
            self.ve_gate = Linear(min(config.value_gate_channels, config.n_embd), config.n_kv_head)
        owners = config.modalities if config.untie == "all" else ()
        self.experts = nn.ModuleDict({m.name: AttentionMatrices(config) for m in owners})

    def forward(self, x, cos, sin, ve=None, kv_cache=None, plan: Plan | None = None, mask=None) -> torch.Tensor:
        """x [B, T, C], the tokens' value embeddings [B, T, H_kv D] or None, the documents' mask -> [B, T, C]."""
        B, T, C = x.shape
        q, k, v = (z.view(B, T, -1, self.head_dim) for z in self.project_qkv(x, plan))  # [B, T, H or H_kv, D]

        if ve is not None:
            gate = self.gate_range * self.ve_gate(x[..., : self.ve_gate.in_features]).sigmoid()  # [B, T, H_kv]
            v = v + gate[..., None] * ve.view(v.shape)

        # A rotation preserves the norm, so QK norm may precede RoPE; that order is cheaper in the backward pass.
        q, k = ((rotate(norm(upcast(z)), cos, sin) * self.qk_scale).to(x.dtype) for z in (q, k))

        y = self.attend(q, k, v, kv_cache, mask)
        return self.project_out(y.reshape(B, T, C), plan)

    @property
    def branches(self) -> tuple[AttentionMatrices, ...]:
        """The matrices of each expert, the text's first; one for all tokens where attention is not untied."""
        return (self, *self.experts.values())

    def project_qkv(self, x: torch.Tensor, plan: Plan | None) -> tuple[torch.Tensor, ...]:
        """x [B, T, C] -> queries [B, T, H D], keys and values [B, T, H_kv D]."""
        return route_linears(x, plan, [(branch.c_q, branch.c_k, branch.c_v) for branch in self.branches])

    def attend(self, q, k, v, kv_cache, mask) -> torch.Tensor:
        """q [B, T, H, D], k and v [B, T, H_kv, D] -> [B, T, H, D]; a cache adds the keys and values that it holds."""
        if kv_cache is not None:
            return kv_cache.attend(self.layer, q, k, v, self.window, mask)
        kernel = self.kernels.attention.get(self.window is not None)
        return causal_attention(q, k, v, self.window, mask, self.bound, kernel)

    def project_out(self, y: torch.Tensor, plan: Plan | None) -> torch.Tensor:
        """The heads' outputs y [B, T, C] -> [B, T, C]."""
        return route_linears(y, plan, [(branch.c_proj,) for branch in self.branches])[0]


class MLP(nn.Module):
    """Two matrices with ReLU^2 between them (arXiv 2109.08668)."""

    def __init__(self, width: int, ratio: float = 4.0):
        super().__init__()
        hidden = round(ratio * width)
        self.c_fc = Linear(width, hidden)
        self.c_proj = Linear(hidden, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c_proj(F.relu(self.c_fc(x)).square())


class NarrowMLP(MLP):
    """An MLP of another width than the stream's, between two adapters; up_proj starts at zero."""

    def __init__(self, n_embd: int, width: int, ratio: float):
        super().__init__(width, ratio)
        self.down_proj = Linear(n_embd, width)
        self.up_proj = Linear(width, n_embd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.up_proj(super().forward(norm(self.down_proj(x))))


class ModalityMLP(MLP):
    """An MLP for each modality, chosen by the input token's; text's keeps the plain model's parameter names."""

    def __init__(self, config: GPTConfig):
        C, ratio = config.n_embd, config.mlp_ratio
        super().__init__(C, ratio)
        self.experts = nn.ModuleDict()
        for modality in config.modalities:
            plain = modality.expert_dim in (None, C)
            self.experts[modality.name] = MLP(C, ratio) if plain else NarrowMLP(C, modality.expert_dim, ratio)

    def forward(self, x: torch.Tensor, plan: Plan) -> torch.Tensor:
        """Each token of x [B, T, C] through the MLP of its modality."""
        if not isinstance(plan, Grouped):
            return route(x, plan, (super().forward, *self.experts.values()))

        experts = (self, *self.experts.values())  # all of one width
        into, out_of = [expert.c_fc.weight for expert in experts], [expert.c_proj.weight for expert in experts]
        return route_grouped(x, plan, [into], lambda y: grouped_linear(F.relu(y).square(), out_of, plan.ends))[0]


class LayerTerms(NamedTuple):
    """What a block's input is mixed with, streams [B, T, C] and their learned factors; None: the feature is off."""

    resid_lambda: torch.Tensor | None  # of the block's input
    x0_lambda: torch.Tensor | None
    x0: torch.Tensor  # the tokens' embeddings
    bigram_lambda: torch.Tensor | None
    bigrams: torch.Tensor | None


class Block(nn.Module):
    """One layer: attention, then the MLP, each added to the stream behind a norm of its input."""

    def __init__(self, config: GPTConfig, layer: int, kernels: Kernels):
        super().__init__()
        self.attn = CausalSelfAttention(config, layer, kernels)
        self.mlp = ModalityMLP(config) if config.has_experts else MLP(config.n_embd, config.mlp_ratio)

    def forward(self, x, terms: LayerTerms, cos, sin, ve=None, kv_cache=None, plan=None, mask=None) -> torch.Tensor:
        """x [B, T, C] -> [B, T, C]; everything but x and terms as CausalSelfAttention takes it."""
        if terms.resid_lambda is not None:
            x = terms.resid_lambda * x + terms.x0_lambda * terms.x0
        if terms.bigrams is not None:
            x = x + terms.bigram_lambda * terms.bigrams

        x = x + self.attn(norm(x), cos, sin, ve, kv_cache, plan, mask)
        return x + (self.mlp(norm(x)) if plan is None else self.mlp(norm(x), plan))


SMEAR_CHANNELS = 24  # of the embedding, that the smear gate reads
# Start of the learned factors, as in nanochat; 0.1 for bigrams.
LAMBDAS = {"smear_lambda": 0.0, "resid_lambdas": 1.0, "x0_lambdas": 0.1, "backout_lambda": 0.2, "bigram_lambdas": 0.1}


class GPT(nn.Module):
    """Token ids in, softcapped logits or a loss out. Activations have `compute_dtype`, parameters stay float32."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.vocabulary = config.vocabulary
        self.compute_dtype = torch.float32
        self.route, self.row_multiple = "sort", 1  # how tokens get to their experts, see plan_route()
        self.kernels = Kernels()
        self.block_forward = Block.forward  # compile() replaces it

        blocks = nn.ModuleList(Block(config, layer, self.kernels) for layer in range(config.n_layer))
        self.transformer = nn.ModuleDict({"wte": nn.Embedding(self.table_size, config.n_embd), "h": blocks})
        if not config.tie_weights:
            self.lm_head = Linear(config.n_embd, self.table_size)
        if config.separate:
            sizes = {m.name: config.padded(m.size) for m in config.modalities}
            self.transformer["wtes"] = nn.ModuleDict({m: nn.Embedding(n, config.n_embd) for m, n in sizes.items()})
            if not config.tie_weights:
                self.lm_heads = nn.ModuleDict({m: Linear(config.n_embd, n) for m, n in sizes.items()})
        if config.use_output_projection:
            self.output_projection = Linear(config.n_embd, config.n_embd)

        kv_width = config.n_kv_head * config.head_dim
        layers = [layer for layer in range(config.n_layer) if config.has_value_embedding(layer)]
        if layers:
            rows = config.padded(self.vocabulary.size)
            self.value_embeds = nn.ModuleDict({str(i): nn.Embedding(rows, kv_width) for i in layers})
        if config.smear:
            self.smear_gate = Linear(min(SMEAR_CHANNELS, config.n_embd), 1)
            self.smear_lambda = nn.Parameter(torch.empty(1))
        if config.residual_scalars:
            self.resid_lambdas = nn.Parameter(torch.empty(config.n_layer))
            self.x0_lambdas = nn.Parameter(torch.empty(config.n_layer))
        if config.backout:
            self.backout_lambda = nn.Parameter(torch.empty(1))
        if config.bigram_rows:
            self.bigram_embed = nn.Embedding(config.bigram_rows, config.n_embd)
            self.bigram_lambdas = nn.Parameter(torch.empty(config.n_layer))

        self.rotary_length = 10 * config.sequence_len  # generation may run past the training context
        for name in ("cos", "sin", "expert_of_id", "head_of_id"):
            self.register_buffer(name, None, persistent=False)
        self.set_buffers()

    @torch.no_grad()
    def init_weights(self, tied_std: float = 0.02) -> None:
        """All initialisation in one place.

        | tensor | start |
        | wte, untied | N(0, 1): its rows are normalised after the lookup, only their direction counts |
        | wte, tied | N(0, tied_std): as the output matrix it makes logits of size tied_std sqrt(C) (dev/LOG.md) |
        | lm_head | N(0, 0.001): a nearly uniform first prediction |
        | matrices that read the stream | U(-s, s) with s = sqrt(3 / C), standard deviation 1 / sqrt(C) |
        | c_proj of attention and MLP, residual projection | 0: every block starts as the identity |
        | expert of another width | up_proj 0 for the same, so that c_proj must not be: U(-s, s) like down_proj |
        | value embeddings | like the values that they are added to; those of bigrams 0 |
        | gates | 0: half open |
        | lambdas | smear 0, residual 1 and 0.1 of x0, backout 0.2, as in nanochat; bigrams 0.1 |
        """
        C = self.config.n_embd
        bound = (3 / C) ** 0.5
        table_std = tied_std if self.config.tie_weights else 1.0

        nn.init.normal_(self.transformer.wte.weight, std=table_std)
        if not self.config.tie_weights:
            nn.init.normal_(self.lm_head.weight, std=0.001)

        for block in self.transformer.h:
            for matrix in (block.attn.c_q, block.attn.c_k, block.attn.c_v, block.mlp.c_fc):
                nn.init.uniform_(matrix.weight, -bound, bound)
            nn.init.zeros_(block.attn.c_proj.weight)
            nn.init.zeros_(block.mlp.c_proj.weight)

        if self.config.use_output_projection:
            spread = 0.0 if self.config.output_projection_residual else bound
            nn.init.uniform_(self.output_projection.weight, -spread, spread)

        for name, parameter in self.named_parameters():
            if name == "bigram_embed.weight":
                nn.init.zeros_(parameter)
            elif name.startswith("value_embeds."):
                nn.init.uniform_(parameter, -bound, bound)
            elif is_scalar(name):
                nn.init.constant_(parameter, LAMBDAS.get(name, 0.0))
            elif name.startswith(("transformer.wtes.", "lm_heads.")):
                nn.init.normal_(parameter, std=table_std if "wtes" in name else 0.001)
            elif ".experts." in name:
                owner, kind = name.removesuffix(".weight").rsplit(".", 1)
                narrow = isinstance(self.get_submodule(owner), NarrowMLP)
                spread = 0.0 if kind == ("up_proj" if narrow else "c_proj") else (3 / parameter.size(1)) ** 0.5
                nn.init.uniform_(parameter, -spread, spread)

        self.set_buffers()

    def set_buffers(self) -> None:
        """The buffers, which follow from the config alone."""
        self.expert_of_id = self.vocabulary.table(by_expert=True).to(self.device)
        self.head_of_id = self.vocabulary.table(by_expert=False).to(self.device)
        self.cos, self.sin = rotary_tables(self.rotary_length, self.config.head_dim, self.device, self.config.rope_base)

    @property
    def device(self) -> torch.device:
        return self.transformer.wte.weight.device

    def embed(self, idx: torch.Tensor, last: torch.Tensor | None = None) -> torch.Tensor:
        """idx int64 [B, T], the ids before them [B, 1] -> normalised embeddings [B, T, C], smeared if smear is on."""
        x = norm(self.lookup(idx))
        if not self.config.smear:
            return x

        last = None if last is None else norm(self.lookup(last))
        before = previous(x, last, idx, self.config.document_start, 0)
        gate = self.smear_gate(x[..., : self.smear_gate.in_features]).sigmoid()
        return x + self.smear_lambda.to(x.dtype) * gate * before

    def bigrams(self, idx: torch.Tensor, last: torch.Tensor | None = None) -> torch.Tensor:
        """idx int64 [B, T], the ids before them [B, 1] -> the rows [B, T, C] of the pairs that end at each token."""
        before = previous(idx, last, idx, self.config.document_start, -1)
        row = ((idx * 2654435761) ^ (before * 2246822519)) % self.config.bigram_rows  # multiplicative hashing (Knuth)
        return self.bigram_embed(row).to(self.compute_dtype)

    def features(self, idx: torch.Tensor, kv_cache=None) -> torch.Tensor:
        """idx int64 [B, T] -> [B, T, C], what the output matrix is multiplied with."""
        T = idx.size(1)
        positions = slice(T) if kv_cache is None else kv_cache.positions(T)
        cos, sin = self.cos[:, positions], self.sin[:, positions]
        assert cos.size(1) == T, f"{positions} is beyond the rotary table of {self.rotary_length} positions"

        last = None if kv_cache is None else kv_cache.last  # ids [B, 1] before idx
        x = x0 = self.embed(idx, last)
        bigrams = self.bigrams(idx, last) if self.config.bigram_rows else None

        begins = document_begins(idx, self.config.document_start, kv_cache)
        windows = map(self.config.window, range(self.config.n_layer))
        masks = document_masks(begins, windows, self.kernels.attention, cached=kv_cache is not None)
        plan = self.plan_experts(idx, kv_cache)

        # Only training runs compiled: evaluation and generation come in too many shapes.
        run = self.block_forward if torch.is_grad_enabled() else Block.forward
        for layer, block in enumerate(self.transformer.h):
            terms = self.layer_terms(layer, x0, bigrams)
            ve = self.value_embeds[str(layer)](idx).to(x.dtype) if self.config.has_value_embedding(layer) else None
            x = run(block, x, terms, cos, sin, ve, kv_cache, plan, masks[block.attn.window])
            if layer == self.config.n_layer // 2:
                middle = x

        if kv_cache is not None:
            kv_cache.advance(idx, begins)
        if self.config.backout:
            x = x - self.backout_lambda.to(x.dtype) * middle
        x = norm(x)
        if self.config.use_output_projection:
            projected = self.output_projection(x)
            x = x + projected if self.config.output_projection_residual else projected
        return x

    def plan_experts(self, idx: torch.Tensor, kv_cache) -> Plan | None:
        """How the tokens idx [B, T] get to their experts, the same in all layers; None: there are no experts."""
        if not self.config.has_experts:
            return None
        training = torch.is_grad_enabled()
        kind = self.route if training else getattr(kv_cache, "route", "sort")
        compiled = training and self.block_forward is not Block.forward
        return plan_route(kind, self.expert_of_id[idx], len(self.vocabulary.names), compiled, self.row_multiple)

    def layer_terms(self, layer: int, x0: torch.Tensor, bigrams: torch.Tensor | None) -> LayerTerms:
        scaled, paired = self.config.residual_scalars, bigrams is not None
        return LayerTerms(
            resid_lambda=self.resid_lambdas[layer] if scaled else None,
            x0_lambda=self.x0_lambdas[layer] if scaled else None,
            x0=x0,
            bigram_lambda=self.bigram_lambdas[layer] if paired else None,
            bigrams=bigrams,
        )

    def new_cache(self, batch: int, length: int) -> KVCache:
        return KVCache(self.config, batch, length, self.compute_dtype, self.device)

    def forward(
        self, idx: torch.Tensor, targets: torch.Tensor | None = None, kv_cache=None, loss_reduction: str = "mean"
    ) -> torch.Tensor:
        """idx int64 [B, T] -> float32 logits [B, T, V]; with targets [B, T] (-100: ignored) the cross-entropy in nats.

        V: all ids, text first. loss_reduction: "mean" over the valid targets (0 without any), "sum", "modalities" (the
        sum for each modality of targets, [E]), or "none" ([B, T], 0 where ignored).
        """
        x = self.features(idx, kv_cache)
        return self.logits(x) if targets is None else self.loss(x, targets, loss_reduction)

    def loss(self, x: torch.Tensor, targets: torch.Tensor, reduction: str) -> torch.Tensor:
        """Cross-entropy of features x [B, T, C] to targets [B, T], each within its output layer; as forward() says."""
        x, flat, softcap = x.flatten(0, 1), targets.flatten(), self.config.softcap
        parts, inverse = [(x, self.output_weight, flat)], None
        if self.config.modalities:
            parts, inverse = by_target(x, flat, self.head_of_id, self.output_weights())

        if reduction == "none":
            losses = torch.cat([token_losses(*part, softcap) for part in parts])
            if inverse is not None:  # ignored targets come behind all others
                losses = F.pad(losses, (0, len(flat) - len(losses)))[inverse]
            return losses.view_as(targets)

        kernel = self.kernels.loss_head
        sums = torch.stack([chunked_cross_entropy(*part, "sum", softcap, kernel) for part in parts])
        if reduction == "modalities":
            return sums
        return sums.sum() / (targets != IGNORED).sum().clamp(min=1) if reduction == "mean" else sums.sum()

    def count_targets(self, targets: torch.Tensor) -> torch.Tensor:
        """The number of valid targets [B, T] of each modality: int64 [E]."""
        return torch.bincount(self.head_of_id[targets[targets != IGNORED]], minlength=len(self.vocabulary.names))

    def loss_by_modality(self, loss: torch.Tensor, counts: torch.Tensor) -> dict[str, float]:
        """{"loss/audio": nats per target, ...} from a batch's parts of the mean loss [E]; {} for a text-only model."""
        parts = zip(self.vocabulary.names, (loss * counts.sum()).tolist(), counts.tolist(), strict=True)
        return {f"loss/{name}": part / n for name, part, n in parts if n} if self.config.modalities else {}

    def compile(self) -> None:
        """Compile one block, which all layers share, and the elementwise part of the loss: seconds, not minutes."""
        self.block_forward = torch.compile(Block.forward, dynamic=False)
        self.kernels.loss_head = compile_chunk_gradient()

    def uncompile(self) -> None:
        self.block_forward = Block.forward
        self.kernels.loss_head = chunk_gradient

    table_size = property(modality_tables.table_size)
    lookup = modality_tables.lookup
    output_weight = property(modality_tables.output_weight)
    output_weights = modality_tables.output_weights
    logits = modality_tables.logits
    text_logits = modality_tables.text_logits

    num_parameters = parameters.num_parameters
    num_matmul_parameters = parameters.num_matmul_parameters
    flops_per_token = parameters.flops_per_token
