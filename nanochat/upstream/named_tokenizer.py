"""Tokenizers by name or folder: ours, or nanochat's own pickle."""

from pathlib import Path

from nanochat.data.local_sources import path_errors_as_user_errors
from nanochat.data.tokenizer import Tokenizer
from nanochat.system.environment import UserError, base_dir


def load_named(wish: str) -> Tokenizer:
    """The tokenizer of a folder, or of a name under base_dir()/tokenizers, ours or nanochat's; UserError without."""
    directory = _named(wish, base_dir() / "tokenizers")
    if (directory / "ranks.tiktoken").is_file():
        return Tokenizer.load(directory)
    from nanochat.upstream.pickles import read_tokenizer_pickle  # which builds on this module

    return read_tokenizer_pickle(directory / "tokenizer.pkl")


def find_folders(root: Path, name: str) -> list[Path]:
    """Folders <name>-<hash8> under root, in name order."""
    return sorted(path for path in root.glob(f"*-{'[0-9a-f]' * 8}") if path.name[:-9] == name)


def _named(wish: str, root: Path) -> Path:
    """The folder meant by a path, by a folder's whole name under root, or by its name without the hash."""
    with path_errors_as_user_errors("tokenizer", wish):
        for path in (Path(wish).expanduser(), root / wish):
            if any((path / name).is_file() for name in ("ranks.tiktoken", "tokenizer.pkl")):
                return path
    found = find_folders(root, wish)
    if len(found) == 1:
        return found[0]
    present = sorted(path.name for path in root.glob("[!.]*") if path.is_dir()) if root.is_dir() else []
    if found:
        raise UserError(f"tokenizer={wish!r} is ambiguous: {', '.join(path.name for path in found)}")
    raise UserError(
        f"tokenizer={wish!r} is neither a folder with ranks.tiktoken or tokenizer.pkl nor one of {root} "
        f"({', '.join(present) or 'which has none yet'}): name one of these, or leave it None to train one"
    )
