"""The OFFLINE suite: five tasks built from held-out documents, for machines without the CORE bundle.

Item format and scorer are CORE's, the tasks are not: its score says nothing about CORE, is never printed under that
name, and compares only between equal data fingerprints. Each accuracy has two cheap baselines, since chance alone is
too easy: a character 5-gram trained on the training split, and word overlap with the context. A model between chance
and overlap has learned the topic of a text, not its order.
"""

import keyword
import logging
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from nanochat.evaluation.core import evaluate_tasks, select_items
from nanochat.evaluation.core_bundle import Task, write_bundle

logger = logging.getLogger(__name__)

ITEMS = 400  # of a task: the 95% band at chance is +-4.2 points for 4 options, +-4.9 for 2
FEWEST = 20  # a task with fewer items is skipped
MAX_HELD_OUT = 16_000_000  # characters of held-out text that items are made from
MAX_TRAINING = 8_000_000  # characters of training text that the 5-gram learns from
MAX_CONTEXT = 1_000  # characters in front of the options
CONTEXT_LINES = 8

KEYWORDS = ("return", "raise", "if", "for")
KEYWORD_LINE = re.compile(rf"([ \t]*)({'|'.join(KEYWORDS)})\b")
WORD = re.compile(r"[^\W\d]\w*")
LOWER_PAIR = re.compile(r"\b([a-z]{2,})(?= ([a-z]{2,})\b)")
COPIED = re.compile(r"(?<=\S )[^\W\d]\w{3,}")  # an identifier after a single space
SIGNATURE = re.compile(
    r"^([ \t]*(?:async )?def \w+\([^()]{0,300}(?:\([^()]{0,100}\)[^()]{0,300}){0,9}\)[^:\n]{0,100}:)\n"
    r'([ \t]+[rRuU]?(?:"""|\'\'\'))[ \t]*(\S[^\n]*)',
    re.MULTILINE,
)


# ---------------------------------------------------------------------------------------------------------------------
# items: each task lists the places where one may be found, and makes an item of a place or declines


def next_line(documents: list[str], rng: random.Random) -> Iterator[dict]:
    """Which line comes next: the true one, or the nearest three of similar length from 2 to 40 lines further on.

    Lines from further away share fewer words with the context, which word overlap alone finds out.
    """
    for page, i in _shuffled(rng, _lines(documents, CONTEXT_LINES)):
        true, before = page[i], page[i - CONTEXT_LINES : i]
        size = len(true.strip())
        if not 20 <= size <= 120 or sum(bool(line.strip()) for line in before) < CONTEXT_LINES // 2:
            continue
        near = dict.fromkeys(x for x in page[i + 2 : i + 41] if 0.7 * size <= len(x.strip()) <= size / 0.7)
        near = [line for line in near if line.strip() != true.strip() and line not in before]
        if len(near) >= 3:
            yield _choice_item("\n".join(before), true, near[:3], rng)


def signature_doc(documents: list[str], rng: random.Random) -> Iterator[dict]:
    """Which docstring belongs to a signature: its first line, or the three of the module with most words in common."""
    modules = (SIGNATURE.findall(text) for text in documents)
    for module, i in _shuffled(rng, ((found, i) for found in modules for i in range(len(found)))):
        signature, quotes, _ = module[i]
        lines = [line.replace('"""', "").replace("'''", "").strip() for _, _, line in module]
        true, words = lines[i], _words(lines[i])
        others = [line for line in dict.fromkeys(lines) if line != true and len(line) >= 15]
        if len(true) >= 15 and len(words) >= 3 and len(others) >= 3 and lines.count(true) == 1:
            others.sort(key=lambda line: -len(words & _words(line)) / len(words | _words(line)))
            yield _choice_item(f"{signature}\n{quotes}", true, others[:3], rng)


