"""Frozen text models that adapters build on: transformers' decoders, Meta's own files, and our own checkpoints.

A host is a model in eval mode without a trainable parameter, and what adapters need to know of it:

    name, hash          as the setting names it; sha256 of its weights as they lie on disk, whatever dtype they got here
    model, tokenizer    the module; encode, encode_batch, decode, bos_id, vocab_size, hash, name
    width, n_layer      C, and the number of layers
    vocab_size          V, the rows of its embedding with those that only pad; ids from V on are not the host's
    context, stop       most positions that it was trained for; ids that end a text
    tied, softcap       whether the output matrix is the embedding; logits are softcap tanh(x / softcap), None: plain x
    mlps, embeddings    the MLP of every layer; all modules that are called with token ids
    output_weight       [V, C]
    features(ids, cache=None), text_logits(features), logits(ids), new_cache(batch, length)
"""

import inspect
import logging
import re
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn as nn

from nanochat.adapters import meta_host as meta_format
from nanochat.adapters.transformers_host import FILES, HostTokenizer, model_folder, naming_host, read_weights
from nanochat.checkpoint_files import weights_hash
from nanochat.checkpoint_manager import build_model, find_checkpoint, step_path
from nanochat.data.hub import place_caches
from nanochat.data.local_sources import path_errors_as_user_errors
from nanochat.gpt import GPT
from nanochat.model.kv_cache import KVCache
from nanochat.runtime import first_line
from nanochat.system.environment import UserError
from nanochat.upstream.foreign_weights import describe_nonfinite, read_json, strip_wrappers
from nanochat.upstream.hf_model_types import format_of

logger = logging.getLogger(__name__)

FITTING = "take a decoder with gated MLPs: Llama, Mistral, SmolLM, Qwen2 or Qwen3"
# What transformers raises, by what is wrong. safetensors' own error is none of them, but those files are read before.
WRONG = (OSError, ValueError, RuntimeError, LookupError, TypeError, AttributeError, ArithmeticError, ImportError)


class TransformersHost:
    """A decoder of transformers with gated MLPs; the attributes are described above."""

    softcap = None

    def __init__(self, name: str, model: nn.Module, tokenizer, weights: str):
        check_gated(name, model)
        check_finite(name, model)
        self.name, self.hash, self.model, self.tokenizer = name, weights, _freeze(model), tokenizer
        table, output = model.get_input_embeddings(), model.get_output_embeddings()
        self.vocab_size, self.width = table.weight.shape
        self.tied, self.output_weight = output.weight is table.weight, output.weight
        self.context = model.config.max_position_embeddings
        ends = model.generation_config.eos_token_id if model.generation_config else model.config.eos_token_id
        self.stop = (tokenizer.bos_id,) if ends is None else tuple(ends) if isinstance(ends, list) else (ends,)
        self.mlps, self.embeddings = [layer.mlp for layer in model.base_model.layers], [table]
        self.n_layer = len(self.mlps)
        # Named cache from 5.24 on; a model swallows an argument that it does not know.
        known = inspect.signature(model.base_model.forward).parameters
        self._cache_argument = "cache" if "cache" in known else "past_key_values"
        ids = torch.arange(min(8, self.vocab_size), device=model.device)[None]
        with torch.no_grad():
            same = torch.allclose(self.text_logits(self.features(ids)), self.logits(ids).float(), 1e-2, 1e-4)
        if not same:
            raise UserError(
                f"host={name!r} is a {type(model).__name__}, which scales or caps its logits, and so would not those "
                f"of sounds: {FITTING}"
            )

    def features(self, ids: torch.Tensor, cache=None) -> torch.Tensor:
        """ids int64 [B, T] -> [B, T, C], what the output matrix is multiplied with; a cache goes T positions on."""
        if cache is None:
            return self.model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        length = cache.get_seq_length() + ids.size(1)
        features = self.model.base_model(input_ids=ids, use_cache=True, **{self._cache_argument: cache})
        if cache.get_seq_length() != length:  # given to a model that did not take it, every step would begin anew
            raise UserError(
                f"host={self.name!r}: transformers {_release()} left {cache.get_seq_length()} tokens in the cache of "
                f"{length}: take a release that `python -m scripts.stress.exports` finds right"
            )
        return features.last_hidden_state

    def text_logits(self, features: torch.Tensor) -> torch.Tensor:
        """features [..., C] -> float32 [..., V]."""
        return self.model.get_output_embeddings()(features).float()

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        """ids int64 [B, T] -> [B, T, V] by the model's own forward, in its dtype."""
        return self.model(input_ids=ids, use_cache=False).logits

    def new_cache(self, batch: int, length: int):
        """Keys and values of `batch` rows for features(); it grows by itself."""
        from transformers import DynamicCache

        cache = DynamicCache(config=self.model.config)

        def repeated(rows: int) -> DynamicCache:
            cache.batch_repeat_interleave(rows)
            return cache

        cache.repeated = repeated  # as our own cache: one prompt, several continuations
        return cache


