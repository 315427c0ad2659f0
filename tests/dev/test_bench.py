"""The benchmarks: what the harness computes, with clocks of its own, and that contenders do what their names say.

Nothing is timed here: figures come from `python -m scripts.bench`.
"""

import functools
import json
import types
from argparse import Namespace

import numpy as np
import pytest
import torch

from nanochat.config.settings import Settings, validate
from nanochat.data.dataloader import DataLoader
from nanochat.model import loss_head
from nanochat.system.environment import UserError
from nanochat.training.estimate import meta_model
from scripts.bench import __main__ as bench
from scripts.bench import growth, load, memory, optimizer, predictions, timing, train

TINY = dict(
    vocab_size=300,
    depth=2,
    model_dim=32,
    head_dim=16,
    max_seq_len=64,
    total_batch_size=256,
    device_batch_size=2,
    num_iterations=5,
    dtype="float32",
)
FLAG = ",".join(f"{key}={value}" for key, value in TINY.items())


@pytest.fixture
def clock(monkeypatch):
    """A clock that only moves when it is told to."""
    time = [0.0]
    monkeypatch.setattr(timing, "now", lambda: time[0])
    return time


@pytest.fixture
def eager(monkeypatch):
    monkeypatch.setattr(train.Contender, "compile", lambda self: None)


def test_contenders_take_turns_and_ratios_are_within_a_round(clock):
    """A machine that becomes 10 times slower in the last round changes no ratio.

    Red when the order does not turn (`list(contenders) if number % 2 == 0 else` removed), when warm-up rounds count,
    or when median_ratio divides the medians.
    """
    ran, speed = [], [1.0]

    def contender(name: str, seconds: float):
        def step():
            ran.append(name)
            clock[0] += seconds * speed[0]

        return step

    def between():
        ran.append("|")
        speed[0] = {1.0: 3.0, 3.0: 10.0}.get(speed[0], 1.0)

    both = {"slow": contender("slow", 2.0), "fast": contender("fast", 0.5)}
    times = timing.alternate(both, rounds=3, warmup=1, between=between)
    assert " ".join(ran) == "fast slow slow fast | fast slow | slow fast |"
    assert times == {"slow": [2.0, 6.0, 20.0], "fast": [0.5, 1.5, 5.0]}
    assert timing.median_ratio(times, "fast", "slow") == 0.25
    uneven = {"a": [1.0, 10.0, 3.0], "b": [1.0, 2.0, 3.0]}
    assert timing.median_ratio(uneven, "a", "b") == 1.0  # of the medians it would be 1.5
    assert timing.summary(times, "slow")["fast"] == dict(seconds=1.5, fastest=0.5, slowest=5.0, rounds=3, ratio=0.25)


def test_the_peak_is_the_best_matmul(clock, monkeypatch):
    """With a multiplication that takes a second at the model's own shape and 100 at others.

    Red when `shapes` is not tried, when the factor 2 is forgotten, or when the last rate replaces the best.
    """
    own = (30, 20, 10)
    real = torch.mm

    def mm(a, b):
        clock[0] += 1.0 if (*a.shape, b.size(1)) == own else 100.0
        return real(a, b)

    monkeypatch.setattr(torch, "mm", mm)
    monkeypatch.setattr(timing, "SQUARES", ((8, 8, 8),))
    assert timing.matmul_peak(torch.device("cpu"), torch.float32, [own, (4, 4, 4)]) == 2 * 30 * 20 * 10


def test_against_counts_in_units_of_each_run_s_own_peak():
    """Twice the time on a machine of half the peak is the same; the peak is that of the contender's dtype.

    Red when the peaks are left out, swapped, or float32's is taken for all.
    """
    then = dict(
        contenders={"a": dict(seconds=1.0), "b": dict(seconds=1.0, dtype="bfloat16"), "gone": dict(seconds=1)},
        peak_flops={"float32": 4e9, "bfloat16": 8e9},
    )
    now = dict(
        contenders={"a": dict(seconds=2.0), "b": dict(seconds=2.0, dtype="bfloat16"), "new": dict(seconds=1)},
        peak_flops={"float32": 2e9, "bfloat16": 1e9},
    )
    assert timing.against(now, then) == {"a": 1.0, "b": 0.25}


