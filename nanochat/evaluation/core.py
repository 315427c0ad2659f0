"""CORE: in-context learning tasks, scored as in DCLM (arXiv 2406.11794).

The same scorer serves CORE and the offline suite. The model picks the option with the lowest mean loss over the tokens
in which the options differ (schema: over their common suffix); in language_modeling every greedy token of the
continuation has to be right.
"""

import itertools
import logging
import math
import os
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from nanochat.evaluation.bpb import eval_mode, sum_over_ranks
from nanochat.evaluation.core_bundle import Task, load_bundle
from nanochat.gpt import GPT
from nanochat.model.attention import kernels_for, sdpa
from nanochat.model.document_mask import document_begins
from nanochat.model.gpu_attention import visible

logger = logging.getLogger(__name__)

CORE_TASKS = 22

# ---------------------------------------------------------------------------------------------------------------------
# items -> prompts -> rows of tokens


def select_items(items: list[dict], max_items: int | None) -> list[dict]:
    """The items in scoring order: shuffled with Random(1337), then cut. Few-shot examples come from this list too."""
    items = list(items)
    random.Random(1337).shuffle(items)
    return items[:max_items]


def draw_fewshot_examples(items: list[dict], index: int, shots: int) -> list[dict]:
    """The solved examples in front of item `index`: drawn from the other items, fewer where there are not enough."""
    others = [i for i in range(len(items)) if i != index]
    return [items[i] for i in random.Random(1234 + index).sample(others, min(shots, len(others)))]


def render_prompts(task: Task, item: dict, shots: list[dict]) -> list[str]:
    """The texts to compare: one per option; for language_modeling the prompt without and with its continuation."""
    if task.kind == "multiple_choice":
        start = "".join(f"{s['query']}{task.delimiter}{s['choices'][s['gold']]}\n\n" for s in shots)
        return [f"{start}{item['query']}{task.delimiter}{choice}" for choice in item["choices"]]
    if task.kind == "schema":
        start = "".join(f"{s['context_options'][s['gold']]}{task.delimiter}{s['continuation']}\n\n" for s in shots)
        return [f"{start}{option}{task.delimiter}{item['continuation']}" for option in item["context_options"]]
    start = "".join(f"{s['context'].strip()}{task.delimiter}{s['continuation']}\n\n" for s in shots)
    without = f"{start}{item['context'].strip()}{task.delimiter}"
    return [without.strip(), without + item["continuation"]]


@dataclass
class Row:
    """One sequence to score: tokens[start:end] given those before. cut: a part of that span was truncated away."""

    item: int
    tokens: list[int]
    start: int
    end: int
    truncated: bool = False
    cut: bool = False


def make_rows(task: Task, index: int, sequences: list[list[int]], max_len: int) -> list[Row]:
    """The rows of one item from its tokenised prompts (BOS in front), truncated on the left to max_len tokens."""
    if task.kind == "schema":
        shared = _common_prefix_length(tokens[::-1] for tokens in sequences)
        spans = [(len(tokens) - shared, len(tokens)) for tokens in sequences]
    else:
        # For language_modeling the prompt without its continuation is the common prefix.
        shared = _common_prefix_length(sequences)
        if task.kind == "language_modeling":
            sequences = sequences[1:]
        spans = [(shared, len(tokens)) for tokens in sequences]
    rows = []
    for tokens, (start, end) in zip(sequences, spans, strict=True):
        dropped = max(0, len(tokens) - max_len)
        # The first scored token needs one token before it.
        cut = start < end and start - dropped < 1
        rows.append(Row(index, tokens[dropped:], max(1, start - dropped), end - dropped, dropped > 0, cut))
    return rows


def make_task_rows(tokenizer, task: Task, items: list[dict], indices: Iterable[int], max_len: int) -> list[Row]:
    """The rows of the items at `indices`, one item after the other; few-shot examples are drawn from all items."""
    texts = {i: render_prompts(task, items[i], draw_fewshot_examples(items, i, task.num_fewshot)) for i in indices}
    encoded = iter(tokenizer.encode_batch([text for group in texts.values() for text in group], os.cpu_count() or 1))
    rows: list[Row] = []
    for i, group in texts.items():
        rows += make_rows(task, i, [[tokenizer.bos_id, *next(encoded)] for _ in group], max_len)
    return rows


