"""Folders in Hugging Face's format: written for transformers, read by JSON and safetensors alone, no code run.

A classic model is transformers' own NanoChat. One with newer features comes with a modelling file of ours
(hf_modeling.py); its configuration and tensors have our names. Its model_type is "nanochat" too: AutoTokenizer reads
config.json first, and asks whether to run code where it does not know the type. NEEDS_CODE in place of the activation
keeps transformers from building its own NanoChat of it.
"""

import dataclasses
import json
import logging
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from nanochat.checkpoint_files import read_tensors, weights_hash
from nanochat.checkpoint_manager import model_config
from nanochat.conversion.tying import untied
from nanochat.data.tokenizer import BOS, Tokenizer, list_byte_characters
from nanochat.files import new_folder
from nanochat.gpt import GPT, GPTConfig
from nanochat.runtime import first_line
from nanochat.system.environment import UserError, base_dir
from nanochat.system.storage_errors import describe as describe_storage_error
from nanochat.system.storage_errors import find_storage_error
from nanochat.upstream.foreign_weights import describe_nonfinite, read_json, read_weight_map, strip_wrappers
from nanochat.upstream.hf_model_types import ARCHITECTURE, CLASSIC, MODELING, MODERN, NEEDS_CODE, format_of

logger = logging.getLogger(__name__)

EPSILON = 1.1920929e-07  # of float32; transformers' default is 1e-6
# GPTConfig's fields in NanoChat's configuration: the key, and what transformers takes where it is absent.
KEYS = {
    "sequence_len": ("max_position_embeddings", 2048),
    "vocab_size": ("vocab_size", 50304),
    "n_layer": ("num_hidden_layers", 12),
    "n_head": ("num_attention_heads", 6),
    "n_kv_head": ("num_key_value_heads", None),  # as many as num_attention_heads
    "n_embd": ("hidden_size", 768),
    "softcap": ("final_logit_softcapping", 15.0),
    "tie_weights": ("tie_word_embeddings", False),
}
# What is the same in all our models: the value, and what transformers takes where it is absent.
FIXED = {
    "hidden_act": ("relu2", "relu2"),
    "rms_norm_eps": (EPSILON, 1e-6),
    "attention_bias": (False, False),
    "attention_dropout": (0.0, 0.0),
}
CLASSIC_FIELDS = (*KEYS, "mlp_ratio", "rope_base")
MODERN_FIELDS = (
    *CLASSIC_FIELDS,
    "qk_scale",
    "window_pattern",
    "short_window",
    "use_output_projection",
    "output_projection_residual",
    "value_embeddings",
    "value_gate_channels",
    "value_gate_range",
    "smear",
    "residual_scalars",
    "backout",
    "bigram_rows",
    "document_start",
)
LATER_FIELDS = ("bigram_rows", "document_start")  # which folders from before they were there lack: off
PARTS = {
    "transformer.wte.": "model.embed_tokens.",
    "transformer.h.": "model.layers.",
    ".attn.c_q.": ".self_attn.q_proj.",
    ".attn.c_k.": ".self_attn.k_proj.",
    ".attn.c_v.": ".self_attn.v_proj.",
    ".attn.c_proj.": ".self_attn.o_proj.",
    ".mlp.c_fc.": ".mlp.fc1.",
    ".mlp.c_proj.": ".mlp.fc2.",
}
CARD = """---
license: unknown
library_name: transformers
pipeline_tag: text-generation
---

# {name}

A language model trained with nanochat: {parameters:,} parameters, {config.n_layer} layers of width {config.n_embd},
{config.vocab_size:,} ids, a context of {config.sequence_len:,} tokens.

{what}

```python
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained({folder}{trust})
{tokenizer}```

{note}

The license of the weights is not known to the program that wrote this card.
"""
TOKENIZER_EXAMPLE = """tokenizer = AutoTokenizer.from_pretrained({folder})
ids = [tokenizer.bos_token_id, *tokenizer.encode("The capital of France")]
print(tokenizer.decode(model.generate(torch.tensor([ids]), max_new_tokens=32)[0]))
"""
TOKENIZER_NOTE = """Every document of its training began with `<|bos|>`, which the tokenizer does not add by itself.
Special tokens in a text count as ordinary text."""


