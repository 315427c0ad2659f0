"""A tiny MusicGen in a folder, as transformers saves the real one, with random weights."""

from math import log2
from pathlib import Path

import torch


def tiny_musicgen(
    folder: Path, width=16, layers=6, ffn_dim=64, codes=64, decoder_only=False, shards=1, seed=0, **decoder
):
    """Write config.json and model.safetensors (shards > 1: that many or more, and an index); return the model.

    A MusicgenForConditionalGeneration with its T5 and a 50 Hz EnCodec of 4 codebooks, or a MusicgenForCausalLM.
    Norms are drawn, too: freshly made they are ones and zeros, which would hide one that is left out.
    """
    from transformers import (
        MusicgenConfig,
        MusicgenDecoderConfig,
        MusicgenForCausalLM,
        MusicgenForConditionalGeneration,
    )

    sizes = dict(hidden_size=width, num_hidden_layers=layers, ffn_dim=ffn_dim, vocab_size=codes)
    fixed = dict(num_attention_heads=2, max_position_embeddings=64, pad_token_id=codes, bos_token_id=codes)
    decoder_config = MusicgenDecoderConfig(**{**sizes, **fixed, **decoder})
    torch.manual_seed(seed)
    if decoder_only:
        model = MusicgenForCausalLM(decoder_config)
    else:
        t5 = dict(model_type="t5", vocab_size=32, d_model=width, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
        encodec = dict(
            model_type="encodec",
            sampling_rate=32000,
            upsampling_ratios=[8, 5, 4, 4],
            num_filters=2,
            hidden_size=4,
            num_lstm_layers=1,
            codebook_size=codes,
            codebook_dim=4,
            target_bandwidths=[0.2 * log2(codes)],
        )
        config = MusicgenConfig(text_encoder=t5, audio_encoder=encodec, decoder=decoder_config.to_dict())
        model = MusicgenForConditionalGeneration(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layer_norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    size = sum(parameter.nbytes for parameter in model.parameters())
    model.save_pretrained(folder, max_shard_size="1GB" if shards == 1 else size // shards)
    return model.eval()
