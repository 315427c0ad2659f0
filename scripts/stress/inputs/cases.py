"""What a case is, what may become of it, and the check that it did."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow.parquet as pq

SHARE = (0.02, 0.36)  # of the bytes that may be held out; a text of 10 KB has few blocks to choose from


@dataclass(frozen=True)
class Used:
    """The input counts: exit code 0, and every document of it lies in the shards, or is named and counted as skipped.

    texts: the documents, in any order. joined: the text of one file, whatever blocks it was cut into. skipped: names of
    what must be named in the output; their number must be in the manifest. says: patterns that the output must match.
    clips: name of a sound -> its caption. left: files that must exist below the base folder afterwards (globs; ../ is
    the case's folder).
    """

    texts: Sequence[str] | None = None
    joined: str | None = None
    skipped: Sequence[str] = ()
    count: int | None = None  # of what is skipped, where not every one is named
    says: Sequence[str] = ()
    clips: Mapping[str, str] | None = None
    seconds: float | None = None  # of all sounds together
    left: Sequence[str] = ()
    share: bool = True  # whether the held-out share of the bytes is checked

    def failure(self, result: "Result") -> str | None:
        """What is wrong with a result, or None."""
        if result.code != 0:
            return f"exit code {result.code} instead of 0"
        checks = (self._says, self._files, self._documents, self._clips)
        return next((reason for check in checks if (reason := check(result))), None)

    def _says(self, result: "Result") -> str | None:
        wanted = [*self.says, *map(re.escape, self.skipped)]
        return next((f"the output does not say {p!r}" for p in wanted if not re.search(p, result.output)), None)

    def _files(self, result: "Result") -> str | None:
        folder = result.base.parent  # glob() takes no ".." in a pattern
        paths = (
            name.removeprefix("../") if name.startswith("../") else f"{result.base.name}/{name}" for name in self.left
        )
        return next((f"no {path} was written" for path in paths if not any(folder.glob(path))), None)

    def _documents(self, result: "Result") -> str | None:
        if self.texts is None and self.joined is None:
            return None
        manifest, documents = result.dataset()
        texts = [text for _, text in sorted(documents, key=lambda document: _natural(document[0]))]
        if self.joined is not None and "".join(texts) != self.joined:
            return f"{len(''.join(texts))} characters in the shards are not the {len(self.joined)} of the input"
        if self.texts is not None and sorted(texts) != sorted(self.texts):
            return f"{len(texts)} documents in the shards are not the {len(self.texts)} of the input"
        counted = sum(manifest["left_out"].values())
        wanted = len(self.skipped) if self.count is None else self.count
        if counted != wanted:
            return f"{counted} skipped in the manifest, {wanted} were put in: {manifest['left_out']}"
        sizes = {split: sum(e["text_bytes"] for e in manifest["files"] if e["split"] == split) for split in SPLITS}
        share = sizes["val"] / sum(sizes.values())
        if self.share and not SHARE[0] <= share <= SHARE[1]:
            return f"{share:.1%} of the bytes are held out"
        return None

    def _clips(self, result: "Result") -> str | None:
        if self.clips is None:
            return None
        manifest, documents = result.dataset()
        found = {name: text for name, text in documents if name in self.clips or "." in name}
        if found != dict(self.clips):
            wrong = sorted(name for name in found.keys() | self.clips if found.get(name) != self.clips.get(name))
            return f"{len(found)} captioned sounds instead of {len(self.clips)}; first difference: {wrong[0]}"
        counted = sum(manifest["left_out"].values())
        wanted = len(self.skipped) if self.count is None else self.count
        if counted != wanted:
            return f"{counted} skipped in the manifest, {wanted} were put in: {manifest['left_out']}"
        codec = manifest["codec"]
        codes = sum(entry["codes"] for entry in manifest["files"])
        heard = codes / codec["codebooks"] / codec["frame_rate"]
        if self.seconds is not None and abs(heard - self.seconds) > 0.03 * len(found) + 0.01 * self.seconds:
            return f"{heard:.2f} s of sound in codes, {self.seconds:.2f} s were put in"
        return None


@dataclass(frozen=True)
class Refused:
    """One line on standard error, `error: ...`, that matches every pattern in says, and exit code 2."""

    says: Sequence[str] = ()
    code: int = 2

    def failure(self, result: "Result") -> str | None:
        """What is wrong with a result, or None."""
        if result.code != self.code:
            return f"exit code {result.code} instead of {self.code}"
        lines = [line for line in result.errors.splitlines() if line.startswith("error: ")]
        if len(lines) != 1:
            return f"{len(lines)} lines of error instead of one"
        return next(
            (f"the refusal lacks {pattern!r}" for pattern in self.says if not re.search(pattern, lines[0])), None
        )


@dataclass(frozen=True)
class Case:
    """One odd input. build(folder) makes it; `{in}` in words and environment is its folder, `{base}` the base folder.

    steps: commands to run one after the other, of which the last is checked and the others must exit with 0; a callable
    among them is called with the folder. fresh: in an interpreter of its own instead of a fork, for what depends on how
    one starts. stdout, stderr: a path instead of a file; None closes the stream. plain_user: without root's right to
    read everything. limit: RLIMIT_FSIZE of the last command, in bytes.
    """

    name: str
    build: Callable[[Path], object]
    steps: Sequence[Sequence[str] | Callable[[Path], object]]
    expect: Used | Refused
    environment: Mapping[str, str | None] = field(default_factory=dict)
    fresh: bool = False
    stdout: str | None = "file"
    stderr: str | None = "file"
    plain_user: bool = False
    limit: int | None = None


@dataclass
class Result:
    """What the last command of a case left."""

    code: int
    output: str  # standard output
    errors: str  # standard error
    base: Path

    def dataset(self) -> tuple[dict, list[tuple[str, str]]]:
        """The newest manifest below base/data and the (name, text) of all its documents, read by pyarrow alone."""
        manifests = sorted(self.base.glob("data/*/manifest.json"), key=lambda path: path.stat().st_mtime_ns)
        if not manifests:
            raise AssertionError("no dataset was prepared")
        manifest = json.loads(manifests[-1].read_text(encoding="utf-8"))
        documents = []
        for entry in manifest["files"]:
            table = pq.read_table(manifests[-1].parent / entry["name"], columns=["name", "text"])
            documents += zip(table["name"].to_pylist(), table["text"].to_pylist(), strict=True)
        return manifest, documents


SPLITS = ("train", "val")


def failure_of(case: Case, result: Result) -> str | None:
    """What is wrong with the outcome of a case, or None: no outcome may show a traceback."""
    if "Traceback (most recent call last)" in result.output + result.errors:
        return "a traceback"
    try:
        return case.expect.failure(result)
    except AssertionError as error:
        return str(error)


def _natural(name: str) -> list:
    """A sort key under which row 10 of a file comes after row 9."""
    return [(1, int(part), "") if part.isdigit() else (0, 0, part) for part in re.split(r"(\d+)", name)]
