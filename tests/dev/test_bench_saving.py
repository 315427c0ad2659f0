"""The benchmark of background saving runs, and its arms do what they say."""

import pytest

from nanochat import checkpoint_manager as cm
from nanochat.config.presets import PRESETS
from nanochat.system.environment import UserError
from scripts.bench import saving as bench_saving
from scripts.bench import train


def test_only_the_background_arm_saves(monkeypatch, capsys):
    """Red when "control" gets the saver too, or when a segment does not save."""
    small = dict(depth=1, model_dim=32, head_dim=16, max_seq_len=32, total_batch_size=64, device_batch_size=2)
    monkeypatch.setitem(PRESETS, "cpu", {**PRESETS["cpu"], **small, "vocab_size": 300})
    monkeypatch.setattr(train.Contender, "compile", lambda self: None)
    saved, real = [], cm.save_checkpoint
    monkeypatch.setattr(cm, "save_checkpoint", lambda *args, **kw: (saved.append(args[1]), real(*args, **kw))[1])
    ratios = bench_saving.main(["--rounds", "2", "--steps", "3"])
    assert saved == [1, 2, 3, 4, 5]  # three to warm up, one for each round
    assert {arm: len(values) for arm, values in ratios.items()} == {"control": 2, "background": 2}
    assert "2 rounds of 3 steps" in capsys.readouterr().out
    with pytest.raises(UserError, match="at least 1"):
        bench_saving.main(["--rounds", "0"])
