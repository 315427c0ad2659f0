"""CORE's rules against a slow reference written from their description, and the bundle against hostile input."""

import hashlib
import http.server
import io
import json
import random
import shutil
import stat
import struct
import threading
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from nanochat.evaluation import core_bundle
from nanochat.evaluation.core import (
    Row,
    evaluate_core,
    evaluate_task,
    make_batches,
    make_rows,
    make_task_rows,
    score_rows,
)
from nanochat.evaluation.core_bundle import Task, find_bundle, load_bundle, write_bundle
from nanochat.gpt import GPT, GPTConfig
from nanochat.system.environment import UserError
from nanochat.training.stop_signals import EvaluationInterrupted
from tests.forked import spawn
from tests.messages import record_messages

BOS = 256


class Bytes:
    """One token a byte."""

    bos_id, vocab_size = BOS, 257

    def encode_batch(self, texts, num_threads=1):
        return [list(text.encode()) for text in texts]


class Table(torch.nn.Module):
    """Logits from a hash of all tokens so far through a random table of 1,009 rows: deterministic, uneven, causal."""

    def __init__(self, sequence_len: int = 4096):
        super().__init__()
        self.config = SimpleNamespace(sequence_len=sequence_len)
        self.device = torch.device("cpu")
        self.rows = torch.randn(1009, 257, generator=torch.Generator().manual_seed(1)) * 3

    def forward(self, idx):
        return self.text_logits(self.features(idx))

    def text_logits(self, features):
        return features

    def features(self, idx):
        place = torch.arange(1, idx.size(1) + 1)
        return self.rows[(idx * place).cumsum(1) % 1009]


FEATURES = dict(window_pattern="S", short_window=9, smear=True, value_embeddings=True, bigram_rows=99)
DOCUMENTS = dict(FEATURES, document_start=ord("w"))  # in prefixes and options, but not in all


def small_gpt(**features) -> GPT:
    torch.manual_seed(3)
    shape = dict(sequence_len=64, vocab_size=257, n_layer=2, n_head=2, n_kv_head=1, n_embd=32)
    model = GPT(GPTConfig(**shape, tie_weights=True, **features))
    model.init_weights()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


WORDS = "ash oak elm fir yew bay fig gum box may".split()


def make_task(kind: str, count: int, shots: int, seed: int = 0, delimiter: str = " ") -> Task:
    rng = random.Random(seed)

    def text(n: int) -> str:
        return " ".join(rng.choice(WORDS) for _ in range(rng.randrange(1, n)))

    items = []
    for _ in range(count):
        if kind == "multiple_choice":
            items.append({"query": text(6), "choices": [text(4) for _ in range(4)], "gold": rng.randrange(4)})
        elif kind == "schema":
            items.append({"context_options": [text(5), text(5)], "continuation": text(4), "gold": rng.randrange(2)})
        else:
            items.append({"context": f" {text(6)} ", "continuation": text(2)})
    return Task(kind, kind, items, shots, delimiter, 0.25 if kind == "multiple_choice" else 0.0)


# ---------------------------------------------------------------------------------------------------------------------
# the reference: DCLM's rules one item at a time, in the order of the description


