"""Sends the lines of metrics.jsonl to wandb; started by tracker.py, imports nothing of ours to start quickly.

Its argument is a JSON object: init (arguments of wandb.init), path and offset (where to begin in the file, bytes). It
follows the file until its standard input ends, then finishes the run. It prints where the run is, or one line
`error: ...`; wandb's own messages go to standard error.
"""

import json
import os
import select
import signal
import sys
import traceback
from contextlib import suppress

POLL_SECONDS = 0.5
NOT_FINITE = {"nan": float("nan"), "inf": float("inf"), "-inf": float("-inf")}


def numbers(line: dict) -> dict:
    """What a tracker can draw: the numbers of a line without its step and time, "nan" and "inf" among them."""
    values = {
        k: NOT_FINITE.get(v, v) if isinstance(v, str) else v for k, v in line.items() if k not in ("step", "time")
    }
    return {k: v for k, v in values.items() if isinstance(v, (int, float))}


def follow(path: str, offset: int, run) -> None:
    """Log every complete line from `offset` on, until our input has ended and all is read."""
    with open(path, "rb") as file:
        file.seek(offset)
        rest, ended = b"", False
        while not ended:
            ended = bool(select.select([0], [], [], POLL_SECONDS)[0])  # before reading: nothing comes after the end
            *lines, rest = (rest + file.read()).split(b"\n")
            for line in map(json.loads, lines):
                if values := numbers(line):
                    run.log(values, step=line["step"])


def main() -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)  # they are for the run, which ends us by ending our input
    # Ours alone: wandb's service inherits what is called 1, and would keep the pipe open when we are gone.
    out = os.dup(1)
    os.dup2(2, 1)

    def say(text: str) -> None:
        with suppress(BrokenPipeError):  # the run was killed: what it wrote is sent all the same
            os.write(out, f"{' '.join(text.split())[:500]}\n".encode())

    try:
        facts = json.loads(sys.argv[1])
        import wandb  # heavy: only here

        run = wandb.init(**facts["init"])
        say(run.url or f"offline run in {os.path.dirname(run.dir)}")
        follow(facts["path"], facts["offset"], run)
        run.finish()
    except Exception as error:  # whatever it is: the training process logs it and continues
        traceback.print_exc()
        say(f"error: {type(error).__name__}: {error}")
        os._exit(1)  # past wandb's exit hooks, which may wait for ever


if __name__ == "__main__":
    main()
