"""Bring hf_modeling.py and config.json of an earlier export up to date; weights and tokenizer stay as they are."""

import ast
import hashlib
import json
from pathlib import Path

from nanochat.conversion.huggingface import auto_fields, read_config
from nanochat.files import open_atomic
from nanochat.system.environment import UserError
from nanochat.upstream.foreign_weights import read_json
from nanochat.upstream.hf_model_types import CLASSIC, MODELING, format_of


def refresh(folder: Path | str) -> list[str]:
    """Rewrite what differs from today's export; returns a line for each change, none when all is up to date.

    The code goes first: with it the old config.json loads as well, so a reader finds a folder that works at any
    moment. The old code stays beside it under a name of its own. UserError: no export of ours, one without code, one
    that a newer program wrote, or fields that this program does not read.
    """
    folder = Path(folder)
    path, code = folder / "config.json", folder / MODELING
    if not path.is_file():
        raise UserError(f"--refresh={folder} holds no config.json: name a folder that scripts.export_hf wrote")
    described = read_json(path)
    kind = format_of(described)
    if kind is None:
        raise UserError(
            f"--refresh={folder} is no export of scripts.export_hf: its model_type is {described.get('model_type')!r}"
        )
    if kind == CLASSIC:
        raise UserError(
            f"--refresh={folder} is a classic NanoChat, which transformers runs by its own code: it brings no "
            f"{MODELING}, and there is nothing to refresh"
        )
    read_config(path)
    wanted = Path(__file__).with_name(MODELING).read_bytes()
    old = code.read_bytes() if code.is_file() else None
    if old is not None and (unknown := sorted(config_fields(old) - config_fields(wanted))):
        raise UserError(f"{code} has {unknown[0]}, which this program does not know: refresh it with a newer nanochat")
    changes = []
    if old != wanted:
        if old is not None:
            kept = code.with_name(f"{MODELING}.{hashlib.sha256(old).hexdigest()[:8]}.old")
            write(kept, old)
        write(code, wanted)
        changes.append(f"{MODELING}: new" if old is None else f"{MODELING}: replaced, the old one is {kept.name}")
    lines = [
        f"config.json: {name} {json.dumps(described.get(name))} -> {json.dumps(value)}"
        for name, value in auto_fields().items()
        if described.get(name) != value
    ]
    if lines:
        write(path, (json.dumps(described | auto_fields(), indent=2) + "\n").encode())
    return changes + lines


def config_fields(code: bytes) -> set[str]:
    """The fields of the configuration class in a modelling file, which is parsed and not run."""
    try:
        tree = ast.parse(code)
    except (SyntaxError, ValueError):  # damaged: whatever it was, it is kept aside
        return set()
    return {
        argument.arg
        for kind in ast.walk(tree)
        if isinstance(kind, ast.ClassDef) and kind.name == "ModernNanoChatConfig"
        for method in kind.body
        if isinstance(method, ast.FunctionDef) and method.name == "__init__"
        for argument in (*method.args.args, *method.args.kwonlyargs)
    }


def write(path: Path, content: bytes) -> None:
    with open_atomic(path) as file:
        file.write(content)