def test_a_table_is_markdown_with_aligned_columns():
    lines = timing.table(("what", "n", "x", "none"), [("first", 12345, 0.123456, None), ("b", 1, 98765.4, None)])
    assert lines.splitlines() == [
        "| what  |      n |      x | none |",
        "|-------|-------:|-------:|-----:|",
        "| first | 12,345 | 0.1235 |    - |",
        "| b     |      1 | 98,765 |    - |",
    ]


def test_bench_train_from_flags_to_json_and_back(eager, monkeypatch, tmp_path, capsys):
    """Red when the control is missing, or --against does not find the earlier run's contenders."""
    monkeypatch.setattr(timing, "PEAK_SECONDS", 0.0)
    flags = ["train", "--rounds=1", f"--variant=old:path=plain,{FLAG}", f"--variant=new:{FLAG},smear=True"]
    first = bench.main([*flags, f"--json={tmp_path}/one.json"])
    assert json.loads((tmp_path / "one.json").read_text()) == first
    found = first["train"]["contenders"]
    assert list(found) == ["old", "new", "control"]
    assert found["old"]["ratio"] == 1.0
    assert all(one["tok_per_sec"] == pytest.approx(256 / one["seconds"]) for one in found.values())
    again = bench.main([*flags, f"--against={tmp_path}/one.json"])["train"]
    ratio = again["contenders"]["new"]["seconds"] / found["new"]["seconds"]
    ratio *= again["peak_flops"]["float32"] / first["train"]["peak_flops"]["float32"]
    assert again["against"]["new"] == pytest.approx(ratio)
    assert "times faster" in capsys.readouterr().out


def test_contenders_train_each_on_its_own_path(eager):
    """Red when path=plain builds the default model, a changed setting is lost, or a step leaves the weights alone."""
    plain, default, smeared = (
        train.best_contender("x", TINY, changes, "4,8", "cpu")
        for changes in (dict(path="plain"), {}, dict(smear=True, depth=1))
    )
    assert [type(one.model).__name__ for one in (plain, default)] == ["PlainGPT", "GPT"]
    assert ["smear_lambda" in one.model.state_dict() for one in (default, smeared)] == [False, True]
    assert [len(one.model.transformer.h) for one in (default, smeared)] == [2, 1]
    assert (plain.rows, plain.ids.shape) == (4, (4, 64))
    first, later = ([one.step() for one in (plain, default)] for _ in range(2))
    assert first[0] == pytest.approx(first[1], rel=1e-3)
    assert later[0] < 0.95 * first[0] < 5.4  # the batch is always the same, the very first loss log(300)


def test_mfu_is_the_model_s_flops_over_the_peak(eager, clock, monkeypatch):
    """A step of 2 s against a peak of 1e9: red when tokens are counted twice, or the peak of another dtype is taken."""
    monkeypatch.setattr(train, "matmul_peak", lambda *_: 1e9)
    monkeypatch.setattr(train.Contender, "step", lambda self: clock.__setitem__(0, clock[0] + 2.0))
    args = Namespace(preset=None, dtypes=None, variant=[f"a:{FLAG}"], micro_batches="2", rounds=2, device_type="cpu")
    found = train.run(args)["contenders"]["a"]
    matmul = 300 * 32 + 2 * 12 * 32**2
    assert found["mfu"] == pytest.approx(256 * (6 * matmul + 12 * 2 * 32 * 64) / 2.0 / 1e9)
    assert found["tok_per_sec"] == 128.0


