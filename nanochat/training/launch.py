"""From the command line to the training of a stage: settings resolved, folder locked, ranks agreed, device opened."""

import contextlib
import dataclasses
import logging
from collections.abc import Callable
from datetime import timedelta

import torch

from nanochat.checkpoint_files import find_corruption, own_steps, read_manifest, step_dir
from nanochat.checkpoint_manager import tag_dir
from nanochat.config.config_file import CommandLine, as_dict, differences
from nanochat.config.settings import RunSettings, checked
from nanochat.runtime import LONG_TIMEOUT, Compute, first_line, init_compute
from nanochat.system import logs
from nanochat.system.environment import UserError, restarts_from_env, under_torchrun
from nanochat.training.rank_agreement import Meeting, refuse_differences, source_hashes
from nanochat.training.resume import apply_init_from, is_own_torchrun, resolve_run
from nanochat.training.run_lock import run_lock

logger = logging.getLogger(__name__)


def launch(read: Callable[[], CommandLine], train: Callable[[RunSettings, int | None, Compute], dict]) -> dict:
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
        settings, resume_step = decided or follow(command, reports[0]["facts"])
        logs.set_log_level(settings.log_level)  # of a resumed run: the checkpoint's, unless given anew
        meeting.share(lambda: check_step(settings, reports[0]["facts"], meeting.rank), timeout=LONG_TIMEOUT)
        # Meant this once, not for who copies the config.
        settings = dataclasses.replace(settings, overwrite=False, ignore_lock=False)
        compute = init_compute(
            settings.device_type, settings.dtype, settings.seed, settings.deterministic, settings.rank_timeout
        )
        try:
            return train(settings, resume_step, compute)
        except torch.OutOfMemoryError as error:  # before the first step, or in a save
            raise UserError(f"out of memory: a smaller model fits ({first_line(error)})") from error


def started_with(command: CommandLine) -> dict:
    """What a rank was started with, as JSON values by name."""
    return as_dict(command.settings) | {"--resume": "resume" in command.switches} | source_hashes()


def decide(command: CommandLine, held: contextlib.ExitStack) -> tuple[RunSettings, int | None]:
    """On rank 0: lock the run's folder, then (settings, step to resume from or None)."""
    command = apply_init_from(command)
    folder = tag_dir(command.settings)
    # A launcher that starts the ranks of this very run anew means: go on.
    resume = "resume" in command.switches or (restarts_from_env() > 0 and is_own_torchrun(folder))
    held.enter_context(run_lock(folder, command.settings.ignore_lock))
    settings, resume_step = resolve_run(command, resume)
    held.enter_context(logs.run_log(folder / "run.log", settings.log_level))
    for line in differences(settings, command.origins):
        logger.info(f"  {line}")
    return settings, resume_step


def decision_facts(decided: tuple[RunSettings, int | None] | None) -> dict:
    """What rank 0 decided, for the others: settings, tag, step and the hashes of that step's files."""
    if decided is None:
        return {}
    settings, step = decided
    files = read_manifest(step_dir(tag_dir(settings), step)) if step is not None else None
    return {"settings": as_dict(settings), "step": step, "files": files}


def follow(command: CommandLine, decision: dict) -> tuple[RunSettings, int | None]:
    """Rank 0's settings and step, on another rank."""
    kind = type(command.settings)
    return kind(**{name: checked(name, value, kind) for name, value in decision["settings"].items()}), decision["step"]


def check_step(settings: RunSettings, decision: dict, rank: int) -> None:
    """UserError when this rank does not hold the step that rank 0 resumes from, complete and with the same bytes."""
    if decision["step"] is None or rank == 0:
        return
    folder = step_dir(tag_dir(settings), decision["step"])
    way_out = "copy rank 0's step there, or let all ranks share one NANOCHAT_BASE_DIR"
    if reason := find_corruption(folder):
        there = "" if folder.is_dir() else f" (steps there: {own_steps(folder.parent) or 'none'})"
        raise UserError(
            f"rank 0 resumes from step {decision['step']}, {folder} is not complete here: {reason}{there}: {way_out}"
        )
    if (files := read_manifest(folder)) != decision["files"]:
        names = [
            name for name in sorted({*files, *decision["files"]}) if files.get(name) != decision["files"].get(name)
        ]
        raise UserError(f"{folder} is not the step that rank 0 resumes from: {', '.join(names)} differ: {way_out}")
