"""The suite's own surroundings, the set-up shared by the commands, the recipes, and the closing summary."""

import hashlib
import json
import os
import shutil
import socket
import subprocess
import urllib.request
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochat.checkpoint_files import step_dir, write_manifest
from nanochat.checkpoint_manager import checkpoints_dir
from nanochat.config.config_file import as_dict, read_config
from nanochat.config.preset_files import render_preset
from nanochat.config.presets import PRESETS, REASONS
from nanochat.config.settings import FIELDS, Settings, preset
from nanochat.system.environment import UserError, base_dir
from scripts import summary

ROOT = Path(__file__).resolve().parents[1]


def test_no_test_reaches_the_network():
    """Removing the `connect` line of conftest's no_network turns this red (with a network) or slow (without)."""
    with socket.socket() as sock, pytest.raises(OSError, match="tests are offline"):
        sock.connect(("192.0.2.1", 80))
    with pytest.raises(OSError, match="tests are offline"):
        urllib.request.urlopen("http://example.invalid/", timeout=1)
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket() as client:
        client.connect(server.getsockname())  # loopback works: process groups need it


@given(st.integers())
def test_hypothesis_repeats_itself(number):
    """Random cases are the same in every run: dropping derandomize=True from the profile turns this red."""
    from hypothesis import settings

    assert settings().derandomize
    assert settings().deadline is None


def test_base_dir_is_a_scratch_folder():
    """Dropping NANOCHAT_BASE_DIR from conftest turns this red: tests would write into the user's own cache."""
    assert "nanochat-tests-" in str(base_dir())
    assert base_dir() != Path.home() / ".cache" / "nanochat"


def test_tiny_corpus(tiny_corpus):
    files = sorted(tiny_corpus.rglob("*.py"))
    assert len(files) == 60
    assert sum(f.stat().st_size for f in files) > 200_000
    for file in files:
        compile(file.read_text(), str(file), "exec")


# ---------------------------------------------------------------------------------------------------------------------
# the shell side: a fake interpreter writes down what it is asked to do


FAKE_PYTHON = """#!/usr/bin/env bash
# Stands for Python: makes 'environments' that are copies of itself and logs every other call, one line each.
here=$(dirname "$0")
case "$*" in
    "--version") echo "Python 3.11.0" ;;
    -c*) ;;
    "-m pip --version") ;;
    "-m venv"*) for last; do :; done; rm -rf "$last"; mkdir -p "$last/bin"; cp "$0" "$last/bin/python" ;;
    "-m scripts.summary --plan"*) echo "plan" >>"$LOG"; head -n 1 "$PLANS"; sed -i 1d "$PLANS" ;;
    "-m scripts.summary --preset"*) cat "$PRESET" ;;
    *) printf '%s' "$1" >>"$LOG"; shift; printf ' [%s]' "$@" >>"$LOG"; echo >>"$LOG"; ! grep -qF -- "$2" "$FAIL" ;;
esac
"""


class Checkout:
    """A copy of the commands under a path with a space, with the fake interpreter; run() gives (rc, text)."""

    def __init__(self, folder: Path):
        self.folder, self.root = folder, folder / "my checkout"
        (self.root / "runs").mkdir(parents=True)
        (self.root / "tests").mkdir()
        for name in ("speedrun.sh", "runs/setup.sh", "tests/run.sh", "pyproject.toml", "constraints.txt"):
            shutil.copy(ROOT / name, self.root / name)
        self.python = folder / "fake python"
        self.python.write_text(FAKE_PYTHON)
        self.python.chmod(0o755)
        for name in ("LOG", "PLANS", "PRESET", "FAIL"):
            (folder / name).write_text("")

    def run(self, *command: str, **environment: str) -> tuple[int, str]:
        names = {name: str(self.folder / name) for name in ("LOG", "PLANS", "PRESET", "FAIL")}
        env = {**os.environ, "PYTHON": str(self.python), **names, **environment}
        done = subprocess.run(["bash", *command], cwd=self.folder, env=env, capture_output=True, text=True, timeout=60)
        return done.returncode, done.stdout + done.stderr

    def set_up(self, *extras: str, **environment: str) -> tuple[int, str]:
        return self.run("-c", 'source "$0" && set_up "$@"', str(self.root / "runs/setup.sh"), *extras, **environment)

    def calls(self) -> list[str]:
        """What was logged since the last look."""
        text = (self.folder / "LOG").read_text()
        (self.folder / "LOG").write_text("")
        return text.splitlines()