def keyword_start(documents: list[str], rng: random.Random) -> Iterator[dict]:
    """Which keyword starts the next line; equally many items of each, so that the commonest answer is chance."""
    found: dict[str, dict] = {name: {} for name in KEYWORDS}
    for page, i in _lines(documents, CONTEXT_LINES):
        if match := KEYWORD_LINE.match(page[i]):
            query = "\n".join(page[i - CONTEXT_LINES : i])
            if len(query) <= MAX_CONTEXT:
                found[match[2]].setdefault(query, match[1])
    each = min(ITEMS // len(KEYWORDS), *map(len, found.values()))
    for gold, name in enumerate(KEYWORDS):
        for query, indent in rng.sample(list(found[name].items()), each):
            yield {"query": query, "choices": [indent + word for word in KEYWORDS], "gold": gold}


def word_swap(documents: list[str], rng: random.Random) -> Iterator[dict]:
    """A line against itself with two adjacent lowercase words swapped, after the two lines before it."""
    for page, i in _shuffled(rng, _lines(documents, 2)):
        true = page[i]
        pairs = [m for m in LOWER_PAIR.finditer(true) if m[1] != m[2]] if 20 <= len(true) <= 200 else []
        if pairs:
            pair = rng.choice(pairs)
            swapped = f"{true[: pair.start()]}{pair[2]} {pair[1]}{true[pair.end(2) :]}"
            yield _choice_item("\n".join(page[i - 2 : i]), true, [swapped], rng)


def cloze_copy(documents: list[str], rng: random.Random) -> Iterator[dict]:
    """Write the last identifier of a 60-word passage, which occurred in it before."""
    places = ((text, match.span()) for text in documents for match in COPIED.finditer(text))
    for text, (start, end) in _shuffled(rng, places):
        before = text[max(0, start - 2 * MAX_CONTEXT) : start]
        words = list(re.finditer(r"\S+", before))[-59:]
        context, target = before[words[0].start() :].strip() if len(words) == 59 else "", text[start:end]
        if target in WORD.findall(context) and not keyword.iskeyword(target):
            yield {"context": context, "continuation": target}


def _lines(documents: list[str], first: int) -> Iterator[tuple[list[str], int]]:
    """(lines of a document, index) of every line but the first ones of each document."""
    return ((page, i) for page in (text.split("\n") for text in documents) for i in range(first, len(page)))


def _shuffled(rng: random.Random, places: Iterable) -> list:
    places = list(places)
    rng.shuffle(places)
    return places


def _choice_item(query: str, true: str, others: list[str], rng: random.Random) -> dict:
    choices = [true, *others]
    rng.shuffle(choices)
    return {"query": query, "choices": choices, "gold": choices.index(true)}


def _words(text: str) -> set[str]:
    return {word.lower() for word in WORD.findall(text)}


# label: (maker, kind, delimiter, chance)
TASKS: dict[str, tuple[Callable, str, str, float]] = {
    "next_line": (next_line, "multiple_choice", "\n", 0.25),
    "signature_doc": (signature_doc, "multiple_choice", "", 0.25),
    "keyword": (keyword_start, "multiple_choice", "\n", 0.25),
    "word_swap": (word_swap, "multiple_choice", "\n", 0.5),
    "cloze_copy": (cloze_copy, "language_modeling", " ", 0.0),
}


def _read_documents(dataset, split: str, limit: int) -> list[str]:
    """Documents of a split in path order, the last one cut so that they have at most `limit` characters."""
    documents, size = [], 0
    for _, text in dataset.documents(split):
        documents.append(text[: limit - size])
        size += len(documents[-1])
        if size >= limit:
            break
    return documents


def build_tasks(dataset) -> list[Task]:
    """The tasks that the held-out documents yield, up to ITEMS items each: the same ones in every process.

    A task with fewer than FEWEST items is skipped, with a message that gives the count.
    """
    documents = _read_documents(dataset, "val", MAX_HELD_OUT)
    tasks = []
    for label, (make, kind, delimiter, chance) in TASKS.items():
        distinct = {}
        for item in make(documents, random.Random(0)):
            context = item.get("query", item.get("context"))
            if len(context) <= MAX_CONTEXT:
                distinct.setdefault((context, item.get("continuation")), item)
            if len(distinct) == ITEMS:
                break
        if len(distinct) < FEWEST:
            logger.info(f"OFFLINE: {label} skipped, {len(distinct)} items in the held-out text: at least {FEWEST}")
        else:
            tasks.append(Task(label, kind, list(distinct.values()), 0, delimiter, chance))
    return tasks


_task_cache: dict[str, list[Task]] = {}  # by the sha256 of the data: the dataset that was evaluated last


def cached_tasks(dataset, build: Callable[[], list[Task]]) -> list[Task]:
    """The tasks of build(), which is called once per data fingerprint: making them reads all held-out text.

    A run evaluates one dataset many times, so the tasks of the last one stay in memory.
    """
    key = dataset.fingerprint["sha256"]
    if key not in _task_cache:
        tasks = build()
        _task_cache.clear()
        _task_cache[key] = tasks
    return _task_cache[key]


# ---------------------------------------------------------------------------------------------------------------------
# cheap baselines


class CharModel:
    """Interpolated character 5-gram: p_n = (count(h c) + 5 p_(n-1)) / (count(h) + 5), down to uniform p_0.

    The 4,095 commonest characters have codes of 12 bits, all others share one; five of them make one integer key.
    """

    ORDER, BITS, WEIGHT = 5, 12, 5.0

    def __init__(self, text: str):
        points = _points(text)
        chars, counts = np.unique(points, return_counts=True)
        self.chars = np.sort(chars[np.argsort(-counts, kind="stable")[: 2**self.BITS - 1]])
        keys = np.sort(self._keys(self._codes(points), self.ORDER))
        self.tables = []  # for n = 0..ORDER: sorted keys of n characters, and how often each occurs
        for n in range(self.ORDER + 1):
            self.tables.append(np.unique(keys >> np.uint64(self.BITS * (self.ORDER - n)), return_counts=True))

    def _codes(self, points: np.ndarray) -> np.ndarray:
        if not len(self.chars):
            return np.full(len(points), 2**self.BITS - 1, dtype=np.uint64)
        place = np.searchsorted(self.chars, points).clip(max=len(self.chars) - 1)
        return np.where(self.chars[place] == points, place, 2**self.BITS - 1).astype(np.uint64)

    def _keys(self, codes: np.ndarray, n: int) -> np.ndarray:
        """Keys of all runs of n characters, in order."""
        keys = np.zeros(max(0, len(codes) - n + 1), dtype=np.uint64)
        for k in range(n):
            keys = (keys << np.uint64(self.BITS)) | codes[k : k + len(keys)]
        return keys

    def _count(self, n: int, keys: np.ndarray) -> np.ndarray:
        known, counts = self.tables[n]
        if not len(known):
            return np.zeros(len(keys))
        place = np.searchsorted(known, keys).clip(max=len(known) - 1)
        return np.where(known[place] == keys, counts[place], 0).astype(np.float64)

    def losses(self, context: str, text: str) -> np.ndarray:
        """Nats of each character of text after context, [len(text)]; a short context is filled up with newlines."""
        reach = self.ORDER - 1
        codes = self._codes(_points(("\n" * reach + context)[-reach:] + text))
        p = np.full(len(text), 1.0 / (len(self.chars) + 1))
        for n in range(1, self.ORDER + 1):
            grams = self._keys(codes[reach + 1 - n :], n)
            histories = grams >> np.uint64(self.BITS) if n == 1 else self._keys(codes[reach + 1 - n : -1], n - 1)
            p = (self._count(n, grams) + self.WEIGHT * p) / (self._count(n - 1, histories) + self.WEIGHT)
        return -np.log(p)

    def is_greedy(self, context: str, text: str) -> bool:
        """Whether text is the greedy continuation: always the commonest character after the longest history seen."""
        codes = self._codes(_points(("\n" * self.ORDER + context)[-self.ORDER + 1 :] + text))
        for i in range(self.ORDER - 1, len(codes)):
            for n in range(self.ORDER, 0, -1):
                known, counts = self.tables[n]
                history = self._keys(codes[i - n + 1 : i], n - 1)[0] << np.uint64(self.BITS)
                low, high = np.searchsorted(known, [history, history + np.uint64(2**self.BITS)])
                if low < high:
                    break
            else:
                return False
            if known[low + counts[low:high].argmax()] - history != codes[i]:
                return False
        return True


def _points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)


