"""Train a base model: `python -m scripts.base_train [config.py] [--key=value ...] [--resume]`, or under torchrun.

Read from top to bottom: train() makes data, model and optimizer; training_loop(), which scripts.adapter_train shares,
saves, evaluates, takes a step and logs it; train_step() is one step.
"""

import dataclasses
import logging
import statistics
import sys
import time
from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist

from nanochat import checkpoint_files
from nanochat.checkpoint_manager import tag_dir
from nanochat.config.config_file import as_dict, from_command_line, render_config
from nanochat.config.settings import RunSettings, Settings
from nanochat.conversion.tying import untie
from nanochat.data.dataloader import DataLoader
from nanochat.data.tokenizer import Tokenizer
from nanochat.data_pipeline import (
    codec_files,
    make_train_loader,
    make_validation,
    prepare_data,
    warn_repeated_rows,
    warn_unused_modalities,
)
from nanochat.evaluation.suite import check_suite, evaluate_suite
from nanochat.files import write_atomically
from nanochat.gpt import GPT, GPTConfig
from nanochat.hardware import device_name, memory_mb, peak_flops
from nanochat.optim import MuonAdamW, build_optimizer, weight_norms
from nanochat.runtime import Compute, first_line, run_script
from nanochat.system.environment import under_torchrun
from nanochat.training import schedule
from nanochat.training.background_saver import BackgroundSaver
from nanochat.training.compilation import choose_kernels, compile_model, is_compiled
from nanochat.training.grad_accumulation import forward_backward, halve_micro_batch, suggest_batch_size_on_oom
from nanochat.training.guard import MAX_BAD_STEPS, StepGuard
from nanochat.training.launch import launch
from nanochat.training.progress import Progress, duration
from nanochat.training.rank_agreement import agree_before_first_step
from nanochat.training.resume import (
    Origin,
    RunState,
    init_from_checkpoint,
    merge_checkpoint_config,
    record_evaluated,
    record_launcher,
    restore,
)
from nanochat.training.step_saver import NonFiniteWeights, StepSaver, agree_where_run_is, evaluation_is_due
from nanochat.training.stop_signals import EvaluationInterrupted, StopSignals
from nanochat.training.tracker import MetricsLog, open_tracker

logger = logging.getLogger("nanochat")

EXIT_CODES = {"done": 0, "nonfinite": 3, "preempted": 85}


def main(argv: list[str] | None = None) -> dict:
    """Train as the settings say; returns {"model_tag", "step", "val_bpb", "train_seconds", "stopped"}."""
    return launch(lambda: from_command_line(argv, usage="python -m scripts.base_train [config.py]"), train)


