"""From the command line to the training of a stage: settings resolved, folder locked, ranks agreed, device opened."""

import contextlib
import dataclasses
import logging
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch

from nanochat.checkpoint_files import find_corruption, own_steps, read_manifest, step_dir, step_of
from nanochat.checkpoint_manager import tag_dir
from nanochat.config.config_file import CommandLine, as_dict, differences
from nanochat.config.settings import RunSettings, checked
from nanochat.runtime import LONG_TIMEOUT, Compute, first_line, init_compute
from nanochat.system import logs
from nanochat.system.environment import UserError, restarts_from_env, under_torchrun
from nanochat.training.rank_agreement import Meeting, refuse_differences, source_hashes
from nanochat.training.resume import Origin, apply_init_from, is_own_torchrun, read_origin, resolve_run
from nanochat.training.run_lock import run_lock

logger = logging.getLogger(__name__)


def launch(read: Callable[[], CommandLine], train: Callable[[RunSettings, Origin | None, Compute], dict]) -> dict:
    """Read the command line, resolve the run, lock its folder, open the device and train there; of any stage.

    Rank 0 decides which settings and which step count. The others have to have been started with the same settings
    and code, and to hold that very step; SharedError on all ranks otherwise.
    """
    meeting = Meeting(RunSettings.rank_timeout)

    def read_command() -> CommandLine:
        command = read()
        logs.set_log_level(command.settings.log_level)
        # torchrun starts every rank and ends all when one fails; by hand nobody does.
        least = RunSettings.rank_timeout if under_torchrun() else 0
        meeting.timeout = timedelta(seconds=max(command.settings.rank_timeout, least))
        return command

    with contextlib.ExitStack() as held:
        command, reports = meeting.share(read_command, started_with)
        refuse_differences("how to train", reports)
        decided, reports = meeting.share(
            lambda: decide(command, held) if meeting.rank == 0 else None, decision_facts, LONG_TIMEOUT
        )
        decision = reports[0]["facts"]
        (settings, origin), _ = meeting.share(lambda: decided or follow(command, decision), timeout=LONG_TIMEOUT)
        logs.set_log_level(settings.log_level)  # of a resumed run: the checkpoint's, unless given anew
        # Meant this once, not for who copies the config.
        settings = dataclasses.replace(settings, overwrite=False, ignore_lock=False)
        compute = init_compute(
            settings.device_type, settings.dtype, settings.seed, settings.deterministic, settings.rank_timeout
        )
        try:
            return train(settings, origin, compute)
        except torch.OutOfMemoryError as error:  # before the first step, or in a save
            raise UserError(f"out of memory: a smaller model fits ({first_line(error)})") from error


def started_with(command: CommandLine) -> dict:
    """What a rank was started with, as JSON values by name."""
    return as_dict(command.settings) | {"--resume": "resume" in command.switches} | source_hashes()


def decide(command: CommandLine, held: contextlib.ExitStack) -> tuple[RunSettings, Origin | None]:
    """On rank 0: lock the run's folder, then the settings and the checkpoint to start from."""
    command, initial = apply_init_from(command)
    folder = tag_dir(command.settings)
    # A launcher that restarts the ranks of this very run wants it to resume.
    resume = "resume" in command.switches or (restarts_from_env() > 0 and is_own_torchrun(folder))
    held.enter_context(run_lock(folder, command.settings.ignore_lock))
    settings, origin = resolve_run(command, resume, initial)
    held.enter_context(logs.run_log(folder / "run.log", settings.log_level))
    for line in differences(settings, command.origins):
        logger.info(f"  {line}")
    return settings, origin


def decision_facts(decided: tuple[RunSettings, Origin | None] | None) -> dict:
    """What rank 0 decided, for the others: settings, the step to resume from and the hashes of that step's files."""
    if decided is None:
        return {}
    settings, origin = decided
    resumed = origin is not None and origin.resumed
    return {
        "settings": as_dict(settings),
        "step": origin.step if resumed else None,
        "files": read_manifest(origin.path) if resumed else None,
    }


def follow(command: CommandLine, decision: dict) -> tuple[RunSettings, Origin | None]:
    """Rank 0's settings, and the checkpoint to start from as this rank holds it.

    UserError when this rank does not hold the step that rank 0 resumes from, complete and with the same bytes.
    """
    kind = type(command.settings)
    settings = kind(**{name: checked(name, value, kind) for name, value in decision["settings"].items()})
    if decision["step"] is not None:
        check_step(step_dir(tag_dir(settings), decision["step"]), decision["files"])
    return settings, read_origin(settings, decision["step"])


def check_step(folder: Path, files: dict[str, str]) -> None:
    """UserError when the step folder of this rank is not that of rank 0, complete and with the same bytes.

    files: sha256 by file name of rank 0's.
    """
    hint = "copy rank 0's step there, or let all ranks share one NANOCHAT_BASE_DIR"
    if reason := find_corruption(folder):
        there = "" if folder.is_dir() else f" (steps there: {own_steps(folder.parent) or 'none'})"
        raise UserError(
            f"rank 0 resumes from step {step_of(folder)}, {folder} is not complete here: {reason}{there}: {hint}"
        )
    if (here := read_manifest(folder)) != files:
        names = [name for name in sorted({*here, *files}) if here.get(name) != files.get(name)]
        raise UserError(f"{folder} is not the step that rank 0 resumes from: {', '.join(names)} differ: {hint}")
