"""Talk to the wizard at random: `python -m scripts.stress.dialogues [--dialogues 10000] [--seed 0]`.

Each dialogue has its own stage, hardware, destination, answers and end, drawn from (seed, number): sensible, wrong and
absurd answers; input that ends, Ctrl-C at a question or inside the write, a full disk. Prints how they ended, every
traceback and every file that is neither the old one nor a whole config the wizard announced; exit code 1 for any.
"""

import argparse
import errno
import io
import os
import random
import sys
import tempfile
import time
import traceback
from collections import Counter
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from pathlib import Path
from unittest import mock

import torch

from nanochat.adapters import counts as adapter_counts
from nanochat.config.config_file import STAGES, read_config, render_config
from nanochat.config.declaration import fields_of
from nanochat.config.settings import RunSettings, preset
from nanochat.runtime import run_script
from nanochat.system.environment import UserError, base_dir
from nanochat.training.estimate import Hardware
from scripts import configure

WORDS = ["yes", "no", "y", "n", "None", "cpu", "gpu1", "8xh100", "keep", "cuda", "stdlib", "abc", "/", "..", "~", "~no"]
WORDS += ["llama", "tiny", "frozen", "trained", "none", "whole", "shared", "small", "0,2", "nanochat:", "meta:/", "a/b"]
NUMBERS = ["1", "2", "3", "64", "128", "256", "1000", "4096", "0.5", "1e4", "1_000", "-1", "0"]
ABSURD = [
    *("1e30", "1e400", "-1e400", "nan", "inf", "-inf", "-0", "9" * 19, "9" * 5000, "-" + "9" * 30, "0x10", "1e-400"),
    *("ключ", "名前", "\u202edlrow", "e\u0301" * 40, "\U0001f600", "٣", "１２", "\ufeffyes", "\u2028", "\x85"),
    *(
        "\t",
        "\x00",
        "a\x00b",
        "\x1b[2J",
        "\x07",
        "\x7f",
        "a\rb",
        "\x04",
        "\x1a",
        "x" * 300,
        "y" * 100_000,
        "../" * 2000,
    ),
    *("'", '"', "\\", "{}", "%s", "$(id)", "__import__('os')", "[1, 2", "None None", "hf:", "hf:" + "a/" * 200, "- -"),
]
HARDWARE = [
    Hardware("cpu", "a processor", 1, 16 << 30, 1e11, torch.float32),
    Hardware("cpu", "a small processor", 1, 700 << 20, 1e14, torch.float32),
    Hardware("cuda", "NVIDIA H100 80GB HBM3", 8, 80 << 30, 989e12, torch.bfloat16),
]
DESTINATIONS = (
    ["new"] * 4 + ["config"] * 2 + ["same", "damaged", "folder", "under a file", "long", "deep", "link", "read-only"]
)
BAD_BYTES = b"\xff\xfe"


class Keyboard(io.TextIOWrapper):
    """Standard input from bytes; after the last line it ends, or Ctrl-C is pressed."""

    def __init__(self, lines: list[bytes], interrupt: bool):
        super().__init__(io.BytesIO(b"".join(line + b"\n" for line in lines)), encoding="utf-8", newline="\n")
        self.left = len(lines) if interrupt else None

    def readline(self, size: int = -1) -> str:
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt
        return super().readline(size)


def answers(rng: random.Random) -> list[bytes]:
    """Up to 80 answers, nearly all Enter to nearly all noise, perhaps with consent behind them, perhaps cut off."""
    noise = rng.choice([0.02, 0.1, 0.5, 0.95])
    kinds = [["?", "<"], WORDS, NUMBERS, ABSURD, None]
    lines = []
    for _ in range(rng.choice([0, 5, 30, 80]) and rng.randrange(81)):
        kind = rng.choice(kinds) if rng.random() < noise else [""]
        text = rng.choice(kind) if kind else "".join(chr(rng.choice([rng.randrange(128), rng.randrange(0xD800)])))
        lines.append(text.replace("\n", " ").encode())
    if rng.random() < 0.02:
        lines.insert(rng.randrange(len(lines) + 1), BAD_BYTES)
    if rng.random() < 0.6:
        lines += [b""] * 90 + [b"yes"] * 3
    return lines[: rng.randrange(60)] if rng.random() < 0.3 else lines