def reference(model, task: Task, max_items=None, max_len=None) -> list[float]:
    data = list(task.items)
    random.Random(1337).shuffle(data)
    if max_items is not None and max_items > 0:
        data = data[:max_items]
    correct = []
    for idx, item in enumerate(data):
        rng = random.Random(1234 + idx)
        indices = [i for i in range(len(data)) if i != idx]
        shots = [data[i] for i in rng.sample(indices, min(task.num_fewshot, len(indices)))]
        parts, delim = [], task.delimiter
        for shot in shots:
            if task.kind == "multiple_choice":
                parts.append(shot["query"] + delim + shot["choices"][shot["gold"]])
            elif task.kind == "schema":
                parts.append(shot["context_options"][shot["gold"]] + delim + shot["continuation"])
            else:
                parts.append(shot["context"].strip() + delim + shot["continuation"])
        prefix = "".join(part + "\n\n" for part in parts)
        if task.kind == "multiple_choice":
            texts = [prefix + item["query"] + delim + choice for choice in item["choices"]]
        elif task.kind == "schema":
            texts = [prefix + option + delim + item["continuation"] for option in item["context_options"]]
        else:
            texts = [prefix + item["context"].strip() + delim]
            texts = [texts[0].strip(), texts[0] + item["continuation"]]
        tokens = [[BOS, *text.encode()] for text in texts]
        starts, ends = [], [len(t) for t in tokens]
        if task.kind == "multiple_choice":
            n = 0
            while all(n < len(t) for t in tokens) and len({t[n] for t in tokens}) == 1:
                n += 1
            starts = [n] * len(tokens)
        elif task.kind == "schema":
            n = 0
            while all(n < len(t) for t in tokens) and len({t[-1 - n] for t in tokens}) == 1:
                n += 1
            starts = [len(t) - n for t in tokens]
        else:
            assert tokens[1][: len(tokens[0])] == tokens[0]
            starts, ends, tokens = [len(tokens[0])], ends[1:], tokens[1:]
        losses, all_greedy, cut = [], False, False
        for sequence, start, end in zip(tokens, starts, ends, strict=True):
            if max_len is not None and len(sequence) > max_len:
                gone = len(sequence) - max_len
                sequence, start, end = sequence[gone:], start - gone, end - gone
                cut = cut or (start < 1 and start < end)
            if start >= end or start < 1:
                losses.append(float("inf"))
                continue
            logits = model(torch.tensor([sequence]))[0]
            span = [F.cross_entropy(logits[p - 1], torch.tensor(sequence[p])).item() for p in range(start, end)]
            losses.append(sum(span) / len(span))
            all_greedy = all(int(logits[p - 1].argmax()) == sequence[p] for p in range(start, end))
        if task.kind == "language_modeling":
            correct.append(float(all_greedy and not cut))
        else:
            best = min(losses)
            correct.append(float(not cut and best < float("inf") and losses.index(best) == item["gold"]))
    return correct


@pytest.mark.parametrize("kind", core_bundle.KEYS)
@pytest.mark.parametrize(("shots", "max_items"), [(0, None), (3, None), (2, 17)])
def test_scores_equal_the_reference_item_by_item(kind, shots, max_items):
    """Every rule at once, few-shot draws included.

    Red when the few-shot seed is 1234 alone, when the shuffle's seed changes, when the cut comes before the shuffle,
    when the span is sliced [start:end] instead of [start-1:end-1], or when losses are summed instead of averaged.
    """
    model, task = Table(), make_task(kind, 40, shots, delimiter="\nAnswer: " if shots else " ")
    found = evaluate_task(model, Bytes(), task, max_items=max_items, batch_tokens=300)
    assert found["correct"] == reference(model, task, max_items)
    assert found["accuracy"] == sum(found["correct"]) / (max_items or 40)
    assert found["centered"] == pytest.approx((found["accuracy"] - task.chance) / (1 - task.chance))
    assert (found["items"], found["truncated"], found["cut"]) == (max_items or 40, 0, 0)


def test_greedy_continuations_are_found():
    """Items that the model itself continued are all correct, those with one token changed all wrong."""
    model, items = Table(), []
    model.rows[:, 128:] = -100.0  # ASCII: one byte a character
    for n in range(12):
        ids = [BOS, *f"start {n}".encode()]
        for _ in range(40):
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
        items.append(ids)

    def item(ids: list[int], split: int) -> dict:
        return {"context": "".join(map(chr, ids[1:split])), "continuation": "".join(map(chr, ids[split:]))}

    split = [next(i for i in range(10, 45) if not chr(x[i - 1]).isspace()) for x in items]
    right = [item(ids, at) for ids, at in zip(items, split, strict=True)]
    right = [i for i in right if i["context"] == i["context"].strip()]
    assert len(right) > 5
    task = Task("copy", "language_modeling", right, 0, "")
    assert evaluate_task(model, Bytes(), task)["accuracy"] == 1.0
    last = [
        {**i, "continuation": i["continuation"][:-1] + ("a" if i["continuation"][-1] != "a" else "b")} for i in right
    ]
    assert evaluate_task(model, Bytes(), Task("copy", "language_modeling", last, 0, ""))["accuracy"] == 0.0