def to_hf_name(name: str, model_type: str) -> str:
    """The name of one of our tensors in an exported folder."""
    if model_type == CLASSIC:
        for ours, theirs in PARTS.items():
            name = name.replace(ours, theirs)
    return name


# ---------------------------------------------------------------------------------------------------------------------
# writing


def drop_inactive_fields(config: GPTConfig) -> GPTConfig:
    """The same model with every field that has no effect under the others at its default, and unpadded tables."""
    off = {"vocab_multiple"}
    if not config.modalities:
        off |= {"untie", "output_layers"}
    if not config.use_output_projection:
        off |= {"output_projection_residual"}
    if not config.value_embeddings:
        off |= {"value_gate_channels", "value_gate_range"}
    if all(config.window(layer) is None for layer in range(config.n_layer)):
        off |= {"window_pattern", "short_window"}
    return dataclasses.replace(config, **{name: getattr(GPTConfig, name) for name in off})


def list_changed_fields(config: GPTConfig, known: tuple[str, ...]) -> list[str]:
    """The fields outside `known` that differ from their defaults, which the classic model has."""
    return [f.name for f in dataclasses.fields(config) if f.name not in known and getattr(config, f.name) != f.default]


def write_hf(
    out: Path | str,
    config: GPTConfig,
    state: dict[str, torch.Tensor],
    tokenizer: Tokenizer | None = None,
    *,
    fold: bool = False,
    dtype: torch.dtype = torch.float32,
) -> dict:
    """Write a model's state (our names) as a new folder, complete or not at all, after reading it back bit for bit.

    fold: a tied model's output projection P is written as the untied output matrix wte @ P. Returns {"architecture",
    "newer" (the fields that NanoChat lacks), "parameters", "bytes" (of the weights), "nonfinite" (where values are NaN
    or infinite, or None), "weights_hash" (of the state as read_hf gives it)}. UserError: the folder exists, there is
    nothing to fold, a field has no equivalent, a full disk.
    """
    out = Path(out)
    if out.exists() or out.is_symlink():
        raise UserError(f"--out={out} is there already: name a new folder")
    if config.modalities:
        raise UserError(f"modalities={','.join(m.name for m in config.modalities)} has no equivalent in transformers")
    if fold:
        if not config.use_output_projection:
            raise UserError("--fold-projection: the model has no output projection, export it without the flag")
        config, state, _ = untied(config, state)
    config = drop_inactive_fields(config)
    if unsupported := list_changed_fields(config, MODERN_FIELDS):
        name = unsupported[0]
        raise UserError(f"{name}={getattr(config, name)!r} has no equivalent in transformers")

    state = {name: (t[: config.vocab_size] if is_table(name) else t).to(dtype) for name, t in state.items()}
    newer = list_changed_fields(config, CLASSIC_FIELDS)
    summary = dict(
        architecture=ARCHITECTURE if newer else "NanoChatForCausalLM",
        newer=newer,
        parameters=sum(t.numel() for t in state.values()),
        nonfinite=describe_nonfinite(state),
        weights_hash=weights_hash({name: t.float() for name, t in state.items()}),
    )
    try:
        with new_folder(out) as folder:
            _write_files(folder, out.name, config, state, tokenizer, dtype, summary)
            _, written, written_tokenizer = read_hf(folder)
            same_tokenizer = getattr(written_tokenizer, "hash", None) == getattr(tokenizer, "hash", None)
            if weights_hash(written) != summary["weights_hash"] or not same_tokenizer:
                raise UserError(f"{out}: what was written there reads back differently, do not trust that disk")
    except (SafetensorError, OSError) as error:  # the first is the library's type for a full disk
        reason = first_line(error)
        if failed := find_storage_error(error):
            reason = describe_storage_error(OSError(failed.errno, failed.strerror, str(out)), base_dir())
        raise UserError(f"--out={out} cannot be written: {reason}") from error
    return summary | dict(bytes=(out / "model.safetensors").stat().st_size)


