"""Run the product on odd inputs: `python -m scripts.stress.inputs [--only WORDS] [--every N] [--keep FOLDER]`.

Encodings, line ends, compressed and foreign files, links, permissions, tables, wav headers, names, environments, output
streams, damaged checkpoints. Each case builds its input, runs the commands that a user would run on it, and has one
outcome: used with exact counts, or refused in one line with exit code 2 and a way out; never a traceback, never an
uncounted loss. Prints every case that ended otherwise and a table by kind; exit code 1 for any.
"""

import argparse
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from nanochat.runtime import run_script
from scripts.stress.inputs import checkpoints, environments, files, hub_folders, rows, sounds, texts
from scripts.stress.inputs.cases import Case, failure_of
from scripts.stress.inputs.processes import remove, run_case

KINDS = dict(
    texts=texts.cases,
    files=files.cases,
    rows=rows.cases,
    hub_folders=hub_folders.cases,
    sounds=sounds.cases,
    environments=environments.cases,
    checkpoints=checkpoints.cases,
)


def all_cases() -> list[tuple[str, Case]]:
    """(kind, case) of every case, in a fixed order."""
    found = [(kind, case) for kind, make in KINDS.items() for case in make()]
    names = [case.name for _, case in found]
    assert len(set(names)) == len(names), [name for name, n in Counter(names).items() if n > 1]
    return found


def check(case: Case, folder: Path, keep: bool = False) -> tuple[str | None, float]:
    """(what is wrong or None, seconds) of one case, run below `folder`."""
    begin = time.perf_counter()
    try:
        result = run_case(case, folder)
    except AssertionError as error:
        reason: str | None = str(error)
    else:
        reason = failure_of(case, result)
        if reason:
            reason += "".join(f"\n    {line}" for line in (result.output + result.errors).splitlines()[-8:])
    if not keep:
        remove(folder)
    return reason, time.perf_counter() - begin


def main(argv: list[str] | None = None) -> int:
    """Run the cases and print what became of them; returns the number of failures."""
    parser = argparse.ArgumentParser("scripts.stress.inputs", description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="cases whose kind and name hold this text")
    parser.add_argument("--every", type=int, default=1, help="every N-th case")
    parser.add_argument("--workers", type=int, default=2, help="cases at a time")
    parser.add_argument("--keep", type=Path, help="leave inputs and outputs in this folder")
    options = parser.parse_args(argv)
    chosen = [pair for pair in all_cases() if options.only in f"{pair[0]}: {pair[1].name}"][:: options.every]
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="check-inputs-") as scratch, ThreadPoolExecutor(options.workers) as pool:
        root = options.keep or Path(scratch)
        jobs = [pool.submit(check, case, root / f"{i:03d}", bool(options.keep)) for i, (_, case) in enumerate(chosen)]
        tried, failed = Counter(), Counter()
        for i, ((kind, case), job) in enumerate(zip(chosen, jobs, strict=True)):
            reason, seconds = job.result()
            tried[kind] += 1
            if reason:
                failed[kind] += 1
                print(f"FAILED {i:03d} {kind}: {case.name} ({seconds:.1f} s): {reason}", flush=True)
    print(f"\n{'kind':<14} cases  failed")
    for kind, number in [*tried.items(), ("all", sum(tried.values()))]:
        print(f"{kind:<14} {number:5}  {sum(failed.values()) if kind == 'all' else failed[kind]:6}")
    print(f"{time.perf_counter() - begin:.0f} s")
    return sum(failed.values())


if __name__ == "__main__":
    run_script(lambda: sys.exit(int(main() > 0)))
