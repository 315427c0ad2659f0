"""Tiny random language models in transformers' own format on disk: hosts for the tests of hosts, adapters, scripts."""

from pathlib import Path

import torch

BOS, EOS = "<|begin_of_text|>", "<|end_of_text|>"


def tiny_tokenizer(folder: Path | str, bos: bool = True) -> int:
    """Save a fast byte-level tokenizer of 256 bytes, 6 merges and two special tokens (Qwen's have no bos).

    Returns its number of ids.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    merges = [("t", "h"), ("th", "e"), ("Ġ", "a"), ("i", "n"), ("in", "g"), ("o", "n")]
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(pair) for pair in merges)]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    names = dict(bos_token=BOS, eos_token=EOS) if bos else dict(eos_token=EOS, pad_token="<|pad|>")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    fast.save_pretrained(folder)
    return len(fast)


def tiny_llama(
    folder: Path | str,
    tied: bool = True,
    width: int = 32,
    layers: int = 2,
    vocab: int = 272,
    *,
    kind: str = "llama",
    seed: int = 0,
    tokenizer: bool = True,
    shard_bytes: int | None = None,
    **config,
):
    """Save a random decoder with 4 heads (2 for keys) and its tokenizer of 264 ids; returns the model, in eval mode.

    kind: transformers' model_type (llama, mistral, qwen2, qwen3). Weights are large enough for logits that differ,
    and no norm is one. config: further fields of the model's config.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    fields = dict(
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=width // 4,
        vocab_size=vocab,
        max_position_embeddings=512,
        initializer_range=0.15,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **fields | config)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:  # norms and biases
                parameter.add_(0.2 * torch.randn_like(parameter), alpha=1.0 if "norm" in name else 0.5)
    model.save_pretrained(folder, **({"max_shard_size": shard_bytes} if shard_bytes else {}))
    if tokenizer:
        tiny_tokenizer(folder, bos=kind != "qwen2")
    return model