@pytest.fixture
def checkout(tmp_path) -> Checkout:
    return Checkout(tmp_path)


def test_set_up_happens_once(checkout):
    """Not writing the stamp turns this red; so does a stamp that leaves out the extras or the pins."""
    assert checkout.set_up()[0] == 0
    installs = checkout.calls()
    assert len(installs) == 2
    assert all("[-c] [" in line and "constraints.txt]" in line for line in installs)
    assert "[setuptools]" in installs[0]
    assert f"[-e] [{checkout.root}]" in installs[1]
    assert checkout.set_up() == (0, "")
    assert checkout.calls() == []
    assert checkout.set_up("dev")[0] == 0
    assert f"[-e] [{checkout.root}[dev]]" in checkout.calls()[1]
    assert checkout.set_up("dev") == (0, "")
    assert checkout.set_up() == (0, "")
    assert checkout.calls() == []
    with open(checkout.root / "constraints.txt", "a") as pins:
        pins.write("left-pad==1.0\n")
    assert checkout.set_up()[0] == 0
    assert len(checkout.calls()) == 2


def test_interrupted_set_up_starts_over(checkout):
    """Writing the stamp before the install, ignoring pip's exit code, or keeping what it left, turns this red."""
    (checkout.folder / "FAIL").write_text("install")
    rc, text = checkout.set_up()
    assert rc == 2
    assert "error: installing into .venv failed" in text
    assert len(checkout.calls()) == 1
    (checkout.folder / "FAIL").write_text("")
    half_written = checkout.root / ".venv" / "bin" / "half-written"
    half_written.touch()
    assert checkout.set_up()[0] == 0
    assert len(checkout.calls()) == 2
    assert not half_written.exists()
    half_written.touch()  # after a finished one the environment is brought up to date in place
    assert checkout.set_up("dev")[0] == 0
    assert half_written.exists()


def test_set_up_without_a_new_enough_python(checkout):
    """Dropping is_new_enough's test of the version turns this red."""
    checkout.python.write_text("#!/bin/sh\nexit 1\n")
    rc, text = checkout.set_up()
    assert rc == 2
    assert f"PYTHON={checkout.python} is not a Python of version 3.11 or newer" in text
    tools = checkout.folder / "tools"
    tools.mkdir()
    for tool in ("bash", "cat", "cksum", "dirname", "mkdir"):
        (tools / tool).symlink_to(shutil.which(tool))
    rc, text = checkout.set_up(PYTHON="", PATH=str(tools))
    assert rc == 2
    assert "error: no Python 3.11 or newer found" in text
    assert "set PYTHON" in text


def speedrun(checkout: Checkout, *arguments: str, plans: str, preset: str = "") -> tuple[int, str, list[str]]:
    (checkout.folder / "PLANS").write_text(plans)
    (checkout.folder / "PRESET").write_text(preset)
    checkout.set_up()
    checkout.calls()
    rc, text = checkout.run(str(checkout.root / "speedrun.sh"), *arguments)
    return rc, text, [line.removeprefix("-m ") for line in checkout.calls() if line != "plan"]


