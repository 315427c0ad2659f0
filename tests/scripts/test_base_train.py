"""The training script from its command line: resume to the bit, refusals, faults, presets, one rank against several."""

import json
import math
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch._inductor import config as inductor

from nanochat import checkpoint_files
from nanochat import checkpoint_manager as cm
from nanochat.config.config_file import read_config, render_config
from nanochat.config.presets import PRESETS
from nanochat.config.settings import preset
from nanochat.data.prepare import prepare
from nanochat.data.tokenizer import Tokenizer
from nanochat.hardware import compiler_problem
from nanochat.system.environment import UserError
from nanochat.training import compilation as compiling
from nanochat.training.resume import RunState
from scripts import base_train
from scripts.base_train import main
from tests.tiny_run import MODERN, TIED, TINY, flags, metrics, rows_of, start, state_hashes, tag_dir

# ---------------------------------------------------------------------------------------------------------------------
# one run


def test_a_run_learns_and_leaves_what_the_contract_says(train, corpus, capsys):
    """Red when a metrics key or a file of the checkpoint folder changes its name."""
    result = train("one", num_iterations=12, eval_every=6, save_every=6, log_rows=True, grad_clip=0.5, warmup_steps=2)
    assert result["stopped"] == "done"
    assert (result["model_tag"], result["step"]) == ("one", 12)
    names = {path.name for path in tag_dir("one").iterdir()}
    assert names == {
        "config.py",
        "metrics.jsonl",
        "run.log",
        "rows_rank0.jsonl",
        "evaluated.json",
        "step_000006",
        "step_000012",
    }
    lines = metrics("one")
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 13))
    assert steps[0].keys() >= {
        "step",
        "time",
        "tokens",
        "loss",
        "lr",
        "grad_norm",
        "tok_per_sec",
        "mfu",
        "mem_mb",
        "norm/grad_matrix",
    }
    assert steps[-1]["tokens"] == 12 * 768
    assert steps[0]["loss"] == pytest.approx(math.log(300), abs=0.05)
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.5
    assert [line["lr"] / steps[1]["lr"] for line in steps][:3] == [0.5, 1.0, 1.0]
    assert [(line["step"], line["event"]) for line in lines if "event" in line] == [
        (0, "start"),
        (6, "eval"),
        (6, "save"),
        (12, "eval"),
        (12, "save"),
        (12, "done"),
    ]
    assert metrics("one", "norm/weight_matrix")[0] > 0
    assert result["val_bpb"] == pytest.approx(lines[-1]["val_bpb"])

    _, tokenizer, metadata = cm.load_model("base", "cpu", "eval", "one")
    assert metadata.keys() == {
        "step",
        "settings",
        "model_config",
        "derived",
        "tokenizer_hash",
        "data_fingerprint",
        "loader",
        "run",
        "rng",
        "threads",
        "versions",
    }
    assert metadata["data_fingerprint"] == prepare(str(corpus)).fingerprint
    assert tokenizer.hash == metadata["tokenizer_hash"]
    assert read_config(tag_dir("one") / "config.py")["num_iterations"] == 12
    out = capsys.readouterr().out
    assert "num_iterations = 12 (default None, from command line)" in out
    assert "sample: '" in out
    assert "step    12/12 | loss" in out


def test_the_config_file_repeats_the_run(train):
    """config.py of a checkpoint, alone on the command line, gives the same weights. Red when one is not written."""
    train("first", **TIED)
    config = tag_dir("first") / "config.py"
    main([str(config), "--model_tag=second"])
    assert state_hashes("first", 4) == state_hashes("second", 4)