def destination(kind: str, folder: Path, rng: random.Random, stage: type[RunSettings]) -> Path:
    """Prepare the folder for one kind of --output and return its path."""
    path = folder / "config.py"
    old = render_config(preset(rng.choice(list(stage.presets())), stage, seed=rng.randrange(100)))
    if kind in ("config", "read-only"):
        path.write_text(old)
    elif kind == "same":
        path.write_text(render_config(preset(next(iter(stage.presets())), stage)))
    elif kind == "damaged":
        path.write_text(rng.choice(["depth = 4\nwhat is this\n", "depth =", "", old[: len(old) // 2], "depth = 0\n"]))
    elif kind == "folder":
        path.mkdir()
    elif kind == "under a file":
        path.write_text("")
        return path / "config.py"
    elif kind == "long":
        return folder / ("x" * 300 + ".py")
    elif kind == "deep":
        return folder / "a" / "b" / "\u540d .py"
    elif kind == "link":
        (folder / "real.py").write_text(old)
        path.symlink_to("real.py")
    if kind == "read-only":  # root may write all the same
        path.chmod(0o444)
        folder.chmod(0o555)
    return path


def contents(folder: Path) -> dict[str, bytes | str]:
    """Every name under the folder, with a file's bytes or a link's target."""
    return {
        str(path.relative_to(folder)): os.readlink(path) if path.is_symlink() else path.read_bytes()
        for path in folder.rglob("*")
        if path.is_symlink() or path.is_file()
    }


def host_counts(rng: random.Random):
    """Stands for parameter_counts(): no host is here, and none is looked for on the hub."""
    kinds = ("host", "experts", "adapters", "audio embedding", "audio output", "whole output", "trained")
    count = {kind: rng.randrange(10**9) for kind in kinds}
    count["total"] = sum(count.values())
    return mock.Mock(side_effect=None if rng.random() < 0.7 else UserError("no such host"), return_value=count)


def one(rng: random.Random, folder: Path) -> tuple[str, str | None, str | None]:
    """One dialogue in an empty folder: how it ended, its traceback and what is wrong with the files, if any."""
    stage, other = rng.sample(list(STAGES.values()), 2)
    path = destination(rng.choice(DESTINATIONS), folder, rng, other if rng.random() < 0.03 else stage)
    before = contents(folder)
    hardware, measured = rng.choice(HARDWARE), rng.choice([1e10, torch.OutOfMemoryError("out of memory")])
    argv = [f"--output={path}", f"--stage={stage.stage}"]
    if rng.random() < 0.3:
        argv.append(f"--preset={rng.choice(list(stage.presets()))}")
    if rng.random() < 0.1:
        argv.append(f"--set={rng.choice(list(fields_of(stage)))}={rng.choice(NUMBERS + WORDS + ABSURD)}")
    fault = rng.choice([KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
    faulty = rng.choice(["os.fsync", "os.replace"]) if rng.random() < 0.15 else None
    out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    result = problem = None
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(configure, "find_hardware", lambda device_type=None: hardware))
        stack.enter_context(mock.patch.object(configure, "measure", mock.Mock(side_effect=[measured] * 1000)))
        stack.enter_context(mock.patch.object(adapter_counts, "parameter_counts", host_counts(rng)))
        if faulty:
            stack.enter_context(mock.patch(faulty, side_effect=fault))
        stack.enter_context(mock.patch.object(sys, "stdin", Keyboard(answers(rng), rng.random() < 0.4)))
        stack.enter_context(redirect_stdout(out))
        stack.enter_context(redirect_stderr(out))
        try:
            result = configure.main(argv)
            end = "declined" if result is None else "already so" if contents(folder) == before else "written"
        except UserError as error:
            end = "end of input" if str(error).startswith("the input") else "refused"
        except KeyboardInterrupt:
            end = "Ctrl-C"
        except Exception:  # what is looked for
            end, problem = "traceback", traceback.format_exc()
    folder.chmod(0o755)
    return end, problem, damage(folder, path, before, result)


def damage(folder: Path, path: Path, before: dict, result: RunSettings | None) -> str | None:
    """What is wrong with the files after a dialogue that announced this result; None when all is well."""
    after = contents(folder)
    if result is None:
        return None if after == before else f"changed without consent: {sorted(after.items() ^ before.items())}"
    target = str(Path(os.path.realpath(path)).relative_to(os.path.realpath(folder)))
    others = {k: v for k, v in after.items() if k != target}
    if others != {k: v for k, v in before.items() if k != target}:
        return f"other files changed: {sorted(others)}"
    try:
        kind = type(result)
        whole = kind(**read_config(path, kind)) == result and after[target] == render_config(result).encode()
    except (UserError, KeyError, OSError) as error:
        return f"not a config: {error}"
    return None if whole else "not the config that was agreed to"


def talk(dialogues: int, seed: int) -> Counter:
    """Hold that many dialogues; counts by their end, plus "tracebacks" and "half-written files" (both printed)."""
    counts = Counter({"tracebacks": 0, "half-written files": 0})
    base_dir().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="dialogues-", dir=base_dir()) as scratch:
        for number in range(dialogues):
            folder = Path(scratch) / str(number)
            folder.mkdir()
            end, problem, wrong = one(random.Random(f"{seed}/{number}"), folder)
            counts[end] += 1
            counts["tracebacks"] += problem is not None
            counts["half-written files"] += wrong is not None
            for finding in filter(None, (problem, wrong)):
                print(f"dialogue {number} of seed {seed}: {finding}", flush=True)
    return counts


def main(argv: list[str] | None = None) -> Counter:
    """Hold the dialogues and print the counts; leaves with 1 when there was a traceback or a half-written file."""
    parser = argparse.ArgumentParser(prog="scripts.stress.dialogues", description=__doc__.splitlines()[0])
    parser.add_argument("--dialogues", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    start = time.perf_counter()
    counts = talk(arguments.dialogues, arguments.seed)
    bad = {name: counts.pop(name) for name in ("tracebacks", "half-written files")}
    print(f"dialogues: {arguments.dialogues:,}, seed {arguments.seed}, {time.perf_counter() - start:.0f} seconds")
    for name, count in [*counts.most_common(), *bad.items()]:
        print(f"{name}: {count:,}")
    if any(bad.values()):
        sys.exit(1)
    return counts


if __name__ == "__main__":
    run_script(main)
