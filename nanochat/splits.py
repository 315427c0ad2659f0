"""Which documents are held out: a tenth by the hash of their names, or by bytes where names would give no sane share.

A few documents, or one that is most of the text, make the share that names hold out a matter of luck. Then documents
are taken in their order, long ones cut into blocks, and a unit is held out whenever that keeps a tenth of the bytes.
"""

import hashlib
import re
from collections.abc import Iterable, Iterator

SHARE = 0.1  # of the bytes that is held out
SANE = (0.02, 0.30)  # shares of the bytes that the rule by name may hold out
BLOCK_BYTES = 4096  # of a long document that is cut; less where there is little text
CUTS = tuple(re.compile(pattern) for pattern in (r"\n\s*\n|\r[ \t]*\r", r"\r\n|\n|\r", r"\s"))


def held_out(name: str) -> bool:
    """True for the tenth of all document names that is never trained on; a docstring document follows its file."""
    key = name.removesuffix("#docstrings")
    return int(hashlib.sha256(key.encode("utf-8")).hexdigest(), 16) % 10 == 0


def is_sane(sizes: dict[str, int]) -> bool:
    """Whether a share of the bytes is held out with which one can train and measure; sizes: bytes by split."""
    total = sum(sizes.values())
    return total > 0 and SANE[0] <= sizes["val"] / total <= SANE[1]


def split_by_bytes(documents: Iterable[tuple[str, str]], total: int) -> Iterator[tuple[str, str, str]]:
    """(name, text, split) of all documents, a tenth of their `total` bytes held out, in the order given.

    A document up to a twentieth of all bytes stays whole. A longer one is cut: its held-out blocks, and the stretches
    between them, are documents called name#0, name#1, ...
    """
    seen = held = 0

    def take(size: int) -> str:
        nonlocal seen, held
        seen += size
        chosen = held + size / 2 <= SHARE * seen
        held += size * chosen
        return "val" if chosen else "train"

    for name, text in documents:
        size = len(text.encode())
        if size <= total / 20:
            yield name, text, take(size)
            continue
        block = max(1, round(min(BLOCK_BYTES, total // 40) * len(text) / size))
        pieces: list[tuple[str, list[str]]] = []
        for part in cut(text, block):
            split = take(len(part.encode()))
            if pieces and split == pieces[-1][0] == "train":
                pieces[-1][1].append(part)
            else:
                pieces.append((split, [part]))
        yield from ((f"{name}#{number}", "".join(parts), split) for number, (split, parts) in enumerate(pieces))


def cut(text: str, size: int) -> Iterator[str]:
    """A text in pieces of `size` to 2 * size characters, which end at a blank line, a line, a blank, or anywhere."""
    start = 0
    while len(text) - start > 2 * size:
        found = (pattern.search(text, start + size, start + 2 * size) for pattern in CUTS)
        end = next((match.end() for match in found if match), start + size)
        yield text[start:end]
        start = end
    if start < len(text):
        yield text[start:]


# ---------------------------------------------------------------------------------------------------------------------
# the split that a dataset brings along

PARTS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing"),
}
DATA_SUFFIXES = r"\.(txt|jsonl|ndjson|json|csv|tsv|parquet)(\.(gz|bz2|xz|zst))?"


def own_split(names: Iterable[str]) -> dict[str, str | None] | None:
    """{path: "train", "val" or None} of the files of a dataset with parts of its own, None for one without.

    Its parts are folders at the top, train/ beside test/ or validation/, or files named for them, as in
    train-00000-of-00002.parquet or wiki.valid.txt, when every file of data is. Held out is the validation part, or
    the test part where there is no validation; then a test part beside it (None) is not read at all.
    """
    names = list(names)
    for part_of in (_folder_part, _file_part):
        parts = {name: part_of(name) for name in names}
        known = set(parts.values())
        complete = part_of is _folder_part or not any(_is_data(name) and parts[name] is None for name in names)
        if "train" in known and known & {"validation", "test"} and complete:
            meaning = {None: "train", "train": "train", "validation": "val"}
            meaning["test"] = None if "validation" in known else "val"
            return {name: meaning[part] for name, part in parts.items()}
    return None


def _folder_part(name: str) -> str | None:
    top, slash, _ = name.partition("/")
    return _part(top) if slash else None


def _part(word: str) -> str | None:
    return next((part for part, words in PARTS.items() if word.lower() in words), None)


def _is_data(name: str) -> bool:
    return re.search(f"{DATA_SUFFIXES}$", name.lower()) is not None


def _file_part(name: str) -> str | None:
    """The part that a data file is named for: one word of its name, beside numbers, tells."""
    base = re.sub(f"{DATA_SUFFIXES}$", "", name.rpartition("/")[2].lower())
    words = [word for word in re.split(r"[-._ 0-9]+", base) if word]
    parts = {part for word in words if (part := _part(word))}
    return parts.pop() if len(parts) == 1 and _is_data(name) else None
