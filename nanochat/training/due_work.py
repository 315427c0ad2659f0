"""What is due between two steps, in an order that loses nothing: the checkpoint, then evaluation, then samples.

A checkpoint is written before anything that can fail. Figures go to metrics.jsonl at once, into the folder's
evaluated.json when all that was due is measured, and into the next checkpoint. A run that is resumed at a step whose
evaluation did not end makes it up.
"""

import logging
from collections.abc import Callable

from nanochat import checkpoint_files
from nanochat.checkpoint_manager import tag_dir
from nanochat.config.config_file import as_dict
from nanochat.runtime import first_line
from nanochat.system.environment import SharedError, UserError
from nanochat.training import schedule
from nanochat.training.grad_accumulation import suggest_batch_size_on_oom
from nanochat.training.guard import StepGuard
from nanochat.training.rank_agreement import agree_before_first_step, weights_checksum
from nanochat.training.resume import evaluated_after_save, progress_of, record_evaluated
from nanochat.training.stop_signals import EvaluationInterrupted
from nanochat.training.tracker import MetricsLog, last_event

logger = logging.getLogger(__name__)

CADENCES = ("eval_every", "core_metric_every", "sample_every")


class NonFiniteWeights(Exception):
    """The last update left weights that are not finite: they are not saved."""


