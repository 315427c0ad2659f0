"""What only a GPU can show: `python -m scripts.stress.gpu [--quick] [--only training,fp8] [--output DIR]`.

An estimated 12 minutes on one H200, with torch, numpy, tiktoken, safetensors and pyarrow alone. Prints a Markdown
table for each check, and writes gpu_check.json and gpu_check.md into DIR after each. A check that fails says so, the
others go on, and the exit code is 1.
"""

import argparse
import dataclasses
import gc
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file

from nanochat.checkpoint_files import step_dir, weights_hash
from nanochat.config.presets import MODERN
from nanochat.config.settings import Settings
from nanochat.engine import decode
from nanochat.files import check_output, write_atomically
from nanochat.gpt import GPTConfig
from nanochat.hardware import gpu_peak_flops, memory_mb
from nanochat.model import attention
from nanochat.model.document_mask import document_block_mask
from nanochat.model.gpu_attention import flex
from nanochat.optim import ALL_GATHER, REDUCE_SCATTER
from nanochat.runtime import Compute, first_line, init_compute, run_script
from nanochat.system.environment import UserError
from nanochat.training.compilation import compile_model
from nanochat.training.estimate import estimate, find_hardware
from nanochat.training.fp8 import convert_linears, unsupported_reason
from nanochat.training.kernel_selection import CANDIDATES, choose_attention, rejection_reason, select_attention
from scripts.bench.__main__ import machine as describe
from scripts.bench.timing import alternate, matmul_peak, median_ratio, settled, table
from scripts.bench.train import Contender, compare, gradients_of

WARMUP = 5  # tokens generated before any are timed
start_process = subprocess.Popen  # tests put forks here


