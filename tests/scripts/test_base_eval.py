"""base_eval from a checkpoint on disk to table, CSV and JSON, on a tiny model over a generated corpus."""

import csv
import dataclasses
import errno
import json
import math
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch

import scripts.base_eval as base_eval
from nanochat import runtime
from nanochat.checkpoint_files import step_dir, weights_hash, write_manifest
from nanochat.checkpoint_manager import checkpoints_dir, load_checkpoint, load_model, save_checkpoint
from nanochat.config.settings import Settings
from nanochat.data_pipeline import find_or_train, prepare_for
from nanochat.evaluation import offline as offline_eval
from nanochat.evaluation import report, suite
from nanochat.evaluation.core_bundle import Task, write_bundle
from nanochat.gpt import GPT, GPTConfig
from nanochat.runtime import run_script
from nanochat.system.environment import UserError, base_dir
from tests.forked import Forked


@pytest.fixture(scope="module")
def home(tmp_path_factory, tiny_corpus):
    """A base folder with two checkpoints of a tiny untrained model: tiny at steps 3 and 5."""
    folder = tmp_path_factory.mktemp("base_eval")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(folder))
        patch.setenv("NANOCHAT_EVAL_BUNDLE_URL", "http://127.0.0.1:9/eval_bundle.zip")
        settings = Settings(
            data=str(tiny_corpus),
            vocab_size=300,
            depth=1,
            model_dim=32,
            head_dim=16,
            max_seq_len=128,
            tie_weights=True,
            device_batch_size=8,
            dtype="float32",
            eval_tokens=1000,
        )
        dataset = prepare_for(settings)
        tokenizer = find_or_train(settings, dataset)
        torch.manual_seed(0)
        model = GPT(GPTConfig.from_settings(settings, tokenizer.vocab_size))
        model.init_weights()
        metadata = {
            "settings": dataclasses.asdict(settings),
            "model_config": dataclasses.asdict(model.config),
            "derived": {},
            "tokenizer_hash": tokenizer.hash,
            "data_fingerprint": dataset.fingerprint,
        }
        for step in (3, 5):
            save_checkpoint(checkpoints_dir() / "tiny", step, model.state_dict(), None, metadata, tokenizer=tokenizer)
        yield folder


@pytest.fixture
def fresh(home):
    """The base folder without results; extra checkpoints are removed afterwards."""
    shutil.rmtree(home / "base_eval", ignore_errors=True)
    yield home
    for path in checkpoints_dir().iterdir():
        if path.name != "tiny":
            shutil.rmtree(path)


def edited(name: str, **changes) -> Path:
    """A copy of step 5 under another tag, its state.json changed (None removes a key), with a manifest that holds."""
    folder = step_dir(checkpoints_dir() / name, 5)
    shutil.copytree(step_dir(checkpoints_dir() / "tiny", 5), folder)
    state = json.loads((folder / "state.json").read_text()) | changes
    (folder / "state.json").write_text(json.dumps({k: v for k, v in state.items() if v is not None}))
    write_manifest(folder)
    return folder


