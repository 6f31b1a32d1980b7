"""A tokenized dataset, read as if a stranger had made it."""

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from kimijax.data.dataset.format import (
    AGAIN,
    ENDS,
    LANGUAGE,
    SOURCE,
    TOKENS,
    Info,
    open_array,
    read_info,
    shapes,
)
from kimijax.data.foreign import refusing
from kimijax.errors import UserError


@dataclass(frozen=True, eq=False)
class Dataset:
    """Documents of a dataset: all, or those of a source or a language.

    starts, ends, source, language  [documents]; where tokens lie and index into Info's lists
    """

    path: Path
    info: Info
    starts: np.ndarray
    ends: np.ndarray
    source: np.ndarray
    language: np.ndarray
    _tokens: Any

    @property
    def vocab(self) -> int:
        """Every id is below it."""
        return self.info.vocab

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each document, int64 [documents]."""
        return self.ends - self.starts

    def read(self, spans: Sequence[tuple[int, int, int]]) -> list[np.ndarray]:
        """The ids of (document, offset, length) each, int32, read at once.

        UserError: a file is damaged or holds an id that the vocabulary does not have.
        """
        begins = [int(self.starts[i]) + offset for i, offset, _ in spans]
        with refusing(f"{self.path / TOKENS}: cannot be read", AGAIN):
            futures = [self._tokens[at : at + n].read()
                       for at, (*_, n) in zip(begins, spans, strict=True)]
            found = [future.result() for future in futures]
        for at, ids in zip(begins, found, strict=True):
            if len(ids) and (worst := int(ids.max())) >= self.vocab:
                raise UserError(
                    f"{self.path / TOKENS}: holds the id {worst} behind token {at}, outside the "
                    f"vocabulary of {self.vocab}; {AGAIN}"
                )
        return [ids.astype(np.int32) for ids in found]

    def masks(self, spans: Sequence[tuple[int, int, int]]) -> list[np.ndarray]:
        """Weights of learning each token of the spans: all 1."""
        return [np.ones(n, np.float32) for *_, n in spans]


def open_dataset(path: str | os.PathLike) -> Dataset:
    """The dataset in a directory; UserError names what is missing or wrong, and the remedy.

    Memory is 20 bytes a document; tokens stay on the disk and are checked as they are read.
    """
    path = Path(path)
    info = read_info(path)
    arrays = {name: open_array(path, name, *of) for name, of in shapes(info).items()}
    found = {}
    for name in (ENDS, SOURCE, LANGUAGE):
        with refusing(f"{path / name}: cannot be read", AGAIN):
            found[name] = arrays[name].read().result()
    ends = found[ENDS]
    starts = np.concatenate([np.zeros(1, np.int64), ends[:-1]])
    if (wrong := np.flatnonzero(ends <= starts)).size or ends[-1] != info.tokens:
        raise UserError(
            f"{path / ENDS}: ends must increase to {info.tokens}, but "
            + (f"document {wrong[0]} has {starts[wrong[0]]} and then {ends[wrong[0]]}"
               if wrong.size else f"the last is {ends[-1]}") + f"; {AGAIN}"
        )
    for name, names in ((SOURCE, info.sources), (LANGUAGE, info.languages)):
        if (largest := int(found[name].max())) >= len(names):
            raise UserError(f"{path / name}: holds {largest}, but there are {len(names)}; {AGAIN}")
    return Dataset(path, info, starts, ends, found[SOURCE], found[LANGUAGE], arrays[TOKENS])


def split_by(dataset: Dataset, what: Literal["source", "language"]) -> dict[str, Dataset]:
    """Name -> the documents of each source or language that has any."""
    index = {"source": dataset.source, "language": dataset.language}[what]
    names = {"source": dataset.info.sources, "language": dataset.info.languages}[what]
    parts = {count.name: np.flatnonzero(index == i) for i, count in enumerate(names)}
    return {name: _subset(dataset, at) for name, at in parts.items() if at.size}


def _subset(dataset: Dataset, at: np.ndarray) -> Dataset:
    names = ("starts", "ends", "source", "language")
    return dataclasses.replace(dataset, **{name: getattr(dataset, name)[at] for name in names})
