"""What a run will cost, before it starts: parameters, FLOPs, memory, time, disk.

Counts come from the model and the optimizer themselves, built on the meta device: a second formula could drift away
from them. Only activations and speed are predictions.
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
from nanochat.hardware import compiler_problem, device_name, gpu_peak_flops, measure_matmul_flops
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
# Fraction of the matmul peak assumed for training without a measurement: large models on data-centre GPUs, and small
# ones on CPUs, where attention and elementwise work weigh more.
ASSUMED_MFU = {"cuda": 0.40, "mps": 0.25, "cpu": 0.50}
# Time of compiled passes on a CPU relative to eager ones, which measure() times: (blocks, output layer).
COMPILED_TIME = {torch.float32: (0.78, 0.98), torch.bfloat16: (0.62, 1.0)}
RUNTIME_BYTES = {"cpu": 460 << 20, "mps": 600 << 20, "cuda": 0}  # Python, torch, data; CUDA reports its tensors alone


@dataclass(frozen=True)
class Hardware:
    """One machine: type and name of its devices, how many; memory in bytes and peak FLOP/s of one; best dtype."""

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
    without_gradients: bool  # compiled, one micro-batch: no gradients exist yet when activations are largest

    @property
    def peak_memory(self) -> int:
        """Bytes per device. A GPU's optimizer step reuses the memory of the passes: the larger of the two counts. On a
        CPU both do, since the heap is fragmented by then.
        """
        parts = dict(self.memory)
        if "saving" not in parts:
            passes, step = parts.pop("activations") + parts.pop("logits"), parts.pop("step")
            parts["larger"] = max(passes - (parts["gradients"] if self.without_gradients else 0), step)
        return sum(parts.values())


def find_hardware(device_type: str | None = None) -> Hardware:
    """The devices of this machine; the peak of one that the table lacks is measured in 0.3 s."""
    kind = pick_device_type(device_type)
    compute = Compute(torch.device(kind), pick_dtype(None, kind))
    count = torch.cuda.device_count() if kind == "cuda" else 1
    known = gpu_peak_flops(torch.cuda.get_device_name()) if kind == "cuda" else None
    peak = known or measure_matmul_flops(compute.device, compute.dtype)
    return Hardware(kind, device_name(compute), count, _device_memory(kind), peak, compute.dtype)


def _device_memory(kind: str) -> int | None:
    if kind == "cuda":
        return torch.cuda.get_device_properties(0).total_memory
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):  # a system that does not tell
        return None


def meta_model(settings: Settings) -> GPT:
    """The model of these settings on the meta device: shapes and counts, no memory."""
    return _meta_model(GPTConfig.from_settings(settings, known_vocab_size(settings)))


def known_vocab_size(settings: Settings) -> int:
    """Ids of the tokenizer that the run will use: the named one, that of init_from, else vocab_size.

    Also vocab_size where the named one is missing, which the run itself will report.
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
    """The model with the most parameters during the run: the untied one where untie_at is set."""
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

    parameters, gradients   4 per parameter: both are float32
    optimizer               float32, each rank its shard: Muon momentum and a variance per neuron, AdamW two moments
    activations             what backward needs of a micro-batch
    logits                  one chunk of the loss head
    step                    held during an update: the reduced gradients of the matrices, and 6 copies of their largest
                            stack
    saving                  the copy that is written in the background, where it shares the device's memory (CPU)
    runtime                 the process itself, where memory is counted by resident set
    """
    model, kind = largest_model(settings), hardware.device_type
    dtype, compact = hardware.activation_dtype(settings), keeps_compiled_activations(settings, kind)
    parameters = sum(p.numel() for p in model.parameters())
    tokens = settings.batch_plan(world_size)[0] * settings.max_seq_len

    optimizer = build_optimizer(model, settings, dtype, world_size=world_size)
    stacks = [
        (4 * bucket.shard_length * math.prod(shape), 4 * bucket.shard_length * max(shape))
        for bucket in optimizer.buckets
        if bucket.stacked and (shape := bucket.params[0].shape)
    ]
    moments = sum(8 * bucket.shard_length for bucket in optimizer.buckets if not bucket.stacked)
    gradients = [stack for stack, _ in stacks]

    ids = max(len(matrix) for _, matrix in model.output_weights())
    rows = min(tokens, chunk_rows(kind, ids, settings.compile))
    return {
        "parameters": 4 * parameters,
        "gradients": 4 * parameters,
        "optimizer": moments + sum(stack + variances for stack, variances in stacks),
        "activations": _activation_bytes(model, tokens, dtype, compact, blocked_attention=kind == "cpu"),
        "logits": _logits_bytes(tokens, rows, ids, model.config.n_embd, dtype, compact),
        "step": sum(gradients) + 6 * max(gradients, default=0),
        **({"saving": checkpoint_bytes(settings)} if kind == "cpu" else {}),
        "runtime": RUNTIME_BYTES[kind],
    }


def _activation_bytes(model: GPT, tokens: int, dtype: torch.dtype, compact: bool, blocked_attention: bool) -> int:
    """Activations of a micro-batch: as torch saves them in eager mode and, measured on a GPU, compiled (compact).

    For n tokens, L layers, width C, k = n_kv_head / n_head and MLPs of 4 C:

        float32   n L C 4 (17.5 + k),   compiled 13.1 + 3 k, and 2.8 n C 4
        bfloat16  n L C 2 (21.2 + 2 k), compiled 15.1 + 3 k, and 2.8 n C 2

    plus two arrays per layer with experts, and the bfloat16 copies of the matrices. Residual scalars keep one more
    array a layer in eager mode, value embeddings k of one in every other layer, smear and bigrams two and backout one
    in all. Blocked attention also keeps its weights: about 9/16 H T per token, or H (window + a block).
    """
    config, size, full = model.config, dtype.itemsize, dtype == torch.float32
    kv = config.n_kv_head / config.n_head
    hidden = 2 * config.mlp_ratio + 2 * config.has_experts  # experts: the sorted tokens, there and back

    if compact:
        arrays = (5.1 if full else 7.1) + hidden + 3 * kv
    else:
        arrays = (9.5 + kv if full else 13.2 + 2 * kv) + hidden + config.residual_scalars
    per_token = config.n_embd * size * (arrays + config.value_embeddings * kv / 2)

    if blocked_attention:
        T = config.sequence_len
        spans = [span for layer in range(config.n_layer) for span in blocks(T, config.window(layer))]
        keys = sum((end - start) * (end - first) for start, end, first in spans) / T / config.n_layer  # of a query
        per_token += config.n_head * keys * size

    once = config.n_embd * size * (2.8 * compact + 2 * config.smear + config.backout + 2 * bool(config.bigram_rows))
    count = model.num_parameters()
    matrices = count["transformer"] + count["experts"] + count["output_projection"]
    return int(tokens * (config.n_layer * per_token + once) + (0 if full else 2 * matrices))


def _logits_bytes(tokens: int, rows: int, ids: int, width: int, dtype: torch.dtype, compact: bool) -> int:
    """A chunk of the loss head, [rows, ids]; the cast output matrix; gradients to the features and to that matrix.

    A chunk is 5 float32 arrays; compiled on a GPU, two in the dtype of the activations and two smaller ones.
    """
    table = ids * width
    chunk = rows * (2 * dtype.itemsize * ids + 8 * width) + 4 * table if compact else 5 * 4 * rows * ids
    return chunk + tokens * width * dtype.itemsize + table * (4 if dtype == torch.float32 else 6)


def keeps_compiled_activations(settings: Settings, device_type: str) -> bool:
    """Whether the activations are those of compiled blocks on a GPU, fewer than eager ones."""
    return settings.compile and device_type == "cuda"


def checkpoint_bytes(settings: Settings) -> int:
    """Bytes of one checkpoint: weights in float32 and the full optimizer state, at any number of ranks."""
    model = largest_model(settings)
    optimizer = build_optimizer(model, settings, torch.float32)
    total = 4 * sum(p.numel() for p in model.parameters())
    for bucket in optimizer.buckets:
        shape = bucket.params[0].shape
        total += 4 * bucket.length * (math.prod(shape) + max(shape)) if bucket.stacked else 8 * bucket.length
    return total


def estimate(settings: Settings, hardware: Hardware, flops: float | None = None) -> Estimate:
    """All predictions for a run on `hardware`, on all of its devices if the batch divides among them.

    flops: achieved FLOP/s of one device from measure(); None assumes a fraction of the peak. A step is its passes and
    Muon's matmuls at the same rate (most of the work in small batches of wide models). measure() times eager passes;
    the gain of compilation is known for CPUs only, so a GPU will be faster than predicted.
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
    saves, kept = count_checkpoints(settings, steps)
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
        without_gradients=keeps_compiled_activations(settings, hardware.device_type)
        and settings.batch_plan(world)[1] == 1,
    )