@pytest.mark.parametrize(
    ("dtype", "bound", "more"),
    [
        ("float32", 1e-5, {}),
        ("bfloat16", 1e-2, {}),
        (
            "float32",
            1e-5,
            dict(smear=True, value_embeddings=True, residual_scalars=True, backout=True, n_kv_head=1, bigram_rows=64),
        ),
        ("float32", 1e-5, dict(window_pattern="SL", short_window=20, tie_weights=True, use_output_projection=True)),
    ],
)
def test_gradients_of_the_fast_path_are_those_of_the_plain_one(eager, dtype, bound, more):
    """Within 1e-5 in float32; in bfloat16 within 1e-2 and not above (1.05 of) plain bfloat16's own error.

    Red when the fast path loses a term: `1 - squashed * squashed` in loss_head.py, the window in attention.py.
    """
    reference = train.gradients_of(contender("plain", "float32", more))
    fast = train.compare(train.gradients_of(contender("default", dtype, more)), reference)
    assert fast["whole"] < bound
    if dtype == "bfloat16":
        plain = train.compare(train.gradients_of(contender("plain", dtype, more)), reference)
        assert fast["whole"] < 1.05 * plain["whole"]


def contender(path: str, dtype: str, more: dict) -> train.Contender:
    return train.Contender(validate(Settings(**{**TINY, **more, "dtype": dtype})), path)


def test_errors_of_gradients_by_hand():
    """Red when a norm is not relative, or the worst tensor is that of the largest difference."""
    reference = {"big": torch.tensor([300.0, 400.0]), "small": torch.tensor([0.6, 0.8])}
    found = {"big": torch.tensor([300.0, 405.0]), "small": torch.tensor([0.6, 0.9])}
    errors = train.compare(found, reference)
    assert errors["worst_tensor"] == "small"
    assert errors["worst"] == pytest.approx(0.1)
    assert errors["whole"] == pytest.approx((25.01 / 250_001) ** 0.5)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--variant=a:smaer=True"], "did you mean 'smear'"),
        (["--variant=a:smear"], "not a setting=value"),
        (["--variant=control:"], "taken"),
        (["--variant=a:", "--variant=a:"], "differ"),
        (["--rounds=0"], "at least 1"),
        (["--variant=a:depth=0"], "too small"),
        (["--dtypes=float64"], "not one of"),
        (["--micro_batches=a"], "numbers"),
        (["--against=nowhere.json"], "is not there"),
        (["--device_type=tpu"], "unknown"),
    ],
)
def test_bad_input_is_refused(flags, said):
    with pytest.raises(UserError, match=said):
        bench.main(["train", *flags])


def test_a_file_that_is_no_reference_is_refused(small, tmp_path):
    """Red when the file is only opened after the part has run."""
    (tmp_path / "bad.json").write_text("{")
    (tmp_path / "other.json").write_text('{"head": {}}')
    for name, said in (("bad", "not a file of --json"), ("other", "no figures of train")):
        with pytest.raises(UserError, match=said):
            bench.main(["train", f"--against={tmp_path}/{name}.json"])


# ---------------------------------------------------------------------------------------------------------------------
# the other parts


@pytest.fixture
def small(monkeypatch, eager):
    """No time for the peak, and a model that costs nothing."""
    monkeypatch.setattr(timing, "PEAK_SECONDS", 0.0)
    monkeypatch.setattr(train, "SHAPE", TINY)


def test_peak_bytes_counts_what_is_alive_at_a_time():
    """Red when the sum of all allocations is taken for the peak, or the end for it."""

    def work():
        first = torch.empty(1000, dtype=torch.float32)
        del first
        return torch.empty(2000, dtype=torch.float32), torch.empty(500, dtype=torch.float32)

    assert memory.peak_bytes(work) == 10_000


def test_bench_head_holds_a_chunk_not_all(small):
    """1024 logits of 512 ids are 2 MiB. Red when the chunk size is not set, or stays changed afterwards."""
    before = loss_head.chunk_rows
    flags = ["head", "--rounds=1", "--tokens=1024", "--width=16", "--vocab=512", "--chunks=64,512", "--eager"]
    found = bench.main(flags)["head"]["contenders"]
    assert list(found) == ["all logits", "chunks of 64", "chunks of 512"]
    whole, few, many = (one["bytes"] for one in found.values())
    assert 4 * few < many < whole
    assert all(one["loss"] == pytest.approx(found["all logits"]["loss"], rel=1e-5) for one in found.values())
    assert loss_head.chunk_rows is before
    with pytest.raises(UserError, match="not a list of numbers"):
        bench.main(["head", "--chunks=few"])