def test_speedrun_runs_every_stage_with_the_flags(checkout):
    """Dropping "$@" from any stage turns this red."""
    plans = "1 start new - no d4-tied\n1 nothing done 20 no d4-tied\n"
    rc, text, calls = speedrun(checkout, "--num_iterations=20", "--run=a b", plans=plans, preset="--preset cpu\n")
    flags = " [--num_iterations=20] [--run=a b]"
    assert rc == 0, text
    assert calls == [
        "[scripts.configure] [--defaults] [--preset] [cpu] [--output] [config.py]",
        f"[scripts.data]{flags}",
        f"[scripts.tok_train]{flags}",
        f"[scripts.base_train]{flags}",
        "[scripts.base_eval] [--model-tag] [d4-tied] [--step] [20]",
        f"[scripts.summary]{flags}",
    ]


def test_speedrun_resumes_and_passes_over_what_is_done(checkout):
    """Passing no --resume, or evaluating again, turns this red."""
    plans = "8 resume started 10 no d4 tied\n8 nothing done 20 yes d4 tied\n"
    rc, text, calls = speedrun(checkout, "my.py", plans=plans)
    launcher = (
        "[torch.distributed.run] [--standalone] [--nproc_per_node=8] [-m] [scripts.base_train] [my.py] [--resume]"
    )
    assert rc == 0
    assert launcher in calls
    assert "step 20 of d4 tied is already evaluated" in text
    assert not any("base_eval" in call or "configure" in call for call in calls)


def test_speedrun_does_not_touch_a_finished_run(checkout):
    """Calling base_train whatever the action turns this red."""
    rc, text, calls = speedrun(checkout, plans="1 nothing done 20 yes d4\n" * 2)
    assert rc == 0
    assert "nothing left to train: d4 is done at step 20" in text
    assert [call.split()[0] for call in calls] == ["[scripts.data]", "[scripts.tok_train]", "[scripts.summary]"]


@pytest.mark.parametrize("stage", ["scripts.data", "scripts.base_train"])
def test_speedrun_stops_at_a_failing_stage_and_says_how_to_go_on(checkout, stage):
    """Dropping `set -e`, or the EXIT trap, turns this red."""
    (checkout.folder / "FAIL").write_text("")
    plans = "1 start new - no d4\n1 resume started 10 no d4\n"
    checkout.python.write_text(FAKE_PYTHON.replace('! grep -qF -- "$2" "$FAIL"', f'[ "$1" != {stage} ]'))
    rc, text, calls = speedrun(checkout, "--run=a b", plans=plans)
    assert rc == 1
    assert calls[-1].startswith(f"[{stage}]")
    assert "same command goes on" in text
    assert r"speedrun.sh --run=a\ b" in text


def test_speedrun_leaves_a_mistake_at_one_line(checkout):
    """Exit code 2 comes with a line that says the way out: printing more below it turns this red."""
    checkout.python.write_text(FAKE_PYTHON.replace('cat "$PRESET"', 'echo "error: x" >&2; exit 2'))
    rc, text, calls = speedrun(checkout, "--deph=4", plans="")
    assert rc == 2
    assert text.endswith("error: x\n")
    assert calls == []


@pytest.mark.parametrize(
    ("state", "code", "line"),
    [
        ("preempted", 85, "training of d4 was preempted before its end, at step 10"),
        ("nonfinite", 3, "training of d4 was stopped by the non-finite guard"),
        ("started", 1, "training of d4 ended without saying why"),
    ],
)
def test_speedrun_does_not_evaluate_a_run_that_was_stopped(checkout, state, code, line):
    """torchrun ends with 0 after a stop: dropping the second look at the state, or one code for all, turns this red."""
    rc, text, calls = speedrun(checkout, plans=f"2 start new - no d4\n2 resume {state} 10 no d4\n")
    assert rc == code
    assert line in text
    assert "base_eval" not in calls[-1]