@pytest.mark.parametrize("kind", core_bundle.KEYS)
@pytest.mark.parametrize("max_len", [8, 25, 60])
def test_truncation_keeps_the_end_and_is_counted(kind, max_len):
    """Red when truncated prompts keep their left end, or when the span is not shifted with them."""
    model, task = Table(), make_task(kind, 30, 2)
    found = evaluate_task(model, Bytes(), task, max_len=max_len)
    assert found["correct"] == reference(model, task, max_len=max_len)
    assert found["truncated"] > 0
    if max_len == 8 and kind == "multiple_choice":
        assert 0 < found["cut"] <= found["truncated"]


def test_the_default_length_is_the_models():
    task = make_task("multiple_choice", 30, 2)
    assert evaluate_task(Table(25), Bytes(), task)["correct"] == reference(Table(), task, max_len=25)


def rows_for(task: Task, max_len: int) -> list[Row]:
    return make_task_rows(Bytes(), task, task.items, range(len(task.items)), max_len)


def plain_score(model, row: Row) -> tuple[float, bool]:
    """One row alone, without a cache, from all its logits."""
    logits, ids = model(torch.tensor([row.tokens]))[0], torch.tensor(row.tokens)
    if row.cut or row.start == row.end:
        return float("inf"), False
    spans, wanted = logits[row.start - 1 : row.end - 1], ids[row.start : row.end]
    return F.cross_entropy(spans, wanted).item(), bool((spans.argmax(-1) == wanted).all())


@pytest.mark.parametrize("features", [{}, FEATURES, DOCUMENTS])
@pytest.mark.parametrize("kind", core_bundle.KEYS)
def test_batched_equals_one_by_one(kind, features):
    """A real transformer: shared prefixes in batches of any size give the losses of one whole row at a time, to 1e-4.

    Red when batches are padded on the left, when results are not put back into their order, when the cache's position,
    last or document_begin is not set before an option, or when a batch's prefixes are cut to the longest one.
    """
    model, task = small_gpt(**features), make_task(kind, 8, 3)
    for max_len in (40, 500):  # the shorter one truncates the options of an item by different lengths
        rows = rows_for(task, max_len)
        with torch.no_grad():
            losses, greedy = zip(*(plain_score(model, row) for row in rows), strict=True)
        for batch_tokens in (1, 900):
            found, hits = score_rows(model, rows, BOS, batch_tokens)
            assert found == pytest.approx(losses, abs=1e-4)
            assert hits == list(greedy)
    assert evaluate_task(model, Bytes(), task)["correct"] == reference(model, task, max_len=64)


def test_common_prefixes_go_through_the_model_once(monkeypatch):
    """Three shots and the query are read once for four options, in batches and caches of at most batch_tokens.

    And the last layer's MLP sees no prefix. Red with share=False, without MAX_REREAD, or without _PrefillDone.
    """
    model, rows = small_gpt(), rows_for(make_task("multiple_choice", 40, 3), 500)
    read, features, last = [], model.features, []
    model.transformer.h[-1].mlp.register_forward_hook(lambda module, x, out: last.append(out[..., 0].numel()))
    monkeypatch.setattr(model, "features", lambda ids, cache=None: (read.append(ids.numel()), features(ids, cache))[1])
    score_rows(model, rows, BOS, 1500)
    prefixes = sum(row.start for row in rows[::4])
    options = sum(len(row.tokens) - row.start for row in rows)
    assert prefixes + 2.5 * options < 0.6 * sum(len(row.tokens) for row in rows)
    assert sum(read) < prefixes + 2.5 * options
    assert sum(last) < 2.5 * options
    assert max(read) <= 1500


@given(
    st.lists(st.tuples(st.integers(1, 20), st.lists(st.integers(1, 30), min_size=1, max_size=3)), max_size=12),
    st.sampled_from([1, 120, 10**6]),
)
def test_batches_of_any_rows(items, batch_tokens):
    """Every row once, families of equal size that begin with `shared` equal tokens before every span, none too many.

    Red when the token before a span counts as shared, or when Batch.tokens forgets that every option is read.
    """
    rows = [
        Row(item, [item] * begin + [n] * span, begin, begin + span)
        for item, (begin, spans) in enumerate(items)
        for n, span in enumerate(spans, 100)
    ]
    batches = list(make_batches(rows, True, batch_tokens))
    assert sorted(id(row) for batch in batches for family in batch.families for row in family) == sorted(map(id, rows))
    for batch in batches:
        members = [row for family in batch.families for row in family]
        assert {len(family) for family in batch.families} == {batch.options}
        assert members == batch.rows
        assert all(len({(row.item, *row.tokens[: batch.shared]) for row in family}) == 1 for family in batch.families)
        assert all(batch.shared < row.start and len(row.tokens) <= batch.width for row in members)
        kept = len(batch.families) * batch.shared + len(members) * (batch.width - batch.shared)
        assert len(batch.families) == 1 or kept <= batch_tokens


