"""Resuming: which settings apply, the state of a run beside weights and optimizer, and loading it from a checkpoint."""

import base64
import dataclasses
import json
import logging
import math
import os
import platform
from collections.abc import Callable
from pathlib import Path

import torch

from nanochat import checkpoint_files
from nanochat import checkpoint_manager as checkpoints
from nanochat.config.config_file import CommandLine, read_config
from nanochat.config.declaration import fields_of, resumable_names
from nanochat.config.settings import RunSettings, Settings, checked_settings, validate
from nanochat.data.trained_data import LOCATION_SETTINGS, check_same, is_local
from nanochat.files import write_atomically
from nanochat.gpt import GPTConfig
from nanochat.runtime import process_state
from nanochat.system.environment import UserError, under_torchrun, world_size_from_env

logger = logging.getLogger(__name__)


@dataclasses.dataclass
class RunState:
    """The state of a run besides weights, optimizer and loader; part of every checkpoint."""

    step: int = 0
    train_seconds: float = 0.0  # steps only: without evaluation, samples and saving
    smooth_loss: float | None = None
    val_bpb: float | None = None
    smooth_loss_at_eval: float | None = None
    overfit_warned: bool = False
    skipped: int = 0  # non-finite steps, whose update was skipped
    bad_in_a_row: int = 0  # of them, those since the last finite step
    evaluated: int = 0  # the last step at which all evaluation that was due is done

    def figures(self) -> dict[str, float | None]:
        """What was last measured on held-out data, under the names of metrics.jsonl."""
        return {"val_bpb": self.val_bpb}

    def note_loss(self, loss: float) -> None:
        self.smooth_loss = loss if self.smooth_loss is None else 0.9 * self.smooth_loss + 0.1 * loss

    def note_val_bpb(self, bpb: float) -> None:
        """Keep val bpb; warn once when it rises while the training loss falls, which is over-fitting."""
        self._note("val bpb", self.val_bpb, bpb)
        self.val_bpb = bpb

    def _note(self, name: str, before: float | None, now: float) -> None:
        logger.info(f"step {self.step}: {name} {now:.4f}")
        falling = self.smooth_loss_at_eval is not None and self.smooth_loss < self.smooth_loss_at_eval
        if before is not None and now > before and falling and not self.overfit_warned:
            self.overfit_warned = True
            logger.warning(f"{name} rises ({before:.4f} -> {now:.4f}) while the training loss falls: over-fitting")
        self.smooth_loss_at_eval = self.smooth_loss


@dataclasses.dataclass(frozen=True)
class Origin:
    """The checkpoint that a run starts from: its own newest one where it resumes, else the newest one of init_from."""

    folder: Path  # of the tag
    step: int
    metadata: dict  # of that step, as checkpoint_manager.metadata_of() gives it
    resumed: bool = False  # it is the run's own

    @property
    def path(self) -> Path:
        """What holds the weights: a folder, or a file of nanochat's."""
        return checkpoints.step_path(self.folder, self.step)


def read_origin(settings: RunSettings, step: int | None) -> Origin | None:
    """The checkpoint that a run starts from. step: the one to resume from. None: the run draws its first weights."""
    if step is not None:
        folder = checkpoints.tag_dir(settings)
        return Origin(folder, step, checkpoint_files.read_metadata(checkpoint_files.step_dir(folder, step)), True)
    init_from = getattr(settings, "init_from", None)
    if init_from is None:
        return None
    folder, step = checkpoints.find_checkpoint(init_from, None)
    return Origin(folder, step, checkpoints.metadata_of(folder, step, settings.init_era))


