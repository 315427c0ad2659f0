"""config.py and the command line."""

import dataclasses
import os
import re
import typing

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.config.config_file import (
    MAX_CONFIG_BYTES,
    STAGES,
    differences,
    find_no_effect,
    from_command_line,
    help_text,
    parse_value,
    read_config,
    render_config,
)
from nanochat.config.declaration import fields_of, types_of
from nanochat.config.settings import RunSettings, Settings, preset
from nanochat.system.environment import UserError

KINDS = list(STAGES.values())


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    return tmp_path


def config(text: str | bytes, name: str = "config.py") -> str:
    with open(name, "wb") as file:
        file.write(text.encode() if isinstance(text, str) else text)
    return name


def value_of(name: str, kind: type[RunSettings]) -> st.SearchStrategy:
    """Any legal single value of a setting."""
    facts, hint = fields_of(kind)[name].metadata, types_of(kind)[name]
    if facts["choices"]:
        found = st.sampled_from(facts["choices"])
    elif hint is bool:
        found = st.booleans()
    elif hint in (str, str | None):
        plain = st.characters(exclude_categories=("Cs", "Cc"))
        found = st.text(plain, min_size=1).filter(str.strip)
    elif hint in (int, int | None):
        found = st.integers(facts["ge"] or 0, facts["le"] or 2**70)
    else:
        low = facts["ge"] if facts["ge"] is not None else facts["gt"]
        open_end = facts["gt"] is not None
        number = st.floats(low, facts["le"] or 1e300, exclude_min=open_end)
        found = st.tuples(number, number) if hint == tuple[float, float] else number
    return st.none() | found if type(None) in typing.get_args(hint) else found


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=30)  # of some seventy values each
@given(st.data())
def test_what_is_written_reads_back_exactly(tmp_path_factory, kind, data):
    """Red when render_config leaves a setting out, or writes a string without escapes."""
    values = data.draw(st.fixed_dictionaries({name: value_of(name, kind) for name in fields_of(kind)}))
    path = tmp_path_factory.getbasetemp() / "roundtrip.py"
    path.write_text(render_config(kind(**values)), encoding="utf-8")
    assert read_config(path, kind) == values


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind in KINDS for name in kind.presets()])
def test_presets_round_trip_through_the_file_and_the_command_line(kind, name):
    config(render_config(preset(name, kind)))
    assert from_command_line([], kind=kind).settings == preset(name, kind)
    flags = [f"--{key}={value}" for key, value in dataclasses.asdict(preset(name, kind)).items()]
    os.remove("config.py")
    assert from_command_line(flags, kind=kind).settings == preset(name, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_the_file_is_in_groups_with_comments(kind):
    text = render_config(kind())
    positions = [text.index(f" {group} ---") for group in kind.groups]
    assert positions == sorted(positions)
    for name, field in fields_of(kind).items():
        comment = re.search(rf"((?:# .*\n)+){name} = ", text).group(1)
        assert field.metadata["help"][:30] in comment.replace("\n# ", " ")
    assert max(map(len, text.splitlines())) <= 120


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("depth = 4\nwidht = 3\n", r"config.py:2: unknown setting 'widht'"),
        ("\n\ndept = 3\n", r"config.py:3: unknown setting 'dept', did you mean 'depth'\?"),
        ("depth = 'four'\n", r"config.py:1: depth='four' is a str"),
        ("matrix_lr = 1e999\n", r"config.py:1: matrix_lr=inf is not a finite number"),
        ("depth = 2 * 3\n", r"config.py:1: depth = 2 \* 3 is not a plain literal"),
        ("depth = -len('x')\n", r"config.py:1: depth = .* is not a plain literal"),
        ("run = f'{1}'\n", r"config.py:1: run = .* is not a plain literal"),
        ("depth = other\n", r"config.py:1: .* is not a plain literal"),
        ("import os\n", r"config.py:1: .* a Python import"),
        ("depth = 4\nprint(1)\n", r"config.py:2: .* a Python call"),
        ("depth = 4\n'late docstring'\n", r"config.py:2: .* a Python constant"),
        ("depth = 4; depth = 5\n", r"config.py:1: depth is assigned a second time \(first in line 1\)"),
        ("depth = n_kv_head = 4\n", r"config.py:1: only lines of the form name = value"),
        ("depth, seed = 4, 5\n", r"config.py:1: only lines of the form name = value"),
        ("depth: int = 4\n", r"config.py:1: only lines of the form name = value"),
        ("depth += 4\n", r"config.py:1: only lines of the form name = value"),
        ("if True:\n  depth = 4\n", r"config.py:1: .* a Python if"),
        ("depth = (\n", r"config.py:1: not valid Python"),
        ("x" * (MAX_CONFIG_BYTES + 1), "larger than"),
        (b"depth = 4\nrun = '\xff'\n", r"config.py:2: not UTF-8 text \(byte 0xff\)"),
        (b"depth = 4\0\n", "not valid Python"),
        ("depth = " + "(" * 5000 + ")" * 5000, "not valid Python|not a plain literal"),
        ("depth = " + "-" * 50_000 + "1", "not valid Python|not a plain literal"),
        ("seed = " + "9" * 5000, "not valid Python"),
        ("seed = {[]: 1}", "not a plain literal"),
        ("run = '''" + "x\n" * 5000 + "'''", "control characters"),
    ],
)
def test_a_bad_config_is_one_short_line_with_file_and_line(text, message):
    """Red when the file is executed instead of parsed, or `_read_with_lines` forgets the line."""
    with pytest.raises(UserError, match=message) as caught:
        read_config(config(text))
    assert len(str(caught.value)) < 400


