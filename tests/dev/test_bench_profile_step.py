"""The profile of a step: which event belongs to which part, and that the parts make up the step."""

from types import SimpleNamespace

import pytest
import torch

from nanochat.system.environment import UserError
from scripts.bench import profile_step, timing, train
from scripts.bench.profile_step import Sizes, by_part, part_of

SIZES = Sizes(tokens=512, hidden=256, vocab=300)
GRAPH = ["## Call CompiledFxGraph abc", "CompiledFunctionBackward"]


@pytest.mark.parametrize(
    ("names", "shapes", "part"),
    [
        (["aten::mm", *GRAPH], [[512, 64], [64, 64]], "attention matrices"),
        (["aten::mm", *GRAPH], [[64, 512], [512, 64]], "attention matrices"),
        (["aten::mm", *GRAPH], [[512, 64], [64, 256]], "MLP matrices"),
        (["aten::mm", *GRAPH], [[256, 512], [512, 64]], "MLP matrices"),
        (["aten::mm"], [[512, 64], [64, 300]], "loss head"),
        (["aten::addmm_", "_ChunkedSum"], [[300, 64], [300, 128], [128, 64], [], []], "loss head"),
        (["graph_1_cpp_fused_exp_gather_1", "_ChunkedSum"], [], "loss head"),
        (["aten::bmm", *GRAPH], [[8, 128, 16], [8, 16, 256]], "attention itself"),
        (["graph_0_cpp_fused__softmax_masked_fill_3", *GRAPH], [], "attention itself"),
        (["aten::_flash_attention_forward"], [[4, 4, 512, 16]], "attention itself"),
        (["graph_0_cpp_fused__unsafe_view_pow_relu_9", *GRAPH], [], "MLP between"),
        (["graph_0_cpp_fused_add_mean_mul_pow_rsqrt_0", *GRAPH], [], "norms, rotary, residuals"),
        (["aten::sum", "aten::rms_norm"], [[2, 256, 64]], "norms, rotary, residuals"),
        (["aten::index_select", "aten::embedding"], [[300, 64]], "embedding"),
        (["aten::bmm", "Optimizer.step#MuonAdamW.step", "part: Muon"], [[8, 64, 64], [8, 64, 64]], "Muon"),
        (["aten::mul"], [[4]], "other"),
    ],
)
def test_an_event_is_known_by_its_surroundings_and_shapes(names, shapes, part):
    """Tokens equal to the hidden units must not hide which matrix it is.

    Red when the tokens are not removed once (`matrix.remove(sizes.tokens)`), or marks are looked at last.
    """
    assert part_of(names, shapes, SIZES) == part
    if part == "attention matrices":
        shapes = [[256 if n == 512 else n for n in shape] for shape in shapes]
        assert part_of(names, shapes, Sizes(tokens=256, hidden=256, vocab=300)) == part


def test_time_is_counted_once_and_flops_of_matmuls_only():
    """Red when a parent's whole time is added to its children's, or flops of elementwise ops are counted."""

    def event(name, own, parent=None, shapes=(), flops=0):
        return SimpleNamespace(
            name=name, self_cpu_time_total=own, cpu_parent=parent, input_shapes=list(shapes), flops=flops, kernels=[]
        )

    mark = event("part: Muon", 5.0)
    events = [
        mark,
        event("aten::baddbmm", 1e6, mark, [[2, 4, 8], [2, 4, 4], [2, 4, 8], [], []]),
        event("aten::mul", 2e6, mark, flops=77),
    ]
    assert by_part(events, SIZES) == {"Muon": dict(seconds=pytest.approx(3.000005), flops=2 * 2 * 4 * 4 * 8)}
    events[1].kernels = [SimpleNamespace(duration=10.0), SimpleNamespace(duration=30.0)]
    assert by_part(events, SIZES, cuda=True)["Muon"]["seconds"] == pytest.approx(4e-5)


def test_the_parts_make_up_the_step(monkeypatch, tmp_path, capsys):
    """Red when shares do not add up, matmuls of a part are missed, or the file differs from what is printed."""
    shape = dict(
        vocab_size=300,
        depth=2,
        model_dim=32,
        head_dim=16,
        max_seq_len=64,
        total_batch_size=256,
        device_batch_size=2,
        num_iterations=5,
    )
    monkeypatch.setattr(train, "SHAPE", shape)
    monkeypatch.setattr(timing, "PEAK_SECONDS", 0.0)
    parts = profile_step.main(["--eager", "--steps=1", f"--output={tmp_path}/profile.md"])
    assert sum(part["share"] for part in parts.values()) == pytest.approx(1.0)
    wanted = set(profile_step.PARTS)
    assert set(parts) == wanted
    matrices = 2 * 256 * 32 * (4 * 32 + 2 * 128) * 2 * 3  # forward, and twice in backward, of two layers
    assert parts["attention matrices"]["flops"] + parts["MLP matrices"]["flops"] == matrices
    assert parts["loss head"]["flops"] == 2 * 256 * 32 * 300 * 3
    out = capsys.readouterr().out
    assert out.startswith("# A step of 256 tokens")
    assert (tmp_path / "profile.md").read_text() == out
    with pytest.raises(UserError, match="at least 1"):
        profile_step.main(["--steps=0"])
    assert torch.is_grad_enabled()