def resolve_run(command: CommandLine, resume: bool, initial: Origin | None) -> tuple[RunSettings, Origin | None]:
    """The settings that count, validated, and the checkpoint to start from; --overwrite moves an earlier run aside.

    initial: what apply_init_from() read. Includes all checks that need no device.
    """
    settings, origin = command.settings, initial
    tag_dir = checkpoints.tag_dir(settings)
    if foreign := sorted(tag_dir.glob("model_*.pt")):
        raise UserError(
            f"{tag_dir} holds nanochat's own checkpoints ({foreign[0].name}), which are only read: "
            "train under another name with --model_tag=NAME"
        )
    if resume and checkpoints.list_steps(tag_dir):
        step = checkpoints.newest_step(tag_dir)
        if step is None:
            raise UserError(f"{tag_dir} holds no complete step to resume from; --overwrite=True starts over beside it")
        origin = read_origin(settings, step)
        settings = resumed_settings(command, tag_dir, origin.metadata.get("settings", {}), step)
    elif resume and (tag_dir / "config.py").is_file():
        logger.info(f"{tag_dir} holds no step yet: starting its run again")
        settings, origin = (
            resumed_settings(command, tag_dir, read_config(tag_dir / "config.py", type(settings)), 0),
            None,
        )
    elif resume:
        logger.info(f"nothing to resume in {tag_dir}: starting a new run")

    validate(settings, world_size_from_env())
    if not resume and tag_dir.is_dir() and any(tag_dir.iterdir()):
        _move_aside(tag_dir, settings)
    return settings, origin or read_origin(settings, None)


def _move_aside(tag_dir: Path, settings: RunSettings) -> None:
    """Make room for a new run of this name; UserError without --overwrite."""
    if not settings.overwrite:
        raise UserError(
            f"model_tag={settings.tag!r} holds a run already ({tag_dir}): continue it with --resume, take another "
            f"name with --model_tag=NAME, or start over with --overwrite=True"
        )
    aside = next(p for n in range(1, 10**6) if not (p := tag_dir.with_name(f".{tag_dir.name}.old-{n}")).exists())
    os.rename(tag_dir, aside)
    logger.info(f"the earlier run was moved to {aside}")


def _launcher() -> dict:
    """What tells this torchrun from any other: its process, and its id where that is one."""
    parent = os.getppid()
    return dict(
        host=platform.node(), pid=parent, started=process_state(parent)[1], id=os.environ["TORCHELASTIC_RUN_ID"]
    )


def record_launcher(tag_dir: Path) -> None:
    """Under torchrun, leave in launcher.json whose run this is."""
    if under_torchrun():
        write_atomically(tag_dir / "launcher.json", json.dumps(_launcher()))


