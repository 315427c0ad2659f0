"""The OFFLINE suite: every item checked against its document by other means, the baselines against slow references."""

import ast
import json
import math
import os
import random
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nanochat.evaluation import offline as offline_eval
from nanochat.evaluation.core_bundle import Task, load_bundle
from nanochat.evaluation.offline import CharModel, build_tasks, cheap_baselines, evaluate_offline, train_char_model
from tests.messages import record_messages


class Corpus:
    """A dataset of documents in memory."""

    def __init__(self, directory: Path, train: list[str], val: list[str]):
        self.directory, self.texts = directory, {"train": train, "val": val}

    def documents(self, split):
        return ((f"{i}.py", text) for i, text in enumerate(self.texts[split]))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Corpus:
    """Real Python: a few modules of the standard library, the last three held out."""
    names = "textwrap shlex heapq bisect statistics fractions csv argparse tarfile typing"
    texts = [Path(__import__(name).__file__).read_text(encoding="utf-8") for name in names.split()]
    return Corpus(tmp_path_factory.mktemp("corpus"), texts[:7], texts[7:])


@pytest.fixture(scope="module")
def tasks(corpus) -> dict[str, Task]:
    return {task.label: task for task in build_tasks(corpus)}


def test_all_five_tasks_with_400_items(tasks, corpus):
    """Real modules give the whole suite, distinct items, and the same ones again."""
    assert list(tasks) == ["next_line", "signature_doc", "keyword", "word_swap", "cloze_copy"]
    assert [len(tasks[label].items) for label in ("next_line", "word_swap", "cloze_copy")] == [400] * 3
    for task in tasks.values():
        assert len({json.dumps(item, sort_keys=True) for item in task.items}) == len(task.items) >= 20
        assert all(len(item.get("query", item.get("context"))) <= 1000 for item in task.items)
    assert list(tasks.values()) == build_tasks(corpus)


def test_items_come_from_held_out_documents_only(corpus, tasks):
    """Red when build_tasks reads the train split."""
    held_out = "\0".join(corpus.texts["val"])
    for label in ("next_line", "keyword", "word_swap"):
        for item in tasks[label].items:
            assert f"{item['query']}\n{item['choices'][item['gold']]}" in held_out
    assert all(item["context"] in held_out for item in tasks["cloze_copy"].items)


def test_next_line(corpus, tasks):
    """The true line follows its 8 lines of context; the others stand 2 to 40 lines after it, are no copies of it or of
    the context, and are of similar length. Red when others may come from anywhere in the document."""
    pages = [text.split("\n") for text in corpus.texts["val"]]
    golds = Counter()
    for item in tasks["next_line"].items:
        context, true = item["query"].split("\n"), item["choices"][item["gold"]]
        golds[item["gold"]] += 1
        others = [line for i, line in enumerate(item["choices"]) if i != item["gold"]]
        places = [(p, i) for p in pages for i in range(8, len(p)) if p[i] == true and p[i - 8 : i] == context]
        assert len(context) == 8
        assert any(all(x in p[i + 2 : i + 41] for x in others) for p, i in places)
        assert len(set(item["choices"])) == 4
        assert not set(others) & {true, *context}
        sizes = [len(line.strip()) / len(true.strip()) for line in others]
        assert min(sizes) >= 0.7
        assert max(sizes) <= 1 / 0.7
    assert min(golds[i] for i in range(4)) > 60  # no position gives the answer away


def test_signature_doc(corpus, tasks):
    """Signature and docstring belong together as ast sees them; the others are docstrings of the same module."""
    modules = []
    for text in corpus.texts["val"]:
        nodes = [n for n in ast.walk(ast.parse(text)) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]
        docs = [(n.name, (ast.get_docstring(n, clean=False) or "").strip().split("\n")[0].strip()) for n in nodes]
        modules.append([(name, doc) for name, doc in docs if doc])
    strangers = 0
    for item in tasks["signature_doc"].items:
        name = re.search(r"def (\w+)\(", item["query"])[1]
        true = item["choices"][item["gold"]]
        home = [docs for docs in modules if (name, true) in [(n, d.replace('"""', "")) for n, d in docs]]
        strangers += not any(set(item["choices"]) <= {doc for _, doc in docs} for docs in home)
        assert len(set(item["choices"])) == 4
    assert strangers <= 0.1 * len(tasks["signature_doc"].items)  # functions shown as examples inside a docstring