def _common_prefix_length(sequences: Iterable[list[int]]) -> int:
    """Length of the longest common prefix."""
    return sum(1 for _ in itertools.takewhile(lambda column: len(set(column)) == 1, zip(*sequences, strict=False)))


# ---------------------------------------------------------------------------------------------------------------------
# rows -> losses


FAMILY_PREFIX = 8  # tokens: rows of an item that differ in one of them share no prefill
MAX_REREAD = 1 / 8  # of a batch's prefixes: tokens beyond the shortest prefix, which every option reads itself


@dataclass
class Batch:
    """Families of rows in one forward: the `options` rows of a family have the first `shared` tokens in common.

    width: tokens of the longest row of all.
    """

    families: list[list[Row]]
    options: int
    shared: int
    width: int

    @property
    def rows(self) -> list[Row]:
        return [row for family in self.families for row in family]

    @property
    def tokens(self) -> int:
        """Those of all prefixes, and of all options with padding."""
        return len(self.families) * (self.shared + self.options * (self.width - self.shared))


def make_batches(rows: list[Row], share: bool, batch_tokens: int) -> Iterator[Batch]:
    """Batch the rows that have a span to score, longest prefix first; at most batch_tokens each, or one family.

    share: the rows of an item are one family if their first tokens are equal, else each row is its own. A truncated
    prompt has lost as many tokens as its option is longer, so options of other lengths are families of their own.
    """
    families: dict[tuple, list[Row]] = {}
    for number, row in enumerate(rows):
        if row.start < row.end and not row.cut:
            families.setdefault((row.item, *row.tokens[:FAMILY_PREFIX]) if share else (number,), []).append(row)

    queue = []
    for family in families.values():
        # The token before a span is read with the span: its features predict the first token.
        shared = _common_prefix_length(row.tokens[: row.start - 1] for row in family) if len(family) > 1 else 0
        queue.append((len(family), shared, max(len(row.tokens) for row in family), family))
    queue.sort(key=lambda entry: entry[:3], reverse=True)

    batch, prefixes = None, 0
    for options, shared, width, family in queue:
        if batch is not None and batch.options == options:
            larger = Batch([*batch.families, family], options, shared, max(width, batch.width))
            reread = options * (prefixes + shared - len(larger.families) * shared)
            if larger.tokens <= batch_tokens and reread <= MAX_REREAD * (prefixes + shared):
                batch, prefixes = larger, prefixes + shared
                continue
        if batch is not None:
            yield batch
        batch, prefixes = Batch([family], options, shared, width), shared
    if batch is not None:
        yield batch


class _PrefillDone(Exception):
    """All keys and values are stored: nobody reads the last layer's output for a prefix."""


