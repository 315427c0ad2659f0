"""nanochat's GPT with its newer features, for transformers (5.0 or later). It needs nothing else but torch.

`python -m scripts.export_hf` copies this file beside the weights of a model that transformers' own NanoChat cannot
express. It runs only for a caller who passes trust_remote_code=True. The parameters have nanochat's names.

Classic NanoChat is: rotary positions, QK norm, ReLU^2, RMSNorm without parameters also right after the embedding, no
biases, softcapped logits. Each field of the configuration with a default of "off" adds one feature to that.

Shapes: B batch, T new tokens, S tokens with those of the cache, C channels, H heads, D head size, V vocabulary.
"""

from typing import ClassVar

import torch
import torch.nn as nn
import torch.nn.functional as F
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_outputs import CausalLMOutputWithPast

SMEAR_CHANNELS = 24  # that the smear gate reads


class ModernNanoChatConfig(PreTrainedConfig):
    """The fields of nanochat's GPTConfig by their own names, but tie_weights, which is tie_word_embeddings here.

    mlp_ratio: hidden units of an MLP over its width. window_pattern: a letter a layer, again and again; L sees all
    that came before, and so does the last layer, S short_window tokens and itself. use_output_projection: logits come
    from P x (with output_projection_residual x + P x). value_embeddings: every other layer, the last included, adds
    value_gate_range * sigmoid(W x[:value_gate_channels]) times an embedding of the token to its values. smear: an
    embedding adds that of the token before, gated. residual_scalars: before each block x is lambda x + lambda0 x0.
    backout: lambda times the middle block's output is taken off before the last norm.
    """

    model_type = "nanochat_modern"
    keys_to_ignore_at_inference: ClassVar = ["past_key_values"]
    attribute_map: ClassVar = {
        "hidden_size": "n_embd",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "num_key_value_heads": "n_kv_head",
        "max_position_embeddings": "sequence_len",
    }

    def __init__(
        self,
        sequence_len: int = 1024,
        vocab_size: int = 50304,
        n_layer: int = 12,
        n_head: int = 6,
        n_kv_head: int = 6,
        n_embd: int = 768,
        mlp_ratio: float = 4.0,
        rope_base: float = 10000.0,
        qk_scale: float = 1.0,
        softcap: float = 15.0,
        window_pattern: str = "L",
        short_window: int = 1024,
        use_output_projection: bool = False,
        output_projection_residual: bool = False,
        value_embeddings: bool = False,
        value_gate_channels: int = 12,
        value_gate_range: float = 3.0,
        smear: bool = False,
        residual_scalars: bool = False,
        backout: bool = False,
        use_cache: bool = True,
        tie_word_embeddings: bool = False,
        **kwargs,
    ):
        self.sequence_len, self.vocab_size = sequence_len, vocab_size
        self.n_layer, self.n_head, self.n_kv_head, self.n_embd = n_layer, n_head, n_kv_head, n_embd
        self.mlp_ratio, self.rope_base, self.qk_scale, self.softcap = mlp_ratio, rope_base, qk_scale, softcap
        self.window_pattern, self.short_window = window_pattern, short_window
        self.use_output_projection = use_output_projection
        self.output_projection_residual = output_projection_residual
        self.value_embeddings = value_embeddings
        self.value_gate_channels, self.value_gate_range = value_gate_channels, value_gate_range
        self.smear, self.residual_scalars, self.backout = smear, residual_scalars, backout
        self.use_cache = use_cache
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)

    def has_value_embedding(self, layer: int) -> bool:
        return self.value_embeddings and (self.n_layer - 1 - layer) % 2 == 0

    def window(self, layer: int) -> int | None:
        """How many tokens before a token the layer sees; None: all."""
        short = self.window_pattern[layer % len(self.window_pattern)] == "S" and layer < self.n_layer - 1
        return self.short_window if short else None


