"""What the loop hands to the optimizer at each step, against numbers worked out by hand; for both scripts that use it.

The log computes its own rate, and a run learns at a constant one as well: only step() itself can tell.
"""

import shutil

import pytest
import torch

from nanochat.optim import MuonAdamW
from scripts import adapter_train, base_train
from tests.hosts_fixtures import tiny_llama
from tests.tiny_run import flags, metrics, tag_dir

# 8 steps, 2 of warmup, the last 4 down to a tenth: worked out by hand.
SHAPE = dict(num_iterations=8, save_every=4, warmup_steps=2, warmdown_ratio=0.5, final_lr_frac=0.1, weight_decay=0.3)
LIMIT = 1.0
MULTIPLIERS = [0.5, 1.0, 1.0, 1.0, 1.0, 0.775, 0.55, 0.325]


@pytest.fixture
def updates(monkeypatch) -> list[dict]:
    """One record a step: the groups' hyperparameters and the clipping scale that step() got, and a number that it drew
    from torch's generator, as dropout would."""
    seen = []
    step = MuonAdamW.step

    def recorded(optimizer: MuonAdamW, scale: float = 1.0) -> None:
        names = ("lr", "momentum", "weight_decay")
        groups = {g["name"]: {name: g[name] for name in names if name in g} for g in optimizer.param_groups}
        seen.append(dict(groups=groups, scale=scale, draw=torch.rand(()).item()))
        step(optimizer, scale)

    monkeypatch.setattr(MuonAdamW, "step", recorded)
    return seen


def resumed(script, tag: str, stage: str, updates: list[dict]) -> list[dict]:
    """The records of steps 5 to 8 when the run goes on from step 4, in a process that has drawn other numbers."""
    shutil.rmtree(tag_dir(tag, stage) / "step_000008")
    updates.clear()
    torch.manual_seed(99)
    script.main([f"--model_tag={tag}", "--resume"])
    return updates


def check_clipping(updates: list[dict], limit: float, norms: list[float]) -> None:
    """The scale of each step brings the norm of the log to the limit where it is above it; both happen in the run."""
    assert min(norms) < limit < max(norms)
    for update, norm in zip(updates, norms, strict=True):
        assert update["scale"] == pytest.approx(min(1.0, limit / norm), rel=1e-6)


def test_rates_momentum_decay_and_clipping_reach_the_optimizer(train, updates):
    """Each group of each step, and again from a checkpoint. Red when the line that sets group["lr"], ["momentum"]
    or ["weight_decay"] is dropped, when it calls step(1.0), or when a schedule starts anew after a resume."""
    rates = dict(matrix_lr=0.03, embedding_lr=0.3, unembedding_lr=0.006)
    train("updates", **SHAPE, **rates, grad_clip=LIMIT)
    width = (64 / 768) ** -0.5
    for number, (update, multiplier) in enumerate(zip(updates, MULTIPLIERS, strict=True)):
        assert update["groups"] == {
            "embedding": dict(lr=pytest.approx(0.3 * width * multiplier), weight_decay=0.0),
            "unembedding": dict(lr=pytest.approx(0.006 * width * multiplier), weight_decay=0.0),
            "matrix": dict(
                lr=pytest.approx(0.03 * multiplier),
                momentum=pytest.approx(0.85 + 0.1 * number / 300),
                weight_decay=pytest.approx(0.3 * (1 - number / 8)),
            ),
        }
    check_clipping(updates, LIMIT, metrics("updates", "grad_norm"))
    assert metrics("updates", "lr") == pytest.approx([update["groups"]["matrix"]["lr"] for update in updates])
    whole = [*updates]
    assert resumed(base_train, "updates", "base", updates) == whole[4:]


def test_a_resumed_run_draws_the_numbers_that_the_uninterrupted_one_draws(train, updates):
    """torch's generator goes on from the checkpoint, though making the model has drawn from it in between.

    Red without set_rng_state() in restore_progress().
    """
    train("draws", **SHAPE)
    drawn = [update["draw"] for update in updates]
    assert len(set(drawn)) == 8
    assert [update["draw"] for update in resumed(base_train, "draws", "base", updates)] == drawn[4:]


def test_rates_decay_clipping_and_draws_reach_the_adapters_optimizer(train, updates, tmp_path):
    """The same of scripts.adapter_train: one rate and a constant decay for all groups. Red as above, and when its
    groups lack `initial_lr`."""
    tiny_llama(tmp_path / "host", tied=True)
    settings = dict(
        host=tmp_path / "host",
        musicgen=None,
        expert="random",
        expert_dim=24,
        data="synth",
        data_limit=60,
        clip_seconds=0.3,
        modalities="audio:32",
        codebooks=2,
        codec="frame",
        max_seq_len=112,
        total_batch_size=1344,
        device_batch_size=3,
        eval_every=None,
        eval_clips=4,
        check_text=None,
        device_type="cpu",
        dtype="float32",
        learning_rate=0.02,
        grad_clip=LIMIT,
        **SHAPE,
    )
    adapter_train.main([*flags(settings), "--model_tag=updates"])
    assert {name for update in updates for name in update["groups"]} >= {"adapters", "audio_embedding"}
    for update, multiplier in zip(updates, MULTIPLIERS, strict=True):
        for group in update["groups"].values():
            assert group == dict(lr=pytest.approx(0.02 * multiplier), weight_decay=0.3)
    check_clipping(updates, LIMIT, metrics("updates", "grad_norm", "adapter"))
    whole = [*updates]
    assert resumed(adapter_train, "updates", "adapter", updates) == whole[4:]
