"""One vocabulary for several modalities: which ids are text, which are codes of audio (or of anything else).

Text ids come first, 0..V-1. Each further modality has Q codebooks of K codes, flattened: code c of codebook q is
first + q*K + c, and the id after them is its `end`. Its `start` is a reserved special token of the text tokenizer: a
text id, predicted like any other, but routed to the modality's expert, so that the position that predicts the first
code is already the expert's. A frame is Q ids, codebook 0 first. Over a frozen model, which has no free row, `start`
is an id of its own behind all others that is only ever an input.
"""

from dataclasses import dataclass

import numpy as np
import torch

from nanochat.system.environment import UserError

IGNORED = -100  # targets that do not count
RESERVED = 7  # the last ids of our tokenizers, free for `start`s
LIMITS = dict(codebooks=32, codes=1_000_000, start=2**31, expert_dim=1_000_000)


@dataclass(frozen=True)
class Modality:
    """One modality beside text: Q codebooks of K codes; expert_dim None: the model's own width.

    start: a text id, or the first id behind the vocabulary (input only), or None: codes alone, without start and end.
    """

    name: str
    codebooks: int
    codes: int
    start: int | None
    expert_dim: int | None = None

    @property
    def size(self) -> int:
        """Number of ids that it adds: its codes and `end`."""
        return self.codebooks * self.codes + (self.start is not None)

    @classmethod
    def read(cls, saved: object) -> "Modality":
        """From the JSON object in a checkpoint's metadata; UserError names what is wrong in it."""
        try:
            found = cls(**saved)
            for name, most in LIMITS.items():
                value = getattr(found, name)
                if name == "expert_dim" and value is None:
                    continue
                if type(value) is not int or not (0 if name == "start" else 1) <= value <= most:
                    raise TypeError(f"{name}={value!r} is not a whole number up to {most}")
            if not isinstance(found.name, str) or not found.name.isidentifier() or found.name == "text":
                raise TypeError(f"name={found.name!r} is not a name")
        except TypeError as error:
            raise UserError(f"model_config: modalities holds {saved!r}: {error}") from error
        return found


def modalities_of(settings, vocab_size: int) -> tuple[Modality, ...]:
    """The modalities that the settings name, with reserved ids of our tokenizers as their starts."""
    codes = settings.modality_codes()
    assert len(codes) <= RESERVED, codes
    expert_dim = settings.expert_dim if settings.untie != "none" else None
    first = vocab_size - RESERVED
    return tuple(
        Modality(name, settings.codebooks if name == "audio" else 1, number, first + i, expert_dim)
        for i, (name, number) in enumerate(codes.items())
    )


