"""Token and logit arrays as files: checked when read, complete before they take their name."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from kimijax.checkpoint.common import brief
from kimijax.errors import UserError


def read_tokens(path: str, vocab: int) -> np.ndarray:
    """int32 [B, T] of an .npy file; UserError for anything else and for foreign ids."""
    try:
        ids = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"--tokens {path}: is no .npy array: {brief(error)}") from error
    if not isinstance(ids, np.ndarray) or ids.ndim != 2 or not ids.size:
        shape = getattr(ids, "shape", None)
        raise UserError(f"--tokens {path}: must be an array [B, T] with tokens, got shape {shape}")
    if not np.issubdtype(ids.dtype, np.integer):
        raise UserError(f"--tokens {path}: must hold whole numbers, got dtype {ids.dtype}")
    if ids.min() < 0 or ids.max() >= vocab:
        row, at = np.argwhere((ids < 0) | (ids >= vocab))[0]
        raise UserError(
            f"--tokens {path}: token {ids[row, at]} at row {row}, position {at} is outside the "
            f"vocabulary of {vocab}"
        )
    return ids.astype(np.int32)


@contextmanager
def new_array(path: str, shape: tuple[int, ...], dtype: type) -> Iterator[np.ndarray]:
    """An array on disk to fill; it takes its name when the block ends, or is gone."""
    target = Path(path)
    if target.suffix != ".npy" or target.is_dir():
        raise UserError(f"--out {path}: must name an .npy file")
    try:
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=".", suffix=".npy")
        os.close(handle)
    except OSError as error:
        raise UserError(f"--out {path}: cannot be written: {error.strerror}") from error
    try:
        array = np.lib.format.open_memmap(name, "w+", dtype, shape)
        yield array
        array.flush()
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)  # mkstemp makes files that only their owner may read
        os.replace(name, target)
    except OSError as error:
        raise UserError(f"--out {path}: cannot be written: {error.strerror}") from error
    finally:
        Path(name).unlink(missing_ok=True)