def count_checkpoints(settings: RunSettings, steps: int) -> tuple[int, int]:
    """(checkpoints that a run saves, the most of them on disk at a time)."""
    saves = -(-steps // settings.save_every) if settings.save_every else 1
    # pruning waits until the newer checkpoint is verified: keep_last + 1 are on disk for a moment
    return saves, min(saves, settings.keep_last + 1) if settings.keep_last else saves


def usable_devices(settings: RunSettings, count: int) -> int:
    """The largest number of ranks, at most `count`, that divides the rows of a batch; 1 without devices."""
    rows, batch = settings.rows, settings.device_batch_size
    legal = (n for n in range(count, 1, -1) if rows % n == 0 and rows // n % min(batch, rows // n) == 0)
    return next(legal, 1)


def measure(settings: Settings, hardware: Hardware, seconds: float = MEASURE_SECONDS) -> float:
    """FLOP/s of one device in a few real forward and backward passes, for estimate(flops=...).

    A run too large for `seconds` is measured at smaller settings: fewer rows, then layers, then a shorter context.
    """
    settings = _shrink_to_time(settings, hardware, seconds)
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
    return work / statistics.median(taken[1:])  # the first includes one-time set-up


def measure_bytes(settings: Settings, hardware: Hardware) -> int:
    """Bytes of device memory that measure() takes: no optimizer, and the activations of its smaller settings."""
    parts = memory_parts(_shrink_to_time(settings, hardware), hardware)
    return sum(parts[name] for name in ("parameters", "gradients", "activations", "logits", "runtime"))


def _shrink_to_time(settings: Settings, hardware: Hardware, seconds: float = MEASURE_SECONDS) -> Settings:
    """These settings, or smaller ones of which four passes fit into the time."""
    return _shrink_to_budget(settings, hardware.peak * ASSUMED_MFU[hardware.device_type] * seconds / 4)


def _shrink_to_budget(settings: Settings, budget: float) -> Settings:
    """Settings of one micro-batch of at most `budget` FLOPs, or as close as halving gets."""
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


def describe_tying_savings(settings: Settings) -> str:
    """The parameters that tying saves at this vocabulary and width, as text."""
    untied = replace(settings, tie_weights=False, use_output_projection=False, output_projection_residual=False)
    count = meta_model(untied).num_parameters()
    share = count["lm_head"] / count["total"]
    return (
        f"saves {known_vocab_size(settings):,} x {settings.n_embd:,} = {format_millions(count['lm_head'])} "
        f"of {format_millions(count['total'])} parameters ({share:.0%})"
    )


# ---------------------------------------------------------------------------------------------------------------------
# as text


def parameter_table(settings: Settings) -> list[str]:
    """Lines `label  count  millions` with a header: a line per group of GPT.num_parameters, and the total."""
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
    rows = [f"{label:<28}{count[key]:>20,}{format_millions(count[key]):>14}" for label, key in labels.items()]
    return [f"{'parameters':<28}{'count':>20}{'millions':>14}", *rows]


def report(settings: Settings, hardware: Hardware, flops: float | None = None) -> list[str]:
    """All predictions as lines of at most 80 columns (but for a long device name)."""
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
        f"peak memory       {format_gib(e.peak_memory)} per device, of which",
        *(f"                  {format_gib(size):>12}  {part}" for part, size in e.memory.items() if size),
        f"training time     about {duration(e.seconds)} on {devices}",
        f"                  ({basis}{' ' if flops else ' of a peak of '}{rate} per device)",
        f"disk              {format_gib(e.kept * e.checkpoint_bytes)}: {e.kept:,} of {e.saves:,} checkpoints "
        f"of {format_gib(e.checkpoint_bytes)} at a time",
    ]
    if hardware.memory and e.peak_memory > hardware.memory:
        lines.append(
            f"warning: a device has {format_gib(hardware.memory)}: lower device_batch_size"
            + (" or the model" if e.memory["activations"] < e.peak_memory / 2 else "")
        )
    return lines


def format_millions(count: int) -> str:
    return f"{count / 1e6:,.2f}M"


def format_gib(size: float) -> str:
    return f"{size / 2**30:,.2f} GiB"
