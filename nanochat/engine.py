"""Generation with a cache of keys and values: a prompt is read once, then every token costs one position."""

import torch

from nanochat.gpt import GPT, sample


class KVCache:
    """Keys and values of every layer, [B, S, H_kv, D] each, S growing up to `length`; `position` tokens are filled."""

    def __init__(self, model: GPT, batch: int, length: int):
        config = model.config
        shape = (config.n_layer, 2, batch, length, config.n_kv_head, config.head_dim)
        self.store = torch.empty(shape, dtype=model.compute_dtype, device=model.device)
        self.position = 0
        self.last: torch.Tensor | None = None  # embedding [B, 1, C] of the newest token, where the model smears

    def insert(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Store k and v [B, T, H_kv, D] behind the filled positions; returns all up to and including them.

        The position itself moves once per forward, in GPT.features, after the last layer.
        """
        end = self.position + k.size(1)
        assert end <= self.store.size(3), f"cache of {self.store.size(3)} positions is full"
        self.store[layer, 0, :, self.position : end] = k
        self.store[layer, 1, :, self.position : end] = v
        return self.store[layer, 0, :, :end], self.store[layer, 1, :, :end]

    def repeated(self, batch: int) -> "KVCache":
        """A copy of this cache of one row for `batch` rows: one prompt, several continuations."""
        other = object.__new__(KVCache)
        other.store, other.position = self.store.repeat(1, 1, batch, 1, 1, 1), self.position
        other.last = self.last if self.last is None else self.last.repeat(batch, 1, 1)
        return other


@torch.inference_mode()
def generate(
    model: GPT,
    ids: list[int],
    max_tokens: int,
    *,
    num_samples: int = 1,
    temperature: float = 1.0,
    top_k: int | None = None,
    seed: int = 42,
    stop: tuple[int, ...] = (),
) -> list[list[int]]:
    """Continue a prompt: the new ids of each sample, up to and without the first id in `stop`.

    ids: the prompt, not empty. temperature 0 is greedy. The prompt with max_tokens has to fit the rotary table,
    10 times the training context.
    """
    generator = torch.Generator(device=model.device).manual_seed(seed)
    cache = KVCache(model, 1, len(ids) + max_tokens)
    logits = model(torch.tensor([ids], dtype=torch.long, device=model.device), kv_cache=cache)[:, -1]
    cache, logits = cache.repeated(num_samples), logits.repeat(num_samples, 1)
    samples: list[list[int]] = [[] for _ in range(num_samples)]
    running = [True] * num_samples
    for step in range(max_tokens):
        tokens = sample(logits, generator, temperature, top_k)
        for row, token in enumerate(tokens[:, 0].tolist()):
            running[row] = running[row] and token not in stop
            if running[row]:
                samples[row].append(token)
        if not any(running) or step == max_tokens - 1:
            break
        logits = model(tokens, kv_cache=cache)[:, -1]
    return samples
