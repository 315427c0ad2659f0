"""Few-shot scoring as scripts.base_eval does it against the plain way: item by item, every prompt whole, all logits.

`python -m scripts.bench eval [--items N] [--shots N]`: items of random words with four options each, a word being a
token; in the shape that nanochat was measured at a 5-shot prompt is 300 to 410 tokens long. The model is random too,
its projections not zero, so that its choices differ. Each round takes the next slice of the items, both score it, and
in the end all choices are compared.
"""

import argparse
import math
import random
import statistics

import torch
import torch.nn.functional as F

from nanochat.evaluation.core import Row, make_task_rows, score_rows
from nanochat.evaluation.core_bundle import Task
from nanochat.gpt import GPT, GPTConfig
from nanochat.system.environment import UserError
from scripts.bench.timing import alternate, matmul_peak, summary, table

SHAPE = dict(sequence_len=512, vocab_size=8192, n_layer=4, n_head=4, n_kv_head=4, n_embd=256)
BATCH_TOKENS = 8192  # evaluate_task's own
PLAIN, SHARED = "one by one", "shared prefixes"


class Numbers:
    """A tokenizer whose texts are ids in decimal."""

    bos_id = SHAPE["vocab_size"] - 1

    def encode_batch(self, texts: list[str], num_threads: int = 1) -> list[list[int]]:
        return [[int(word) for word in text.split()] for text in texts]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--items", type=int, default=2000, help="to score, in as many slices as there are rounds")
    parser.add_argument("--shots", type=int, default=5, help="solved examples in front of an item")
    parser.add_argument("--seed", type=int, default=0, help="of the items and the model")


def run(args: argparse.Namespace) -> dict:
    """Print the table; returns contenders (seconds a slice, ms_per_item, ratio), differing choices and peak_flops."""
    size = args.items // args.rounds
    if size <= args.shots:
        raise UserError(f"--items {args.items} is too few for {args.rounds} rounds of {args.shots}-shot items")
    model, rng = random_model(args.seed, args.compute.device), random.Random(args.seed)
    tasks = [random_task(rng, size, args.shots) for _ in range(args.rounds)]
    losses: dict[str, list[list[float]]] = {PLAIN: [], SHARED: []}
    rows = [make_task_rows(Numbers(), task, task.items, range(size), SHAPE["sequence_len"]) for task in tasks]
    for warm in (one_by_one, shared_prefixes):
        warm(model, Task("warm", "multiple_choice", tasks[0].items[: args.shots + 1], args.shots))
    peaks: list[float] = []
    times = alternate(
        {
            PLAIN: lambda: losses[PLAIN].append(one_by_one(model, tasks[len(losses[PLAIN])])),
            SHARED: lambda: losses[SHARED].append(shared_prefixes(model, tasks[len(losses[SHARED])])),
        },
        args.rounds,
        warmup=0,
        between=lambda: peaks.append(matmul_peak(model.device, torch.float32)),
    )
    result = dict(
        contenders=summary(times, PLAIN),
        peak_flops=dict(float32=statistics.median(peaks)),
        items=size * args.rounds,
        tokens_per_row=statistics.mean(len(row.tokens) for part in rows for row in part),
        **compare(rows, losses[PLAIN], losses[SHARED]),
    )
    lines = []
    for name, found in result["contenders"].items():
        found["ms_per_item"] = 1000 * found["seconds"] / size
        spread = f"{1000 * found['fastest'] / size:.1f} to {1000 * found['slowest'] / size:.1f}"
        lines.append((name, found["ms_per_item"], spread, found["ratio"], 1 / found["ratio"]))
    print(
        f"{args.shots}-shot, four options, {result['tokens_per_row']:.0f} tokens a row: {args.rounds} rounds of {size} "
        f"items, medians; matmul peak beside: {result['peak_flops']['float32'] / 1e9:,.0f} GFLOP/s"
    )
    print(table(("scorer", "ms an item", "min to max", f"time / {PLAIN}", "times faster"), lines))
    print(
        f"choices that differ: {result['differing']} of {result['items']}; losses by at most "
        f"{result['largest_difference']:.1e} nats; the closest two best options are {result['closest']:.1e} apart"
    )
    return result


def random_model(seed: int, device: torch.device) -> GPT:
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**SHAPE))
    model.init_weights()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("c_proj.weight") or name == "lm_head.weight":  # zero, and nearly so
                parameter.normal_(std=0.05)
    return model.to(device).eval()


def random_task(rng: random.Random, count: int, shots: int) -> Task:
    def words(least: int, most: int) -> str:
        return " ".join(str(rng.randrange(Numbers.bos_id)) for _ in range(rng.randint(least, most)))

    items = [
        {"query": words(40, 62), "choices": [words(3, 12) for _ in range(4)], "gold": rng.randrange(4)}
        for _ in range(count)
    ]
    return Task("random", "multiple_choice", items, shots, chance=0.25)


def shared_prefixes(model: GPT, task: Task) -> list[float]:
    """The mean loss over the span of each row in nats, as evaluate_task comes by it."""
    rows = make_task_rows(Numbers(), task, task.items, range(len(task.items)), SHAPE["sequence_len"])
    return score_rows(model, rows, Numbers.bos_id, BATCH_TOKENS)[0]


@torch.no_grad()
def one_by_one(model: GPT, task: Task) -> list[float]:
    """The same without any of it: an item is a forward, its options padded to one length, and all logits are made."""
    losses = []
    for index in range(len(task.items)):
        rows = make_task_rows(Numbers(), task, task.items, [index], SHAPE["sequence_len"])
        width = max(len(row.tokens) for row in rows)
        ids = torch.tensor([row.tokens + [0] * (width - len(row.tokens)) for row in rows], device=model.device)
        for row, line, logits in zip(rows, ids, model(ids), strict=True):
            span = slice(row.start, row.end)
            losses.append(F.cross_entropy(logits[row.start - 1 : row.end - 1], line[span]).item())
    return losses


def compare(rows: list[list[Row]], plain: list[list[float]], shared: list[list[float]]) -> dict:
    """How many items get another choice, and by how much losses differ; closest: least gap between two best options."""
    differing, largest, closest = 0, 0.0, math.inf
    for part, ours, theirs in zip(rows, shared, plain, strict=True):
        items: dict[int, list[tuple[float, float]]] = {}
        for row, pair in zip(part, zip(ours, theirs, strict=True), strict=True):
            items.setdefault(row.item, []).append(pair)
        for pairs in items.values():
            mine, plainly = ([pair[side] for pair in pairs] for side in (0, 1))
            differing += mine.index(min(mine)) != plainly.index(min(plainly))
            largest = max(largest, *(abs(a - b) for a, b in pairs))
            first, second = sorted(plainly)[:2]
            closest = min(closest, second - first)
    return dict(differing=differing, largest_difference=largest, closest=closest)
