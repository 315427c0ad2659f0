"""Reading and writing config.py, and the command line that overrides it.

A config.py is a list of `name = literal` lines. It is parsed, never executed. Precedence: the field's default, then
config.py, then a flag. --help is generated here from the fields of a stage's settings; kind says which stage's.
"""

import ast
import json
import sys
import textwrap
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path

from nanochat.config.adapter_settings import AdapterSettings
from nanochat.config.declaration import ON, Like, fields_of, types_of
from nanochat.config.removed import REMOVED, drop_removed
from nanochat.config.settings import RunSettings, Settings, checked, type_name, validate
from nanochat.runtime import nearest_name, shown
from nanochat.system.environment import UserError, world_size_from_env

STAGES: dict[str, type[RunSettings]] = {kind.stage: kind for kind in (Settings, AdapterSettings)}
DEFAULT_CONFIG = "config.py"
MAX_CONFIG_BYTES = 1 << 20  # a rendered config has about 8 KB: anything far larger is something else
BOOLEANS = {"true": True, "yes": True, "y": True, "on": True, "1": True}
BOOLEANS |= {"false": False, "no": False, "n": False, "off": False, "0": False}


@dataclass(frozen=True)
class CommandLine:
    """A resolved command line: settings; where each given value came from; the switches; the config read, if any."""

    settings: RunSettings
    origins: dict[str, str] = field(default_factory=dict)
    switches: set[str] = field(default_factory=set)
    config_path: Path | None = None


# ---------------------------------------------------------------------------------------------------------------------
# reading config.py


def read_config(path: str | Path, kind: type[RunSettings] = Settings) -> dict:
    """The settings that a config.py assigns, as {name: checked value}; UserError names file and line."""
    return {name: value for name, (value, _) in _read_with_lines(Path(path), kind).items()}


def _read_with_lines(path: Path, kind: type[RunSettings]) -> dict[str, tuple[object, int]]:
    text = _config_text(path)
    try:
        with warnings.catch_warnings():  # an odd escape such as "\d" is Python's to warn about, not ours
            warnings.simplefilter("ignore")
            body = ast.parse(text).body
    except SyntaxError as error:
        raise UserError(f"{path}:{error.lineno or 1}: not valid Python: {error.msg}") from None
    except (ValueError, RecursionError, MemoryError) as error:  # null bytes, or brackets nested without end
        raise UserError(f"{path}: not valid Python: {str(error) or type(error).__name__}") from None

    found: dict[str, tuple[object, int]] = {}
    for index, statement in enumerate(body):
        where = f"{path}:{statement.lineno}"
        if index == 0 and isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
            continue  # a docstring
        if not (isinstance(statement, ast.Assign) and [type(t) for t in statement.targets] == [ast.Name]):
            form = type(statement.value if isinstance(statement, ast.Expr) else statement).__name__.lower()
            raise UserError(f"{where}: only lines of the form name = value are allowed, this is a Python {form}")

        name = statement.targets[0].id
        if name not in {*fields_of(kind), *REMOVED}:
            raise UserError(f"{where}: unknown setting {name!r}{did_you_mean(name, kind)}")
        if name in found:
            raise UserError(f"{where}: {name} is assigned a second time (first in line {found[name][1]})")

        try:
            value = ast.literal_eval(statement.value)
        except (ValueError, TypeError, RecursionError, MemoryError):
            code = ast.get_source_segment(text, statement.value) or ""
            raise UserError(
                f"{where}: {name} = {shown(code)[1:-1]} is not a plain literal: config files are read, never executed"
            ) from None

        if drop_removed(name, value, where):
            continue
        try:
            found[name] = checked(name, value, kind), statement.lineno
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
    return found


def did_you_mean(name: str, kind: type[RunSettings], *further: str) -> str:
    """A hint on an unknown setting: it belongs to another stage, or is close to a known name (further: other ones)."""
    for stage, other in STAGES.items():
        if name in fields_of(other):
            return f": it belongs to stage {stage} ({other.script}), and this command reads stage {kind.stage}"
    return nearest_name(name, [*fields_of(kind), *further])


def _config_text(path: Path) -> str:
    try:
        if path.is_dir():
            inside = path / DEFAULT_CONFIG
            hint = f"pass {inside}" if inside.is_file() else f"and it holds no {DEFAULT_CONFIG}"
            raise UserError(f"config {str(path)!r} is a folder: {hint}")
        if not path.exists():
            raise UserError(f"config {str(path)!r} not found: looked for {path.absolute()}{_suggest_config(path)}")
        if not path.is_file():
            raise UserError(f"config {str(path)!r} is not a regular file")
        with open(path, "rb") as file:
            raw = file.read(MAX_CONFIG_BYTES + 1)
    except (OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"config {shown(str(path))} cannot be read: {getattr(error, 'strerror', error)}") from None
    if len(raw) > MAX_CONFIG_BYTES:
        raise UserError(f"{path}: larger than {MAX_CONFIG_BYTES} bytes: not a config file")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise UserError(f"{path}:{line}: not UTF-8 text (byte {raw[error.start]:#04x}): not a config file") from None


