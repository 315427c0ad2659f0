"""What a run will cost, before it starts: parameters, FLOPs, memory, time, disk.

Counts come from the model and the optimizer themselves, built on the meta device, so that no second formula can
drift away from them. Only activations and speed are predictions.
"""

import math
import os
import statistics
import time
from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from nanochat.checkpoint_manager import find_checkpoint, tokenizer_of
from nanochat.config.settings import RunSettings, Settings
from nanochat.gpt import GPT, GPTConfig
from nanochat.hardware import compiler_problem, device_name, gpu_peak_flops, measured_matmul_flops
from nanochat.model.cpu_attention import blocks
from nanochat.model.loss_head import chunk_rows
from nanochat.optim import build_optimizer
from nanochat.runtime import Compute, pick_device_type, pick_dtype
from nanochat.system.environment import UserError, base_dir
from nanochat.training.kernel_selection import select_attention
from nanochat.training.progress import duration
from nanochat.training.schedule import num_iterations
from nanochat.upstream.named_tokenizer import load_named

MEASURE_SECONDS = 4.0
# The part of the matmul peak that training reaches, where nobody has measured: large models on data-centre GPUs, and
# small ones on CPUs, where attention and the elementwise work weigh more.
ASSUMED_MFU = {"cuda": 0.40, "mps": 0.25, "cpu": 0.50}
# The time of compiled passes on a CPU over that of eager ones, which measure() times: blocks, and the output matrix.
COMPILED_TIME = {torch.float32: (0.78, 0.98), torch.bfloat16: (0.62, 1.0)}
RUNTIME_BYTES = {"cpu": 460 << 20, "mps": 600 << 20, "cuda": 0}  # Python, torch, data; CUDA reports its tensors alone


@dataclass(frozen=True)
class Hardware:
    """One machine: kind and name of its devices, their number, bytes of memory and peak FLOP/s of one, best dtype."""

    device_type: str
    name: str
    count: int
    memory: int | None
    peak: float
    dtype: torch.dtype

    def activation_dtype(self, settings: RunSettings) -> torch.dtype:
        return getattr(torch, settings.dtype) if settings.dtype else self.dtype


@dataclass(frozen=True)
class Estimate:
    """Predictions for one run. Memory is in bytes per device by part, time in seconds, disk in bytes."""

    parameters: dict[str, int]
    flops_per_token: int
    steps: int
    tokens: int
    memory: dict[str, int]
    seconds: float
    checkpoint_bytes: int
    saves: int
    kept: int
    bare_passes: bool  # begin without gradients: there is one micro-batch, and its activations are known well enough

    @property
    def peak_memory(self) -> int:
        """On a GPU the passes' memory serves the optimizer step, and the larger counts. On a CPU both do: by the time
        of the step the heap is in pieces."""
        parts = dict(self.memory)
        if "saving" not in parts:
            passes, step = parts.pop("activations") + parts.pop("logits"), parts.pop("step")
            parts["larger"] = max(passes - (parts["gradients"] if self.bare_passes else 0), step)
        return sum(parts.values())


def find_hardware(device_type: str | None = None) -> Hardware:
    """The devices of this machine; a peak that the table does not know is measured in 0.3 s."""
    kind = pick_device_type(device_type)
    compute = Compute(torch.device(kind), pick_dtype(None, kind))
    count = torch.cuda.device_count() if kind == "cuda" else 1
    known = gpu_peak_flops(torch.cuda.get_device_name()) if kind == "cuda" else None
    peak = known or measured_matmul_flops(compute.device, compute.dtype)
    return Hardware(kind, device_name(compute), count, _device_memory(kind), peak, compute.dtype)


def _device_memory(kind: str) -> int | None:
    if kind == "cuda":
        return torch.cuda.get_device_properties(0).total_memory
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):  # a system that does not tell
        return None


def meta_model(settings: Settings) -> GPT:
    """The model of these settings without memory: shapes and counts only."""
    return _meta_model(GPTConfig.from_settings(settings, known_vocab_size(settings)))


def known_vocab_size(settings: Settings) -> int:
    """Ids of the tokenizer that the run will take: a named one's, that of init_from, else vocab_size.

    vocab_size, too, where the named one is not here: the run will say so.
    """
    named = (getattr(settings, "tokenizer", None), getattr(settings, "init_from", None))
    return (_vocab_size_of(str(base_dir()), *named) if any(named) else None) or settings.vocab_size


@lru_cache(8)
def _vocab_size_of(base: str, tokenizer: str | None, init_from: str | None) -> int | None:
    try:
        if tokenizer:
            return load_named(tokenizer).vocab_size
        own = tokenizer_of(*find_checkpoint(init_from, None))
        return own and own.vocab_size
    except UserError:
        return None


