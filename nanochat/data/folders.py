"""What a folder of the user's holds: every file is found and used, or named and counted.

Links are followed, each real folder once. What cannot be listed is an error. Output of this program that lies among the
files is never read back: a run would train on its own shards, and on its held-out text.
"""

import errno
import json
import logging
import os
import posixpath
import re
import stat
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from nanochat.data.encodings import Corrupt
from nanochat.system.environment import UserError, base_dir

logger = logging.getLogger(__name__)

NAMED = 5  # files named of each kind that is not read
LARGEST_MANIFEST = 256 << 20  # bytes of a manifest.json that is opened to see whose it is
# below a base folder; data/ is left to the markers: users keep files of their own there
OUTPUT_FOLDERS = (
    "base_checkpoints adapter_checkpoints chatsft_checkpoints tokenizers codecs base_eval audio_eval adapter_eval "
    "eval_bundle compiled huggingface tiktoken matplotlib"
).split()
HOLDERS = ("data", "base_checkpoints", "adapter_checkpoints", "chatsft_checkpoints", "tokenizers", "codecs")
MARKERS = (  # files that together are in one kind of folder only
    ({"ranks.tiktoken", "token_bytes.npy"}, "a tokenizer"),
    ({"codec.json", "codec.safetensors"}, "a codec"),
    ({"config.json", "hf_modeling.py"}, "an exported model"),
    ({"core.yaml", "eval_meta_data.csv"}, "an evaluation bundle"),
    ({"listen.html"}, "generated sounds"),
)
OWN_OUTPUT = "nanochat's own output"


@dataclass
class Found:
    """files: (relative posix path, path) of every regular file, sorted. skipped: reason -> relative paths."""

    files: list[tuple[str, Path]] = field(default_factory=list)
    skipped: dict[str, list[str]] = field(default_factory=dict)

    def skip(self, reason: str, name: str) -> None:
        self.skipped.setdefault(reason, []).append(name)

    def choose(self, wanted: Callable[[str], bool]) -> list[tuple[str, Path]]:
        """The files of wanted relative paths; the others count as skipped, by suffix."""
        chosen = [file for file in self.files if wanted(file[0])]
        for name, _ in self.files:
            if not wanted(name):
                self.skip(get_suffix(name), name)
        return chosen

    def describe(self) -> list[str]:
        """One line for each reason, with the first names: none where all was used."""
        kinds = {reason: names for reason, names in self.skipped.items() if reason.startswith((".", "no suffix"))}
        lines = []
        if kinds:
            number = sum(map(len, kinds.values()))
            order = sorted(kinds.items(), key=lambda item: (-len(item[1]), item[0]))
            parts = [f"{len(names)} {escape_control(kind)} ({list_first(names)})" for kind, names in order[:NAMED]]
            parts += [f"{len(order) - NAMED} other kinds"] if len(order) > NAMED else []
            lines.append(f"{number} file{'s' * (number != 1)} not read: {', '.join(parts)}")
        for reason, names in sorted(self.skipped.items()):
            if reason not in kinds:
                lines.append(f"{len(names)} skipped, {reason}: {list_first(names, NAMED)}")
        return lines

    def report_own_output(self) -> None:
        """Say that output of this program lies in the folder, and which: it is not read."""
        if names := self.skipped.get(OWN_OUTPUT):
            logger.info(f"data: {len(names)} skipped, {OWN_OUTPUT}: {list_first(names, NAMED)}")

    def report(self, counts: dict) -> None:
        """Say what was skipped, and add the numbers to counts: files of other kinds together."""
        for line in self.describe():
            if OWN_OUTPUT not in line:  # said whenever the folder is looked at
                logger.info(f"data: {line}")
        for reason, names in self.skipped.items():
            key = "of other kinds" if reason.startswith((".", "no suffix")) else reason
            counts[key] = counts.get(key, 0) + len(names)


def list_first(names: Iterable[str], most: int = 2) -> str:
    names = [escape_control(name) for name in names]
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


