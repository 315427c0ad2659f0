"""KV cache that grows with the tokens: prefill a prompt once, then every token costs one position."""

import torch

from nanochat.model.attention import sdpa


class KVCache:
    """Keys and values of every layer, [B, S, H_kv, D] each, S growing up to `length`; `position` tokens are filled."""

    def __init__(self, config, batch: int, length: int, dtype: torch.dtype, device: torch.device):
        shape = (config.n_layer, 2, batch, length, config.n_kv_head, config.head_dim)
        self.store = torch.empty(shape, dtype=dtype, device=device)
        self.position = 0
        self.last: torch.Tensor | None = None  # ids [B, 1] of the newest token
        self.document_begin = torch.zeros(
            batch, 1, dtype=torch.long, device=device
        )  # position where its document began

    def insert(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Store k and v [B, T, H_kv, D] behind the filled positions; returns all up to and including them.

        advance() moves the position, once per forward.
        """
        end = self.position + k.size(1)
        assert end <= self.store.size(3), f"cache of {self.store.size(3)} positions is full"
        self.store[layer, 0, :, self.position : end] = k
        self.store[layer, 1, :, self.position : end] = v
        return self.store[layer, 0, :, :end], self.store[layer, 1, :, :end]

    def positions(self, count: int) -> slice:
        """Positions of the next `count` tokens."""
        return slice(self.position, self.position + count)

    def advance(self, ids: torch.Tensor, begins: torch.Tensor | None) -> None:
        """All layers have seen the tokens ids [B, T], whose documents begin at begins [B, T]."""
        self.position += ids.size(1)
        self.last = ids[:, -1:]
        if begins is not None:
            self.document_begin = begins[:, -1:]

    def attend(self, layer: int, q, k, v, window: int | None, mask: torch.Tensor | None) -> torch.Tensor:
        """q [B, T, H, D] to all positions so far, of which the newest have k and v [B, T, H_kv, D] -> [B, T, H, D]."""
        return sdpa(q, *self.insert(layer, k, v), window, mask)

    def repeated(self, batch: int) -> "KVCache":
        """A copy of this cache of one row for `batch` rows: one prompt, several continuations."""
        other = object.__new__(KVCache)
        other.store, other.position = self.store.repeat(1, 1, batch, 1, 1, 1), self.position
        other.last = self.last if self.last is None else self.last.repeat(batch, 1)
        other.document_begin = self.document_begin.repeat(batch, 1)
        return other