class NanochatHost:
    """A text model of ours; the attributes are described above."""

    def __init__(self, name: str, model: GPT, tokenizer, weights: str):
        check_finite(name, model)
        self.name, self.hash, self.model, self.tokenizer = name, weights, _freeze(model), tokenizer
        self.vocab_size, self.width = model.output_weight.shape
        self.softcap = model.config.softcap
        self.tied, self.output_weight = model.config.tie_weights, model.output_weight
        self.context, self.n_layer = model.config.sequence_len, model.config.n_layer
        self.stop = (tokenizer.bos_id,)
        self.mlps = [block.mlp for block in model.transformer.h]
        tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
        self.embeddings = [table for table in tables if table is not getattr(model, "bigram_embed", None)]

    def features(self, ids: torch.Tensor, cache: KVCache | None = None) -> torch.Tensor:
        """ids int64 [B, T] -> [B, T, C], what the output matrix is multiplied with; a cache goes T positions on."""
        return self.model.features(ids, cache)

    def text_logits(self, features: torch.Tensor) -> torch.Tensor:
        """features [..., C] -> softcapped float32 [..., V]."""
        return self.model.text_logits(features)

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        """ids int64 [B, T] -> float32 [B, T, V] by the model's own forward."""
        return self.model(ids)

    def new_cache(self, batch: int, length: int) -> KVCache:
        """Keys and values of `batch` rows and at most `length` positions, for features()."""
        return self.model.new_cache(batch, length)


Host = TransformersHost | NanochatHost


def load_host(name: str, device: torch.device | str, dtype: torch.dtype) -> Host:
    """The frozen model that `name` names, computing in `dtype`.

    name: a hub name or a local folder of transformers, meta:FOLDER with Meta's own files, or a checkpoint of ours:
    nanochat:TAG, its newest step, or nanochat:TAG@STEP. UserError: missing, incomplete, without a tokenizer, or of
    another kind.
    """
    kind, _, place = name.partition(":")
    if kind == "nanochat":
        host = _load_nanochat(name, place, device, dtype)
    else:
        place_caches()
        try:
            import transformers  # noqa: F401
        except ImportError as error:
            raise UserError(f"host={name!r} needs transformers: pip install -e '.[hf]'") from error
        host = _load_meta(name, place, device, dtype) if kind == "meta" else _load_transformers(name, device, dtype)
    if host.tokenizer.vocab_size > host.vocab_size:
        raise UserError(
            f"host={name!r}: the tokenizer has {host.tokenizer.vocab_size} ids, the embedding {host.vocab_size} rows: "
            "they do not belong together, fetch both again"
        )
    count = sum(parameter.numel() for parameter in host.model.parameters())
    logger.info(
        f"host {name}: {type(host.model).__name__}, {host.n_layer} layers of width {host.width}, "
        f"{host.vocab_size:,} ids, {'tied' if host.tied else 'untied'}, {count:,} parameters, all frozen; "
        f"weights {host.hash[:8]}"
    )
    return host


