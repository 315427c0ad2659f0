"""Command lines of the scripts that take no settings."""

import argparse
import math
import os
import shlex
import sys
from pathlib import Path

from nanochat.system.environment import UserError


class Parser(argparse.ArgumentParser):
    """argparse with our manners: no abbreviations, underscores count as dashes, a mistake is a UserError."""

    def __init__(self, module: str, doc: str):
        super().__init__(prog=f"python -m {module}", description=doc.split("\n")[0], allow_abbrev=False)

    def error(self, message: str):
        raise UserError(f"{message} (see --help)")

    def parse(self, argv: list[str] | None) -> argparse.Namespace:
        argv = sys.argv[1:] if argv is None else argv
        words = []
        for word in argv:
            name, equals, value = word.partition("=")
            words.append(name.replace("_", "-") + equals + value if word.startswith("--") else word)
        return self.parse_args(words)


def number(kind: type, least: float, most: float = 999_999_999, off: str | None = None):
    """A type for add_argument: a finite number from least to most. off: what None stands for, where that is allowed."""
    wanted = f"{'whole ' * (kind is int)}number of at least {least}{f', or None: {off}' if off else ''}"

    def convert(text: str):
        if off and text.lower() == "none":
            return None
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if value > most:
            raise argparse.ArgumentTypeError(f"{text!r} is larger than {most:,}")
        if not least <= value:
            raise argparse.ArgumentTypeError(f"{text!r} is not a {wanted}")
        return value

    return convert


seed = number(int, 0, most=2**63 - 1)  # a type for add_argument, with the bounds of the setting


def prompt(text: str) -> str:
    """A type for add_argument: text, as UTF-8 where the locale made something else of its bytes."""
    try:
        return os.fsencode(text).decode("utf-8") if any("\ud800" <= c <= "\udfff" for c in text) else text
    except UnicodeError as error:
        raise argparse.ArgumentTypeError(f"{text!a} is not UTF-8") from error


def temperature(text: str) -> float:
    """0, which takes the likeliest, or a number that logits can be divided by."""
    value = number(float, 0)(text)
    if 0 < value < 1e-3:
        raise argparse.ArgumentTypeError(f"{text!r} is neither 0 nor at least 0.001")
    return value


def typed(path: str | Path) -> str:
    """A path as one types it into a shell here: quoted, relative when it lies below this folder."""
    path, here = Path(path), Path.cwd()
    return shlex.quote(str(path.relative_to(here) if path.is_relative_to(here) else path))
