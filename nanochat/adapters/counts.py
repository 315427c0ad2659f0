"""How many parameters adapter training has, before anything is downloaded: from modules on the meta device."""

from pathlib import Path

import torch
import torch.nn as nn

from nanochat.adapters import meta_host as meta_format
from nanochat.adapters.checkpoint import find_expert_shape, make_adapter_config
from nanochat.adapters.hosts import find_nanochat
from nanochat.adapters.model import AdapterModules, count_parameters
from nanochat.checkpoint_manager import metadata_of, model_config
from nanochat.config.adapter_settings import AdapterSettings
from nanochat.data.hub import place_caches
from nanochat.data.local_sources import path_errors_as_user_errors
from nanochat.gpt import GPT
from nanochat.runtime import first_line
from nanochat.system.environment import UserError

# Published shapes, for hosts whose config.json is not on this disk yet.
LLAMA = dict(num_attention_heads=32, num_key_value_heads=8, intermediate_size=8192, vocab_size=128_256)
KNOWN = {
    "meta-llama/Llama-3.2-1B": LLAMA | dict(hidden_size=2048, num_hidden_layers=16, tie_word_embeddings=True),
    "meta-llama/Llama-3.2-3B": LLAMA
    | dict(hidden_size=3072, num_hidden_layers=28, num_attention_heads=24, tie_word_embeddings=True, head_dim=128),
}


def parameter_counts(settings: AdapterSettings) -> dict[str, int]:
    """Parameters by kind, as adapters.count_parameters() gives them; "whole output": all of it, whether trained or not.

    UserError: the host's configuration is neither here nor known.
    """
    host, (rows, width), n_layer = host_on_meta(settings.host)
    shape = find_expert_shape(settings, known_ok=True)
    config = make_adapter_config(settings, rows, width, n_layer, shape)
    with torch.device("meta"):
        parts = AdapterModules(config)
        if settings.finetune_host or settings.unfreeze:
            parts.host_model = host
            for name, parameter in host.named_parameters():
                parameter.requires_grad_(settings.finetune_host or settings.unfreeze in name)
    count = count_parameters(parts, sum(parameter.numel() for parameter in host.parameters()))
    return count | {"whole output": config.vocabulary.size * width}


def host_on_meta(name: str) -> tuple[nn.Module, torch.Size, int]:
    """(the host without its weights, rows and width of its embedding, number of layers); nothing is downloaded."""
    kind, _, place = name.partition(":")
    with path_errors_as_user_errors("host", name):
        folder = Path(place if kind == "meta" else name).expanduser()
        here = folder.is_dir()
    if kind == "nanochat":
        config = model_config(metadata_of(*find_nanochat(name, place)))
        with torch.device("meta"):
            model = GPT(config)
        return model, model.output_weight.shape, config.n_layer
    place_caches()
    try:
        from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig
    except ImportError as error:
        raise UserError(f"host={name!r} needs transformers: pip install -e '.[hf]'") from error
    if kind == "meta":
        config = LlamaConfig(**meta_format.read_config(folder)[0])
    else:
        try:
            config = AutoConfig.from_pretrained(
                str(folder) if here else name, local_files_only=True, trust_remote_code=False
            )
        except (OSError, ValueError, KeyError) as error:
            if name not in KNOWN:
                raise UserError(f"host={name!r} is not here yet ({first_line(error)})") from error
            config = LlamaConfig(**KNOWN[name])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return model, model.get_input_embeddings().weight.shape, config.num_hidden_layers