def test_padding_does_not_count():
    """A short row beside a long one has the hand-computed mean loss."""
    model = Table()
    rows = [Row(0, [BOS, 1, 2, 3], 2, 4), Row(1, [BOS, *range(50)], 1, 51)]
    losses, _ = score_rows(model, rows, BOS, 10**6)
    logits = model(torch.tensor([[BOS, 1, 2, 3]]))[0].double().log_softmax(-1)
    assert losses[0] == pytest.approx(-(logits[1, 2] + logits[2, 3]).item() / 2, rel=1e-5)


def test_empty_spans_lose():
    """A choice that is a prefix of another has no span of its own: loss +inf; equal choices are never right."""
    model = Table()
    prefix = {"query": "q", "choices": ["ab", "abc"], "gold": 1}
    assert evaluate_task(model, Bytes(), Task("t", "multiple_choice", [prefix]))["accuracy"] == 1.0
    equal = [{"query": "q", "choices": ["ab", "ab"], "gold": g} for g in (0, 1)]
    assert evaluate_task(model, Bytes(), Task("t", "multiple_choice", equal))["accuracy"] == 0.0
    nothing = [{"context": "a", "continuation": ""}]
    assert evaluate_task(model, Bytes(), Task("t", "language_modeling", nothing))["accuracy"] == 0.0


def test_a_broken_model_knows_nothing():
    """NaN logits give no right answer, not the share of gold = 0."""
    model = Table()
    model.rows[:] = float("nan")
    items = [{"query": "q", "choices": ["a", "b"], "gold": 0}] * 3
    assert evaluate_task(model, Bytes(), Task("t", "multiple_choice", items))["accuracy"] == 0.0


def test_an_option_without_a_finite_loss_loses():
    """Logits after `a` are NaN: `ax` has loss +inf and `bx` wins. Red without the isfinite check."""

    class Partly(Table):
        def text_logits(self, features):
            return features

        def features(self, idx):
            return torch.where((idx == ord("a"))[..., None], float("nan"), torch.zeros(257))

    items = [{"query": "q", "choices": ["ax", "bx"], "gold": 1}]
    assert evaluate_task(Partly(), Bytes(), Task("t", "multiple_choice", items))["accuracy"] == 1.0


def test_shots_are_clamped_with_a_warning():
    said: list[str] = []
    task = make_task("multiple_choice", 4, 10)
    with record_messages(said):
        assert evaluate_task(Table(), Bytes(), task)["correct"] == reference(Table(), task)
    assert said == ["multiple_choice: 10-shot with 4 items: using 3 examples"]


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=8), min_size=2, max_size=4))
def test_spans(sequences):
    """Multiple choice: equal up to the start, different there; schema: equal from the start on, different before."""
    rows = make_rows(Task("t", "multiple_choice", []), 0, [[9, *s] for s in sequences], 100)
    heads = {tuple(row.tokens[: row.start]) for row in rows}
    assert len(heads) == 1
    assert all(row.end == len(row.tokens) for row in rows)
    assert any(row.start == row.end for row in rows) or len({row.tokens[row.start] for row in rows}) > 1
    rows = make_rows(Task("t", "schema", []), 0, [[9, *s, 7] for s in sequences], 100)
    tails = {tuple(row.tokens[row.start :]) for row in rows}
    assert len(tails) == 1
    assert next(iter(tails))[-1] == 7
    before = {tuple(row.tokens[row.start - 1 : row.start]) for row in rows}
    assert len(before) > 1 or any(row.start == 1 for row in rows)


@pytest.mark.parametrize("make", [Table, small_gpt])
def test_a_task_stops_before_its_next_forward(monkeypatch, make):
    """Red when score_rows does not ask, or when the rows without a result count as wrong answers.

    The GPT stops between a prefix and its options: red when it asks only once a batch.
    """
    model, forwards = make(), []
    monkeypatch.setattr(model, "features", lambda *args, real=model.features: (forwards.append(1), real(*args))[1])
    answers = iter([False, True, True])
    with pytest.raises(EvaluationInterrupted):
        evaluate_task(model, Bytes(), make_task("schema", 40, 1), batch_tokens=50, stop=lambda: next(answers))
    assert len(forwards) == 1