TRAINING = """    "-m scripts.base_train"*)
        trap 'echo saved >>"$LOG"; exit 85' TERM
        mkdir -p "$NANOCHAT_BASE_DIR/base_checkpoints/d4"
        echo line >>"$NANOCHAT_BASE_DIR/base_checkpoints/d4/metrics.jsonl"
        kill -SIGNAL "$PPID"
        for _ in $(seq 200); do sleep 0.05; done ;;
    -c*) ;;"""


@pytest.mark.parametrize("name", ["INT", "TERM", "HUP", "USR1"])
def test_speedrun_passes_a_signal_on_to_the_training_and_waits_for_its_save(checkout, name, tmp_path):
    """Red when the training runs in the foreground: bash would wait until it ends, or die and leave it behind."""
    checkout.python.write_text(FAKE_PYTHON.replace("    -c*) ;;", TRAINING.replace("SIGNAL", name), 1))
    (checkout.folder / "PLANS").write_text("1 start new - no d4\n1 resume preempted 10 no d4\n")
    checkout.set_up()
    checkout.calls()
    rc, text = checkout.run(str(checkout.root / "speedrun.sh"), NANOCHAT_BASE_DIR=str(tmp_path / "base"))
    assert checkout.calls()[-2:] == ["saved", "plan"]
    assert rc == 85
    assert "was preempted before its end, at step 10" in text


@pytest.mark.parametrize("state", ["preempted", "nonfinite"])
def test_speedrun_does_not_take_an_old_stop_for_the_end_of_a_start_that_failed(checkout, state):
    """A scheduler would queue it again for ever. Red when the state counts though metrics.jsonl is as it was."""
    failing = '    "-m scripts.base_train"*) exit 1 ;;\n    -c*) ;;'
    checkout.python.write_text(FAKE_PYTHON.replace("    -c*) ;;", failing, 1))
    rc, text, _ = speedrun(checkout, plans=f"1 resume {state} 10 no d4\n1 resume {state} 10 no d4\n")
    assert rc == 1
    assert "stopped in stage: training (exit code 1)" in text


# ---------------------------------------------------------------------------------------------------------------------
# recipes


@pytest.mark.parametrize("name", PRESETS)
def test_recipe_is_its_preset(name):
    """Changing a preset without `python -m nanochat.config.preset_files` turns this red."""
    path = ROOT / "runs" / f"{name}.py"
    assert path.read_text() == render_preset(name)
    assert Settings(**read_config(path)) == preset(name)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_hold_only_what_differs_from_the_defaults(name):
    """Each line with its reason. Red when a preset repeats a default."""
    given = PRESETS[name]
    assert not [key for key, value in given.items() if value == FIELDS[key].default]
    assert all(reason.strip() for _, reason in REASONS[name].values())


def test_shell_scripts_parse():
    for path in (
        "speedrun.sh",
        ".ci/run",
        "tests/run.sh",
        *(f"runs/{n}.sh" for n in ("setup", "nodes", "audio_demo", "asterisk", "llama_musicgen")),
    ):
        subprocess.run(["bash", "-n", ROOT / path], check=True)


def test_pins_fit_any_machine():
    """A +cpu suffix or an nvidia line (what `pip freeze` gives on one machine) turns this red, and so would a range."""
    pins = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert "torch==2.13.0" in pins
    assert any(pin.startswith("setuptools==") for pin in pins)
    for pin in pins:
        name, version = pin.split("==")
        assert "+" not in version
        assert not name.startswith(("nvidia", "triton", "cuda", "nanochat"))


# ---------------------------------------------------------------------------------------------------------------------
# the closing summary


EVALUATION = {
    "model_file_sha256": hashlib.sha256(b"weights").hexdigest(),
    "bpb": {"train": 1.2, "val": 1.345, "val_bytes": 890_000, "xz": 1.643, "xz_primed": 1.3},
    "offline": {
        "score": 0.1234,
        "tasks": {
            "better": {"accuracy": 0.5, "chance": 0.25, "char_5gram": 0.4, "word_overlap": 0.3, "items": 400},
            "worse": {"accuracy": 0.35, "chance": 0.25, "char_5gram": 0.4, "word_overlap": 0.5, "items": 400},
        },
    },
    "samples": [{"prompt": "def add(", "text": "a, b):\n    return a"}, {"prompt": "", "text": "import\x1b[2J os"}],
}


