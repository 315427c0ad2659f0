"""The plain path that the benchmarks measure against: torch's fused attention, all logits at once, one compiled whole.

The same parameters under the same names, so weights, gradients and optimizer are those of GPT. Text only.
`python -m scripts.bench.plain` is scripts.base_train with it.
"""

import torch
import torch.nn.functional as F

from nanochat.gpt import GPT, CausalSelfAttention, GPTConfig
from nanochat.runtime import run_script
from nanochat.system.environment import import_compiler


class PlainAttention(CausalSelfAttention):
    def attend(self, q, k, v, kv_cache, mask) -> torch.Tensor:
        """As CausalSelfAttention.attend(); generation takes GPT's way."""
        if kv_cache is not None:
            return super().attend(q, k, v, kv_cache, mask)
        assert mask is None, "the plain path knows no documents"
        T = q.size(1)
        if self.window is not None:
            mask = torch.ones(T, T, dtype=torch.bool, device=q.device).tril().triu(-self.window)
        y = F.scaled_dot_product_attention(
            *(z.transpose(1, 2) for z in (q, k, v)), mask, is_causal=mask is None, enable_gqa=q.size(2) != k.size(2)
        )
        return y.transpose(1, 2)


class PlainGPT(GPT):
    """GPT as one writes it first, in training; without gradients it is GPT, but for its attention."""

    def __init__(self, config: GPTConfig):
        assert not config.modalities, "the plain path knows text only"
        super().__init__(config)
        for layer, block in enumerate(self.transformer.h):
            block.attn = PlainAttention(config, layer, self.kernels)
        self.run = PlainGPT.loss_sum

    def loss_sum(self, idx: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """idx, targets int64 [B, T] -> the sum of the cross-entropies in nats."""
        x = self.features(idx).flatten(0, 1)
        logits = F.linear(x, self.output_weight.to(x.dtype)).float()
        capped = self.config.softcap * torch.tanh(logits / self.config.softcap)
        return F.cross_entropy(capped, targets.flatten(), reduction="sum")

    def forward(self, idx: torch.Tensor, targets=None, kv_cache=None, loss_reduction: str = "mean") -> torch.Tensor:
        """The loss as GPT.forward gives it; "modalities" is the sum for the one that there is, [1]."""
        if not torch.is_grad_enabled():
            return super().forward(idx, targets, kv_cache, loss_reduction)
        total = self.run(self, idx, targets)
        if loss_reduction == "modalities":
            return total[None]
        return total / (targets >= 0).sum().clamp(min=1) if loss_reduction == "mean" else total

    def compile(self) -> None:
        import_compiler()
        self.run = torch.compile(PlainGPT.loss_sum, dynamic=False)

    def uncompile(self) -> None:
        self.run = PlainGPT.loss_sum


if __name__ == "__main__":
    from scripts import base_train

    base_train.GPT = PlainGPT
    run_script(base_train.main)
