"""Saving what is due between two steps, in an order that loses nothing: the checkpoint, then evaluation, then samples.

A checkpoint is written before anything that can fail. Figures go to metrics.jsonl at once, into the folder's
evaluated.json when all that was due is measured, and into the next checkpoint. A run that is resumed at a step whose
evaluation did not end makes it up.
"""

import logging

from nanochat import checkpoint_files
from nanochat.checkpoint_manager import tag_dir
from nanochat.config.config_file import as_dict
from nanochat.runtime import first_line
from nanochat.system.environment import SharedError, UserError
from nanochat.training import schedule
from nanochat.training.rank_agreement import agree_before_first_step, weights_checksum
from nanochat.training.resume import evaluated_after_save, progress_of
from nanochat.training.tracker import last_event

logger = logging.getLogger(__name__)

CADENCES = ("eval_every", "core_metric_every", "sample_every")


class NonFiniteWeights(Exception):
    """The last update left weights that are not finite: they are not saved."""


class StepSaver:
    """Saves the steps of a run; all ranks call its methods at the same steps. state: base_train's TrainState."""

    def __init__(self, state):
        self.state, self.saver, self.compute = state, state.saver, state.compute
        self.newest_step = state.run.step  # on the disk or being written; at first the one that the run started from
        self.due = self.postponed = False

    def save(self, ending: bool = False) -> None:
        """Copy this step and begin to write it."""
        self.check_weights()
        if ending:  # however long the save before takes, the others wait
            self.log_saved(self.saver.wait())
            self.compute.barrier(patient=True)
        self.log_saved(self.saver.save(*self._contents()))
        self.newest_step, self.due, self.postponed = self.state.run.step, False, False

    def previous_save_is_running(self) -> bool:
        """Whether the previous save is still being written, on every rank alike; logs it once.

        A single process waits for it. Of several, rank 0 waits for a part of the time that the others have patience.
        """
        if self.compute.world_size == 1:
            return False
        seconds = 0 if self.postponed else self.state.settings.rank_timeout / 4
        running = self.compute.any_rank(self.saver.is_writing(seconds))
        if running and not self.postponed:
            logger.info(
                f"step {self.state.run.step}: the save before is still being written: this one follows when it is done"
            )
        self.postponed = running
        return running

    def _contents(self) -> tuple:
        """(step, tensors, optimizer state, metadata) of a checkpoint of now."""
        state = self.state
        progress = progress_of(state.run, state.loader)
        metadata = dict(settings=as_dict(state.settings), **state.metadata, **progress)
        return state.run.step, state.trained(), state.optimizer.state_items(), metadata

    def check_weights(self) -> None:
        if any(not p.isfinite().all() for p in self.state.model.parameters()):
            raise NonFiniteWeights

    def log_saved(self, folder) -> None:
        """Log a save that has ended, as the saver returns it."""
        if folder is not None:
            self.state.log.write(checkpoint_files.step_of(folder), event="save", folder=folder.name)

    def copy_before_evaluation(self) -> None:
        """Have a copy of an unsaved step, so that rank 0 can write it alone when another rank fails in the evaluation.

        NonFiniteWeights where there is nothing to evaluate.
        """
        self.check_weights()
        if self.state.run.step == self.newest_step or self.compute.world_size == 1:
            return
        if not self.compute.any_rank(self.saver.is_writing()):
            self.log_saved(self.saver.wait())
            self.saver.copy(*self._contents())

    def save_before_error(self, error: Exception) -> None:
        """Save this step before the error of an evaluation ends the run; a UserError names the outcome."""
        run, outcome = self.state.run, self._rescue()
        if isinstance(error, SharedError):  # the first rank that leaves has its launcher end the others
            self.compute.barrier(patient=True)
        if isinstance(error, UserError):
            kind = SharedError if isinstance(error, SharedError) else UserError
            raise kind(f"{str(error).rstrip('.')}; {outcome}") from error
        cause = f"{type(error).__name__}: {first_line(error)}"
        logger.info(f"the evaluation of step {run.step} failed ({cause}); {outcome}")

    def _rescue(self) -> str:
        """Save this step if that is still possible; returns the outcome in words."""
        run, saver = self.state.run, self.saver
        if self.compute.rank != 0:
            return f"rank 0 saves step {run.step}"
        try:
            self.log_saved(saver.wait())
            if run.step != self.newest_step:
                self.check_weights()
                if saver.copied_step != run.step:
                    if self.compute.world_size > 1:
                        return f"the newest step on the disk is {self.newest_step}: --resume continues from there"
                    saver.copy(*self._contents())
                saver.write_copy()
                self.log_saved(saver.wait())
                self.newest_step = run.step
        except NonFiniteWeights:
            return f"the weights of step {run.step} are not finite and were not saved"
        except Exception as error:  # the one that ends the run comes first
            return f"step {run.step} could not be saved ({first_line(error)})"
        return f"step {run.step} is saved: --resume continues from there"


def evaluation_is_due(state) -> bool:
    """Whether anything is to be measured or sampled at the step of state.run and has not been."""
    run, settings = state.run, state.settings
    due = run.step >= state.steps or any(schedule.is_due(getattr(settings, n, None), run.step) for n in CADENCES)
    return due and run.evaluated != run.step


def agree_where_run_is(state) -> bool:
    """Compare on all ranks what is trained and where the run is; whether metrics.jsonl records its end here.

    Rank 0's evaluated.json completes the run's state: an evaluation that came after the save of its step.
    """
    compute, run = state.compute, state.run
    weights = weights_checksum(state.trained()) if compute.world_size > 1 else None
    agree_before_first_step(compute, dict(state.metadata, step=run.step, num_iterations=state.steps, weights=weights))
    folder, ended, found = tag_dir(state.settings), False, {}
    if compute.rank == 0:
        ended = last_event(folder / "metrics.jsonl") == (run.step, "done")
        found = evaluated_after_save(folder, run)
    ended, found = compute.gather((ended, found))[0]
    for name, value in found.items():
        setattr(run, name, value)
    return ended
