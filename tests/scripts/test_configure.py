"""The wizard: in process with answers on standard input, and in a real terminal."""

import io
import os
import sys
import termios
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import pexpect
import pytest
import torch
from pexpect.fdpexpect import fdspawn

from nanochat.config.config_file import read_config, render_config
from nanochat.config.declaration import nearest_divisor
from nanochat.config.presets import PRESETS
from nanochat.config.settings import FIELDS, Settings, preset
from nanochat.system.environment import UserError
from nanochat.training.estimate import Hardware
from scripts import configure
from scripts.stress import dialogues as check_dialogues
from tests.forked import Forked

ROOT = Path(__file__).resolve().parents[2]
CPU = Hardware("cpu", "a processor", 1, 16 << 30, 1e11, torch.float32)


@pytest.fixture(autouse=True)
def stubbed(tmp_path, monkeypatch):
    """No probe of the hardware, and a folder of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(configure, "find_hardware", lambda device_type=None: CPU)
    monkeypatch.setattr(configure, "measure", lambda settings, hardware: 1e10)
    return tmp_path


def wizard(answers: list[str] | dict[str, list[str]], *argv: str) -> SimpleNamespace:
    """Run main() on piped answers, in order or by question: its result (or UserError), and what it printed."""
    out, stdin = io.StringIO(), sys.stdin
    sys.stdin = (
        Prompted(answers) if isinstance(answers, dict) else io.StringIO("".join(f"{answer}\n" for answer in answers))
    )
    result, error = None, None
    try:
        with redirect_stdout(out), redirect_stderr(out):
            result = configure.main(list(argv))
    except UserError as caught:
        error = str(caught)
    finally:
        sys.stdin = stdin
    return SimpleNamespace(result=result, error=error, text=out.getvalue())


ENTERS = [""] * 60


def after(*answers: str) -> list[str]:
    """These answers, then Enter to the end: 'write config.py? [yes]' included."""
    return [*answers, *ENTERS]


# ---------------------------------------------------------------------------------------------------------------------
# without questions


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_s_config_round_trips(name):
    """Red when render_config and read_config disagree, or --preset is ignored."""
    run = wizard([], "--defaults", "--preset", name)
    assert run.result == preset(name) == Settings(**read_config("config.py"))
    # Red with a bare `python` or `torchrun`: neither is on PATH without an activated environment.
    assert f"  {sys.executable} -m scripts.base_train config.py\n" in run.text
    launcher = (
        f"  {sys.executable} -m torch.distributed.run \\\n    --standalone --nproc_per_node=1 -m scripts.base_train"
    )
    assert launcher in run.text
    assert f"NANOCHAT_BASE_DIR=FOLDER \\\n    bash {ROOT / 'runs' / 'nodes.sh'} config.py" in run.text


def test_defaults_take_the_preset_of_the_hardware_and_set_wins():
    assert wizard([], "--defaults", "--set", "depth=6", "--set", "grad-clip=None").result == preset(
        "cpu", depth=6, grad_clip=None
    )


def test_defaults_never_overwrite_unasked():
    """Red when the `args.force` branch of _write is dropped: the file would be replaced."""
    Path("config.py").write_text("depth = 3\n")
    run = wizard([], "--defaults", "--set", "seed=1")
    assert "config.py exists and would change" in run.error
    assert "--force" in run.error
    assert Path("config.py").read_text() == "depth = 3\n"
    forced = wizard([], "--defaults", "--set", "seed=1", "--force")
    assert forced.result == Settings(depth=3, seed=1) == Settings(**read_config("config.py"))
    before = os.stat("config.py").st_mtime_ns
    assert "already says exactly this" in wizard([], "--defaults").text
    assert os.stat("config.py").st_mtime_ns == before


def test_untied_writes_the_inert_values():
    """Red when _settled is not called."""
    argv = ["--set=tie_weights=no", "--set=use_output_projection=yes", "--set=tied_weights_lr=0.5"]
    run = wizard([], "--defaults", *argv)
    assert not run.result.use_output_projection
    assert run.result.tied_weights_lr == FIELDS["tied_weights_lr"].default
    assert "use_output_projection has no effect while tie_weights=False: written as no" in " ".join(run.text.split())


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--preset", "gpu2"], "unknown preset 'gpu2', did you mean 'gpu1'"),
        (["--set", "dept=4"], "unknown setting 'dept', did you mean 'depth'"),
        (["--set", "depth"], "is not KEY=VALUE"),
        (["--set", "depth=x"], "depth='x' is not int"),
        (["--set", "depth=4", "--set", "depth=5"], "given twice"),
        (["--defaults", "--set", "model_dim=100"], "nearest legal value 128"),
        (["--defaults", "--output", "."], "is not a file"),
        (["--defaults", "--output", "file/config.py"], "not a writable folder"),
        (["--frobnicate"], "unrecognized arguments: --frobnicate"),
        (["extra"], "unrecognized arguments: extra"),
    ],
)
def test_a_bad_command_line_is_one_line(stubbed, argv, message):
    Path("file").write_text("")
    assert message in wizard([], *argv).error
    assert os.listdir(stubbed) == ["file"]


def test_a_damaged_existing_config_is_named_and_kept():
    Path("config.py").write_text("depth = 4\nwhat is this\n")
    for argv in ([], ["--defaults"], ["--defaults", "--force"]):
        run = wizard(ENTERS, *argv)
        assert "config.py:2: only lines of the form name = value" in run.error
        assert "--preset" in run.error
    assert Path("config.py").read_text() == "depth = 4\nwhat is this\n"
    assert wizard([], "--defaults", "--force", "--preset=cpu").result == preset("cpu")


def test_a_link_is_written_through():
    os.mkdir("kept")
    os.symlink("kept/real.py", "config.py")
    wizard([], "--defaults")
    assert os.path.islink("config.py")
    assert Settings(**read_config("kept/real.py")) == preset("cpu")


# ---------------------------------------------------------------------------------------------------------------------
# dialogues on piped input


def test_enter_keeps_everything():
    run = wizard(ENTERS)
    assert run.result == preset("cpu") == Settings(**read_config("config.py"))
    assert "\x1b" not in run.text
    assert max(map(len, run.text.splitlines())) <= 80


def test_the_tying_questions_in_order():
    """Red when the saving is not computed for the vocabulary and width just given."""
    text = wizard(ENTERS, "--set", "vocab_size=24576", "--set", "model_dim=512").text
    questions = ["tie embedding weights? [yes]:", "add an output projection before the logits? [no]:"]
    places = [text.index(q) for q in (*questions, f"tied learning rate [{FIELDS['tied_weights_lr'].default}]:")]
    assert places == sorted(places)
    # 12.58M of layers, 2 x 12.58M of wte and lm_head, as much again in the preset's two value embeddings
    assert "24,576 x 512 = 12.58M of 62.91M parameters (20%)" in " ".join(text.split())
    assert "unembedding_lr [" not in text


@pytest.mark.parametrize(("tied", "rate"), [("yes", "tied learning rate"), ("no", "unembedding_lr")])
def test_what_was_asked_is_not_listed_as_not_asked(tied, rate):
    """Whatever group it is asked in; what the answers switch off is listed, not asked. All settings are one or other.

    Red when a question counts as asked in the group that declares it alone, or when it always counts.
    """
    run = wizard(ENTERS, f"--set=tie_weights={tied}")
    asking, _, rest = run.text.partition("also in the file, with their values: ")
    listed = set(rest.split("\n\n")[0].replace(",", " ").split())
    questions = {name for name, field in FIELDS.items() if field.metadata["ask"]}
    asked = {name for name in questions if not run.result.no_effect_reason(name)}
    assert ("tied_weights_lr" in asked) == (tied == "yes")
    assert rate in asking
    assert not asked & listed
    assert questions - asked <= listed
    assert asked | listed == set(FIELDS)


class Prompted(io.StringIO):
    """Answers by the question: {question: [answers in turn]}, else Enter; ends after 200 lines."""

    def __init__(self, answers: dict[str, list[str]]):
        super().__init__()
        self.answers = {question: list(given) for question, given in answers.items()}
        self.left = 200

    def readline(self, size: int = -1) -> str:
        self.left -= 1
        if self.left < 0:
            return ""
        prompt = sys.stdout.getvalue().rsplit("\n", 1)[-1]
        question = next((q for q in self.answers if prompt.startswith(q) and self.answers[q]), None)
        return f"{self.answers[question].pop(0)}\n" if question else "\n"


def test_untied_asks_neither_further_question():
    """Red when QUESTIONS are asked without `inert`."""
    run = wizard({"tie embedding": ["no"], "unembedding_lr": ["0.01"]})
    assert "add an output projection" not in run.text
    assert "tied learning rate" not in run.text
    assert "unembedding_lr [0.004]" in run.text
    assert run.result == preset("cpu", tie_weights=False, unembedding_lr=0.01)
    written = read_config("config.py")
    assert written["use_output_projection"] is False
    assert written["tied_weights_lr"] == Settings().tied_weights_lr


def test_wrong_answers_are_asked_again_with_the_reason():
    wrong = {
        "preset": ["cpus", "cpu"],
        "model_tag": ["bad/tag", "tag"],
        "device_type": ["tpu", "cuda", ""],
        "data": ["stdlb", "no-such-folder", "x" * 300, "~nobody/x", "stdlib"],
        "vocab_size": ["12", "many", "1e3"],
        "write": ["perhaps", "y"],
    }
    run = wizard(wrong)
    for reason in (
        "unknown preset 'cpus', did you mean 'cpu'?",
        "must be a folder's name",
        "device_type='tpu' is not one of cpu, cuda, mps",
        "device_type='cuda' is not available on this machine",
        "data='stdlb' is neither a known source nor a file or folder here, did you mean 'stdlib'?",
        "vocab_size=12 is too small: at least 272",
        "vocab_size='many' is not int",
        "'perhaps' is not yes, no or <",
    ):
        assert reason in " ".join(run.text.split()), reason
    assert run.result == preset("cpu", model_tag="tag", vocab_size=1000)


def test_an_illegal_combination_offers_the_nearest_legal_value():
    """Red when a problem of the question itself is deferred like one that a later answer can mend."""
    cpu = preset("cpu")
    width, batch = round(cpu.n_embd / 80) * 80, round(cpu.total_batch_size / 384) * 384
    assert (width, batch) != (cpu.n_embd, cpu.total_batch_size)
    rows = nearest_divisor(batch // 384, cpu.device_batch_size)
    run = wizard({"head_dim": ["80"], "max_seq_len": ["384"]})
    text = " ".join(run.text.split())
    assert f"model_dim={cpu.n_embd} is not a multiple of head_dim (80): nearest legal value {width}" in text
    assert f"model_dim [{width}]:" in text
    assert f"total_batch_size [{batch}]:" in text
    expected = dict(head_dim=80, model_dim=width, max_seq_len=384, total_batch_size=batch, device_batch_size=rows)
    assert run.result == preset("cpu", **expected)


def test_going_back_reaches_the_question_before_across_groups():
    run = wizard({"preset": ["cpu", "gpu1"], "model_tag": ["<", "tag", "other"], "device_type": ["<"], "data": ["<"]})
    assert run.text.count("preset (cpu") == 2
    assert run.text.count("model_tag [") == 3
    assert run.text.count("wandb_mode [") == 2  # data's way back leads into the group before
    assert run.result == preset("gpu1", model_tag="other")


@pytest.mark.parametrize("argv", [[], ["--preset=cpu"]])
def test_there_is_nothing_before_the_first_question(argv):
    run = wizard(after("<"), *argv)
    assert "this is the first question" in run.text
    assert run.result == preset("cpu")


def test_modalities_are_asked_for():
    """Codebooks, codec, untying, width, outputs, loss and mix follow one another; what cannot be is asked again.

    Red when a modality's questions are asked of a text model, or data=synth is let through without one.
    """
    run = wizard(
        {
            "data": ["synth"],
            "further modalities": ["None", "audio", "audio:256"],
            "codebooks": ["1"],
            "codec": ["pitch", "frame"],
            "untie": ["all"],
            "width of": ["96"],
            "output_layers": ["masked"],
            "modalities in the loss": ["sound", "audio"],
            "text-only documents": ["nowhere", "stdlib"],
            "text_share": ["0.25"],
        },
        "--preset=cpu",
    )
    assert run.result == preset(
        "cpu",
        data="synth",
        modalities="audio:256",
        untie="all",
        expert_dim=96,
        output_layers="masked",
        loss_modalities="audio",
        text_data="stdlib",
        text_share=0.25,
    ), run.error
    said = ("data=synth is captioned sounds", "'audio' is not name:codes", "codebooks must be at least 2")
    assert all(words in " ".join(run.text.split()) for words in (*said, "no modality 'sound'", "text_data='nowhere'"))
    assert "modality experts" in run.text
    plain = wizard(after("cpu")).text
    assert "further modalities" in plain
    assert "untie" not in plain.split("also in the file")[0]


def test_back_passes_over_questions_that_were_not_asked():
    """Red when going back counts positions instead of visited questions."""
    back = {"num_iterations": ["<"], "further modalities": ["", "<"]}
    run = wizard({"tie embedding": ["no", "yes"], **back, "add an output": ["y"], "tied": ["0.5"]})
    assert run.result == preset("cpu", use_output_projection=True, tied_weights_lr=0.5)


def test_another_preset_forgets_the_answers():
    run = wizard({"preset": ["cpu", "gpu1"], "model_tag": ["tag", "<", ""], "device_type": ["<"]})
    assert "the answers so far are discarded" in run.text
    assert run.result == preset("gpu1")


def test_an_existing_config_gives_the_defaults_and_is_kept_without_consent():
    """Red when the last question defaults to yes for an existing file."""
    original = "depth = 3\nmodel_tag = 'mine'\n"
    Path("config.py").write_text(original)
    run = wizard(ENTERS)
    assert "preset (cpu, audio, gpu1, 8xh100, keep) [keep]" in run.text
    assert "depth [3]" in run.text
    assert "config.py exists and would change" in run.text
    assert run.result is None
    assert Path("config.py").read_text() == original
    questions = run.text.count("]: ")
    any_rank = wizard([*[""] * (questions - 1), "yes"])
    assert any_rank.result == Settings(depth=3, model_tag="mine") == Settings(**read_config("config.py"))
    again = wizard(ENTERS)
    assert "nothing to write" in again.text
    assert again.result == any_rank.result


def test_the_end_of_input_at_any_question_leaves_the_disk_alone(stubbed):
    """Red when anything is written before the last answer."""
    total = wizard(ENTERS, "--output=full.py").text.count("]: ")
    os.remove("full.py")
    for count in range(total):
        run = wizard([""] * count)
        assert "nothing was written" in run.error
        assert os.listdir(stubbed) == []


def test_a_declined_consent_writes_nothing(stubbed):
    run = wizard({"write": ["no"]})
    assert "nothing was written" in run.text
    assert run.result is None
    assert os.listdir(stubbed) == []
    back = wizard({"measure": ["<"], "keep_last": ["", "7"]})
    assert back.result == preset("cpu", keep_last=7)


def test_help_explains_type_range_and_flag():
    text = " ".join(wizard({"preset": ["?"], "vocab_size": ["?"], "depth": ["<", "?"]}).text.split())
    assert "minutes on a laptop" in text
    assert "ids of the tokenizer" in text
    assert "int, at least 272, at most 1,000,000" in text
    assert "flag --vocab_size" in text
    assert text.count("vocab_size [4096]") == 3


def test_measured_speed_is_shown_when_agreed():
    run = wizard({"measure": ["y"]})
    assert "(measured 0.01 TFLOP/s per device)" in run.text
    assert run.result == preset("cpu")


def test_a_measurement_that_runs_out_of_memory_is_said(monkeypatch):
    """Red when torch.OutOfMemoryError leaves the wizard, or when its memory is not looked at before."""

    def runs_out(settings, hardware):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(configure, "measure", runs_out)
    run = wizard({"measure": ["y"]})
    assert "not measured: the device ran out of memory" in run.text
    assert run.result == preset("cpu")
    # the weights would fit twenty times over, the activations of a micro-batch do not
    small = Hardware("cpu", "a processor", 1, 700 << 20, 1e14, torch.float32)
    monkeypatch.setattr(configure, "find_hardware", lambda device_type=None: small)
    run = wizard(ENTERS, "--output=small.py")
    assert "too little memory here" in run.text
    assert "measure the speed" not in run.text


def test_several_gpus_are_put_into_the_commands(monkeypatch):
    node = Hardware("cuda", "NVIDIA H100 80GB HBM3", 8, 80 << 30, 989e12, torch.bfloat16)
    monkeypatch.setattr(configure, "find_hardware", lambda device_type=None: node)
    text = wizard([], "--defaults", "--output", "my config.py").text
    assert "--standalone --nproc_per_node=8 -m scripts.base_train 'my config.py'" in text
    assert "8 x NVIDIA H100" in text
    odd = wizard([], "--defaults", "--output=odd.py", "--set=total_batch_size=12288", "--set=device_batch_size=1").text
    assert "--nproc_per_node=6" in odd
    assert "2 idle" in odd


# ---------------------------------------------------------------------------------------------------------------------
# random answers


def test_random_dialogues_end_in_a_valid_config_or_a_clean_refusal(tmp_path, monkeypatch, capsys):
    """Red when any answer raises another error than UserError, or a refusal touches the disk."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    counts = check_dialogues.main(["--dialogues=40", "--seed=5"])  # the script itself holds 10,000
    ends = {"written", "already so", "declined", "refused", "end of input", "Ctrl-C"}
    assert set(counts) == ends
    assert sum(counts.values()) == 40
    assert "tracebacks: 0\nhalf-written files: 0\n" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_random_dialogues_notice_what_they_look_for(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    monkeypatch.setattr(configure, "write_atomically", lambda path, text: path.write_text(text[:99]))
    monkeypatch.setattr(configure, "next_commands", lambda settings, output, hardware: 1 / (settings.seed - 42))
    with pytest.raises(SystemExit) as caught:
        check_dialogues.main(["--dialogues=30"])
    assert caught.value.code == 1
    out = capsys.readouterr().out
    assert "ZeroDivisionError" in out
    assert "changed without consent" in out


# ---------------------------------------------------------------------------------------------------------------------
# a real terminal of 80 columns


class Terminal:
    """`python -m scripts.configure` under pexpect; the speed probe is answered by the real machine."""

    def __init__(self, folder: Path, *argv: str):
        env = {**os.environ, "OMP_NUM_THREADS": "1", "TERM": "xterm"}
        ours, self.its = os.openpty()
        termios.tcsetwinsize(self.its, (24, 80))
        terminal = SimpleNamespace(name=os.ttyname(self.its))
        self.process = Forked([sys.executable, "-m", "scripts.configure", *argv], env=env, cwd=folder, stdout=terminal)
        self.child = fdspawn(ours, encoding="utf-8", timeout=60)
        self.log = io.StringIO()
        self.child.logfile_read = self.log

    def answer(self, prompt: str, text: str = "") -> None:
        self.child.expect_exact(prompt)
        self.child.sendline(text)

    def enter_until(self, prompt: str, text: str) -> None:
        """Enter at every question before the one with this prompt."""
        while self.child.expect([rf"[^\n]*{prompt}[^\n]*\]: ", r"[^\n]*\]: "]) == 1:
            self.child.sendline("")
        self.child.sendline(text)

    def finish(self) -> tuple[int, str]:
        os.close(self.its)  # once it is not the process's either there comes no more
        self.child.expect(pexpect.EOF)
        self.child.close()
        code = self.process.wait(timeout=60)
        assert "Traceback" not in self.log.getvalue()
        assert all(len(line) <= 80 for line in self.log.getvalue().splitlines())
        return code, self.log.getvalue()


def test_terminal_enter_to_the_end(tmp_path):
    terminal = Terminal(tmp_path)
    terminal.answer("[cpu]: ")
    terminal.enter_until("write config.py", "yes")
    code, text = terminal.finish()
    assert code == 0
    assert "wrote config.py" in text
    assert f"{sys.executable} -m scripts.base_train config.py" in text
    assert Settings(**read_config(tmp_path / "config.py")) == preset("cpu")


def test_terminal_back_help_and_wrong_answers(tmp_path):
    terminal = Terminal(tmp_path, "--preset", "cpu")
    terminal.answer("model_tag [None]: ", "first")
    terminal.answer("device_type [None]: ", "<")
    terminal.answer("model_tag [first]: ", "second")
    terminal.answer("device_type [None]: ", "?")
    terminal.answer("device_type [None]: ", "tpu")
    terminal.child.expect_exact("is not one of cpu, cuda, mps")
    terminal.answer("device_type [None]: ", "cpu")
    terminal.enter_until("depth", "two")
    terminal.child.expect_exact("depth='two' is not int")
    terminal.answer("depth [4]: ", "2")
    terminal.enter_until("tie embedding weights", "no")
    terminal.enter_until("write config.py", "yes")
    code, text = terminal.finish()
    assert code == 0
    assert "add an output projection" not in text
    written = Settings(**read_config(tmp_path / "config.py"))
    assert written == preset("cpu", model_tag="second", device_type="cpu", depth=2, tie_weights=False)


def test_terminal_ctrl_c_leaves_the_disk_as_it_was(tmp_path):
    """Red when KeyboardInterrupt is swallowed."""
    terminal = Terminal(tmp_path)
    terminal.enter_until("depth", "3")
    terminal.child.expect_exact("head_dim [64]: ")
    terminal.child.send("\x03")
    code, text = terminal.finish()
    assert code == 130
    assert "nothing was written" in text
    assert os.listdir(tmp_path) == []


def test_terminal_end_of_input_is_a_clean_refusal(tmp_path):
    terminal = Terminal(tmp_path)
    terminal.answer("[cpu]: ")
    terminal.child.expect_exact("model_tag [None]: ")
    terminal.child.send("\x04")
    code, text = terminal.finish()
    assert code == 2
    assert "error: the input ended" in text
    assert os.listdir(tmp_path) == []


def test_terminal_an_existing_file_is_only_replaced_with_consent(tmp_path):
    path = tmp_path / "config.py"
    path.write_text(render_config(preset("cpu", depth=3)))
    terminal = Terminal(tmp_path)
    terminal.answer("[keep]: ")
    terminal.enter_until("depth", "5")
    terminal.enter_until("overwrite it", "<")
    terminal.enter_until("overwrite it", "yes")
    code, _ = terminal.finish()
    assert code == 0
    assert Settings(**read_config(path)) == preset("cpu", depth=5)


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
def test_answers_that_are_not_utf8_end_the_wizard_before_it_writes(stubbed, monkeypatch, errors):
    """However Python reads standard input. Red without the encode() in listen(), or when main() lets the error out."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"cpu\n\xff\xfe\n"), "utf-8", errors))
    with pytest.raises(UserError, match="the input is not UTF-8 text: nothing was written"):
        configure.main([])
    assert os.listdir(stubbed) == []
