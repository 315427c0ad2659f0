"""The tokenizer: round trips, agreement with Hugging Face and with naive BPE, files, names, bad input."""

import functools
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import tokenize
import unicodedata
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiktoken
import tokenizers
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from tokenizers import Regex, pre_tokenizers

from nanochat.config.settings import Settings
from nanochat.data.tokenizer import SPECIAL_TOKENS, SPLIT_PATTERN, Tokenizer
from nanochat.data_pipeline import find_or_train
from nanochat.system.environment import UserError
from scripts import tok_eval, tok_train
from tests.messages import record_messages

TEXTS = [
    Path(tokenize.__file__).read_text(encoding="utf-8"),
    "It's 12345 o'clock; THEY'LL see.\n\n\n    x = y +   z\t\t# naïve café 日本語 😀\r\n" * 200,
]
SPLITS = st.text(alphabet=st.sampled_from("ab'slLtvVeErRéß٣Ⅷ12345 \t\n\r\u00a0\u3000\u0085-=_.日😀\u0301"), max_size=60)
ALL = "".join(TEXTS)
FAMILIAR = st.lists(
    st.builds(lambda start, size: ALL[start : start + size], st.integers(0, 60_000), st.integers(1, 40))
)
UNICODE = st.text(st.characters(exclude_categories=["Cs"]), max_size=60) | SPLITS | FAMILIAR.map("".join)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(TEXTS, 700)


@pytest.fixture(scope="module")
def hugging_face(tokenizer, tmp_path_factory):
    folder = tokenizer.save(tmp_path_factory.mktemp("hf") / "tokenizer")
    return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))


@pytest.fixture(scope="module")
def pieces():
    """Text to the pieces that training counts: Hugging Face's Split with our pattern."""
    split = pre_tokenizers.Split(Regex(SPLIT_PATTERN), "isolated")
    return lambda text: [piece for piece, _ in split.pre_tokenize_str(text)]


def naive_bpe(ranks: dict[bytes, int], piece: bytes) -> list[int]:
    """Merge the leftmost pair of lowest rank until there is none: the definition, without any data structure."""
    parts = [bytes([byte]) for byte in piece]
    if piece in ranks:
        return [ranks[piece]]
    while True:
        pairs = [(ranks[a + b], i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in ranks]
        if not pairs:
            return [ranks[part] for part in parts]
        _, i = min(pairs)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


@given(UNICODE)
def test_text_survives(tokenizer, text):
    """decode(encode(text)) is the text, and the ids' bytes add up to its bytes.

    Red when token_bytes counts characters (len(token.decode(errors="replace"))) instead of raw bytes.
    """
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.token_bytes[ids].sum() == len(text.encode())


@hypothesis_settings(max_examples=100)
@given(UNICODE)
def test_hugging_face_file_gives_the_same_ids(tokenizer, hugging_face, text):
    """Red when the file lists only one split of each token (range(1, 2)), or holds another split pattern."""
    hugging_face.encode_special_tokens = True  # special-token text is text
    assert hugging_face.encode(text).ids == tokenizer.encode(text)
    assert hugging_face.decode(tokenizer.encode(text)) == text


@hypothesis_settings(max_examples=100)
@given(UNICODE)
def test_training_splits_as_tiktoken_does(tokenizer, pieces, text):
    """tiktoken's ids are naive BPE over the pieces that Hugging Face's Split makes of the same pattern in training.

    Red when tiktoken gets another pattern, as in pat_str=pattern.replace("1,2", "1,3").
    """
    ranks = {token: i for i, token in enumerate(tokenizer.ranks)}
    expected = [i for piece in pieces(text) for i in naive_bpe(ranks, piece.encode())]
    assert tokenizer.encode(text) == expected


def test_both_engines_class_every_character_alike(pieces):
    """Behind a letter, a digit and a sign, tiktoken joins a character exactly when Split does.

    Checked where the Unicode category changes and at every 64th code point. Red when the two libraries know
    different versions of Unicode.
    """
    everything = [chr(c) for c in range(128, 0x110000) if not 0xD800 <= c < 0xE000]
    changes = [
        c
        for pair in pairwise(everything)
        if unicodedata.category(pair[0]) != unicodedata.category(pair[1])
        for c in pair
    ]
    for front in "a1-'":
        pairs = [front + character for character in (*changes, *everything[::64])]
        ranks = {bytes([i]): i for i in range(256)} | {p.encode(): 256 + i for i, p in enumerate(dict.fromkeys(pairs))}
        encoding = tiktoken.Encoding("pairs", pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens={})
        assert [p for p in pairs if (len(encoding.encode_ordinary(p)) == 1) != (len(pieces(p)) == 1)] == []


def test_every_token_lies_within_a_piece(tokenizer, pieces):
    """Training counts the pieces of our pattern.

    Red when Split gets another one, as SPLIT_PATTERN.replace("1,2", "1,3").
    """
    texts = [token.decode() for token in tokenizer.ranks if token.decode(errors="ignore").encode() == token]
    assert len(texts) > 500
    assert [text for text in texts if pieces(text) != [text]] == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1234567", ["12", "34", "56", "7"]),
        ("I'll he'S can't", ["I", "'ll", " he", "'S", " can", "'t"]),
        ("a  b\n\n c", ["a", " ", " b", "\n\n", " c"]),
        ("x=-1;\n", ["x", "=-", "1", ";\n"]),
        ("<|bos|>", ["<|", "bos", "|>"]),
    ],
)
def test_split_by_hand(pieces, text, expected):
    """Red when digits are grouped by 3."""
    assert pieces(text) == expected