def _rank(rank: int, world_size: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world_size)
    found = evaluate_task(Table(40), Bytes(), make_task("schema", 7, 1), rank=rank, world_size=world_size)
    (Path(folder) / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def test_ranks_share_the_items(tmp_path):
    """2 ranks both get the 1-rank result. Red without the all_reduce, or when both take the even items."""
    spawn(_rank, (2, str(tmp_path)), ranks=2)
    one = evaluate_task(Table(40), Bytes(), make_task("schema", 7, 1))
    for rank in range(2):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) | {"seconds": 0} == one | {"seconds": 0}


# ---------------------------------------------------------------------------------------------------------------------
# bundles


def hand_made(folder: Path) -> Path:
    """A bundle in the official layout whose answers are known for LovesA."""
    (folder / "eval_data" / "world").mkdir(parents=True)
    (folder / "core.yaml").write_text(
        "icl_tasks:\n"
        "-\n  label: pick\n  dataset_uri: world/pick.jsonl\n  num_fewshot: [0]\n  icl_task_type: multiple_choice\n"
        "-\n  label: say\n  dataset_uri: say.jsonl\n  num_fewshot: [1]\n  icl_task_type: language_modeling\n"
        '  continuation_delimiter: "\\nAnswer:"\n  has_categories: false\n'
    )
    (folder / "eval_meta_data.csv").write_text(
        "Eval Task,Task Category,Random baseline\npick,world,25\nsay,words,0\nunused,x,50\n"
    )
    picks = [{"query": "x", "choices": ["zb", "za", "zc", "zd"], "gold": gold, "id": 1} for gold in (1, 1, 1, 0)]
    (folder / "eval_data" / "world" / "pick.jsonl").write_text("\n".join(map(json.dumps, picks)) + "\n\n")
    says = [{"context": "x\u2028y", "continuation": c} for c in ("aaa", "aab")]
    lines = "\n".join(json.dumps(item, ensure_ascii=False) for item in says)
    (folder / "eval_data" / "say.jsonl").write_text(lines, encoding="utf-8")
    return folder


class LovesA(Table):
    """Always expects the byte 'a'."""

    def text_logits(self, features):
        return features

    def features(self, idx):
        return F.one_hot(torch.full_like(idx, ord("a")), 257).float() * 10


def test_core_of_a_hand_made_bundle(tmp_path):
    """pick: 3 of 4 with chance 0.25 -> 2/3; say: 1 of 2 with chance 0 -> 1/2; CORE is their plain mean."""
    said: list[str] = []
    with record_messages(said):
        found = evaluate_core(LovesA(), Bytes(), hand_made(tmp_path / "b"))
    assert found["tasks"]["pick"]["accuracy"] == 0.75
    assert found["tasks"]["pick"]["centered"] == pytest.approx(2 / 3)
    assert found["tasks"]["say"]["accuracy"] == 0.5
    assert found["score"] == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert said == [f"{tmp_path / 'b'} holds 2 tasks, the official CORE 22: the scores are not comparable"]


