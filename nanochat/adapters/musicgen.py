"""MusicGen's feed-forward experts (Copet et al. 2023, arXiv 2306.05284), read by key: the model is never built.

A decoder layer ends in x + fc2(gelu(fc1(LayerNorm(x)))): exact GELU, no bias in fc1 and fc2, LayerNorm with weight and
bias and eps 1e-5. An expert is a dict of those four tensors: norm.weight and norm.bias [width], fc1.weight
[hidden, width], fc2.weight [width, hidden].
"""

import hashlib
import logging
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from nanochat.checkpoint_files import weights_hash
from nanochat.data.hub import hub_errors, place_caches, probe
from nanochat.data.local_sources import path_errors_as_user_errors
from nanochat.runtime import first_line, nearest_name, shown
from nanochat.system.environment import UserError
from nanochat.upstream.foreign_weights import read_json, read_weight_map

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Shape:
    """Width of the residual stream, number of decoder layers, hidden width of their feed-forward networks."""

    width: int
    layers: int
    hidden: int


SIZES = {"small": Shape(1024, 24, 4096), "medium": Shape(1536, 48, 6144), "large": Shape(2048, 48, 8192)}
INIT_STD = 0.02  # of MusicGen's linear layers before training
EPS = 1e-5  # of its LayerNorms
# What transformers calls them. The melody models differ in what their decoder attends to, not in these layers.
WHOLE, DECODER = ("musicgen", "musicgen_melody"), ("musicgen_decoder", "musicgen_melody_decoder")
PREFIXES = ("decoder.model.decoder.", "model.decoder.", "decoder.")  # whole, with its heads, the bare decoder
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
WAY_OUT = (
    f"MusicGen is {', '.join(SIZES)}, a hub name such as facebook/musicgen-small, or a folder with its config.json and "
    f"{WEIGHTS}, copied from a machine with network"
)
LICENCE = (
    "licence: MusicGen's weights are CC-BY-NC 4.0: with attribution, and not for commercial use. Adapters trained "
    "around them\n  hold none of them but work only with them; --expert=trained saves altered ones, which stay "
    "under CC-BY-NC."
)
_licence_logged = False


def hub_name(source: str) -> str:
    """facebook/musicgen-<size> for the name of a size; any other source as it is."""
    return f"facebook/musicgen-{source}" if source in SIZES else source


def read_shape(source: str, known_ok: bool = False) -> Shape:
    """The Shape that config.json of a folder, or of a model in the hub's cache or on the hub, tells.

    known_ok: the published sizes are known by name, without a file or the network.
    UserError: not there, no MusicGen, or one whose feed-forward network is not the one that this module describes.
    """
    size = source.removeprefix("facebook/musicgen-")
    if known_ok and size in SIZES and not _folder(source):
        return SIZES[size]
    path = _find(source, ("config.json",))
    if not path:
        raise UserError(f"musicgen={shown(source)} has no config.json{_unread(source)}; {WAY_OUT}")
    config = read_json(path)
    kind = config.get("model_type")
    decoder = config.get("decoder") if kind in WHOLE else config
    if kind not in WHOLE + DECODER or not isinstance(decoder, dict):
        raise UserError(f"musicgen={shown(source)} is a model of type {kind}, not a MusicGen; {WAY_OUT}")
    # What a config leaves out is transformers' default, which is the small model.
    if (activation := decoder.get("activation_function", "gelu")) != "gelu":
        raise UserError(
            f"{path}: activation_function is {shown(activation)}, MusicGen's experts need 'gelu'; {WAY_OUT}"
        )
    sizes = [
        decoder.get("hidden_size", SIZES["small"].width),
        decoder.get("num_hidden_layers", SIZES["small"].layers),
        decoder.get("ffn_dim", SIZES["small"].hidden),
    ]
    if not all(type(size) is int and size > 0 for size in sizes):
        raise UserError(f"{path}: hidden_size, num_hidden_layers and ffn_dim are {sizes}, not whole numbers above 0")
    return Shape(*sizes)