def test_everything_at_once(fresh, capsys):
    """bpb, offline and samples of the newest step: the numbers on the screen are those in JSON and CSV."""
    result = base_eval.main(["--max-per-task", "8", "--device-type", "cpu"])
    path = fresh / "base_eval" / "tiny_000005.json"
    assert json.loads(path.read_text()) == result
    assert result.keys() >= {"model_tag", "step", "data_fingerprint", "bpb", "offline", "samples"}
    assert "core" not in result
    assert (result["model_tag"], result["step"]) == ("tiny", 5)
    dataset = prepare_for(Settings(data=load_settings()["data"]))
    assert result["bpb"]["val_bytes"] == dataset.text_bytes("val")
    # An untied, untrained model would be near log2(300) bits a token; a tied one starts close to it as well.
    assert 0 < result["bpb"]["xz_primed"] < result["bpb"]["xz"] < result["bpb"]["val"] < 8
    tokenizer = load_model("base", "cpu", "eval", "tiny", 5)[1]
    ids = [i for _, text in dataset.documents("train") for i in tokenizer.encode(text, bos=True)][1:1001]  # eval_tokens
    assert result["bpb"]["train_bytes"] == tokenizer.token_bytes[ids].sum()
    for task in result["offline"]["tasks"].values():
        assert task["items"] == 8
        assert {"char_5gram", "word_overlap", "chance"} <= task.keys()
    assert [bool(sample["prompt"]) for sample in result["samples"]][-2:] == [False, False]
    assert any(sample["prompt"].startswith('"""Tools to') for sample in result["samples"])
    shown = capsys.readouterr().out
    assert f"{result['bpb']['val']:.4f}" in shown
    assert "\x1b" not in shown
    assert not re.search(r"\bCORE\b(?!\))", shown)  # only in "(not comparable with CORE)"
    lines = list(csv.DictReader(path.with_suffix(".csv").open()))
    assert {line["label"]: float(line["value"]) for line in lines if line["part"] == "bpb"} == {
        key: result["bpb"][key] for key in ("train", "val", "xz", "xz_primed")
    }
    tasks = {line["label"]: line for line in lines if line["part"] == "offline"}
    assert float(tasks["mean"]["value"]) == result["offline"]["score"]
    for label, task in result["offline"]["tasks"].items():
        assert float(tasks[label]["value"]) == task["accuracy"]
        assert float(tasks[label]["word_overlap"]) == task["word_overlap"]


def load_settings() -> dict:
    return load_checkpoint(checkpoints_dir() / "tiny", 5)[2]["settings"]


def test_results_of_the_same_weights_are_kept(fresh):
    """A later --eval sample adds to the file; other weights or other data start over. Red without the comparison."""
    base_eval.main(["--eval", "bpb"])
    assert {"bpb", "samples"} <= base_eval.main(["--eval", "sample"]).keys()
    path = fresh / "base_eval" / "tiny_000005.json"
    state = load_checkpoint(checkpoints_dir() / "tiny", 5)[0]
    assert json.loads(path.read_text())["weights_hash"] == weights_hash(state)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_file_sha256": "of another run"}))
    assert "bpb" not in base_eval.main(["--eval", "sample"])
    path.write_text("{")
    assert "bpb" not in base_eval.main(["--eval", "sample"])


def test_core_from_a_named_bundle(fresh, tmp_path, capsys):
    items = [{"query": f"def f{n}(", "choices": ["x", "yy", "zzz"], "gold": n % 3} for n in range(9)]
    write_bundle([Task("pick", "multiple_choice", items, 2, "", 1 / 3)], tmp_path / "bundle")
    result = base_eval.main(["--eval=core", f"--bundle={tmp_path / 'bundle'}", "--step=3"])
    assert result["core"]["tasks"]["pick"]["items"] == 9
    assert "offline" not in result
    assert (fresh / "base_eval" / "tiny_000003.json").is_file()
    assert "holds 1 tasks, the official CORE 22" in capsys.readouterr().out


def test_core_without_network_becomes_offline(fresh, capsys):
    """One line with the reason, then OFFLINE under its own name. Red when the fallback keeps the key `core`."""
    result = base_eval.main(["--eval", "core", "--max-per-task", "4"])
    assert "core" not in result
    assert result["offline"]["tasks"]
    said = [line for line in capsys.readouterr().out.splitlines() if "CORE bundle not available" in line]
    assert len(said) == 1
    assert said[0].endswith("scoring the OFFLINE suite instead (not comparable with CORE)")


def test_the_suite_during_training(fresh, capsys):
    """CORE when the bundle lies in the base folder, else OFFLINE, and never a download. Red with download=True."""
    model, tokenizer, _ = load_model("base", "cpu", "train", "tiny", 5)
    dataset = prepare_for(Settings(data=load_settings()["data"]))
    found = suite.evaluate_suite(model, tokenizer, dataset, 8)
    assert found == {"offline": base_eval.main(["--eval", "offline", "--max-per-task", "8"])["offline"]["score"]}
    assert "not available" not in capsys.readouterr().out
    assert model.training
    items = [{"context": "a", "continuation": ""}] * 2
    write_bundle([Task("never", "language_modeling", items)], fresh / "eval_bundle")
    assert suite.evaluate_suite(model, tokenizer, dataset) == {"core": 0.0}
    shutil.rmtree(fresh / "eval_bundle")


