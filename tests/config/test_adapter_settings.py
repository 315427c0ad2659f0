"""Settings of adapter training: what goes together, names of runs, the wizard's questions and its table."""

import io
import os
import sys
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch

from nanochat.adapters import counts as adapter_counts
from nanochat.adapters import estimate as adapter_estimate
from nanochat.config.adapter_settings import ADAPTER_PRESETS, AdapterSettings, adapter_hardware_preset
from nanochat.config.config_file import parse_value, read_config, render_config
from nanochat.config.declaration import IllegalCombination, fields_of
from nanochat.config.settings import RunSettings, Settings, preset, validate
from nanochat.system.environment import UserError
from nanochat.training.estimate import Hardware
from scripts import configure

CPU = Hardware("cpu", "a processor", 1, 16 << 30, 1e11, torch.float32)
COUNTS = {
    "host": 1000,
    "experts": 200,
    "adapters": 60,
    "audio embedding": 30,
    "audio output": 20,
    "whole output": 500,
    "trained": 110,
    "total": 1310,
}


@pytest.fixture(autouse=True)
def stubbed(tmp_path, monkeypatch):
    """No host, no probe of the hardware, and a folder of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(configure, "find_hardware", lambda device_type=None: CPU)
    monkeypatch.setattr(adapter_counts, "parameter_counts", lambda settings: COUNTS)
    return tmp_path


def wizard(answers: dict[str, list[str]], *argv: str) -> tuple[AdapterSettings | None, str]:
    """Run `configure --stage adapters` on answers by question, else Enter: its result, and what it printed as words."""
    out, stdin = io.StringIO(), sys.stdin
    left = {question: list(given) for question, given in answers.items()}

    class Prompted(io.StringIO):
        def readline(self, size: int = -1) -> str:
            prompt = out.getvalue().rsplit("\n", 1)[-1]
            question = next((q for q in left if prompt.startswith(q) and left[q]), None)
            assert len(out.getvalue()) < 200_000, "the wizard does not come to an end"
            return f"{left[question].pop(0)}\n" if question else "\n"

    sys.stdin = Prompted()
    try:
        with redirect_stdout(out):
            result = configure.main(["--stage=adapters", *argv])
    finally:
        sys.stdin = stdin
    assert max(map(len, out.getvalue().splitlines())) <= 80
    assert not any(left.values())
    return result, " ".join(out.getvalue().split())


# ---------------------------------------------------------------------------------------------------------------------
# the declaration


def test_what_both_stages_have_is_declared_once():
    """Red when AdapterSettings declares a shared setting anew instead of `redeclare`: the two could drift apart."""
    shared = fields_of(RunSettings)
    for name, field in fields_of(AdapterSettings).items():
        if name in shared:
            differing = {fact for fact, value in shared[name].metadata.items() if field.metadata[fact] != value}
            assert differing <= {"help", "group", "when", "ask"}, name
    assert len(shared) > 30
    assert AdapterSettings().text_data is None
    assert not hasattr(AdapterSettings(), "depth")
    assert not isinstance(AdapterSettings(), Settings)


@pytest.mark.parametrize(
    ("changes", "name", "nearest"),
    [
        (dict(musicgen=None), "musicgen", "facebook/musicgen-small"),
        (dict(expert_dim=64), "expert_dim", None),
        (dict(expert="trained", expert_dim=64), "expert_dim", None),
        (dict(expert="none", musicgen=None), "expert_dim", 1024),
        (dict(expert="random", musicgen=None), "expert_dim", 1024),
        (dict(expert="trained", musicgen=None), "expert_dim", 1024),
        (dict(layer_map="odd"), "layer_map", "even"),
        (dict(layer_map="0,2,"), "layer_map", "even"),
        (dict(train_output="whole"), "train_output", "rows"),
        (dict(modalities="audio:64, video:8"), "modalities", "audio:2048"),
        (dict(modalities="speech:64"), "modalities", "audio:2048"),
        (dict(modalities="audio"), "modalities", "audio:2048"),
        (dict(codec="pitch"), "codebooks", 2),
        (dict(data="stdlib"), "data", "synth"),
        (dict(host="nanochat:"), "host", "meta-llama/Llama-3.2-1B"),
        (dict(host="meta: "), "host", "meta-llama/Llama-3.2-1B"),
        (dict(total_batch_size=8000), "total_batch_size", 8192),
        (dict(device_batch_size=7), "device_batch_size", 8),
        (dict(model_tag="../x"), "model_tag", None),
    ],
)
def test_an_impossible_combination_names_the_nearest_legal_value(changes, name, nearest):
    """Red when one `raise IllegalCombination` is dropped; taking the value that it names is legal."""
    with pytest.raises(IllegalCombination) as caught:
        validate(AdapterSettings(**changes))
    assert (caught.value.name, caught.value.nearest) == (name, nearest)
    validate(AdapterSettings(**{**changes, name: nearest}))


@pytest.mark.parametrize(
    "changes",
    [
        dict(vocabulary="expanded", output_layers="shared", train_output="whole"),  # the recipe
        dict(vocabulary="expanded", train_output="none"),  # its first attempt
        dict(unfreeze="output"),
        dict(finetune_host=True, expert="none", musicgen=None, expert_dim=8),
        dict(expert="random", expert_dim=64),
        dict(expert="trained", musicgen=None, expert_dim=64),
        dict(layer_map="0, 2,23"),
        dict(host="meta:/weights", check_text=None, eval_clips=None, caption_dropout=0.0),
    ],
)
def test_old_recipes_and_controls_are_legal(changes):
    settings = validate(AdapterSettings(**changes))
    Path("config.py").write_text(render_config(settings))
    assert AdapterSettings(**read_config("config.py", AdapterSettings)) == settings


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("expert", "frosen", "is not one of frozen, trained, random, none"),
        ("train_output", "None", "expected|is not one of"),
        ("caption_dropout", "0.95", "at most 0.9"),
        ("learning_rate", "0", "more than 0"),
        ("num_iterations", "None", "expected int"),
        ("modalities", "None", "expected text"),
        ("check_tokens", "1", "at least 2"),
    ],
)
def test_a_wrong_value_is_refused_with_name_and_value(name, text, message):
    """`none` is a choice here, and not the None that switches off; what base training may leave out is needed here."""
    with pytest.raises(UserError, match=f"{name}=.*({message})"):
        parse_value(name, text, AdapterSettings)
    assert parse_value("expert", "none", AdapterSettings) == "none"


def test_settings_without_effect_say_why():
    reasons = {
        "unfreeze": (dict(finetune_host=True), "while finetune_host=True"),
        "layer_map": (dict(expert="random"), "while expert='random'"),
        "musicgen": (dict(expert="none", expert_dim=64), "while expert='none' and expert_dim=64"),
        "check_tokens": (dict(check_text=None), "while check_text=None"),
    }
    for name, (changes, reason) in reasons.items():
        assert reason in AdapterSettings(**changes).no_effect_reason(name), name
        assert AdapterSettings().no_effect_reason(name) is None, name
    own = AdapterSettings(expert="trained", musicgen=None, expert_dim=8)
    assert own.no_effect_reason("layer_map") == "layer_map has no effect while musicgen=None"
    # red when a tuple in `when` is compared as one value: the layer map would count for no expert at all
    assert AdapterSettings(expert="trained").no_effect_reason("layer_map") is None
    assert AdapterSettings().no_effect_reason("codec") is None
    assert AdapterSettings().no_effect_reason("clip_seconds") is None


def test_the_tag_says_host_expert_and_variant():
    """Red when one of the parts is dropped: two runs to be compared would take one folder."""
    tags = {
        "llama-3.2-1b-musicgen-small": dict(),
        "d4-tied-random": dict(host="nanochat:d4-tied", expert="random"),
        "qwen3-0.6b-musicgen-large-trained": dict(host="Qwen/Qwen3-0.6B", expert="trained", musicgen="large"),
        "llama3.2-1b-musicgen-mine": dict(host="meta:/data/Llama3.2-1B/", musicgen="/data/mine"),
        "llama-3.2-1b-none-finetuned": dict(expert="none", finetune_host=True),
        "llama-3.2-1b-musicgen-small-output": dict(unfreeze="output"),
        "llama-3.2-1b-musicgen-small-expanded-shared-whole": dict(
            vocabulary="expanded", output_layers="shared", train_output="whole"
        ),
        "llama-3.2-1b-musicgen-small-zero": dict(train_output="none"),
        "model-random": dict(host="../..", expert="random"),
        "mine": dict(model_tag="mine"),
    }
    assert {tag: AdapterSettings(**changes).tag for tag, changes in tags.items()} == {tag: tag for tag in tags}
    long = AdapterSettings(host="a/" + "x" * 300, musicgen="/" + "é" * 300, unfreeze="y" * 300, expert="trained")
    assert len(long.tag.encode()) <= 200


def test_presets_are_legal():
    for name in ADAPTER_PRESETS:
        validate(preset(name, AdapterSettings))
        assert name in configure.PRESETS_ABOUT
    with pytest.raises(UserError, match="did you mean 'llama'"):
        preset("lama", AdapterSettings)
    assert [adapter_hardware_preset(kind) for kind in ("cpu", "mps", "cuda")] == ["tiny", "tiny", "llama"]


# ---------------------------------------------------------------------------------------------------------------------
# the wizard


@pytest.mark.parametrize("name", ADAPTER_PRESETS)
def test_every_preset_s_config_round_trips(name):
    """Red when the wizard writes, or tells how to train, another stage than the one asked for."""
    result, text = wizard({}, "--defaults", "--preset", name)
    assert result == preset(name, AdapterSettings)
    assert AdapterSettings(**read_config("config.py", AdapterSettings)) == result
    assert f"{sys.executable} -m scripts.adapter_train config.py" in text
    assert "--standalone --nproc_per_node=1 -m scripts.adapter_train config.py" in text
    assert "base_train" not in text


def test_enter_keeps_everything_and_the_table_comes_before_the_consent():
    result, text = wizard({})
    assert result == preset("tiny", AdapterSettings)
    order = ("[2/11] host", "[3/11] expert", "[4/11] vocabulary", "host (frozen)", "trained (8.4%)", "write config.py?")
    assert [text.count(words) for words in order] == [1] * 6
    assert sorted(order, key=text.index) == list(order)
    assert "measure the speed" not in text


def test_the_questions_of_an_expert_follow_its_kind():
    """Red when the illegal width is offered again as the default, which Enter would take for ever."""
    answers = {
        "host": ["nowhere/to/be/found", "meta:/nowhere", "unsloth/Llama-3.2-1B"],
        "expert [": ["frozen"],
        "musicgen": ["None", "small"],
        "width of": ["128", ""],
        "layer_map": ["odd", "last"],
        "train_output": ["whole", "none"],
        "data": ["stdlib", "synth"],
        "check_text": ["nowhere", "None"],
        "further modalities": ["audio", ""],
    }
    result, text = wizard(answers, "--preset=tiny")
    assert result == preset(
        "tiny",
        AdapterSettings,
        host="unsloth/Llama-3.2-1B",
        expert="frozen",
        musicgen="small",
        expert_dim=None,
        layer_map="last",
        modalities="audio:2048",
        train_output="none",
        check_text=None,
    )
    for reason in (
        "host='nowhere/to/be/found' is neither a folder here nor a hub name",
        "host='meta:/nowhere' is neither a folder here",
        "expert=frozen is MusicGen's: name one with musicgen",
        "set expert_dim=None, not 128",
        "layer_map='odd' is not even, first, last or a list",
        "a softmax over audio alone gives the rows of text no gradient",
        "data='stdlib' is neither a known source nor a file or folder here (synth, hf:<dataset>, or a path)",
        "check_text='nowhere' is neither a known source",
    ):
        assert reason in text, reason
    assert "layer_map [" not in wizard({}, "--preset=tiny", "--output=other.py")[1]


def test_what_no_question_can_mend_is_refused_instead_of_asked_for_ever():
    """Red when the last check leads back to a question that is not asked: the wizard would go round in circles."""
    with pytest.raises(UserError, match="layer_map='odd' is not even"):
        wizard({}, "--preset=tiny", "--set=layer_map=odd")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--stage=adapter"], "unknown --stage 'adapter', did you mean 'adapters'"),
        (["--preset=cpu"], "unknown preset 'cpu'"),
        (["--set=depth=4"], "--set: unknown setting 'depth': it belongs to stage base"),
        (["--stage=base", "--preset=tiny"], "unknown preset 'tiny'"),
        (["--stage=base", "--set=host=x"], "--set: unknown setting 'host': it belongs to stage adapters"),
        (["--output=base.py"], "base.py:.*unknown setting 'compile': it belongs to stage base .*mend or delete"),
    ],
)
def test_the_stages_are_kept_apart(argv, message):
    Path("base.py").write_text(render_config(Settings()))
    with pytest.raises(UserError, match=message):
        wizard({}, "--defaults", *argv)
    assert os.listdir() == ["base.py"]
    assert Path("base.py").read_text() == render_config(Settings())


# ---------------------------------------------------------------------------------------------------------------------
# the table


def test_the_table_counts_what_is_trained_and_what_it_takes(monkeypatch):
    """Red when a trained parameter takes other than 16 bytes, or the frozen ones other than their dtype's."""
    million = {name: 1_000_000 * number for name, number in COUNTS.items()}
    monkeypatch.setattr(adapter_counts, "parameter_counts", lambda settings: million)
    gpu = Hardware("cuda", "a GPU", 1, 4 << 30, 1e14, torch.bfloat16)
    words = [" ".join(line.split()) for line in adapter_estimate.report(preset("llama", AdapterSettings), gpu)]
    for line in (
        "host (frozen) 1,000,000,000 1,000.00M",
        "adapters (trained) 60,000,000 60.00M",
        "whole output (not trained, not in the total) 500,000,000 500.00M",
        "total 1,310,000,000 1,310.00M",
        "trained (8.4%) 110,000,000 110.00M",
        "steps and tokens 2,000 steps of 65,536 = 131,072,000 tokens",
        "memory 3.87 GiB per device and activations on top, of which",  # 1200 M x 2 and 110 M x 16
        "2.24 GiB frozen weights in bfloat16 (4.47 GiB in float32)",
        "0.82 GiB their optimizer state in float32",
        "checkpoint 1,320.0 MB, of which trained tensors 440.0 MB",
        "disk 3,960.0 MB: 3 of 10 checkpoints at a time",
    ):
        assert line in words, line
    assert "warning" not in words[-1]
    float32 = preset("llama", AdapterSettings, dtype="float32")
    assert "warning: a device has 4.00 GiB" in adapter_estimate.report(float32, gpu)[-1]
    assert max(map(len, adapter_estimate.report(float32, gpu))) <= 80