def _release() -> str:
    from transformers import __version__

    return __version__


def state_hash(host: Host) -> str:
    """sha256 of all parameters and buffers as they are in memory: what training must leave as it was."""
    return weights_hash(host.model.state_dict() | dict(host.model.named_buffers()))


def check_gated(name: str, model: nn.Module) -> None:
    """UserError unless every layer of a transformers model has a gated MLP and ids go into one embedding only."""
    mlps = [getattr(layer, "mlp", None) for layer in getattr(model.base_model, "layers", ())]
    gated = bool(mlps) and all(hasattr(mlp, part) for mlp in mlps for part in ("gate_proj", "up_proj", "down_proj"))
    if not gated:
        raise UserError(
            f"host={name!r} is a {type(model).__name__}, whose layers do not all have an mlp of gate_proj, up_proj and "
            f"down_proj: {FITTING}"
        )
    if tables := sum(isinstance(module, nn.Embedding) for module in model.modules()) - 1:
        raise UserError(f"host={name!r} is a {type(model).__name__} with {tables} further embedding tables: {FITTING}")


def check_finite(name: str, model: nn.Module) -> None:
    """UserError when a parameter holds NaN or infinite values: nothing that is built on such a model can learn."""
    if nonfinite := describe_nonfinite(dict(model.named_parameters())):
        dtype = next(model.parameters()).dtype
        raise UserError(
            f"host={name!r} holds non-finite values in {nonfinite}, as {str(dtype).removeprefix('torch.')}: take "
            "another checkpoint of it"
        )


def _freeze(model: nn.Module) -> nn.Module:
    return model.eval().requires_grad_(False)


# ---------------------------------------------------------------------------------------------------------------------
# transformers' format


def _load_transformers(name: str, device, dtype: torch.dtype) -> TransformersHost:
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    folder = model_folder(name)
    with naming_host(name):
        described = read_json(folder / "config.json", f"name {FILES}")
    if described.get("quantization_config") is not None:
        raise UserError(f"host={name!r} is quantized: take the weights that it was made from, in bfloat16 or float32")
    if format_of(described) is not None:
        raise UserError(
            f"host={name!r} is a model of nanochat: `python -m scripts.convert --from-hf {folder}` makes a checkpoint "
            "of it, for --host=nanochat:TAG"
        )
    kind = str(described.get("model_type"))
    with _quiet_transformers(), _transformers_errors_as_user_errors(name):
        config = None
        if kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
            config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        if config is None or config.is_encoder_decoder:
            raise UserError(f"host={name!r} is a model of type {kind}, no text decoder of transformers: {FITTING}")
        with torch.device("meta"):  # no weight is read of a model that does not fit
            empty = AutoModelForCausalLM.from_config(config)
        check_gated(name, empty)
    state, wrappers = strip_wrappers(read_weights(name, folder), f"host={name!r}")
    weights = weights_hash(state)
    tokenizer = HostTokenizer(name, folder)
    if wrappers:  # whose names transformers does not know
        for phrase in wrappers:
            logger.info(f"host {name}: {phrase}")
        model = _load_pretrained(name, type(empty), None, config=config, state_dict=state, dtype=dtype)
        if (folder / "generation_config.json").is_file():
            with _quiet_transformers(), _transformers_errors_as_user_errors(name):
                model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    else:
        model = _load_pretrained(name, AutoModelForCausalLM, folder, config=config, use_safetensors=True, dtype=dtype)
    return TransformersHost(name, model.to(device), tokenizer, weights)


