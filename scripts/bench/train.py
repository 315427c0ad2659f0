"""A whole training step: the default path against the plain one, or variants of a preset against each other.

`python -m scripts.bench train [--preset NAME] [--dtypes float32,bfloat16] [--variant name:key=value,... ...]`
Random tokens; all contenders have the batch, the weights at the start and the optimizer in common. Each takes the
micro-batch of --micro_batches that is fastest for it. A variant's keys are settings, and path=plain for the path of
plain.py; the first is the base of the ratios, and with --variant it runs a second time as the control.
"""

import argparse
import statistics

import torch

from nanochat.config.config_file import parse_value
from nanochat.config.settings import FIELDS, Settings, checked, preset, validate
from nanochat.gpt import GPT, GPTConfig
from nanochat.optim import build_optimizer
from nanochat.runtime import nearest_name, pick_device_type, pick_dtype
from nanochat.system.environment import UserError
from nanochat.training.compilation import compile_model
from nanochat.training.grad_accumulation import forward_backward
from scripts.bench.plain import PlainGPT
from scripts.bench.timing import alternate, matmul_peak, settled, summary, table

# 37.7 MFLOP a token: the shape that nanochat was measured at (dev/LOG.md).
SHAPE = dict(
    vocab_size=8192,
    depth=4,
    model_dim=256,
    head_dim=64,
    max_seq_len=512,
    total_batch_size=8192,
    device_batch_size=16,
    num_iterations=600,
    target_param_data_ratio=None,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--preset", help="settings to start from; None: the shape that nanochat was measured at")
    parser.add_argument("--dtypes", help="comma-separated; None: float32, and bfloat16 where the hardware has it")
    parser.add_argument("--variant", action="append", help="name:key=value,... (repeatable) instead of plain, default")
    parser.add_argument("--micro_batches", default="4,8,16", help="rows tried for those that set no device_batch_size")


def run(args: argparse.Namespace) -> dict:
    """Print the tables; returns contenders (seconds, tok_per_sec, mfu, ratio...), peak_flops and gradient_error."""
    named = dict(variants(args))
    base = next(iter(named))
    contenders = {}
    for name, changes in named.items():
        contenders[name] = best_contender(name, start(args.preset), changes, args.micro_batches, args.device_type)
    if args.variant:
        contenders["control"] = contenders[base]
    peaks: dict[str, list[float]] = {contender.dtype: [] for contender in contenders.values()}
    shapes = {shape for contender in contenders.values() for shape in contender.matmuls()}
    device = contenders[base].ids.device

    def measure_peaks() -> None:
        for dtype, found in peaks.items():
            found.append(matmul_peak(device, getattr(torch, dtype), shapes))

    times = alternate({name: one.step for name, one in contenders.items()}, args.rounds, between=measure_peaks)
    result = dict(contenders=summary(times, base), peak_flops={k: statistics.median(v) for k, v in peaks.items()})
    rows = []
    for name, found in result["contenders"].items():
        one = contenders[name]
        rate = one.ids.numel() / found["seconds"]
        mfu = [one.flops / t / peak for t, peak in zip(times[name], peaks[one.dtype], strict=True)]
        found.update(dtype=one.dtype, micro_batch=one.rows, tok_per_sec=rate, mfu=statistics.median(mfu))
        rows.append(
            (
                name,
                one.dtype,
                one.rows,
                rate,
                f"{found['mfu']:.1%}",
                1000 * found["seconds"],
                f"{1000 * found['fastest']:.0f} to {1000 * found['slowest']:.0f}",
                found["ratio"],
                1 / found["ratio"],
            )
        )
    told = ", ".join(f"{dtype} {peak / 1e9:,.0f} GFLOP/s" for dtype, peak in result["peak_flops"].items())
    print(f"{args.rounds} rounds, medians; matmul peak beside: {told}")
    print(
        table(
            ("contender", "dtype", "rows", "tok/s", "MFU", "ms", "min to max", f"time / {base}", "times faster"), rows
        )
    )
    if not args.variant:
        result["gradient_error"] = gradient_errors(start(args.preset), contenders, args.device_type)
    return result


def start(preset_name: str | None) -> dict:
    """The settings that a benchmark starts from: those of a preset, or of SHAPE."""
    return vars(preset(preset_name)) if preset_name else SHAPE


def settings_of(preset_name: str | None, **changes) -> Settings:
    """start() with some changed."""
    return Settings(**{**start(preset_name), **changes})


def variants(args: argparse.Namespace) -> list[tuple[str, dict]]:
    """(name, changes of the settings and `path`) of each contender."""
    if args.variant:
        pairs = [parse_variant(text) for text in args.variant]
        if len(dict(pairs)) < len(pairs) or "control" in dict(pairs):
            raise UserError("--variant: names must differ, and 'control' is taken")
        return pairs
    return [("plain", dict(path="plain", dtype="float32"))] + [
        ("default" if dtype == "float32" else f"default {dtype}", dict(dtype=dtype)) for dtype in chosen_dtypes(args)
    ]


def chosen_dtypes(args: argparse.Namespace) -> list[str]:
    """The names in --dtypes; without it float32, and what this machine would train in."""
    if not args.dtypes:
        best = str(pick_dtype(None, pick_device_type(args.device_type))).removeprefix("torch.")
        return list(dict.fromkeys(("float32", best)))
    dtypes = args.dtypes.split(",")
    if unknown := sorted(set(dtypes) - {"float32", "bfloat16"}):
        raise UserError(f"--dtypes {args.dtypes}: {unknown[0]!r} is not one of float32, bfloat16")
    return dtypes


def parse_variant(text: str) -> tuple[str, dict]:
    """'name:key=value,...' -> (name, changes); UserError for an unknown key."""
    name, _, pairs = text.partition(":")
    changes = {}
    for pair in filter(None, pairs.split(",")):
        key, equals, value = pair.partition("=")
        if pair == "path=plain":
            changes["path"] = "plain"
            continue
        if not equals or key not in FIELDS:
            raise UserError(f"--variant {text!r}: {pair!r} is not a setting=value{nearest_name(key, FIELDS)}")
        changes[key] = checked(key, parse_value(key, value))
    return name, changes


class Contender:
    """A model with its optimizer and the batch of a step."""

    def __init__(self, settings: Settings, path: str = "default", compiled: bool = True):
        self.settings = validate(settings)
        device = torch.device(pick_device_type(settings.device_type))
        self.model = new_model(settings, device, path)
        self.dtype = str(self.model.compute_dtype).removeprefix("torch.")
        self.optimizer = build_optimizer(self.model, settings, self.model.compute_dtype)
        self.rows = settings.batch_plan()[0]
        self.ids, self.targets = random_batch(self.model, settings.rows, settings.max_seq_len)
        self.valid = (self.targets >= 0).sum()
        self.flops = self.ids.numel() * self.model.flops_per_token()
        if compiled:
            self.compile()

    def compile(self) -> None:
        """compile_model() for one of many shapes in this process, all of one function."""
        torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
        compile_model(self.model, self.rows, self.optimizer)

    def gradients(self) -> float:
        """Loss of the batch in nats a token; the gradients are left in the parameters."""
        return forward_backward(self.model, self.ids, self.targets, self.rows, self.valid).sum().item()

    def step(self) -> float:
        """One step as scripts.base_train makes it; returns the loss."""
        loss = self.gradients()
        self.optimizer.reduce_gradients()
        self.optimizer.step()
        self.model.zero_grad(set_to_none=True)
        return loss

    def matmuls(self) -> list[tuple[int, int, int]]:
        """(rows, inner, columns) of the model's own matmuls: the MLP's two."""
        tokens, width = self.rows * self.settings.max_seq_len, self.settings.n_embd
        hidden = round(self.model.config.mlp_ratio * width)
        return [(tokens, width, hidden), (tokens, hidden, width)]


def new_model(settings: Settings, device: torch.device, path: str = "default") -> GPT:
    """The model of the settings, initialised from its seed; path "plain" takes plain.py's."""
    torch.manual_seed(settings.seed)
    with torch.device("meta"):
        model = (PlainGPT if path == "plain" else GPT)(GPTConfig.from_settings(settings))
    model.to_empty(device=device)
    model.init_weights(settings.tied_init_std)
    model.compute_dtype, model.route = pick_dtype(settings.dtype, device.type), settings.route
    return model


def random_batch(model: GPT, rows: int, length: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets, int64 [rows, length]; further modalities follow a text, begun at different places."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*bounds: int, size: tuple[int, int] = (rows, length + 1)) -> torch.Tensor:
        return torch.randint(*bounds, size, generator=generator)

    tokens, place = draw(model.config.vocab_size), torch.arange(length + 1)
    for number, (first, end) in enumerate(model.vocabulary.ranges[1:], 1):
        begin = length * number / (number + 3) + draw(max(1, length // 8), size=(rows, 1))
        tokens = torch.where(place < begin, tokens, draw(first, end))
    tokens = tokens.to(model.device)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def best_contender(name: str, begin: dict, changes: dict, micro_batches: str, device_type: str | None) -> Contender:
    """The contender with the micro-batch whose step is the fastest of three; its own device_batch_size is kept."""
    changes = dict(changes)
    path = changes.pop("path", "default")
    settings = {**begin, **changes, "device_type": changes.get("device_type", device_type)}
    if "device_batch_size" in changes:
        return Contender(Settings(**settings), path)
    try:
        sizes = sorted({int(rows) for rows in micro_batches.split(",")})
    except ValueError:
        raise UserError(f"--micro_batches {micro_batches!r} is not a list of numbers such as 4,8,16") from None
    found = {}
    rows = Settings(**settings).rows
    for size in [size for size in sizes if size <= rows and rows % size == 0] or [rows]:
        contender = Contender(Settings(**{**settings, "device_batch_size": size}), path)
        contender.step()
        seconds = []
        for _ in range(3):
            begun = settled()
            contender.step()
            seconds.append(settled() - begun)
        found[size] = min(seconds), contender
        print(f"{name}: {size} rows a micro-batch, {1000 * min(seconds):,.0f} ms a step", flush=True)
    return min(found.values(), key=lambda pair: pair[0])[1]


# ---------------------------------------------------------------------------------------------------------------------
# gradients


def gradient_errors(begin: dict, contenders: dict[str, Contender], device_type: str | None) -> dict[str, dict]:
    """|g - g plain| / |g plain| with g plain in float32, of the whole gradient and of the worst tensor, by contender.

    bfloat16 is added where it was not timed, not compiled, and the plain path in bfloat16, whose error is the measure.
    The weights are moved off their start, where whole gradients vanish.
    """
    everyone = dict(contenders)
    for path in ("default", "plain"):
        if f"{path} bfloat16" not in everyone:
            settings = Settings(**{**begin, "dtype": "bfloat16", "device_type": device_type})
            everyone[f"{path} bfloat16"] = Contender(settings, path, compiled=False)
    gradients = {name: gradients_of(contender) for name, contender in everyone.items()}
    errors = {name: compare(found, gradients["plain"]) for name, found in gradients.items() if name != "plain"}
    print("gradients against plain float32: relative error")
    rows = [(name, f"{e['whole']:.2e}", f"{e['worst']:.2e}", e["worst_tensor"]) for name, e in errors.items()]
    print(table(("contender", "whole", "worst tensor", "which"), rows))
    return errors


def gradients_of(contender: Contender, spread: float = 0.02) -> dict[str, torch.Tensor]:
    """Gradients of the batch at seeded weights: the initial ones plus noise, the same for every contender."""
    generator = torch.Generator().manual_seed(1)
    torch.manual_seed(contender.settings.seed)
    model = contender.model
    model.init_weights(contender.settings.tied_init_std)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(spread * torch.randn(parameter.shape, generator=generator).to(parameter.device))
    model.zero_grad(set_to_none=True)
    contender.gradients()
    return {name: parameter.grad.detach().clone() for name, parameter in model.named_parameters()}


def compare(found: dict[str, torch.Tensor], reference: dict[str, torch.Tensor]) -> dict:
    """Relative errors of gradients in the Euclidean norm: of all together, and of the worst tensor with its name."""
    difference = {name: (found[name].double() - g.double()).norm().item() for name, g in reference.items()}
    size = {name: g.double().norm().item() for name, g in reference.items()}
    each = {name: difference[name] / size[name] for name in size}
    worst = max(each, key=each.get)
    whole = sum(d**2 for d in difference.values()) ** 0.5 / sum(s**2 for s in size.values()) ** 0.5
    return dict(whole=whole, worst=each[worst], worst_tensor=worst)