def test_cadences_of_samples_suites_and_pruning(train, monkeypatch, capsys):
    asked = []

    def scores(model, tokenizer, dataset, items, rank, world_size, stop):
        asked.append((items, rank, world_size))
        return {"offline": 0.25}

    monkeypatch.setattr(base_train, "evaluate_suite", scores)
    cadences = dict(core_metric_every=3, core_metric_max_per_task=7, sample_every=2, save_every=2, keep_last=2)
    train("cadence", num_iterations=7, **cadences)
    assert asked == [(7, 0, 1)] * 2
    assert [(line["step"], line["offline"]) for line in metrics("cadence") if "offline" in line] == [
        (3, 0.25),
        (6, 0.25),
    ]
    assert capsys.readouterr().out.count("sample: ") == 4
    assert cm.list_steps(tag_dir("cadence")) == [6, 7]


# ---------------------------------------------------------------------------------------------------------------------
# resume


@inductor.patch(compile_threads=1)  # a pool of compilers takes longer to start than to use
def test_compiled_runs_resume_to_the_bit_and_agree_with_eager(train, base, monkeypatch, capsys):
    """Also: no graph is made after the second step, whatever is evaluated and sampled between.

    Red when a block is compiled for evaluation's shapes too, when Muon's rates are numbers that are compiled in, or
    when the model is not told the tokenizer's <|bos|>.
    """
    small = dict(depth=3, device_batch_size=12, num_iterations=6, save_every=3, **MODERN)  # two kinds of blocks
    small |= dict(document_mask=True)
    train("eager", **small)
    model, tokenizer, _ = cm.load_model("base", "cpu", "eval", "eager")
    assert model.config.document_start == tokenizer.bos_id
    graphs, multiplier = [], base_train.schedule.lr_multiplier

    def watched(*arguments):
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        return multiplier(*arguments)

    monkeypatch.setattr(base_train.schedule, "lr_multiplier", watched)
    train("compiled", **small, compile=True, eval_every=3, sample_every=3)
    assert 0 < graphs[1] == graphs[-1]  # Muon's come with the first update; nothing is compiled after step 2
    assert ("compiled in" in capsys.readouterr().out) == (compiler_problem() is None)
    assert metrics("compiled", "loss") == pytest.approx(metrics("eager", "loss"), rel=5e-4)
    whole = state_hashes("compiled", 6)
    shutil.rmtree(tag_dir("compiled") / "step_000006")
    threads = str(torch.get_num_threads())
    process = start(base, "--model_tag=compiled", "--resume", OMP_NUM_THREADS=threads)  # another process, as in life
    assert process.wait(timeout=120) == 0
    assert state_hashes("compiled", 6) == whole
    assert metrics("compiled")[-1]["compile_seconds"] > 0

    monkeypatch.setattr(compiling, "compiler_problem", lambda: "no C++ compiler")
    train("fallback", **small, compile=True)
    assert "running without torch.compile (no C++ compiler)" in capsys.readouterr().out
    assert state_hashes("fallback", 6) == state_hashes("eager", 6)


def test_a_used_tag_is_refused_with_the_three_ways_out(train):
    """Red when base_train writes into a folder that holds a run."""
    train("used", num_iterations=1)
    before = state_hashes("used", 1)
    with pytest.raises(UserError) as caught:
        train("used", num_iterations=1, seed=2)
    assert all(way in str(caught.value) for way in ("--resume", "--model_tag=", "--overwrite"))
    assert state_hashes("used", 1) == before
    train("used", num_iterations=1, seed=2, overwrite=True)
    train("used", num_iterations=1, seed=3, overwrite=True)
    asides = sorted(path.name for path in cm.checkpoints_dir().iterdir() if path.name.startswith(".used"))
    assert asides == [".used.old-1", ".used.old-2"]
    old = load_file(cm.checkpoints_dir() / ".used.old-1" / "step_000001" / "model.safetensors")
    assert checkpoint_files.weights_hash(old) == before[0]


