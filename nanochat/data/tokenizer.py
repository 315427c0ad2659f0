"""Byte-level BPE: trained by Hugging Face tokenizers, used through tiktoken from our own ranks.

A trained tokenizer is a folder: ranks.tiktoken (the tokens' bytes in merge order), token_bytes.npy (int32 bytes per id)
and tokenizer.json (Hugging Face format; also our source of the split pattern and the special tokens).
Ids: the ranks first (bytes and merges), then nanochat's 9 special tokens, then 7 reserved ones.
"""

import base64
import hashlib
import io
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import tiktoken

from nanochat.data.dataset import Dataset
from nanochat.data.tokenizer_sample import TrainingSample, log_progress
from nanochat.files import new_folder, open_atomic
from nanochat.system.environment import UserError

# GPT-4's way of splitting (arXiv 2303.08774 gives no regex; tiktoken's cl100k_base does) with two changes. Digits come
# in groups of at most 2: small vocabularies have no room for 1000 numbers. And every repetition is bounded, so that no
# piece has more than 512 characters: the merges of a piece take time quadratic in its length when training, which DNA,
# Chinese, or a line of a million equal signs turns into hours, and a megabyte of spaces overflows tiktoken's regex
# stack. Words and rules of ordinary text are shorter than 128 (80 in Python's library), so they split as they
# would without it; tiktoken's regex engine compiles no more than about 200.
# No (?i) flag and no possessive quantifiers, so that every regex engine reads it alike.
# Changing it changes no tokenizer that exists: each is loaded with the pattern in its own tokenizer.json.
SPLIT_PATTERN = (
    r"'(?:[sdmtSDMT]|[lL]{2}|[vV][eE]|[rR][eE])"
    r"|[^\r\n\p{L}\p{N}]?\p{L}{1,128}|\p{N}{1,2}| ?[^\s\p{L}\p{N}]{1,128}[\r\n]{0,256}"
    r"|\s{0,256}[\r\n]{1,256}|\s{1,256}(?!\S)|\s"
)
BOS = "<|bos|>"
SPECIAL_TOKENS = (
    BOS,  # starts every document
    *(f"<|{who}_{edge}|>" for who in ("user", "assistant", "python", "output") for edge in ("start", "end")),
    *(f"<|reserved_{i}|>" for i in range(7)),
)