def train(settings: Settings, origin: Origin | None, compute: Compute) -> dict:
    """The run itself; see main()."""
    logger.info(f"training {settings.tag} on {compute.world_size} x {device_name(compute)}, {str(compute.dtype)[6:]}")
    resumed = origin is not None and origin.resumed

    # -- data and tokenizer -------------------------------------------------------------------------------------------
    dataset, tokenizer = prepare_data(settings, compute, origin)
    agree_before_first_step(compute, dict(data_sha256=dataset.fingerprint["sha256"], tokenizer_hash=tokenizer.hash))
    warn_unused_modalities(settings, dataset)
    loader = make_train_loader(settings, dataset, tokenizer, compute)
    warn_repeated_rows(settings, loader)
    validate = make_validation(settings, dataset, tokenizer, compute)
    if settings.core_metric_every:
        check_suite(compute)

    # -- model, optimizer, and the checkpoint that they start from ----------------------------------------------------
    config = GPTConfig.from_settings(settings, tokenizer.vocab_size, tokenizer.bos_id)
    config, untied = merge_checkpoint_config(config, origin) if origin else (config, False)
    model = build_model(config, settings, compute)
    steps = schedule.num_iterations(settings, model.num_matmul_parameters(), model.flops_per_token())
    if resumed and untied:
        untie(model)
    optimizer = build_optimizer(model, settings, compute.dtype, compute.rank, compute.world_size)

    run = RunState()
    if resumed:
        run = restore(origin, model, optimizer, loader, tokenizer, dataset)
    elif origin:
        init_from_checkpoint(origin, settings.init_era, model, optimizer, tokenizer, dataset)

    choose_kernels(model, settings)
    micro_batch_size, _ = settings.batch_plan(compute.world_size)
    compile_seconds = compile_model(model, micro_batch_size, optimizer) if settings.compile else 0.0
    logger.info(f"parameters: {', '.join(f'{name} {n:,}' for name, n in model.num_parameters().items())}")

    # -- the loop -----------------------------------------------------------------------------------------------------
    metadata = model_metadata(model, steps) | dict(
        tokenizer_hash=tokenizer.hash, codec=dataset.manifest.get("codec"), data_fingerprint=dataset.fingerprint
    )
    codec = codec_files(dataset) if compute.rank == 0 else None
    state = TrainState(
        settings=settings,
        compute=compute,
        model=model,
        optimizer=optimizer,
        loader=loader,
        run=run,
        steps=steps,
        learning_rate=settings.matrix_lr,
        saver=BackgroundSaver(tag_dir(settings), settings.keep_last, tokenizer, compute.rank, codec),
        trained=lambda: model.state_dict().items(),
        metadata=metadata,
        evaluate=lambda state: evaluate(state, validate, tokenizer, dataset),
        sample=lambda: print_samples(model, tokenizer),
        untie_at=settings.untie_step(steps) if model.config.tie_weights else None,
        compile_seconds=compile_seconds,
        resumed=resumed,
    )
    return training_loop(state)


def build_model(config: GPTConfig, settings: Settings, compute: Compute) -> GPT:
    """The model with its first weights, on its device."""
    with torch.device("meta"):
        model = GPT(config)
    model.to_empty(device=compute.device)
    model.init_weights(settings.tied_init_std)
    model.compute_dtype, model.route = compute.dtype, settings.route
    return model


def model_metadata(model: GPT, steps: int) -> dict:
    """What a checkpoint says of the model."""
    derived = dict(num_iterations=steps, parameters=model.num_parameters(), flops_per_token=model.flops_per_token())
    return dict(model_config=dataclasses.asdict(model.config), derived=derived)


def evaluate(state: "TrainState", validate: Callable, tokenizer: Tokenizer, dataset) -> None:
    """Validation loss and benchmark scores, where they are due; EvaluationInterrupted when a signal came meanwhile."""
    settings, compute, run = state.settings, state.compute, state.run
    if state.is_last or schedule.is_due(settings.eval_every, run.step):
        measured = validate(state.model, stop=state.stop_requested)
        run.note_val_bpb(measured["bpb"])
        losses = {f"val_loss/{name}": part["nats"] for name, part in measured.get("losses", {}).items()}
        norms = weight_norms(state.model, state.optimizer)
        state.log.write(run.step, event="eval", val_bpb=run.val_bpb, **losses, **norms)

    if schedule.is_due(settings.core_metric_every, run.step):
        # CORE where its bundle is at hand, else the offline suite; empty without any item
        ranks = dict(rank=compute.rank, world_size=compute.world_size, stop=state.stop_requested)
        scores = evaluate_suite(state.model, tokenizer, dataset, settings.core_metric_max_per_task, **ranks)
        state.log.write(run.step, event="eval", **scores)
        logger.info(f"step {run.step}: {', '.join(f'{name} {value:.4f}' for name, value in scores.items())}")