def largest_model(settings: Settings) -> GPT:
    """That of the end where untie_at splits tables."""
    config = meta_model(settings).config
    if settings.untie_step(1) is not None:
        config = replace(config, tie_weights=False, use_output_projection=False, output_projection_residual=False)
    return _meta_model(config)


@lru_cache(maxsize=64)
def _meta_model(config: GPTConfig) -> GPT:
    with torch.device("meta"):
        return GPT(config)


def memory_parts(settings: Settings, hardware: Hardware, world_size: int = 1) -> dict[str, int]:
    """Bytes per device, by part.

    parameters, gradients   4 each a parameter: both are float32
    optimizer               float32, each rank its shard: Muon momentum plus one variance a neuron, AdamW two moments
    activations             n tokens of a micro-batch, L layers, width C, k = n_kv_head / n_head, MLPs of 4 C:
                            as torch saves them in eager mode and, measured on a GPU, compiled
                            float32   n L C 4 (17.5 + k),   compiled 13.1 + 3 k, and 2.8 n C 4
                            bfloat16  n L C 2 (21.2 + 2 k), compiled 15.1 + 3 k, and 2.8 n C 2
                            two arrays more with experts, plus the bfloat16 copies of the matrices; residual scalars
                            keep one more array a layer in eager mode, value embeddings k of one in every other layer,
                            smear and bigrams two, backout one in all; blocked attention (CPU) also keeps its weights: a
                            token about 9/16 H T, or H (window + a block)
    logits                  one chunk of the loss head: 5 arrays rows x V in float32, compiled on a GPU two in the dtype
                            of the activations and two that are smaller; the cast output matrix, gradients to features
                            and to that matrix
    step                    what an update holds for a while: the reduced gradients of the matrices, and 6 copies of
                            their largest stack
    saving                  the copy that is written in the background, where it shares the device's memory (CPU)
    runtime                 the process itself, where memory is counted by resident set
    """
    model, dtype, kind = largest_model(settings), hardware.activation_dtype(settings), hardware.device_type
    optimizer = build_optimizer(model, settings, dtype, world_size=world_size)
    size, full, compact = dtype.itemsize, dtype == torch.float32, lean(settings, kind)
    config = model.config
    parameters = sum(p.numel() for p in model.parameters())

    state = step = largest = 0
    for bucket in optimizer.buckets:
        shape = bucket.params[0].shape
        if bucket.stacked:
            stack = 4 * bucket.shard_length * math.prod(shape)
            state += stack + 4 * bucket.shard_length * max(shape)
            step, largest = step + stack, max(largest, stack)
        else:
            state += 8 * bucket.shard_length

    tokens = settings.batch_plan(world_size)[0] * settings.max_seq_len
    kv = config.n_kv_head / config.n_head
    hidden = 2 * config.mlp_ratio + 2 * config.has_experts  # experts: the sorted tokens, there and back
    if compact:
        arrays = (5.1 if full else 7.1) + hidden + 3 * kv
    else:
        arrays = (9.5 + kv if full else 13.2 + 2 * kv) + hidden + config.residual_scalars
    per_token = config.n_embd * size * (arrays + config.value_embeddings * kv / 2)
    if kind == "cpu":
        T = settings.max_seq_len
        spans = [span for layer in range(config.n_layer) for span in blocks(T, config.window(layer))]
        seen = sum((end - start) * (end - first) for start, end, first in spans) / T / config.n_layer
        per_token += config.n_head * seen * size  # keys that a query is multiplied with: their weights stay
    count = model.num_parameters()
    matrices = count["transformer"] + count["experts"] + count["output_projection"]
    once = config.n_embd * size * (2.8 * compact + 2 * config.smear + config.backout + 2 * bool(config.bigram_rows))
    activations = tokens * (config.n_layer * per_token + once) + (0 if full else 2 * matrices)

    ids = max(len(matrix) for _, matrix in model.output_weights())
    rows = min(tokens, chunk_rows(kind, ids, settings.compile))
    table = ids * config.n_embd
    chunk = rows * (2 * size * ids + 8 * config.n_embd) + 4 * table if compact else 5 * 4 * rows * ids
    logits = chunk + tokens * config.n_embd * size + table * (4 if full else 6)
    return {
        "parameters": 4 * parameters,
        "gradients": 4 * parameters,
        "optimizer": state,
        "activations": int(activations),
        "logits": logits,
        "step": step + 6 * largest,
        **({"saving": checkpoint_bytes(settings)} if kind == "cpu" else {}),
        "runtime": RUNTIME_BYTES[kind],
    }