def test_a_finished_run_ends_well_and_goes_on_with_a_larger_horizon(train, capsys):
    """Red when the horizon of the checkpoint wins over the flag."""
    train("longer", num_iterations=4)
    four = state_hashes("longer", 4)
    assert main(["--model_tag=longer", "--resume"])["step"] == 4
    assert "is finished: step 4 of 4; a larger --num_iterations continues it" in capsys.readouterr().out
    assert state_hashes("longer", 4) == four
    more = main(["--model_tag=longer", "--resume", "--num_iterations=8", "--save_every=3", "--device_batch_size=2"])
    assert more["step"] == 8
    assert capsys.readouterr().out.count("the warmdown is recomputed") == 1
    assert cm.list_steps(tag_dir("longer")) == [4, 6, 8]
    # 8 steps with a warmdown of 40% fall from step 5 on; step 4 was the last of the first run's warmdown
    rates = metrics("longer", "lr_multiplier")
    assert [rate / rates[0] for rate in rates] == pytest.approx([1, 1, 1, 0.5, 1, 1, 2 / 3, 1 / 3], rel=1e-4)
    assert read_config(tag_dir("longer") / "config.py")["num_iterations"] == 8
    losses = metrics("longer", "loss")
    assert len(losses) == 8


def test_resuming_with_other_settings_is_refused_by_name(train):
    """Red when a setting that makes another run becomes changeable."""
    train("same", num_iterations=1)
    changes = dict(depth=3, seed=1, matrix_lr=0.5, data="stdlib", tie_weights=True, max_seq_len=32)
    for name, value in changes.items():
        with pytest.raises(UserError, match=rf"--resume cannot change {name}=.*the run has .*--model_tag=NAME"):
            main(["--model_tag=same", "--resume", f"--{name}={value}"])
    train("same", "--resume", eval_every=5)  # all given again, one of them of the cadence
    with pytest.raises(UserError, match="device_batch_size=5 does not divide"):
        main(["--model_tag=same", "--resume", "--device_batch_size=5"])


def test_resume_without_a_run_starts_one_and_a_launchers_restart_resumes(train, monkeypatch, capsys):
    train("restarted", "--resume", num_iterations=2)
    assert "nothing to resume" in capsys.readouterr().out
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    with pytest.raises(UserError, match="holds a run already"):  # refused by this launcher before: so it stays
        train("restarted", num_iterations=3)
    train("restarted", "--resume", num_iterations=3)
    assert train("restarted", num_iterations=4)["step"] == 4
    assert len(metrics("restarted", "loss")) == 4
    noted = json.loads((tag_dir("restarted") / "launcher.json").read_text())
    for other in ({"pid": 1}, {"host": "elsewhere"}, {"host": "elsewhere", "id": "none"}):
        (tag_dir("restarted") / "launcher.json").write_text(json.dumps(noted | other))
        if other == {"host": "elsewhere"}:  # the same job, its first rank on another host now
            assert train("restarted", num_iterations=5)["step"] == 5
        else:
            with pytest.raises(UserError, match="holds a run already"):
                train("restarted", num_iterations=5)


def test_a_renamed_run_resumes_where_it_lies(train):
    """Red when the checkpoint's settings bring the old name back."""
    train("before", num_iterations=2)
    os.rename(tag_dir("before"), tag_dir("after"))
    assert main(["--model_tag=after", "--resume", "--num_iterations=3"])["model_tag"] == "after"
    assert cm.list_steps(tag_dir("after")) == [2, 3]
    assert not tag_dir("before").exists()


def reseal_with(step: Path, change) -> None:
    state = json.loads((step / "state.json").read_text())
    change(state)
    (step / "state.json").write_text(json.dumps(state))
    checkpoint_files.write_manifest(step)


WRONG = {
    "no loader": (lambda s: s.pop("loader"), "cannot be resumed: 'loader' is missing"),
    "half a loader": (lambda s: s["loader"].pop("seed"), "cannot be resumed: 'seed' is missing"),
    "other data": (lambda s: s["loader"].update(data="x"), "the data order cannot continue: data="),
    "rng of words": (lambda s: s.update(rng="abc"), "cannot be resumed"),
    "run of words": (lambda s: s["run"].update(train_seconds="long"), "run.train_seconds is not a number"),
    "other model": (lambda s: s["model_config"].update(n_kv_head=1), "holds another model than the settings describe"),
    "other tokenizer": (lambda s: s.update(tokenizer_hash="beef"), "hash .*, the model was trained with beef"),
    "new setting": (lambda s: s["settings"].update(deepth=3), "unknown setting 'deepth', did you mean 'depth'"),
    "wrong setting": (lambda s: s["settings"].update(depth="3"), "depth='3' is a str"),
}