@dataclasses.dataclass(kw_only=True)
class TrainState:
    """What the loop trains, and what each stage does in its own way."""

    settings: RunSettings
    compute: Compute
    model: torch.nn.Module  # as GPT: loss by modality, flops_per_token()
    optimizer: MuonAdamW
    loader: DataLoader
    run: RunState  # step, losses, seconds: what a checkpoint remembers of the run
    steps: int
    learning_rate: float  # the one that the log shows, before the schedule
    saver: BackgroundSaver
    trained: Callable[[], Iterable[tuple[str, torch.Tensor]]]  # the tensors of a checkpoint
    metadata: dict  # what a checkpoint says of them, besides progress
    evaluate: Callable[["TrainState"], None]  # what is due at this step
    sample: Callable[[], None] | None = None  # prints samples; called on rank 0 alone
    untie_at: int | None = None  # the step before which the tied tables are split
    compile_seconds: float = 0.0
    resumed: bool = False

    # of the loop
    signals: StopSignals = dataclasses.field(default_factory=StopSignals)
    log: MetricsLog = dataclasses.field(default_factory=lambda: MetricsLog(None))
    rows_log: MetricsLog = dataclasses.field(default_factory=lambda: MetricsLog(None))
    step_seconds: list[float] = dataclasses.field(default_factory=list)  # without the first step, which compiles

    def __post_init__(self):
        self.guard = StepGuard(self.run.bad_in_a_row)
        self.step_saver = StepSaver(self)
        self.peak_flops = peak_flops(self.compute) * self.compute.world_size
        self.first_step, self.seconds_before = self.run.step, self.run.train_seconds

    @property
    def is_last(self) -> bool:
        return self.run.step >= self.steps

    def stop_requested(self) -> bool:
        """Whether a signal asked this rank to end."""
        return self.signals.requested is not None


def training_loop(state: TrainState) -> dict:
    """Train to the end, or until a signal or the step guard ends it; returns what main() does."""
    run, compute = state.run, state.compute
    describe_steps(state)
    ended = agree_where_run_is(state)
    if state.is_last and (ended or run.evaluated == run.step):
        return already_finished(state, ended)
    open_logs(state)

    stopped = None  # "done", "preempted" or "nonfinite"
    with Progress(state.steps) as progress, state.signals, state.saver:
        while stopped is None:
            # What is due after this number of steps, saved first so that nothing is lost if evaluation fails. A signal
            # to any rank ends all ranks at the same step; one that comes during evaluation still ends in a save.
            stopping = compute.any_rank(state.stop_requested())
            try:
                save_if_due(state, ending=state.is_last or stopping)
                if not stopping and not evaluate_if_due(state):
                    stopping = True
                    save_if_due(state, ending=True)
            except NonFiniteWeights:  # the last update was too large
                stopped = "nonfinite"
                state.guard.record_skipped(state.loader.last_rows(whole=True))
                logger.info(f"stopped: the update of step {run.step} left weights that are not finite; not saved")
                break
            if state.is_last or stopping:
                stopped = "done" if state.is_last and run.evaluated == run.step else "preempted"
                break

            if state.untie_at is not None and run.step >= state.untie_at:
                untie_tables(state)

            step = train_step(state)

            run.step += 1
            run.train_seconds += step.seconds
            if run.step > state.first_step + 1:
                state.step_seconds.append(step.seconds)
            if not record_step(state, step):
                stopped = "nonfinite"
            log_step(state, step, progress)

        state.step_saver.log_saved(state.saver.wait())
        # Signal handlers stay installed, so that a duplicate signal cannot truncate the log.
        return finish(state, stopped)


@dataclasses.dataclass
class StepResult:
    """One step: what the log and the guard need of it."""

    loss: torch.Tensor  # each modality's part of the mean loss in nats a target, [E]
    num_targets: torch.Tensor  # of each modality in the global batch, [E]
    loss_value: float
    grad_norm: float
    group_norms: dict[str, float]
    finite: bool  # whether the update was made
    lr_multiplier: float
    seconds: float


