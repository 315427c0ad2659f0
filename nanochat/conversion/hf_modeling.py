"""nanochat's GPT with its newer features, for transformers (tried with 5.0 to 5.24). It needs nothing else but torch.

`python -m scripts.export_hf` copies this file beside the weights of a model that transformers' own NanoChat cannot
express. It runs only for a caller who passes trust_remote_code=True. The parameters have nanochat's names.

Generation with the cache of keys and values rests on an agreement with transformers that its releases change (5.24
renamed the argument `past_key_values` to `cache`). What a release does that this file does not understand is refused:
every argument is known by name, and at every step the cache and the ids given must add up to the text so far.
`python -m scripts.export_hf --refresh FOLDER` brings the newest version of this file.

Classic NanoChat is: rotary positions, QK norm, ReLU^2, RMSNorm without parameters also right after the embedding, no
biases, softcapped logits. Each field of the configuration with a default of "off" adds one feature to that.

Shapes: B batch, T new tokens, S tokens with those of the cache, C channels, H heads, D head size, V vocabulary.
"""

from typing import ClassVar

import torch
import torch.nn as nn
import torch.nn.functional as F
from transformers import DynamicCache, GenerationMixin, PreTrainedModel, __version__
from transformers.cache_utils import Cache, DynamicLayer
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_outputs import CausalLMOutputWithPast

SMEAR_CHANNELS = 24  # that the smear gate reads
# config.json names model_type "nanochat", so that a tokenizer is loaded without a question about code. A caller who
# does not trust this file would then get transformers' own NanoChat, another function: an activation of this name,
# which does not exist, ends that in an error.
NEEDS_CODE = "none: this model runs by the code beside it, load it with trust_remote_code=True"
LOSS_ARGUMENTS = ("num_items_in_batch", "ignore_index", "shift_labels")
# Passed by transformers or its tokenizers, without effect on the logits: positions follow from the cache and the mask.
IDLE_ARGUMENTS = ("return_dict", "output_attentions", "output_hidden_states", "cache_position", "token_type_ids")
CACHE_FIELDS = [name for name in ("cache", "past_key_values") if name in CausalLMOutputWithPast.__dataclass_fields__]


def misunderstood(what: str) -> ValueError:
    return ValueError(
        f"{what}: transformers {__version__} generates in a way that hf_modeling.py does not understand, and the text "
        "would be wrong. Take a newer hf_modeling.py (python -m scripts.export_hf --refresh FOLDER), a release of "
        "transformers from 5.0 to 5.24, or use_cache=False"
    )


if not CACHE_FIELDS:
    raise misunderstood("CausalLMOutputWithPast has no field for the cache")


