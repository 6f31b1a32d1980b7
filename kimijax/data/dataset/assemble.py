"""Parts put together: which documents are kept, and their tokens as one array."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from kimijax.data.dataset.format import (
    ENDS,
    LANGUAGE,
    MAX_NAMES,
    SHARD,
    SOURCE,
    TOKENS,
    Count,
    Info,
    dtype_of,
    open_array,
    shapes,
    write_info,
)
from kimijax.data.dataset.part import load_part
from kimijax.data.documents.inputs import Part
from kimijax.data.foreign import refusing
from kimijax.data.tokenizer import Tokenizer
from kimijax.errors import UserError

META = ("lengths", "bytes", "language", "joined", "bad", "languages")


class _Documents(NamedTuple):
    """Of every document, dropped ones too; pieces that go on with one another are one."""

    tokens: np.ndarray
    bytes: np.ndarray
    source: np.ndarray
    language: np.ndarray
    bad: np.ndarray
    piece_of: np.ndarray  # [pieces] which document a piece belongs to

    @property
    def kept(self) -> np.ndarray:
        return (self.tokens > 0) & ~self.bad


def assemble(
    directory: Path, parts: Sequence[tuple[Part, Path]], tokenizer: Tokenizer, name: str,
    digest: str,
) -> Info:
    """Write a dataset of the parts' files into a new directory; its Info.

    UserError: nothing is left to write, or there are too many languages.
    """
    sources = list(dict.fromkeys(part.source for part, _ in parts))
    found, languages = _documents(parts, sources)
    kept = found.kept
    if not kept.any():
        raise UserError(
            f"no document is left of {len(kept)}: {found.bad.sum()} are faulty, the others empty"
        )
    info = Info(
        vocab=tokenizer.vocab,
        dtype=dtype_of(tokenizer.vocab),
        tokenizer=name,
        digest=digest,
        eos=tokenizer.eos[0] if tokenizer.eos else None,
        documents=int(kept.sum()),
        tokens=int(found.tokens[kept].sum()),
        empty=int((~kept & ~found.bad).sum()),
        bad=int(found.bad.sum()),
        sources=_counts(sources, found.source, found),
        languages=_counts(languages, found.language, found),
    )
    directory.mkdir(parents=True)
    arrays = {n: open_array(directory, n, *of, create=True) for n, of in shapes(info).items()}
    with refusing(f"{directory}: cannot be written", "make room, or name another place"):
        arrays[ENDS].write(np.cumsum(found.tokens[kept])).result()
        arrays[SOURCE].write(found.source[kept].astype(np.uint16)).result()
        arrays[LANGUAGE].write(found.language[kept].astype(np.uint16)).result()
        _write_tokens(arrays[TOKENS], parts, found)
    write_info(directory, info)
    return info


def _documents(
    parts: Sequence[tuple[Part, Path]], sources: list[str]
) -> tuple[_Documents, list[str]]:
    """The documents of all parts and the names of their languages."""
    columns: list[list[np.ndarray]] = [[] for _ in range(6)]
    names: dict[str, int] = {}
    for part, path in parts:
        lengths, sizes, language, joined, bad, table = load_part(path, *META)
        with refusing(f"{path}: is damaged", "remove it, and it is made again"):
            own = [names.setdefault(n, len(names)) for n in json.loads(table.tobytes())]
            language = np.array(own, np.int64)[language]
        source = np.full(len(lengths), sources.index(part.source))
        for column, x in zip(columns, (lengths, sizes, language, joined, bad, source),
                             strict=True):
            column.append(x)
    if len(names) > MAX_NAMES:
        raise UserError(f"{len(names)} languages are more than {MAX_NAMES}: name another "
                        "--lang_field, or one that is not there")
    lengths, sizes, language, joined, bad, source = map(np.concatenate, columns)
    piece_of = np.cumsum(~joined) - 1
    first = np.flatnonzero(~joined)
    count = len(first)
    return _Documents(
        tokens=_sum(lengths, piece_of, count),
        bytes=_sum(sizes, piece_of, count),
        source=source[first],
        language=language[first],
        bad=_sum(bad, piece_of, count) > 0,
        piece_of=piece_of,
    ), list(names)


def _sum(x: np.ndarray, at: np.ndarray, count: int) -> np.ndarray:
    """Sums of x by index, exact."""
    total = np.zeros(count, np.int64)
    np.add.at(total, at, x.astype(np.int64))
    return total


def _counts(names: list[str], index: np.ndarray, found: _Documents) -> tuple[Count, ...]:
    totals = [
        _sum(x * found.kept, index, len(names))
        for x in (np.ones_like(found.tokens), found.tokens, found.bytes)
    ]
    return tuple(
        Count(name=n, documents=int(d), tokens=int(t), bytes=int(b))
        for n, d, t, b in zip(names, *totals, strict=True)
    )


def _write_tokens(array, parts: Sequence[tuple[Part, Path]], found: _Documents) -> None:
    """The kept tokens in whole shards: a shard that is written twice would be read in between."""
    held: list[np.ndarray] = []
    size, at, piece = 0, 0, 0
    for _, path in parts:
        tokens, lengths = load_part(path, "tokens", "lengths")
        keep = found.kept[found.piece_of[piece : piece + len(lengths)]]
        piece += len(lengths)
        held.append(tokens if keep.all() else tokens[np.repeat(keep, lengths)])
        size += len(held[-1])
        if size >= SHARD:
            whole = np.concatenate(held)
            cut = size - size % SHARD
            for begin in range(0, cut, SHARD):
                array[at + begin : at + begin + SHARD].write(whole[begin : begin + SHARD]).result()
            held, size, at = [whole[cut:]], size - cut, at + cut
    if size:
        array[at : at + size].write(np.concatenate(held)).result()
