"""How a setting is declared: default, help, group, legal values, when it has an effect, who may change it."""

import dataclasses
import functools
import math
import re
import typing
from collections.abc import Callable
from dataclasses import dataclass

from nanochat.runtime import shown
from nanochat.system.environment import UserError

ON = "on"  # in `when`: any value that is not in OFF
OFF = (None, False, 0, "disabled", "none", "L")


class IllegalCombination(UserError):
    """Settings that are legal one by one and not together: `name` is the one to change, `nearest` a legal value."""

    def __init__(self, name: str, nearest, message: str):
        super().__init__(message)
        self.name, self.nearest = name, nearest


def setting(
    default, help: str, group: str, *, ge=None, gt=None, le=None, choices=None, when=None, ask=False, resumable=False
):
    """Declare one setting: default, help (what it is, with the unit) and the section of config.py it belongs to.

    ge, gt, le         the legal range of a number: at least, more than, at most
    choices            the legal values of a text
    when               (name of another setting, its value, a tuple of values, Like or ON): it has an effect only then
    ask                whether the wizard asks for it, with a text as the question instead of the name
    resumable          whether --resume may change it
    """
    metadata = dict(help=help, group=group, ge=ge, gt=gt, le=le, choices=choices, when=when, ask=ask)
    return dataclasses.field(default=default, metadata={**metadata, "resumable": resumable})


def in_group(group: str) -> Callable:
    """setting() for the settings of one group, which follow one another."""
    return functools.partial(setting, group=group)


def redeclare(kind: type, name: str, default=dataclasses.MISSING, **metadata):
    """A field of another class with another default or other metadata; the rest as declared there."""
    declared = fields_of(kind)[name]
    kept = declared.default if default is dataclasses.MISSING else default
    return dataclasses.field(default=kept, metadata={**declared.metadata, **metadata})


def resumable_names(kind: type) -> set[str]:
    """The settings that a resumed run may change."""
    return {name for name, field in fields_of(kind).items() if field.metadata["resumable"]}


@functools.cache
def fields_of(kind: type) -> dict[str, dataclasses.Field]:
    """The declarations of a stage's settings by name."""
    return {field.name: field for field in dataclasses.fields(kind)}


@functools.cache
def types_of(kind: type) -> dict[str, object]:
    """The types of a stage's settings by name."""
    hints = typing.get_type_hints(kind)
    return {name: hints[name] for name in fields_of(kind)}


def check_number(name, value, kind, metadata, without=""):
    """The number as kind; UserError outside the legal range. without: what None would mean, for the message."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not -1.7e308 < value < 1.7e308:
        raise UserError(f"{name}={shown(value)} is not a finite number{without}")
    if kind is int and value != int(value):
        raise UserError(f"{name}={shown(value)} is not a whole number")
    low, above, high = metadata["ge"], metadata["gt"], metadata["le"]
    if low is not None and value < low:
        raise UserError(f"{name}={shown(value)} is too small: at least {low}{without}")
    if above is not None and value <= above:
        raise UserError(f"{name}={shown(value)} is too small: more than {above}{without}")
    if high is not None and value > high:
        raise UserError(f"{name}={shown(value)} is too large: at most {high}")
    return kind(value)


def nearest_divisor(number: int, wish: int) -> int:
    """The divisor of number that is closest to the wish; the smaller of two equally close ones."""
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return min(small + [number // n for n in small], key=lambda n: (abs(n - wish), n))


@dataclass(frozen=True)
class Like:
    """In `when`: any text that a pattern matches, ignoring case; words: the same for --help."""

    pattern: str
    words: str

    def matches(self, value) -> bool:
        return isinstance(value, str) and re.fullmatch(self.pattern, value, re.IGNORECASE) is not None


def meets(value, wanted) -> bool:
    """Whether a value fulfils the condition of a `when`."""
    if isinstance(wanted, Like):
        return wanted.matches(value)
    return value not in OFF if wanted is ON else value in (wanted if isinstance(wanted, tuple) else (wanted,))