def test_items_of_the_suite_are_made_once(fresh, tmp_path, monkeypatch):
    """On rank 0 alone, for all evaluations of a dataset; the score is the same to the bit. Other data has other items.

    Red when cached_tasks() builds every time, or forgets the fingerprint.
    """
    model, tokenizer, _ = load_model("base", "cpu", "eval", "tiny", 5)
    dataset = prepare_for(Settings(data=load_settings()["data"]))
    built, build = [], offline_eval.build_tasks
    monkeypatch.setattr(suite, "build_tasks", lambda data: built.append(data.name) or build(data))
    monkeypatch.setattr(offline_eval, "_task_cache", {})
    first = suite.evaluate_suite(model, tokenizer, dataset, 8)
    assert suite.evaluate_suite(model, tokenizer, dataset, 8) == first
    assert built == [dataset.name]
    wanted = base_eval.evaluate_offline(model, tokenizer, dataset, max_per_task=8, baselines=False)["score"]
    assert first == {"offline": wanted}
    other = dataclasses.replace(
        dataset, manifest=dataset.manifest | {"fingerprint": dataset.fingerprint | {"sha256": "0" * 64}}
    )
    suite.evaluate_suite(model, tokenizer, other, 8)
    assert len(built) == 2
    assert list(offline_eval._task_cache) == ["0" * 64]
    monkeypatch.setattr(runtime.dist, "broadcast_object_list", lambda box, src, device: box.__setitem__(0, ["its"]))
    assert runtime.from_rank0(lambda: built.append("here"), 1, 2, model.device) == ["its"]
    assert len(built) == 2


def test_control_characters_do_not_reach_the_terminal():
    assert report.printable("a\x1b[2J\tb\n\x00é\x9b") == "a\\x1b[2J\tb\n\\x00é\\x9b"


def test_other_data_is_warned_about(fresh, tmp_path, capsys):
    """Evaluated on another folder: fingerprints differ, both are named, and the result carries the new one."""
    for n in range(40):
        (tmp_path / f"{n}.txt").write_text(f"line {n} of the other corpus\n" * 30)
    result = base_eval.main(["--eval", "bpb", "--data", str(tmp_path)])
    trained = load_checkpoint(checkpoints_dir() / "tiny", 5)[2]["data_fingerprint"]
    said = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: trained on"))
    other = result["data_fingerprint"]["sha256"][:8]
    assert trained["sha256"][:8] in said
    assert other in said
    assert [path.name for path in (fresh / "base_eval").glob("*.json")] == [f"tiny_000005_{other}.json"]


def test_metadata_with_keys_removed(fresh, capsys):
    """An old checkpoint without fingerprint, hash or some settings still evaluates, and says what it cannot know."""
    kept = {key: value for key, value in load_settings().items() if key in ("data", "eval_tokens")}
    edited("old", settings=kept | {"from_the_future": 1}, data_fingerprint=None, tokenizer_hash=None, derived=None)
    result = base_eval.main(["--model-tag", "old", "--eval", "bpb,sample"])
    again = base_eval.main(["--model-tag", "tiny", "--eval", "bpb"])
    assert result["bpb"]["val"] == pytest.approx(again["bpb"]["val"], rel=1e-2)  # the dtype is the machine's choice
    assert "unknown" in capsys.readouterr().out


def test_a_checkpoint_without_tokenizer_uses_its_settings(fresh, capsys):
    folder = edited("bare")
    shutil.rmtree(folder / "tokenizer")
    write_manifest(folder)
    result = base_eval.main(["--model-tag", "bare", "--eval", "bpb"])
    assert result["bpb"]["val"] == base_eval.main(["--model-tag", "tiny", "--eval", "bpb"])["bpb"]["val"]
    assert "holds no tokenizer" in capsys.readouterr().out