def train_step(state: TrainState) -> StepResult:
    """Loss and gradients of the global batch, their sum over the ranks, the update."""
    compute, model, optimizer, step = state.compute, state.model, state.optimizer, state.run.step
    start = time.perf_counter()

    inputs, targets = state.loader.next()  # this rank's rows of the global batch, [rows / ranks, T]
    num_targets = model.count_targets(targets)
    if compute.world_size > 1:
        dist.all_reduce(num_targets)

    loss = forward_backward_with_retry(state, inputs, targets, num_targets.sum())
    if compute.world_size > 1:
        dist.all_reduce(loss)

    multiplier = schedule.lr_multiplier(state.settings, step, state.steps)
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * multiplier
        if group["kind"] == "muon":
            group["momentum"] = schedule.muon_momentum(step)
            group["weight_decay"] = schedule.weight_decay(state.settings, step, state.steps)

    with suggest_batch_size_on_oom(state.settings, compute.world_size):
        grad_norm, group_norms = optimizer.reduce_gradients()
        loss_value = loss.sum().item()
        finite = state.guard.check(step + 1, loss_value, grad_norm, group_norms)  # the same sums on all ranks
        if finite:
            optimizer.step(schedule.clip_scale(grad_norm, state.settings.grad_clip))
        else:
            optimizer.drop_gradients()

    model.zero_grad(set_to_none=True)
    compute.synchronize()
    seconds = time.perf_counter() - start
    return StepResult(loss, num_targets, loss_value, grad_norm, group_norms, finite, multiplier, seconds)


def forward_backward_with_retry(
    state: TrainState, inputs: torch.Tensor, targets: torch.Tensor, num_targets: torch.Tensor
) -> torch.Tensor:
    """The loss [E] of this rank's rows; gradients are in the parameters, or on their way to the other ranks.

    When memory runs out on some rank, all ranks try the same batch again in smaller micro-batches.
    """
    compute, model, optimizer = state.compute, state.model, state.optimizer
    micro_batch_size, _ = state.settings.batch_plan(compute.world_size)
    loss = forward_backward(model, inputs, targets, micro_batch_size, num_targets, optimizer)
    while compute.any_rank(loss is None):
        optimizer.drop_gradients()
        model.zero_grad(set_to_none=True)
        compute.free_memory()

        state.settings = halve_micro_batch(state.settings, compute.world_size)
        micro_batch_size, accumulation = state.settings.batch_plan(compute.world_size)
        state.log.write(state.run.step, event="oom", device_batch_size=micro_batch_size)
        logger.info(f"out of memory: continuing with {micro_batch_size} rows x {accumulation} micro-batches")
        loss = forward_backward(model, inputs, targets, micro_batch_size, num_targets, optimizer)
    return loss


def record_step(state: TrainState, step: StepResult) -> bool:
    """Record a skipped step or a spike; False when too many steps in a row were not finite."""
    run, found = state.run, dict(loss=step.loss_value, grad_norm=step.grad_norm)
    state.step_saver.log_saved(state.saver.poll())
    if state.settings.log_rows:
        state.rows_log.write(run.step, rows=state.loader.last_rows())

    if step.finite:
        run.note_loss(step.loss_value)
        run.bad_in_a_row = 0
        if spikes := state.guard.find_spikes():
            state.log.write(run.step, event="spike", **found, usual=spikes)
        return True

    run.skipped, run.bad_in_a_row = run.skipped + 1, run.bad_in_a_row + 1
    state.log.write(run.step, event="skip", **found, skipped=run.skipped)
    logger.info(f"step {run.step}: loss {step.loss_value}, gradient norm {step.grad_norm}: step skipped")
    if state.guard.record_skipped(state.loader.last_rows(whole=True)):
        logger.info(f"stopped: {MAX_BAD_STEPS} non-finite steps in a row; earlier checkpoints are unchanged")
        return False
    return True


def log_step(state: TrainState, step: StepResult, progress: Progress) -> None:
    """One line of metrics.jsonl, and the progress line."""
    settings, run, tokens = state.settings, state.run, state.settings.total_batch_size
    flops_per_token = state.model.flops_per_token()
    state.log.write(
        run.step,
        tokens=state.loader.cursor * settings.max_seq_len,
        loss=step.loss_value,
        lr=step.lr_multiplier * state.learning_rate,
        lr_multiplier=step.lr_multiplier,
        grad_norm=step.grad_norm,
        tok_per_sec=tokens / step.seconds,
        mfu=tokens / step.seconds * flops_per_token / state.peak_flops,
        mem_mb=memory_mb(state.compute),
        epoch=state.loader.epoch,
        **{f"norm/grad_{name}": value for name, value in step.group_norms.items()},
        **state.model.loss_by_modality(step.loss, step.num_targets),
    )

    tok_per_sec = tokens / statistics.median(state.step_seconds[-50:] or [step.seconds])
    mfu = tok_per_sec * flops_per_token / state.peak_flops
    seconds_left = (state.steps - run.step) * tokens / tok_per_sec
    progress.update(run.step, run.smooth_loss or step.loss_value, run.figures(), tok_per_sec, mfu, seconds_left)