def read_experts(
    source: str, layers: tuple[int, ...], dtype: torch.dtype = torch.float32
) -> list[dict[str, torch.Tensor]]:
    """The experts of these decoder layers, in this order, on the CPU; of a hub model only the files that hold them.

    A layer that is named twice gives two experts that share no memory. Prints the licence note once per process.
    UserError: as read_shape; weights missing, damaged, with a bias, of other shapes than config.json says, not finite.
    """
    shape = read_shape(source)
    if outside := [layer for layer in layers if not 0 <= layer < shape.layers]:
        raise UserError(
            f"layer_map: musicgen={shown(source)} has no layer {outside[0]}: name layers 0 to {shape.layers - 1}"
        )
    files = _tensor_files(source)
    prefix = next((p for p in PREFIXES if any(key.startswith(f"{p}layers.") for key in files)), PREFIXES[0])
    experts = []
    for layer in layers:
        expert = {}
        for name, size in _sizes(shape).items():
            key = f"{prefix}layers.{layer}.{name.replace('norm', 'final_layer_norm')}"
            if (bias := key.replace("weight", "bias")) in files and name.startswith("fc"):
                raise UserError(
                    f"musicgen={shown(source)}: {bias} is there, and MusicGen's fc1 and fc2 have none; {WAY_OUT}"
                )
            if key not in files:
                raise UserError(f"musicgen={shown(source)} lacks the tensor {key}: fetch its weights again; {WAY_OUT}")
            path = _find(source, (files[key],))
            if not path:
                raise UserError(f"musicgen={shown(source)}: {INDEX} names {files[key]}, which is missing: fetch it too")
            expert[name] = _read_tensor(path, key, size, dtype)
        experts.append(expert)
    log_licence()
    return experts


