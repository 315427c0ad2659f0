"""Llama 3 as Meta ships it: params.json, consolidated.00.pth and tokenizer.model in one folder.

Meta calls the tensors by other names than transformers, and orders the rows of wq and wk otherwise: its rotary
embedding turns the pairs (2i, 2i + 1) of a head, that of transformers (i, i + D/2).
"""

import base64
import hashlib
import json
import math
import re
from pathlib import Path

import tiktoken
import torch

from nanochat.checkpoint_files import weights_hash
from nanochat.files import sha256_of
from nanochat.runtime import first_line
from nanochat.system.environment import UserError
from nanochat.upstream.pickles import read_pt

LAYER_NAMES = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
OTHER_NAMES = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"}
TRANSFORMERS_FORMAT = "take the model in transformers' format (config.json, *.safetensors), which hub repositories have"


def read_config(folder: Path) -> tuple[dict, dict[str, torch.Tensor]]:
    """(fields of transformers' LlamaConfig, Meta's own tensors, mapped); the weights tell vocabulary and tying.

    UserError: a file that is missing or damaged, or one of several parts of a model.
    """
    parts = sorted(folder.glob("consolidated.*.pth"))
    if not parts:
        raise UserError(f"{folder} holds no consolidated.00.pth: name the folder that does, or {TRANSFORMERS_FORMAT}")
    if len(parts) > 1 or parts[0].name != "consolidated.00.pth":
        raise UserError(
            f"{folder} holds {parts[-1].name}: the model is cut into parts for several GPUs, and only one whole "
            f"consolidated.00.pth is read; {TRANSFORMERS_FORMAT}"
        )
    config = _config(folder / "params.json")
    weights = read_pt(parts[0])
    weights.pop("rope.freqs", None)  # Llama 2's rotary frequencies, which follow from params.json
    table, output = weights.get("tok_embeddings.weight"), weights.get("output.weight")
    if table is None:
        raise UserError(f"{parts[0]} lacks tok_embeddings.weight: fetch it again")
    config["tie_word_embeddings"] = output is None or torch.equal(output, table)
    config["vocab_size"] = len(table)  # params.json of Llama 2 says -1
    return config, weights


def read_weights(folder: Path) -> tuple[dict, dict[str, torch.Tensor], str]:
    """(fields of transformers' LlamaConfig, tensors under its names, hash of the weights as the file has them).

    `output` is dropped where it repeats the embedding. UserError: as read_config, and tensors that do not fit it.
    """
    config, weights = read_config(folder)
    file, state = folder / "consolidated.00.pth", {}
    for name, tensor in weights.items():
        if (renamed := _renamed(name)) is None:
            raise UserError(f"{file} holds {name!r}, which no Llama has: {TRANSFORMERS_FORMAT}")
        if renamed.endswith(("q_proj.weight", "k_proj.weight")):
            if tensor.ndim != 2 or tensor.size(0) % config["head_dim"]:
                shape = tuple(tensor.shape)
                raise UserError(f"{file}: {name} has shape {shape}, params.json says heads of {config['head_dim']}")
            tensor = to_half_split_rotary(tensor, config["head_dim"])
        state[renamed] = tensor
    if config["tie_word_embeddings"]:
        state.pop("lm_head.weight", None)
    return config, state, weights_hash(weights)