def test_signature_doc_takes_the_closest():
    """Red when the other docstrings are the first ones of the module instead of those with most words in common."""
    lines = [
        "Read one row of a table",
        "Paint every wall in green",
        "Read one column of a table",
        "Read two rows of it",
        "Sing an old song tonight",
        "Read one cell of a table",
    ]
    text = "\n".join(f'def f{i}(x):\n    """{line}."""\n' for i, line in enumerate(lines))
    items = offline_eval.signature_doc([text], random.Random(0))
    item = next(i for i in items if "def f0(" in i["query"])
    assert set(item["choices"]) == {f"{lines[i]}." for i in (0, 2, 3, 5)}


def test_keyword_is_balanced(tasks):
    """As many items of each keyword, so that a constant answer is chance. Red when the smallest count does not rule."""
    golds = Counter(item["gold"] for item in tasks["keyword"].items)
    assert len(golds) == 4
    assert len(set(golds.values())) == 1
    for item in tasks["keyword"].items:
        assert [choice.strip() for choice in item["choices"]] == ["return", "raise", "if", "for"]
        assert len(set(len(choice) - len(choice.lstrip()) for choice in item["choices"])) == 1


def test_word_swap(tasks):
    """The wrong line is the right one with two neighbouring lowercase words exchanged."""
    golds = Counter()
    for item in tasks["word_swap"].items:
        true, false = item["choices"][item["gold"]], item["choices"][1 - item["gold"]]
        golds[item["gold"]] += 1
        a, b = re.split(r"\b([a-z]+)\b", true), re.split(r"\b([a-z]+)\b", false)
        changed = [i for i in range(len(a)) if a[i] != b[i]]
        assert len(a) == len(b)
        assert len(changed) == 2
        assert changed[1] - changed[0] == 2
        assert (a[changed[0]], a[changed[1]]) == (b[changed[1]], b[changed[0]])
    assert min(golds.values()) > 140


def test_cloze_copy(corpus, tasks):
    """59 words and an identifier that occurred among them; the document goes on as continued."""
    for item in tasks["cloze_copy"].items:
        assert len(item["context"].split()) == 59
        assert item["continuation"].isidentifier()
        assert item["continuation"] in re.findall(r"\w+", item["context"])
        whole = f"{item['context']} {item['continuation']}"
        assert any(re.search(re.escape(whole) + r"\b", text) for text in corpus.texts["val"])


def test_the_same_items_in_every_process(corpus):
    """Red when an order comes from a set: the hash seed of the other process is not ours."""
    code = (
        "import json, sys; from types import SimpleNamespace; from nanochat.evaluation.offline import build_tasks;"
        "texts = json.load(sys.stdin); d = SimpleNamespace(documents=lambda split: (('', t) for t in texts));"
        "print(json.dumps([t.items for t in build_tasks(d)]))"
    )
    seed = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"
    env = {"PYTHONPATH": str(Path(offline_eval.__file__).parents[2]), "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": seed}
    texts = json.dumps(corpus.texts["val"])
    other = subprocess.run([sys.executable, "-c", code], input=texts, env=env, stdout=subprocess.PIPE, text=True)
    items = json.dumps([task.items for task in build_tasks(corpus)])
    assert other.stdout == items + "\n"
    assert len(items) > 1000


def test_tasks_with_too_few_items_are_skipped_with_counts(tmp_path):
    """Prose has no signatures and no Python keywords in front of lines: said with counts, the rest is scored."""
    rng = random.Random(0)
    words = (
        "the river runs slowly past green hills where sheep and shepherds sleep under quiet stars until morning".split()
    )
    text = "\n".join(" ".join(rng.choice(words) for _ in range(9)) for _ in range(300))
    said: list[str] = []
    with record_messages(said):
        found = build_tasks(Corpus(tmp_path, [text], [text]))
    assert [task.label for task in found] == ["next_line", "word_swap", "cloze_copy"]
    assert said == [
        "OFFLINE: signature_doc skipped, 0 items in the held-out text: at least 20",
        "OFFLINE: keyword skipped, 0 items in the held-out text: at least 20",
    ]


@pytest.mark.parametrize(
    "text", ["", "one word", "\n" * 500, "a" * 5000, "é ü " * 900, "x\x00y \r\n" * 300, "def f(" * 2000]
)
def test_odd_documents_yield_nothing_but_words(tmp_path, text):
    """Empty, unbroken, binary and never-ending input: no task or a small one, quickly, and never an exception."""
    said: list[str] = []
    corpus = Corpus(tmp_path, [text], [text])
    with record_messages(said):
        tasks = build_tasks(corpus)
    for task in tasks:
        cheap_baselines(task, task.items, train_char_model(corpus))
    assert said


# ---------------------------------------------------------------------------------------------------------------------
# baselines