def train_char_model(dataset) -> CharModel:
    """The 5-gram of the first MAX_TRAINING characters of the training split, in path order."""
    return CharModel("".join(_read_documents(dataset, "train", MAX_TRAINING)))


def cheap_baselines(task: Task, items: list[dict], chars: CharModel) -> dict[str, float]:
    """Accuracies of the 5-gram and of word overlap on the items.

    Options: lowest mean loss of the 5-gram over an option; largest share of an option's words that the query has.
    Copying: the greedy continuation of the 5-gram; the commonest identifier of the passage, the latest of equals.
    """
    ngram, overlap = [], []
    for item in items:
        if task.kind == "language_modeling":
            context, target = item["context"].strip(), item["continuation"]
            ngram.append(chars.is_greedy(context + task.delimiter, target))
            words = [word for word in WORD.findall(context) if len(word) >= 4 and not keyword.iskeyword(word)]
            overlap.append(bool(words) and Counter(reversed(words)).most_common(1)[0][0] == target)
        else:
            query, choices = item["query"], item["choices"]
            losses = [chars.losses(query + task.delimiter, choice).mean() for choice in choices]
            ngram.append(int(np.argmin(losses)) == item["gold"])
            seen = _words(query)
            shares = [len(seen & words) / max(1, len(words)) for words in map(_words, choices)]
            overlap.append(int(np.argmax(shares)) == item["gold"])
    return {"char_5gram": float(np.mean(ngram)), "word_overlap": float(np.mean(overlap))}


# ---------------------------------------------------------------------------------------------------------------------


def evaluate_offline(
    model,
    tokenizer,
    dataset,
    *,
    max_per_task: int | None = None,
    baselines: bool = True,
    tasks: list[Task] | None = None,
    rank: int = 0,
    **options,
) -> dict:
    """Score the suite: evaluate_tasks' result, each task with char_5gram and word_overlap beside it (rank 0 only).

    tasks: those of build_tasks where they are built already. The items are written to <dataset>/offline_eval in the
    format of a CORE bundle. options: see evaluate_task. The score is None when the corpus yields no task.
    """
    tasks = build_tasks(dataset) if tasks is None else tasks
    if not tasks:
        return dict(score=None, tasks={})
    result = evaluate_tasks(model, tokenizer, tasks, max_items=max_per_task, rank=rank, **options)
    if baselines and rank == 0:
        write_bundle(tasks, dataset.directory / "offline_eval")
        chars = train_char_model(dataset)
        for task in tasks:
            result["tasks"][task.label].update(cheap_baselines(task, select_items(task.items, max_per_task), chars))
    return result