def test_ids_of_specials_follow_the_ranks(tokenizer):
    names = "bos user_start user_end assistant_start assistant_end python_start python_end output_start output_end"
    expected = [f"<|{name}|>" for name in names.split()] + [f"<|reserved_{i}|>" for i in range(7)]
    assert [tokenizer.special_id(token) for token in expected] == list(range(700 - 16, 700))
    assert list(SPECIAL_TOKENS) == expected
    assert tokenizer.bos_id == 684
    assert tokenizer.vocab_size == 700
    assert tokenizer.token_bytes.dtype == np.int32
    assert tokenizer.token_bytes.shape == (700,)
    assert not tokenizer.token_bytes[684:].any()
    assert tokenizer.token_bytes[:684].all()
    assert tokenizer.decode([684, *tokenizer.encode("hi")]) == "<|bos|>hi"
    with pytest.raises(UserError, match="no special token"):
        tokenizer.special_id("<|audio|>")
    with pytest.raises(ValueError, match="700"):
        tokenizer.decode([700])


def test_special_text_in_a_document_is_text(tokenizer):
    """Red when encode calls tiktoken's encode(allowed_special="all")."""
    text = "".join(SPECIAL_TOKENS)
    assert max(tokenizer.encode(text)) < 684
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode(text, bos=True) == [684, *tokenizer.encode(text)]
    assert tokenizer.encode_batch([text, "", "a"], 2) == [tokenizer.encode(text), [], tokenizer.encode("a")]


