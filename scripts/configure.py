"""The wizard: ask the settings that a person decides, show what the run will cost, write config.py.

python -m scripts.configure [--stage base|adapters] [--output config.py] [--preset NAME] [--defaults]
                            [--set key=value ...] [--force]

Enter keeps the default, ? explains, < goes back. Nothing is written before the last yes.
"""

import argparse
import os
import re
import sys
import textwrap
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from nanochat.adapters import estimate as adapter_estimate
from nanochat.config.adapter_settings import TEXT_SOURCES, AdapterSettings, adapter_hardware_preset
from nanochat.config.command_line import typed
from nanochat.config.config_file import (
    STAGES,
    describe_setting,
    did_you_mean,
    literal,
    names_of,
    parse_value,
    read_config,
    render_config,
)
from nanochat.config.declaration import IllegalCombination, fields_of
from nanochat.config.presets import hardware_preset
from nanochat.config.settings import RunSettings, Settings, preset, type_name, validate
from nanochat.files import write_atomically
from nanochat.runtime import nearest_name, pick_device_type, run_script, shown
from nanochat.system.environment import UserError
from nanochat.training import estimate
from nanochat.training.estimate import (
    Hardware,
    describe_tying_savings,
    find_hardware,
    measure,
    measure_bytes,
    usable_devices,
)

TYING = ("use_output_projection", "output_projection_residual", "tied_weights_lr", "embedding_lr", "unembedding_lr")
PRESETS_ABOUT = {
    "cpu": "minutes on a laptop",
    "audio": "captioned melodies, minutes on a laptop",
    "gpu1": "hours on one GPU",
    "8xh100": "hours on a node of 8",
    "llama": "Llama-3.2-1B and MusicGen-small, hours on one GPU",
    "tiny": "a host of ours and captioned melodies, minutes on a laptop",
}
HUB_NAME = re.compile(r"[\w.-]{1,96}(/[\w.-]{1,96})?", re.ASCII)
BACK, HELP = "<", "?"
KEEP = "keep"


@dataclass
class Dialogue:
    """What has been decided so far: the start (a preset, or an existing config) and the answers that override it."""

    hardware: Hardware
    start: RunSettings
    preset_name: str
    answers: dict

    @property
    def settings(self) -> RunSettings:
        return replace(self.start, **self.answers)

    @property
    def kind(self) -> type[RunSettings]:
        return type(self.start)

    @property
    def questions(self) -> list[tuple[str, str]]:
        """(group, name of the setting) in the order in which they are asked.

        A question whose setting has no effect under the earlier answers is not asked: only a tied model gets those on
        tying.
        """
        fields = fields_of(self.kind)
        return [(g, name) for g in self.kind.groups for name in names_of(g, self.kind) if fields[name].metadata["ask"]]

    def used_hardware(self) -> Hardware:
        """The machine as the run will use it: another device may have been chosen than the best one."""
        if self.settings.device_type not in (None, self.hardware.device_type):
            self.hardware = find_hardware(self.settings.device_type)
        return self.hardware


def main(argv: list[str] | None = None) -> RunSettings | None:
    """Run the wizard; returns the settings written (or found unchanged on disk), None when the user declined."""
    args = _parse_arguments(argv)
    path = Path(os.path.realpath(args.output))  # write through a link instead of replacing it
    _check_writable(path, args.output)
    kind = STAGES[args.stage]
    chosen = {name: parse_value(name, text, kind) for name, text in args.set.items()}
    existing = _read_existing(path, kind) if args.preset is None else None
    hardware = find_hardware(chosen.get("device_type"))
    suggest = adapter_hardware_preset if kind is AdapterSettings else hardware_preset
    own = suggest(hardware.device_type, hardware.count)
    first = KEEP if existing is not None else args.preset or own
    dialogue = Dialogue(hardware, _make_start(kind, first, existing, chosen), first, {})
    try:
        if not args.defaults:
            say(f"nanochat wizard. {hardware.name}: preset {own}. Enter keeps [the default], ? explains, < goes back.")
            consent = _ask_everything(dialogue, existing, chosen, ask_preset=args.preset is None, output=args.output)
            if not consent:
                say("nothing was written")
                return None
        settings = validate(_reset_unused(dialogue.settings))
        for name in _list_tying(kind):
            if (given := getattr(dialogue.settings, name)) != getattr(settings, name):
                reason = dialogue.settings.no_effect_reason(name)
                say(
                    f"note: {reason}: written as {_format_answer(getattr(settings, name))}, not {_format_answer(given)}"
                )
        if args.defaults:
            _show(settings, dialogue.used_hardware())
        return _write(settings, path, args, dialogue.used_hardware())
    except EOFError:
        say()  # the cursor still stands behind a question
        raise UserError("the input ended: nothing was written (--defaults asks nothing)") from None
    except UnicodeDecodeError:
        raise UserError("the input is not UTF-8 text: nothing was written") from None
    except KeyboardInterrupt:
        say("\nstopped: nothing was written")
        raise


