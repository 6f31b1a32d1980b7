"""Which files a dataset is made of, and how they are dealt to workers."""

import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from kimijax.data.foreign import need, refusing
from kimijax.errors import UserError

PIECE = 4 << 20  # bytes of a text or JSONL file that one unit reads
LEAST_PART, LARGEST_PART, PARTS = 64 << 10, 16 << 20, 64


@dataclass(frozen=True, kw_only=True)
class Input:
    """A file with documents. `name` is its path below the argument that led to it."""

    path: Path
    name: str
    source: str
    kind: Literal["text", "jsonl", "parquet"]
    gzip: bool
    size: int  # bytes on disk
    changed: int  # ns


@dataclass(frozen=True)
class Unit:
    """What of a file is read in one go: bytes [start, stop), or row groups of a Parquet file.

    Of a text, a unit is what lies between the first line starts at or behind its ends (see
    `documents.text`); of JSONL, the lines that start in it. A gzip file is one unit.
    """

    input: Input
    start: int
    stop: int
    bytes: int  # its share of the file on disk


@dataclass(frozen=True)
class Part:
    """Units of one source that a worker reads one after the other; what is done is done by part."""

    number: int
    source: str
    units: tuple[Unit, ...]

    @property
    def bytes(self) -> int:
        """Bytes on disk."""
        return sum(unit.bytes for unit in self.units)


def find_inputs(paths: Sequence[str | os.PathLike]) -> list[Input]:
    """The files at or below each path, in the order of the paths and then of names.

    The last component of a path is the source of its documents. Links below a path, hidden files
    and hidden directories are left out. UserError: nothing there, or two sources of one name.
    """
    inputs: dict[str, list[Input]] = {}
    for root in map(Path, paths):
        source = root.resolve().name
        if source in inputs:
            raise UserError(
                f"{root}: a second source named {source!r:.80}: documents are told apart by the "
                "last component of their path; rename one"
            )
        try:
            inputs[source] = [_input(root, path, source) for path in _regular_files(root)]
        except OSError as error:
            raise UserError(f"{error.filename or root}: cannot be read: {error.strerror}; name "
                            "a file or a directory of texts, JSONL or Parquet") from error
        if not any(x.size for x in inputs[source]):
            raise UserError(
                f"{root}: no documents in it (hidden, empty and special files and links do not "
                "count); name a file or a directory of texts, JSONL or Parquet"
            )
    return [x for found in inputs.values() for x in found if x.size]


def deal(inputs: Sequence[Input]) -> list[Part]:
    """Parts of about the same size, in order: a function of the inputs alone.

    UserError: a Parquet file cannot be read.
    """
    target = min(LARGEST_PART, max(LEAST_PART, sum(x.size for x in inputs) // PARTS))
    parts: list[list[Unit]] = []
    filled = target
    for unit in (unit for x in inputs for unit in _units(x)):
        if filled >= target or parts[-1][0].input.source != unit.input.source:
            parts.append([])
            filled = 0
        parts[-1].append(unit)
        filled += unit.bytes
    return [Part(i, units[0].input.source, tuple(units)) for i, units in enumerate(parts)]


def open_parquet(path: Path):
    """The pyarrow.parquet.ParquetFile of a path; UserError: it is none, or pyarrow is missing."""
    parquet = need("pyarrow.parquet", f"{path}: Parquet", "train")
    with refusing(f"{path}: is no Parquet file that can be read", "fetch it again"):
        return parquet.ParquetFile(path)


def _input(root: Path, path: Path, source: str) -> Input:
    status = path.stat()
    bare = path.name.removesuffix(".gz")
    kind = {".jsonl": "jsonl", ".parquet": "parquet"}.get(Path(bare).suffix, "text")
    if kind == "parquet" and bare != path.name:
        raise UserError(f"{path}: Parquet cannot be read through gzip; unpack it")
    name = path.name if path == root else path.relative_to(root).as_posix()
    return Input(path=path, name=name, source=source, kind=kind, gzip=bare != path.name,
                 size=status.st_size, changed=status.st_mtime_ns)


def _regular_files(root: Path) -> list[Path]:
    if not root.is_dir():
        return [root] if stat.S_ISREG(root.stat().st_mode) else []
    files: list[Path] = []
    for directory, below, names in os.walk(root, onerror=_raise):  # follows no links
        below[:] = [name for name in below if not name.startswith(".")]
        files += (Path(directory, name) for name in names if not name.startswith("."))
    return [path for path in sorted(files) if stat.S_ISREG(path.lstat().st_mode)]


def _raise(error: OSError) -> None:
    raise error


def _units(x: Input) -> Iterator[Unit]:
    if x.kind == "parquet":
        with open_parquet(x.path) as file:
            groups = file.metadata.num_row_groups
        for i in range(groups):
            yield Unit(x, i, i + 1, (i + 1) * x.size // groups - i * x.size // groups)
    elif x.gzip:
        yield Unit(x, 0, x.size, x.size)
    else:
        for start in range(0, x.size, PIECE):
            stop = min(start + PIECE, x.size)
            yield Unit(x, start, stop, stop - start)