def _write_files(
    folder: Path,
    name: str,
    config: GPTConfig,
    state: dict[str, torch.Tensor],
    tokenizer: Tokenizer | None,
    dtype: torch.dtype,
    summary: dict,
) -> None:
    """All files of an export; name: the folder's later one, for the model card."""
    model_type = MODERN if summary["newer"] else CLASSIC
    weights = folder / "model.safetensors"
    tensors = {to_hf_name(name, model_type): tensor.contiguous() for name, tensor in state.items()}
    save_file(tensors, weights, metadata={"format": "pt"})  # without it transformers reads no weights
    weights.chmod(folder.stat().st_mode & 0o666)  # safetensors makes them readable for their owner only

    bos = None if tokenizer is None else tokenizer.bos_id
    files = {"config.json": make_config_json(config, model_type, dtype, bos), "generation_config.json": {}}
    if tokenizer is not None:
        # A text ends where the next one would begin.
        files["generation_config.json"] = dict(bos_token_id=bos, eos_token_id=bos, pad_token_id=bos)
        files["tokenizer_config.json"] = make_tokenizer_config(config.sequence_len)
        (folder / "tokenizer.json").write_text(tokenizer.hugging_face_json(), encoding="utf-8")
    for file, content in files.items():
        (folder / file).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    if summary["newer"]:
        shutil.copyfile(Path(__file__).with_name(MODELING), folder / MODELING)
    (folder / "README.md").write_text(render_card(name, config, summary, tokenizer is not None), encoding="utf-8")


def is_table(name: str) -> bool:
    """Tensors with a row for each id, padded by vocab_multiple."""
    return name in ("transformer.wte.weight", "lm_head.weight") or name.startswith("value_embeds.")


def make_config_json(config: GPTConfig, model_type: str, dtype: torch.dtype, bos: int | None) -> dict:
    """config.json."""
    common = dict(
        dtype=str(dtype).removeprefix("torch."), bos_token_id=bos, eos_token_id=bos, pad_token_id=None, use_cache=True
    )
    if model_type == MODERN:
        ours = {name: getattr(config, name) for name in MODERN_FIELDS}
        return dict(**auto_fields(), tie_word_embeddings=ours.pop("tie_weights"), **ours, **common)
    return dict(
        architectures=["NanoChatForCausalLM"],
        model_type=CLASSIC,
        **{key: getattr(config, name) for name, (key, _) in KEYS.items()},
        intermediate_size=round(config.mlp_ratio * config.n_embd),
        rope_parameters=dict(rope_type="default", rope_theta=config.rope_base),
        **{key: value for key, (value, _) in FIXED.items()},
        **common,
    )


def auto_fields() -> dict:
    """The fields of a config.json by which transformers finds our code."""
    module = MODELING.removesuffix(".py")
    classes = {"AutoConfig": "ModernNanoChatConfig", "AutoModelForCausalLM": ARCHITECTURE}
    return dict(
        architectures=[ARCHITECTURE],
        model_type=CLASSIC,
        hidden_act=NEEDS_CODE,
        auto_map={auto: f"{module}.{name}" for auto, name in classes.items()},
    )


def make_tokenizer_config(length: int) -> dict:
    """tokenizer_config.json. As here, no <|bos|> is added unasked, and a special token's text is ordinary text."""
    return dict(
        tokenizer_class="PreTrainedTokenizerFast",
        bos_token=BOS,
        eos_token=BOS,
        pad_token=BOS,
        padding_side="left",
        model_max_length=length,
        split_special_tokens=True,
        clean_up_tokenization_spaces=False,
    )


def render_card(name: str, config: GPTConfig, summary: dict, has_tokenizer: bool) -> str:
    """README.md: what the folder holds and how to load it."""
    what = "Its architecture is transformers' own `NanoChatForCausalLM` (transformers 5.0 or later): it brings no code."
    if newer := summary["newer"]:
        missing = ", ".join(f"`{field}`" for field in newer)
        what = (
            f"Its architecture is `{summary['architecture']}` of `{MODELING}` in this folder, for transformers' "
            f"NanoChat has no {missing}. That file is code which runs on your machine: read it, and load the model "
            "with `trust_remote_code=True` if you agree with it. The tokenizer needs none."
        )
    return CARD.format(
        name=name,
        folder=repr(name),
        parameters=summary["parameters"],
        config=config,
        what=what,
        trust=", trust_remote_code=True" if newer else "",
        tokenizer=TOKENIZER_EXAMPLE.format(folder=repr(name)) * has_tokenizer,
        note=TOKENIZER_NOTE if has_tokenizer else "The checkpoint had no tokenizer, so there is none here.",
    )