@pytest.mark.parametrize("text", [" ", "a", "-", "\n", "\t \n", "\u3000", "7"])
def test_long_runs_neither_panic_nor_crawl(tokenizer, text):
    """A megabyte of one character. Red (tiktoken panics) when the pattern has \\s+(?!\\S) instead of its bound."""
    text *= 1_000_000 // len(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_pattern_that_overflows_is_a_mistake_of_the_user(tokenizer):
    """A tokenizer from elsewhere, whose pattern bounds nothing, on what ours takes. Red when the panic passes."""
    text = " " * 1_500_000 + "x"
    foreign = Tokenizer(tokenizer.ranks, r"\p{L}+|\s+(?!\S)|\s|.", name="theirs")
    for encode in (foreign.encode, lambda text: foreign.encode_batch([text])):
        with pytest.raises(UserError, match=r"tokenizer theirs cannot encode a text: .*shorten such runs"):
            encode(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    with pytest.raises(TypeError):
        foreign.encode(None)


SYMBOLS = ["\u0301", "e\u0301", "\0", "\ufeff", "^", "_", "😀", "-\n"]
RUNS = ["A", "中", "ก", *SYMBOLS, " ", "\n", "\r\n", "\t", "\u3000", "7", "Ⅷ"]
LENGTHS = [1, 127, 128, 129, 255, 256, 257, 511, 512, 513, 1000]


@hypothesis_settings(max_examples=60)
@given(st.lists(st.tuples(st.sampled_from([*RUNS, "ACGT", "x y"]), st.sampled_from(LENGTHS)), min_size=1, max_size=4))
def test_no_piece_is_long(tokenizer, hugging_face, pieces, runs):
    """Runs of every class around the bounds, side by side: no piece has over 512 characters, and training, tiktoken and
    the Hugging Face file split alike.

    Red when a bound is dropped ({1,128} of the letters or of the signs -> +, {0,256} of the newlines -> *).
    """
    text = "".join(text * number for text, number in runs)
    found = pieces(text)
    assert "".join(found) == text
    assert max(map(len, found)) <= 512
    ids = tokenizer.encode(text)
    ranks = {token: i for i, token in enumerate(tokenizer.ranks)}
    assert ids == [i for piece in found for i in naive_bpe(ranks, piece.encode())]
    assert ids == hugging_face.encode(text).ids
    assert tokenizer.decode(ids) == text


UNBOUNDED_PATTERN = (  # of the tokenizers that were trained before the pieces were bounded
    r"'(?:[sdmtSDMT]|[lL]{2}|[vV][eE]|[rR][eE])"
    r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s{0,256}[\r\n]+|\s{1,256}(?!\S)|\s"
)


def test_ordinary_text_splits_and_trains_as_without_bounds(pieces):
    """The bounds are beyond the longest words and rules of source code and prose.

    Red when a {1,128} is {1,64}: functools has rules of 80 signs, the German word has 80 letters.
    """
    german = "Donaudampfschifffahrtselektrizitätenhauptbetriebswerkbauunterbeamtengesellschaft"
    texts = [TEXTS[1], Path(functools.__file__).read_text(encoding="utf-8"), f"{german}, {german}skapitän\n" * 5]
    unbounded = pre_tokenizers.Split(Regex(UNBOUNDED_PATTERN), "isolated")
    for text in texts:
        assert pieces(text) == [piece for piece, _ in unbounded.pre_tokenize_str(text)]
    before = Tokenizer.train(texts, 700, pattern=UNBOUNDED_PATTERN)
    assert Tokenizer.train(texts, 700).ranks == before.ranks
    assert before.pattern == UNBOUNDED_PATTERN


def test_a_tokenizer_keeps_its_own_pattern(tokenizer, tmp_path):
    """One from before the bounds splits a long run as it always did. Red when load() takes SPLIT_PATTERN."""
    old = Tokenizer([*(bytes([i]) for i in range(256)), b"A" * 300], UNBOUNDED_PATTERN)
    loaded = Tokenizer.load(old.save(tmp_path / "old"))
    assert (loaded.pattern, loaded.hash) == (UNBOUNDED_PATTERN, old.hash)
    assert loaded.encode("A" * 300) == [256]
    assert Tokenizer(old.ranks).encode("A" * 300) == [65] * 300


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("\ufeffa", "\ufeffa"),
        ("a\0b\0", "a\0b\0"),
        ("a\ud800b", "a\ufffdb"),
        ("\udc00", "\ufffd"),
        ("\ud83d\ude00", "😀"),
    ],
)
def test_odd_characters(tokenizer, text, kept):
    """BOM and NUL are characters as any; a lone surrogate is U+FFFD, in encoding, in batches and in training.

    Red when train() hands the text to the trainer as it is (TypeError), or drops what cannot be encoded.
    """
    assert tokenizer.decode(tokenizer.encode(text)) == kept
    assert tokenizer.encode_batch([text], 2) == [tokenizer.encode(kept)]
    assert Tokenizer.train([text, "ab ab"], 273).ranks == Tokenizer.train([kept, "ab ab"], 273).ranks


def test_training_is_deterministic(tokenizer):
    """Another process with another number of threads and another hash seed learns the same."""
    code = (
        "import sys, pathlib; from nanochat.data.tokenizer import Tokenizer\n"
        "print(Tokenizer.train(eval(sys.stdin.read()), 700).hash)"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "1", "RAYON_NUM_THREADS": "3"}
    command, root = [sys.executable, "-c", code], Path(__file__).parents[2]
    run = subprocess.run(command, input=repr(TEXTS), env=environment, cwd=root, capture_output=True, text=True)
    assert run.stdout.strip() == tokenizer.hash, run.stderr