def test_a_checkpoint_that_cannot_be_resumed_says_why(train):
    train("odd", num_iterations=2)
    step = checkpoint_files.step_dir(tag_dir("odd"), 2)
    good = (step / "state.json").read_text()
    for change, message in WRONG.values():
        reseal_with(step, change)
        with pytest.raises(UserError, match=message):
            main(["--model_tag=odd", "--resume", "--num_iterations=3"])
        (step / "state.json").write_text(good)
    for key in ("run", "rng", "derived", "versions", "threads", "data_fingerprint", "tokenizer_hash"):
        reseal_with(step, lambda state, key=key: state.pop(key))
    assert main(["--model_tag=odd", "--resume", "--num_iterations=3"])["step"] == 3


# ---------------------------------------------------------------------------------------------------------------------
# bad input and faults


def test_bad_input_is_refused_before_anything_is_written(train, tmp_path):
    """Red when the tag's folder is made before data, tokenizer and device are known."""
    empty = tmp_path / "empty"
    empty.mkdir()
    cases = {
        "device_type='tpu' is not one of": dict(device_type="tpu"),
        "data": dict(data=tmp_path / "nothing"),
        "empty": dict(data=empty),
        "tokenizer='none-such' is neither": dict(tokenizer="none-such"),
        "total_batch_size=100 is not a multiple of": dict(total_batch_size=100),
        "model_dim=65 is not a multiple of head_dim": dict(model_dim=65),
        "less than one row of": dict(max_seq_len=65536, total_batch_size=65536),
    }
    if not torch.cuda.is_available():
        cases["device_type='cuda' is not available on this machine"] = dict(device_type="cuda")
    for message, settings in cases.items():
        with pytest.raises(UserError, match=message):
            train("bad", **settings)
        assert not tag_dir("bad").exists() or message.startswith("less")
        shutil.rmtree(tag_dir("bad"), ignore_errors=True)


def test_another_tokenizer_of_the_same_size_is_refused_with_both_hashes(train, tmp_path):
    tokenizers = [Tokenizer.train([text], 280) for text in ("cats sleep over there", "some dogs never run fast")]
    place = tmp_path / "tokenizer"
    tokenizers[0].save(place)
    train("swap", num_iterations=1, tokenizer=place)
    shutil.rmtree(place)
    tokenizers[1].save(place)
    with pytest.raises(UserError, match=f"has hash {tokenizers[1].hash}, .* trained with {tokenizers[0].hash}"):
        main(["--model_tag=swap", "--resume", "--num_iterations=2"])


def test_over_fitting_is_warned_about_once(capsys):
    """Red when the warning also comes while the training loss rises, or comes twice."""
    run = RunState(smooth_loss=3.0)
    run.note_val_bpb(1.5)
    for loss, bpb in ((3.1, 1.6), (2.9, 1.55), (2.5, 1.7), (2.0, 1.8)):
        assert run.overfit_warned == (loss < 2.5)
        run.smooth_loss = loss
        run.note_val_bpb(bpb)
    out = capsys.readouterr().out
    assert out.count("warning: val bpb rises") == 1
    assert "(1.5500 -> 1.7000)" in out