def get_suffix(name: str) -> str:
    """The suffix of a path in lower case, with that of the content before a compression's: .txt.gz."""
    parts = posixpath.basename(name).lower().rsplit(".", 2)
    if len(parts) == 3 and parts[2] in ("gz", "bz2", "xz", "zst") and re.fullmatch("[a-z]{2,7}", parts[1]):
        return f".{parts[1]}.{parts[2]}"
    return f".{parts[-1]}" if len(parts) > 1 and parts[-1] else "no suffix"


def is_hidden(name: str) -> bool:
    return name.startswith(".")


def escape_undecodable(path: str) -> str:
    """A file name as valid text: bytes that are no UTF-8 are written as escapes."""
    return path.encode("utf-8", "backslashreplace").decode("utf-8")


def escape_control(name: str) -> str:
    """A name for a message: line ends and other control characters, which steer a terminal, are written as escapes."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in name)


def find_files(root: Path, *, skip_corrupt: bool = False) -> Found:
    """Every regular file below a folder but hidden ones and our own output.

    Real folders come before linked ones, so that links never rename what is found without them; a folder or file that
    a link reaches a second time is skipped, and so are links to a folder that holds root.
    Raises Corrupt for a folder that cannot be listed, unless skip_corrupt; UserError for a root that is our own output.
    """
    if whose := find_own_output(root):
        raise UserError(f"data={root} is {OWN_OUTPUT} ({whose}): pass the text that it was made from")
    return _Walk(root, skip_corrupt).run()


class _Walk:
    """One walk over a folder: what was found, and which folders and files were met, by device and inode."""

    def __init__(self, root: Path, skip_corrupt: bool):
        self.root, self.skip_corrupt, self.found = root, skip_corrupt, Found()
        self.entered: set[tuple[int, int]] = set()
        self.files: set[tuple[int, int]] = set()
        self.above = {_identity(parent) for parent in root.resolve().parents}
        self.base = _identity(base_dir()) if base_dir().is_dir() else None
        self.ours: dict[Path, bool] = {}  # folders that linked files lie in: whether they are our output
        self.linked_folders: list[Path] = []
        self.linked_files: list[tuple[str, Path, tuple[int, int]]] = []

    def run(self) -> Found:
        self.enter(self.root)
        for folder in self.linked_folders:  # grows meanwhile
            self.enter(folder)
        for name, path, identity in sorted(self.linked_files):
            if identity in self.files:
                self.found.skip("links to files read under another name", name)
            else:
                self.files.add(identity)
                self.found.files.append((name, path))
        self.found.files.sort()
        for names in self.found.skipped.values():
            names.sort()
        return self.found

    def enter(self, top: Path) -> None:
        """Read a folder and the real folders below it; linked ones are put on the list, in sorted order."""
        links: list[Path] = []
        todo = [top]
        while todo:
            folder = todo.pop()
            try:
                identity = _identity(folder)
                if reason := self.refuse(folder, identity):
                    self.found.skip(reason, self.name(folder))
                    continue
                with os.scandir(folder) as listing:
                    entries = list(listing)
                if entries and not os.access(folder, os.X_OK):  # names can be listed, but nothing behind them
                    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
                self.entered.add(identity)
                own = _own_files(folder, {entry.name for entry in entries})
                for entry in entries:
                    if is_hidden(entry.name):
                        self.found.skip("hidden", self.name(entry.path))
                    elif entry.name in own:
                        self.found.skip(OWN_OUTPUT, self.name(entry.path))
                    else:
                        self.look(entry, identity[0], todo, links)
            except OSError as error:
                self.fail(folder, error)
        self.linked_folders += sorted(links)

    def refuse(self, folder: Path, identity: tuple[int, int]) -> str | None:
        """Why a folder is not entered, if so."""
        if identity in self.entered:
            return "links to folders read under another name"
        if identity in self.above:
            return "links to a folder that holds this one"
        own = folder != self.root and (identity == self.base or find_own_output(folder))
        return OWN_OUTPUT if own else None

    def look(self, entry: os.DirEntry, device: int, todo: list[Path], links: list[Path]) -> None:
        """Sort one entry of a folder; pipes, sockets and devices are never opened."""
        path, name = Path(entry.path), self.name(entry.path)
        if entry.is_dir(follow_symlinks=False):
            todo.append(path)
        elif entry.is_file(follow_symlinks=False):
            self.files.add((device, entry.inode()))
            self.found.files.append((name, path))
        elif not entry.is_symlink():
            self.found.skip("pipes, sockets or devices", name)
        else:
            try:
                target = path.stat()
            except PermissionError as error:
                return self.fail(path, error)
            except OSError:  # to nowhere, or to itself
                return self.found.skip("broken links", name)
            if stat.S_ISDIR(target.st_mode):
                links.append(path)
            elif stat.S_ISREG(target.st_mode) and self.in_own_output(path):
                self.found.skip(OWN_OUTPUT, name)
            elif stat.S_ISREG(target.st_mode):
                self.linked_files.append((name, path, (target.st_dev, target.st_ino)))
            else:
                self.found.skip("pipes, sockets or devices", name)

    def in_own_output(self, link: Path) -> bool:
        """Whether a link leads to a file of our own, as to the shards of a prepared dataset."""
        folder = link.resolve().parent
        if folder not in self.ours:
            self.ours[folder] = find_own_output(folder) is not None
        return self.ours[folder]

    def name(self, path: str | Path) -> str:
        return escape_undecodable(Path(path).relative_to(self.root).as_posix())

    def fail(self, path: Path, error: OSError) -> None:
        if not self.skip_corrupt:
            raise Corrupt(
                f"{path} cannot be read ({error.strerror}): mend its permissions, or skip it with --skip_corrupt=True"
            ) from error
        self.found.skip("unreadable", self.name(path))


def _identity(folder: Path) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino


# ---------------------------------------------------------------------------------------------------------------------
# our own output


def find_own_output(folder: Path) -> str | None:
    """What of ours a folder is, by the files that this program writes into it; None for a folder of somebody else's."""
    try:
        names = set(os.listdir(folder))
    except OSError:
        return None  # whoever enters it will say so
    if "manifest.json" in names and _is_prepared(folder / "manifest.json"):
        return "a prepared dataset"
    if {"config.py", "metrics.jsonl"} <= names and _is_run(folder, names):
        return "a run"
    if re.fullmatch(r"step_\d{6,}(\.bad-\d+)?", folder.name) and "state.json" in names:
        return "a checkpoint"
    for marks, whose in MARKERS:
        if marks <= names:
            return whose
    if folder.name in OUTPUT_FOLDERS and _is_base(folder.parent):
        return "a part of a base folder"
    return None