def _load_pretrained(name: str, kind, place: Path | None, **options) -> nn.Module:
    """kind.from_pretrained(place, ...); a missing tensor, which transformers would draw at random, is a UserError."""
    with _quiet_transformers(), _transformers_errors_as_user_errors(name):
        model, info = kind.from_pretrained(
            place,
            attn_implementation="sdpa",
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **options,
        )
    if missing := sorted(info["missing_keys"]):
        raise UserError(f"host={name!r} lacks {len(missing)} tensors, {missing[0]} first: fetch it again")
    if wrong := sorted(info["mismatched_keys"]):
        key, found, expected = wrong[0]
        raise UserError(
            f"host={name!r}: {key} has shape {tuple(found)}, its configuration says {tuple(expected)}: fetch both again"
        )
    if unknown := sorted(info["unexpected_keys"]):
        kind = type(model).__name__
        logger.info(f"host {name}: {len(unknown)} tensors are no part of a {kind} and not used, {unknown[0]} first")
    return model


@contextmanager
def _transformers_errors_as_user_errors(name: str):
    """Errors of transformers about a host's files as UserError."""
    from huggingface_hub import errors

    strict = getattr(errors, "StrictDataclassError", ValueError)  # of newer versions, about values in config.json
    try:
        yield
    except UserError:
        raise
    except (*WRONG, strict) as error:
        raise UserError(f"host={name!r}: transformers cannot read it ({first_line(error)}): name {FILES}") from error


@contextmanager
def _quiet_transformers():
    """Silence transformers' progress bars and tables; what matters in them is raised here."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


# ---------------------------------------------------------------------------------------------------------------------
# Meta's format and our own


def _load_meta(name: str, place: str, device, dtype: torch.dtype) -> TransformersHost:
    from transformers import LlamaConfig, LlamaForCausalLM

    with path_errors_as_user_errors("host", name):
        folder = Path(place).expanduser()
        there = place and folder.is_dir()
    if not there:
        raise UserError(f"host={name!r}: there is no folder {place!r}; meta:FOLDER names one with Meta's params.json")
    with naming_host(name):
        fields, state, weights = meta_format.read_weights(folder)
        tokenizer = meta_format.MetaTokenizer(folder)
    with _transformers_errors_as_user_errors(name):
        config = LlamaConfig(**fields, bos_token_id=tokenizer.bos_id, eos_token_id=tokenizer.eos_ids)
    model = _load_pretrained(name, LlamaForCausalLM, None, config=config, state_dict=state, dtype=dtype)
    return TransformersHost(name, model.to(device), tokenizer, weights)


def find_nanochat(name: str, place: str) -> tuple[Path, int]:
    """(tag folder, step) of nanochat:TAG, its newest step, or nanochat:TAG@STEP."""
    tag, at, number = place.partition("@")
    if not tag or (at and not re.fullmatch("[0-9]{1,12}", number)):
        raise UserError(f"host={name!r} names no model_tag, as in nanochat:d4-tied or nanochat:d4-tied@800")
    try:
        return find_checkpoint(tag, int(number) if at else None)
    except UserError as error:
        raise UserError(
            f"host={name!r}: {error}; `python -m scripts.base_train runs/cpu.py --model_tag={tag}` trains one"
        ) from error


def _load_nanochat(name: str, place: str, device, dtype: torch.dtype) -> NanochatHost:
    checkpoint_dir, step = find_nanochat(name, place)
    model, tokenizer, _ = build_model(checkpoint_dir, step, device, "eval")
    if model.config.modalities:
        names = ", ".join(modality.name for modality in model.config.modalities)
        raise UserError(
            f"host={name!r} has modalities of its own ({names}): take a model that was trained on text only"
        )
    if tokenizer is None:
        raise UserError(
            f"host={name!r}: {step_path(checkpoint_dir, step)} holds no tokenizer: take a checkpoint that has one"
        )
    model.compute_dtype = dtype
    return NanochatHost(name, model, tokenizer, weights_hash(model.state_dict()))