# ---------------------------------------------------------------------------------------------------------------------
# reading


def read_hf(folder: Path | str) -> tuple[GPTConfig, dict[str, torch.Tensor], Tokenizer | None]:
    """(config, float32 state by our names, tokenizer or None without tokenizer.json) of a NanoChat folder or ours.

    UserError names the first field or tensor that is damaged, missing, or that this program cannot express.
    """
    folder = Path(folder)
    config, model_type = read_config(folder / "config.json")
    tokenizer = read_tokenizer(folder / "tokenizer.json") if (folder / "tokenizer.json").is_file() else None
    if tokenizer is not None and tokenizer.vocab_size > config.vocab_size:
        raise UserError(f"{folder}: tokenizer.json has {tokenizer.vocab_size} ids, the model only {config.vocab_size}")
    found, wrappers = strip_wrappers(read_weights(folder), str(folder))
    for phrase in wrappers:
        logger.info(f"{folder}: {phrase}")
    blocks = {name.split(".")[2] for name in found if name.startswith(("model.layers.", "transformer.h."))}
    if len(blocks) != config.n_layer:  # and none builds a model of a billion layers
        raise UserError(f"{folder}: config.json says {config.n_layer} layers, the weights hold {len(blocks)}")
    try:
        with torch.device("meta"):
            expected = {name: tensor.shape for name, tensor in GPT(config).state_dict().items()}
    except (RuntimeError, TypeError, OverflowError) as error:  # sizes that no machine counts to
        raise UserError(f"{folder}: config.json describes no model that can be: {first_line(error)}") from error
    state = {}
    tied = found.pop("lm_head.weight", None) if config.tie_weights else None
    for name, shape in expected.items():
        theirs = to_hf_name(name, model_type)
        if theirs not in found:
            raise UserError(f"{folder}: the weights lack {theirs}, which config.json asks for")
        tensor = found.pop(theirs)
        if tensor.shape != shape:
            raise UserError(f"{folder}: {theirs} has shape {list(tensor.shape)}, config.json says {list(shape)}")
        if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise UserError(f"{folder}: {theirs} is {tensor.dtype}: only float32, bfloat16 and float16 are read")
        state[name] = tensor.float()
    if found:
        raise UserError(f"{folder}: the weights hold {min(found)}, which config.json does not ask for")
    # A NaN equals nothing, so not torch.equal().
    if tied is not None and not torch.allclose(tied.float(), state["transformer.wte.weight"], 0, 0, equal_nan=True):
        raise UserError(f"{folder}: tie_word_embeddings is true, but lm_head.weight is not the embedding's matrix")
    return config, state, tokenizer


