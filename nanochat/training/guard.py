"""The step guard: non-finite steps are skipped and counted, spikes of loss and gradient norm are reported."""

import itertools
import json
import math
import statistics
from collections import deque
from pathlib import Path

from nanochat.files import write_atomically

MAX_BAD_STEPS = 10  # non-finite steps in a row that end a run
WINDOW = 50  # finite steps that the next one is compared with
SPIKE_DEVIATIONS = 8.0  # robust standard deviations above the median
SPIKE_RATIO = 1.1  # and at least this much above it: early on, and on tiny data, the deviations are tiny too


class StepGuard:
    """Checks loss and gradient norm of every step, which are the same numbers on all ranks.

    Use: check() at each step; then find_spikes() after a finite one, record_skipped() after any other.
    """

    def __init__(self, bad_before: int = 0):
        """bad_before: non-finite steps in a row just before the checkpoint that the run resumes from."""
        self.bad_before = bad_before
        self.recent = {"loss": deque(maxlen=WINDOW), "grad_norm": deque(maxlen=WINDOW)}
        self.last: dict = {}  # the arguments of check()
        self.bad: list[dict] = []  # the non-finite steps since the last finite one

    def check(self, step: int, loss: float, grad_norm: float, norms: dict[str, float]) -> bool:
        """Whether the update of this step may be made. norms: of each group's gradient."""
        self.last = dict(step=step, loss=loss, grad_norm=grad_norm, norms=norms)
        return math.isfinite(loss) and math.isfinite(grad_norm)

    def record_skipped(self, rows: list[dict]) -> bool:
        """Record the last step as non-finite, with the rows of its whole batch; True when the run has to end."""
        self.bad.append({**self.last, "rows": rows})
        del self.bad[:-MAX_BAD_STEPS]
        return self.bad_before + len(self.bad) >= MAX_BAD_STEPS

    def find_spikes(self) -> dict[str, float]:
        """The outliers of the last step, a finite one: {"loss" or "grad_norm": median of the steps before}."""
        self.bad.clear()
        self.bad_before = 0
        found = {}
        for name, recent in self.recent.items():
            value = self.last[name]
            if len(recent) >= WINDOW // 2:
                median = statistics.median(recent)
                # From step to step, since the loss falls; 1.4826 x MAD estimates their sigma, sqrt(2) times a step's.
                noise = 1.4826 / 2**0.5 * statistics.median(abs(b - a) for a, b in itertools.pairwise(recent))
                if value > max(median + SPIKE_DEVIATIONS * noise, median * SPIKE_RATIO):
                    found[name] = median
            recent.append(value)
        return found

    def write_report(self, path: Path) -> None:
        """bad_batch.json: step, loss, norms and rows of the last non-finite step, and those before it in a row."""
        records = [_replace_non_finite(record) for record in self.bad]
        write_atomically(path, json.dumps({**records[-1], "earlier": records[:-1]}, indent=1) + "\n")


def _replace_non_finite(value):
    """NaN and infinities as strings, which JSON lacks."""
    if isinstance(value, dict):
        return {key: _replace_non_finite(inner) for key, inner in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
