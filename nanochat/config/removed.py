"""Settings of version 0.1.0 that are gone, because nothing was gained by them (dev/LOG.md).

A config.py or a checkpoint may still name one. Where the value had no effect a line says so; any other value belongs
to a run that only version 0.1.0 can train.
"""

import logging

from nanochat.runtime import shown
from nanochat.system.environment import UserError

logger = logging.getLogger(__name__)

REMOVED = {"batch_start": None}  # and the value that had no effect
REMOVED_VALUES = {"route": ("slice",), "untie": ("random",)}  # of settings that are still there


def drop_removed(name: str, value, origin: str) -> bool:
    """Whether this is a removed setting at the value without effect, which is logged; UserError at any other value.

    origin: where it stands, as in config.py:12.
    """
    if name not in REMOVED:
        return False
    if value is not REMOVED[name]:
        raise UserError(f"{removed_since(name, value)} ({origin}): remove it, or train with version 0.1.0")
    logger.info(f"{origin}: {name} = {value} has no effect: the setting was removed after version 0.1.0")
    return True


def check_removed_value(name: str, value) -> None:
    """UserError for a value that a setting had in version 0.1.0 only."""
    if value in REMOVED_VALUES.get(name, ()):
        raise UserError(f"{removed_since(name, value)}: choose another value, or train with version 0.1.0")


def removed_since(name: str, value) -> str:
    return f"{name}={shown(value)} was removed after version 0.1.0"