def save_if_due(state: TrainState, ending: bool) -> None:
    """Save at the cadence, and when the run ends here; NonFiniteWeights instead of saving such weights.

    A save that is due while the one before is still being written is postponed, but not the last one.
    """
    run, saver = state.run, state.step_saver
    if not evaluation_is_due(state):
        run.evaluated = run.step
    if run.step == saver.newest_step:
        return
    saver.due = saver.due or ending or schedule.is_due(state.settings.save_every, run.step)
    if not saver.due or (state.guard.bad and not ending):  # soon after a non-finite step another may follow
        return
    if ending or not saver.previous_save_is_running():
        saver.save(ending)


def evaluate_if_due(state: TrainState) -> bool:
    """Evaluate, then sample; False when a signal interrupted the evaluation, which a resumed run makes up.

    An error ends the run, after the step is saved.
    """
    run, compute = state.run, state.compute
    if not evaluation_is_due(state):
        return True
    state.step_saver.copy_before_evaluation()
    try:
        with suggest_batch_size_on_oom(state.settings, compute.world_size):
            state.evaluate(state)
        run.evaluated = run.step
        if compute.rank == 0:
            record_evaluated(tag_dir(state.settings), run)
    except EvaluationInterrupted:
        return False
    except Exception as error:
        state.step_saver.save_before_error(error)
        raise
    if compute.rank == 0 and state.sample is not None:
        sample_if_due(state)
    return True


def sample_if_due(state: TrainState) -> None:
    """Print samples, on rank 0 alone. They are for looking at: no failure of theirs ends a run."""
    if not (state.is_last or schedule.is_due(state.settings.sample_every, state.run.step)):
        return
    try:
        state.sample()
    except Exception as error:
        logger.warning(f"no sample at step {state.run.step} ({type(error).__name__}: {first_line(error)})")


def untie_tables(state: TrainState) -> None:
    """Split the tied tables in two, each with its part of the optimizer's state."""
    settings, compute, model, before = state.settings, state.compute, state.model, state.optimizer
    moments = untie(model, before.state_dict(), settings.adam_betas)
    state.optimizer = build_optimizer(model, settings, compute.dtype, compute.rank, compute.world_size)
    state.optimizer.muon_update = before.muon_update  # which may be compiled
    if moments:  # empty where all steps so far were skipped
        state.optimizer.load_state_dict(moments)

    state.untie_at = None
    state.metadata |= model_metadata(model, state.steps)
    state.log.write(state.run.step, event="untie", parameters=state.metadata["derived"]["parameters"]["total"])
    logger.info(f"step {state.run.step}: the tied tables are two from now on")


# ---------------------------------------------------------------------------------------------------------------------
# before the first step and after the last


def describe_steps(state: TrainState) -> None:
    settings, ranks = state.settings, state.compute.world_size
    micro_batch_size, accumulation = settings.batch_plan(ranks)
    logger.info(
        f"{state.steps} steps of {settings.total_batch_size:,} tokens ({micro_batch_size} rows x {accumulation} "
        f"micro-batches x {ranks} ranks), {state.model.flops_per_token():,} FLOPs a token, peak "
        f"{state.peak_flops / 1e12:.3f} TFLOP/s"
    )


