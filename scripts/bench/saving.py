"""What saving in the background costs: segments of training steps with and without a save, alternating in one process.

`python -m scripts.bench.saving [--preset cpu] [--rounds 9] [--steps 50]`: random tokens, one micro-batch a step.
"none" and "control" are the same, without a save; "background" saves at its first step and waits at its end, as
base_train does; the time of a save that the training would wait for is told beside. Ratios are to "none" of the same
round, whose order turns from round to round.
"""

import argparse
import logging
import statistics
import tempfile
import time
from pathlib import Path

from nanochat.config.settings import preset
from nanochat.runtime import run_script
from nanochat.system.environment import UserError, base_dir
from nanochat.training.background_saver import BackgroundSaver
from scripts.bench.train import Contender

logger = logging.getLogger("nanochat")

ARMS = ("none", "control", "background")
KEEP_LAST = 2  # so that a save also verifies and prunes


def segment(variant: Contender, saver: BackgroundSaver | None, number: int, steps: int) -> float:
    """Seconds of so many steps, with a save at the first one when there is a saver."""
    start = time.perf_counter()
    if saver is not None:
        save(variant, saver, number)
    for _ in range(steps):
        variant.step()
        if saver is not None:
            saver.poll()
    if saver is not None:
        saver.wait()
    return time.perf_counter() - start


def save(variant: Contender, saver: BackgroundSaver, number: int) -> None:
    saver.save(number, variant.model.state_dict().items(), variant.optimizer.state_items(), {"settings": {}})


def main(argv: list[str] | None = None) -> dict[str, list[float]]:
    """Print the table; returns the ratios of "control" and "background" to "none" by round."""
    parser = argparse.ArgumentParser(prog="scripts.bench.saving", description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="cpu")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=50)
    arguments = parser.parse_args(argv)
    if arguments.rounds < 1 or arguments.steps < 1:
        raise UserError(f"--rounds {arguments.rounds} --steps {arguments.steps}: at least 1 of each")
    variant = Contender(preset(arguments.preset))
    variant.step()
    seconds: dict[str, list[float]] = {arm: [] for arm in ARMS}
    base_dir().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=base_dir()) as folder:  # on the disk that real runs save to
        saver = BackgroundSaver(Path(folder), KEEP_LAST, None)
        waited = []
        for number in range(1, 4):  # the first has memory and files to make
            start = time.perf_counter()
            save(variant, saver, number)
            saver.wait()
            waited.append(time.perf_counter() - start)
        for number in range(arguments.rounds):
            turn = number % len(ARMS)
            for arm in ARMS[turn:] + ARMS[:turn]:
                busy = saver if arm == "background" else None
                seconds[arm].append(segment(variant, busy, 4 + number, arguments.steps))
            logger.info(
                f"round {number + 1}: " + ", ".join(f"{arm} {times[-1]:.2f} s" for arm, times in seconds.items())
            )
    ratios = {
        arm: [a / b for a, b in zip(seconds[arm], seconds["none"], strict=True)] for arm in ("control", "background")
    }
    logger.info(f"{arguments.rounds} rounds of {arguments.steps} steps; ratio to none of the same round")
    logger.info(f"{'arm':<12}{'s, median':>10}{'min':>8}{'max':>8}{'ratio':>9}{'min':>8}{'max':>8}")
    for arm in ARMS:
        row = f"{arm:<12}{statistics.median(seconds[arm]):>10.2f}{min(seconds[arm]):>8.2f}{max(seconds[arm]):>8.2f}"
        if arm in ratios:
            row += f"{statistics.median(ratios[arm]):>9.4f}{min(ratios[arm]):>8.4f}{max(ratios[arm]):>8.4f}"
        logger.info(row)
    logger.info(f"a save that is waited for: {statistics.median(waited):.3f} s")
    return ratios


if __name__ == "__main__":
    run_script(main)
