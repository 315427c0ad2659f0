"""Damaged and odd checkpoints, configs, flags and output paths."""

import shutil
from collections.abc import Callable
from pathlib import Path

from scripts.stress.inputs.cases import Case, Refused, Used
from scripts.stress.inputs.files import TRAIN
from scripts.stress.inputs.texts import text_of, write

RUN = ("scripts.base_train", "--data={in}/input.txt", "--save_every=2", *TRAIN)
STEP = "base/base_checkpoints/try/step_000004"


def build(folder: Path) -> None:
    write("input.txt", text_of(20_000).encode(), folder)


def cases() -> list[Case]:
    return [*_damaged(), *_flags(), *_configs(), *_outputs()]


def _damaged() -> list[Case]:
    def cut(name: str) -> Callable[[Path], object]:
        def change(folder: Path) -> None:
            path = folder / STEP / name
            path.write_bytes(path.read_bytes()[:-1])

        return change

    def empty(name: str) -> Callable[[Path], object]:
        return lambda folder: (folder / STEP / name).write_bytes(b"")

    def spoil(folder: Path) -> None:
        """Weights with a NaN under a manifest that fits them, as a run that diverged elsewhere would leave."""
        import torch
        from safetensors.torch import load_file, save_file

        from nanochat.checkpoint_files import write_manifest

        state = load_file(folder / STEP / "model.safetensors")
        state["lm_head.weight"][3, 5] = torch.nan
        save_file(state, folder / STEP / "model.safetensors")
        write_manifest(folder / STEP)

    generate = ("scripts.base_generate", "--max-tokens=8")
    named = ("scripts.base_eval", "--step=4", "--eval=bpb")
    resume = (*(word.replace("num_iterations=4", "num_iterations=6") for word in RUN), "--resume")
    again = ("scripts.base_train", "--data={in}/input.txt", *TRAIN[:-1], "--model_tag=more", "--init_from=try")
    found = []
    for label, change in {
        "weights cut off": cut("model.safetensors"),
        "empty weights": empty("model.safetensors"),
        "an empty manifest": empty("manifest.json"),
        "an empty state": empty("state.json"),
        "an empty optimizer": empty("optimizer.safetensors"),
    }.items():
        expect = Used(says=["step_000004"], left=["base_checkpoints/try/step_000006/manifest.json"])
        found.append(Case(f"resume past {label}", build, [RUN, change, resume], expect))
        found.append(Case(f"evaluate a step with {label}", build, [RUN, change, named], Refused(["step_000004"])))
        inspect = ("scripts.inspect_checkpoint", f"{{folder}}/{STEP}")
        found.append(Case(f"inspect {label}", build, [RUN, change, inspect], Found(["step_000004"])))
    for label, words in {
        "generate": generate,
        "generate at temperature 0": (*generate, "--temperature=0"),
        "start": again,
    }.items():
        found.append(Case(f"{label} from NaN weights", build, [RUN, spoil, words], Refused(["lm_head"])))
    missing = lambda folder: shutil.rmtree(folder / "in")  # noqa: E731
    gone = Used(left=["base_checkpoints/try/step_000006/manifest.json"])
    moved = lambda folder: (folder / "in" / "input.txt").write_bytes(b"another text " * 2000)  # noqa: E731
    found.append(Case("resume without the data's source", build, [RUN, missing, resume], gone))
    found.append(Case("resume after the data's source changed", build, [RUN, moved, resume], gone))
    return found


class Found(Refused):
    """A check that found a difference: exit code 1, and the output says what."""

    def failure(self, result) -> str | None:
        if result.code != 1:
            return f"exit code {result.code} instead of 1"
        output = result.output + result.errors
        return next((f"the output does not say {p!r}" for p in self.says if p not in output), None)


def _flags() -> list[Case]:
    data = "--data={in}/input.txt"
    return [
        Case(f"base_train {flag}", build, [("scripts.base_train", data, *TRAIN, flag)], Refused(says))
        for flag, says in {
            "--eval_every=-1": ["None"],
            "--save_every=-1": ["None"],
            "--sample_every=0": ["None"],
            "--core_metric_every=-1": ["None"],
            "--keep_last=-1": ["None"],
            "--grad_clip=-1": ["None"],
            "--seed=99999999999999999999": ["seed"],
            "--mlp_ratio=0.001": ["mlp_ratio"],
            "--max_seq_len=1": ["max_seq_len"],
            "--num_iterations=1e400": ["num_iterations"],
            "--nosuch=1": ["nosuch"],
            "--depth=": ["depth"],
        }.items()
    ] + [
        Case(f"base_generate {flag}", build, [RUN, ("scripts.base_generate", "--max-tokens=4", flag)], Refused(says))
        for flag, says in {
            "--top-k=0": ["top.k"],
            "--seed=99999999999999999999": ["seed"],
            "--temperature=nan": ["temperature"],
            "--step=77": ["77"],
            "--model-tag=nosuch": ["nosuch"],
        }.items()
    ]


def _configs() -> list[Case]:
    def config(raw: bytes) -> Callable[[Path], object]:
        def make(folder: Path) -> None:
            build(folder)
            (folder / "config.py").write_bytes(raw)

        return make

    plain = b"depth = 2\nmodel_tag = 'other'\n"
    left = Used(left=["base_checkpoints/try/step_000004/manifest.json"])
    words = ("scripts.base_train", "{in}/config.py", "--data={in}/input.txt", *TRAIN)
    return [
        Case(f"config.py {label}", config(raw), [words], expect)
        for label, raw, expect in (
            ("with a byte order mark", b"\xef\xbb\xbf" + plain, left),
            ("with CRLF", plain.replace(b"\n", b"\r\n"), left),
            ("in UTF-16", plain.decode().encode("utf-16"), Refused(["config"])),
            ("in latin-1", plain + "# Größe\n".encode("latin-1"), Refused(["config"])),
            ("that is empty", b"", left),
            ("with a NUL", plain + b"\0", Refused(["config"])),
            ("with an import", b"import os\n" + plain, Refused([r"config\.py"])),
            ("with an unknown name", b"dpeth = 3\n", Refused(["depth"])),
        )
    ]


def _outputs() -> list[Case]:
    """Where a result shall go is looked at before the work."""

    def there(folder: Path) -> None:
        (folder / "a folder.png").mkdir()
        (folder / "a file").write_bytes(b"somebody's")

    return [
        Case(f"{words[0]} to {label}", build, [RUN, there, words], Refused([says]))
        for label, words, says in (
            ("a file that is there", ("scripts.export_hf", "--out={folder}/a file"), "a file"),
            ("a folder of that name", ("scripts.plot_run", "--out={folder}/a folder.png"), "a folder"),
            ("below a file", ("scripts.export_hf", "--out={folder}/a file/x"), "a file"),
        )
    ]