def is_own_torchrun(tag_dir: Path) -> bool:
    """Whether the run in the folder was started by the torchrun that started this process, perhaps from another host.

    A start that was refused, because the folder holds somebody else's run, must not turn into a resume when torchrun
    tries it again.
    """
    try:
        noted = json.loads((tag_dir / "launcher.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return False
    mine = _launcher()
    elsewhere = noted.get("host") != mine["host"] and mine["id"] not in ("", "none") and noted.get("id") == mine["id"]
    return noted == mine or elsewhere


def resumed_settings(command: CommandLine, tag_dir: Path, settings: dict, step: int) -> RunSettings:
    """The run's own settings with what the flags may change; any other flag that differs is refused by name.

    settings: as the checkpoint has them, or the tag's config.py when the run ended before its first one. The config.py
    of the command line is ignored, with a message for each difference: the checkpoint describes the run.
    """
    kind = type(command.settings)
    may_change = resumable_names(kind)
    saved = checked_settings(settings, kind, f"{tag_dir.name}, step {step}")
    if saved:  # a setting newer than the checkpoint was at its default, whatever a config.py has
        saved = {name: field.default for name, field in fields_of(kind).items() if name not in may_change} | saved
    merged = dataclasses.replace(command.settings, **saved)
    if merged.tag != tag_dir.name:  # the folder was renamed or copied: the run continues there
        merged = dataclasses.replace(merged, model_tag=tag_dir.name)
    differing = {name: getattr(command.settings, name) for name in command.origins}
    differing = {name: value for name, value in differing.items() if value != getattr(merged, name)}
    changed = {name: value for name, value in differing.items() if command.origins[name] == "command line"}
    for name in sorted(differing.keys() - changed.keys() - {"model_tag"}):
        message = f"{name}={getattr(merged, name)!r} applies, not {differing[name]!r} of {command.origins[name]}"
        logger.info(f"resuming: {message}" + (f"; change it with --{name}=..." if name in may_change else ""))
    changeable = may_change | (set(LOCATION_SETTINGS) if is_local(changed.get("data")) else set())
    if refused := sorted(changed.keys() - changeable - {"model_tag"}):
        named = ", ".join(f"{n}={changed[n]!r} (the run has {getattr(merged, n)!r})" for n in refused)
        raise UserError(f"--resume cannot change {named}: drop the flag, or start a new run with --model_tag=NAME")
    horizon = [name for name in ("num_iterations", "target_flops", "target_param_data_ratio") if name in changed]
    if horizon and (changed.get("num_iterations") or math.inf) > step:
        logger.info(f"new horizon ({', '.join(horizon)}): the warmdown is recomputed for it")
    return dataclasses.replace(merged, **{name: changed[name] for name in changed.keys() & changeable})


def apply_init_from(command: CommandLine) -> tuple[CommandLine, Origin | None]:
    """Under init_from, model settings that neither config.py nor a flag gives are those of that checkpoint.

    Returns the checkpoint, too; None without init_from, and for a named run that resumes: its own checkpoint counts.
    """
    if "resume" in command.switches and command.settings.model_tag:
        return command, None
    origin = read_origin(command.settings, None)
    if origin is None:
        return command, None
    config = checkpoints.model_config(origin.metadata)
    inherited = {name: value for name, value in Settings.of_model(config).items() if name not in command.origins}
    settings = dataclasses.replace(command.settings, **inherited)
    origins = {name: f"init_from={settings.init_from}" for name in inherited}
    return dataclasses.replace(command, settings=settings, origins=origins | command.origins), origin


def merge_checkpoint_config(config: GPTConfig, origin: Origin) -> tuple[GPTConfig, bool]:
    """The configuration with what no setting names as a checkpoint has it, and whether untie_at has split its tables.

    No setting names what a gate reads and its range, nor the number of ids where the tokenizer does not use them all.
    """
    saved = checkpoints.model_config(origin.metadata)
    names = ["vocab_size", "value_gate_channels", "value_gate_range"]
    if config.n_layer < 3:  # where the settings leave backout out, for it has no effect
        names.append("backout")
    split = config.tie_weights and not saved.tie_weights
    return dataclasses.replace(config, **{name: getattr(saved, name) for name in names}), split


def init_from_checkpoint(origin: Origin, era: str | None, model, optimizer, tokenizer, dataset) -> None:
    """Load the weights of another run's checkpoint into a new run; UserError where they are of another kind.

    Of a run of ours only the weights, for it has ended its schedule. One of nanochat's continues with its optimizer's
    state where the files hold it completely, converted or not. era: the setting init_era.
    """
    where = origin.path
    theirs = checkpoints.is_upstream(origin.folder, origin.step)
    converted = not theirs and "converted_from" in origin.metadata
    state, optimizer_state, metadata = checkpoints.load_checkpoint(
        origin.folder,
        origin.step,
        load_optimizer=theirs or (converted and (where / "optimizer.safetensors").is_file()),
        era=era,
    )
    checkpoints.check_tokenizer(tokenizer, metadata, where)
    saved = checkpoints.model_config(metadata)
    mine = dataclasses.asdict(model.config)
    there = dataclasses.asdict(dataclasses.replace(saved, sequence_len=model.config.sequence_len))
    if differing := [name for name in mine if there[name] != mine[name]]:
        named = ", ".join(f"{name}={there[name]!r} there, {mine[name]!r} here" for name in differing)
        raise UserError(f"init_from={origin.folder.name!r} holds another model than the settings describe: {named}")
    checkpoints.check_codec(dataset, metadata, where)
    checkpoints.check_state(model, state, where)
    checkpoints.check_finite(state, where)
    model.load_state_dict(state)
    if optimizer_state is not None:
        optimizer.load_state_dict(optimizer_state)
    with_moments = " and its optimizer's state" if optimizer_state is not None else ""
    logger.info(f"initialised from the weights of {where}{with_moments}")


def restore(origin: Origin, model, optimizer, loader, tokenizer, dataset) -> RunState:
    """Load weights, optimizer, loader and generators of a step; returns the run's state at it.

    UserError when a part is missing or of another shape, or belongs to another model, tokenizer or data.
    """
    where = origin.path
    model_state, optimizer_state, metadata = checkpoints.load_checkpoint(
        origin.folder, origin.step, load_optimizer=True
    )
    checkpoints.check_tokenizer(tokenizer, metadata, where)
    if (saved := checkpoints.model_config(metadata)) != model.config:
        raise UserError(f"{where} holds another model than the settings describe: {saved}, not {model.config}")
    checkpoints.check_finite(model_state | optimizer_state, where)
    return restore_progress(
        where,
        metadata,
        dataset,
        loader,
        lambda: model.load_state_dict(model_state),
        lambda: optimizer.load_state_dict(optimizer_state),
        RunState(),
    )


def progress_of(run: RunState, loader) -> dict:
    """Where the run is, for a checkpoint's metadata; restore_progress() reads it."""
    return dict(
        loader=loader.state_dict(),
        run=dataclasses.asdict(run),
        rng=base64.b64encode(torch.get_rng_state().numpy().tobytes()).decode(),
        threads=torch.get_num_threads(),
        versions=dict(torch=torch.__version__, python=platform.python_version()),
    )


def record_evaluated(tag_dir: Path, run: RunState) -> None:
    """Write an evaluation's results beside the steps: the checkpoint of its step was written before it."""
    write_atomically(tag_dir / "evaluated.json", json.dumps(dataclasses.asdict(run)) + "\n")


def evaluated_after_save(tag_dir: Path, run: RunState) -> dict:
    """Numbers of the run's state that an evaluation of this very step found after it was saved; {} without one.

    What belongs to another step, of a stretch of the run that is gone, is deleted.
    """
    path = tag_dir / "evaluated.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    known = {field.name for field in dataclasses.fields(run)}
    right = isinstance(found, dict) and found.get("step") == run.step == found.get("evaluated")
    if right and all(isinstance(value, (int, float, type(None))) for value in found.values()):
        return {name: value for name, value in found.items() if name in known}
    path.unlink(missing_ok=True)
    return {}


def restore_progress(
    where: Path, metadata: dict, dataset, loader, load_weights: Callable, load_optimizer: Callable, run: RunState
) -> RunState:
    """Weights, optimizer, loader and generators of the step folder `where`; returns its run's state, of run's kind.

    UserError when the data is another, or a part is missing or of another shape.
    """
    check_same(metadata.get("data_fingerprint"), dataset, where, dataset.name)
    known = {field.name for field in dataclasses.fields(run)}
    numbers = {name: value for name, value in metadata.get("run", {}).items() if name in known}
    try:
        load_weights()
        load_optimizer()
        loader.load_state_dict(metadata["loader"])
        if "rng" in metadata:
            torch.set_rng_state(torch.frombuffer(bytearray(base64.b64decode(metadata["rng"])), dtype=torch.uint8))
        if wrong := [name for name, value in numbers.items() if not isinstance(value, (int, float, type(None)))]:
            raise TypeError(f"run.{wrong[0]} is not a number")
    except UserError:
        raise
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        what = f"{error} is missing" if isinstance(error, KeyError) else error
        raise UserError(f"{where} cannot be resumed: {what}") from error
    if metadata.get("threads") != torch.get_num_threads():
        logger.info(
            f"note: {metadata.get('threads')} threads then, {torch.get_num_threads()} now: sums may round differently"
        )
    logger.info(f"resuming from {where}")
    step = metadata["step"]
    return dataclasses.replace(run, **{"evaluated": step} | numbers | {"step": step})