def _parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.configure", description="Write config.py in a dialogue.", allow_abbrev=False
    )
    parser.add_argument("--output", default="config.py", help="file to write (default config.py)")
    parser.add_argument("--stage", default="base", help=f"what to train: {' or '.join(STAGES)} (default base)")
    presets = ", or ".join(f"{', '.join(kind.presets())} (stage {stage})" for stage, kind in STAGES.items())
    parser.add_argument("--preset", help=f"start from {presets} and do not ask which")
    parser.add_argument("--defaults", action="store_true", help="ask nothing")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="start from this value")
    parser.add_argument("--force", action="store_true", help="with --defaults: overwrite an existing file")

    def refuse(message: str):
        raise UserError(f"{message} (--help lists the options)")

    parser.error = refuse
    args = parser.parse_args(argv)
    if args.stage not in STAGES:
        raise UserError(f"unknown --stage {args.stage!r}{nearest_name(args.stage, STAGES)}")
    kind = STAGES[args.stage]
    if args.preset is not None:
        preset(args.preset, kind)  # an unknown one is refused here, with the nearest name
    pairs = {}
    for pair in args.set:
        name, equals, text = pair.partition("=")
        name = name.strip().replace("-", "_")
        if not equals:
            raise UserError(f"--set {pair!r} is not KEY=VALUE")
        if name not in fields_of(kind):
            raise UserError(f"--set: unknown setting {name!r}{did_you_mean(name, kind)}")
        if name in pairs:
            raise UserError(f"--set: {name} is given twice")
        pairs[name] = text
    args.set = pairs
    return args


def _read_existing(path: Path, kind: type[RunSettings]) -> dict | None:
    """The values of the file that would be overwritten, or None without one."""
    if not os.path.exists(path):
        return None
    try:
        return read_config(path, kind)
    except UserError as error:
        names = "|".join(kind.presets())
        raise UserError(f"{error} (mend or delete the file, or start from --preset {names})") from None


def _check_writable(path: Path, given: str) -> None:
    """Refuse an impossible output before the first question, not after the last."""
    folder = path.parent
    while not os.path.exists(folder):
        folder = folder.parent
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        pass  # the folder decides
    except OSError as error:  # a name too long, a folder that cannot be searched, a link to itself
        raise UserError(f"--output {given[:99]!r} cannot be written: {error.strerror}") from None
    if path.is_dir() or (path.exists() and not path.is_file()):
        raise UserError(f"--output {given!r} is not a file: name one, such as {path / 'config.py'}")
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise UserError(f"--output {given!r} cannot be written: {folder} is not a writable folder")


def _make_start(kind: type[RunSettings], name: str, existing: dict | None, chosen: dict) -> RunSettings:
    """The settings before the first answer: the existing config or a preset, overridden by --set."""
    base = kind(**existing) if name == KEEP else preset(name, kind)
    return replace(base, **chosen)


def _list_tying(kind: type[RunSettings]) -> tuple[str, ...]:
    return TYING if kind is Settings else ()