def lean(settings: Settings, device_type: str) -> bool:
    """Whether a run keeps what compiled blocks keep, as measured on a GPU."""
    return settings.compile and device_type == "cuda"


def checkpoint_bytes(settings: Settings) -> int:
    """One checkpoint: the weights in float32 and the whole state of the optimizer, whatever the number of ranks."""
    model = largest_model(settings)
    optimizer = build_optimizer(model, settings, torch.float32)
    total = 4 * sum(p.numel() for p in model.parameters())
    for bucket in optimizer.buckets:
        shape = bucket.params[0].shape
        total += 4 * bucket.length * (math.prod(shape) + max(shape)) if bucket.stacked else 8 * bucket.length
    return total


def estimate(settings: Settings, hardware: Hardware, flops: float | None = None) -> Estimate:
    """All predictions for a run on `hardware`, on all of its devices if the batch divides among them.

    flops: achieved FLOP/s of one device as measure() returns it; None assumes a part of the peak. A step is its passes
    and Muon's products, which go at that rate too (in small batches of wide models they are most of the work).
    measure() times eager passes; what compiling gains is known for CPUs alone, so a GPU will be faster than predicted.
    """
    model = meta_model(settings)
    flops_per_token = model.flops_per_token()
    steps = num_iterations(settings, model.num_matmul_parameters(), flops_per_token)
    tokens = steps * settings.total_batch_size
    world = usable_devices(settings, hardware.count)
    rate = (flops or hardware.peak * ASSUMED_MFU[hardware.device_type]) * world
    compiled = flops and settings.compile and hardware.device_type == "cpu" and compiler_problem() is None
    dtype = hardware.activation_dtype(settings)
    head = 6 * max(matrix.numel() for _, matrix in model.output_weights())
    blocks, output = COMPILED_TIME[dtype] if compiled else (1.0, 1.0)
    passes = tokens * (blocks * (flops_per_token - head) + output * head)
    muon = steps * build_optimizer(model, settings, dtype).muon_flops()
    saves, kept = checkpoints_of(settings, steps)
    return Estimate(
        parameters=model.num_parameters(),
        flops_per_token=flops_per_token,
        steps=steps,
        tokens=tokens,
        memory=memory_parts(settings, hardware, world),
        seconds=(passes + muon) / rate,
        checkpoint_bytes=checkpoint_bytes(settings),
        saves=saves,
        kept=kept,
        bare_passes=lean(settings, hardware.device_type) and settings.batch_plan(world)[1] == 1,
    )


