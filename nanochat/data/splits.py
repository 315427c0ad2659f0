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


def is_held_out(name: str) -> bool:
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
        for part in cut_text(text, block):
            split = take(len(part.encode()))
            if pieces and split == pieces[-1][0] == "train":
                pieces[-1][1].append(part)
            else:
                pieces.append((split, [part]))
        yield from ((f"{name}#{number}", "".join(parts), split) for number, (split, parts) in enumerate(pieces))


def cut_text(text: str, size: int) -> Iterator[str]:
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
    "train": ("train", "training", "trainset"),
    "validation": ("validation", "valid", "val", "dev", "devset", "heldout", "holdout"),
    "test": ("test", "testing", "testset", "eval", "evaluation"),
}
DATA_SUFFIXES = r"\.(txt|jsonl|ndjson|json|csv|tsv|parquet)(\.(gz|bz2|xz|zst))?"
PROGRAMS = (".py", ".md")  # what is read beside data: src/train/ and src/eval/ of a program are no split


def find_own_split(names: Iterable[str]) -> dict[str, str | None] | None:
    """{path: "train", "val" or None} of the files of a dataset with parts of its own, None for one without.

    Its parts are folders beside each other at any depth, as in train/ and test/, default/train/ and default/test/ or
    train-clean-100/ and dev-clean/, or files named for them, as in train-00000-of-00002.parquet or wiki.valid.txt, when
    every file of data is. Held out is the validation part, or the test part where there is no validation; then a test
    part beside it (None) is not read at all.
    """
    names = list(names)
    files = {name: _file_part(name) for name in names}
    complete = not any(_is_data(name) and part is None for name, part in files.items())
    for parts in (_folder_parts(names), {name: ("", part) for name, part in files.items()} if complete else {}):
        known: dict[str, set] = {}  # parts by the folder that holds them
        for where, part in parts.values():
            known.setdefault(where, set()).add(part)
        if any("train" in found and found & {"validation", "test"} for found in known.values()):
            return {name: _split_of_part(part, known[where]) for name, (where, part) in parts.items()}
    return None


def find_mixed_parts(names: Iterable[str]) -> tuple[list[str], list[str]] | None:
    """(files called as parts of a split, the other files of data), where those others keep it from being one."""
    found = {name: _file_part(name) for name in names if _is_data(name)}
    parts, others = [name for name in found if found[name]], [name for name in found if not found[name]]
    known = {found[name] for name in parts}
    return (parts, others) if "train" in known and known & {"validation", "test"} and others else None


def _split_of_part(part: str | None, known: set) -> str | None:
    """The split of a part among those beside it."""
    if "train" not in known or not known & {"validation", "test"}:
        return "train"
    meaning = {None: "train", "train": "train", "validation": "val"}
    return meaning[part] if part != "test" else (None if "validation" in known else "val")


def _folder_parts(names: list[str]) -> dict[str, tuple[str, str | None]]:
    """name -> (folder that holds the part's folder, part): the outermost folder of its path among such parts.

    Folders called exactly as a part count whatever lies beside them, ones with a word of that sense only together.
    """
    inside: dict[str, set[str]] = {}  # folder -> names of the folders with data in it
    for name in names:
        folders = [] if name.lower().endswith(PROGRAMS) and "/" in name else name.split("/")[:-1]
        for depth, folder in enumerate(folders):
            inside.setdefault("/".join(folders[:depth]), set()).add(folder)
    parts: dict[str, dict[str, str | None]] = {}
    for where, folders in inside.items():
        for part_of in (_part, _part_among_words):
            found = {folder: part_of(folder) for folder in folders}
            known = set(found.values())
            if "train" in known and known & {"validation", "test"} and (part_of is _part or None not in known):
                parts.setdefault(where, found)
    placed = {}
    for name in names:
        folders = name.split("/")[:-1]
        places = (("/".join(folders[:depth]), folder) for depth, folder in enumerate(folders))
        where, folder = next(((w, f) for w, f in places if w in parts and parts[w].get(f)), ("", ""))
        placed[name] = where, parts.get(where, {}).get(folder)
    return placed


def _part(word: str) -> str | None:
    return next((part for part, words in PARTS.items() if word.lower() in words), None)


def _part_among_words(name: str) -> str | None:
    """The part that one word of a name stands for, beside numbers and words of other senses."""
    words = [word for word in re.split(r"[-._= 0-9]+", name) if word]
    parts = {part for word in words if (part := _part(word))}
    return parts.pop() if len(parts) == 1 else None


def _is_data(name: str) -> bool:
    return re.search(f"{DATA_SUFFIXES}$", name.lower()) is not None


def _file_part(name: str) -> str | None:
    """The part that a data file is named for."""
    base = re.sub(f"{DATA_SUFFIXES}$", "", name.rpartition("/")[2].lower())
    return _part_among_words(base) if _is_data(name) else None