def _reset_unused(settings: RunSettings) -> RunSettings:
    """Tying settings that have no effect under the others are written with their defaults."""
    kind = type(settings)
    off = {name: fields_of(kind)[name].default for name in _list_tying(kind) if settings.no_effect_reason(name)}
    return replace(settings, **off)


# ---------------------------------------------------------------------------------------------------------------------
# the dialogue


def say(text: str = "", indent: str = "") -> None:
    """Print text wrapped to 79 columns, line by line."""
    for line in text.split("\n"):
        print(textwrap.fill(line, 79, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False))


def listen(prompt: str) -> str:
    """One stripped answer; piped input is echoed, so that a log reads like the dialogue. EOFError at the end."""
    answer = input(prompt)
    answer.encode("utf-8", "surrogateescape").decode()  # UnicodeDecodeError for bytes that standard input let through
    if not sys.stdin.isatty():
        print(answer)
    return answer.strip()


def _ask_everything(dialogue: Dialogue, existing: dict | None, chosen: dict, ask_preset: bool, output: str) -> bool:
    """Ask all questions in order, then for consent; True: write the file. `visited` is the way back."""
    questions, groups = dialogue.questions, dialogue.kind.groups
    position, visited, group_shown = (-1 if ask_preset else 0), [], None

    while True:
        while 0 <= position < len(questions) and dialogue.settings.no_effect_reason(questions[position][1]):
            position += 1

        if position == -1:
            answered = True
            _ask_preset(dialogue, existing, chosen)
        elif position < len(questions):
            group, name = questions[position]
            if group != group_shown:
                say(f"\n[{groups.index(group) + 1}/{len(groups)}] {group}")
                group_shown = group
            answered = _ask(dialogue, name, position)
        elif (problem := _find_problem(dialogue.settings)) is not None:  # an answer made an earlier one illegal
            position = _find_question(dialogue, problem)
            visited = [p for p in visited if p < position]
            continue
        else:
            answer = _ask_consent(dialogue, output)
            if answer != BACK:
                return answer == "yes"
            answered = False

        if answered:
            visited.append(position)
            position += 1
        elif visited:
            position, group_shown = visited.pop(), None
        else:
            say("  this is the first question")


def _find_question(dialogue: Dialogue, problem: IllegalCombination) -> int:
    """The position of the question that can mend a problem, which is printed; UserError where none can."""
    say(f"  {problem}")
    names = [name for _, name in dialogue.questions]
    if problem.name not in names or dialogue.settings.no_effect_reason(problem.name):
        raise UserError(str(problem))
    return names.index(problem.name)


def _ask_preset(dialogue: Dialogue, existing: dict | None, chosen: dict) -> None:
    presets = dialogue.kind.presets()
    names = [*presets, *([KEEP] if existing is not None else [])]
    say("\nwhich preset to start from" + ("; keep takes the values of the existing file" if existing else ""))
    while True:
        answer = listen(f"preset ({', '.join(names)}) [{dialogue.preset_name}]: ") or dialogue.preset_name
        if answer == HELP:
            say("\n".join(f"{name}: {PRESETS_ABOUT[name]}" for name in presets), "  ")
        elif answer == BACK:
            say("  this is the first question")
        elif answer not in names:
            say(f"unknown preset {answer!r}{nearest_name(answer, names)}", "  ")
        else:
            if answer != dialogue.preset_name:
                if dialogue.answers:
                    say("another preset: the answers so far are discarded", "  ")
                dialogue.start, dialogue.preset_name = _make_start(dialogue.kind, answer, existing, chosen), answer
                dialogue.answers = {}
            return