@pytest.fixture
def run_folder(tmp_path, monkeypatch):
    """A finished run of tag t: step 20 sealed, metrics with an event, evaluation written by the caller."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    folder = checkpoints_dir() / "t"
    step = step_dir(folder, 20)
    step.mkdir(parents=True)
    (step / "model.safetensors").write_bytes(b"weights")
    state = {"derived": {"parameters": {"total": 1234567}}, "run": {"train_seconds": 61.5}}
    state["settings"] = as_dict(Settings(model_tag="t", num_iterations=20))
    (step / "state.json").write_text(json.dumps(state))
    write_manifest(step)
    events(folder, "start", "eval", "done")
    return folder


def events(folder: Path, *names: str, torn: str = "") -> None:
    lines = [json.dumps({"step": n, "tokens": 4096 * n, "event": name}) + "\n" for n, name in enumerate(names)]
    (folder / "metrics.jsonl").write_text("".join(lines) + torn)


def evaluate(results: dict | str) -> Path:
    path = base_dir() / "base_eval" / "t_000020.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(results if isinstance(results, str) else json.dumps(results))
    return path


def test_state_of_a_run(run_folder):
    """Taking any "done" line instead of the last turn, or a damaged step for a whole one, turns this red."""
    assert (summary.find_run("t").state, summary.find_run("t").step) == ("done", 20)
    events(run_folder, "start", "done", "resume", "eval")  # a longer horizon was begun
    assert summary.find_run("t").state == "started"
    for stop in ("preempted", "nonfinite"):
        events(run_folder, "start", stop)
        assert summary.find_run("t").state == stop
    events(run_folder, "start", "nonfinite", "resume")
    assert summary.find_run("t").state == "started"
    events(run_folder, "start", "done", torn='{"step": 21, "eve')
    assert summary.find_run("t").state == "done"
    assert summary.find_run("absent").state == "new"
    (step_dir(run_folder, 20) / "model.safetensors").write_bytes(b"weight_")
    assert (summary.find_run("t").state, summary.find_run("t").step) == ("started", None)


@pytest.mark.parametrize("results", ["", "{", "[]", {}, {"bpb": {}, "samples": []}, {"bpb": {}, "offline": {}}])
def test_incomplete_evaluation_is_repeated(run_folder, results):
    """Taking the file's existence for a complete evaluation turns this red."""
    evaluate(results)
    assert summary.find_run("t").evaluation is None


def test_evaluation_of_other_weights_is_repeated(run_folder):
    """A model trained anew under the same tag and step: dropping the comparison of hashes turns this red."""
    evaluate(EVALUATION)
    assert summary.find_run("t").evaluation == EVALUATION
    evaluate({**EVALUATION, "model_file_sha256": hashlib.sha256(b"others").hexdigest()})
    assert summary.find_run("t").evaluation is None


def test_action(run_folder):
    """Returning "nothing" for every run that is done turns this red: a longer horizon would be ignored."""
    run = summary.find_run("t")
    same = Settings(model_tag="t", num_iterations=20)
    assert summary.choose_action(run, same, {"num_iterations", "adam_betas"}) == "nothing"
    assert summary.choose_action(run, replace(same, num_iterations=30), {"num_iterations"}) == "resume"
    assert (
        summary.choose_action(run, replace(same, num_iterations=30), {"depth"}) == "nothing"
    )  # a default was not asked for
    assert summary.choose_action(run, replace(same, overwrite=True), {"overwrite"}) == "start"
    for last in ("preempted", "nonfinite", "eval"):
        events(run_folder, "start", last)
        assert summary.choose_action(summary.find_run("t"), same, {}) == "resume"
    assert summary.choose_action(summary.find_run("other"), same, {}) == "start"


