"""Names of wrappers, and values that are no number."""

import math

import pytest
import torch
from torch.nn.parallel import DataParallel

from nanochat.system.environment import UserError
from nanochat.upstream.foreign_weights import describe_nonfinite, strip_wrappers


def block() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))


def test_names_are_those_of_the_model_before_it_was_wrapped():
    """By torch's own wrappers: whole, one layer alone, one in the other. Red when only the beginning of a name is
    looked at, or a wrapper is taken off once."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    plain = block().state_dict().keys()
    part = block()
    part[1] = torch.compile(part[1])
    inner = block()
    inner[0] = torch.nn.Sequential(torch.compile(inner[0]))[0]
    whole = torch.compile(block())
    for model in (
        whole,
        DataParallel(whole),
        torch.compile(DataParallel(block())),
        DataParallel(DataParallel(block())),
        part,
        inner,
    ):
        wrapped = model.state_dict()
        assert wrapped.keys() != plain
        stripped, phrases = strip_wrappers(dict(wrapped), "there")
        assert stripped.keys() == plain
        assert phrases
    assert "2 of 4 tensors are named with `_orig_mod.` of torch.compile" in strip_wrappers(part.state_dict(), "")[1][0]
    names = [f"layers.0._checkpoint_wrapped_module.{name}" for name in plain]
    assert checkpoint_wrapper(block())._checkpoint_wrapped_module is not None  # the name is torch's
    assert set(strip_wrappers(dict.fromkeys(names), "")[0]) == {f"layers.0.{name}" for name in plain}


def test_ordinary_names_stay():
    """Red when `module` is taken off anywhere, or off some of the tensors; and two of one name are refused."""
    for names in (
        ["module.a", "b"],
        ["a.module.b", "c.module.d"],
        ["module", "module.a"],
        ["orig_mod.a"],
        ["a._orig_mod"],
        [],
    ):
        state = {name: torch.ones(1) for name in names}
        assert strip_wrappers(state, "there") == (state, [])
    with pytest.raises(UserError, match=r"^there: a.w is there twice"):
        strip_wrappers({"_orig_mod.a.w": torch.ones(1), "a.w": torch.ones(1)}, "there")


def test_values_that_are_no_number_are_counted():
    """Red when NaN or one of the infinities is let through, or integers are not let pass."""
    tensors = {name: torch.ones(30, 40, dtype=torch.bfloat16) for name in "abcde"} | {"ids": torch.arange(9)}
    assert describe_nonfinite(tensors) is None
    tensors["b"][2, 3] = math.nan
    assert describe_nonfinite(tensors) == "b (1 of 1,200)"
    tensors["b"][:] = math.inf
    tensors["a"][0, :2] = -math.inf
    assert describe_nonfinite(tensors) == "a (2 of 1,200), b (1,200 of 1,200)"
    for name in "cd":
        tensors[name][0, 0] = math.nan
    assert describe_nonfinite(tensors).endswith("c (1 of 1,200) and 1 more tensor")