class PrefixCache:
    """KV cache of a batch for GPT.features: prefills B prefixes of S tokens, then takes all n options of each at once.

    Keys and values are [B, S + n T, H_kv, D] per layer: an option attends to the prefix, which is not copied, and to
    itself (tree attention with one branching, as in arXiv 2305.09781).
    """

    def __init__(self, model: GPT, batch: Batch):
        """Prefill the prefixes in one forward."""
        config, B = model.config, len(batch.families)
        self.shared, self.width = batch.shared, batch.width - batch.shared
        shape = (config.n_layer, 2, B, self.shared + batch.options * self.width, config.n_kv_head, config.head_dim)
        self.store = torch.empty(shape, dtype=model.compute_dtype, device=model.device)
        self.position, self.last, self.document_begin = 0, None, 0

        ids = torch.tensor([family[0].tokens[: batch.shared] for family in batch.families]).to(model.device)
        with suppress(_PrefillDone):
            model.features(ids, self)

        self.position = self.shared
        self.last = ids[:, -1:].repeat_interleave(batch.options, dim=0)  # the newest token of each row: [B n, 1]
        if (begins := document_begins(ids, model.config.document_start)) is not None:
            self.document_begin = begins[:, -1:].repeat_interleave(batch.options, dim=0)

    def positions(self, count: int) -> slice:
        return slice(self.position, self.position + count)

    def advance(self, ids: torch.Tensor, begins: torch.Tensor | None) -> None:
        """Nothing is decoded after the options."""

    def attend(self, layer: int, q, k, v, window: int | None, mask: torch.Tensor | None) -> torch.Tensor:
        """Attend from q [B, S, H, D] with k and v [B, S, H_kv, D] of the prefixes, or [B n, T, ...] of the options.

        Returns a tensor of q's shape.
        """
        own = self.store[layer, :, :, self.position :] if self.position else self.store[layer, :, :, : self.shared]
        own[0], own[1] = k.reshape(own[0].shape), v.reshape(own[1].shape)
        if self.position == 0:
            if layer == len(self.store) - 1:
                raise _PrefillDone
            return sdpa(q, k, v, window, mask)

        keys, values = self.store[layer].transpose(2, 3)  # [B, H_kv, S + n T, D]
        queries = q.reshape(len(keys), -1, *q.shape[2:]).transpose(1, 2)
        gqa = queries.size(1) != keys.size(1)
        seen = self.options_mask(window, None if mask is None else mask.view(len(keys), 1, -1, 1))
        out = F.scaled_dot_product_attention(queries, keys, values, seen, enable_gqa=gqa)
        return out.transpose(1, 2).reshape(q.shape)

    def options_mask(self, window: int | None, begins: torch.Tensor | None) -> torch.Tensor:
        """Attention mask of the n T tokens of a family's options over the prefix and themselves: bool [n T, S + n T].

        begins: where their documents begin, [B, 1, n T, 1]; the result is [B, 1, n T, S + n T] then.
        """
        number = torch.arange(self.store.size(3) - self.shared, device=self.store.device)
        place, option = self.shared + number % self.width, number // self.width
        before = torch.arange(self.shared, device=self.store.device)
        others = visible(place[:, None], place, window, begins) & (option[:, None] == option)
        return torch.cat([visible(place[:, None], before, window, begins), others], dim=-1)


@torch.no_grad()
def score_rows(
    model, rows: list[Row], pad_id: int, batch_tokens: int, stop: Callable[[], bool] | None = None
) -> tuple[list[float], list[bool]]:
    """(mean loss in nats over the span, whether every token of the span is the greedy one) of each row.

    The prefix that the rows of an item share is prefilled once: for several items in one forward, up to the shortest
    prefix among them; a second forward reads the rest of all their rows. Rows are padded on the right, which a causal
    model does not see: the same as row by row up to rounding. A forward and its cache hold at most batch_tokens tokens
    (one item at least). Models other than GPT share nothing. An empty or cut span has loss +inf. stop: called before
    every forward; the remaining rows have no result.
    """
    results: dict[int, tuple[float, bool]] = {}
    with eval_mode(model), kernels_for(model.device, many_shapes=True):
        for batch in make_batches(rows, isinstance(model, GPT), batch_tokens):
            if stop is not None and stop():
                break
            cache = PrefixCache(model, batch) if batch.shared else None
            if cache is not None and stop is not None and stop():
                break
            results |= zip(map(id, batch.rows), _score(model, batch, cache, pad_id), strict=True)

    scores = [results.get(id(row), (math.inf, False)) for row in rows]
    return [loss for loss, _ in scores], [greedy for _, greedy in scores]


def _score(model, batch: Batch, cache: PrefixCache | None, pad_id: int) -> list[tuple[float, bool]]:
    """(loss, greedy) of the rows of a batch in one forward; the cache holds their prefixes."""
    rows, done = batch.rows, batch.shared
    ids = torch.tensor([row.tokens[done:] + [pad_id] * (batch.width - len(row.tokens)) for row in rows])
    ids = ids.to(model.device)
    features = model.features(ids, cache) if cache is not None else model.features(ids)

    # Position p predicts token p + 1.
    line, place = zip(*((n, p - done) for n, row in enumerate(rows) for p in range(row.start, row.end)), strict=True)
    line, place = torch.tensor(line, device=ids.device), torch.tensor(place, device=ids.device)
    # Logits only where a span is scored: with a large vocabulary they cost more than the layers.
    logits, targets = model.text_logits(features[line, place - 1]), ids[line, place]
    loss = F.cross_entropy(logits, targets, reduction="none").cpu()
    right = (logits.argmax(dim=-1) == targets).cpu()

    lengths = [row.end - row.start for row in rows]
    means = [nats.double().mean().item() for nats in loss.split(lengths)]
    hits = [bool(part.all()) for part in right.split(lengths)]
    return [(mean if math.isfinite(mean) else math.inf, hit) for mean, hit in zip(means, hits, strict=True)]


