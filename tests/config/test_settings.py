"""Settings: one declaration, checked value by value and together."""

import dataclasses
import math
import typing

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nanochat.config.adapter_settings import AdapterSettings
from nanochat.config.config_file import STAGES, parse_value
from nanochat.config.declaration import IllegalCombination, fields_of, nearest_divisor, types_of
from nanochat.config.presets import PRESET_WORLD, PRESETS, hardware_preset
from nanochat.config.settings import Settings, checked, preset, validate
from nanochat.optim import build_optimizer
from nanochat.system.environment import UserError
from nanochat.training.estimate import meta_model


@pytest.mark.parametrize("kind", STAGES.values())
def test_every_setting_is_declared_with_help_group_and_a_legal_default(kind):
    """Red when a field is added without setting(...), or `validate` stops calling `checked`."""
    fields = fields_of(kind)
    for name, field in fields.items():
        assert field.metadata["group"] in kind.groups, name
        assert len(field.metadata["help"]) > 10, name
        assert checked(name, field.default, kind) == field.default
        if field.metadata["when"]:
            assert field.metadata["when"][0] in fields
    validate(kind())
    with pytest.raises(UserError, match="save_every=0 is too small: at least 1"):
        validate(kind(save_every=0))


@pytest.mark.parametrize("kind", STAGES.values())
def test_a_number_that_elsewhere_means_off_names_none(kind):
    """-1, 0 and inf for what None switches off, with what None means; not where None is no value.

    Red when `without` is not passed on, or is passed for all.
    """
    numbers, none = {int, float}, type(None)
    parts = {name: set(typing.get_args(hint)) for name, hint in types_of(kind).items()}
    optional = {name for name, some in parts.items() if none in some and numbers & some}
    assert {"eval_every", "save_every", "keep_last", "grad_clip"} <= optional
    assert "rank_timeout" not in optional
    reason = r"(is too small: (at least|more than) \d+|is not a finite number), or None \(\w.*\)$"
    for name in optional:
        for value in (-1, 0, math.inf):
            with pytest.raises(UserError, match=rf"^{name}={value} {reason}"):
                checked(name, value, kind)
    with pytest.raises(UserError, match=r"^eval_every=-1 is too small: at least 1, or None \(only at the end\)$"):
        parse_value("eval_every", "-1", kind)
    with pytest.raises(UserError, match=r"^grad_clip=0.0 is too small: more than 0, or None \(never clips\)$"):
        checked("grad_clip", 0.0, kind)
    for name in ("rank_timeout", "device_batch_size", "warmup_steps"):
        with pytest.raises(UserError, match=rf"^{name}=-1 is too small: at least \d$"):
            checked(name, -1, kind)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("depth", "four", "depth='four' is a str: expected int"),
        ("depth", True, "depth=True is a bool: expected int"),
        ("depth", 4.5, "not a whole number"),
        ("depth", None, "depth=None is a NoneType"),
        ("depth", math.inf, "not a finite number"),
        ("depth", 10**400, "not a finite number"),
        ("matrix_lr", math.nan, "not a finite number"),
        ("matrix_lr", 0, "more than 0"),
        ("matrix_lr", 1 + 2j, "is a complex"),
        ("warmdown_ratio", 1.5, "at most 1"),
        ("vocab_size", 271, "at least 272"),
        ("tie_weights", 1, "is a int: expected True or False"),
        ("dtype", "float16", "is not one of float32, bfloat16"),
        ("data", "  ", "is empty"),
        ("data", "a\nb", "control characters"),
        ("adam_betas", (0.9,), "is not two numbers"),
        ("adam_betas", (0.9, 1.0), "at most 0.999999"),
        ("adam_betas", "0.9", "is not two numbers"),
        ("dept", 4, "did you mean 'depth'"),
    ],
)
def test_a_wrong_value_is_refused_with_name_and_value(name, value, message):
    with pytest.raises(UserError, match=message):
        checked(name, value)


def test_values_take_the_setting_s_own_type():
    assert checked("depth", 6.0) == 6
    assert isinstance(checked("depth", 6.0), int)
    assert isinstance(checked("weight_decay", 0), float)
    assert checked("adam_betas", [0, 0.5]) == (0.0, 0.5)
    assert checked("eval_every", None) is None


