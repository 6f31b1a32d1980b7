"""Documents packed into rows, for several epochs: row i is a function of the seed and of i."""

import threading
from bisect import bisect_right
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from kimijax.data.rows.batch import Batch, grain, next_weights
from kimijax.data.rows.packing import Long, Packing, pack
from kimijax.errors import UserError

KEPT = 2  # packings held: of an epoch and of the next, which threads begin ahead

Spans = Sequence[tuple[int, int, int]]  # (document, offset, length) each


class Documents(Protocol):
    """What can be packed: a Dataset, or Chats."""

    @property
    def lengths(self) -> np.ndarray: ...

    def read(self, spans: Spans) -> list[np.ndarray]: ...

    def masks(self, spans: Spans) -> list[np.ndarray]: ...


def packed_rows(
    documents: Documents, length: int, seed: int, align: int = 1, epochs: int = 1,
    long: Long = "split",
) -> Any:
    """grain.MapDataset of rows (Batch of `length`) that go through the documents `epochs` times.

    Every epoch is shuffled and packed anew (see `pack`), and all are planned here, about 2 µs a
    document and epoch: a number of rows is known for each, so that any row is found at once.

    align  of where documents start in a row: the model's `run_length`
    """
    if epochs < 1 or seed < 0:
        raise UserError(f"epochs = {epochs} must be at least 1 and seed = {seed} at least 0")
    return grain().MapDataset.source(_Rows(documents, length, seed, align, epochs, long))


class _Rows:
    """Random access to rows; threads share it."""

    def __init__(self, documents, length, seed, align, epochs, long):
        self._documents, self._length = documents, length
        self._how = (seed, align, long)
        self._lengths = documents.lengths
        self._packings: dict[int, Packing] = {}
        self._lock = threading.Lock()
        self._ends: list[int] = []  # rows up to each epoch's end
        for epoch in range(epochs):
            last = self._ends[-1] if self._ends else 0
            self._ends.append(last + self.packing(epoch).rows)

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Batch:
        epoch = bisect_right(self._ends, index)
        packing = self.packing(epoch)
        row = index - (self._ends[epoch - 1] if epoch else 0)
        return row_of(self._documents, packing, row, self._length)

    def packing(self, epoch: int) -> Packing:
        """The packing of an epoch, made by one thread while the others wait."""
        with self._lock:
            if epoch not in self._packings:
                seed, align, long = self._how
                made = pack(self._lengths, self._length, seed, epoch, align, long)
                while len(self._packings) >= KEPT:
                    del self._packings[next(iter(self._packings))]
                self._packings[epoch] = made
            return self._packings[epoch]


def row_of(documents: Documents, packing: Packing, row: int, length: int) -> Batch:
    """One row of a packing."""
    at = slice(packing.first[row], packing.first[row + 1])
    columns = (packing.document[at], packing.offset[at], packing.length[at])
    spans = list(zip(*(x.tolist() for x in columns), strict=True))
    ids, pos = np.zeros((2, length), np.int32)
    seg = np.full(length, -1, np.int32)
    learned = np.zeros(length, np.float32)
    found = zip(packing.start[at].tolist(), documents.read(spans), documents.masks(spans),
                strict=True)
    for i, (start, tokens, mask) in enumerate(found):
        here = slice(start, start + len(tokens))
        ids[here], pos[here], seg[here] = tokens, np.arange(len(tokens)), i
        learned[here] = mask
    return Batch(ids, pos, seg, next_weights(seg, learned))
