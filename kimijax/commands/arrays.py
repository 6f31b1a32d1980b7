"""Token and logit arrays as files: checked when read, complete before they take their name."""

import io
import math
import os
import stat
import tempfile
import tokenize
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np

from kimijax.checkpoint.common import brief
from kimijax.errors import UserError

HEADER = 1 << 12  # bytes of a file in which its header must end; numpy writes 128
# What numpy's reader of headers, which evaluates Python literals, is known to raise.
UNREADABLE = (
    OSError, ValueError, EOFError, TypeError, OverflowError, MemoryError, SyntaxError,
    RecursionError, tokenize.TokenError,
)


def read_tokens(path: str, vocab: int) -> np.ndarray:
    """int32 [B, T] of an .npy file; UserError for anything else and for foreign ids."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe could wait for ever
            raise UserError(f"--tokens {path}: is no regular file; save the array as .npy")
        with open(path, "rb") as file:
            ids = _read_array(path, file)
    except UNREADABLE as error:
        raise UserError(
            f"--tokens {path}: is no .npy array: {brief(error)}; write it with numpy.save"
        ) from error
    if ids.min() < 0 or ids.max() >= vocab:
        row, at = np.argwhere((ids < 0) | (ids >= vocab))[0]
        raise UserError(
            f"--tokens {path}: token {ids[row, at]} at row {row}, position {at} is outside the "
            f"vocabulary of {vocab}"
        )
    return ids.astype(np.int32)


def _read_array(path: str, file: BinaryIO) -> np.ndarray:
    """Whole numbers [B, T]; nothing is allocated for a header that promises more than follows."""
    shape, fortran, dtype = _read_header(file)
    if dtype.hasobject:
        raise ValueError("it holds Python objects")
    if len(shape) != 2 or any(type(n) is not int or n < 1 for n in shape):
        raise UserError(
            f"--tokens {path}: must be an array [B, T] with tokens, got shape {str(shape):.60}"
        )
    if dtype.kind not in "iu":
        raise UserError(
            f"--tokens {path}: must hold whole numbers, got dtype {str(dtype):.60}"
        )
    size = os.fstat(file.fileno()).st_size - file.tell()
    if math.prod(shape) * dtype.itemsize > size:
        raise ValueError(f"its shape {str(shape):.60} needs more than the {size} bytes it has")
    flat = np.fromfile(file, dtype, math.prod(shape))
    return flat.reshape(shape, order="F" if fortran else "C")


def _read_header(file: BinaryIO) -> tuple[tuple[int, ...], bool, np.dtype]:
    """(shape, whether columns come first, dtype), and the file is where the data begins."""
    head = io.BytesIO(file.read(HEADER))
    version = np.lib.format.read_magic(head)
    readers = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    if version not in readers:
        raise ValueError(f"its format version is {version}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of odd literals: a warning would be a second line
        header = readers[version](head, max_header_size=HEADER)
    file.seek(head.tell())
    return header


@contextmanager
def new_array(path: str, shape: tuple[int, ...], dtype: type) -> Iterator[np.ndarray]:
    """An array on disk to fill; it takes its name when the block ends, or is gone."""
    target = Path(path)
    if target.suffix != ".npy" or target.is_dir():
        raise UserError(f"--out {path}: must name an .npy file")
    with _writing(path):
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=".", suffix=".npy")
        os.close(handle)
    try:
        with _writing(path):
            array = np.lib.format.open_memmap(name, "w+", dtype, shape)
        yield array
        with _writing(path):
            array.flush()
            umask = os.umask(0)
            os.umask(umask)
            os.chmod(name, 0o666 & ~umask)  # mkstemp makes files that only their owner may read
            os.replace(name, target)
    finally:
        Path(name).unlink(missing_ok=True)


@contextmanager
def _writing(path: str) -> Iterator[None]:
    try:
        yield
    except (OSError, OverflowError) as error:  # overflow: longer than a file can be
        fault = getattr(error, "strerror", None) or brief(error)
        raise UserError(f"--out {path}: cannot be written: {fault}") from error
