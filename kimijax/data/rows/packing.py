"""Which documents share a row, planned from their lengths alone."""

from bisect import bisect_left, insort
from dataclasses import dataclass
from typing import Literal

import numpy as np

from kimijax.errors import UserError

Long = Literal["split", "cut", "drop", "refuse"]
OPEN = 512  # rows that still take documents; more of them waste less and cost more
_ROW = 1 << 32


@dataclass(frozen=True, eq=False)
class Packing:
    """Pieces of documents in the order of their rows. Row r holds pieces first[r]:first[r+1]."""

    document: np.ndarray  # [pieces] int64
    offset: np.ndarray  # [pieces] int64, of the piece in its document
    length: np.ndarray  # [pieces] int64
    start: np.ndarray  # [pieces] int64, slot in the row
    first: np.ndarray  # [rows + 1] int64

    @property
    def rows(self) -> int:
        """How many rows there are."""
        return len(self.first) - 1

    def fill(self, length: int) -> float:
        """The share of slots that hold a token."""
        return float(self.length.sum()) / (self.rows * length)


def pack(
    lengths: np.ndarray, length: int, seed: int, epoch: int, align: int = 1, long: Long = "split"
) -> Packing:
    """Rows of `length` slots in which every document starts at a multiple of `align`.

    Documents come in an order drawn from (seed, epoch), each goes into the open row with the least
    room that is enough. A document longer than a row is
      split   into pieces of `length`, each a document of its own with positions from 0
      cut     to its first `length` tokens
      drop    left out
      refuse  a UserError
    About 2 µs and 40 bytes a piece.
    """
    if not 1 <= align <= length or length % align:
        raise UserError(f"rows of {length} tokens must be a multiple of align = {align}")
    document, offset, size = _pieces(lengths, length, long)
    if not size.size:
        raise UserError(f"no document is left: all {len(lengths)} are longer than {length} tokens; "
                        "make rows longer, or split or cut documents")
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(size))
    document, offset, size = document[order], offset[order], size[order]
    room = -(-size // align) * align
    row = _best_fit(room, length)
    row = rng.permutation(row.max() + 1)[row]  # those closed last are the emptiest
    order = np.argsort(row, kind="stable")
    document, offset, size, room, row = (x[order] for x in (document, offset, size, room, row))
    first = np.searchsorted(row, np.arange(row[-1] + 2))
    ends = np.cumsum(room)
    start = ends - room - (ends - room)[first[row]]
    return Packing(document, offset, size, start, first)


def _pieces(
    lengths: np.ndarray, length: int, long: Long
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Document, offset and size of every piece."""
    document = np.arange(len(lengths))
    too_long = lengths > length
    if long == "refuse" and too_long.any():
        at = int(np.argmax(too_long))
        raise UserError(f"document {at} has {lengths[at]} tokens, more than a row of {length}; "
                        "make rows longer, or split, cut or drop such documents")
    if long == "drop":
        document = document[~too_long]
    if long != "split":
        return document, np.zeros_like(document), np.minimum(lengths[document], length)
    count = -(-lengths // length)
    document = np.repeat(document, count)
    nth = np.arange(len(document)) - np.repeat(np.cumsum(count) - count, count)
    return document, nth * length, np.minimum(lengths[document] - nth * length, length)


def _best_fit(room: np.ndarray, length: int) -> np.ndarray:
    """The row of each piece, in the order they come."""
    row = np.empty(len(room), np.int64)
    whole = room == length
    count = int(whole.sum())
    row[whole] = np.arange(count)
    free: list[int] = []  # of the open rows, sorted: slots left * _ROW + row
    at = np.flatnonzero(~whole)
    found = []
    for need in room[at].tolist():
        i = bisect_left(free, need * _ROW)
        if i < len(free):
            left, chosen = divmod(free.pop(i), _ROW)
        else:
            left, chosen = length, count
            count += 1
        found.append(chosen)
        if left > need:
            insort(free, (left - need) * _ROW + chosen)
            if len(free) > OPEN:
                del free[0]
    row[at] = found
    return row
