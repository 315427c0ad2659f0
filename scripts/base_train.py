"""Train a base model: `python -m scripts.base_train [config.py] [--key=value ...] [--resume]`, or under torchrun.

Read from top to bottom: settings, data, model, optimizer, what is evaluated and saved, then the loop, which is that of
scripts.adapter_train too.
"""

import dataclasses
import logging
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
    batches,
    codec_files,
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
from nanochat.runtime import Compute, run_script
from nanochat.system.environment import under_torchrun
from nanochat.training import schedule
from nanochat.training.background_saver import BackgroundSaver
from nanochat.training.compilation import choose_kernels, compile_model, is_compiled
from nanochat.training.due_work import DueWork, NonFiniteWeights, agree_where_run_is, evaluation_is_due
from nanochat.training.grad_accumulation import forward_backward, halve_micro_batch, suggest_batch_size_on_oom
from nanochat.training.guard import MAX_BAD_STEPS, StepGuard
from nanochat.training.launch import launch
from nanochat.training.progress import Progress, duration, median_rate
from nanochat.training.rank_agreement import agree_before_first_step
from nanochat.training.resume import (
    RunState,
    find_initial_checkpoint,
    init_from_checkpoint,
    merge_checkpoint_config,
    record_launcher,
    restore,
)
from nanochat.training.stop_signals import StopSignals
from nanochat.training.tracker import MetricsLog, open_tracker

logger = logging.getLogger("nanochat")

EXIT_CODES = {"done": 0, "nonfinite": 3, "preempted": 85}


def main(argv: list[str] | None = None) -> dict:
    """Train as the settings say; returns {"model_tag", "step", "val_bpb", "train_seconds", "stopped"}."""
    return launch(lambda: from_command_line(argv, usage="python -m scripts.base_train [config.py]"), train)


def train(settings: Settings, resume_step: int | None, compute: Compute) -> dict:
    """The run itself; see main()."""
    # -- data and tokenizer -------------------------------------------------------------------------------------------
    logger.info(f"training {settings.tag} on {compute.world_size} x {device_name(compute)}, {str(compute.dtype)[6:]}")
    folder = tag_dir(settings)
    found = find_initial_checkpoint(settings, folder, resume_step)
    dataset, tokenizer = prepare_data(settings, compute, found, resumed=resume_step is not None)
    agree_before_first_step(compute, dict(data_sha256=dataset.fingerprint["sha256"], tokenizer_hash=tokenizer.hash))
    warn_unused_modalities(settings, dataset)
    loader = batches(settings, dataset, tokenizer, compute)
    warn_repeated_rows(settings, loader)
    held_out = make_validation(settings, dataset, tokenizer, compute)
    if settings.core_metric_every:
        check_suite(compute)
    micro_rows, _ = settings.batch_plan(compute.world_size)

    # -- model and optimizer ------------------------------------------------------------------------------------------
    config = GPTConfig.from_settings(settings, tokenizer.vocab_size, tokenizer.bos_id)
    era = settings.init_era if resume_step is None else None
    config, split_before = merge_checkpoint_config(config, *found, era) if found else (config, False)
    with torch.device("meta"):
        model = GPT(config)
    model.to_empty(device=compute.device)
    model.init_weights(settings.tied_init_std)
    model.compute_dtype, model.route = compute.dtype, settings.route
    steps = schedule.num_iterations(settings, model.num_matmul_parameters(), model.flops_per_token())
    if resume_step is not None and split_before:
        untie(model)
    optimizer = build_optimizer(model, settings, compute.dtype, compute.rank, compute.world_size)
    run = RunState()
    if resume_step is not None:
        run = restore(folder, resume_step, model, optimizer, loader, tokenizer, dataset)
    elif settings.init_from:
        init_from_checkpoint(*found, era, model, optimizer, tokenizer, dataset)
    choose_kernels(model, settings)
    compile_seconds = compile_model(model, micro_rows, optimizer) if settings.compile else 0.0

    # -- what the loop evaluates and saves ----------------------------------------------------------------------------
    logger.info(f"parameters: {', '.join(f'{name} {n:,}' for name, n in model.num_parameters().items())}")

    def evaluate(last: bool, log: MetricsLog, stop: Callable[[], bool]) -> None:
        ranks = dict(rank=compute.rank, world_size=compute.world_size, stop=stop)
        if last or schedule.is_due(settings.eval_every, run.step):
            measured = held_out(model, stop=stop)
            run.note_val_bpb(measured["bpb"])
            further = {f"val_loss/{name}": part["nats"] for name, part in measured.get("losses", {}).items()}
            log.write(run.step, event="eval", val_bpb=run.val_bpb, **further, **weight_norms(model, training.optimizer))
        if schedule.is_due(settings.core_metric_every, run.step):
            # CORE where its bundle is at hand, else the offline suite; empty without any item
            scores = evaluate_suite(model, tokenizer, dataset, settings.core_metric_max_per_task, **ranks)
            log.write(run.step, event="eval", **scores)
            logger.info(f"step {run.step}: {', '.join(f'{name} {value:.4f}' for name, value in scores.items())}")

    def split() -> None:
        """The tied tables go on as two, each with its part of the optimizer's state."""
        state = untie(model, training.optimizer.state_dict(), settings.adam_betas)
        update = training.optimizer.muon_update  # which may be compiled
        training.optimizer = build_optimizer(model, settings, compute.dtype, compute.rank, compute.world_size)
        training.optimizer.muon_update = update
        if state:  # empty where all steps so far were left out
            training.optimizer.load_state_dict(state)
        training.facts |= described(model, steps)

    facts = dict(
        described(model, steps),
        tokenizer_hash=tokenizer.hash,
        codec=dataset.manifest.get("codec"),
        data_fingerprint=dataset.fingerprint,
    )
    codec = codec_files(dataset) if compute.rank == 0 else None
    saver = BackgroundSaver(folder, settings.keep_last, tokenizer, compute.rank, codec)
    training = Training(
        settings,
        compute,
        model,
        optimizer,
        loader,
        run,
        steps,
        settings.matrix_lr,
        evaluate,
        saver,
        lambda: model.state_dict().items(),
        facts,
        compile_seconds,
        resume_step is not None,
        settings.untie_step(steps) if model.config.tie_weights else None,
        split,
        lambda: print_samples(model, tokenizer),
    )
    return loop(training)