def _suggest_config(path: Path) -> str:
    """A hint on a config that does not exist: the closest file name in its folder."""
    folder = path.parent
    if not folder.is_dir():
        return f" (the folder {folder} does not exist)"
    names = sorted(p.name for p in folder.glob("*.py"))
    return nearest_name(path.name, names) if names else " (no .py file is there); python -m scripts.configure makes one"


# ---------------------------------------------------------------------------------------------------------------------
# the command line


def parse_value(name: str, text: str, kind: type[RunSettings] = Settings):
    """A setting's value from text: None switches off, yes and no are booleans, 1e9 and 4_096 are numbers."""
    hint, text = types_of(kind)[name], text.strip()
    if text.lower() == "none" and "none" not in (fields_of(kind)[name].metadata["choices"] or ()):
        return checked(name, None, kind)
    if hint in (str, str | None):
        return checked(name, text, kind)
    if hint is bool:
        if text.lower() not in BOOLEANS:
            raise UserError(f"{name}={shown(text)} is not yes or no")
        return BOOLEANS[text.lower()]
    parts = text.strip("()[]").split(",") if hint == tuple[float, float] else [text]
    numbers = [number for part in parts if (number := _number(part)) is not None]
    if len(numbers) < len(parts):
        raise UserError(f"{name}={shown(text)} is not {type_name(name, kind)}")
    return checked(name, numbers if hint == tuple[float, float] else numbers[0], kind)


def _number(text: str) -> int | float | None:
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            continue
    return None


def from_command_line(
    argv: list[str] | None = None,
    *,
    switches: tuple[str, ...] = ("resume",),
    usage: str = "[config.py]",
    kind: type[RunSettings] = Settings,
) -> CommandLine:
    """Settings from an optional config file and flags; flags win.

    argv: `--name=value` or `--name value` (dashes or underscores), bare switches, and at most one config path. Without
    a path ./config.py is read if it exists. usage: what follows "usage:" in --help, which prints and exits with 0.
    Raises UserError for anything unknown, malformed, given twice, or illegal together (checked for WORLD_SIZE ranks).
    """
    words = list(sys.argv[1:] if argv is None else argv)
    flags, on, paths = _parse_words(words, switches, kind)
    if "help" in on:
        print(help_text(usage, switches, kind))
        sys.exit(0)
    if len(paths) > 1:
        raise UserError(f"one config file is expected, not {len(paths)}: {', '.join(paths)}; flags are --name=value")
    config = Path(paths[0]) if paths else Path(DEFAULT_CONFIG) if Path(DEFAULT_CONFIG).exists() else None

    lines = _read_with_lines(config, kind) if config else {}
    origins = {name: f"{config}:{line}" for name, (_, line) in lines.items()}
    origins |= {name: "command line" for name in flags}
    settings = kind(**{**{name: value for name, (value, _) in lines.items()}, **flags})

    # Otherwise a checkpoint's settings come in first, and training/resume.py validates.
    if "resume" not in on and getattr(settings, "init_from", None) is None:
        validate(settings, world_size_from_env())
    return CommandLine(settings, origins, on, config)


def _parse_words(
    words: list[str], switches: tuple[str, ...], kind: type[RunSettings]
) -> tuple[dict[str, object], set[str], list[str]]:
    """(values of the flags by name, the switches that are on, the paths); "help" is a switch that ends the parsing."""
    flags: dict[str, object] = {}
    on: set[str] = set()
    paths: list[str] = []
    while words:
        word = words.pop(0)
        if word in ("-h", "--help"):
            return flags, {"help"}, paths
        if not word.startswith("-"):
            paths.append(word)
            continue

        given, equals, text = word.partition("=")
        name = given.lstrip("-").replace("-", "_")
        if not given.startswith("--") or name not in {*fields_of(kind), *switches, *REMOVED}:
            raise UserError(f"unknown flag {shown(given)}{did_you_mean(name, kind, *switches)}")
        if name in flags:
            raise UserError(f"--{name} is given twice")
        if name in switches:
            if equals:
                raise UserError(f"--{name} is a switch and takes no value")
            on.add(name)
            continue

        if not equals:
            if not words or words[0].startswith("--"):
                raise UserError(f"--{name} needs a value: --{name}={type_name(name, kind)}")
            text = words.pop(0)
        if name in REMOVED:
            drop_removed(name, None if text.strip().lower() == "none" else text, "command line")
        else:
            flags[name] = parse_value(name, text, kind)
    return flags, on, paths