def test_too_small_texts_and_vocabularies():
    with pytest.raises(UserError, match=r"vocab_size=300 needs 28 merges .* has only 2: .*vocab_size=274 at most"):
        Tokenizer.train(["ab ab"], 300)
    assert Tokenizer.train(["ab-ab"], 273).ranks[-1] == b"ab"
    assert Tokenizer.train([], 272).vocab_size == 272
    with pytest.raises(UserError, match="vocab_size=271 is too small"):
        Tokenizer.train(["ab"], 271)


def test_files(tokenizer, tmp_path):
    """Loading gives the same tokenizer; the files are those of the contract; a second save changes nothing."""
    folder = tokenizer.save(tmp_path / "x" / "mine")
    assert sorted(path.name for path in folder.iterdir()) == ["ranks.tiktoken", "token_bytes.npy", "tokenizer.json"]
    assert [path.name for path in folder.parent.iterdir()] == ["mine"]
    loaded = Tokenizer.load(folder)
    assert (loaded.hash, loaded.specials, loaded.name) == (tokenizer.hash, tokenizer.specials, "mine")
    assert loaded.encode(TEXTS[1]) == tokenizer.encode(TEXTS[1])
    assert np.array_equal(np.load(folder / "token_bytes.npy"), tokenizer.token_bytes)
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    tokenizer.save(folder)
    assert before == {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    with pytest.raises(UserError, match="holds another tokenizer"):
        Tokenizer.train(TEXTS, 300).save(folder)
    checkpoint = tmp_path / "step"
    checkpoint.mkdir()
    (checkpoint / "model.safetensors").write_bytes(b"x")
    assert Tokenizer.load(tokenizer.save(checkpoint)).hash == tokenizer.hash
    assert (checkpoint / "model.safetensors").exists()


def test_failed_save_leaves_nothing(tokenizer, tmp_path, monkeypatch):
    """Red when save writes into the folder itself."""

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(OSError, match="No space"):
        tokenizer.save(tmp_path / "mine")
    assert list(tmp_path.iterdir()) == []


def test_hash_covers_ranks_pattern_and_specials(tokenizer):
    swapped = [*tokenizer.ranks[:-2], tokenizer.ranks[-1], tokenizer.ranks[-2]]
    others = [
        Tokenizer(swapped),
        Tokenizer(tokenizer.ranks, SPLIT_PATTERN.replace("1,2", "1,3")),
        Tokenizer(tokenizer.ranks, specials=(*SPECIAL_TOKENS[:-1], "<|x|>")),
    ]
    assert len({tokenizer.hash, *(other.hash for other in others)}) == 4


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "tokenizer.json").unlink(),
        lambda folder: (folder / "ranks.tiktoken").write_bytes(b""),
        lambda folder: (folder / "ranks.tiktoken").write_bytes(b"not base64 at all\n"),
        lambda folder: (folder / "ranks.tiktoken").write_bytes((folder / "ranks.tiktoken").read_bytes()[:-40]),
        lambda folder: (folder / "tokenizer.json").write_text("{}"),
        lambda folder: (folder / "tokenizer.json").write_bytes(b"\xff\xfe"),
        lambda folder: (folder / "tokenizer.json").write_text("[1, 2]"),
        lambda folder: (folder / "tokenizer.json").write_text(
            (folder / "tokenizer.json").read_text().replace("N}{1,2}", "N}{1,9}")
        ),
        lambda folder: (folder / "tokenizer.json").write_text(
            (folder / "tokenizer.json").read_text().replace("p{N}", "p{N(")
        ),
    ],
)
def test_damaged_files_are_named(tokenizer, tmp_path, damage):
    folder = tokenizer.save(tmp_path / f"mine-{tokenizer.hash[:8]}")
    damage(folder)
    with pytest.raises(UserError, match=f"tokenizer .*mine-{tokenizer.hash[:8]} "):
        Tokenizer.load(folder)


# -- the tokenizer of a run -------------------------------------------------------------------------------------------