def described(model: GPT, steps: int) -> dict:
    """What a checkpoint says of the model."""
    derived = dict(num_iterations=steps, parameters=model.num_parameters(), flops_per_token=model.flops_per_token())
    return dict(model_config=dataclasses.asdict(model.config), derived=derived)


@dataclasses.dataclass
class Training:
    """What the loop trains, and what of it each stage has in its own way."""

    settings: RunSettings
    compute: Compute
    model: torch.nn.Module  # as GPT: loss by modality, flops_per_token()
    optimizer: MuonAdamW
    loader: DataLoader
    run: RunState
    steps: int
    rate: float  # the learning rate that the log tells
    evaluate: Callable  # (last, log, stop) -> None: what is due at run.step; EvaluationInterrupted when stop() said so
    saver: BackgroundSaver
    trained: Callable[[], Iterable[tuple[str, torch.Tensor]]]  # what a checkpoint holds of the model
    facts: dict  # and says about it, besides progress
    compile_seconds: float = 0.0
    resumed: bool = False
    split_at: int | None = None  # the step before which split() changes model and optimizer
    split: Callable[[], None] | None = None
    sample: Callable[[], None] | None = None  # prints samples; called on rank 0 alone


def loop(training: Training) -> dict:
    """Train to the end, or until a signal or a guard ends it; returns what main() does."""
    settings, compute, model, optimizer = training.settings, training.compute, training.model, training.optimizer
    loader, run, steps, saver = training.loader, training.run, training.steps, training.saver
    folder = tag_dir(settings)

    # -- logs ---------------------------------------------------------------------------------------------------------
    peak = peak_flops(compute) * compute.world_size
    micro_rows, accumulation = settings.batch_plan(compute.world_size)
    logger.info(
        f"{steps} steps of {settings.total_batch_size:,} tokens ({micro_rows} rows x {accumulation} micro-batches"
        f" x {compute.world_size} ranks), {model.flops_per_token():,} FLOPs "
        f"a token, peak {peak / 1e12:.3f} TFLOP/s"
    )
    log = rows_log = MetricsLog(None)
    ended = agree_where_run_is(training)
    if run.step >= steps and (ended or run.evaluated == run.step):
        logger.info(
            f"{settings.tag} is finished: step {run.step} of {steps}; a larger --num_iterations goes on from there"
        )
        if compute.rank == 0 and not ended:  # a kill hid it
            log = MetricsLog(folder / "metrics.jsonl", keep_below=run.step)
            log.write(run.step, event="done", train_seconds=run.train_seconds, **run.figures())
        return finish(settings, run, log, rows_log)
    if compute.rank == 0:
        checkpoint_files.remove_stale_temp_files(folder)
        record_launcher(folder)
        write_atomically(folder / "config.py", render_config(settings))
        tracker = open_tracker(settings.wandb_mode, settings.run, as_dict(settings), folder)
        again = run.step if training.resumed and evaluation_is_due(training) else None  # what is measured once more
        log = MetricsLog(folder / "metrics.jsonl", tracker, keep_below=run.step, drop_evals_of=again)
        for path in folder.glob("rows_rank*.jsonl"):  # also of ranks that this run no longer has
            MetricsLog(path, keep_below=run.step).close()
    compute.barrier()
    if settings.log_rows:
        rows_log = MetricsLog(folder / f"rows_rank{compute.rank}.jsonl")
    log.write(
        run.step,
        event="resume" if training.resumed else "start",
        steps=steps,
        device=device_name(compute),
        dtype=str(compute.dtype)[6:],
        world_size=compute.world_size,
        peak_flops=peak,
        compiled=is_compiled(model),
        parameters=training.facts["derived"]["parameters"]["total"],
        data=training.facts["data_fingerprint"],
    )

    # -- the loop -----------------------------------------------------------------------------------------------------
    step_times: list[tuple[float, int]] = []  # seconds and tokens
    guard = StepGuard(run.bad_in_a_row)
    started, before, stopped = run.step, run.train_seconds, None
    with Progress(steps) as progress, StopSignals() as signals, saver:
        due = DueWork(training, log, guard, lambda: signals.requested is not None)
        while True:
            # -- what is due at this step, and at the end: checkpoint, evaluation, samples, in this order
            last = run.step >= steps
            stopping = compute.any_rank(signals.requested is not None)  # asked of any rank: all leave at this step
            try:
                due.save_if_due(ending=last or stopping)
                if not stopping and not due.evaluate_if_due():
                    stopping = True
                    due.save_if_due(ending=True)
            except NonFiniteWeights:  # the last update was too large
                stopped = "nonfinite"
                guard.record_skipped(loader.last_rows(whole=True))
                logger.info(f"stopped: the update of step {run.step} left weights that are not finite; not saved")
                break
            if last or stopping:
                stopped = "done" if last and run.evaluated == run.step else "preempted"
                break

            if training.split_at is not None and run.step >= training.split_at:
                training.split()
                optimizer, training.split_at = training.optimizer, None
                log.write(run.step, event="untie", parameters=training.facts["derived"]["parameters"]["total"])
                logger.info(f"step {run.step}: the tied tables are two from now on")

            # -- one step: loss and gradients of the global batch, their sum over the ranks, the update
            start = time.perf_counter()
            inputs, targets = loader.next()  # this rank's rows of the global batch, [rows / ranks, T]
            scored = model.count_targets(targets)  # of each modality, [E]
            if compute.world_size > 1:
                dist.all_reduce(scored)
            valid = scored.sum()
            loss = forward_backward(model, inputs, targets, micro_rows, valid, optimizer)
            while compute.any_rank(loss is None):  # no memory on some rank: all try the same batch in smaller parts
                optimizer.drop_gradients()
                model.zero_grad(set_to_none=True)
                compute.free_memory()
                settings = due.settings = halve_micro_batch(settings, compute.world_size)
                micro_rows, accumulation = settings.batch_plan(compute.world_size)
                log.write(run.step, event="oom", device_batch_size=micro_rows)
                logger.info(f"out of memory: going on with {micro_rows} rows x {accumulation} micro-batches")
                loss = forward_backward(model, inputs, targets, micro_rows, valid, optimizer)
            if compute.world_size > 1:
                dist.all_reduce(loss)
            multiplier = schedule.lr_multiplier(settings, run.step, steps)
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * multiplier
                if group["kind"] == "muon":
                    group["momentum"] = schedule.muon_momentum(run.step)
                    group["weight_decay"] = schedule.weight_decay(settings, run.step, steps)
            with suggest_batch_size_on_oom(settings, compute.world_size):
                grad_norm, group_norms = optimizer.reduce_gradients()
                loss_value = loss.sum().item()
                good = guard.check(run.step + 1, loss_value, grad_norm, group_norms)  # the same sums on all ranks
                if good:
                    optimizer.step(schedule.clip_scale(grad_norm, settings.grad_clip))
                else:
                    optimizer.drop_gradients()
            model.zero_grad(set_to_none=True)
            compute.synchronize()
            seconds = time.perf_counter() - start

            # -- after the step: numbers, and what they tell
            run.step += 1
            run.train_seconds += seconds
            due.note_saved(saver.poll())
            if settings.log_rows:
                rows_log.write(run.step, rows=loader.last_rows())
            if good:
                run.note_loss(loss_value)
                run.bad_in_a_row = 0
                if spikes := guard.spikes():
                    log.write(run.step, event="spike", loss=loss_value, grad_norm=grad_norm, usual=spikes)
            else:
                run.skipped, run.bad_in_a_row = run.skipped + 1, run.bad_in_a_row + 1
                log.write(run.step, event="skip", loss=loss_value, grad_norm=grad_norm, skipped=run.skipped)
                logger.info(f"step {run.step}: loss {loss_value}, gradient norm {grad_norm}: step left out")
                if guard.record_skipped(loader.last_rows(whole=True)):
                    stopped = "nonfinite"
                    logger.info(
                        f"stopped: {MAX_BAD_STEPS} non-finite steps in a row; earlier checkpoints are as they were"
                    )
            if run.step > started + 1:  # the first step compiles
                step_times.append((seconds, settings.total_batch_size))
            pace = median_rate(step_times[-50:] or [(seconds, settings.total_batch_size)])
            tok_per_sec = settings.total_batch_size / seconds
            left = (steps - run.step) * settings.total_batch_size
            log.write(
                run.step,
                tokens=loader.cursor * settings.max_seq_len,
                loss=loss_value,
                lr=multiplier * training.rate,
                lr_multiplier=multiplier,
                grad_norm=grad_norm,
                tok_per_sec=tok_per_sec,
                mfu=tok_per_sec * model.flops_per_token() / peak,
                mem_mb=memory_mb(compute),
                epoch=loader.epoch,
                **{f"norm/grad_{name}": value for name, value in group_norms.items()},
                **model.loss_by_modality(loss, scored),
            )
            progress.update(
                run.step,
                run.smooth_loss or loss_value,
                run.figures(),
                pace,
                pace * model.flops_per_token() / peak,
                left / pace,
            )
            if stopped:
                break
        due.note_saved(saver.wait())

        # -- the end: what it was, still with an ear for signals, whose copies must not cut the last lines off
        if step_times:
            peak = max(peak, peak_flops(compute) * compute.world_size)  # the first measurement may have had company
            pace = median_rate(step_times)
            first = run.train_seconds - before - sum(seconds for seconds, _ in step_times)
            mfu = f"MFU {100 * pace * model.flops_per_token() / peak:.1f}% of {peak / 1e12:.3f} TFLOP/s"
            logger.info(f"median step: {pace:,.0f} tok/s, {mfu}; first {first:.1f} s")
        if stopped == "preempted":
            logger.info(
                f"stopped by {signals.requested or 'a signal to another rank'} at step {run.step}: --resume goes on"
            )
        if stopped == "nonfinite" and compute.rank == 0:
            guard.write_report(folder / "bad_batch.json")
        log.write(
            run.step,
            event=stopped,
            train_seconds=run.train_seconds,
            compile_seconds=training.compile_seconds,
            peak_flops=peak,
            **run.figures(),
        )
        return finish(settings, run, log, rows_log, stopped)


def print_samples(model: GPT, tokenizer: Tokenizer) -> None:
    from nanochat.engine import generate

    stop = (tokenizer.bos_id, *(m.start for m in model.config.modalities))
    length = min(48, model.rotary_length - 1)  # of which a context of 4 tokens has 40
    new = generate(model, [tokenizer.bos_id], length, temperature=0.8, top_k=50, stop=stop)[0]
    logger.info(f"sample: {tokenizer.decode(new)!r}")


def finish(settings: RunSettings, run: RunState, log: MetricsLog, rows_log: MetricsLog, stopped: str = "done") -> dict:
    """Close the logs, say where the model lies, and return the result of main()."""
    log.close(hurry=stopped == "preempted")
    rows_log.close()
    if EXIT_CODES[stopped] and not under_torchrun():
        sys.exit(EXIT_CODES[stopped])  # under torchrun any code but 0 would start the same step again
    logger.info(f"{settings.tag}: {duration(run.train_seconds)} of training, {tag_dir(settings)}")
    told = dict(model_tag=settings.tag, step=run.step, train_seconds=run.train_seconds, stopped=stopped)
    return {**told, **run.figures()}


if __name__ == "__main__":
    run_script(main)