class Vocabulary:
    """The layout of all ids: `names` ("text" first), `ranges` (half open, of each name) and sizes.

    size: number of ids that can be predicted; input_size: of those that can be inputs, input-only starts included.
    """

    def __init__(self, text_size: int, modalities: tuple[Modality, ...] = ()):
        self.text_size, self.modalities = text_size, tuple(modalities)
        self.names = ("text", *(m.name for m in self.modalities))
        self.ranges = [(0, text_size)]
        for modality in self.modalities:
            first = self.ranges[-1][1]
            self.ranges.append((first, first + modality.size))
        self.size = self.ranges[-1][1]
        self.starts = {m.start: number for number, m in enumerate(self.modalities, 1) if m.start is not None}
        self.input_size = self.size + (self.size in self.starts)
        assert len(set(self.names)) == len(self.names), self.names
        assert all(0 <= start < text_size or start == self.size for start in self.starts), self.modalities
        assert len(self.starts) == sum(m.start is not None for m in self.modalities), self.modalities

    def modality(self, name: str) -> Modality:
        return self.modalities[self._index(name) - 1]

    def first(self, name: str) -> int:
        """The id of code 0 of codebook 0."""
        return self.ranges[self._index(name)][0]

    def end(self, name: str) -> int | None:
        return None if self.modality(name).start is None else self.ranges[self._index(name)][1] - 1

    def _index(self, name: str) -> int:
        if name not in self.names[1:]:
            raise UserError(f"no modality {name!r} here: {', '.join(self.names)}")
        return self.names.index(name)

    # -- tables: modality numbers, 0 is text --------------------------------------------------------------------------

    def table(self, by_expert: bool) -> torch.Tensor:
        """uint8 [input_size]: the modality of every id; by_expert: `start` counts as its modality's, else as text.

        Experts go by the modality of the input token, output layers by that of the target.
        """
        table = torch.zeros(self.input_size, dtype=torch.uint8)
        for number, (first, end) in enumerate(self.ranges[1:], 1):
            table[first:end] = number
        for start, number in self.starts.items() if by_expert else ():
            table[start] = number
        return table

    def mask_targets(self, targets: torch.Tensor, count: tuple[str, ...] | None) -> torch.Tensor:
        """targets int64 [...], with those of modalities that are not in `count` ignored; None: all count."""
        if count is None:
            return targets
        counts = torch.tensor([name in count for name in self.names])
        kept = counts[self.table(by_expert=False).long()].to(targets.device)[targets.clamp(min=0)]
        return targets.masked_fill(~kept, IGNORED)

    # -- codes and ids ------------------------------------------------------------------------------------------------

    def ids_of(self, name: str, codes: np.ndarray) -> np.ndarray:
        """Raw codes [T, Q] of 0..K-1 -> ids int64 [T * Q], frame by frame; UserError for a code outside its book."""
        modality = self.modality(name)
        codes = np.asarray(codes)
        if codes.ndim != 2 or codes.shape[1] != modality.codebooks:
            raise UserError(f"{name} codes of shape {codes.shape} are not [frames, {modality.codebooks} codebooks]")
        if codes.size and not 0 <= codes.min() <= codes.max() < modality.codes:
            outside = codes.max() if codes.max() >= modality.codes else codes.min()
            raise UserError(f"{name} code {outside} is outside its codebook of {modality.codes}")
        return (codes + self.first(name) + modality.codes * np.arange(modality.codebooks)).reshape(-1).astype(np.int64)

    def codes_of(self, name: str, ids: list[int] | np.ndarray) -> np.ndarray:
        """The inverse: ids of whole frames -> codes int64 [T, Q]; an unfinished last frame is dropped."""
        modality = self.modality(name)
        ids = np.asarray(ids, dtype=np.int64)
        frames = ids[: len(ids) // modality.codebooks * modality.codebooks].reshape(-1, modality.codebooks)
        codes = frames - self.first(name) - modality.codes * np.arange(modality.codebooks)
        if codes.size and not 0 <= codes.min() <= codes.max() < modality.codes:
            raise UserError(f"ids are not frames of {name}: every frame has one code of each codebook, in their order")
        return codes


class Grammar:
    """Which ids may come next in each row of a batch: text, or after a `start` the codebooks in turn, then `end`.

    allowed(): bool [B, size] for the next id; advance(ids) says which id came. `end` may come after complete frames,
    but not before the first one. After `end` comes text again. frames: the most frames of a sound, then only `end` is
    allowed. A modality without a start begins with its first code, from a prompt or by enter(); it has no end.
    """

    def __init__(self, vocabulary: Vocabulary, rows: int, device="cpu", frames: int | None = None):
        self.vocabulary, self.frames = vocabulary, frames
        self.modality = torch.zeros(rows, dtype=torch.long, device=device)  # 0: text
        self.emitted = torch.zeros(rows, dtype=torch.long, device=device)  # codes since `start`

    def enter(self, name: str) -> None:
        """All rows are inside this modality from here on, at their first code."""
        self.modality[:], self.emitted[:] = self.vocabulary.names.index(name), 0

    def allowed(self) -> torch.Tensor:
        ids = torch.arange(self.vocabulary.size, device=self.modality.device)
        mask = (self.modality == 0)[:, None] & (ids < self.vocabulary.text_size)
        for number, modality in enumerate(self.vocabulary.modalities, 1):
            first, end = self.vocabulary.ranges[number]
            codebook = self.emitted % modality.codebooks
            frame = self.emitted // modality.codebooks
            low = first + codebook * modality.codes
            legal = (ids >= low[:, None]) & (ids < low[:, None] + modality.codes)
            if modality.start is not None:
                complete = (codebook == 0) & (frame > 0)
                if self.frames is not None:
                    legal &= ~(complete & (frame >= self.frames))[:, None]
                legal |= complete[:, None] & (ids == end - 1)
            mask |= (self.modality == number)[:, None] & legal
        return mask

    def advance(self, ids: torch.Tensor) -> None:
        """ids int64 [B]: the id that came next in each row."""
        ended = torch.zeros_like(ids, dtype=torch.bool)
        for number, (modality, (first, end)) in enumerate(
            zip(self.vocabulary.modalities, self.vocabulary.ranges[1:], strict=True), 1
        ):
            inside = (ids >= first) & (ids < first + modality.codebooks * modality.codes)
            self.emitted += inside
            self.modality.masked_fill_(inside, number)
            ended |= (ids >= first) & (ids < end) & ~inside
        self.modality.masked_fill_(ended, 0)
        for start, number in self.vocabulary.starts.items():
            began = ids == start
            self.modality.masked_fill_(began, number)
            self.emitted.masked_fill_(began, 0)

    def repeated(self, rows: int) -> "Grammar":
        """A grammar of `rows` rows in the state of this one's only row."""
        other = Grammar(self.vocabulary, rows, self.modality.device, self.frames)
        other.modality[:], other.emitted[:] = self.modality, self.emitted
        return other