def read_config(path: Path) -> tuple[GPTConfig, str]:
    """(GPTConfig, CLASSIC or MODERN) of a config.json."""
    found = read_json(path)
    model_type = format_of(found)
    if model_type is None:
        raise UserError(
            f"{path}: model_type={found.get('model_type')!r} is not read: only {CLASSIC} (transformers' NanoChat) and "
            f"{MODERN} are"
        )
    if found.get("quantization_config"):
        raise UserError(f"{path}: quantization_config: quantized weights are not read, take the model before that")
    if model_type == MODERN:
        given = {name: found.get("tie_word_embeddings" if name == "tie_weights" else name) for name in MODERN_FIELDS}
        fields = {name: value for name, value in given.items() if value is not None}
        if missing := [name for name in MODERN_FIELDS if name not in (*fields, *LATER_FIELDS)]:
            raise UserError(f"{path} lacks {missing[0]}")
    else:
        fields = classic_fields(found, path)
    for name, value in fields.items():  # transformers may write 15.0 where 15 was, and the other way round
        if type(value) is int and type(getattr(GPTConfig, name)) is float:
            fields[name] = float(value)
    try:
        return model_config({"model_config": fields}), model_type
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def classic_fields(found: dict, path: Path) -> dict:
    """GPTConfig's fields from NanoChat's configuration; absent and null keys mean what transformers takes."""
    given = {key: value for key, value in found.items() if value is not None}
    for key, (value, default) in FIXED.items():
        have = given.get(key, default)
        if key == "rms_norm_eps" and isinstance(have, float) and abs(have / EPSILON - 1) < 1e-3:
            continue
        if have != value:
            hint = ", which nanochat's models have: correct config.json if this is one" if key == "rms_norm_eps" else ""
            raise UserError(f"{path}: {key}={have!r} cannot be expressed, only {value!r}{hint}")
    if "final_logit_softcapping" in found and found["final_logit_softcapping"] is None:
        raise UserError(f"{path}: final_logit_softcapping=null cannot be expressed: our logits are always capped")
    fields = {name: given.get(key, default) for name, (key, default) in KEYS.items()}
    fields["n_kv_head"] = fields["n_kv_head"] or fields["n_head"]
    rope = given.get("rope_parameters", given.get("rope_scaling", {}))
    if not isinstance(rope, dict):
        raise UserError(f"{path}: rope_parameters={rope!r} is not a JSON object")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise UserError(f"{path}: rope_parameters: rope_type={kind!r} cannot be expressed, only 'default'")
    fields["rope_base"] = rope.get("rope_theta", given.get("rope_theta", 10000.0))
    width, hidden = fields["n_embd"], given.get("intermediate_size", 8192)
    for key, value in (
        ("hidden_size", width),
        ("num_attention_heads", fields["n_head"]),
        ("intermediate_size", hidden),
    ):
        if type(value) is not int or not 0 < value < 2**31:
            raise UserError(f"{path}: {key}={value!r} is not a whole number > 0 that a model can have")
    if given.get("head_dim", width // fields["n_head"]) != width // fields["n_head"]:
        raise UserError(f"{path}: head_dim={given['head_dim']!r} cannot be expressed, only hidden_size / heads")
    return fields | dict(mlp_ratio=hidden / width, use_output_projection=False)


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of model.safetensors, or of the files that its index names."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file() or not index.is_file():  # as transformers prefers it
        return read_tensors(single)
    files = set(read_weight_map(index).values())
    return {name: tensor for file in files for name, tensor in read_tensors(folder / file).items()}


def read_tokenizer(path: Path) -> Tokenizer:
    """The byte-level BPE of a tokenizer.json. UserError when it is another kind, or its ids are in another order."""
    found = read_json(path)
    try:
        model, before = found["model"], found["pre_tokenizer"]
        if model["type"] != "BPE" or found.get("normalizer") is not None or before["type"] != "Sequence":
            raise ValueError("it is no byte-level BPE of plain text")
        split, byte_level = before["pretokenizers"]
        if (split["type"], split["behavior"], split["invert"]) != ("Split", "Isolated", False):
            raise ValueError("its text is not split by a pattern alone")
        if byte_level["type"] != "ByteLevel" or byte_level["add_prefix_space"] or byte_level["use_regex"]:
            raise ValueError("its pieces are not taken as bytes")
        specials = {token["content"]: token["id"] for token in found["added_tokens"]}
        tokens = {token: i for token, i in model["vocab"].items() if token not in specials}
        order = sorted(tokens, key=tokens.get)
        names = sorted(specials, key=specials.get)
        ids = [tokens[token] for token in order] + [specials[name] for name in names]
        if ids != list(range(len(ids))):
            raise ValueError("the ids are not 0, 1, 2, ... of the tokens, then of the special ones")
        pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
        merged = [tokens[first + second] for first, second in pairs]
        if merged != sorted(merged) or set(merged) != {tokens[token] for token in order if len(token) > 1}:
            raise ValueError("its merges are not in the order of the ids")
        byte_of = {character: byte for byte, character in enumerate(list_byte_characters())}
        ranks = [bytes(byte_of[character] for character in token) for token in order]
        if len({rank for rank in ranks if len(rank) == 1}) != 256 or BOS not in specials:
            raise ValueError(f"not all 256 bytes are tokens, or {BOS} is missing")
        return Tokenizer(ranks, split["pattern"]["Regex"], tuple(names), path.parent.name)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = str(error) if type(error) is ValueError else f"it is damaged: {error!r}"
        raise UserError(
            f"{path} cannot be expressed: {reason}; without that file the weights alone are read"
        ) from error
