"""A text file in pieces of bounded size, the same ones however it is read.

A file is one document. A long one is encoded in pieces, each cut behind the first line end at or
after a multiple of PIECE bytes, where tokens that would span the cut are two; where no line ends
for long, at a character.
"""

from collections.abc import Iterator
from typing import BinaryIO

from kimijax.data.documents.inputs import PIECE, Unit

REACH = 1 << 20  # bytes to look for a line end


def pieces(file: BinaryIO, unit: Unit) -> Iterator[tuple[int, bytes, bool, bool]]:
    """(number, content, whether it goes on with the one before, whether more follow)."""
    if unit.input.gzip:
        yield from _streamed(file)
        return
    start, last = unit.start, unit.stop == unit.input.size
    begin = _cut(file, start) if start else 0
    end = unit.input.size if last else _cut(file, unit.stop)
    file.seek(begin)
    yield start // PIECE, file.read(max(0, end - begin)), start > 0, not last


def cut_in(window: bytes) -> int:
    """Where a text is cut, counted from the second byte of `window`, which begins before it."""
    line = window.find(b"\n", 0, REACH)
    if line >= 0:
        return line
    at = 1
    while at < min(len(window), 5) and window[at] & 0xC0 == 0x80:  # within a character
        at += 1
    return at - 1


def _cut(file: BinaryIO, at: int) -> int:
    file.seek(at - 1)
    return at + cut_in(file.read(REACH))


def _streamed(file: BinaryIO) -> Iterator[tuple[int, bytes, bool, bool]]:
    """The pieces of a file that cannot be read from the middle."""
    held, number, ended = b"", 0, False
    began = 0  # of `held` in the file
    while True:
        edge = (number + 1) * PIECE
        while not ended and began + len(held) < edge - 1 + REACH:
            block = file.read(1 << 20)
            ended, held = not block, held + block
        if ended and began + len(held) <= edge:
            yield number, held, number > 0, False
            return
        at = edge - began
        at += cut_in(held[at - 1 : at - 1 + REACH])
        yield number, held[:at], number > 0, True
        held, began, number = held[at:], began + at, number + 1