def _ask(dialogue: Dialogue, name: str, position: int) -> bool:
    """Ask one setting until the answer is legal; False for going back."""
    default = getattr(dialogue.settings, name)
    later = {n for _, n in dialogue.questions[position + 1 :]}
    wording = fields_of(dialogue.kind)[name].metadata["ask"]
    question = name if wording is True else wording
    say()
    say(_explain(dialogue.settings, name))
    while True:
        answer = listen(f"{question} [{_format_answer(default)}]: ")
        if answer == BACK:
            return False
        if answer == HELP:
            say(_describe(name, dialogue.kind), "  ")
            continue
        try:
            value = parse_value(name, answer, dialogue.kind) if answer else default
            if answer or name == "device_type":
                _check_on_this_machine(name, value, dialogue.kind)
        except UserError as error:
            say(str(error), "  ")
            continue
        old, problem = _find_problem(dialogue.settings), _find_problem(replace(dialogue.settings, **{name: value}))
        # Refuse what this answer breaks, unless a later question can mend it. What --set or a file broke before it
        # waits for the end.
        if problem is None or problem.name in later or (old is not None and old.name == problem.name != name):
            if value != getattr(dialogue.start, name):
                dialogue.answers[name] = value
            else:
                dialogue.answers.pop(name, None)
            return True
        say(str(problem), "  ")
        if problem.name == name:
            default = problem.nearest


def _explain(settings: RunSettings, name: str) -> str:
    """The line above a question; for tie_weights, the parameters that it saves at this vocabulary and width."""
    problem = _find_problem(settings)  # no model can be made of a wrong pattern, which may still be mended
    if name == "tie_weights" and (problem is None or problem.name != "window_pattern"):
        return f"one matrix for the embedding and the logits {describe_tying_savings(settings)}"
    data = fields_of(type(settings))[name].metadata
    choices = data["choices"]
    return data["help"] + (f" ({', '.join(choices)})" if choices else "")


def _find_problem(settings: RunSettings) -> IllegalCombination | None:
    try:
        validate(settings)
    except IllegalCombination as problem:
        return problem
    return None


def _check_on_this_machine(name: str, value, kind: type[RunSettings]) -> None:
    """UserError for an answer that this machine cannot serve: an absent device, file, folder or source."""
    if name == "device_type":
        pick_device_type(value)
    if name in ("data", "text_data", "check_text") and value is not None and not value.startswith("hf:"):
        sounds = ("synth",) * (name == "data")
        sources = sounds if kind is AdapterSettings and sounds else (*TEXT_SOURCES, *sounds)
        known = nearest_name(value, sources)
        hint = known if "did you mean" in known else f" ({', '.join(sources)}, hf:<dataset>, or a path)"
        if value not in sources and not os.path.exists(os.path.expanduser(value)):
            raise UserError(f"{name}={value!r} is neither a known source nor a file or folder here{hint}")
    if name in ("host", "musicgen") and value is not None and not value.startswith("nanochat:"):
        folder = value.removeprefix("meta:")
        if not (os.path.isdir(os.path.expanduser(folder)) or (HUB_NAME.fullmatch(folder) and folder == value)):
            raise UserError(f"{name}={shown(value)} is neither a folder here nor a hub name, such as facebook/name")


def _describe(name: str, kind: type[RunSettings]) -> str:
    declared, lines = fields_of(kind)[name], [describe_setting(name, kind)]
    limits = [("ge", "at least"), ("gt", "more than"), ("le", "at most")]
    data = declared.metadata
    bounds = [f"{words} {data[key]:,}" for key, words in limits if data[key] is not None]
    lines.append(f"{type_name(name, kind)}{', ' if bounds else ''}{', '.join(bounds)}")
    lines.append(f"built-in default {literal(declared.default)}; flag --{name}")
    return "\n".join(lines)


def _format_answer(value) -> str:
    """A value as a person would type it."""
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


# ---------------------------------------------------------------------------------------------------------------------
# the end: table, consent, file, next command


def _show(settings: RunSettings, hardware: Hardware, flops: float | None = None) -> None:
    if isinstance(settings, AdapterSettings):
        lines = adapter_estimate.report(settings, hardware)
    else:
        lines = estimate.report(settings, hardware, flops)
    print("\n".join(lines), flush=True)


