"""The checks of a GPU, run on a CPU at a tiny size: they measure, notice what is wrong, and go on after a failure."""

import dataclasses
import json

import pytest
import torch

from nanochat import decoding, hardware
from nanochat.config.settings import validate
from nanochat.runtime import Compute
from nanochat.system.environment import UserError
from scripts.stress import gpu
from tests.forked import Forked
from tests.tiny_run import exit_code

TINY = gpu.Plan(
    Compute(torch.device("cpu"), torch.bfloat16),
    depths={1: 2},
    shape=dict(max_seq_len=16, vocab_size=300, head_dim=64, model_dim=128),
    batch=64,
    steps=1,
    new_tokens=3,
    compiled=False,
    small=dict(
        depth=2,
        model_dim=64,
        head_dim=32,
        max_seq_len=32,
        vocab_size=300,
        window_pattern="SL",
        short_window=10,
        total_batch_size=64,
        device_batch_size=2,
        eval_tokens=256,
    ),
)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Peaks are measured in no time, processes are forks, and the step of a static cache is not compiled."""
    monkeypatch.setattr(decoding, "compiler_problem", lambda: "switched off")
    monkeypatch.setattr(gpu, "matmul_peak", lambda *args: 1e12)
    monkeypatch.setattr(hardware, "measure_matmul_flops", lambda *args, **how: 1e12)
    monkeypatch.setattr("nanochat.training.estimate.measure_matmul_flops", lambda *args, **how: 1e12)
    monkeypatch.setattr(gpu, "start_process", lambda command, env, **how: Forked(command, env=env))


def test_without_a_gpu_one_line_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert exit_code(lambda: gpu.main([])) == 2
    assert capsys.readouterr().err.count("\n") == 1
    with pytest.raises(UserError, match="'speed' is not one of training, memory"):
        gpu.main(["--only=training,speed"])


def test_the_plan_on_a_gpu(monkeypatch, tmp_path):
    """nanochat's dial at depth 12 and 20, in the GPU's own dtype; --quick leaves the larger one out."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "init_compute", lambda *how, seed: TINY.compute)
    monkeypatch.setattr(gpu, "run", lambda *arguments: arguments)
    plan, names, output = gpu.main([f"--output={tmp_path}"])
    assert [(plan.settings(depth).n_embd, plan.settings(depth).n_head) for depth in plan.depths] == [
        (768, 6),
        (1280, 10),
    ]
    planned = [*plan.trainings(), *plan.memories()]
    assert [validate(settings).batch_plan() for _, settings in planned] == [
        (32, 8),
        (16, 16),
        (32, 8),
        (4, 1),
        (4, 2),
        (4, 1),
        (16, 1),
        (4, 1),
        (4, 1),
        (4, 1),
        (4, 1),
    ]
    assert (names, output, plan.settings(20).max_seq_len) == (list(gpu.CHECKS), tmp_path, 2048)
    assert list(gpu.main(["--quick", "--only=fp8"])[0].depths) == [12]


def test_every_check_runs_and_is_written_down(tmp_path, capsys):
    """Red when resuming, torchrun, bfloat16, the gradients or the cache differ from what they are held against."""
    names = list(gpu.CHECKS)
    result = gpu.run(TINY, names, tmp_path)
    assert [name for name in names if result[name]["problems"]] == []
    assert json.loads((tmp_path / "gpu_check.json").read_text())["training"]["rows"][1][0] == "d1, as the presets"
    assert result["memory"]["rows"][-1][0] == "without compiling"
    said = (tmp_path / "gpu_check.md").read_text()
    assert all(f"## {name} (" in said for name in names)
    kernels = {sees: [row[0] for row in result["attention"]["rows"] if row[1] == sees] for sees in ("all", "documents")}
    assert kernels == {"all": ["torch's FlashAttention 2", "SDPA"], "documents": ["SDPA"]}
    assert {row[0] for row in result["runs"]["rows"]} == {
        *("plain", "torchrun", "plain --resume", "float32", "documents")
    }
    assert "failed: none" in capsys.readouterr().out


def test_what_is_wrong_is_a_finding_and_the_rest_goes_on(monkeypatch, tmp_path, capsys):
    """Red when run() lets a check's exception through, or leaves with 0."""

    def broken(*args, **how):
        raise RuntimeError("out of order\nat line 7")

    monkeypatch.setattr(gpu, "find_hardware", broken)
    wrong = gpu.compare
    monkeypatch.setattr(gpu, "compare", lambda *pair: {**wrong(*pair), "whole": 0.5})
    monkeypatch.setattr(gpu, "decode", lambda model, prompts, count, **how: iter([torch.zeros(1)] * count))
    plan = dataclasses.replace(TINY, new_tokens=1)
    with pytest.raises(SystemExit) as left:
        gpu.run(plan, ["training", "fp8", "decoding", "gradients"], tmp_path)
    assert left.value.code == 1
    said = capsys.readouterr().out
    assert "FAILED: RuntimeError: out of order\n" in said
    assert "FAILED: d1: FP8 changes the gradient by 50.0%" in said
    assert "FAILED: 3 rows, {'compiled': True}: [[0.0, 0.0" in said
    assert "default compiled: the gradient is off by 5.00e-01, at most 1e-05" in said
    assert "4 checks, failed: training, fp8, decoding, gradients" in said


def test_a_run_that_fails_tells_its_end(tmp_path):
    with pytest.raises(RuntimeError, match=r"--depth=0 left with code 2: .*depth=0 is too small"):
        gpu._train(tmp_path, ["--model_tag=x", "--depth=0"], torchrun=False)
