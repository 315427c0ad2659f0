"""Command lines of the scripts that take no settings."""

import argparse
import math
import sys

from nanochat.runtime import UserError


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


def number(kind: type, least: float):
    """A type for add_argument: a finite number of at least so much."""

    def convert(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not least <= value < 1e9:
            raise argparse.ArgumentTypeError(f"{text!r} is not a {'whole ' * (kind is int)}number of at least {least}")
        return value

    return convert


def temperature(text: str) -> float:
    """0, which takes the likeliest, or a number that logits can be divided by."""
    value = number(float, 0)(text)
    if 0 < value < 1e-3:
        raise argparse.ArgumentTypeError(f"{text!r} is neither 0 nor at least 0.001")
    return value