def test_a_config_is_never_executed():
    with pytest.raises(UserError):
        read_config(config("depth = open('made', 'w').close() or 4\n"))
    assert not os.path.exists("made")


def test_harmless_forms_are_read():
    text = '"""A docstring."""\r\n# comment\r\ndepth = 0x6\r\ngrad_clip = None\r\nadam_betas = [0.5, +0.75]\r\n'
    expected = {"depth": 6, "grad_clip": None, "adam_betas": (0.5, 0.75)}
    assert read_config(config("\ufeff" + text)) == expected
    assert read_config(config("")) == {}


def test_a_missing_or_unreadable_config_says_what_was_looked_for(folder):
    config("", "small.py")
    with pytest.raises(UserError, match=rf"'smal.py' not found: looked for {folder}/smal.py, did you mean 'small.py'"):
        from_command_line(["smal.py"])
    with pytest.raises(UserError, match="the folder nowhere does not exist"):
        from_command_line(["nowhere/config.py"])
    os.mkdir("run")
    with pytest.raises(UserError, match=r"'run' is a folder: and it holds no config.py"):
        from_command_line(["run"])
    config("", "run/config.py")
    with pytest.raises(UserError, match=r"pass run/config.py"):
        from_command_line(["run"])
    os.mkfifo("pipe.py")
    with pytest.raises(UserError, match="not a regular file"):
        from_command_line(["pipe.py"])
    for name in ("a\0b", "x" * 5000):
        with pytest.raises(UserError, match=r"cannot be read|not found"):
            from_command_line([name])


def test_flags_win_over_the_file_and_the_file_over_defaults():
    """Red when `{**lines, **flags}` is turned round."""
    config("depth = 6\nseed = 7\n")
    line = from_command_line(["--depth=8", "--resume"])
    assert (line.settings.depth, line.settings.seed, line.settings.head_dim) == (8, 7, 64)
    assert line.origins == {"depth": "command line", "seed": "config.py:2"}
    assert line.switches == {"resume"}
    assert str(line.config_path) == "config.py"
    config("depth = 5\n", "other.py")
    assert from_command_line(["other.py"]).settings == Settings(depth=5)
    os.remove("config.py")
    assert from_command_line([]) == dataclasses.replace(
        line, settings=Settings(), origins={}, switches=set(), config_path=None
    )


def test_flags_in_every_spelling():
    argv = ["--depth", "6", "--max-seq-len=256", "--grad_clip=None", "--tie-weights", "yes", "--adam_betas=0.5,0.9"]
    settings = from_command_line([*argv, "--target-flops=1e15", "--total_batch_size=8_192", "--seed", "0"]).settings
    assert settings == Settings(
        depth=6, max_seq_len=256, grad_clip=None, tie_weights=True, adam_betas=(0.5, 0.9), target_flops=1e15, seed=0
    )
    assert from_command_line(["--run=a=b"]).settings.run == "a=b"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--dpeth=4"], r"unknown flag '--dpeth', did you mean 'depth'"),
        (["-depth=4"], r"unknown flag '-depth'"),
        (["--"], r"unknown flag '--'"),
        (["--depth"], r"--depth needs a value: --depth=int"),
        (["--depth", "--seed=1"], r"--depth needs a value"),
        (["--depth=four"], r"depth='four' is not int"),
        (["--depth=4.5"], "not a whole number"),
        (["--depth="], "depth='' is not int"),
        (["--depth=None"], "expected int"),
        (["--matrix_lr=nan"], "not a finite number"),
        (["--matrix_lr=1e999"], "not a finite number"),
        (["--seed=" + "9" * 5000], r"not a finite number|too large|is not int"),
        (["--compile=maybe"], "is not yes or no"),
        (["--adam_betas=0.9"], "is not two numbers"),
        (["--adam_betas=a,b"], "is not two numbers"),
        (["--run="], "is empty"),
        (["--depth=4", "--depth=5"], "given twice"),
        (["--resume=yes"], "is a switch"),
        (["a.py", "b.py"], "one config file is expected, not 2"),
        (["--model_dim=100"], "nearest legal value 128"),
        (["--n_kv_head=3"], "nearest legal value 2"),
    ],
)
def test_a_bad_command_line_is_refused(argv, message):
    with pytest.raises(UserError, match=message):
        from_command_line(argv)