def random_experts(
    shape: Shape, count: int, seed: int, dtype: torch.dtype = torch.float32
) -> list[dict[str, torch.Tensor]]:
    """The control: experts of the same shapes as MusicGen's before its training, the same on every machine."""
    experts = []
    for number in range(count):
        expert = {
            "norm.weight": torch.ones(shape.width, dtype=dtype),
            "norm.bias": torch.zeros(shape.width, dtype=dtype),
        }
        for name in ("fc1.weight", "fc2.weight"):
            own = hashlib.sha256(f"{seed}/{number}/{name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(own[:4]))
            # float64: torch draws float32 by other formulas where the processor has AVX2
            drawn = torch.randn(_sizes(shape)[name], generator=generator, dtype=torch.float64)
            expert[name] = (drawn * INIT_STD).to(dtype)
        experts.append(expert)
    return experts


def experts_hash(experts: list[dict[str, torch.Tensor]]) -> str:
    """sha256 over names, dtypes, shapes and bytes in order, in whichever files they lay.

    Experts that were cast have another hash: take it as they are read in float32.
    """
    return weights_hash(
        {
            f"{number:04d}.{name} {tensor.dtype} {tuple(tensor.shape)}\n": tensor
            for number, expert in enumerate(experts)
            for name, tensor in expert.items()
        }
    )


def log_licence() -> None:
    """Print once per process what MusicGen's licence allows."""
    global _licence_logged
    if not _licence_logged:
        _licence_logged = True
        logger.info(LICENCE)


def layer_map(text: str, have: int, want: int) -> tuple[int, ...]:
    """Which of MusicGen's `have` layers gives each of a host's `want` layers its expert.

    "even": round(i * (have - 1) / (want - 1)), the middle one if want is 1, some of them twice if want is larger;
    "first", "last": that many in a row; else the layers' numbers, separated by commas. UserError for anything else.
    """
    if text == "even":
        return tuple(round(i * (have - 1) / (want - 1)) for i in range(want)) if want > 1 else (have // 2,)
    if text in ("first", "last"):
        if have < want:
            raise UserError(
                f"layer_map={text} needs {want} layers, as many as the host has, and MusicGen has {have}: even "
                "uses some of them twice"
            )
        return tuple(range(want)) if text == "first" else tuple(range(have - want, have))
    parts = [part.strip() for part in text.split(",")]
    if not all(re.fullmatch("[0-9]{1,9}", part) for part in parts):
        close = nearest_name(text, ("even", "first", "last"))
        raise UserError(f"layer_map={shown(text)} is neither a name nor a list of layers such as 0,2,3{close}")
    layers = tuple(int(part) for part in parts)
    if len(layers) != want:
        raise UserError(
            f"layer_map={shown(text)} names {len(layers)} layers: the host has {want}, name one for each, or even"
        )
    if max(layers) >= have:
        raise UserError(
            f"layer_map={shown(text)}: MusicGen has no layer {max(layers)}: name layers 0 to {have - 1}, or even"
        )
    return layers


def _sizes(shape: Shape) -> dict[str, tuple[int, ...]]:
    return {
        "norm.weight": (shape.width,),
        "norm.bias": (shape.width,),
        "fc1.weight": (shape.hidden, shape.width),
        "fc2.weight": (shape.width, shape.hidden),
    }


def _folder(source: str) -> Path | None:
    """The folder that the source names, None for a size or a hub name."""
    if source in SIZES:
        return None
    with path_errors_as_user_errors("musicgen", source):
        folder = Path(source).expanduser()
        if folder.is_dir():
            return folder
        if folder.exists() or source.startswith((".", "~")) or source.count("/") != 1 or folder.is_absolute():
            raise UserError(f"musicgen={shown(source)} is no size and no folder; {WAY_OUT}")
    return None


def _find(source: str, names: tuple[str, ...]) -> Path | None:
    """The first of these files that is there: in the folder, or in the hub's cache, else on the hub. None: none is."""
    if folder := _folder(source):
        return next((folder / name for name in names if (folder / name).is_file()), None)
    place_caches()
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    repo = hub_name(source)
    try:
        for name in names:
            if isinstance(cached := try_to_load_from_cache(repo, name), str):
                return Path(cached)
        probe(f"musicgen={shown(source)} ({names[0]})")
        for name in names:
            try:
                logger.info(f"musicgen: looking for {name} of {repo} on the hub")
                return Path(hf_hub_download(repo, name))
            except LocalEntryNotFoundError:  # the connection, not the file
                raise
            except EntryNotFoundError:
                continue
    except UserError as error:
        raise UserError(f"{error}; {WAY_OUT}") from error
    except hub_errors() as error:
        raise UserError(f"musicgen={shown(source)}: {first_line(error)}; {WAY_OUT}") from error
    return None


def _unread(source: str) -> str:
    """What a folder holds instead of safetensors, and how to turn it into them."""
    folder = _folder(source)
    if folder and any(folder.glob("pytorch_model*.bin*")):
        return (
            ', only pytorch_model.bin, a pickle, which is not read: python -c "from transformers import '
            f"AutoModelForTextToWaveform as M; M.from_pretrained('{folder}').save_pretrained('NEW')\" converts it"
        )
    if folder and (folder / "state_dict.bin").is_file():
        return (
            ", only audiocraft's state_dict.bin, which is not read: the hub has the same weights as safetensors, and "
            "transformers' convert_musicgen_transformers.py converts others"
        )
    return ""


def _tensor_files(source: str) -> dict[str, str]:
    """The name of the file that holds it, for every tensor of the model."""
    path = _find(source, (WEIGHTS, INDEX))
    if not path:
        raise UserError(f"musicgen={shown(source)} has no {WEIGHTS}{_unread(source)}; {WAY_OUT}")
    if path.name == WEIGHTS:
        return dict.fromkeys(_opened(path, lambda file: file.keys()), WEIGHTS)
    return read_weight_map(path)


def _read_tensor(path: Path, key: str, size: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    tensor = _opened(path, lambda file: file.get_tensor(key))
    if tuple(tensor.shape) != size:
        raise UserError(f"{path}: {key} is {list(tensor.shape)}, and config.json says {list(size)}: fetch both again")
    if tensor.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        raise UserError(f"{path}: {key} is {tensor.dtype}: take the model before its quantization; {WAY_OUT}")
    tensor = tensor.to(dtype, copy=True)  # not the file itself, mapped, which may change or shrink
    if not tensor.isfinite().all():
        raise UserError(f"{path}: {key} holds values that are no finite numbers (as {dtype}): fetch it again")
    return tensor


def _opened(path: Path, look):
    """What look() sees in an open safetensors file; UserError when it is none, or damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            return look(file)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read ({first_line(error)}): delete it and fetch it again") from error