def is_correct(task: Task, item: dict, losses: Sequence[float], greedy: Sequence[bool]) -> bool:
    """Whether the item's rows answer it: the first of the lowest losses wins; no finite loss is a wrong answer."""
    if task.kind == "language_modeling":
        return greedy[0]
    best = min(losses)
    return best < math.inf and losses.index(best) == item["gold"]


def evaluate_task(
    model,
    tokenizer,
    task: Task,
    *,
    max_items: int | None = None,
    max_len: int | None = None,
    batch_tokens: int = 8192,
    rank: int = 0,
    world_size: int = 1,
    stop: Callable[[], bool] | None = None,
) -> dict:
    """Score one task; the ranks share its items and all get the same result.

    model: logits(features(idx [B, T])) -> [B, T, V] on its device. max_len: longest sequence in tokens, None takes
    model.config.sequence_len; longer ones lose their left end. batch_tokens: tokens of one forward and its cache.
    stop: called before every forward; if it returns True on any rank, all ranks raise EvaluationInterrupted.
    Returns accuracy, centered = (accuracy - chance) / (1 - chance), chance, items, seconds, truncated (items with a
    truncated prompt), cut (those that lost a part of the scored span, which counts as wrong) and correct: 0.0 or 1.0
    per item, in the order of select_items.
    """
    started = time.perf_counter()
    items = select_items(task.items, max_items)
    if task.num_fewshot > len(items) - 1:
        logger.info(f"{task.label}: {task.num_fewshot}-shot with {len(items)} items: using {len(items) - 1} examples")
    max_len = max_len or model.config.sequence_len
    rows = make_task_rows(tokenizer, task, items, range(rank, len(items), world_size), max_len)
    scored = zip(rows, *score_rows(model, rows, tokenizer.bos_id, batch_tokens, stop), strict=True)

    correct, truncated, cut = [0.0] * len(items), 0, 0
    for i, options in itertools.groupby(scored, key=lambda option: option[0].item):
        rows, losses, greedy = zip(*options, strict=True)
        is_cut = any(row.cut for row in rows)
        truncated += any(row.truncated for row in rows)
        cut += is_cut
        correct[i] = float(not is_cut and is_correct(task, items[i], losses, greedy))
    truncated, cut, *correct = sum_over_ranks([truncated, cut, *correct], model.device, world_size, stop)

    accuracy = sum(correct) / len(items)
    return dict(
        accuracy=accuracy,
        centered=(accuracy - task.chance) / (1 - task.chance),
        chance=task.chance,
        items=len(items),
        seconds=time.perf_counter() - started,
        truncated=int(truncated),
        cut=int(cut),
        correct=correct,
    )


def evaluate_tasks(model, tokenizer, tasks: list[Task], **options) -> dict:
    """{"score": mean of the centered accuracies, "tasks": {label: evaluate_task's result without `correct`}}."""
    results = {}
    for task in tasks:
        results[task.label] = evaluate_task(model, tokenizer, task, **options)
        del results[task.label]["correct"]
    return dict(score=sum(r["centered"] for r in results.values()) / len(results), tasks=results)


def evaluate_core(model, tokenizer, bundle: Path, *, max_per_task: int | None = None, **options):
    """CORE from a bundle folder: see evaluate_tasks for the result and evaluate_task for the options."""
    tasks = load_bundle(bundle)
    if len(tasks) != CORE_TASKS:
        logger.info(f"{bundle} holds {len(tasks)} tasks, the official CORE {CORE_TASKS}: the scores are not comparable")
    return evaluate_tasks(model, tokenizer, tasks, max_items=max_per_task, **options)