def test_a_foreign_tokenizer_is_refused_with_both_hashes(fresh):
    folder = edited("foreign", tokenizer_hash="0" * 64)
    mine = load_checkpoint(checkpoints_dir() / "tiny", 5)[2]["tokenizer_hash"]
    with pytest.raises(UserError, match=f"{mine}.*{'0' * 64}"):
        base_eval.main(["--model-tag", "foreign"])
    shutil.rmtree(folder / "tokenizer")
    write_manifest(folder)
    with pytest.raises(UserError, match=f"{mine}.*{'0' * 64}"):
        base_eval.main(["--model-tag", "foreign"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model-tag", "nobody"], r"nobody.*tags there: .*tiny"),
        (["--step", "4"], r"step 4.*3, 5"),
        (["--eval", "cor"], r"unknown part 'cor', did you mean 'core'"),
        (["--eval", ""], "unknown part ''"),
        (["--max-per-task", "0"], "at least 1"),
        (["--max-per-task", "-1"], "at least 1"),
        (["--device-batch-size", "many"], "at least 1"),
        (["--device-type", "tpu"], "tpu"),
        (["--model", "tiny"], "--model"),
        (["stray"], "stray"),
        (["--eval", "core", "--bundle", "/nowhere"], "no CORE bundle there"),
        (["--data", "/nowhere"], "/nowhere"),
    ],
)
def test_mistakes_are_one_line(fresh, arguments, message):
    with pytest.raises(UserError, match=message) as caught:
        base_eval.main(arguments)
    assert "\n" not in str(caught.value)
    assert not list(fresh.glob("base_eval/*"))


def test_no_checkpoint_at_all(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "empty"))
    with pytest.raises(UserError, match=r"no checkpoint in .*scripts\.base_train"):
        base_eval.main([])


def test_flags_in_either_spelling():
    parsed = base_eval.parse(["--model_tag=a_b", "--max_per_task", "7", "--eval=sample, bpb"])
    assert (parsed.model_tag, parsed.max_per_task, parsed.eval) == ("a_b", 7, ("bpb", "sample"))


def test_two_ranks_give_the_numbers_of_one(fresh):
    """torchrun with 2 ranks: the same bpb to 1e-6 and the same suite; rank 0 alone writes. Red without all_reduce."""
    one = base_eval.main(["--eval", "bpb,offline,sample", "--max-per-task", "6"])
    (fresh / "base_eval" / "tiny_000005.json").unlink()
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        "-m",
        "scripts.base_eval",
    ]
    words = ["--eval", "bpb,offline,sample", "--max-per-task", "6", "--device-type", "cpu"]
    run = Forked([*command, *words], env=os.environ | {"OMP_NUM_THREADS": "1"})
    printed, _ = run.communicate(timeout=300)
    assert run.returncode == 0, printed
    assert printed.count("bits per byte") == 1
    two = json.loads((base_dir() / "base_eval" / "tiny_000005.json").read_text())
    for split in ("train", "val"):
        assert two["bpb"][split] == pytest.approx(one["bpb"][split], rel=1e-6)
        assert two["bpb"][f"{split}_bytes"] == one["bpb"][f"{split}_bytes"]
    for label, task in one["offline"]["tasks"].items():
        assert two["offline"]["tasks"][label]["accuracy"] == task["accuracy"]


def test_a_baseline_is_exceeded_by_more_than_chance_only():
    """0.30 of 400 is within 1.96 standard errors (0.0449) of 0.26 and not of 0.25."""
    task = {"accuracy": 0.30, "items": 400, "chance": 0.25, "char_5gram": 0.26, "word_overlap": None}
    assert report.find_exceeded_baselines(task) == ["chance"]


def test_the_command_ends_with_2_and_one_line(fresh):
    run = Forked([sys.executable, "-m", "scripts.base_eval", "--model-tag", "nobody"])
    printed, _ = run.communicate(timeout=120)
    assert run.returncode == 2
    assert printed.startswith("error: ")
    assert printed.count("\n") == 1


def test_what_is_measured_is_on_disk_before_the_next_part(fresh, tmp_path, monkeypatch, capsys):
    """A part that fails costs no other. Red when the results are written at the end alone."""

    def broken(*_):
        written = json.loads((tmp_path / "o" / "tiny_000005.json").read_text())
        assert written["bpb"]["xz"] > 0
        assert written["offline"]["tasks"]
        raise RuntimeError("probability tensor contains inf, nan")

    monkeypatch.setattr(base_eval, "draw_samples", broken)
    with pytest.raises(RuntimeError, match="probability tensor"):
        base_eval.main(["--out", str(tmp_path / "o"), "--eval", "bpb,offline,sample", "--max-per-task", "2"])
    out = capsys.readouterr().out
    assert "bits per byte" in out
    assert "OFFLINE suite" in out
    assert f"written: {tmp_path / 'o' / 'tiny_000005.json'}" in out
    assert not (fresh / "base_eval").exists()


