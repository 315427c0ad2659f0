"""Wav files whose header does not say how long they are, or that have something in front of it.

A program that writes into a pipe cannot seek back and leaves a placeholder for the size of the samples: 0, 0xFFFFFFFF,
or some other large number. libsndfile takes 0 for an empty sound, takes tags in front off the end, does not know BW64
and stumbles over odd chunks in RF64. Such a file is shown to it as the same samples behind a plain header; nothing is
copied.
"""

import io
import os
import struct
from typing import BinaryIO

PLACEHOLDER = 1_000_000_000  # bytes: a larger size than the file has is no cut file but one that was written blindly
LARGEST = 0xFFFF0000  # bytes that a size of 32 bits takes at most
MOST_CHUNKS = 1000
LONGEST_FORMAT = 1 << 16  # bytes


class Joined(io.RawIOBase):
    """To read: `head`, and behind it `size` bytes of a binary file from `start` on."""

    def __init__(self, head: bytes, file: BinaryIO, start: int, size: int):
        self.head, self.file, self.start, self.size, self.place = head, file, start, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self.place, io.SEEK_END: len(self.head) + self.size}[whence]
        self.place = max(0, base + offset)
        return self.place

    def readinto(self, buffer) -> int:
        wanted = len(buffer)
        data = self.head[self.place : self.place + wanted]
        behind = self.place + len(data) - len(self.head)
        if len(data) < wanted and behind < self.size:
            self.file.seek(self.start + behind)
            data += self.file.read(min(wanted - len(data), self.size - behind))
        buffer[: len(data)] = data
        self.place += len(data)
        return len(data)


def repair_header(file: BinaryIO) -> BinaryIO:
    """The file itself, at its beginning, or for a wav file as above a view of it."""
    total = file.seek(0, os.SEEK_END)
    start = _tag_size(file)
    head = _read_at(file, start, 12)
    found = None
    if head[:4] in (b"RIFF", b"RF64", b"BW64") and head[8:] == b"WAVE":
        found = _find_samples(file, start + 12, total)
    file.seek(0)
    if found is None:
        return file
    form, place, size, blind = found
    if not (blind or start or head[:4] != b"RIFF"):
        return file
    return Joined(_make_header(form, size), file, place, min(size, total - place))


def count_trailing_bytes(file: BinaryIO) -> int:
    """Bytes of a wav file behind its samples that are no chunks: its header says less than was written."""
    total = file.seek(0, os.SEEK_END)
    head = _read_at(file, 0, 12)
    found = _find_samples(file, 12, total) if head[:4] == b"RIFF" and head[8:] == b"WAVE" else None
    if found is None:
        return 0
    _, place, size, blind = found
    end = place + size + size % 2
    return 0 if blind or end >= total or _is_chunks(file, end, total) else total - end


def _find_samples(file: BinaryIO, place: int, total: int) -> tuple[bytes, int, int, bool] | None:
    """(format chunk, place of the samples, bytes of them, whether that is not what the header says); None without.

    place: of the first chunk.
    """
    form, long_size = b"", 0
    for _ in range(MOST_CHUNKS):
        header = _read_at(file, place, 8)
        if len(header) < 8:
            return None
        name, size = header[:4], struct.unpack("<I", header[4:])[0]
        place += 8
        if name == b"data":
            break
        if name == b"fmt ":
            form = _read_at(file, place, min(size, LONGEST_FORMAT))
        elif name == b"ds64" and size >= 16:
            long_size = struct.unpack("<Q", _read_at(file, place + 8, 8))[0]
        place += size + size % 2
    else:
        return None
    rest = total - place
    if size == 0xFFFFFFFF and long_size:
        size = long_size
    blind = (size > rest and size >= PLACEHOLDER) or (not size and rest > 0 and not _is_chunks(file, place, total))
    return (form, place, rest if blind else size, blind) if form else None


def _make_header(form: bytes, size: int) -> bytes:
    """A wav header for samples of this format and number of bytes."""
    form = b"fmt " + struct.pack("<I", len(form)) + form + bytes(len(form) % 2)
    if size <= LARGEST:
        return b"RIFF" + struct.pack("<I", 12 + len(form) + size) + b"WAVE" + form + b"data" + struct.pack("<I", size)
    sizes = b"ds64" + struct.pack("<IQQQI", 28, 48 + len(form) + size, size, 0, 0)
    return b"RF64\xff\xff\xff\xffWAVE" + sizes + form + b"data\xff\xff\xff\xff"


def _is_chunks(file: BinaryIO, place: int, total: int) -> bool:
    """Whether chunks follow up to the file's end: then a size of 0 is meant."""
    while place + 8 <= total:
        header = _read_at(file, place, 8)
        if not all(0x20 <= byte < 0x7F for byte in header[:4]):
            return False
        size = struct.unpack("<I", header[4:])[0]
        place += 8 + size + size % 2
    return place in (total, total + 1)  # the last one may lack its padding


def _tag_size(file: BinaryIO) -> int:
    """Bytes of an ID3v2 tag at the beginning."""
    head = _read_at(file, 0, 10)
    if head[:3] != b"ID3" or len(head) < 10 or max(head[6:]) > 0x7F:
        return 0
    return 10 + sum(byte << 7 * (3 - i) for i, byte in enumerate(head[6:]))


def _read_at(file: BinaryIO, place: int, count: int) -> bytes:
    file.seek(place)
    return file.read(count)