def test_plan_line(run_folder, capsys):
    """The line that speedrun.sh reads; what is said about damaged steps must not get into it."""
    assert summary.format_plan(Settings(model_tag="t")) == "1 nothing done 20 no t"
    evaluate(EVALUATION)
    (run_folder / "step_000030").mkdir()
    summary.main(["--model_tag=t", "--plan"])
    said = capsys.readouterr()
    assert said.out == "1 nothing done 20 yes t\n"
    assert "step_000030" in said.err
    assert summary.format_plan(Settings(model_tag="other")) == "1 start new - no other"


def test_wizard_arguments(monkeypatch, tmp_path, capsys):
    """Replacing a source that the user named, or asking the hub for a CPU preset, turns this red.

    So does taking the folder of a cut download for the shards that the preset wants.
    """
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(summary, "pick_device_type", lambda name: name or "cuda")
    assert summary.choose_wizard_arguments(Settings(device_type="cpu"), False, 0) == "--preset cpu"
    assert (
        summary.choose_wizard_arguments(Settings(), False, 1) == "--preset gpu1 --set data=packages"
    )  # tests are offline
    assert summary.choose_wizard_arguments(Settings(data="climbmix"), True, 8) == "--preset 8xh100"
    folder = tmp_path / "data" / "climbmix"
    folder.mkdir(parents=True)
    entries = [{"name": f"shard_{number:05d}.parquet"} for number in (*range(24), 6542)]  # as gpu1 wants them
    for count in (3, len(entries)):
        for entry in entries:  # files that the manifest does not record do not count
            (folder / entry["name"]).touch()
        (folder / "manifest.json").write_text(json.dumps({"files": entries[:count]}))
        capsys.readouterr()
        whole = count == len(entries)
        assert summary.choose_wizard_arguments(Settings(), False, 1) == "--preset gpu1" + " --set data=packages" * (
            not whole
        )
        assert ("climbmix is not here and" in capsys.readouterr().err) != whole
    assert summary.choose_wizard_arguments(Settings(), False, 8).endswith("data=packages")  # 240 shards
    monkeypatch.setattr("nanochat.data.hub.probe", lambda what: None)
    assert summary.choose_wizard_arguments(Settings(), False, 8) == "--preset 8xh100"


def test_preset_is_asked_for_only_without_a_config(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    summary.main(["--preset", "--device_type=cpu"])
    assert capsys.readouterr().out == "--preset cpu\n"
    (tmp_path / "config.py").write_text("depth = 2\n")
    summary.main(["--preset", "--device_type=cpu"])
    assert capsys.readouterr() == ("", "using config.py as it is\n")


def test_summary_tells_the_files(run_folder, capsys):
    """Every figure comes from the files: swapping val and train, or the verdicts, turns this red."""
    path = evaluate(EVALUATION)
    summary.main(["--model_tag=t"])
    text = capsys.readouterr().out
    for fact in (
        str(step_dir(run_folder, 20)),
        "1,234,567 parameters, 20 steps, 8,192 tokens, 62 s",
        "val bpb     1.3450   train 1.2000",
        "1.6430 is xz -9e: the model is better",
        "1.3000 is xz -9e primed with the training split: the model is not better",
        "0.1234",
        "of 2 tasks it exceeds chance in 2, 5-gram in 1, overlap in 1",
        "| def add(a, b):",
        r"| import\x1b[2J os",
        str(path),
        "--resume --num_iterations=40",
    ):
        assert fact in text, fact
    assert "CORE" not in text


def test_summary_without_a_run_or_an_evaluation(run_folder, capsys):
    summary.main(["--model_tag=t"])
    assert "none yet for step 20" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"no checkpoint in .*absent.*base_train"):
        summary.main(["--model_tag=absent"])