def test_a_disk_that_fails_later_costs_no_figure(fresh, monkeypatch, capsys):
    """They are printed, and the error comes last. Red when Results.add() raises it, or show() waits for the disk."""

    def full(path, text):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(report, "write_atomically", full)
    with pytest.raises(SystemExit) as ended:
        run_script(lambda: base_eval.main(["--eval", "bpb,sample"]))
    said = capsys.readouterr()
    assert ended.value.code == 2
    assert said.err.count("\n") == 1
    assert "No space left on device" in said.err
    for title in ("bits per byte", "xz -9e of val", "unconditional"):
        assert title in said.out
    assert "written:" not in said.out


@pytest.mark.parametrize(
    ("out", "reason"),
    [
        ("FILE/below", "Not a directory"),
        ("/proc/nowhere", "cannot be written"),
        ("folder.json", "is a folder"),
        ("x" * 240 + ".json", "File name too long"),
        ("/dev/null/x.json", "/dev/null is no folder"),
        ("pipe.json", "a pipe"),
    ],
)
def test_an_output_that_cannot_be_written_is_refused_before_the_work(out, reason, fresh, tmp_path, monkeypatch):
    """Red when main() does not call check_output(): minutes of work, and then the error alone."""
    (tmp_path / "FILE").touch()
    (tmp_path / "folder.json").mkdir()
    os.mkfifo(tmp_path / "pipe.json")
    monkeypatch.setattr(base_eval, "evaluate", None)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"--out=.*{reason}"):
        base_eval.main(["--out", out, "--eval", "bpb"])


def test_results_go_where_out_says(fresh, tmp_path):
    """A folder, or a file. Red when results_path() ignores it."""
    base_eval.main(["--out", str(tmp_path / "mine.json"), "--eval", "sample"])
    assert {"samples", "model_tag"} <= json.loads((tmp_path / "mine.json").read_text()).keys()
    assert (tmp_path / "mine.csv").is_file()
    assert not (fresh / "base_eval").exists()


def test_a_model_with_nan_weights_keeps_its_figures(home, tmp_path, capsys):
    """bpb is measured, the samples are a message; the file is JSON, which has no NaN. Red when save() writes one, when
    a second call loses what it read, and when draw_samples() passes its UserError.
    """
    state, _, metadata = load_checkpoint(checkpoints_dir() / "tiny", 5)
    state["transformer.wte.weight"][:] = float("nan")
    tokenizer = load_model("base", "cpu", "eval", "tiny", 5)[1]
    save_checkpoint(checkpoints_dir() / "broken", 1, state, None, metadata, tokenizer=tokenizer)
    result = base_eval.main(["--model-tag", "broken", "--eval", "bpb,sample", "--device-type", "cpu"])
    assert "samples" not in result
    path = base_dir() / "base_eval" / "broken_000001.json"
    written = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert written["bpb"]["val"] is None
    assert sorted(written["non_finite"]) == ["bpb.train", "bpb.val"]
    again = report.save({"samples": []} | {key: value for key, value in written.items() if key != "bpb"}, path)
    assert math.isnan(again["bpb"]["val"])
    out = capsys.readouterr().out
    assert "warning: 1 tensors are not finite, transformer.wte.weight the first" in out
    assert "no samples: nothing can be generated" in out
    assert "bits per byte" in out


def test_a_base_folder_that_cannot_be_written_is_told_with_the_flag_that_helps(fresh, monkeypatch):
    """Red when the message sends the user to another base folder, where the model is not."""

    def read_only(path, data):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr(base_eval, "evaluate", None)
    monkeypatch.setattr(Path, "write_bytes", read_only)
    with pytest.raises(UserError, match=r"base_eval/.*\.json cannot be written .*: give --out FOLDER"):
        base_eval.main(["--eval", "bpb"])