@pytest.mark.parametrize(
    ("changes", "label"),
    [
        (dict(finetune_host=True), "host (trained)"),
        (dict(unfreeze="norm"), "host (parts trained)"),
        (dict(expert="trained"), "experts (trained)"),
        (dict(train_output="none"), "audio output (zero, frozen)"),
        (dict(train_output="whole", output_layers="shared"), "whole output (trained)"),
    ],
)
def test_the_table_says_what_happens_to_each_part(changes, label):
    table = "\n".join(adapter_estimate.parameter_table(AdapterSettings(**changes), COUNTS))
    assert label in table
    assert table.count("whole output") == 1
    none = adapter_estimate.parameter_table(AdapterSettings(**changes), COUNTS | {"experts": 0})
    assert not any("experts" in line for line in none)


def test_a_host_that_is_not_there_yet_is_said_and_the_config_is_written(monkeypatch):
    def absent(settings):
        raise UserError("host='nanochat:host' has no checkpoint: train it first, or name another one")

    monkeypatch.setattr(adapter_counts, "parameter_counts", absent)
    result, text = wizard({})
    assert "memory and disk are not known yet: host='nanochat:host' has no checkpoint" in text
    assert result == preset("tiny", AdapterSettings)


def test_the_table_at_real_size(monkeypatch):
    """The counts are those of the modules themselves: red when `end` and `start`, or a layer, are left out of them."""
    monkeypatch.undo()
    llama = preset("llama", AdapterSettings)
    words = [" ".join(line.split()) for line in adapter_estimate.report(llama, CPU)]
    rows = 2048 * 2048
    for line in (
        "host (frozen) 1,235,814,400 1,235.81M",
        f"experts (frozen) {16 * (2 * 1024 * 4096 + 2 * 1024):,} 134.25M",
        f"adapters (trained) {16 * 2 * 2048 * 1024:,} 67.11M",
        f"audio embedding (trained) {rows + 2 * 2048:,} 4.20M",
        f"audio output (trained) {rows + 2048:,} 4.20M",
        f"whole output (not trained, not in the total) {130_305 * 2048:,} 266.86M",
        f"trained (5.2%) {16 * 2 * 2048 * 1024 + 2 * rows + 3 * 2048:,} 75.50M",
    ):
        assert line in words, (line, words)
    recipe = dict(vocabulary="expanded", output_layers="shared", train_output="whole")
    words = [
        " ".join(line.split()) for line in adapter_estimate.report(preset("llama", AdapterSettings, **recipe), CPU)
    ]
    assert f"whole output (trained) {130_304 * 2048:,} 266.86M" in words
    assert f"audio embedding (trained) {rows:,} 4.19M" in words