def checkpoints_of(settings: RunSettings, steps: int) -> tuple[int, int]:
    """(how many checkpoints a run saves, how many of them are on disk at a time)."""
    saves = -(-steps // settings.save_every) if settings.save_every else 1
    # pruning waits for the newer checkpoint: one more than keep_last is on disk for a moment
    return saves, min(saves, settings.keep_last + 1) if settings.keep_last else saves


def usable_devices(settings: RunSettings, count: int) -> int:
    """The largest number of ranks up to `count` among which the rows of a batch divide; 1 without devices."""
    rows, batch = settings.rows, settings.device_batch_size
    legal = (n for n in range(count, 1, -1) if rows % n == 0 and rows // n % min(batch, rows // n) == 0)
    return next(legal, 1)


def measure(settings: Settings, hardware: Hardware, seconds: float = MEASURE_SECONDS) -> float:
    """FLOP/s that one device reaches over a few real forward and backward passes, for estimate(flops=...).

    A run too large for `seconds` is measured in a smaller one: fewer rows, then layers, then a shorter context.
    """
    settings = _measured(settings, hardware, seconds)
    device = torch.device(hardware.device_type)
    model = GPT(GPTConfig.from_settings(settings, known_vocab_size(settings))).to(device)
    model.init_weights()
    model.compute_dtype = hardware.activation_dtype(settings)
    select_attention(model, compiled=False)
    shape = (settings.batch_plan()[0], settings.max_seq_len)
    ids = torch.randint(0, model.config.vocab_size, shape, device=device)
    work = math.prod(shape) * model.flops_per_token()
    taken: list[float] = []
    deadline = time.perf_counter() + seconds
    while len(taken) < 2 or (len(taken) < 10 and time.perf_counter() < deadline):
        start = time.perf_counter()
        loss = model(ids, ids)
        loss.backward()
        loss.item()  # waits for the device
        taken.append(time.perf_counter() - start)
        model.zero_grad(set_to_none=True)
    return work / statistics.median(taken[1:])  # the first pays for what is set up


def measure_bytes(settings: Settings, hardware: Hardware) -> int:
    """The memory of a device that measure() takes: no optimizer, and the activations of the run that it measures."""
    parts = memory_parts(_measured(settings, hardware), hardware)
    return sum(parts[name] for name in ("parameters", "gradients", "activations", "logits", "runtime"))


def _measured(settings: Settings, hardware: Hardware, seconds: float = MEASURE_SECONDS) -> Settings:
    """The run that measure() measures: these settings, or smaller ones of which four passes fit into the time."""
    return _affordable(settings, hardware.peak * ASSUMED_MFU[hardware.device_type] * seconds / 4)


def _affordable(settings: Settings, budget: float) -> Settings:
    """The settings with one micro-batch of at most `budget` FLOPs, or as near to it as halving gets."""
    rows = settings.batch_plan()[0]
    one = dict(device_batch_size=rows, total_batch_size=rows * settings.max_seq_len)
    settings = replace(settings, **one)
    while settings.total_batch_size * meta_model(settings).flops_per_token() > budget:
        rows, depth, length = settings.rows, settings.depth, settings.max_seq_len
        if rows > 1:
            rows //= 2
        elif depth > 1:
            depth //= 2
        elif length > 32:
            length //= 2
        else:
            break
        settings = replace(
            settings,
            depth=depth,
            model_dim=settings.n_embd,
            max_seq_len=length,
            device_batch_size=rows,
            total_batch_size=rows * length,
        )
    return settings


def tying_saves(settings: Settings) -> str:
    """What tying saves for this vocabulary and width, in words."""
    untied = replace(settings, tie_weights=False, use_output_projection=False, output_projection_residual=False)
    count = meta_model(untied).num_parameters()
    share = count["lm_head"] / count["total"]
    return (
        f"saves {known_vocab_size(settings):,} x {settings.n_embd:,} = {millions(count['lm_head'])} "
        f"of {millions(count['total'])} parameters ({share:.0%})"
    )


# ---------------------------------------------------------------------------------------------------------------------
# in words


def parameter_table(settings: Settings) -> list[str]:
    """Lines `label  count  millions` with a header: one line a group of GPT.num_parameters, and the total."""
    count = meta_model(settings).num_parameters()
    optional = {"value embeddings": "value_embeds", "modality experts": "experts", "gates and scalars": "scalars"}
    labels = {
        "wte (tied with lm_head)" if settings.tie_weights else "wte": "wte",
        "lm_head": "lm_head",
        "output projection": "output_projection",
        **{label: key for label, key in optional.items() if count[key]},
        "transformer": "transformer",
        "total": "total",
    }
    rows = [f"{label:<28}{count[key]:>20,}{millions(count[key]):>14}" for label, key in labels.items()]
    return [f"{'parameters':<28}{'count':>20}{'millions':>14}", *rows]


def report(settings: Settings, hardware: Hardware, flops: float | None = None) -> list[str]:
    """The whole prediction as lines of at most 80 columns (a longer device name excepted)."""
    e = estimate(settings, hardware, flops)
    world = usable_devices(settings, hardware.count)
    devices = f"{world} x {hardware.name}" if world > 1 else hardware.name
    basis = "measured" if flops else f"assumes {ASSUMED_MFU[hardware.device_type]:.0%}"
    rate = f"{(flops or hardware.peak) / 1e12:.3g} TFLOP/s"
    lines = [
        *parameter_table(settings),
        "",
        f"FLOPs per token   {e.flops_per_token:,}",
        f"steps and tokens  {e.steps:,} steps of {settings.total_batch_size:,} = {e.tokens:,} tokens",
        f"peak memory       {gigabytes(e.peak_memory)} per device, of which",
        *(f"                  {gigabytes(size):>12}  {part}" for part, size in e.memory.items() if size),
        f"training time     about {duration(e.seconds)} on {devices}",
        f"                  ({basis}{' ' if flops else ' of a peak of '}{rate} per device)",
        f"disk              {gigabytes(e.kept * e.checkpoint_bytes)}: {e.kept:,} of {e.saves:,} checkpoints "
        f"of {gigabytes(e.checkpoint_bytes)} at a time",
    ]
    if hardware.memory and e.peak_memory > hardware.memory:
        lines.append(
            f"warning: a device has {gigabytes(hardware.memory)}: lower device_batch_size"
            + (" or the model" if e.memory["activations"] < e.peak_memory / 2 else "")
        )
    return lines


def millions(count: int) -> str:
    return f"{count / 1e6:,.2f}M"


def gigabytes(size: float) -> str:
    return f"{size / 2**30:,.2f} GiB"
