"""Embedding and output tables of a GPT: one pair for all ids, or one for each modality (output_layers = "separate").

Methods of GPT, which creates the tables: transformer.wte and lm_head hold all ids, or with separate tables those of the
text; transformer.wtes and lm_heads then hold one table for each further modality. In a tied model the embeddings are
the output matrices.
"""

import torch
import torch.nn.functional as F

from nanochat.model.cpu_attention import upcast
from nanochat.model.loss_head import softcapped


def table_size(model) -> int:
    """Rows of wte and lm_head: all ids, or those of the text where each modality has tables of its own."""
    config = model.config
    return config.padded(config.vocab_size if config.separate else model.vocabulary.size)


def lookup(model, idx: torch.Tensor) -> torch.Tensor:
    """Embedding rows of idx int64 [B, T] -> [B, T, C] in compute_dtype."""
    tables, config = model.transformer, model.config
    if not config.separate:
        return tables.wte(idx).to(model.compute_dtype)

    x = tables.wte(idx.clamp(max=config.vocab_size - 1))
    for name, (first, end) in zip(model.vocabulary.names[1:], model.vocabulary.ranges[1:], strict=True):
        rows = tables.wtes[name]((idx - first).clamp(0, end - first - 1))
        x = torch.where(((idx >= first) & (idx < end))[..., None], rows, x)
    return x.to(model.compute_dtype)


def output_weight(model) -> torch.Tensor:
    """The matrix [V, C] that makes the logits: of all ids, or of the text where each modality has its own."""
    table = model.transformer.wte if model.config.tie_weights else model.lm_head
    return table.weight[: model.config.vocab_size if model.config.separate else model.vocabulary.size]


def output_weights(model) -> list[tuple[int, torch.Tensor]]:
    """(first id, matrix) of each modality's softmax, in the order of the ids."""
    config, ranges, weight = model.config, model.vocabulary.ranges, output_weight(model)
    if config.separate:
        tables = model.transformer.wtes if config.tie_weights else model.lm_heads
        weights = (weight, *(tables[m.name].weight[: m.size] for m in config.modalities))
        return [(first, w) for (first, _), w in zip(ranges, weights, strict=True)]
    if config.output_layers == "masked":
        return [(first, weight[first:end]) for first, end in ranges]
    return [(0, weight)] * len(ranges)


def logits(model, features: torch.Tensor, product=F.linear) -> torch.Tensor:
    """features [..., C] of any positions -> softcapped float32 logits of all ids [..., V]."""
    weights = [w for _, w in output_weights(model)] if model.config.separate else [output_weight(model)]
    parts = [upcast(product(features, weight.to(features.dtype))) for weight in weights]
    return softcapped(torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0], model.config.softcap)


def text_logits(model, features: torch.Tensor) -> torch.Tensor:
    """logits() of the ids that a text target competes with in the loss: all of them in a shared softmax."""
    found = model.logits(features)
    return found if model.config.output_layers == "shared" else found[..., : model.config.vocab_size]