@pytest.fixture
def base(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    return tmp_path / "base"


def fake_dataset(name: str = "hf:some/data", sha256: str = "ab" * 32) -> SimpleNamespace:
    def documents(split: str):
        assert split == "train", "only the train split may be learnt from"
        return iter([("one", TEXTS[0]), ("two", TEXTS[1])])

    return SimpleNamespace(name=name, fingerprint={"sha256": sha256}, documents=documents)


def test_trained_once_for_the_same_data_and_size(base, monkeypatch):
    lines: list[str] = []
    with record_messages(lines):
        first = find_or_train(Settings(vocab_size=400), fake_dataset())
    assert (base / "tokenizers" / first.name).is_dir()
    assert first.name == f"hf-some-data-400-abababab-{first.hash[:8]}"
    assert len(lines) == 2
    with monkeypatch.context() as patch:
        patch.setattr(Tokenizer, "train", None)
        with record_messages(lines):
            assert find_or_train(Settings(vocab_size=400), fake_dataset()).hash == first.hash
    assert len(lines) == 2
    assert find_or_train(Settings(vocab_size=401), fake_dataset()).vocab_size == 401
    assert find_or_train(Settings(vocab_size=400), fake_dataset(sha256="cd" * 32)).name != first.name


def test_named_tokenizers(base, tmp_path):
    """By folder, by whole name, by name without the hash; a wrong name says what exists."""
    trained = find_or_train(Settings(vocab_size=400), fake_dataset())
    settings = Settings(vocab_size=4096)
    for wish in (trained.name, trained.name[:-9], str(base / "tokenizers" / trained.name)):
        assert find_or_train(replace(settings, tokenizer=wish), fake_dataset()).hash == trained.hash
    with pytest.raises(UserError, match=f"'nope' is neither .*{trained.name}"):
        find_or_train(replace(settings, tokenizer="nope"), fake_dataset())
    for wish in ("~nosuchuser/x", "x" * 300):  # red without path_errors_as_user_errors
        with pytest.raises(UserError, match=r"^tokenizer='.* cannot be looked up"):
            find_or_train(replace(settings, tokenizer=wish), fake_dataset())
    twin = base / "tokenizers" / (trained.name[:-8] + "0" * 8)
    shutil.copytree(base / "tokenizers" / trained.name, twin)
    with pytest.raises(UserError, match="ambiguous"):
        find_or_train(replace(settings, tokenizer=trained.name[:-9]), fake_dataset())
    with pytest.raises(UserError, match="its name says 00000000"):
        find_or_train(replace(settings, tokenizer=twin.name), fake_dataset())


def test_nothing_trained_yet(base):
    with pytest.raises(UserError, match="which has none yet"):
        find_or_train(Settings(tokenizer="nope"), fake_dataset())


def test_training_reports_its_progress(base, monkeypatch):
    """While merging too, for which the trainer gives up Python's lock. Red without `with reporting(...)`."""
    monkeypatch.setattr("nanochat.data.tokenizer_sample.REPORT_SECONDS", 0.002)
    lines = []
    with record_messages(lines):
        find_or_train(Settings(vocab_size=2000), fake_dataset())
    merging = re.compile(r"training the tokenizer: 2 documents, 0\.\d M characters read, merging for \d+ s")
    assert any(map(merging.fullmatch, lines)), lines
    assert not any(thread.name == "tokenizer progress" for thread in threading.enumerate())


# -- the scripts ------------------------------------------------------------------------------------------------------


def test_scripts(base, tiny_corpus, capsys):
    arguments = [f"--data={tiny_corpus}", "--vocab_size=300"]
    trained = tok_train.main(arguments)
    assert trained.vocab_size == 300
    assert trained.hash in capsys.readouterr().out
    table = tok_eval.main(arguments)
    printed = capsys.readouterr().out
    assert table["code"][trained.name] == pytest.approx(
        len(tok_eval.MIX["code"].encode()) / len(trained.encode(tok_eval.MIX["code"]))
    )
    assert "held out" in printed
    assert set(table) == {"held out", *tok_eval.MIX}
    assert json.loads(json.dumps(table)) == table


def test_a_fetch_without_answer_costs_no_more_than_its_limit(monkeypatch, capsys):
    """Red when the thread is joined without a limit."""
    from threading import Event

    forever = Event()
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: forever.wait())
    assert tok_eval.fetch_rivals(seconds=0.05) == {}
    assert (
        "GPT-2 and cl100k skipped: tiktoken cannot get the files (no answer within 0.05 s)" in capsys.readouterr().out
    )
    forever.set()