def test_bench_attention_has_every_window_of_both(small):
    """Red when a window is not handed on: then ours takes as much memory as without."""
    flags = ["attention", "--rounds=1", "--tokens=512", "--lengths=512", "--heads=2", "--head_dim=8", "--eager"]
    found = bench.main([*flags, "--shares=16"])["attention"]["contenders"]
    kinds = ("torch", "ours")
    assert list(found) == [f"T 512, {seen}, {kind}" for seen in ("all", "window 32") for kind in kinds]
    assert found["T 512, window 32, ours"]["bytes"] < 0.9 * found["T 512, all, ours"]["bytes"]
    assert found["T 512, all, ours"]["ratio"] == 1.0


def test_bench_optimizer_times_each_kind_by_itself(small, monkeypatch):
    """Red when Muon's contender has AdamW's groups as well."""
    made = []
    real = optimizer.MuonAdamW
    monkeypatch.setattr(optimizer, "MuonAdamW", lambda groups: made.append({g["kind"] for g in groups}) or real(groups))
    found = bench.main(["optimizer", "--rounds=1"])["optimizer"]
    assert made == [{"muon", "adamw"}, {"muon"}, {"adamw"}]
    assert list(found["contenders"]) == ["whole step", "forward and backward", "update", "Muon", "AdamW"]
    square, wide = 5 * (4 * 32**3 + 2 * 32**3), 5 * (4 * 32 * 32 * 128 + 2 * 32**3)
    assert found["muon_flops"] == 2 * (4 * square + 2 * wide)


def test_bench_memory_counts_the_model_s_own_tensors(small, monkeypatch):
    """16 tokens in a model whose parameters outweigh them.

    Red when a moment of AdamW is left out, or gradients count among the activations (the first gradients() removed).
    """
    shape = {**TINY, "model_dim": 128, "max_seq_len": 16, "total_batch_size": 16, "device_batch_size": 1}
    monkeypatch.setattr(train, "SHAPE", shape)
    found = bench.main(["memory", "--eager"])["memory"]["bytes"]
    parameters = 4 * (2 * 300 * 128 + 2 * 12 * 128**2)
    assert found["parameters"] == found["gradients"] == [parameters, parameters]
    assert found["optimizer"][0] == found["optimizer"][1]
    measured, predicted = found["activations and logits"]
    assert predicted / 2 < measured < 1.5 * predicted < parameters


def test_packing_loses_what_a_row_cannot_show():
    """Rows of 10 out of 6, 4, 8, 9, 7: 9 and one token of 4, then 8 and two of 6, then 7, which is no whole row.

    Red when the longest document is cropped instead of the shortest, when the shortest that fits is taken, or when a
    row that the end leaves incomplete counts.
    """
    assert load.best_fit_waste([6, 4, 8, 9, 7], 10) == pytest.approx((3 + 4) / 27)
    assert load.best_fit_waste([6, 4, 8, 9, 7], 10, buffer=2) == pytest.approx(6 / 26)  # 6 + 4, 9 and one of 7, then 8
    assert load.best_fit_waste([25], 10) == pytest.approx(15 / 25)
    assert load.best_fit_waste([3], 10) == 0.0
    assert load.stream_waste([6, 4, 8, 9, 7], 10) == pytest.approx(4 / 34)


def test_the_made_up_store_feeds_a_loader():
    """Red when offsets do not begin at 0 (`[0], np.cumsum`), or do not end with the ids."""
    store = load.MadeUpStore([5, 30, 7], tokens=1000)
    assert [len(ids) for ids in np.split(*store.shard(0))[1:4]] == [5, 30, 7]
    loader = DataLoader(store, rows=4, seq_len=16, seed=0)
    inputs, targets = loader.next()
    assert inputs.shape == (4, 16)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    assert store.tokens(0) == store.shard(0)[1][-1] >= 500


