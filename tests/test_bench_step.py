"""The benchmark of a step: what it measures, and how it refuses. Its figures are not tested."""

import pytest
import torch

from nanochat.loss_head import compile_loss_head
from nanochat.runtime import UserError
from scripts import bench_step

TINY = "vocab_size=300,depth=2,model_dim=32,head_dim=16,max_seq_len=16,total_batch_size=64,device_batch_size=4"


def test_every_variant_trains_and_the_baseline_is_its_own_control(monkeypatch, capsys):
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    try:
        times = bench_step.main(
            ["--rounds=3", f"--variant=old:{TINY},value_embeddings=False", f"--variant=new:{TINY},smear=True"]
        )
    finally:
        compile_loss_head(False)
    assert list(times) == ["old", "new", "control"]
    old, new = (bench_step.Variant("cpu", bench_step.parse_variant(f"x:{TINY},smear={s}")[1]) for s in (False, True))
    assert ("smear_lambda" in old.model.state_dict(), "smear_lambda" in new.model.state_dict()) == (False, True)
    before = old.model.transformer.wte.weight.clone()
    old.step()
    assert not torch.equal(before, old.model.transformer.wte.weight)
    assert all(len(steps) == 3 and all(len(step) == 4 and min(step) > 0 for step in steps) for steps in times.values())
    table = capsys.readouterr().out.splitlines()
    assert table[1].split() == ["variant", "forward", "backward", "reduce", "step", "sum", "min", "max", "ratio"]
    assert table[2].split()[0] == "old"
    assert table[2].split()[-1] == "1.000"


@pytest.mark.parametrize(
    ("flag", "said"),
    [("--variant=a:smaer=True", "did you mean 'smear'"), ("--variant=a:smear", "not a setting=value"),
     ("--variant=control:", "taken"), ("--rounds=0", "at least 1"), ("--variant=a:depth=0", "too small")],
)  # fmt: skip
def test_bad_input_is_refused(flag, said):
    with pytest.raises(UserError, match=said):
        bench_step.main([flag])
