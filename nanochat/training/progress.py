"""What a person sees while training: one line that lives on a terminal, plain lines everywhere else."""

import logging
import time

from nanochat.system import streams
from nanochat.system.environment import rank_from_env

logger = logging.getLogger(__name__)


def duration(seconds: float) -> str:
    """Seconds as 41s, 3m20s or 2h05m."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds}s"
    return (
        f"{seconds // 60}m{seconds % 60:02d}s" if seconds < 3600 else f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"
    )


class Progress:
    """Loss, held-out figures, speed, MFU and time left of a run of `steps` steps; use as a context manager."""

    def __init__(self, steps: int, plain_every: float = 10.0):
        self.steps, self.plain_every = steps, plain_every
        self.status = None
        self.logged_at = 0.0

    def __enter__(self) -> "Progress":
        if rank_from_env() == 0 and streams.on_terminal():
            try:
                from rich.console import Console
            except ImportError:
                logger.info("rich is not installed: progress in plain lines")
            else:
                self.status = Console().status("first step (compiling) ...", spinner="line")
                self.status.start()
        return self

    def __exit__(self, *_) -> None:
        if self.status is not None:
            self.status.stop()

    def update(self, step: int, loss: float, figures: dict, tok_per_sec: float, mfu: float, eta: float) -> None:
        """Show the state after `step` steps; plain lines come every few seconds and for the first and last.

        figures: what was measured on held-out data by name, as {"val_bpb": 1.4}; None: not yet.
        """
        known = {name.removeprefix("val_"): value for name, value in figures.items() if value is not None}
        measured = "".join(f" | {name} {value:.4f}" for name, value in known.items())
        line = (
            f"step {step:5d}/{self.steps} | loss {loss:.4f}{measured} | {tok_per_sec:,.0f} tok/s | "
            f"MFU {100 * mfu:.1f}% | {duration(eta)} left"
        )
        if self.status is not None:
            self.status.update(line)
        elif step in (1, self.steps) or time.monotonic() - self.logged_at > self.plain_every:
            self.logged_at = time.monotonic()
            logger.info(line)