def test_growth_fits_the_exponent_and_plots(small, monkeypatch, tmp_path, capsys):
    """Red when the fit is not in logarithms, or when `no` is not said of what grows faster than linearly."""
    assert growth.exponent([1, 2, 4], [3.0, 12.0, 48.0]) == pytest.approx(2.0)
    monkeypatch.setattr(growth, "DIMENSIONS", {"depth": (1, 2), "vocab_size": (300, 600)})
    monkeypatch.setattr(growth, "peak_bytes", lambda step: step() and 100 * 4 ** len(made))
    made, real = [], growth.settings_for
    monkeypatch.setattr(growth, "settings_for", lambda *a: made.append(real(*a)) or made[-1])
    flags = ["growth", "--rounds=1", "--tokens=512", "--dimensions=depth,vocab_size", f"--output={tmp_path}/g.png"]
    found = bench.main(flags)["growth"]["growth"]
    assert [(s.depth, s.vocab_size) for s in made] == [(1, 300), (2, 300), (2, 300), (2, 600)]
    assert all(s.total_batch_size == s.max_seq_len * s.device_batch_size == 512 for s in made)
    assert found["depth"]["memory"] == pytest.approx(2.0)
    assert capsys.readouterr().out.count(" no |") == 2
    assert (tmp_path / "g.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UserError, match="not one of depth"):
        bench.main(["growth", "--dimensions=height"])


def test_predictions_stand_beside_what_a_run_takes(monkeypatch, capsys):
    """One tiny configuration, eagerly, in this process. Red when the whole run is predicted, not a step, when imports
    stay in the prediction, or when the tokenizer is trained in the run that is measured."""
    tiny = dict(depth=1, model_dim=16, head_dim=8, max_seq_len=16, vocab_size=300, total_batch_size=64)
    monkeypatch.setattr(predictions, "BASE", tiny | dict(device_batch_size=4, num_iterations=1000))
    monkeypatch.setattr(predictions, "CONFIGURATIONS", {"base": {}})
    monkeypatch.setattr(predictions, "Contender", functools.partial(train.Contender, compiled=False))
    monkeypatch.setattr(predictions, "measure", lambda settings, hardware, seconds: 1e6)
    monkeypatch.setattr(predictions, "resident_bytes", {"VmRSS": 400 << 20, "VmHWM": 700 << 20}.get)
    runs, calls = [], []
    monkeypatch.setattr(predictions.base_train, "main", runs.append)

    def child(command, env=None, **_):
        if command[0] == "git":
            return types.SimpleNamespace(stdout="0123abc")
        what, name, dtype, seconds, rounds = command[-5:]
        calls.append((what, env["NANOCHAT_BASE_DIR"]))
        found = predictions.MEASURES[what](predictions.settings_of(name, dtype), float(seconds), int(rounds))
        return types.SimpleNamespace(stdout=f"said before\n{json.dumps(found, default=str)}\n")

    monkeypatch.setattr(predictions.subprocess, "run", child)
    found = bench.main(["predictions", "--rounds=1", "--dtype=float32"])["predictions"]["base"]
    head = 6 * 16 * 300
    flops = 64 * (0.78 * (meta_model(Settings(**tiny, num_iterations=1000)).flops_per_token() - head) + 0.98 * head)
    muon = 5 * (4 * (4 * 16**3 + 2 * 16**3) + 2 * (4 * 16 * 16 * 64 + 2 * 16**3))
    assert found["seconds"][1] == pytest.approx((flops + muon) / 1e6)
    assert found["bytes"][0] == 300 << 20
    assert (60 << 20) + 4 * 300 * 16 < found["bytes"][1] < 61 << 20  # 460 of the process, 400 of them imports
    assert [what for what, _ in calls] == ["seconds", "bytes", "bytes"]
    assert len({folder for _, folder in calls}) == 1
    assert {"--num_iterations=4", "--vocab_size=300", "--dtype=float32"} < set(runs[1])
    assert "| base" in capsys.readouterr().out