class Tokenizer:
    """Text to ids and back. Special-token text inside documents is ordinary text; only special_id() gives their ids."""

    def __init__(
        self,
        ranks: list[bytes],
        pattern: str = SPLIT_PATTERN,
        specials: tuple[str, ...] = SPECIAL_TOKENS,
        name: str = "tokenizer",
    ):
        """ranks: bytes of each token in merge order, with all 256 single bytes; specials get the ids after them."""
        self.ranks, self.pattern, self.specials, self.name = ranks, pattern, specials, name
        self.vocab_size = len(ranks) + len(specials)
        self._special_ids = {token: len(ranks) + i for i, token in enumerate(specials)}
        self.bos_id = self._special_ids[BOS]
        self.token_bytes = np.array([len(token) for token in ranks] + [0] * len(specials), dtype=np.int32)
        facts = json.dumps({"pattern": pattern, "specials": specials}, sort_keys=True).encode()
        self.hash = hashlib.sha256(facts + b"\n" + _format_ranks(ranks)).hexdigest()
        self._encoding = tiktoken.Encoding(
            name,
            pat_str=pattern,
            mergeable_ranks={token: i for i, token in enumerate(ranks)},
            special_tokens=self._special_ids,
        )

    def __repr__(self) -> str:
        return f"Tokenizer({self.name}, {self.vocab_size} ids, hash {self.hash[:8]})"

    # -- ids ----------------------------------------------------------------------------------------------------------

    def special_id(self, token: str) -> int:
        """Id of a special token, as in special_id("<|bos|>"); UserError for one that does not exist."""
        if token not in self._special_ids:
            raise UserError(f"{token!r} is no special token of {self.name}: one of {', '.join(self.specials)}")
        return self._special_ids[token]

    def encode(self, text: str, bos: bool = False) -> list[int]:
        """Ids of a text, with BOS in front when asked.

        Every character is kept, U+0000 and U+FEFF too. Lone surrogates, which are no Unicode text, become U+FFFD.
        """
        with self._panics_as_user_errors():
            ids = self._encoding.encode_ordinary(text)
        return [self.bos_id, *ids] if bos else ids

    def encode_batch(self, texts: list[str], num_threads: int = 4) -> list[list[int]]:
        """encode() of every text without BOS, on several threads (tiktoken releases the GIL)."""
        with self._panics_as_user_errors():
            return self._encoding.encode_ordinary_batch(texts, num_threads=num_threads)

    @contextmanager
    def _panics_as_user_errors(self) -> Iterator[None]:
        """tiktoken panics, with no exception of Python's, where a pattern from elsewhere (\\s+ without a bound) meets a
        million blanks in a row; those in SPLIT_PATTERN cannot."""
        try:
            yield
        except BaseException as error:
            if type(error).__name__ != "PanicException":
                raise
            raise UserError(
                f"tokenizer {self.name} cannot encode a text: its split pattern overflows, as on a million blanks in a "
                "row; shorten such runs, or train a tokenizer of your own (--tokenizer=None)"
            ) from None

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids, specials as their names; bytes that are not UTF-8 become U+FFFD. ValueError: unknown id."""
        ids = list(ids)
        if unknown := [i for i in ids if not 0 <= i < self.vocab_size]:
            raise ValueError(f"id {unknown[0]} is outside the vocabulary of {self.vocab_size}")
        return self._encoding.decode(ids)

    def bytes_of(self, token: int) -> bytes:
        """What an id stands for: perhaps part of a character; of a special its name."""
        return self._encoding.decode_single_token_bytes(token)

    # -- training -----------------------------------------------------------------------------------------------------

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, pattern: str = SPLIT_PATTERN) -> "Tokenizer":
        """Learn vocab_size - 256 - 16 merges from the texts; the same texts give the same tokenizer.

        It learns from what TrainingSample takes of the texts, and logs its progress every few seconds.
        UserError when vocab_size cannot hold the bytes and specials, or asks for more merges than the texts have.
        """
        from tokenizers import Regex, models, pre_tokenizers, trainers  # only training needs it
        from tokenizers import Tokenizer as HuggingFaceTokenizer

        size = vocab_size - len(SPECIAL_TOKENS)
        if size < 256:
            raise UserError(f"vocab_size={vocab_size} is too small: 256 bytes and {len(SPECIAL_TOKENS)} special tokens")
        trainee = HuggingFaceTokenizer(models.BPE())
        split = pre_tokenizers.Split(Regex(pattern), "isolated")
        trainee.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
        sample = TrainingSample(texts)
        with log_progress(sample.progress):
            trainee.train_from_iterator(sample.chunks(), trainer)
        byte_of = {character: byte for byte, character in enumerate(list_byte_characters())}
        vocabulary = sorted(trainee.get_vocab().items(), key=lambda item: item[1])
        ranks = [bytes(byte_of[character] for character in token) for token, _ in vocabulary]
        if len(ranks) < size:
            possible = len(ranks) - 256
            raise UserError(
                f"vocab_size={vocab_size} needs {size - 256} merges but the training text has only {possible}: "
                f"give more text or vocab_size={len(ranks) + len(SPECIAL_TOKENS)} at most"
            )
        return cls(ranks, pattern)

    # -- files --------------------------------------------------------------------------------------------------------

    def save(self, directory: Path | str) -> Path:
        """Write the three files. A new folder appears complete or not at all; in an existing one each file does.

        UserError when the folder already holds another tokenizer, or nanochat's; the same one is left as it is.
        """
        directory = Path(directory)
        if (directory / "tokenizer.pkl").exists():
            raise UserError(f"{directory} holds nanochat's own tokenizer.pkl and is only read: choose another folder")
        if (directory / "ranks.tiktoken").exists():
            present = Tokenizer.load(directory)
            if present.hash != self.hash:
                raise UserError(
                    f"{directory} holds another tokenizer (hash {present.hash[:8]}, this one is {self.hash[:8]}): "
                    "choose another folder or delete it"
                )
            return directory
        if directory.is_dir():  # a checkpoint's; the ranks come last, without which the others do not count
            for name, content in self._files().items():
                with open_atomic(directory / name) as file:
                    file.write(content)
            return directory
        try:
            with new_folder(directory) as folder:
                for name, content in self._files().items():
                    (folder / name).write_bytes(content)
        except OSError:
            if not directory.is_dir():
                raise
            return self.save(directory)  # another process was faster
        return directory

    def _files(self) -> dict[str, bytes]:
        """Content of each file of the folder, the ranks last."""
        token_bytes = io.BytesIO()
        np.save(token_bytes, self.token_bytes)
        return {
            "token_bytes.npy": token_bytes.getvalue(),
            "tokenizer.json": self.hugging_face_json().encode(),
            "ranks.tiktoken": _format_ranks(self.ranks),
        }

    @classmethod
    def load(cls, directory: Path | str) -> "Tokenizer":
        """Read ranks.tiktoken and tokenizer.json; UserError when a file is missing or damaged."""
        directory = Path(directory)
        try:
            lines = (directory / "ranks.tiktoken").read_bytes().splitlines()
            entries = [line.split() for line in lines]
            ranks = [base64.b64decode(token, validate=True) for token, _ in entries]
            if [int(rank) for _, rank in entries] != list(range(len(ranks))) or len(set(ranks)) < len(ranks):
                raise ValueError("ranks are not 0, 1, 2, ... of distinct tokens")
            if missing := {bytes([i]) for i in range(256)} - set(ranks):
                raise ValueError(f"{len(missing)} of the 256 single bytes are missing")
            description = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))
            pattern = description["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"]
            added = {token["id"]: token["content"] for token in description["added_tokens"]}
            specials = tuple(added[i] for i in sorted(added))
            if sorted(added) != list(range(len(ranks), len(ranks) + len(added))) or BOS not in specials:
                raise ValueError(f"special tokens are not the ids after {len(ranks)} ranks, or {BOS} is missing")
            tokenizer = cls(ranks, pattern, specials, directory.name)
        except OSError as error:
            raise UserError(f"tokenizer {directory} cannot be read: {error.strerror} ({error.filename})") from error
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise UserError(
                f"tokenizer {directory} is damaged ({error!r}): delete the folder and train again"
            ) from error
        named = re.search(r"-([0-9a-f]{8})$", directory.name)
        if named and named[1] != tokenizer.hash[:8]:
            raise UserError(
                f"tokenizer {directory} is damaged: its files hash to {tokenizer.hash[:8]}, its name says {named[1]}; "
                "delete the folder and train again"
            )
        return tokenizer

    def hugging_face_json(self) -> str:
        """The same tokenizer in Hugging Face's format. Each token gets all its splits into two tokens as merges, for
        tiktoken merges any two neighbours whose bytes together are a token; ignore_merges is tiktoken's rule
        that a piece which is a token stays whole."""
        characters = list_byte_characters()
        known = set(self.ranks)
        merges = [
            [_spell(token[:cut], characters), _spell(token[cut:], characters)]
            for token in self.ranks
            for cut in range(1, len(token))
            if token[:cut] in known and token[cut:] in known
        ]
        split = {"type": "Split", "pattern": {"Regex": self.pattern}, "behavior": "Isolated", "invert": False}
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
        off = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        description = {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [
                {"id": i, "content": token, **off, "special": True} for token, i in self._special_ids.items()
            ],
            "normalizer": None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
            "post_processor": None,
            "decoder": byte_level,
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": None,
                "continuing_subword_prefix": None,
                "end_of_word_suffix": None,
                "fuse_unk": False,
                "byte_fallback": False,
                "ignore_merges": True,
                "vocab": {_spell(token, characters): i for i, token in enumerate(self.ranks)},
                "merges": merges,
            },
        }
        return json.dumps(description, ensure_ascii=False, indent=1) + "\n"


def _format_ranks(ranks: list[bytes]) -> bytes:
    """tiktoken's format: a line 'base64 of the token, space, rank' for each token."""
    return b"".join(b"%b %d\n" % (base64.b64encode(token), i) for i, token in enumerate(ranks))


def list_byte_characters() -> list[str]:
    """GPT-2's printable stand-in for each byte 0..255: itself where printable Latin-1, else the next of U+0100.. ."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    spare = itertools.count(256)
    return [chr(byte) if byte in printable else chr(next(spare)) for byte in range(256)]


def _spell(token: bytes, characters: list[str]) -> str:
    return "".join(characters[byte] for byte in token)


# ---------------------------------------------------------------------------------------------------------------------
# the tokenizer of a run


HELD_OUT_CHARACTERS = 10_000_000  # of the val split: plenty for three digits


def read_held_out_text(dataset: Dataset) -> list[str]:
    """The first documents of the val split, HELD_OUT_CHARACTERS together, the last one cut."""
    texts, room = [], HELD_OUT_CHARACTERS
    for _, text in dataset.documents("val"):
        if room <= 0:
            break
        texts.append(text[:room])
        room -= len(text)
    return texts


def measure_bytes_per_token(encode_batch: Callable[[list[str]], list[list[int]]], texts: list[str]) -> float:
    """UTF-8 bytes of the texts per id, without BOS; NaN for no text at all."""
    tokens = sum(map(len, encode_batch(texts)))
    return sum(len(text.encode()) for text in texts) / tokens if tokens else float("nan")