# ---------------------------------------------------------------------------------------------------------------------
# presets


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_trains_a_step(name, train, tiny_corpus, tmp_path):
    """cpu and audio in full shape, the others at depth 2: config.py as the wizard writes it, some flags over it."""
    config = tmp_path / "config.py"
    config.write_text(render_config(preset(name)))
    changes = dict(data=tiny_corpus, vocab_size=512, num_iterations=1, compile=False, eval_tokens=2048)
    if name == "audio":
        changes |= dict(data="synth", vocab_size=300, data_limit=40, clip_seconds=0.5, total_batch_size=1920)
    elif name != "cpu":
        changes |= dict(
            depth=2, max_seq_len=128, device_batch_size=2, total_batch_size=512, device_type="cpu", data_limit=None
        )
    result = main([str(config), *flags({**changes, "model_tag": f"preset-{name}"})])
    assert result["step"] == 1
    assert result["val_bpb"] > 0
    model, _, _ = cm.load_model("base", "cpu", "eval", f"preset-{name}")
    assert model.config.tie_weights
    assert (model.config.n_layer, model.config.n_embd) == (
        (preset(name).depth, preset(name).n_embd) if name in ("cpu", "audio") else (2, 128)
    )


# ---------------------------------------------------------------------------------------------------------------------
# several ranks


def test_three_ranks_train_as_one(train, base, tiny_corpus):
    """8 steps of 12 rows, float32 orthogonalisation: the one-rank losses to 1e-5, the same rows, shared out.

    Red when the call of REDUCE_SCATTER in optim.py is left out (each rank would follow its own gradient), when the
    loss is divided by one rank's targets, or when every rank reads the whole batch.
    """
    # Text with some variety: on the small corpus gradients become so poor in rank that rounding alone grows to 2e-5.
    shape = dict(
        data=tiny_corpus,
        num_iterations=8,
        max_seq_len=32,
        total_batch_size=384,
        device_batch_size=2,
        log_rows=True,
        muon_dtype="float32",
        **TIED,
        value_embeddings=True,
        smear=True,
    )
    train("ranks1", **shape)  # first: the ranks find data, tokenizer and tokens ready
    process = start(base, *flags({**TINY, **shape}), "--model_tag=ranks3", ranks=3)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 0, output
    assert "on 3 x cpu" in output
    assert output.count("parameters: ") == 1  # one rank speaks
    assert metrics("ranks3", "loss") == pytest.approx(metrics("ranks1", "loss"), rel=1e-5)
    assert metrics("ranks3", "val_bpb") == pytest.approx(metrics("ranks1", "val_bpb"), rel=1e-5)
    assert rows_of("ranks3", 3) == rows_of("ranks1", 1)
    assert [len(set(rows)) for rows in rows_of("ranks3", 3).values()] == [12] * 8  # disjoint shares
    # what three ranks saved, one continues as the one-rank run would
    for n in (1, 3):
        main([f"--model_tag=ranks{n}", "--resume", "--num_iterations=10"])
    assert metrics("ranks3", "loss") == pytest.approx(metrics("ranks1", "loss"), rel=1e-5)


def test_a_resume_judges_flags_together_with_the_run_and_not_with_the_defaults(tiny_corpus):
    """6 rows a micro-batch divide this run's 12 rows, not the default's 16; a config.py has no say.

    Red when from_command_line validates despite --resume, or when `changed` takes the values of config.py too.
    """
    flags = [
        f"--data={tiny_corpus}",
        "--vocab_size=300",
        "--depth=1",
        "--model_dim=32",
        "--head_dim=16",
        "--max_seq_len=32",
        "--total_batch_size=384",
        "--device_batch_size=12",
        "--compile=False",
        "--eval_tokens=256",
        "--model_tag=judge",
    ]
    base_train.main([*flags, "--num_iterations=2"])
    Path("other.py").write_text("depth = 3\nnum_iterations = 1\n", encoding="utf-8")
    line = ["other.py", "--model_tag=judge", "--resume", "--device_batch_size=6", "--num_iterations=3"]
    assert base_train.main(line)["step"] == 3
    assert base_train.main(["other.py", "--model_tag=judge", "--resume"])["step"] == 3

    # a checkpoint from before a setting existed: it was off, though the config.py at hand switches it on
    step = checkpoint_files.step_dir(tag_dir("judge"), 3)
    reseal_with(step, lambda state: state["settings"].pop("value_embeddings"))
    Path("modern.py").write_text("value_embeddings = True\n", encoding="utf-8")
    assert base_train.main(["modern.py", "--model_tag=judge", "--resume", "--num_iterations=4"])["step"] == 4


