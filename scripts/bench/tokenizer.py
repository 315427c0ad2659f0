"""What text without blanks costs a tokenizer: training and encoding over its size, and the memory of one long line.

`python -m scripts.bench tokenizer [--kinds dna,chinese] [--megabytes 1,2,4] [--line_megabytes 1000]`. A time that is
linear doubles with the size. The baseline is the pattern that bounds white space alone, on sizes it can manage. The
line goes the whole way: tok_train, then base_train, each in a process of its own whose peak memory the system counts.
"""

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from nanochat.data.tokenizer import SPLIT_PATTERN, Tokenizer
from nanochat.system.environment import UserError
from scripts.bench.timing import table

MB = 1_000_000
UNBOUNDED = (
    r"'(?:[sdmtSDMT]|[lL]{2}|[vV][eE]|[rR][eE])"
    r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s{0,256}[\r\n]+|\s{1,256}(?!\S)|\s"
)
KINDS = {  # name -> characters to draw from
    "dna": "ACGT",
    "chinese": "".join(map(chr, range(0x4E00, 0x4E00 + 3000))),
    "thai": "".join(map(chr, range(0x0E01, 0x0E2F))) + "".join(map(chr, range(0x0E30, 0x0E3A))),
    "marks": "".join(map(chr, range(0x0300, 0x0370))),
    "emoji": "".join(map(chr, range(0x1F600, 0x1F640))),
    "signs": "^=-#*~",
    "newlines": "\n\r",
    "NULs": "\0",
    "one letter": "a",
    "words": "etaoinshrdlu   ",
}
SMALL = (20_000, 40_000)  # bytes at which the unbounded pattern is timed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--kinds", default=",".join(KINDS), help="of text, with commas")
    parser.add_argument("--megabytes", default="1,2,4", help="sizes of a text in one line, in UTF-8")
    parser.add_argument("--vocab", type=int, default=4096, help="ids to train, fewer where the text has fewer merges")
    parser.add_argument("--line_megabytes", type=int, default=1000, help="size of the long line; 0 leaves it out")


def run(args: argparse.Namespace) -> dict:
    """Print the tables; returns {"times": {kind: {...}}, "line": {...}}; each time is of one run (--rounds is 1)."""
    kinds = args.kinds.split(",")
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        raise UserError(f"--kinds {unknown[0]!r} is unknown: some of {','.join(KINDS)}")
    sizes = [float(size) for size in args.megabytes.split(",")]
    found, rows = {}, []
    for kind in kinds:
        one = found[kind] = measure(kind, sizes, args.vocab)
        for row in one["sizes"]:
            rows.append((kind, f"{row['megabytes']:g} MB", row["train"], row["encode"], row["growth"]))
        print(f"{kind}: done", flush=True)
    print(table(("text", "size", "train s", "encode s", "train s, over the size before"), rows))
    print(f"unbounded pattern, {SMALL[0]:,} and {SMALL[1]:,} bytes: train s, ratio; bounded: ratio")
    print(table(("text", "small", "large", "ratio", "bounded"), [(kind, *found[kind]["small"]) for kind in kinds]))
    result: dict = dict(times=found)
    if args.line_megabytes:
        result["line"] = long_line(args.line_megabytes)
        rows = [(name, one["seconds"], one["megabytes"], one["ratio"]) for name, one in result["line"].items()]
        print(f"a line of {args.line_megabytes:,} MB of dna:")
        print(table(("process", "seconds", "peak MB", "times the line"), rows))
    return result


def draw(kind: str, size: int, seed: int = 0) -> str:
    """A text of `size` bytes of UTF-8, or a character less, in one line."""
    alphabet = KINDS[kind]
    return "".join(random.Random(seed).choices(alphabet, k=size // len(alphabet[0].encode())))


def measure(kind: str, sizes: list[float], vocab: int) -> dict:
    """{"sizes": seconds to train and encode at each, "small": unbounded seconds at SMALL, ratio, bounded ratio}."""
    rows: list[dict] = []
    for megabytes in sizes:
        text = draw(kind, int(megabytes * MB))
        seconds, tokenizer = train(text, vocab)
        start = time.perf_counter()
        tokenizer.encode(text)
        encode = time.perf_counter() - start
        growth = seconds / rows[-1]["train"] if rows else float("nan")
        rows.append(dict(megabytes=megabytes, train=seconds, encode=encode, growth=growth))
    short = [draw(kind, size) for size in SMALL]
    bounded = [train(text, 300)[0] for text in short]
    unbounded = [train(text, 300, UNBOUNDED)[0] for text in short]
    return dict(sizes=rows, small=(*unbounded, unbounded[1] / unbounded[0], bounded[1] / bounded[0]))


def train(text: str, vocab: int, pattern: str = SPLIT_PATTERN) -> tuple[float, Tokenizer]:
    """(seconds, tokenizer) of training under a pattern; a text with too few merges for vocab gives all it has."""
    start = time.perf_counter()
    try:
        tokenizer = Tokenizer.train([text], vocab, pattern=pattern)
    except UserError as error:
        most = int(str(error).rpartition("vocab_size=")[2].split()[0])
        start = time.perf_counter()
        tokenizer = Tokenizer.train([text], most, pattern=pattern)
    return time.perf_counter() - start, tokenizer


def long_line(megabytes: int) -> dict[str, dict[str, float]]:
    """{process: seconds, peak megabytes, their ratio to the line's} of one .txt without a newline, all the way."""
    found = {}
    with tempfile.TemporaryDirectory(prefix="bench-line-") as folder:
        path = Path(folder) / "line.txt"
        letters, generator = np.frombuffer(KINDS["dna"].encode(), np.uint8), np.random.default_rng(0)
        with open(path, "wb") as file:
            for _ in range(megabytes):
                file.write(letters[generator.integers(len(letters), size=MB)].tobytes())
        flags = [f"--data={path}", "--depth=2", "--max_seq_len=64", "--device_batch_size=2", "--total_batch_size=128"]
        flags += ["--num_iterations=4", "--compile=False", "--eval_tokens=1000"]
        environment = os.environ | {"NANOCHAT_BASE_DIR": folder}
        for script in ("tok_train", "base_train"):
            start = time.perf_counter()
            command = [sys.executable, "-m", f"scripts.{script}", *flags]
            process = subprocess.Popen(command, env=environment)
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            if process.returncode:
                raise UserError(f"scripts.{script} ended with {process.returncode}: see its message above")
            peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / MB
            found[script] = dict(seconds=time.perf_counter() - start, megabytes=peak, ratio=peak / megabytes)
    return found