class DueWork:
    """Saves and evaluates what is due at training.run.step; all ranks call its methods at the same steps.

    training: base_train's Training. stop: whether a signal asked this rank to end, asked during an evaluation.
    """

    def __init__(self, training, log: MetricsLog, guard: StepGuard, stop: Callable[[], bool]):
        self.training, self.log, self.guard, self.stop = training, log, guard, stop
        self.settings, self.compute, self.run, self.saver = (
            training.settings,
            training.compute,
            training.run,
            training.saver,
        )
        self.saved = self.run.step  # the newest step that is on the disk or being written; at first where we began
        self.due = self.put_off = False

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def save_if_due(self, ending: bool) -> None:
        """Save at the cadence and when the run ends here; raises NonFiniteWeights instead of saving such weights.

        A save that is due while the one before is still being written is put off, but not the last one.
        """
        run = self.run
        if not self.evaluation_due():
            run.evaluated = run.step
        if run.step == self.saved:
            return
        self.due = self.due or ending or schedule.is_due(self.settings.save_every, run.step)
        if not self.due or (self.guard.bad and not ending):  # soon after a non-finite step another may follow
            return
        if ending or not self._rank0_is_busy():
            self.save(ending)

    def save(self, ending: bool = False) -> None:
        """Copy this step and begin to write it."""
        self.check_weights()
        if ending:  # however long the save before takes, the others wait
            self.note_saved(self.saver.wait())
            self.compute.barrier(patient=True)
        self.note_saved(self.saver.save(*self._contents()))
        self.saved, self.due, self.put_off = self.run.step, False, False

    def _rank0_is_busy(self) -> bool:
        """Whether the save before is still being written, on every rank alike; tells so once.

        A single process waits for it. Of several, rank 0 waits for a part of the time that the others have patience.
        """
        if self.compute.world_size == 1:
            return False
        busy = self.compute.any_rank(self.saver.is_writing(0 if self.put_off else self.settings.rank_timeout / 4))
        if busy and not self.put_off:
            logger.info(
                f"step {self.run.step}: the save before is still being written: this one follows when it is done"
            )
        self.put_off = busy
        return busy

    def _contents(self) -> tuple:
        training = self.training
        progress = progress_of(self.run, training.loader)
        metadata = dict(settings=as_dict(self.settings), **training.facts, **progress)
        return self.run.step, training.trained(), training.optimizer.state_items(), metadata

    def check_weights(self) -> None:
        if any(not p.isfinite().all() for p in self.training.model.parameters()):
            raise NonFiniteWeights

    def note_saved(self, folder) -> None:
        """Log a save that has ended, as the saver returns it."""
        if folder is not None:
            self.log.write(checkpoint_files.step_of(folder), event="save", folder=folder.name)

    # -- evaluation and samples ---------------------------------------------------------------------------------------

    @property
    def last(self) -> bool:
        return self.run.step >= self.training.steps

    def evaluation_due(self) -> bool:
        """Whether anything is to be measured or sampled at this step and has not been."""
        return evaluation_is_due(self.training)

    def evaluate_if_due(self) -> bool:
        """Evaluate, then sample; False when a signal cut the evaluation short, which leaves it to be made up.

        An error ends the run, after the step is saved.
        """
        run, training = self.run, self.training
        if not self.evaluation_due():
            return True
        self.check_weights()
        if (
            run.step != self.saved
            and self.compute.world_size > 1
            and not self.compute.any_rank(self.saver.is_writing())
        ):
            self.note_saved(self.saver.wait())
            self.saver.copy(*self._contents())  # when a rank fails in the evaluation, rank 0 can write without it
        try:
            with suggest_batch_size_on_oom(self.settings, self.compute.world_size):
                training.evaluate(self.last, self.log, self.stop)
            run.evaluated = run.step
            if self.compute.rank == 0:
                record_evaluated(tag_dir(self.settings), run)
        except EvaluationInterrupted:
            return False
        except Exception as error:
            told = self._rescue()
            if isinstance(error, SharedError):  # the first rank that leaves has its launcher end the others
                self.compute.barrier(patient=True)
            if isinstance(error, UserError):
                kind = SharedError if isinstance(error, SharedError) else UserError
                raise kind(f"{str(error).rstrip('.')}; {told}") from error
            logger.info(
                f"the evaluation of step {run.step} failed ({type(error).__name__}: {first_line(error)}); {told}"
            )
            raise
        if self.compute.rank == 0:
            self._sample()
        return True

    def _rescue(self) -> str:
        """Have this step on the disk before an error ends the run; what became of it, in words."""
        run, saver = self.run, self.saver
        if self.compute.rank != 0:
            return f"rank 0 saves step {run.step}"
        try:
            self.note_saved(saver.wait())
            if run.step != self.saved:
                self.check_weights()
                if saver.copied_step != run.step:
                    if self.compute.world_size > 1:
                        return f"the newest step on the disk is {self.saved}: --resume goes on from there"
                    saver.copy(*self._contents())
                saver.write_copy()
                self.note_saved(saver.wait())
                self.saved = run.step
        except NonFiniteWeights:
            return f"the weights of step {run.step} are not finite and were not saved"
        except Exception as error:  # the one that ends the run comes first
            return f"step {run.step} could not be saved ({first_line(error)})"
        return f"step {run.step} is saved: --resume goes on from there"

    def _sample(self) -> None:
        """Print samples; on rank 0 alone. They are for looking at: no failure of theirs ends a run."""
        run, sample = self.run, self.training.sample
        if sample is None or not (self.last or schedule.is_due(self.settings.sample_every, run.step)):
            return
        try:
            sample()
        except Exception as error:
            logger.warning(f"no sample at step {run.step} ({type(error).__name__}: {first_line(error)})")


def evaluation_is_due(training) -> bool:
    """Whether anything is to be measured or sampled at the step of training.run and has not been."""
    run, settings = training.run, training.settings
    due = run.step >= training.steps or any(schedule.is_due(getattr(settings, n, None), run.step) for n in CADENCES)
    return due and run.evaluated != run.step


def agree_where_run_is(training) -> bool:
    """Compare on all ranks what is trained and where the run is; whether metrics.jsonl says that it has ended here.

    Rank 0's evaluated.json completes the run's state: an evaluation that came after the save of its step.
    """
    compute, run = training.compute, training.run
    weights = weights_checksum(training.trained()) if compute.world_size > 1 else None
    agree_before_first_step(
        compute, dict(training.facts, step=run.step, num_iterations=training.steps, weights=weights)
    )
    folder, ended, found = tag_dir(training.settings), False, {}
    if compute.rank == 0:
        ended = last_event(folder / "metrics.jsonl") == (run.step, "done")
        found = evaluated_after_save(folder, run)
    ended, found = compute.gather((ended, found))[0]
    for name, value in found.items():
        setattr(run, name, value)
    return ended
