"""The header of a safetensors file, read as if a stranger had made it.

A file is an 8-byte little-endian length, a JSON header of that length and the tensors' bytes.
Nothing of it is believed before it is checked, and every refusal is one line of UserError.
"""

import collections
import contextlib
import json
import math
import os
import reprlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np

from kimijax.errors import UserError

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors library
MAX_DIMS, MAX_BYTES = 32, 2**50  # of a tensor

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxlong = _SHORT.maxother = 100


class TensorInfo(NamedTuple):
    """A tensor that lies at the bytes start..end of a file; dtype is a key of DTYPES."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    end: int


def read_header(path: Path) -> list[TensorInfo]:
    """The tensors of one file, in the order in which they lie; UserError: it is not sound."""
    with reading(path), path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8:
            raise refusal(path, f"is truncated: {size} bytes hold no header")
        if prefix == b"version ":
            raise refusal(path, "is a pointer of git-lfs", "run git lfs pull in its repository")
        if not 2 <= length <= min(MAX_HEADER, size - 8):
            raise refusal(
                path,
                f"is truncated or no safetensors file: the length of its header is {length}, but "
                f"the file has {size} bytes and a header has 2 to {MAX_HEADER}",
            )
        header = json_object(path, file.read(length))
    _check_metadata(path, header.pop("__metadata__", {}))
    begin = 8 + length
    infos = [_tensor_info(path, name, entry, begin, size) for name, entry in header.items()]
    infos.sort(key=lambda info: (info.start, info.end))
    _check_gapless(path, infos, begin, size)
    return infos


def json_object(path: Path, raw: bytes) -> dict:
    """Its JSON, in which no object has a name twice."""

    def unique(pairs: list[tuple[str, object]]) -> dict:
        found = dict(pairs)
        if len(found) < len(pairs):
            name = collections.Counter(name for name, _ in pairs).most_common(1)[0][0]
            raise refusal(path, f"has the name {show(name)} twice in one JSON object")
        return found

    try:
        # Decoded here: the parser would guess at UTF-16 and UTF-32.
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise refusal(path, f"its JSON cannot be read: {str(error)[:200]}") from error
    if not isinstance(value, dict):
        raise refusal(path, f"its JSON must be an object, not {show(value)}")
    return value


def _check_metadata(path: Path, metadata: object) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(x, str) for x in metadata.values()):
        raise refusal(path, f"its __metadata__ must map names to strings, not {show(metadata)}")


def _tensor_info(path: Path, name: str, entry: object, begin: int, size: int) -> TensorInfo:
    """One entry of the header of a file of `size` bytes, whose tensors begin at `begin`."""
    if not isinstance(entry, dict) or not entry.keys() >= {"dtype", "shape", "data_offsets"}:
        raise refusal(
            path, f"tensor {show(name)} needs dtype, shape and data_offsets, but has {show(entry)}"
        )
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise refusal(
            path, f"tensor {show(name)}: dtype {show(dtype)} is unknown",
            f"convert it to one of {', '.join(DTYPES)}",
        )
    if not _are_sizes(shape) or len(shape) > MAX_DIMS:
        raise refusal(path, f"tensor {show(name)}: shape {show(shape)} is none")
    # A size of 0 would hide what no array can have as its other sizes.
    if math.prod(max(x, 1) for x in shape) * DTYPES[dtype].itemsize > MAX_BYTES:
        raise refusal(path, f"tensor {show(name)}: shape {show(shape)} is absurdly large")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise refusal(path, f"tensor {show(name)}: data_offsets {show(offsets)} are no byte range")
    if offsets[1] > size - begin:
        raise refusal(
            path,
            f"is truncated: tensor {show(name)} has data_offsets {show(offsets)}, but the file "
            f"holds {size - begin} bytes of tensors",
        )
    needed = math.prod(shape) * DTYPES[dtype].itemsize
    if offsets[1] - offsets[0] != needed:
        raise refusal(
            path,
            f"tensor {show(name)}: {dtype} of shape {show(shape)} has {needed} bytes, but its "
            f"data_offsets {show(offsets)} span {offsets[1] - offsets[0]}",
        )
    return TensorInfo(name, dtype, tuple(shape), path, begin + offsets[0], begin + offsets[1])


def _are_sizes(values: object) -> bool:
    return isinstance(values, list) and all(type(x) is int and x >= 0 for x in values)


def _check_gapless(path: Path, infos: list[TensorInfo], begin: int, size: int) -> None:
    """Sorted tensors lie one right behind the other, up to the end of the file."""
    at = begin
    for info in infos:
        if info.start != at:
            fault = "overlaps what lies before it" if info.start < at else "lies behind a gap"
            raise refusal(
                path,
                f"tensor {show(info.name)} {fault}: its data_offsets are "
                f"[{info.start - begin}, {info.end - begin}], not [{at - begin}, ...]",
            )
        at = info.end
    if at != size:
        raise refusal(path, f"has {size - at} bytes that belong to no tensor at its end")


def refusal(path: Path, fault: str, remedy: str = "fetch it again") -> UserError:
    """The error of a file or directory: one line, whatever is in the names."""
    line = f"{path}: {fault}; {remedy}"
    return UserError("".join(c if c.isprintable() else "?" for c in line))


def show(value: object) -> str:
    """A foreign value in a message, cut where it is long."""
    return _SHORT.repr(value)


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise refusal(
            path, f"cannot be read: {error.strerror or error}", "check that it is there and yours"
        ) from error