def slow_losses(training: str, context: str, text: str) -> list[float]:
    """The 5-gram's definition with dictionaries of strings."""
    grams = [training[i : i + 5] for i in range(len(training) - 4)]
    count = Counter(gram[:n] for gram in grams for n in range(6))
    alphabet, whole, losses = set(training), "\n" * 4 + context + text, []
    for i in range(len(whole) - len(text), len(whole)):
        p = 1 / (len(alphabet) + 1)
        for n in range(1, 6):
            p = (count[whole[i - n + 1 : i + 1]] + 5 * p) / (count[whole[i - n + 1 : i]] + 5)
        losses.append(-math.log(p))
    return losses


@given(st.text("ab\nü", max_size=40), st.text("ab\nü", max_size=6), st.text("ab\nü", min_size=1, max_size=8))
def test_char_model_is_its_definition(training, context, text):
    """Red when a count is taken of the wrong order, or when histories do not reach back into the context."""
    training += "ab\nü"
    assert CharModel(training).losses(context, text) == pytest.approx(slow_losses(training, context, text))


def test_char_model_sums_to_one():
    """All known characters and the one code for the unknown share a probability of 1 after any history."""
    model = CharModel("the cat sat on the mat, the cat ran")
    for context in ("", "the ", "xyz", "at"):
        total = sum(math.exp(-model.losses(context, c)[0]) for c in "§" + "".join(set("the cat sat on the mat, ran")))
        assert total == pytest.approx(1.0)


def test_char_model_writes_the_commonest_continuation():
    """After `the ` comes `cat`; after an unseen history the model backs off. Red when only the longest order counts."""
    model = CharModel("the cat. the cat. the dog. the cat. ")
    assert model.is_greedy("I saw the ", "cat")
    assert not model.is_greedy("I saw the ", "dog")
    assert model.is_greedy("??e ", "cat")
    assert not CharModel("").is_greedy("a", "b")


def test_word_overlap_by_hand():
    chars = CharModel("aaaa bbbb " * 5)
    items = [
        {"query": "the red house", "choices": ["a blue car", "a RED house", "red"], "gold": 2},  # 0, 2/3, 1
        {"query": "the red house", "choices": ["nothing here", "no overlap", "at all"], "gold": 0},  # a tie: the first
        {"query": "the red house", "choices": ["the blue", "the red", "..."], "gold": 0},  # wrong
    ]
    assert cheap_baselines(Task("t", "multiple_choice", items), items, chars)["word_overlap"] == pytest.approx(2 / 3)
    copies = [
        {"context": "total = total + item", "continuation": "total"},  # the commonest
        {"context": "item = total", "continuation": "total"},  # equally common: the latest
        {"context": "total total item", "continuation": "item"},  # wrong
        {"context": "return return raise", "continuation": "return"},  # keywords do not count
    ]
    task = Task("t", "language_modeling", copies)
    assert cheap_baselines(task, copies, chars)["word_overlap"] == 0.5


# ---------------------------------------------------------------------------------------------------------------------


class Coin(torch.nn.Module):
    """Knows nothing: the same logits everywhere."""

    def __init__(self):
        super().__init__()
        self.config, self.device = SimpleNamespace(sequence_len=2048), torch.device("cpu")

    def text_logits(self, features):
        return features

    def features(self, idx):
        return torch.zeros(*idx.shape, 257)


class Bytes:
    bos_id, vocab_size = 256, 257

    def encode_batch(self, texts, num_threads=1):
        return [list(text.encode()) for text in texts]


def test_the_suite_as_a_whole(corpus, tasks):
    """Score = mean of the centered accuracies; baselines beside each; the items lie beside the data as a bundle."""
    said: list[str] = []
    with record_messages(said):
        found = evaluate_offline(Coin(), Bytes(), corpus, max_per_task=8)
    assert list(found["tasks"]) == list(tasks)
    assert said == []
    assert found["score"] == pytest.approx(np.mean([task["centered"] for task in found["tasks"].values()]))
    for task in found["tasks"].values():
        assert task["items"] == 8
        assert task.keys() >= {"char_5gram", "word_overlap", "seconds", "truncated", "chance"}
    assert load_bundle(corpus.directory / "offline_eval") == list(tasks.values())
    json.dumps(found, allow_nan=False)


def test_no_items_no_score(tmp_path):
    said: list[str] = []
    with record_messages(said):
        found = evaluate_offline(Coin(), Bytes(), Corpus(tmp_path, ["a"], ["b"]))
    assert found == {"score": None, "tasks": {}}
    assert len(said) == 5