def open_logs(state: TrainState) -> None:
    """Leave config.py and who launched the run, and begin or continue metrics.jsonl."""
    settings, compute, run, folder = state.settings, state.compute, state.run, tag_dir(state.settings)
    if compute.rank == 0:
        checkpoint_files.remove_stale_temp_files(folder)
        record_launcher(folder)
        write_atomically(folder / "config.py", render_config(settings))
        tracker = open_tracker(settings.wandb_mode, settings.run, as_dict(settings), folder)
        repeated = run.step if state.resumed and evaluation_is_due(state) else None  # an evaluation that was cut short
        state.log = MetricsLog(folder / "metrics.jsonl", tracker, keep_below=run.step, drop_evals_of=repeated)
        for path in folder.glob("rows_rank*.jsonl"):  # also of ranks that this run no longer has
            MetricsLog(path, keep_below=run.step).close()
    compute.barrier()
    if settings.log_rows:
        state.rows_log = MetricsLog(folder / f"rows_rank{compute.rank}.jsonl")

    state.log.write(
        run.step,
        event="resume" if state.resumed else "start",
        steps=state.steps,
        device=device_name(compute),
        dtype=str(compute.dtype)[6:],
        world_size=compute.world_size,
        peak_flops=state.peak_flops,
        compiled=is_compiled(state.model),
        parameters=state.metadata["derived"]["parameters"]["total"],
        data=state.metadata["data_fingerprint"],
    )


def already_finished(state: TrainState, logged: bool) -> dict:
    """The result of a run that has no step left. logged: whether metrics.jsonl says so; a kill may have hidden it."""
    run, folder = state.run, tag_dir(state.settings)
    logger.info(
        f"{state.settings.tag} is finished: step {run.step} of {state.steps}; a larger --num_iterations continues it"
    )
    if state.compute.rank == 0 and not logged:
        state.log = MetricsLog(folder / "metrics.jsonl", keep_below=run.step)
        state.log.write(run.step, event="done", train_seconds=run.train_seconds, **run.figures())
    return close(state, "done")


def finish(state: TrainState, stopped: str) -> dict:
    """Log how the run ended; returns the result of main()."""
    settings, compute, run = state.settings, state.compute, state.run
    if state.step_seconds:
        # the first measurement may have had company
        state.peak_flops = max(state.peak_flops, peak_flops(compute) * compute.world_size)
        tok_per_sec = settings.total_batch_size / statistics.median(state.step_seconds)
        first = run.train_seconds - state.seconds_before - sum(state.step_seconds)
        mfu = 100 * tok_per_sec * state.model.flops_per_token() / state.peak_flops
        logger.info(
            f"median step: {tok_per_sec:,.0f} tok/s, MFU {mfu:.1f}% of {state.peak_flops / 1e12:.3f} TFLOP/s; first "
            f"{first:.1f} s"
        )
    if stopped == "preempted":
        cause = state.signals.requested or "a signal to another rank"
        logger.info(f"stopped by {cause} at step {run.step}: --resume continues")
    if stopped == "nonfinite" and compute.rank == 0:
        state.guard.write_report(tag_dir(settings) / "bad_batch.json")
    state.log.write(
        run.step,
        event=stopped,
        train_seconds=run.train_seconds,
        compile_seconds=state.compile_seconds,
        peak_flops=state.peak_flops,
        **run.figures(),
    )
    return close(state, stopped)


def close(state: TrainState, stopped: str) -> dict:
    """Close the logs, say where the model lies, and return the result of main()."""
    run, tag = state.run, state.settings.tag
    state.log.close(hurry=stopped == "preempted")
    state.rows_log.close()
    if EXIT_CODES[stopped] and not under_torchrun():
        sys.exit(EXIT_CODES[stopped])  # under torchrun any code but 0 would start the same step again
    logger.info(f"{tag}: {duration(run.train_seconds)} of training, {tag_dir(state.settings)}")
    result = dict(model_tag=tag, step=run.step, train_seconds=run.train_seconds, stopped=stopped)
    return {**result, **run.figures()}


def print_samples(model: GPT, tokenizer: Tokenizer) -> None:
    from nanochat.engine import generate

    stop = (tokenizer.bos_id, *(m.start for m in model.config.modalities))
    length = min(48, model.rotary_length - 1)  # of which a context of 4 tokens has 40
    new = generate(model, [tokenizer.bos_id], length, temperature=0.8, top_k=50, stop=stop)[0]
    logger.info(f"sample: {tokenizer.decode(new)!r}")


if __name__ == "__main__":
    run_script(main)
