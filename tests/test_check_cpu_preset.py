import json

from nanochat.dataset import prepare
from nanochat.settings import PRESETS, Settings, validate
from scripts import check_cpu_preset


def test_trials_are_legal_and_few_and_the_preset_is_one_of_them():
    """Red when the preset is none of the named trials, or a sixteenth is named (run or not, it cannot tell)."""
    assert len(check_cpu_preset.TRIALS) <= 15
    for changes in check_cpu_preset.TRIALS.values():
        validate(Settings(**{**PRESETS["cpu"], **changes}))
    preset = Settings(**PRESETS["cpu"])
    assert any(
        all(getattr(preset, name) == value for name, value in changes.items())
        for changes in check_cpu_preset.TRIALS.values()
    )


def test_trials_never_see_the_held_out_split():
    """Red when training_split() takes all documents, or the val split."""
    dataset = prepare("stdlib", say=lambda line: None)
    lines = check_cpu_preset.training_split().read_text(encoding="utf-8").splitlines()
    texts = {json.loads(line)["text"] for line in lines}
    assert texts == {text for _, text in dataset.documents("train")}
    assert not texts & {text for _, text in dataset.documents("val")}