def _is_run(folder: Path, names: set[str]) -> bool:
    """Whether a folder with config.py and metrics.jsonl is a run's, and holds no further files that could be data."""
    others = (get_suffix(name) for name in names - {"config.py", "metrics.jsonl"} if (folder / name).is_file())
    return _is_config(folder / "config.py") and set(others) <= {".json", ".png", ".log", ".lock", ".html"}


def _is_prepared(manifest: Path) -> bool:
    try:
        if manifest.stat().st_size > LARGEST_MANIFEST:
            return False
        content = json.loads(manifest.read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(content, dict) and {"source", "licence", "fingerprint", "files"} <= content.keys()


def _is_config(path: Path) -> bool:
    """Whether a config.py was written by this program: it says so in its first line."""
    return _first_line(path).startswith(b"# Settings of one run, stage ")


def _is_metrics(path: Path) -> bool:
    try:
        line = json.loads(_first_line(path))
    except (ValueError, RecursionError):
        return False
    return isinstance(line, dict) and {"step", "time", "event"} <= line.keys()


def _first_line(path: Path) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.readline(1 << 16)
    except OSError:
        return b""


def _is_base(folder: Path) -> bool:
    """Whether a folder is, or was, somebody's NANOCHAT_BASE_DIR: one of its parts holds something of ours."""
    if base_dir().is_dir() and _identity(base_dir()) == _identity(folder):
        return True
    for holder in HOLDERS:
        if (folder / holder).is_dir():
            children = (folder / holder / name for name in sorted(os.listdir(folder / holder)) if not is_hidden(name))
            if any(path.is_dir() and find_own_output(path) for path in children):
                return True
    return False


def _own_files(folder: Path, names: set[str]) -> set[str]:
    """Which files are our output in a folder that is not, as a whole."""
    tests = {"config.py": _is_config, "metrics.jsonl": _is_metrics}
    return {name for name, is_ours in tests.items() if name in names and is_ours(folder / name)}