def _ask_consent(dialogue: Dialogue, output: str) -> str:
    """Show what else the file will hold and what the run will cost; 'yes', 'no' or '<'."""
    settings, hardware = _reset_unused(dialogue.settings), dialogue.used_hardware()
    asked = {name for _, name in dialogue.questions if not dialogue.settings.no_effect_reason(name)}
    also = [name for group in dialogue.kind.groups for name in names_of(group, dialogue.kind) if name not in asked]
    say(f"\nalso in the file, with their values: {', '.join(also)}\n")
    _show(settings, hardware)

    if isinstance(settings, AdapterSettings):
        say()  # real steps would need the host: nothing is measured
    elif not _fits(settings, hardware):
        say("\n(too little memory here for real steps: the speed is not measured)")
    else:
        say()
        answer = _ask_yes_no("measure the speed with a few real steps, about 10 seconds?", default=False)
        if answer == BACK:
            return BACK
        if answer == "yes":
            _show_measured(settings, hardware)

    path = Path(os.path.realpath(output))
    if not path.exists():
        return _ask_yes_no(f"write {output}?", default=True)
    if path.read_bytes() == render_config(settings).encode():
        return "yes"  # nothing would change, so there is nothing to agree to
    return _ask_yes_no(f"{output} exists and would change. overwrite it?", default=False)


def _show_measured(settings: Settings, hardware: Hardware) -> None:
    try:
        _show(settings, hardware, measure(settings, hardware))
    except torch.OutOfMemoryError:
        say("(not measured: the device ran out of memory; a lower device_batch_size needs less)")
    say()


def _fits(settings: Settings, hardware: Hardware) -> bool:
    """Whether a short measurement fits a device, with a tenth of its memory to spare."""
    return hardware.memory is None or measure_bytes(settings, hardware) < 0.9 * hardware.memory


def _ask_yes_no(question: str, default: bool) -> str:
    while True:
        answer = listen(f"{question} [{_format_answer(default)}]: ").lower() or _format_answer(default)
        if answer == BACK or answer in ("yes", "no"):
            return answer
        if answer in ("y", "n"):
            return "yes" if answer == "y" else "no"
        say(f"  {answer!r} is not yes, no or <")


def _write(settings: RunSettings, path: Path, args: argparse.Namespace, hardware: Hardware) -> RunSettings:
    text = render_config(settings)
    if path.exists() and path.read_bytes() == text.encode():
        say(f"\n{args.output} already says exactly this: nothing to write")
    elif path.exists() and args.defaults and not args.force:
        raise UserError(
            f"{args.output} exists and would change: nothing was written; --force overwrites it, or --output"
        )
    else:
        try:
            write_atomically(path, text)
        except OSError as error:
            raise UserError(f"cannot write {args.output}: {error.strerror}; name another file with --output") from None
        say(f"\nwrote {args.output}")
    print("\n".join(next_commands(settings, args.output, hardware)), flush=True)
    return settings


def next_commands(settings: RunSettings, output: str, hardware: Hardware) -> list[str]:
    """What to type next: one process, all GPUs of this node, several nodes; no environment needs to be active."""
    devices = usable_devices(settings, hardware.count)
    gpus = hardware.count if hardware.device_type == "cuda" else 0
    idle = f", {gpus - devices} idle: the batch does not divide among all" if gpus > devices else ""
    python, config, script = typed(sys.executable), typed(output), settings.script
    nodes = typed(Path(__file__).resolve().parent.parent / "runs" / "nodes.sh")
    lines = [
        "",
        "next, one process:",
        f"  {python} -m {script} {config}",
        f"next, torchrun on this node ({gpus} GPUs found{idle}):",
        f"  {python} -m torch.distributed.run \\",
        f"    --standalone --nproc_per_node={devices} -m {script} {config}",
    ]
    if isinstance(settings, Settings):  # what runs/nodes.sh starts
        lines += [
            "next, torchrun on several nodes (the same line on each; HOST is one of them,",
            "FOLDER a folder that all of them see):",
            f"  NNODES=2 NPROC={devices} MASTER_ADDR=HOST NANOCHAT_BASE_DIR=FOLDER \\",
            f"    bash {nodes} {config}",
        ]
    return lines


if __name__ == "__main__":
    run_script(main)