@dataclass(frozen=True)
class Plan:
    """How large the checks are."""

    compute: Compute
    depths: dict[int, int] = field(default_factory=lambda: {12: 32, 20: 16})  # and rows of a micro-batch
    shape: dict = field(default_factory=lambda: dict(max_seq_len=2048, vocab_size=65536, head_dim=128))
    batch: int = 524_288  # tokens of a step that is timed: as many as nanochat's
    steps: int = 5
    new_tokens: int = 256
    compiled: bool = True
    small: dict = field(  # for what is compared, not timed
        default_factory=lambda: dict(
            depth=4,
            model_dim=256,
            head_dim=64,
            max_seq_len=512,
            vocab_size=4096,
            window_pattern="SSSL",
            short_window=100,
            total_batch_size=4096,
            device_batch_size=8,
            eval_tokens=8192,
        )
    )

    def settings(self, depth: int, micro_batches: int = 1, **changes) -> Settings:
        rows = self.depths[depth]
        batch = dict(device_batch_size=rows, total_batch_size=micro_batches * rows * self.shape["max_seq_len"])
        return Settings(**{**self.shape, **batch, "depth": depth, "device_type": self.compute.device_type, **changes})

    def trainings(self) -> Iterator[tuple[str, Settings]]:
        """What is trained for its speed: each depth as classic nanochat, and the smallest with what the presets add."""
        for depth in self.depths:
            yield f"d{depth}", self.settings(depth, total_batch_size=self.batch)
        depth = min(self.depths)
        yield f"d{depth}, as the presets", self.settings(depth, total_batch_size=self.batch, tie_weights=True, **MODERN)

    def memories(self) -> Iterator[tuple[str, Settings]]:
        """What is held against the prediction of memory, in micro-batches of an eighth."""
        depth, T = min(self.depths), self.shape["max_seq_len"]
        rows = max(1, self.depths[depth] // 8)
        for name, changes in {
            "classic": {},
            "two micro-batches": dict(total_batch_size=2 * rows * T),
            "grouped queries": dict(n_kv_head=1),
            "short context": dict(max_seq_len=T // 4, device_batch_size=4 * rows),
            "tied, small vocabulary": dict(tie_weights=True, vocab_size=max(300, self.shape["vocab_size"] // 8)),
            "as the presets": dict(tie_weights=True, **MODERN),
            "float32": dict(dtype="float32"),
            "without compiling": dict(compile=False),
        }.items():
            yield name, self.settings(depth, **(dict(device_batch_size=rows, total_batch_size=rows * T) | changes))


@dataclass
class Finding:
    """Of one check: a table, what it says besides, and what is not as it should be."""

    header: tuple[str, ...] = ()
    rows: list[tuple] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def lines(self, name: str, seconds: float) -> list[str]:
        found = [table(self.header, self.rows), ""] if self.rows else []
        wrong = [f"- FAILED: {problem}" for problem in self.problems]
        return [f"## {name} ({seconds:.0f} s)", "", *found, *(f"- {note}" for note in self.notes), *wrong, ""]


def main(argv: list[str] | None = None) -> dict:
    """Run the checks; returns what gpu_check.json holds, or leaves with code 1 when one failed."""
    parser = argparse.ArgumentParser(prog="scripts.stress.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="only d12, fewer and smaller steps")
    parser.add_argument("--only", default=",".join(CHECKS), help=f"comma-separated, of {', '.join(CHECKS)}")
    parser.add_argument("--output", type=Path, default=Path("gpu_check"), help="folder for the figures")
    args = parser.parse_args(argv)
    names = args.only.split(",")
    if unknown := [name for name in names if name not in CHECKS]:
        raise UserError(f"--only {args.only}: {unknown[0]!r} is not one of {', '.join(CHECKS)}")
    if not torch.cuda.is_available():
        raise UserError("scripts.stress.gpu needs a CUDA GPU, and torch sees none: everything else has its tests")
    plan = Plan(init_compute("cuda", None, seed=1))
    if args.quick:
        plan = dataclasses.replace(plan, depths={12: 16}, batch=65_536, steps=4, new_tokens=64)
    check_output(args.output / "gpu_check.json", "--output")
    return run(plan, names, args.output)


def run(plan: Plan, names: list[str], output: Path) -> dict:
    """The named checks, one after the other, and their files."""
    result: dict = dict(machine=describe(plan.compute), plan=dataclasses.asdict(plan, dict_factory=_readable))
    told = [f"# GPU check: {', '.join(f'{key} {value}' for key, value in result['machine'].items())}", ""]
    print("\n".join(told))
    torch._dynamo.config.recompile_limit = 64  # many models and kernels share the functions that are compiled
    for name in names:
        start = time.perf_counter()
        try:
            finding = CHECKS[name](plan)
        except Exception as error:  # a check that cannot run is a finding like others
            traceback.print_exc()
            finding = Finding(problems=[f"{type(error).__name__}: {first_line(error)}"])
        free(plan)
        seconds = time.perf_counter() - start
        lines = finding.lines(name, seconds)
        print("\n".join(lines), flush=True)
        told += lines
        result[name] = dict(dataclasses.asdict(finding), seconds=seconds)
        write_atomically(output / "gpu_check.json", json.dumps(result, indent=1, default=str) + "\n")
        write_atomically(output / "gpu_check.md", "\n".join(told))
    failed = [name for name in names if result[name]["problems"]]
    print(f"{output / 'gpu_check.json'}: {len(names)} checks, failed: {', '.join(failed) or 'none'}", flush=True)
    if failed:
        sys.exit(1)
    return result


def free(plan: Plan) -> None:
    """Give the memory of models that nobody knows any more back to the GPU."""
    gc.collect()
    plan.compute.free_memory()


def _readable(pairs: list[tuple]) -> dict:
    return {key: value if isinstance(value, (int, dict)) else str(value) for key, value in pairs}


def contender(plan: Plan, settings: Settings, path: str = "default", compiled: bool = True, fp8: bool = False):
    """A model with its optimizer and batch, made as base_train makes it."""
    one = Contender(settings, path, compiled=False)
    compiled = compiled and plan.compiled
    select_attention(one.model, compiled)
    if fp8:
        convert_linears(one.model)
    if compiled:
        compile_model(one.model, one.rows, one.optimizer)
    return one


# ---------------------------------------------------------------------------------------------------------------------
# speed and memory


def training(plan: Plan) -> Finding:
    """Steps of nanochat's dial: rate, MFU, and memory against the prediction."""
    hardware = dataclasses.replace(find_hardware(plan.compute.device_type), count=1)
    finding = Finding(
        ("model", "tok/s", "MFU", "of the matmul peak beside", "ms a step", "GiB predicted", "GiB measured", "ratio"),
        notes=["the goal for MFU is 55% of the data sheet's peak on one H100"],
    )
    sheet = gpu_peak_flops(hardware.name) or hardware.peak
    for name, settings in plan.trainings():
        one, peaks = fresh(plan, settings), []
        times = alternate({"step": one.step}, plan.steps)["step"]
        memory = memory_against(plan, name, settings, finding.problems)
        for _ in range(3):
            peaks.append(matmul_peak(plan.compute.device, plan.compute.dtype, one.matmuls()))
        seconds = statistics.median(times)
        finding.rows.append(
            (
                name,
                one.ids.numel() / seconds,
                f"{one.flops / seconds / sheet:.1%}",
                f"{one.flops / seconds / statistics.median(peaks):.1%}",
                1000 * seconds,
                *memory,
            )
        )
        del one
    return finding


def memory(plan: Plan) -> Finding:
    """The peak of two steps against the prediction, for settings that change what is kept."""
    finding = Finding(("settings", "GiB predicted", "GiB measured", "ratio"))
    for name, settings in plan.memories():
        one = fresh(plan, settings)
        for _ in range(2):
            one.step()
        finding.rows.append((name, *memory_against(plan, name, settings, finding.problems)))
        del one
    return finding


def fresh(plan: Plan, settings: Settings) -> Contender:
    """A contender in memory that holds nothing else, whose peak is counted from here on."""
    free(plan)
    if plan.compute.device_type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    return contender(plan, settings, compiled=settings.compile)


def memory_against(plan: Plan, name: str, settings: Settings, problems: list[str]) -> tuple[float, float, float]:
    """(GiB predicted, GiB measured, their ratio) of the steps since fresh(); off by a tenth, on a GPU, is a problem."""
    measured = memory_mb(plan.compute) * 2**20
    hardware = dataclasses.replace(find_hardware(plan.compute.device_type), count=1)
    predicted = estimate(settings, hardware).peak_memory
    if plan.compute.device_type == "cuda" and not 0.9 <= predicted / measured <= 1.1:
        problems.append(f"{name}: memory is predicted {predicted / measured - 1:+.0%} of what it takes")
    return predicted / 2**30, measured / 2**30, predicted / measured


def attention_choices(plan: Plan) -> Finding:
    """Every kernel that is right here, forward and backward: with and without a window, and with eight documents a row,
    whose masks are made anew for each batch.
    """
    device, dtype = plan.compute.device, plan.compute.dtype
    settings = plan.settings(max(plan.depths), window_pattern="SL")
    config = GPTConfig.from_settings(settings)
    T, heads = config.sequence_len, (config.n_head, config.n_kv_head, config.head_dim)
    finding = Finding(("kernel", "sees", "ms", "min to max", "time / SDPA", "MiB"))
    finding.notes += map(str, choose_attention(config, device, dtype, compiled=plan.compiled))
    own = torch.Generator(device).manual_seed(0)
    shapes = ((plan.depths[max(plan.depths)], T, n, config.head_dim) for n in (*heads[:2], heads[1], heads[0]))
    q, k, v, weight = (torch.randn(*shape, device=device, generator=own).to(dtype).requires_grad_() for shape in shapes)
    eight = (torch.arange(T, device=device) // -(-T // 8) * -(-T // 8)).expand(len(q), T)
    for window, begins in ((None, None), (T // 4, None), (T // 16, None), (None, eight)):
        documents = begins is not None
        seen = "documents" if documents else f"window of {window}" if window else "all"

        def timed(kernel: Callable, window: int | None = window, begins=begins) -> Callable[[], object]:
            def call() -> object:
                mask = document_block_mask(begins, window) if kernel is flex and begins is not None else begins
                return torch.autograd.grad(kernel(q, k, v, window, mask), (q, k, v), weight)

            return call

        trial = (heads, device, dtype, window, documents)
        reasons = {name: rejection_reason(kernel, *trial) for name, kernel in CANDIDATES}
        contenders = {name: timed(kernel) for name, kernel in CANDIDATES if reasons[name] is None}
        finding.notes += [f"{seen}: no {name}: {reason}" for name, reason in reasons.items() if reason]
        contenders["SDPA"] = timed(attention.sdpa)
        memory = {name: _extra_bytes(plan.compute, step) for name, step in contenders.items()}
        for name, times in (found := alternate(contenders, plan.steps)).items():
            finding.rows.append(
                (
                    name,
                    seen,
                    1000 * statistics.median(times),
                    f"{1000 * min(times):.2f} to {1000 * max(times):.2f}",
                    median_ratio(found, name, "SDPA"),
                    None if memory[name] is None else memory[name] / 2**20,
                )
            )
    return finding


def _extra_bytes(compute: Compute, step: Callable[[], object]) -> int | None:
    """The most that a call holds beyond what was there, on a GPU."""
    step()
    if compute.device_type != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    return torch.cuda.max_memory_allocated() - before


def fp8(plan: Plan) -> Finding:
    """Steps with the large matrices in FP8 against the same without, and what it does to loss and gradient."""
    if plan.compute.device_type == "cuda" and (device := unsupported_reason(plan.compute.device)):
        return Finding(notes=[f"skipped: {device} has no FP8"])
    depth = max(plan.depths)
    settings = plan.settings(depth, micro_batches=4)
    both = {name: contender(plan, settings, fp8=name == "FP8") for name in ("without", "FP8")}
    error = compare(*(gradients_of(both[name]) for name in ("FP8", "without")))["whole"]
    for one in both.values():
        torch.manual_seed(settings.seed)
        one.model.init_weights(settings.tied_init_std)
        one.model.zero_grad(set_to_none=True)
    times = alternate({name: one.step for name, one in both.items()}, plan.steps)
    last = [one.step() for one in both.values()]  # after as many steps on one batch
    rates = [both[name].ids.numel() / statistics.median(times[name]) for name in both]
    finding = Finding(("model", "tok/s", "tok/s FP8", "time FP8 / without", "loss", "loss FP8", "gradient error"))
    finding.rows.append((f"d{depth}", *rates, median_ratio(times, "FP8", "without"), *last, error))
    if not (error < 0.2 and abs(last[1] - last[0]) < 0.05 * last[0]):
        finding.problems.append(
            f"d{depth}: FP8 changes the gradient by {error:.1%}, the loss from {last[0]} to {last[1]}"
        )
    return finding


def decoding(plan: Plan) -> Finding:
    """Tokens a second of generation, eager and compiled with a CUDA graph, and whether either changes a text."""
    finding = Finding(("model", "rows", "new tokens", "tok/s", "ms a token", "tok/s compiled", "ms a token compiled"))
    generator = torch.Generator().manual_seed(0)
    for depth in plan.depths:
        model = contender(plan, plan.settings(depth), compiled=False).model
        for rows in (1, 16):
            prompts = torch.randint(model.config.vocab_size, (rows, 64), generator=generator)
            figures = []
            for compiled in (False, plan.compiled):
                tokens = decode(model, prompts, 1 + WARMUP + plan.new_tokens, temperature=0, compiled=compiled)
                for _ in range(1 + WARMUP):  # of the prompt, and while compiling and recording
                    next(tokens)
                start = settled()
                count = sum(1 for _ in tokens)
                seconds = settled() - start
                figures += [rows * count / seconds, 1000 * seconds / count]
            finding.rows.append((f"d{depth}", rows, count, *figures))
        del model
    settings = Settings(**plan.small, dtype="float32", device_type=plan.compute.device_type, document_mask=True)
    model = contender(plan, settings, compiled=False).model
    with torch.no_grad(), exact_matmuls():
        for parameter in model.parameters():  # off their start, where every block is the identity
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator).to(parameter.device))
        for rows in (1, 3):  # past the window of 100
            ids = torch.randint(model.config.vocab_size, (rows, 150), generator=generator)
            ids[:, 120] = model.config.document_start
            wanted = ids.to(model.device)
            for _ in range(20):
                wanted = torch.cat([wanted, model(wanted)[:, -1:].argmax(-1)], dim=1)
            for how in (dict(compiled=False), dict(compiled=True), dict(compiled=True, guidance=2.0, unguided=[1, 2])):
                found = torch.stack(list(decode(model, ids, 20, temperature=0, **how)), dim=1)
                text = wanted[:, 150:]
                if "guidance" in how:
                    text = torch.stack(list(decode(model, ids, 20, temperature=0, **{**how, "compiled": False})), dim=1)
                if not torch.equal(found, text):
                    finding.problems.append(f"{rows} rows, {how}: {found.tolist()} comes instead of {text.tolist()}")
    return finding


# ---------------------------------------------------------------------------------------------------------------------
# sameness


@contextmanager
def exact_matmuls() -> Iterator[None]:
    """float32 products in float32, not in TensorFloat-32 as training has them."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def gradients(plan: Plan) -> Finding:
    """The gradients of every path against the plain one in float32, eager."""
    finding = Finding(("path", "relative error", "worst tensor", "which"))
    paths = {
        "plain": ("plain", "float32", False),
        "default eager": ("default", "float32", False),
        "default compiled": ("default", "float32", True),
        "plain bfloat16": ("plain", "bfloat16", False),
        "default bfloat16 eager": ("default", "bfloat16", False),
        "default bfloat16 compiled": ("default", "bfloat16", True),
    }
    found, errors = {}, {}
    with exact_matmuls():
        for name, (path, dtype, compiled) in paths.items():
            settings = Settings(**plan.small, dtype=dtype, device_type=plan.compute.device_type)
            found[name] = gradients_of(contender(plan, settings, path, compiled))
    for name in list(paths)[1:]:
        error = compare(found[name], found["plain"])
        errors[name] = error["whole"]
        finding.rows.append((name, error["whole"], error["worst"], error["worst_tensor"]))
        limit = 1e-5 if paths[name][1] == "float32" else max(1e-2, 1.05 * errors["plain bfloat16"])
        if error["whole"] > limit and paths[name][0] == "default":
            finding.problems.append(f"{name}: the gradient is off by {error['whole']:.2e}, at most {limit:.0e}")
    return finding


def collectives(plan: Plan) -> Finding:
    """The process group of GPUs, of one rank: what goes in comes out."""
    backend = "nccl" if plan.compute.device_type == "cuda" else "gloo"
    device = plan.compute.device if backend == "nccl" else None
    dist.init_process_group(
        backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timedelta(seconds=60), device_id=device
    )
    try:
        x = torch.arange(8.0, device=plan.compute.device)
        outputs = {"all_reduce": x.clone(), "reduce_scatter": torch.empty_like(x), "all_gather": torch.empty_like(x)}
        dist.all_reduce(outputs["all_reduce"])
        REDUCE_SCATTER(outputs["reduce_scatter"], x)
        ALL_GATHER(outputs["all_gather"], x)
    finally:
        dist.destroy_process_group()
    wrong = [f"{backend}: {name} changed {x.tolist()}" for name, y in outputs.items() if not torch.equal(x, y)]
    return Finding(notes=[f"{backend}: {', '.join(outputs)}"], problems=wrong)


def runs(plan: Plan) -> Finding:
    """scripts.base_train: under torchrun, resumed and in float32 as by itself, with --deterministic."""
    finding = Finding(("run", "losses"))
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as folder:
        base, steps = Path(folder), 6
        shape = {**plan.small, "vocab_size": 300, "num_iterations": steps, "save_every": steps // 2, "eval_every": None}
        shape |= dict(device_type=plan.compute.device_type, deterministic=True, compile=plan.compiled)
        shape |= dict(sample_every=None, data=_some_text(base), dtype="bfloat16")

        def losses(tag: str, *words: str, torchrun: bool = False, **changes) -> list[float]:
            flags = [f"--{name}={value}" for name, value in {**shape, "model_tag": tag, **changes}.items()]
            _train(base, [f"--model_tag={tag}", *words] if words else flags, torchrun)
            lines = (base / "base_checkpoints" / tag / "metrics.jsonl").read_text().splitlines()
            found = [line["loss"] for line in map(json.loads, lines) if "tokens" in line]
            finding.rows.append((" ".join((tag, *words)), ", ".join(f"{loss:.6f}" for loss in found)))
            return found

        def weights(tag: str) -> str:
            return weights_hash(load_file(step_dir(base / "base_checkpoints" / tag, steps) / "model.safetensors"))

        alone, through = losses("plain"), losses("torchrun", torchrun=True)
        if alone != through or weights("plain") != weights("torchrun"):
            finding.problems.append("torchrun --nproc_per_node=1 does not train as plain python does")
        before = weights("plain")
        shutil.rmtree(step_dir(base / "base_checkpoints" / "plain", steps))
        if losses("plain", "--resume") != alone or weights("plain") != before:
            finding.problems.append("a run that was resumed in the middle ends elsewhere")
        full = losses("float32", dtype="float32")
        if max(abs(a - b) for a, b in zip(alone, full, strict=True)) > 0.05:
            finding.problems.append("bfloat16 and float32 lose each other within 6 steps")
        losses("documents", document_mask=True)
    return finding


def _some_text(base: Path) -> Path:
    """A folder of small documents of a few words."""
    words = "the a cat dog tree house runs sleeps under over behind quickly and then never 1 22 333".split()
    folder, own = base / "text", random.Random(0)
    folder.mkdir()
    for number in range(60):
        lines = (" ".join(own.choices(words, k=9)) for _ in range(24))
        (folder / f"story {number}.txt").write_text("\n".join(lines))
    return folder


def _train(base: Path, flags: list[str], torchrun: bool) -> None:
    """scripts.base_train in a process of its own; RuntimeError with the end of what it said when it fails."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1"] if torchrun else []
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("TORCHELASTIC")}
    environment = {**inherited, "NANOCHAT_BASE_DIR": str(base), "PYTHONPATH": str(Path(__file__).parents[2])}
    process = start_process(
        [sys.executable, *launcher, "-m", "scripts.base_train", *flags],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    said, _ = process.communicate(timeout=180)
    if process.returncode:
        raise RuntimeError(f"{' '.join(flags[-2:])} left with code {process.returncode}: {said[-1500:]}")


CHECKS: dict[str, Callable[[Plan], Finding]] = {
    "training": training,
    "memory": memory,
    "attention": attention_choices,
    "fp8": fp8,
    "decoding": decoding,
    "gradients": gradients,
    "collectives": collectives,
    "runs": runs,
}

if __name__ == "__main__":
    run_script(main)