def test_combinations_are_checked_for_the_ranks_of_torchrun(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(UserError, match=r"multiple of max_seq_len \* 3 ranks \(1536\): nearest legal value 7680"):
        from_command_line([])


def test_differences_say_where_a_value_came_from_and_what_is_inert():
    config("depth = 6\nseed = 42\nuse_output_projection = True\n")
    line = from_command_line(["--unembedding_lr=0.004", "--tied_weights_lr=0.005", "--max_seq_len=256"])
    assert differences(line.settings, line.origins) == [
        "max_seq_len = 256 (default 512, from command line)",
        "depth = 6 (default 4, from config.py:1)",
        "use_output_projection = True (default False, from config.py:3); "
        "note: use_output_projection has no effect while tie_weights=False",
        "tied_weights_lr = 0.005 (default 0.005, from command line); "
        "note: tied_weights_lr has no effect while tie_weights=False",
    ]


def test_a_timeout_of_one_rank_is_said(monkeypatch):
    """Red when differences() does not look at the number of ranks."""
    line = from_command_line(["--rank_timeout=60"])
    assert "note: rank_timeout has no effect on a single rank" in differences(line.settings, line.origins)[0]
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "note" not in differences(line.settings, line.origins)[0]


def test_scripts_that_only_prepare_say_what_has_no_effect_on_data():
    """Of the data's settings alone, whether typed or in config.py. Red when find_no_effect() asks for the default."""
    config("data_limit = 24\nembedding_lr = 0.5\ntie_weights = True\ntokenizer = 'small'\n")
    line = from_command_line(["--data=book.txt", "--data_split=train", "--vocab_size=300"])
    assert find_no_effect(line) == [
        "note: data_limit has no effect while data='book.txt' (24 from config.py:1)",
        "note: data_split has no effect while data='book.txt' (\"train\" from command line)",
        "note: vocab_size has no effect while tokenizer='small' (300 from command line)",
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_help_names_every_setting_within_80_columns(capsys, kind):
    usage = f"python -m {kind.script} [config.py]"
    with pytest.raises(SystemExit) as end:
        from_command_line(["missing.py", "--help"], usage=usage, kind=kind)
    text = capsys.readouterr().out
    assert end.value.code == 0
    assert text.strip() == help_text(usage, ("resume",), kind)
    assert [name for name in fields_of(kind) if f"--{name}=" not in text] == []
    assert "[--resume]" in text
    assert max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind in KINDS for name in fields_of(kind)])
def test_no_text_makes_the_parser_fail_otherwise_than_with_a_user_error(kind, name):
    for text in ("", "?", "None", "nan", "-1", "1e400", "1,2", "(1,2", "[]", "\x00", "\ud800", "٣", "9" * 5000):
        try:
            parse_value(name, text, kind)
        except UserError as error:
            assert name in str(error)


@pytest.mark.parametrize(("mine", "other", "theirs"), [(*KINDS, "host"), (*KINDS[::-1], "depth")])
def test_a_config_or_flag_of_the_other_stage_is_refused_as_such(mine, other, theirs):
    """Red when `meant` does not look at the other stages: a near name of this one would be offered."""
    said = f"unknown .*: it belongs to stage {other.stage} .{other.script}., and this command reads stage {mine.stage}"
    with pytest.raises(UserError, match=f"config.py:[0-9]+: {said}"):
        read_config(config(render_config(other())), mine)
    os.remove("config.py")
    with pytest.raises(UserError, match=said):
        from_command_line([f"--{theirs}=4"], kind=mine)
    assert render_config(other()).startswith(f"# Settings of one run, stage {other.stage}:")
