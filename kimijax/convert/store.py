"""Parameters on disk, one array per leaf, written a chunk at a time and read by orbax.

The layout is orbax's own (tensorstore: zarr3 arrays in one ocdbt database, _METADATA beside it), so
that orbax restores it onto any mesh. A chunk is one layer or one expert; it carries its CRC32C,
which every reader checks. Numbers lie as in the file they came from: a transposed matrix is
described as such (zarr's transpose codec) and not moved.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kimijax.checkpoint.common import brief
from kimijax.convert.source import check_finite
from kimijax.errors import UserError

METADATA = "_METADATA"
PARAMS, HUB, NOTES = "params", "hub_config.json", "notes.json"  # in a converted directory
IN_FLIGHT = 256 * 2**20  # bytes that may be on their way to the disk


@dataclass(frozen=True)
class Leaf:
    """An array to be: its chunks, and the order of its axes in memory (outermost first)."""

    shape: tuple[int, ...]
    dtype: np.dtype
    chunk: tuple[int, ...]
    order: tuple[int, ...]


class WriteError(UserError):
    """The disk is at fault, not the source: what was written before is sound."""


@contextmanager
def writing(directory: Path) -> Iterator[None]:
    """Failures of the disk, ValueError among them as tensorstore raises it, as WriteError."""
    try:
        yield
    except (ValueError, OSError) as error:
        why = getattr(error, "strerror", None) or brief(error)
        raise WriteError(
            f"{directory}: cannot be written: {why}; check its path, permissions and free space"
        ) from error


class Store:
    """Arrays by name in a directory. Writing the same place twice replaces it."""

    def __init__(self, directory: Path, leaves: dict[str, Leaf]):
        self.directory, self.leaves = directory, leaves
        self._arrays = {}
        self._pending: list[tuple[object, int]] = []
        # Files that a killed process was writing: tensorstore would write over them, and what was
        # longer before would stay behind the end. Who opens a Store is alone in the directory.
        with writing(directory):
            for cut in directory.rglob("*.__lock"):
                cut.unlink()

    def write(self, leaf: str, index: tuple, array: np.ndarray) -> None:
        """Begin to write a part; waits when too much is on its way."""
        while self._pending and self._bytes() + array.nbytes > IN_FLIGHT:
            self._settle(1)
        target = self._array(leaf)[index]
        self._pending.append((target.write(array), array.nbytes))

    def flush(self) -> None:
        """All that was written is on the disk."""
        self._settle(len(self._pending))

    def abandon(self) -> None:
        """Wait for what is on its way, however it ends: nothing is written after that."""
        for future, _ in self._pending:
            with suppress(Exception):
                future.result()

    def finish(self) -> None:
        """Everything was written: describe the tree, which makes it a checkpoint."""
        self.flush()
        tree = {str(tuple(name.split("."))): _entry(name, x) for name, x in self.leaves.items()}
        described = {
            "tree_metadata": tree,
            "use_ocdbt": True,
            "use_zarr3": True,
            "store_array_data_equal_to_fill_value": True,
            "custom_metadata": None,
        }
        with writing(self.directory):
            replace(self.directory / METADATA, json.dumps(described))

    def _bytes(self) -> int:
        return sum(size for _, size in self._pending)

    def _settle(self, count: int) -> None:
        with writing(self.directory):
            for future, _ in self._pending[:count]:
                future.result()
        del self._pending[:count]

    def _array(self, name: str):
        if name not in self._arrays:
            import tensorstore as ts

            spec = _spec(self.directory, name) | {"metadata": _zarr(self.leaves[name])}
            with writing(self.directory):
                self._arrays[name] = ts.open(spec, create=True, open=True).result()
        return self._arrays[name]


def replace(path: Path, text: str) -> None:
    """A file that is there as a whole or not at all."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(text)
    temporary.replace(path)


class Reader:
    """The arrays of a store; UserError: one is missing or damaged, or lies elsewhere."""

    def __init__(self, directory: Path):
        self.directory = directory
        self._arrays = {}
        link = directory if directory.is_symlink() else _link(directory)
        if link:
            raise UserError(f"{link}: is a symbolic link; copy what it names into the store")

    def dtype(self, name: str) -> np.dtype:
        """Of an array."""
        return self._open(name).dtype.numpy_dtype

    def shape(self, name: str) -> tuple[int, ...]:
        """Of an array."""
        return tuple(self._open(name).shape)

    def chunk(self, name: str) -> tuple[int, ...]:
        """The shape in which an array lies on the disk, and is read at the least."""
        return tuple(self._open(name).chunk_layout.read_chunk.shape)

    def read(self, name: str, index: tuple = ()) -> np.ndarray:
        """An array, or the part of it at an index, its axes in memory as they are on disk."""
        array = self._open(name)
        taken = sum(isinstance(i, int) for i in index)
        order = [axis - taken for axis in _order(array)[taken:]]
        try:
            part = array[index] if index else array
            found = part.transpose(order).read().result()
        except (ValueError, OSError) as error:
            raise self._refusal(name, error) from error
        check_finite(found, f"{self.directory}: {name}")
        return found.transpose(np.argsort(order))

    def _open(self, name: str):
        import tensorstore as ts

        if name not in self._arrays:
            try:
                self._arrays[name] = ts.open(_spec(self.directory, name), read=True).result()
            except (ValueError, OSError) as error:
                raise self._refusal(name, error) from error
        return self._arrays[name]

    def _refusal(self, name: str, error: Exception) -> UserError:
        return UserError(f"{self.directory}: {name} cannot be read: {brief(error)}")


def _link(directory: Path) -> Path | None:
    """A symbolic link below a directory."""
    for at, folders, files in os.walk(directory):
        for name in (*folders, *files):
            if (Path(at) / name).is_symlink():
                return Path(at) / name
    return None


def _order(array) -> list[int]:
    """The axes of an open array, outermost first, as they lie on the disk."""
    codecs = array.spec().to_json()["metadata"]["codecs"]
    found = (c["configuration"]["order"] for c in codecs if c["name"] == "transpose")
    return next(found, list(range(array.rank)))


def stored(directory: Path) -> bool:
    """Whether a directory holds a finished store."""
    return (directory / METADATA).is_file()


def _spec(directory: Path, name: str) -> dict:
    return {
        "driver": "zarr3",
        "kvstore": {
            "driver": "ocdbt", "base": f"file://{directory.absolute()}/", "path": f"{name}/",
        },
    }


def _zarr(leaf: Leaf) -> dict:
    """zarr.json of an array."""
    codecs = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
    if leaf.order != tuple(range(len(leaf.shape))):
        codecs.insert(0, {"name": "transpose", "configuration": {"order": list(leaf.order)}})
    return {
        "shape": list(leaf.shape),
        "data_type": str(leaf.dtype),
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(leaf.chunk)}},
        "codecs": codecs,
    }


def _entry(name: str, leaf: Leaf) -> dict:
    """What orbax keeps of a leaf (2: the key of a dict)."""
    return {
        "key_metadata": [{"key": key, "key_type": 2} for key in name.split(".")],
        "value_metadata": {
            "value_type": "jax.Array", "skip_deserialize": False, "write_shape": list(leaf.shape),
        },
    }
