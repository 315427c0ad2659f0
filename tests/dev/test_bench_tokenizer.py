"""The benchmark of tokenizer training: the texts it draws, and which pattern it trains with."""

import pytest

from nanochat.data.tokenizer import SPLIT_PATTERN
from nanochat.system.environment import UserError
from scripts.bench import tokenizer as bench


@pytest.mark.parametrize("kind", bench.KINDS)
def test_texts_have_their_size(kind):
    """Red when the size counts characters (`// len(...)` removed)."""
    assert 9_990 < len(bench.draw(kind, 10_000).encode()) <= 10_000
    assert bench.draw(kind, 100, seed=1) == bench.draw(kind, 100, seed=1)


def test_training_takes_the_pattern_it_is_given():
    """And all merges where the text has fewer than asked for. Red when `pattern=pattern` is removed."""
    _, unbounded = bench.train("a" * 600, 400, bench.UNBOUNDED)
    assert (unbounded.pattern, max(map(len, unbounded.ranks))) == (bench.UNBOUNDED, 600)
    _, bounded = bench.train("a" * 600, 400)
    assert (bounded.pattern, max(map(len, bounded.ranks))) == (SPLIT_PATTERN, 128)


def test_measure():
    found = bench.measure("dna", [0.01, 0.02], 280)
    assert [row["megabytes"] for row in found["sizes"]] == [0.01, 0.02]
    assert len(found["small"]) == 4
    with pytest.raises(UserError, match="--kinds 'rna' is unknown: some of dna,"):
        bench.run(bench.argparse.Namespace(kinds="dna,rna", megabytes="1", vocab=280, line_megabytes=0))
