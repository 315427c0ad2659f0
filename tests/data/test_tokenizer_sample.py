"""The sample a tokenizer is trained on: where texts are cut, and where reading stops."""

import random
import re

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from tokenizers import Regex, pre_tokenizers

from nanochat.data import tokenizer_sample
from nanochat.data.tokenizer import SPLIT_PATTERN
from nanochat.data.tokenizer_sample import TrainingSample, cut_at_boundaries
from tests.messages import record_messages

# A letter before a space, or a newline before a letter, comes at least every 10 characters.
CUTTABLE = st.lists(st.text("ab'sé日-7 \t\n\r", max_size=7).map(lambda text: f"{text}a b"), max_size=30).map("".join)


def pieces(text: str) -> list[str]:
    return [piece for piece, _ in pre_tokenizers.Split(Regex(SPLIT_PATTERN), "isolated").pre_tokenize_str(text)]


def read(texts, **limits) -> tuple[list[str], list[str], TrainingSample]:
    """(chunks, messages, sample) with module constants set to other values."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in limits.items():
            patch.setattr(tokenizer_sample, name, value)
        lines: list[str] = []
        with record_messages(lines):
            sample = TrainingSample(texts)
            chunks = list(sample.chunks())
        return chunks, lines, sample


@hypothesis_settings(max_examples=100)
@given(CUTTABLE, st.integers(20, 60))
def test_chunks_have_the_pieces_of_the_whole_text(text, longest):
    """Red when it is cut behind any newline ("|(?<=\\n)" in _BOUNDARY), or before the letter ("(?= )" removed)."""
    chunks = list(cut_at_boundaries(text, longest))
    assert "".join(chunks) == text
    assert max(map(len, chunks)) <= longest
    assert [piece for chunk in chunks for piece in pieces(chunk)] == pieces(text)


def test_text_without_boundaries_is_cut_where_its_pieces_end():
    """Red when CHUNK is no multiple of 128."""
    text = "".join(random.Random(0).choices("ACGT", k=2 * tokenizer_sample.CHUNK + 1000))
    chunks, _, sample = read([text, "\n" * (tokenizer_sample.CHUNK + 1)])
    assert list(map(len, chunks)) == [tokenizer_sample.CHUNK, tokenizer_sample.CHUNK, 1000, tokenizer_sample.CHUNK, 1]
    assert [piece for chunk in chunks[:3] for piece in pieces(chunk)] == pieces(text)
    assert (sample.documents, sample.characters) == (2, len(text) + tokenizer_sample.CHUNK + 1)


def test_characters_are_bounded():
    """Red when the bound counts documents or bytes instead of characters."""
    texts = ["é" * 900, "b" * 900, "c" * 900, "d"]
    chunks, lines, sample = read(iter(texts), TRAINING_CHARACTERS=2000)
    assert "".join(chunks) == "é" * 900 + "b" * 900 + "c" * 200
    assert sample.documents == 3
    assert len(lines) == 1
    assert lines[0].startswith("the tokenizer learns from the first 2,000 characters")
    assert read(texts[:2], TRAINING_CHARACTERS=2000)[1] == []


@pytest.mark.parametrize("alphabet", ["ACGT", "中文字符", "^&*(", "abcd "])
def test_distinct_pieces_are_bounded(alphabet):
    """Random letters stop the reading near the bound, however often words that were read before come again.

    Red when only new bytes of ASCII letters count, when repeats count, or when the sixteenth is not scaled up.
    """
    rng, limit = random.Random(1), 400_000
    fresh = ["".join(rng.choices(alphabet, k=20_000)) for _ in range(100)]
    repeats = [fresh[0]] * 20
    chunks, lines, _ = read([*repeats, *fresh], DISTINCT_BYTES=limit, CHUNK=4096)
    taken = "".join(chunks)
    distinct = sum(len(piece.encode()) for piece in set(pieces(taken)))
    assert 0.7 * limit < distinct < 1.4 * limit
    assert len(taken) < sum(map(len, [*repeats, *fresh]))
    assert re.search(r"first [\d,]+ characters, which hold 0\.4 MB of distinct pieces", lines[0])


def test_the_same_text_is_taken_whatever_the_hash_seed():
    """Red when the sixteenth is chosen by hash(), which differs between processes."""
    rng = random.Random(2)
    texts = ["".join(rng.choices("ACGT", k=20_000)) for _ in range(40)]
    _, _, sample = read(texts, DISTINCT_BYTES=300_000, CHUNK=4096)
    assert sample.characters == 284_096  # measured once; a property of crc32


def test_progress_line():
    """Red when it counts chunks, or says merging while there is text to read."""
    sample = TrainingSample(["a" * 600_000, "b" * 650_000])
    chunks = sample.chunks()
    next(chunks)
    assert sample.progress() == "training the tokenizer: 1 documents, 0.3 M characters read"
    list(chunks)
    assert sample.progress() == "training the tokenizer: 2 documents, 1.2 M characters read, merging for 0 s"