def test_a_bundle_is_read_as_it_is(tmp_path):
    tasks = load_bundle(hand_made(tmp_path / "b"))
    facts = [(t.label, t.kind, t.num_fewshot, t.delimiter, t.chance, len(t.items)) for t in tasks]
    assert facts == [("pick", "multiple_choice", 0, " ", 0.25, 4), ("say", "language_modeling", 1, "\nAnswer:", 0.0, 2)]
    write_bundle(tasks, tmp_path / "again")
    assert load_bundle(tmp_path / "again") == tasks


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("core.yaml", None, "core.yaml is missing"),
        ("core.yaml", "icl_tasks: [", "damaged"),
        ("core.yaml", "tasks: []", "damaged"),
        ("core.yaml", "icl_tasks: []", "lists no task"),
        ("core.yaml", "icl_tasks: [{label: pick, icl_task_type: guess, dataset_uri: a, num_fewshot: [0]}]", "guess"),
        (
            "core.yaml",
            "icl_tasks: [{label: pick, icl_task_type: schema, dataset_uri: ../../x, num_fewshot: [0]}]",
            "outside the bundle",
        ),
        ("eval_meta_data.csv", "Eval Task,Random baseline\npick,25\n", "no random baseline for say"),
        ("eval_meta_data.csv", "Eval Task,Random baseline\npick,100\nsay,0\n", "below 100"),
        ("eval_meta_data.csv", "Eval Task,Random baseline\npick,many\n", "damaged"),
        ("eval_data/say.jsonl", None, "say.jsonl is missing"),
        ("eval_data/say.jsonl", "\n", "holds no item"),
        ("eval_data/say.jsonl", '{"context": "a", "continuation": "b"}\n{"context', "line 2"),
        ("eval_data/say.jsonl", '{"context": "a"}', "line 1: not a language_modeling item: no key 'continuation'"),
        ("eval_data/world/pick.jsonl", '{"query": "a", "choices": ["b"], "gold": 1}', "gold 1"),
        ("eval_data/world/pick.jsonl", '{"query": "a", "choices": "bc", "gold": 1}', "choices is 'bc'"),
        ("eval_data/world/pick.jsonl", "[1]", "not an object"),
    ],
)
def test_damaged_bundles_are_named(tmp_path, file, text, message):
    folder = hand_made(tmp_path / "b")
    if text is None:
        (folder / file).unlink()
    else:
        (folder / file).write_text(text)
    with pytest.raises(UserError, match=message):
        load_bundle(folder)


# ---------------------------------------------------------------------------------------------------------------------
# finding and downloading


