"""From the command line to the training of a stage: what counts is settled, the folder locked, the device opened."""

import contextlib
import dataclasses
from collections.abc import Callable

import torch

from nanochat.checkpoint_manager import tag_dir
from nanochat.config_file import CommandLine, differences
from nanochat.resume import as_begun, begun_by_this_launcher, settle
from nanochat.run_lock import run_lock
from nanochat.runtime import Compute, UserError, first_line, init_compute, print0, rank_from_env, restarts_from_env
from nanochat.settings import RunSettings


def begin(command: CommandLine, train: Callable[[RunSettings, int | None, Compute], dict]) -> dict:
    """Settle what counts, lock the run's folder, open the device and train there; of any stage."""
    command = as_begun(command)
    folder = tag_dir(command.settings)
    # A launcher that starts the ranks of this very run anew means: go on.
    resume = "resume" in command.switches or (restarts_from_env() > 0 and begun_by_this_launcher(folder))
    with run_lock(folder, command.settings.ignore_lock) if rank_from_env() == 0 else contextlib.nullcontext():
        settings, resume_step = settle(command, resume)
        for line in differences(settings, command.origins):
            print0(f"  {line}")
        # Meant this once, not for who copies the config.
        settings = dataclasses.replace(settings, overwrite=False, ignore_lock=False)
        compute = init_compute(
            settings.device_type, settings.dtype, settings.seed, settings.deterministic, settings.rank_timeout
        )
        try:
            return train(settings, resume_step, compute)
        except torch.OutOfMemoryError as error:  # before the first step, or in a save
            raise UserError(f"out of memory: a smaller model fits ({first_line(error)})") from error
