"""The only pickles that are read: nanochat's tokenizer.pkl, and .pt files, which torch.save wrote.

A pickle is a program for a machine that can call anything. tokenizer.pkl is run with a set of instructions that can
only make dicts of text, bytes and numbers, .pt files by torch's weights_only unpickler.
"""

import contextlib
import io
import pickle
import pickletools
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path

import torch

from nanochat.data.tokenizer import BOS, Tokenizer
from nanochat.runtime import first_line, shown
from nanochat.system.environment import UserError

LARGEST_TOKENIZER = 64 * 2**20  # bytes; 65,536 ids take about 1 MB, 200,000 take 4 MB
# All that pickle's protocols 4 and 5 (Python >= 3.8) need for an Encoding. Excluded besides all calls: tuples, which
# nest into keys that take for ever to hash, and numbered memo slots, for which a few bytes claim gigabytes.
ADMITTED = set(
    "PROTO FRAME STOP MARK MEMOIZE BINGET LONG_BINGET GLOBAL STACK_GLOBAL EMPTY_TUPLE NEWOBJ BUILD EMPTY_DICT SETITEM "
    "SETITEMS SHORT_BINUNICODE BINUNICODE SHORT_BINBYTES BINBYTES BININT BININT1 BININT2 NONE".split()
)
# What the unpicklers are known to raise about damaged or hostile streams, besides their own error.
DAMAGE = (pickle.UnpicklingError, EOFError, ValueError, TypeError, LookupError, AttributeError, AssertionError)
DAMAGE += (RuntimeError, MemoryError, OverflowError, NotImplementedError, zipfile.BadZipFile)


class _State:
    """Stands in for tiktoken's Encoding and only keeps its state: the real one, given a name, would download it."""

    value: object = None

    def __setstate__(self, value: object) -> None:
        self.value = value


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> type:
        if (module, name) not in (("tiktoken.core", "Encoding"), ("tiktoken", "Encoding")):
            raise UserError(f"it asks for {shown(f'{module}.{name}')}, and only tiktoken's Encoding is admitted")
        return _State


def read_tokenizer_pickle(path: Path | str) -> Tokenizer:
    """The tokenizer of nanochat's tokenizer.pkl, a pickled tiktoken.Encoding; nothing that the file names is run.

    Raises UserError for a pickle that asks for any other class (naming it), one of a registered encoding (only its
    name), and for ranks, special tokens or a pattern that no Tokenizer can have.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            raw = file.read(LARGEST_TOKENIZER + 1)
        if len(raw) > LARGEST_TOKENIZER:
            raise UserError(f"it is larger than {LARGEST_TOKENIZER:,} bytes")
        state = _unpickle(raw)
        if isinstance(state, str):
            raise UserError(
                f"it holds no ranks, only the name {shown(state)} of an encoding that tiktoken would download: pickle "
                "tiktoken.Encoding(name, pat_str=..., mergeable_ranks=..., special_tokens=...) made of its parts"
            )
        return _tokenizer(state, path.parent.name)
    except OSError as error:
        raise UserError(f"tokenizer {path} cannot be read: {error.strerror}") from error
    except DAMAGE as error:  # UserError is a ValueError
        reason = (
            error if isinstance(error, UserError) else f"it is damaged ({type(error).__name__}: {first_line(error)})"
        )
        raise UserError(f"tokenizer {path} is refused: {reason}") from error


def _unpickle(raw: bytes) -> object:
    """The state of the pickled Encoding."""
    strange = found = None
    for opcode, argument, position in pickletools.genops(raw):
        if opcode.name not in ADMITTED:
            strange = f"{opcode.name} {'' if argument is None else shown(argument)}".rstrip()
            # Stop there, but run what comes before: a class that it asks for tells more than an instruction does.
            raw = raw[:position].ljust(len(raw), pickle.STOP)
            break
    try:
        found = _Unpickler(io.BytesIO(raw)).load()
    except (pickle.UnpicklingError, EOFError):
        if strange is None:
            raise
    if strange is not None:
        raise UserError(f"{strange} at byte {position} is no part of a pickled Encoding")
    if not isinstance(found, _State):
        raise UserError(f"it holds a {type(found).__name__}, not tiktoken's Encoding")
    return found.value


def _tokenizer(state: object, name: str) -> Tokenizer:
    """The Tokenizer of an Encoding's state; ValueError or KeyError says what is wrong with it."""
    if not isinstance(state, dict):
        raise ValueError(f"the Encoding's state is a {type(state).__name__}")
    if unknown := [key for key in state if key not in ("name", "pat_str", "mergeable_ranks", "special_tokens")]:
        raise ValueError(f"the Encoding's state holds {shown(unknown[0])}")
    pattern, ranks, specials = state["pat_str"], state["mergeable_ranks"], state["special_tokens"]
    if not (isinstance(pattern, str) and isinstance(ranks, dict) and isinstance(specials, dict)):
        raise ValueError("pat_str, mergeable_ranks and special_tokens are not a text and two dicts")
    for table, kind in ((ranks, bytes), (specials, str)):
        if wrong := [key for key, i in table.items() if type(key) is not kind or not key or type(i) is not int]:
            raise ValueError(f"{shown(wrong[0])} is no {kind.__name__} with a number")
    tokens, names = sorted(ranks, key=ranks.get), sorted(specials, key=specials.get)
    if [ranks[token] for token in tokens] != list(range(len(ranks))):
        raise ValueError("the ranks are not 0, 1, 2, ...")
    if missing := {bytes([i]) for i in range(256)} - ranks.keys():
        raise ValueError(f"{len(missing)} of the 256 single bytes are missing")
    if [specials[special] for special in names] != list(range(len(ranks), len(ranks) + len(names))):
        raise ValueError(f"the special tokens are not the ids after {len(ranks)} ranks")
    if BOS not in specials:
        raise ValueError(f"{BOS} is missing")
    return Tokenizer(tokens, pattern, tuple(names), name)  # ValueError for a pattern that does not compile