@pytest.fixture
def base(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    return tmp_path / "base"


@pytest.fixture
def server(monkeypatch):
    """A local web server: server.body is what it sends; server.status, server.declared and server.drip distort it."""
    state = SimpleNamespace(body=b"", status=200, declared=None, drip=0.0, requests=0)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            state.requests += 1
            self.send_response(state.status)
            self.send_header("Content-Length", str(state.declared or len(state.body)))
            self.end_headers()
            pieces = [state.body[i : i + 100] for i in range(0, len(state.body), 100)] if state.drip else [state.body]
            for piece in pieces:
                try:
                    self.wfile.write(piece)
                except OSError:
                    return  # the client gave up
                time.sleep(state.drip)

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        monkeypatch.setenv("NANOCHAT_EVAL_BUNDLE_URL", f"http://127.0.0.1:{httpd.server_address[1]}/eval_bundle.zip")
        yield state
        httpd.shutdown()
        thread.join()


def zipped(folder: Path, inside: str = "eval_bundle/") -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                archive.writestr(inside + path.relative_to(folder).as_posix(), path.read_bytes())
    return buffer.getvalue()


def refusal(base: Path) -> str:
    """The reason in the one line that find_bundle says; nothing may be left on the disk."""
    said: list[str] = []
    with record_messages(said):
        assert find_bundle() is None
    assert [path.name for path in base.glob("**/*") if path.name != "eval_bundle.json"] == []
    head, tail = "CORE bundle not available (", "); scoring the OFFLINE suite instead (not comparable with CORE)"
    assert said[-1].startswith(head)
    assert said[-1].endswith(tail)
    assert "\n" not in said[-1]
    return said[-1].removeprefix(head).removesuffix(tail)


def test_download_records_and_verifies(base, server, tmp_path):
    """Downloaded once, then found; a changed file is refused. Red without the call of _verify."""
    server.body = zipped(hand_made(tmp_path / "b"))
    folder = find_bundle()
    assert folder == base / "eval_bundle"
    assert [task.label for task in load_bundle(folder)] == ["pick", "say"]
    record = json.loads((base / "eval_bundle.json").read_text())
    assert (record["size"], record["sha256"]) == (len(server.body), hashlib.sha256(server.body).hexdigest())
    assert sorted(path.name for path in base.iterdir()) == ["eval_bundle", "eval_bundle.json"]
    assert find_bundle() == folder
    assert server.requests == 1
    path = folder / "eval_data" / "say.jsonl"
    path.write_text(path.read_text(encoding="utf-8").replace("aab", "aaa"), encoding="utf-8")
    with pytest.raises(UserError, match=r"say\.jsonl is not the file that was downloaded"):
        find_bundle()


def test_a_second_download_has_to_be_the_same(base, server, tmp_path):
    server.body = zipped(hand_made(tmp_path / "b"))
    shutil.rmtree(find_bundle())
    server.body = zipped(tmp_path / "b", inside="other/")
    assert "recorded" in refusal(base)


def test_two_downloads_at_once(base, server, tmp_path, monkeypatch):
    """Another process puts the bundle into place first: it is taken. Red without `except OSError` in _download()."""
    server.body = zipped(hand_made(tmp_path / "b"))
    fetch, others = core_bundle._fetch, []

    def overtaken(url, path):
        if not others:
            others.append(url)
            find_bundle()
        return fetch(url, path)

    monkeypatch.setattr(core_bundle, "_fetch", overtaken)
    assert find_bundle() == base / "eval_bundle"
    assert not list(base.glob(".eval*"))


def test_no_server(base, monkeypatch):
    monkeypatch.setenv("NANOCHAT_EVAL_BUNDLE_URL", "http://127.0.0.1:9/eval_bundle.zip")
    assert "refused" in refusal(base)


def test_no_network(base, monkeypatch):
    monkeypatch.delenv("NANOCHAT_EVAL_BUNDLE_URL", raising=False)
    assert "eval_bundle.zip" in refusal(base)


def test_bad_answers(base, server, tmp_path):
    """A 404, a page instead of a zip, a torn or damaged zip, one without core.yaml: the reason, and a clean disk."""
    whole = zipped(hand_made(tmp_path / "b"))
    server.body, server.status = b"", 404
    assert "Not Found" in refusal(base)
    server.status = 200
    server.body = b"<html>hello</html>"
    assert "damaged" in refusal(base)
    server.body, server.declared = whole[:-50], len(whole)
    assert "early" in refusal(base) or "incomplete" in refusal(base).lower()
    server.declared = None
    server.body = whole[:200] + bytes(20) + whole[220:]
    assert "damaged" in refusal(base)
    (tmp_path / "b" / "core.yaml").unlink()
    server.body = zipped(tmp_path / "b")
    assert "no core.yaml" in refusal(base)


def test_slow_and_huge_answers(base, server, tmp_path, monkeypatch):
    """Red without the deadline, without the limit of the download, or without the limit while unpacking."""
    server.body = zipped(hand_made(tmp_path / "b"))
    monkeypatch.setattr(core_bundle, "DOWNLOAD_SECONDS", 0.3)
    server.drip = 0.1
    begun = time.monotonic()
    assert "takes more than 0.3 s" in refusal(base)
    assert time.monotonic() - begun < 3
    server.drip = 0.0
    monkeypatch.setattr(core_bundle, "DOWNLOAD_SECONDS", 30)
    monkeypatch.setattr(core_bundle, "LARGEST_DOWNLOAD", 100)
    assert "larger than" in refusal(base)
    monkeypatch.setattr(core_bundle, "LARGEST_DOWNLOAD", 10**6)
    (tmp_path / "b" / "bomb").write_bytes(bytes(10**6))
    server.body = zipped(tmp_path / "b")
    monkeypatch.setattr(core_bundle, "LARGEST_BUNDLE", 10**5)
    assert "unpacks to more than" in refusal(base)
    monkeypatch.setattr(core_bundle, "LARGEST_BUNDLE", 10**8)
    monkeypatch.setattr(core_bundle, "MOST_FILES", 3)
    assert "files: more than 3" in refusal(base)


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        *((name, stat.S_IFREG) for name in ("../../outside", "/tmp/nanochat-outside", "a/../../../outside", "a/./b")),
        *((name, 0) for name in ("..\\outside", "C:outside", "C:/outside", "//host/outside", "x" * 300)),
        *(("odd", kind) for kind in (stat.S_IFLNK, stat.S_IFIFO, stat.S_IFCHR, stat.S_IFSOCK)),
    ],
)
def test_a_zip_cannot_write_elsewhere(base, server, tmp_path, name, mode):
    """Red when _is_safe looks only at the names, or only at the kind of file."""
    folder = hand_made(tmp_path / "b")
    buffer = io.BytesIO(zipped(folder))
    with zipfile.ZipFile(buffer, "a") as archive:
        info = zipfile.ZipInfo(name)
        info.create_system, info.external_attr = 3, (mode | 0o777) << 16
        archive.writestr(info, "../../outside")
    server.body = buffer.getvalue()
    assert "unsafe name" in refusal(base)
    assert not (tmp_path / "outside").exists()
    assert not Path("/tmp/nanochat-outside").exists()


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("names", [["eval_bundle/core.yaml"], ["a", "a/b"], ["a/b", "a"], ["a", "a/b/c"]])
def test_a_zip_holds_a_name_once(base, server, tmp_path, names):
    """Which of two would be read is up to the reader. Red without the check of the names (the first), else without an
    error of the except line."""
    buffer = io.BytesIO(zipped(hand_made(tmp_path / "b")))
    with zipfile.ZipFile(buffer, "a") as archive:
        for name in names:
            archive.writestr(name, "icl_tasks: []")
    server.body = buffer.getvalue()
    assert "a name twice" in refusal(base)