class ModernNanoChatConfig(PreTrainedConfig):
    """The fields of nanochat's GPTConfig by their own names, but tie_weights, which is tie_word_embeddings here.

    mlp_ratio: hidden units of an MLP over its width. window_pattern: tiled over the layers; L sees all
    that came before, and so does the last layer, S short_window tokens and itself. use_output_projection: logits come
    from P x (with output_projection_residual x + P x). value_embeddings: every other layer, the last included, adds
    value_gate_range * sigmoid(W x[:value_gate_channels]) times an embedding of the token to its values. smear: an
    embedding adds that of the token before, gated. residual_scalars: before each block x is lambda x + lambda0 x0.
    backout: lambda times the middle block's output is taken off before the last norm. document_start: the id that
    begins a document; set, no token sees what came before its document.
    """

    model_type = "nanochat"
    keys_to_ignore_at_inference: ClassVar = ["past_key_values", "cache"]
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
        document_start: int | None = None,
        use_output_projection: bool = False,
        output_projection_residual: bool = False,
        value_embeddings: bool = False,
        value_gate_channels: int = 12,
        value_gate_range: float = 3.0,
        smear: bool = False,
        residual_scalars: bool = False,
        backout: bool = False,
        bigram_rows: int = 0,
        use_cache: bool = True,
        tie_word_embeddings: bool = False,
        hidden_act: str = NEEDS_CODE,
        **kwargs,
    ):
        self.sequence_len, self.vocab_size = sequence_len, vocab_size
        self.n_layer, self.n_head, self.n_kv_head, self.n_embd = n_layer, n_head, n_kv_head, n_embd
        self.mlp_ratio, self.rope_base, self.qk_scale, self.softcap = mlp_ratio, rope_base, qk_scale, softcap
        self.window_pattern, self.short_window = window_pattern, short_window
        self.document_start = document_start
        self.use_output_projection = use_output_projection
        self.output_projection_residual = output_projection_residual
        self.value_embeddings = value_embeddings
        self.value_gate_channels, self.value_gate_range = value_gate_channels, value_gate_range
        self.smear, self.residual_scalars, self.backout = smear, residual_scalars, backout
        self.bigram_rows = bigram_rows
        self.use_cache, self.hidden_act = use_cache, hidden_act
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
        mask = masks[self.window]
        if cache is not None:
            k, v = cache.update(k, v, self.layer)
        if k.size(2) != mask.size(3):  # a mask of one column would be spread over all keys
            raise misunderstood(f"layer {self.layer} has the keys of {k.size(2)} tokens, the text has {mask.size(3)}")
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=q.size(1) != k.size(1))
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
    _skip_keys_device_placement: ClassVar = ["past_key_values", "cache"]
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
        if config.bigram_rows:
            self.bigram_embed = nn.Embedding(config.bigram_rows, C)
            self.bigram_lambdas = nn.Parameter(torch.zeros(config.n_layer))
        features = dict(starts=config.document_start is not None, smear=config.smear, ids=config.bigram_rows)
        # What the cache keeps besides keys and values, in this order.
        self.kept = [name for name, on in features.items() if on]
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.transformer.wte

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def remembered(self, x: torch.Tensor, cache: DynamicCache | None, name: str) -> torch.Tensor:
        """x [B, T, F] behind that of the tokens in the cache: [B, S, F].

        The cache keeps x as the keys of one more layer for each name, so that whatever reorders, repeats or crops it
        does the same to x.
        """
        if cache is None:
            return x
        layer = self.config.n_layer + self.kept.index(name)
        if len(cache.layers) == layer:  # made for as many layers as the configuration has
            cache.layers.append(DynamicLayer())
        whole = cache.update(x[:, None], x[:, None, :, :0], layer)[0][:, 0]
        if whole.size(1) != (length := cache.get_seq_length() + x.size(1)):  # the blocks have not added theirs yet
            raise misunderstood(f"the cache holds {name} of {whole.size(1)} tokens, the text has {length}")
        return whole

    def begins(self, starts: torch.Tensor, cache: DynamicCache | None) -> torch.Tensor:
        """starts bool [B, T], where documents begin -> int64 [B, T], where that of each token did."""
        whole = self.remembered(starts[..., None].float(), cache, "starts")[..., 0].bool()
        place = torch.arange(whole.size(1), device=whole.device)
        return torch.where(whole, place, 0).cummax(dim=1).values[:, -starts.size(1) :]

    def before(self, x, real, starts, cache: DynamicCache | None, name: str) -> torch.Tensor:
        """What of x [B, T, F] stands one position before, 0 where nothing does or another document; real: bool [B, S],
        False at padding; starts: bool [B, T].
        """
        whole = self.remembered(x, cache, name) * real[..., None]
        before = torch.cat([torch.zeros_like(x[:, :1]), whole], dim=1)[:, -x.size(1) - 1 : -1]
        return before.masked_fill(starts[..., None], 0)

    def bigrams(self, ids: torch.Tensor, real, starts, cache: DynamicCache | None) -> torch.Tensor:
        """ids int64 [B, T] -> the rows [B, T, C] of the pairs that end at each token; nothing before counts as -1."""
        before = self.before((ids[..., None] + 1).float(), real, starts, cache, "ids")[..., 0].long() - 1
        return self.bigram_embed(((ids * 2654435761) ^ (before * 2246822519)) % self.config.bigram_rows)

    def generate(self, *args, **kwargs):
        """transformers' own; a cache that is given starts another text."""
        for value in kwargs.values():
            if isinstance(value, Cache):
                vars(value).pop("nanochat_text", None)
        return super().generate(*args, **kwargs)

    def prepare_inputs_for_generation(self, input_ids, **kwargs) -> dict:
        """forward's arguments for the next step of the texts input_ids [B, L], by transformers' own function.

        The cache is found by its type, whatever its name. ValueError: with it the model would see fewer tokens than the
        text has, or some twice.
        """
        inputs = super().prepare_inputs_for_generation(input_ids, **kwargs)
        caches = {name: value for name, value in inputs.items() if isinstance(value, Cache)}
        if len(caches) > 1:
            raise misunderstood(f"several caches are given ({', '.join(caches)})")
        cache = next(iter(caches.values()), None)
        seen = inputs["input_ids"].size(1) + (0 if cache is None else cache.get_seq_length())
        length = input_ids.size(1)
        extra = seen - length
        # extra > 0: before input_ids came another text, of `extra` tokens. It stays as long while this one grows.
        first, longest = getattr(cache, "nanochat_text", (extra, 0))
        if extra < 0 or (length > longest and extra != first):
            raise misunderstood(f"the model would see {seen} tokens, the text has {length}")
        if cache is not None:
            cache.nanochat_text = first, max(longest, length)
        return {name: value for name, value in inputs.items() if name not in caches} | dict(past_key_values=cache)

    def checked_cache(self, cache, past_key_values, use_cache: bool | None, kwargs: dict) -> DynamicCache | None:
        """The cache to use, a new one where none is given and one is wanted."""
        for name, value in kwargs.items():
            if value is not None and value is not False and name not in (*LOSS_ARGUMENTS, *IDLE_ARGUMENTS):
                raise misunderstood(f"the argument {name} is unknown")
        if cache is not None and past_key_values is not None:
            raise ValueError("cache and past_key_values are two names of one argument: give one of them")
        cache = past_key_values if cache is None else cache
        if cache is None and (self.config.use_cache if use_cache is None else use_cache) and not self.training:
            cache = DynamicCache()
        if cache is not None and not isinstance(cache, DynamicCache):
            raise ValueError(f"the cache is a {type(cache).__name__}: only a DynamicCache will do")
        return cache

    def masks(self, real: torch.Tensor, past: int, begins: torch.Tensor | None) -> dict:
        """real bool [B, S], begins int64 [B, T] or None -> for each window of the layers what a token sees, bool
        [B, 1, T, S].
        """
        S, config = real.size(1), self.config
        new, old = torch.arange(past, S, device=real.device)[:, None], torch.arange(S, device=real.device)
        masks = {}
        for window in {config.window(layer) for layer in range(config.n_layer)}:
            seen = (old <= new) if window is None else (old <= new) & (old >= new - window)
            seen = seen & real[:, None]
            if begins is not None:
                seen = seen & (old >= begins[..., None])
            masks[window] = (seen | (old == new))[:, None]  # padding sees itself: a softmax over nothing is no number
        return masks

    def rotations(self, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """position_ids int64 [1 or B, T] -> cosines and sines, float32 [1 or B, T, 1, D/2]."""
        D = self.config.n_embd // self.config.n_head
        steps = torch.arange(0, D, 2, dtype=torch.float32, device=position_ids.device)
        angles = position_ids[..., None, None].float() * (1.0 / self.config.rope_base ** (steps / D))
        return angles.cos(), angles.sin()

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: DynamicCache | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        cache: DynamicCache | None = None,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """input_ids int64 [B, T] -> float32 logits [B, T, V], of the last logits_to_keep positions where that is not 0.

        attention_mask [B, S]: 0 where a row is padded, at either end. position_ids [B, T] default to those behind the
        cache; only their differences count. cache, past_key_values: names of one argument. kwargs go to the loss.
        ValueError: another mask, another kind of cache, or an argument that this file does not know.
        """
        (B, T), config, device = input_ids.shape, self.config, input_ids.device
        cache = self.checked_cache(cache, past_key_values, use_cache, kwargs)
        past = 0 if cache is None else cache.get_seq_length()
        if cache is not None and past == 0:
            cache.nanochat_text = 0, T
        if attention_mask is None:
            attention_mask = torch.ones(B, past + T, dtype=torch.bool, device=device)
        if attention_mask.shape != (B, past + T):
            raise ValueError(f"attention_mask has shape {list(attention_mask.shape)}: give [batch, all tokens]")
        if position_ids is None:
            position_ids = torch.arange(past, past + T, device=device)[None]
        if position_ids.size(-1) != T:
            raise ValueError(f"position_ids has shape {list(position_ids.shape)}: give [batch, new tokens]")
        real = attention_mask.bool()
        starts, begins = torch.zeros_like(input_ids, dtype=torch.bool), None
        if config.document_start is not None:
            starts = (input_ids == config.document_start) & real[:, past:]
            begins = self.begins(starts, cache)
        masks = self.masks(real, past, begins)
        cos, sin = self.rotations(position_ids)

        x = norm(self.transformer.wte(input_ids))
        if config.smear:
            gate = self.smear_gate(x[..., : self.smear_gate.in_features]).sigmoid()
            x = x + self.smear_lambda * gate * self.before(x, real, starts, cache, "smear")
        x0 = x
        if config.bigram_rows:
            pairs = self.bigrams(input_ids, real, starts, cache)
        for layer, block in enumerate(self.transformer.h):
            ve = self.value_embeds[str(layer)](input_ids) if config.has_value_embedding(layer) else None
            if config.residual_scalars:
                x = self.resid_lambdas[layer] * x + self.x0_lambdas[layer] * x0
            if config.bigram_rows:
                x = x + self.bigram_lambdas[layer] * pairs
            x = block(x, cos, sin, masks, ve, cache)
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
        loss = None
        if labels is not None:
            counted = {name: value for name, value in kwargs.items() if name in LOSS_ARGUMENTS}
            loss = self.loss_function(logits, labels, config.vocab_size, **counted)
        return CausalLMOutputWithPast(loss=loss, logits=logits, **{CACHE_FIELDS[0]: cache})
