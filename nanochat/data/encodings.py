"""Bytes of text files as text: UTF-8, UTF-16 and UTF-32 are detected, with a byte-order mark or without.

Everything else is refused with the encoding that it looks like: a wrong guess would train on garbage in silence.
"""

import codecs
import re
import unicodedata
from collections import Counter

from nanochat.system.environment import UserError

MARKS = (  # UTF-32 first: its little-endian mark begins with that of UTF-16
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
SAMPLE = 1 << 18  # bytes at the beginning of a file that decide on its encoding; a multiple of 4
IMPLAUSIBLE = 0.02  # share of control characters and unassigned code points that no text exceeds
COMMON = "\t\n\r\f\v\b\x1b\u3000\u3001\u3002"  # beside Latin ones: the control characters of texts, 、 and 。
WEIGHTS = {**dict.fromkeys(" \n\r", 5), **dict.fromkeys("\u3000\u3001\u3002", 2)}  # of evidence, beside a letter's 1
STATEFUL = re.compile(r"\x1b(\$[@AB]|\$[()][@-Z]|\([JI])")  # how ISO-2022, of 7 bits, changes its character set
ASCII_AND_NUL = bytes([0, *b"\t\n\r\f\v", *range(0x20, 0x7F)])


class Corrupt(UserError):
    """A shard, file, folder or row that cannot be read: skipped instead when skip_corrupt is set."""


class Undecodable(Corrupt):
    """Bytes that are no text in an encoding that is read."""


def decode_text(raw: bytes) -> str:
    """The text of a whole file: its marks are removed, line ends stay as they are.

    Raises Undecodable, naming the likely encoding and the way out, for bytes in any other encoding and for binary data.
    """
    encoding, mark = detect_encoding(raw)
    try:
        text = raw[mark:].decode(encoding)
    except UnicodeDecodeError as error:
        if encoding == "utf-8":
            raise Undecodable(_not_utf8(raw, mark + error.start)) from error
        raise Undecodable(f"{encoding} by its {_evidence(mark)}, but damaged at byte {mark + error.start}") from error
    _check_escapes(text)
    if "\0" in text:
        raise Undecodable("binary data: NUL characters, and neither UTF-16 nor UTF-32")
    return text


def detect_encoding(raw: bytes, *, complete: bool = True) -> tuple[str, int]:
    """(encoding, bytes of its mark at the beginning) of a file, by its first bytes; utf-8 unless they say otherwise.

    complete=False: raw is only the beginning of a file, and may end within a character. Raises Undecodable for NUL
    bytes that no encoding explains.
    """
    for mark, encoding in MARKS:
        if raw.startswith(mark):
            size = len(mark)
            while raw.startswith(mark, size):  # files that were joined, or marked by two programs
                size += len(mark)
            return encoding, size
    if b"\0" not in raw:
        return "utf-8", 0
    head = raw[:SAMPLE]
    final = complete and len(raw) <= SAMPLE
    found = []
    for encoding in ("utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"):
        if text := _try(head, encoding, final):
            score, implausible, common = _plausibility(text)
            found.append((score, encoding, implausible, common))
    if found:
        _, encoding, implausible, common = max(found)
        # Pairs of ASCII letters are assigned Chinese characters: text with a few NUL bytes must not become such.
        ascii_only = not head.translate(None, ASCII_AND_NUL) and head.count(b"\t") < len(head) / 5
        if implausible <= IMPLAUSIBLE and not (ascii_only and common < 0.9):
            return encoding, 0
    if _try(head, "utf-8", final) is None:
        raise Undecodable("binary data: NUL bytes, and neither UTF-16 nor UTF-32")
    return "utf-8", 0


def _try(raw: bytes, encoding: str, final: bool) -> str | None:
    try:
        return codecs.getincrementaldecoder(encoding)().decode(raw, final)
    except UnicodeDecodeError:
        return None


def check_encodable(text: str) -> None:
    """Raise Undecodable for text that UTF-8 cannot hold: lone surrogates, from JSON or from bytes that are no UTF-8.

    Likewise for text that is still encoded, in ISO-2022.
    """
    _check_escapes(text)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        if 0xDC80 <= ord(text[error.start]) <= 0xDCFF:  # how open_text() hands on such bytes
            decode_text(text.encode("utf-8", "surrogateescape"))
        found = f"\\u{ord(text[error.start]):04x}"
        raise Undecodable(f"a lone surrogate, {found}, which is no character and not UTF-8") from error


def _check_escapes(text: str) -> None:
    """Raise Undecodable for ISO-2022, whose bytes are all ASCII: East Asian text would be read as letters and signs."""
    if "\x1b" in text and text.isascii() and STATEFUL.search(text):
        raise Undecodable(
            "not Unicode but iso-2022 by its escapes: iconv -f iso-2022-jp (or -kr, -cn) -t UTF-8 FILE > NEW"
        )


def _plausibility(text: str) -> tuple[float, float, float]:
    """(score, share of implausible characters, of common ones); the right reading of a text has the highest score.

    Blanks, line ends, Latin letters and East Asian full stops are what wrong byte orders and widths do not give.
    """
    score = common = implausible = 0
    for character, number in Counter(text).items():
        if " " <= character <= "~" or "\u00a0" <= character < "\u0250" or character in COMMON:
            common += number
            score += number * WEIGHTS.get(character, 1)
        elif character == "\u2000" or unicodedata.category(character) in ("Cc", "Cn", "Co", "Cs"):
            implausible += number  # U+2000 is a blank in the wrong byte order
    score += len(text) * (common == len(text))
    return (score - 5 * implausible) / len(text), implausible / len(text), common / len(text)


def _evidence(mark: int) -> str:
    return "byte-order mark" if mark else "NUL bytes"


def _not_utf8(raw: bytes, position: int) -> str:
    """What is said of bytes that are not UTF-8 from `position` on."""
    sample = raw[max(0, position - SAMPLE // 2) : position + SAMPLE // 2]
    decoded = sample.decode("utf-8", "replace")
    damaged = decoded.count("\ufffd")
    if sum(character > "\x7f" for character in decoded) >= 3 * damaged:
        return f"not UTF-8 at byte {position}, though UTF-8 elsewhere: iconv -c -f utf-8 -t utf-8 drops such bytes"
    high = [byte for byte in sample if byte >= 0x80]
    if len(high) > 0.3 * len(sample):
        likely, example = "gb18030, shift_jis, big5, euc-kr, cp1251 or another", "ENCODING"
    elif any(byte < 0xA0 for byte in high):
        likely = example = "cp1252"
    else:
        likely = example = "latin-1"
    name = {"latin-1": "iso-8859-1"}.get(example, example)  # as iconv calls it
    return f"not UTF-8 at byte {position}, looks like {likely}: iconv -f {name} -t UTF-8 FILE > NEW converts it"