def test_zip_bombs(base, server, tmp_path, monkeypatch):
    """Zeros that deflate to a thousandth, compressors with dictionaries of gigabytes, entries without end.

    Red without LARGEST_RATIO, without the check of compress_type, or without the count before zipfile reads them.
    """
    folder = hand_made(tmp_path / "b")
    whole = zipped(folder)
    for compression, reason in (
        (zipfile.ZIP_DEFLATED, "unpacks to more than"),
        (zipfile.ZIP_LZMA, "unsafe name"),
        (zipfile.ZIP_BZIP2, "unsafe name"),
    ):
        buffer = io.BytesIO(whole)
        with zipfile.ZipFile(buffer, "a", compression) as archive:
            archive.writestr("bomb", bytes(3_000_000))
        server.body = buffer.getvalue()
        assert reason in refusal(base)
    inner = io.BytesIO()
    with zipfile.ZipFile(inner, "w") as archive:  # a zip in the zip is one more file, which nobody unpacks
        archive.writestr("../../outside", "x")
    (folder / "inner.zip").write_bytes(inner.getvalue())
    server.body = zipped(folder)
    found = find_bundle()
    assert (found / "inner.zip").read_bytes() == inner.getvalue()
    assert not (tmp_path / "outside").exists()
    shutil.rmtree(base)
    monkeypatch.setattr(core_bundle, "MOST_FILES", 10)
    monkeypatch.setattr(core_bundle.zipfile, "ZipFile", None)  # not even asked
    server.body = whole + b"PK\1\2" * 21
    assert "files: more than 10" in refusal(base)


def test_a_header_cannot_hide_a_zip_bomb(base, server, tmp_path):
    """A member that declares 10 bytes and holds 3 MB is refused. Red with a loop that reads what the stream gives."""
    buffer = io.BytesIO(zipped(hand_made(tmp_path / "b")))
    with zipfile.ZipFile(buffer, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb", bytes(3_000_000))
    body = bytearray(buffer.getvalue())
    struct.pack_into("<I", body, body.rindex(b"PK\1\2") + 24, 10)  # the size in the central directory
    server.body = bytes(body)
    assert "damaged: Bad CRC-32" in refusal(base)


def test_deep_nesting_is_damage(tmp_path):
    """Red without RecursionError in load_bundle or read_items."""
    folder = hand_made(tmp_path / "b")
    (folder / "eval_data" / "say.jsonl").write_text("[" * 100_000)
    with pytest.raises(UserError, match=r"say\.jsonl, line 1: not a language_modeling item"):
        load_bundle(folder)
    (folder / "core.yaml").write_text("icl_tasks: " + "[" * 1_500)
    with pytest.raises(UserError, match="is damaged: RecursionError"):
        load_bundle(folder)


def test_folders_that_are_there(base, tmp_path):
    """A named folder is used or an error; a bundle laid into the base folder by hand is trusted; a half one is not."""
    folder = hand_made(tmp_path / "b")
    assert find_bundle(folder) == folder
    with pytest.raises(UserError, match=r"no CORE bundle there \(looked for .*core\.yaml\)"):
        find_bundle(tmp_path / "nowhere")
    for wish in ("~nosuchuser/x", "x" * 300):  # red without path_errors_as_user_errors
        with pytest.raises(UserError, match=r"^--bundle='.* cannot be looked up"):
            find_bundle(wish)
    (base / "eval_bundle").mkdir(parents=True)
    said: list[str] = []
    with record_messages(said):
        assert find_bundle() is None
        assert "holds no core.yaml" in said[0]
    (base / "eval_bundle").rmdir()
    hand_made(base / "eval_bundle")
    assert find_bundle() == base / "eval_bundle"