@pytest.mark.parametrize(
    ("changes", "name", "nearest"),
    [
        (dict(head_dim=63), "head_dim", 64),
        (dict(model_dim=300), "model_dim", 320),
        (dict(model_dim=32), "model_dim", 64),
        (dict(model_dim=512, n_kv_head=3), "n_kv_head", 2),
        (dict(total_batch_size=8000), "total_batch_size", 8192),
        (dict(total_batch_size=100), "total_batch_size", 512),
        (dict(device_batch_size=7), "device_batch_size", 8),
        (dict(target_param_data_ratio=None), "target_param_data_ratio", 20.0),
        (dict(modalities="audio:" + "9" * 5000), "modalities", "audio:2048"),
        (dict(mlp_ratio=0.005, model_dim=64), "mlp_ratio", 0.0079),
        (dict(mlp_ratio=1e-300, model_dim=4096), "mlp_ratio", 0.0002),
        (dict(mlp_ratio=0.1, modalities="audio:16", expert_dim=5), "expert_dim", 6),
    ],
)
def test_an_impossible_combination_names_the_nearest_legal_value(changes, name, nearest):
    """Red when one `raise IllegalCombination` is dropped; taking the value that it names is legal."""
    with pytest.raises(IllegalCombination) as caught:
        validate(Settings(**changes))
    assert (caught.value.name, caught.value.nearest) == (name, nearest)
    validate(Settings(**{**changes, name: nearest}))


def test_model_tags_are_folder_names():
    for tag in ("../x", ".hidden", "a/b", "a\\b", "é" * 101):
        with pytest.raises(UserError, match="must be a folder's name"):
            validate(Settings(model_tag=tag))
    assert validate(Settings(model_tag="my run")).tag == "my run"


@given(st.integers(1, 5000), st.integers(1, 6000))
def test_nearest_divisor_equals_a_plain_search(number, wish):
    legal = [n for n in range(1, number + 1) if number % n == 0]
    assert nearest_divisor(number, wish) == min(legal, key=lambda n: (abs(n - wish), n))


def test_nearest_divisor_of_a_huge_batch_is_quick():
    with pytest.raises(IllegalCombination, match=r"nearest legal value 1$"):
        validate(Settings(total_batch_size=(2**31 - 1) * 512, device_batch_size=999_983))


@given(st.integers(1, 8), st.integers(1, 12), st.integers(1, 16), st.integers(1, 40))
def test_the_batch_plan_covers_the_batch_exactly(world, rows, micro, length):
    """Red when `rows % micro` is not checked: rows of a batch would be lost."""
    settings = Settings(max_seq_len=length + 1, total_batch_size=rows * (length + 1), device_batch_size=micro)
    try:
        size, steps = settings.batch_plan(world)
    except IllegalCombination as problem:
        if problem.name == "device_batch_size":
            changed = dataclasses.replace(settings, device_batch_size=problem.nearest)
        else:
            changed = dataclasses.replace(settings, total_batch_size=problem.nearest, device_batch_size=1)
        size, steps = changed.batch_plan(world)
        rows = changed.rows
    assert size * steps * world == rows


def test_width_is_rounded_up_to_whole_heads():
    assert Settings(depth=3, aspect_ratio=50, head_dim=64).n_embd == 192
    assert Settings(depth=3, aspect_ratio=50, head_dim=64).n_head == 3
    assert Settings(model_dim=128, head_dim=32).n_head == 4


def test_settings_without_effect_say_why():
    untied = Settings(use_output_projection=True, output_projection_residual=True)
    assert (
        untied.no_effect_reason("use_output_projection")
        == "use_output_projection has no effect while tie_weights=False"
    )
    # one plain reason, the one that a person can change: red when the reasons of the switches are strung together
    residual = "output_projection_residual"
    assert untied.no_effect_reason(residual) == f"{residual} has no effect while tie_weights=False"
    assert "while tie_weights=True" in Settings(tie_weights=True).no_effect_reason("unembedding_lr")
    ratio = "target_param_data_ratio"
    assert Settings(num_iterations=5).no_effect_reason(ratio) == f"{ratio} has no effect while num_iterations=5"
    assert Settings(model_dim=128).no_effect_reason("aspect_ratio")
    assert not Settings().no_effect_reason("aspect_ratio")
    assert Settings().no_effect_reason("run")
    assert not Settings(wandb_mode="offline").no_effect_reason("run")
    assert Settings().no_effect_reason("keep_last")
    assert not Settings(save_every=5).no_effect_reason("keep_last")
    assert Settings().no_effect_reason("depth") is None


def test_the_tag_says_the_variant():
    tags = [
        Settings().tag,
        Settings(tie_weights=True).tag,
        Settings(tie_weights=True, use_output_projection=True).tag,
        Settings(tie_weights=True, use_output_projection=True, output_projection_residual=True).tag,
        Settings(use_output_projection=True).tag,
    ]
    assert tags == ["d4", "d4-tied", "d4-tied-proj", "d4-tied-proj-res", "d4"]


def test_presets_are_legal_tied_and_fit_their_ranks():
    for name, world in PRESET_WORLD.items():
        assert validate(preset(name), world).tie_weights
        assert all(checked(key, value) == value for key, value in PRESETS[name].items())
    with pytest.raises(UserError, match="did you mean 'cpu'"):
        preset("cpus")
    assert [hardware_preset("cpu"), hardware_preset("mps"), hardware_preset("cuda", 1)] == ["cpu", "cpu", "gpu1"]
    assert hardware_preset("cuda", 4) == "8xh100"