def to_half_split_rotary(weight: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Rows [H * D, C] for rotary pairs (2i, 2i + 1) -> the same rows in the order for pairs (i, i + D/2)."""
    return weight.view(-1, head_dim // 2, 2, weight.size(1)).transpose(1, 2).reshape(weight.shape)


def _renamed(name: str) -> str | None:
    owner = name.removesuffix(".weight")
    if layer := re.fullmatch(r"layers\.(\d+)\.(.+)", owner):
        return f"model.layers.{layer[1]}.{LAYER_NAMES[layer[2]]}.weight" if layer[2] in LAYER_NAMES else None
    return f"{OTHER_NAMES[owner]}.weight" if owner in OTHER_NAMES else None


def _config(path: Path) -> dict:
    """Fields of LlamaConfig from params.json; the width of the MLP is 2/3 of 4 dim, scaled and rounded up as Meta does.

    use_scaled_rope says nothing about by how much. Of the models that have it, Llama 3.2's 1B and 3B (dim < 4096) were
    stretched 32 times, all others 8 times; `rope_scaling_factor`, which newer files have, wins.
    """
    try:
        params = json.loads(path.read_text(encoding="utf-8"))
        dim, heads = int(params["dim"]), int(params["n_heads"])
        hidden = int(2 * 4 * dim / 3)
        if (multiplier := params.get("ffn_dim_multiplier")) is not None:
            hidden = int(multiplier * hidden)
        multiple = int(params.get("multiple_of", 256))
        rope = dict(rope_type="default", rope_theta=float(params.get("rope_theta", 10000.0)))
        context = 4096 if rope["rope_theta"] == 10000.0 else 8192  # Llama 2, Llama 3
        if params.get("use_scaled_rope"):
            context = 131072
            rope |= dict(
                rope_type="llama3",
                factor=float(params.get("rope_scaling_factor", 32.0 if dim < 4096 else 8.0)),
                original_max_position_embeddings=8192,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
            )
        return dict(
            hidden_size=dim,
            intermediate_size=multiple * math.ceil(hidden / multiple),
            num_hidden_layers=int(params["n_layers"]),
            num_attention_heads=heads,
            num_key_value_heads=int(params.get("n_kv_heads") or heads),
            head_dim=dim // heads,
            rms_norm_eps=float(params.get("norm_eps", 1e-5)),
            rope_parameters=rope,
            max_position_embeddings=context,
        )
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}): it lies beside Meta's consolidated.00.pth"
        ) from error
    except (ValueError, TypeError, KeyError, AttributeError, ArithmeticError) as error:
        raise UserError(f"{path} is not Meta's params.json ({error!r}): fetch it again") from error


# Llama 3's way of splitting, part of the format like the ranks.
SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Names of the 256 special ids behind the ranks, as Llama 3.1 and 3.2 call them.
NAMED = ("begin_of_text", "end_of_text", "reserved_special_token_0", "reserved_special_token_1")
NAMED += ("finetune_right_pad_id", "reserved_special_token_2", "start_header_id", "end_header_id", "eom_id", "eot_id")
NAMED += ("python_tag",)
SPECIALS = tuple(f"<|{name}|>" for name in NAMED) + tuple(f"<|reserved_special_token_{i}|>" for i in range(3, 248))
# tiktoken's regex overflows on longer texts and runs; Meta's own tokenizer cuts there too.
LONGEST_TEXT = 400_000
LONGEST_RUN = re.compile(r"\s{25000}(?=\s)|\S{25000}(?=\S)")


class MetaTokenizer:
    """tokenizer.model of Llama 3: tiktoken's ranks, then 256 special ids, which no text gives."""

    def __init__(self, folder: Path):
        """UserError: no such file, or one that is not in tiktoken's format (Llama 2's is a sentencepiece model)."""
        path = folder / "tokenizer.model"
        try:
            entries = [line.split() for line in path.read_bytes().splitlines() if line]
            ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in entries}
            if sorted(ranks.values()) != list(range(len(entries))):
                raise ValueError("the ranks are not 0, 1, 2, ... of distinct tokens")
            if missing := {bytes([i]) for i in range(256)} - ranks.keys():
                raise ValueError(f"{len(missing)} of the 256 single bytes are missing")
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror}): copy it there from Meta's folder") from error
        except ValueError as error:
            raise UserError(
                f"{path} is not Llama 3's ({first_line(error)}); Llama 2's is not read: {TRANSFORMERS_FORMAT}"
            ) from error
        special_ids = {name: len(ranks) + i for i, name in enumerate(SPECIALS)}
        self._encoding = tiktoken.Encoding(
            "llama3", pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens=special_ids
        )
        self.name, self.vocab_size, self.bos_id = folder.name, len(ranks) + len(SPECIALS), len(ranks)
        self.eos_ids = [special_ids[f"<|{name}|>"] for name in ("end_of_text", "eom_id", "eot_id")]
        self.hash = hashlib.sha256(f"meta-1 {sha256_of(path)}".encode()).hexdigest()

    def encode(self, text: str, bos: bool = False) -> list[int]:
        """Ids of a text, with BOS in front when asked. Lone surrogates become U+FFFD."""
        ids = [i for piece in _pieces(text) for i in self._encoding.encode_ordinary(piece)]
        return [self.bos_id, *ids] if bos else ids

    def encode_batch(self, texts: list[str], num_threads: int = 4) -> list[list[int]]:
        """encode() of every text without BOS, on several threads."""
        pieces = [list(_pieces(text)) for text in texts]
        flat = [piece for parts in pieces for piece in parts]
        coded = iter(self._encoding.encode_ordinary_batch(flat, num_threads=num_threads))
        return [[i for _ in parts for i in next(coded)] for parts in pieces]

    def decode(self, ids: list[int]) -> str:
        """Text of the ids, specials as their names; ids of the model's padding rows give nothing."""
        return self._encoding.decode([i for i in ids if 0 <= i < self.vocab_size])


def _pieces(text: str) -> list[str]:
    """The text in pieces that tiktoken can take: one, but for very long texts and runs."""
    pieces = []
    for start in range(0, len(text), LONGEST_TEXT):
        part, done = text[start : start + LONGEST_TEXT], 0
        for run in LONGEST_RUN.finditer(part):
            pieces.append(part[done : run.end()])
            done = run.end()
        pieces.append(part[done:])
    return pieces
