"""The benchmark of scoring: two scorers that agree on a small model, and one that does not is found out."""

from argparse import Namespace

import pytest
import torch

from nanochat.system.environment import UserError
from scripts.bench import evaluate


def args(items: int) -> Namespace:
    return Namespace(items=items, rounds=2, shots=2, seed=0, compute=Namespace(device=torch.device("cpu")))


@pytest.fixture(autouse=True)
def small(monkeypatch):
    for name, value in dict(vocab_size=300, n_layer=2, n_embd=64).items():
        monkeypatch.setitem(evaluate.SHAPE, name, value)
    monkeypatch.setattr(evaluate.Numbers, "bos_id", 299)
    monkeypatch.setattr(evaluate, "matmul_peak", lambda *args: 1e9)


def test_a_scorer_that_chooses_otherwise_is_found_out(monkeypatch, capsys):
    """Red when compare() looks at one scorer twice, or pairs an item's rows with another slice's."""
    result = evaluate.run(args(8))
    assert (result["items"], result["differing"]) == (8, 0)
    assert 0 < result["largest_difference"] < 1e-4
    assert result["contenders"]["shared prefixes"]["ms_per_item"] > 0
    assert "choices that differ: 0 of 8" in capsys.readouterr().out
    scored = evaluate.score_rows
    monkeypatch.setattr(evaluate, "score_rows", lambda *args: ([-loss for loss in scored(*args)[0]], []))
    assert evaluate.run(args(8))["differing"] == 8


def test_slices_that_cannot_hold_their_examples():
    with pytest.raises(UserError, match="--items 5 is too few"):
        evaluate.run(args(5))