def differences(settings: RunSettings, origins: dict[str, str]) -> list[str]:
    """Lines on the settings that differ from their defaults: value, default, origin, and why one has no effect.

    A flag without effect is listed even at its default.
    """
    lines = []
    for name, declared in fields_of(type(settings)).items():
        value, reason = getattr(settings, name), settings.no_effect_reason(name)
        if name == "rank_timeout" and world_size_from_env() == 1:
            reason = "rank_timeout has no effect on a single rank"
        if value == declared.default and not (reason and origins.get(name) == "command line"):
            continue
        line = f"{name} = {literal(value)} (default {literal(declared.default)}, from {origins.get(name, 'code')})"
        lines.append(f"{line}; note: {reason}" if reason else line)
    return lines


def find_no_effect(line: CommandLine, groups: tuple[str, ...] = ("data", "modalities")) -> list[str]:
    """A note for each setting of these groups that has no effect and was given as a flag, or not at its default."""
    fields, notes = fields_of(type(line.settings)), []
    for name, origin in line.origins.items():
        given = origin == "command line" or getattr(line.settings, name) != fields[name].default
        if given and fields[name].metadata["group"] in groups and (reason := line.settings.no_effect_reason(name)):
            notes.append(f"note: {reason} ({literal(getattr(line.settings, name))} from {origin})")
    return notes


# ---------------------------------------------------------------------------------------------------------------------
# writing: config.py, --help


def literal(value) -> str:
    """A value as a Python literal that reads back as itself; long integers with underscores."""
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)  # double quotes, and every escape of JSON is one of Python's too
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:_}" if abs(value) >= 10_000 else str(value)
    return repr(value)


def render_config(settings: RunSettings) -> str:
    """The text of a commented config.py in groups; read_config returns exactly these settings."""
    kind = type(settings)
    lines = [
        f"# Settings of one run, stage {kind.stage}: plain literals, read and never executed. None switches off.",
        "# Precedence: built-in default, then this file, then --name=value on the command line.",
    ]
    for group in kind.groups:
        lines += ["", "", f"# {'-' * 20} {group} {'-' * (96 - len(group))}"]
        for name in names_of(group, kind):
            note = settings.no_effect_reason(name)
            text = f"{describe_setting(name, kind)}{f' [{note}]' if note else ''}"
            lines += ["", *textwrap.wrap(text, 118, initial_indent="# ", subsequent_indent="# ")]
            lines.append(f"{name} = {literal(getattr(settings, name))}")
    return "\n".join(lines) + "\n"


def names_of(group: str, kind: type[RunSettings] = Settings) -> list[str]:
    """The settings of a group in the order of their declaration."""
    return [name for name, declared in fields_of(kind).items() if declared.metadata["group"] == group]


def describe_setting(name: str, kind: type[RunSettings] = Settings) -> str:
    """One line on a setting: its help, its choices, and when it has an effect."""
    data = fields_of(kind)[name].metadata
    parts = [data["help"]]
    if data["choices"]:
        parts.append(f"one of {', '.join(data['choices'])}")
    if data["when"]:
        other, wanted = data["when"]
        if isinstance(wanted, Like):
            parts.append(f"matters only with {other}={wanted.words}")
        else:
            values = () if wanted is ON else wanted if isinstance(wanted, tuple) else (wanted,)
            parts.append(f"matters only with {other}{'=' * bool(values)}{' or '.join(map(repr, values))}")
    return "; ".join(parts)


def help_text(usage: str, switches: tuple[str, ...] = (), kind: type[RunSettings] = Settings) -> str:
    """The text of --help: every setting by group, at 80 columns."""
    lines = [f"usage: {usage} [--name=value ...]{''.join(f' [--{s}]' for s in switches)}", ""]
    lines += textwrap.wrap(
        "Precedence: default, then the config file (./config.py when none is named), then flags. None switches off.", 79
    )
    for group in kind.groups:
        lines += ["", f"{group}:"]
        for name in names_of(group, kind):
            lines.append(f"  --{name}={type_name(name, kind)}")
            about = f"{describe_setting(name, kind)} (default {literal(fields_of(kind)[name].default)})"
            lines += textwrap.wrap(about, 79, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines)


def as_dict(settings: RunSettings) -> dict:
    """The settings as plain values, ready for JSON (tuples become lists)."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(settings).items()}
