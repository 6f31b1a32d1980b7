"""Writing safetensors in shards, a tensor at a time, so that a model need not fit in memory."""

import contextlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from kimijax.convert.header import DTYPES, MAX_HEADER, refusal
from kimijax.convert.tensors import CHUNK, INDEX, SINGLE, SUFFIX, forget
from kimijax.convert.unfinished import being_written
from kimijax.errors import UserError

METADATA = {"format": "pt"}  # transformers refuses files that lack it
Plan = Mapping[str, tuple[str, Sequence[int]]]


class ShardWriter:
    """Writes the tensors of a plan; what is in the directory is whole or is not there.

    with ShardWriter(directory, {"a.weight": ("BF16", (4, 8))}) as writer:
        writer.put("a.weight", array)

    The files get their names when the `with` ends, the index last; an exception removes them.
    Wrong use raises ValueError, a directory that cannot be written to UserError.
    """

    def __init__(self, directory: str | os.PathLike, plan: Plan, shard_bytes: int = 5 * 2**30,
                 new: bool = False):
        """Write the headers.

        plan         name -> (a key of DTYPES, shape) of every tensor, in the order to store them
        shard_bytes  of tensors in a file; a larger tensor has a file of its own
        new          UserError if the directory is there already
        """
        self._directory = Path(directory)
        _check_plan(plan, shard_bytes)
        self._plan = {name: (kind, tuple(map(int, shape))) for name, (kind, shape) in plan.items()}
        shards = _split(self._plan, shard_bytes)
        total = len(shards)
        self._files = [SINGLE] if total == 1 else [
            f"model-{i:05d}-of-{total:05d}{SUFFIX}" for i in range(1, total + 1)
        ]
        self._left = [set(shard) for shard in shards]  # names to come, by file
        self._place: dict[str, tuple[int, int]] = {}  # name -> file and offset in it
        self._rows: dict[str, int] = {}  # name -> rows that were put one after the other
        self._beside: list[str] = []  # files that go with them
        self._made: list[Path] = []
        self._held = contextlib.ExitStack()  # a lock: this directory is being written
        self._state = "open"  # then "written" or "discarded"
        headers = [self._lay_out(number, shard) for number, shard in enumerate(shards)]
        self._new: list[Path] = []  # directories that were not there, the innermost first
        with self._or_discard():
            self._new = make_directories(self._directory, new)
            self._held.enter_context(being_written(self._directory))
            _check_empty(self._directory)
            for file, header in zip(self._files, headers, strict=True):
                self._create(f"{file}.tmp", header)

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind: type | None, *exception: object) -> None:
        if kind is None:
            self.close()
        else:
            self.discard()

    def put(self, name: str, array: np.ndarray) -> None:
        """Write one tensor of the plan, each once, in any order."""
        self._check_put(name, array, self._plan[name][1] if name in self._plan else ())
        self._store(name, array, 0, True)

    def put_rows(self, name: str, at: int, array: np.ndarray) -> None:
        """Write rows from `at` of a tensor that is too large for memory; rows come in order."""
        shape = self._plan[name][1] if name in self._plan else ()
        rows = shape[0] if shape else 0
        if at != self._rows.get(name, 0) or at + len(array) > rows:
            raise ValueError(f"{name}: rows {at} to {at + len(array)} do not follow, it has {rows}")
        self._check_put(name, array, (len(array), *shape[1:]))
        self._rows[name] = at + len(array)
        offset = at * _size(self._plan[name][0], (1, *shape[1:]))
        self._store(name, array, offset, self._rows[name] == rows)

    def add(self, name: str, content: bytes) -> None:
        """A file that goes with the tensors and gets its name before any of them does."""
        with self._or_discard():
            self._create(f"{name}.tmp", content)
        self._beside.append(name)

    def _store(self, name: str, array: np.ndarray, offset: int, whole: bool) -> None:
        """Bytes to their place; with the last of a file's tensors `whole`, the file to the disk."""
        number, start = self._place[name]
        path = self._directory / f"{self._files[number]}.tmp"
        # The bytes as they are to lie; strided arrays are copied.
        data = np.asarray(array, order="C").reshape(-1).view(np.uint8)
        with self._or_discard():
            file = os.open(path, os.O_WRONLY)
            try:
                _write(file, data, start + offset)
                if whole:
                    self._left[number].remove(name)
                if not self._left[number]:
                    os.fsync(file)
                    forget(file)
            finally:
                os.close(file)

    def close(self) -> None:
        """Give the files their names, then write the index; ValueError if tensors are missing."""
        if self._state == "written":
            return
        if self._state == "discarded":
            raise ValueError(f"{self._directory}: nothing is written after an error")
        if missing := sorted(set().union(*self._left)):
            self.discard()
            raise ValueError(f"{len(missing)} tensors were never put, such as {missing[0]}")
        with self._or_discard():
            for file in self._beside:
                _sync(self._directory / f"{file}.tmp")
            for file in (*self._beside, *self._files):
                self._rename(file)
            _sync(self._directory)
            if len(self._files) > 1:
                self._create(f"{INDEX}.tmp", self._index())
                _sync(self._made[-1])
                self._rename(INDEX)
                _sync(self._directory)
        self._state = "written"
        self._held.close()

    def discard(self) -> None:
        """Remove all files, unless they are complete and closed."""
        if self._state == "written":
            return
        self._state = "discarded"
        while self._made:
            with contextlib.suppress(OSError):  # never written, or gone with its directory
                self._made.pop().unlink()
        remove_directories(self._new)
        self._held.close()

    @contextlib.contextmanager
    def _or_discard(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.discard()
            raise refusal(
                self._directory,
                f"cannot be written: {error.strerror or error}",
                "check its permissions and the space that is left",
            ) from error
        except BaseException:
            self.discard()
            raise

    def _lay_out(self, number: int, names: list[str]) -> bytes:
        """The header of a file with these tensors, padded to a multiple of 8 bytes."""
        at, starts, header = 0, {}, {"__metadata__": METADATA}
        for name in names:
            dtype, shape = self._plan[name]
            starts[name], end = at, at + _size(dtype, shape)
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": (at, end)}
            at = end
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        if len(text) > MAX_HEADER:
            raise ValueError(f"{len(names)} tensors are too many for a file: lower shard_bytes")
        self._place |= {name: (number, 8 + len(text) + start) for name, start in starts.items()}
        return len(text).to_bytes(8, "little") + text

    def _check_put(self, name: str, array: np.ndarray, shape: tuple[int, ...]) -> None:
        if self._state != "open":
            raise ValueError(f"cannot put {name}: the files are {self._state}")
        if name not in self._plan:
            raise ValueError(f"{name} is not in the plan of {len(self._plan)} tensors")
        dtype = self._plan[name][0]
        if (array.dtype, array.shape) != (DTYPES[dtype], shape):
            raise ValueError(
                f"{name} is {array.dtype} {array.shape}, but the plan has {DTYPES[dtype]} {shape}"
            )
        if name not in self._left[self._place[name][0]]:
            raise ValueError(f"{name} was put before")

    def _create(self, name: str, content: bytes) -> None:
        """A new file; one that a killed process left is written over."""
        self._made.append(self._directory / name)
        self._made[-1].write_bytes(content)

    def _rename(self, name: str) -> None:
        self._made.append(self._directory / name)
        self._made[-1].with_name(f"{name}.tmp").replace(self._made[-1])

    def _index(self) -> bytes:
        mapped = {name: self._files[number] for name, (number, _) in self._place.items()}
        total = sum(_size(*entry) for entry in self._plan.values())
        index = {"metadata": {"total_size": total}, "weight_map": mapped}
        text = json.dumps(index, ensure_ascii=False, indent=2, sort_keys=True)
        return f"{text}\n".encode()


def _size(dtype: str, shape: tuple[int, ...]) -> int:
    return math.prod(shape) * DTYPES[dtype].itemsize


def _check_plan(plan: Plan, shard_bytes: int) -> None:
    if not plan or shard_bytes < 1:
        raise ValueError(f"nothing to write: {len(plan)} tensors, {shard_bytes} bytes in a shard")
    for name, (dtype, shape) in plan.items():
        if name == "__metadata__" or dtype not in DTYPES or any(x < 0 for x in shape):
            raise ValueError(
                f"{name!r} as {dtype} {tuple(shape)} cannot be written: dtypes are "
                f"{', '.join(DTYPES)}, and __metadata__ is no tensor"
            )


def _split(plan: Plan, shard_bytes: int) -> list[list[str]]:
    """The names by file. In a file the widest dtypes come first: torch needs aligned tensors."""
    shards, room = [[]], shard_bytes
    for name, entry in plan.items():
        size = _size(*entry)
        if size > room and shards[-1]:
            shards.append([])
            room = shard_bytes
        shards[-1].append(name)
        room -= size
    return [sorted(shard, key=lambda name: -DTYPES[plan[name][0]].itemsize) for shard in shards]


def make_directories(directory: Path, new: bool = False) -> list[Path]:
    """Make a directory and those above it; returns what was not there, the innermost first.

    new  FileExistsError if it is there; one that cannot be made leaves none of the others
    """
    missing = [x for x in (directory, *directory.parents) if not os.path.lexists(x)]
    try:
        directory.mkdir(parents=True, exist_ok=not new)
    except BaseException:
        remove_directories(missing)
        raise
    return missing


def remove_directories(directories: list[Path]) -> None:
    """Those of them that are empty, the innermost first."""
    for directory in directories:
        with contextlib.suppress(OSError):
            directory.rmdir()


def _check_empty(directory: Path) -> None:
    """A directory without a model: old files among new ones would be read as one."""
    names = sorted(os.listdir(directory))
    if old := [name for name in names if name == INDEX or name.endswith(SUFFIX)]:
        raise UserError(f"{directory}: holds {old[0]}; name a new directory, or remove the model")


def _write(file: int, data: np.ndarray, at: int) -> None:
    done = 0
    while done < data.size:
        done += os.pwrite(file, data[done : done + CHUNK], at + done)


def _sync(path: Path) -> None:
    """A file or a directory reaches the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
