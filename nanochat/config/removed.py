"""Settings of version 0.1.0 that were removed because they gained nothing (dev/LOG.md).

A config.py, a flag or a checkpoint may still name one. A value that had no effect is dropped with one message; any
other value belongs to a run that only version 0.1.0 can train.
"""

import functools
import logging

from nanochat.runtime import shown
from nanochat.system.environment import UserError

logger = logging.getLogger(__name__)

REMOVED = {"batch_start": None}  # name: the value that had no effect
REMOVED_VALUES = {"route": ("slice",), "untie": ("random",)}  # of settings that are still there


def drop_removed(name: str, value, origin: str) -> bool:
    """Whether this is a removed setting at its value without effect; UserError at any other value.

    origin: where it was read, for the error, as in config.py:12.
    """
    if name not in REMOVED:
        return False
    if value is not REMOVED[name]:
        raise UserError(f"{removed_since(name, value)} ({origin}): remove it, or train with version 0.1.0")
    log_removed(name)
    return True


@functools.cache
def log_removed(name: str) -> None:
    """One message per process, since a run's config.py and its checkpoint both name the setting."""
    logger.info(f"{name} = {REMOVED[name]} has no effect: the setting was removed after version 0.1.0")


def check_removed_value(name: str, value) -> None:
    """UserError for a value that a setting had in version 0.1.0 only."""
    if value in REMOVED_VALUES.get(name, ()):
        raise UserError(f"{removed_since(name, value)}: choose another value, or train with version 0.1.0")


def removed_since(name: str, value) -> str:
    return f"{name}={shown(value)} was removed after version 0.1.0"