INERT = {  # setting -> (settings under which it has no effect, what the reason names; settings under which it has one)
    "vocab_size": [(dict(tokenizer="small"), "tokenizer='small'", {}), (dict(init_from="x"), "init_from='x'", {})],
    "data_limit": [
        (dict(data=data), f"data={data!r}", dict(data=other))
        for data, other in (("stdlib", "climbmix"), ("packages", "hf:x"), ("book.txt", "hf:x"), ("/folder", "climbmix"))
    ],
    "data_column": [
        (dict(data=data), f"data={data!r}", dict(data=other))
        for data, other in (
            ("stdlib", "rows.jsonl"),
            ("book.TXT", "/folder"),
            ("a.md.gz", "hf:x"),
            ("climbmix", "a.csv"),
        )
    ],
    "data_split": [(dict(data="/folder"), "data='/folder'", dict(data="hf:x"))],
    "data_config": [(dict(data="climbmix"), "data='climbmix'", dict(data="hf:x"))],
    "data_audio_column": [
        (dict(data="synth", modalities="audio:8"), "data='synth'", dict(data="hf:x", modalities="audio:8")),
        (dict(data="hf:x"), "modalities=None", dict(data="hf:x", modalities="image:4, audio:8")),
    ],
    "codec": [(dict(modalities="image:8"), "modalities='image:8'", dict(modalities="image:8,audio:8"))],
    "text_data": [(dict(modalities="image:8"), "modalities='image:8'", dict(modalities="audio:8"))],
    "final_lr_frac": [(dict(warmdown_ratio=0.0), "warmdown_ratio=0.0", {})],
    "tied_init_std": [(dict(tie_weights=True, init_from="x"), "init_from='x'", dict(tie_weights=True))],
    "deterministic": [(dict(device_type="cpu"), "device_type='cpu'", {})],
    "backout": [(dict(depth=2), "depth=2", dict(depth=3))],
    "window_pattern": [
        (dict(window_pattern="SL", depth=1), "depth=1", dict(window_pattern="LS", depth=3)),
        (
            dict(window_pattern="SL", max_seq_len=129),
            "max_seq_len=129, which 128 tokens cover",
            dict(window_pattern="SL", max_seq_len=130),
        ),
    ],
    "short_window": [
        (
            dict(window_pattern="SL", max_seq_len=64, short_window=63),
            "max_seq_len=64, which 63 tokens cover",
            dict(window_pattern="SL", max_seq_len=64, short_window=62),
        ),
        (dict(window_pattern="LL"), "window_pattern='LL'", dict(window_pattern="SL")),
        (dict(window_pattern="LLS", depth=3), "window_pattern='LLS' and depth=3", dict(window_pattern="LLS", depth=4)),
    ],
}


@pytest.mark.parametrize("name", INERT)
def test_a_setting_without_effect_says_why(name):
    """Red without the setting's `when`, or its line in no_effect_reason()."""
    for off, reason, on in INERT[name]:
        assert Settings(**off).no_effect_reason(name) == f"{name} has no effect while {reason}"
        assert Settings(**on).no_effect_reason(name) is None, (name, on)


def test_adapters_say_the_same_of_their_data():
    """Red when AdapterSettings declares one of these again with when=None."""
    folder = AdapterSettings(data="/sounds")
    assert all(
        "data='/sounds'" in folder.no_effect_reason(n) for n in ("data_limit", "data_split", "data_audio_column")
    )
    assert folder.no_effect_reason("data_column") is None
    assert AdapterSettings(data="synth").no_effect_reason("data_limit") is None
    assert "data='synth'" in AdapterSettings(data="synth").no_effect_reason("data_column")
    assert AdapterSettings(eval_every=None).no_effect_reason("stall_evals")
    assert not AdapterSettings().no_effect_reason("stall_evals")
    assert AdapterSettings(data="hf:x").no_effect_reason("data_audio_column") is None


SCALARS = ("value_embeddings", "smear", "residual_scalars", "backout")


@pytest.mark.parametrize("feature", [{}, *({name: True} for name in SCALARS), dict(bigram_rows=8)])
@pytest.mark.parametrize("depth", [2, 3])
def test_scalar_lr_has_an_effect_where_the_optimizer_has_scalars(feature, depth):
    """Compared with the optimizer's groups. Red when a feature is missing in inert(), or backout forgets the depth."""
    settings = Settings(depth=depth, model_dim=32, head_dim=16, max_seq_len=16, vocab_size=272, **feature)
    groups = build_optimizer(meta_model(settings), settings, torch.float32).param_groups
    assert ("scalar" in {group["name"] for group in groups}) == (settings.no_effect_reason("scalar_lr") is None)