def read_pt(path: Path | str) -> dict[str, torch.Tensor]:
    """The tensors of a file that torch.save wrote, as nanochat's model_*.pt, by name; on the CPU, mapped, not copied.

    Raises UserError with the reason for a file that is damaged, that asks for anything but tensors, or whose tensors
    claim more than the file holds.
    """
    with _errors_as_user_errors(path):
        state = _load(path)
        if not isinstance(state, dict):
            raise UserError(f"it holds a {type(state).__name__}, not tensors by name")
        for name, tensor in state.items():
            if type(name) is not str:
                raise UserError(f"it names a tensor with a {type(name).__name__}")
            _check_tensor(tensor, shown(name), path)
        return state


def read_pt_tree(path: Path | str) -> object:
    """What torch.save wrote, as nanochat's optim_*.pt: tensors, numbers, texts and None in dicts, lists and tuples.

    On the CPU, mapped, not copied; a thing that is in it several times may hold itself. UserError as read_pt().
    """
    with _errors_as_user_errors(path):
        tree = _load(path)
        waiting, met = [tree], set()  # each thing once: a few bytes may nest it ten thousand times in itself
        while waiting:
            thing = waiting.pop()
            if id(thing) in met or thing is None or type(thing) in (int, float, bool, str):
                continue
            met.add(id(thing))
            if isinstance(thing, dict):
                waiting += [*thing.keys(), *thing.values()]
            elif isinstance(thing, (list, tuple)):
                waiting += thing
            else:
                _check_tensor(thing, "it", path)
        return tree


def find_broken_part(path: Path | str) -> str | None:
    """The name of the first part of a .pt file that does not have its checksum; reads the whole file."""
    with _errors_as_user_errors(path), zipfile.ZipFile(path) as archive:
        return archive.testzip()


def _load(path: Path | str) -> object:
    size = Path(path).stat().st_size
    with open(path, "rb") as file:
        if file.read(19) == b"version https://git":
            raise UserError("it only points at the real file: fetch that with `git lfs pull`")
    with zipfile.ZipFile(path) as archive:  # older formats than the zip are refused: nanochat never wrote them
        members = archive.infolist()
    # torch.save compresses nothing, so a small file never becomes a large one.
    if any(member.compress_type != zipfile.ZIP_STORED or member.file_size > size for member in members):
        raise UserError("it holds compressed parts, which torch.save never writes")
    return torch.load(path, map_location="cpu", mmap=True, weights_only=True)


def _check_tensor(tensor: object, name: str, path: Path | str) -> None:
    if not (isinstance(tensor, torch.Tensor) and tensor.layout is torch.strided):
        raise UserError(f"{name} holds a {type(tensor).__name__}, not a dense tensor")
    size = Path(path).stat().st_size
    if tensor.nbytes > min(size, tensor.untyped_storage().nbytes()) or tensor.device.type != "cpu":
        raise UserError(f"{name} claims {tensor.nbytes:,} bytes, which the file does not hold")


@contextlib.contextmanager
def _errors_as_user_errors(path: Path | str) -> Iterator[None]:
    """Errors of the unpickler about a file, as one line with its name."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or first_line(error)}") from error
    except DAMAGE as error:  # UserError is a ValueError
        raise UserError(f"{path} is refused: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """One line, without torch's advice, which is to load the file unsafely."""
    if isinstance(error, UserError):
        return str(error)
    text = str(error)
    if asked := re.search(r"[Uu]nsupported (?:global: )?GLOBAL (\S+)", text):
        return f"it asks for {shown(asked[1])}, and only tensors are admitted"
    if isinstance(error, pickle.UnpicklingError):
        advice = re.search(r"WeightsUnpickler error: (.*)", text)
        text = (advice and advice[1].strip()) or "weights_only refuses it"
    return f"it is damaged ({type(error).__name__}: {text.strip().partition(chr(10))[0][:300]}): copy it again"