def test_the_logs_speed_is_tokens_over_the_time_of_training(train):
    """Every step's tok_per_sec and mfu, from the total time, the model's FLOPs and the machine's peak.

    Red when tok_per_sec is of a micro-batch, mfu leaves the peak out, or a resume counts the first part's time twice.
    """
    train("speed", num_iterations=3, save_every=2)
    main(["--model_tag=speed", "--resume", "--num_iterations=5"])
    lines = metrics("speed")
    state = json.loads((checkpoint_files.step_dir(tag_dir("speed"), 5) / "state.json").read_text())
    for line in lines:
        if "mfu" in line:
            expected = line["tok_per_sec"] * state["derived"]["flops_per_token"] / 1e12
            assert line["mfu"] == pytest.approx(expected, rel=1e-3)  # the log has five digits
    seconds = [768 / line["tok_per_sec"] for line in lines if "tok_per_sec" in line]
    assert len(seconds) == 5
    assert lines[-1]["train_seconds"] == pytest.approx(sum(seconds), rel=1e-3)
    assert state["run"]["train_seconds"] == pytest.approx(sum(seconds), rel=1e-3)
    assert {line["peak_flops"] for line in lines if "peak_flops" in line} == {1e12}


# ---------------------------------------------------------------------------------------------------------------------
# what is refused or said before the first step


@pytest.mark.parametrize("tensor", ["lm_head.weight", "transformer.h.0.attn.c_q.weight"])
def test_weights_that_are_not_finite_are_neither_resumed_nor_begun_with(train, tensor, capsys):
    """Red when restore() or init_from_checkpoint() does not call check_finite(): the run would end at once."""
    train("sound", num_iterations=2, overwrite=True)
    folder = checkpoint_files.step_dir(tag_dir("sound"), 2)
    state = load_file(folder / "model.safetensors")
    state[tensor][1, 2:4] = float("nan")
    save_file(state, folder / "model.safetensors")
    checkpoint_files.write_manifest(folder)
    size = state[tensor].numel()
    for words in (["--model_tag=sound", "--resume", "--num_iterations=4"], ["--init_from=sound", "--model_tag=new"]):
        with pytest.raises(
            UserError, match=rf"1 tensors are not finite, {tensor} the first \(2 of its {size:,} values"
        ):
            main([*words, "--device_type=cpu"] if "--resume" in words else [*words, *flags(TINY)])
    assert not (tag_dir("new") / "metrics.jsonl").exists()


def test_a_step_larger_than_the_data_says_how_often_a_row_comes(train, capsys):
    """9,839 tokens are 153 rows of 64. Red when warn_repeated_rows() is not called."""
    train("many", num_iterations=1, total_batch_size=64 * 306, device_batch_size=102)
    out = capsys.readouterr().out
    assert re.search(r"a step takes 306 rows and an epoch of \S+ has 153: each row comes 2.0 times in one step", out), (
        out
    )
    train("few", num_iterations=1)
    assert "times in one step" not in capsys.readouterr().out


def test_a_device_batch_size_beyond_any_batch_is_that_of_a_step(train):
    """Red when make_validation() takes device_batch_size rows: 477 GB of ids."""
    assert train("wide", num_iterations=1, device_batch_size=10**9)["val_bpb"] > 0


@pytest.mark.parametrize("length", [2, 3, 4])
def test_a_context_shorter_than_a_sample_trains(train, length, capsys):
    """Red when print_samples() asks for 48 tokens whatever the rotary table holds."""
    train(f"short{length}", max_seq_len=length, total_batch_size=12 * length, num_iterations=2)
    out = capsys.readouterr().out
    assert "sample: " in out
    assert "warning" not in out