def norm(x: torch.Tensor) -> torch.Tensor:
    """RMSNorm without learnable parameters; its epsilon is that of the dtype."""
    return F.rms_norm(x, (x.size(-1),))


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn the pairs (x[d], x[d + D/2]) of [B, T, H, D] by the angle of their position, in float32."""
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat([first * cos + second * sin, second * cos - first * sin], dim=-1)


def linear(fan_in: int, fan_out: int) -> nn.Linear:
    return nn.Linear(fan_in, fan_out, bias=False)


class Attention(nn.Module):
    def __init__(self, config: ModernNanoChatConfig, layer: int):
        super().__init__()
        self.layer, self.head_dim, self.window = layer, config.n_embd // config.n_head, config.window(layer)
        self.qk_scale, self.gate_range = config.qk_scale, config.value_gate_range
        kv_width = config.n_kv_head * self.head_dim
        self.c_q, self.c_proj = linear(config.n_embd, config.n_embd), linear(config.n_embd, config.n_embd)
        self.c_k, self.c_v = linear(config.n_embd, kv_width), linear(config.n_embd, kv_width)
        if config.has_value_embedding(layer):
            self.ve_gate = linear(min(config.value_gate_channels, config.n_embd), config.n_kv_head)

    def forward(self, x, cos, sin, masks, ve, cache) -> torch.Tensor:
        """x [B, T, C], masks {window: bool [B, 1, T, S]}, ve [B, T, H_kv D] or None -> [B, T, C]."""
        B, T, C = x.shape
        q, k, v = (matrix(x).view(B, T, -1, self.head_dim) for matrix in (self.c_q, self.c_k, self.c_v))
        if ve is not None:
            gate = self.gate_range * self.ve_gate(x[..., : self.ve_gate.in_features]).sigmoid()
            v = v + gate[..., None] * ve.view(v.shape)
        q, k = ((norm(rotate(z, cos, sin)) * self.qk_scale).to(x.dtype) for z in (q, k))
        q, k, v = (z.transpose(1, 2) for z in (q, k, v))
        if cache is not None:
            k, v = cache.update(k, v, self.layer)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=masks[self.window], enable_gqa=q.size(1) != k.size(1))
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    def __init__(self, config: ModernNanoChatConfig):
        super().__init__()
        hidden = round(config.mlp_ratio * config.n_embd)
        self.c_fc, self.c_proj = linear(config.n_embd, hidden), linear(hidden, config.n_embd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c_proj(F.relu(self.c_fc(x)).square())


class Block(nn.Module):
    def __init__(self, config: ModernNanoChatConfig, layer: int):
        super().__init__()
        self.attn, self.mlp = Attention(config, layer), MLP(config)

    def forward(self, x, *context) -> torch.Tensor:
        x = x + self.attn(norm(x), *context)
        return x + self.mlp(norm(x))


class ModernNanoChatForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = ModernNanoChatConfig
    _tied_weights_keys: ClassVar = {"lm_head.weight": "transformer.wte.weight"}
    _no_split_modules: ClassVar = ["Block"]
    _supports_sdpa = True

    def __init__(self, config: ModernNanoChatConfig):
        super().__init__(config)
        C, kv_width = config.n_embd, config.n_kv_head * config.n_embd // config.n_head
        blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.transformer = nn.ModuleDict({"wte": nn.Embedding(config.vocab_size, C), "h": blocks})
        self.lm_head = linear(C, config.vocab_size)
        if config.use_output_projection:
            self.output_projection = linear(C, C)
        layers = [layer for layer in range(config.n_layer) if config.has_value_embedding(layer)]
        if layers:
            self.value_embeds = nn.ModuleDict({str(i): nn.Embedding(config.vocab_size, kv_width) for i in layers})
        if config.smear:
            self.smear_gate = linear(min(SMEAR_CHANNELS, C), 1)
            self.smear_lambda = nn.Parameter(torch.zeros(1))
        if config.residual_scalars:
            self.resid_lambdas = nn.Parameter(torch.ones(config.n_layer))
            self.x0_lambdas = nn.Parameter(torch.zeros(config.n_layer))
        if config.backout:
            self.backout_lambda = nn.Parameter(torch.zeros(1))
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.transformer.wte

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def smeared(self, x: torch.Tensor, real: torch.Tensor, cache: DynamicCache | None) -> torch.Tensor:
        """Embeddings x [B, T, C] plus, gated, those of the tokens before; real: bool [B, S], False where padding is.

        The cache keeps the embeddings as the keys of one layer more, so that whatever reorders, repeats or crops it
        does the same to them.
        """
        T, whole = x.size(1), x
        if cache is not None:
            layer = self.config.n_layer
            if len(cache.layers) == layer:  # made for as many layers as the configuration has
                cache.layers.append(DynamicLayer())
            whole = cache.update(x[:, None], x[:, None, :, :0], layer)[0][:, 0]
        before = torch.cat([torch.zeros_like(x[:, :1]), whole * real[..., None]], dim=1)[:, -T - 1 : -1]
        gate = self.smear_gate(x[..., : self.smear_gate.in_features]).sigmoid()
        return x + self.smear_lambda * gate * before

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: DynamicCache | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """input_ids int64 [B, T] -> float32 logits [B, T, V], of the last logits_to_keep positions where that is not 0.

        attention_mask [B, S]: 0 where a row is padded, at either end. position_ids [B, T] default to those behind the
        cache; only their differences count. kwargs go to the loss. ValueError: another mask, or another kind of cache.
        """
        (B, T), config, device = input_ids.shape, self.config, input_ids.device
        if past_key_values is None and (config.use_cache if use_cache is None else use_cache) and not self.training:
            past_key_values = DynamicCache()
        if past_key_values is not None and not isinstance(past_key_values, DynamicCache):
            raise ValueError(f"past_key_values is a {type(past_key_values).__name__}: only a DynamicCache will do")
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        S = past + T
        if attention_mask is None:
            attention_mask = torch.ones(B, S, dtype=torch.bool, device=device)
        if attention_mask.shape != (B, S):
            raise ValueError(f"attention_mask has shape {list(attention_mask.shape)}: give [batch, all tokens]")
        real = attention_mask.bool()
        new, old = torch.arange(past, S, device=device)[:, None], torch.arange(S, device=device)
        masks = {}
        for window in {config.window(layer) for layer in range(config.n_layer)}:
            seen = (old <= new) if window is None else (old <= new) & (old >= new - window)
            # Padding sees itself, for a softmax over nothing is no number.
            masks[window] = ((seen & real[:, None]) | (old == new))[:, None]
        if position_ids is None:
            position_ids = torch.arange(past, S, device=device)[None]
        D = config.n_embd // config.n_head
        frequencies = config.rope_base ** -(torch.arange(0, D, 2, dtype=torch.float32, device=device) / D)
        angles = position_ids[..., None, None].float() * frequencies
        cos, sin = angles.cos(), angles.sin()

        x = norm(self.transformer.wte(input_ids))
        if config.smear:
            x = self.smeared(x, real, past_key_values)
        x0 = x
        for layer, block in enumerate(self.transformer.h):
            ve = self.value_embeds[str(layer)](input_ids) if config.has_value_embedding(layer) else None
            if config.residual_scalars:
                x = self.resid_lambdas[layer] * x + self.x0_lambdas[layer] * x0
            x = block(x, cos, sin, masks, ve, past_key_values)
            if layer == config.n_layer // 2:
                middle = x
        if config.backout:
            x = x - self.backout_lambda * middle
        x = norm(x)
        if config.use_output_projection:
            projected = self.output_projection(x)
            x = x + projected if config.output_projection_residual else projected
        x = x[:, -logits_to_keep:] if isinstance(logits_to_keep, int) else x[:, logits_to_keep]
        logits = config.softcap * torch.tanh(self.lm_head(x).float() / config.softcap)
        loss = None if labels is None else self.loss_function(logits, labels, config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values)
