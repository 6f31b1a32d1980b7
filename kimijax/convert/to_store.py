"""A Hugging Face checkpoint to a directory of ours: config.json and params/, streamed.

One hub tensor at a time is read, laid out and written at its index of the stacked leaf, so memory
does not grow with the model. What is written is noted; an interrupted conversion goes on there.
"""

import dataclasses
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fcntl import LOCK_EX, LOCK_NB, flock
from hashlib import blake2b
from pathlib import Path
from typing import TextIO

import numpy as np

from kimijax.config_tree import to_dict
from kimijax.convert.header import DTYPES as FILE_DTYPES
from kimijax.convert.names import Rule
from kimijax.convert.source import (
    DTYPES,
    KEPT_FLOAT32,
    Source,
    check_finite,
    leaf_dtype,
)
from kimijax.convert.store import (
    HUB,
    NOTES,
    PARAMS,
    Leaf,
    Store,
    WriteError,
    replace,
    writing,
)
from kimijax.convert.tensors import inside
from kimijax.convert.write import make_directories, remove_directories
from kimijax.errors import UserError
from kimijax.model import parameter_shapes

# There until the conversion is complete; nothing that loads looks at them.
CLAIM, DONE, LOCK = "source.json", "converted.log", "lock"
PIECE = 64 * 2**20  # bytes of a tensor that is read in rows
NOTE_EVERY = 512 * 2**20  # bytes between notes of what is done
BESIDE = (  # files of a tokenizer and of generation that go along
    "tokenizer.json", "tokenizer_config.json", "tiktoken.model", "special_tokens_map.json",
    "chat_template.jinja", "generation_config.json",
)


def convert_to_store(
    source: Source, out: Path, dtype: np.dtype | None, on_bytes: Callable[[int, int], None]
) -> None:
    """Write `source` to `out`; `on_bytes` is told the bytes of a tensor done, and those in all.

    While it works everything is in out.partial; UserError if that is of another conversion.
    """
    partial = out.with_name(f"{out.name}.partial")
    with writing(partial):
        made = make_directories(partial)
    try:
        with _locked(partial, out):
            try:
                _convert(source, partial, dtype, on_bytes)
            except UserError as error:
                # What a full disk cut short can be resumed, what is of a bad source can not; an
                # interruption is another exception.
                if made and not (isinstance(error, WriteError) and _done(partial)):
                    shutil.rmtree(partial, ignore_errors=True)
                raise
            with writing(out):
                partial.rename(out)
                # Once it has its name: without the notes nothing could resume, with them it loads.
                for name in (DONE, CLAIM, LOCK):
                    (out / name).unlink(missing_ok=True)
    except UserError:
        remove_directories(made)  # those that are empty
        raise


def _convert(
    source: Source, partial: Path, dtype: np.dtype | None, on_bytes: Callable[[int, int], None]
) -> None:
    """Everything of the store into `partial`, from where it was left."""
    with writing(partial):
        _claim(partial, source, dtype)
        done, log = _done(partial), (partial / DONE).open("a")
    store = Store(partial / PARAMS, plan(source, dtype))
    try:
        with log:
            _write_all(source, store, done, log, on_bytes)
    except BaseException:
        store.abandon()  # or it would write into a directory that is removed or another's by then
        raise
    store.finish()
    for name, real in beside(source.directory):
        with writing(partial):
            shutil.copyfile(real, partial / name)


def _write_all(
    source: Source, store: Store, done: set[str], log: TextIO,
    on_bytes: Callable[[int, int], None],
) -> None:
    """Every tensor that is not done, and notes of them."""
    total = sum(source.size(rule) for rule in source.rules())
    names, size = [], 0
    for rule in source.rules():
        if rule.name not in done:
            for index, name, array in _pieces(source, rule, store.leaves):
                what = f"{source.directory}: {rule.name}"
                store.write(name, index, cast(array, store.leaves[name].dtype, what))
            names.append(rule.name)
        read = source.size(rule)
        size += read
        on_bytes(read, total)
        if size > NOTE_EVERY:
            _note(store, log, names)
            names, size = [], 0
    _note(store, log, names)


def beside(directory: Path) -> list[tuple[str, Path]]:
    """(name, file) of what goes along with a model: its tokenizer and generation settings."""
    return [(n, inside(directory, n)) for n in BESIDE if (directory / n).is_file()]


def plan(source: Source, dtype: np.dtype | None) -> dict[str, Leaf]:
    """Every leaf: chunks of one hub tensor (or some rows of a large one), order as they lie."""
    shapes = parameter_shapes(source.cfg)
    leaves: dict[str, Leaf] = {}
    for rule in source.rules():
        found = stored_dtype(source, rule, dtype)
        for part in rule.parts:
            shape, lead = shapes[part.leaf].shape, len(part.index)
            kind = found
            if rule.dtypes or dtype is not None:
                kind = leaf_dtype(part.leaf, shapes[part.leaf].dtype, found)
            if part.leaf in leaves:
                if leaves[part.leaf].dtype.itemsize < kind.itemsize:  # layers differ: the widest
                    held = leaves[part.leaf]
                    leaves[part.leaf] = dataclasses.replace(held, dtype=kind)
                continue
            inner = list(shape[lead:])
            if rule.rows is not None:
                inner[rule.rows] = _rows(rule, kind)
            memory = rule.memory or range(len(inner))
            order = (*range(lead), *(lead + axis for axis in memory))
            leaves[part.leaf] = Leaf(shape, kind, (*(1,) * lead, *inner), order)
    return leaves


def stored_dtype(source: Source, rule: Rule, dtype: np.dtype | None) -> np.dtype:
    """The dtype asked for; if none is: as in the file, bfloat16 for what was quantised."""
    if rule.dtypes:
        return np.dtype(FILE_DTYPES[source.info(rule).dtype])
    if dtype is not None:
        exact = rule.parts[0].leaf.rsplit(".", 1)[-1] in KEPT_FLOAT32
        return np.dtype(np.float32) if exact else dtype
    if source.forms[rule.name] != "as is":
        return DTYPES["bfloat16"]
    held = FILE_DTYPES[source.info(rule).dtype]
    return held if held in DTYPES.values() else np.dtype(np.float32)


def row_slices(rule: Rule, dtype: np.dtype) -> list[slice | None]:
    """Pieces of a hub tensor that may be cut along its rows; [None]: it is taken whole."""
    if rule.rows is None:
        return [None]
    step = _rows(rule, dtype)
    return [slice(at, min(at + step, rule.shape[0])) for at in range(0, rule.shape[0], step)]


def _rows(rule: Rule, dtype: np.dtype) -> int:
    """Rows of a hub tensor that make a piece."""
    row = int(np.prod(rule.shape[1:])) * dtype.itemsize
    return min(rule.shape[0], max(1, PIECE // row))


def _pieces(
    source: Source, rule: Rule, leaves: dict[str, Leaf]
) -> Iterator[tuple[tuple, str, np.ndarray]]:
    """(index, leaf, array) of a hub tensor: its parts, or rows of it that make a chunk."""
    if rule.rows is None or source.forms[rule.name] != "as is":
        for part, array in zip(rule.parts, rule.split(source.read(rule)), strict=True):
            yield part.index, part.leaf, array
        return
    (part,) = rule.parts
    step = leaves[part.leaf].chunk[rule.rows]
    for start in range(0, rule.shape[0], step):
        stop = min(start + step, rule.shape[0])
        (array,) = rule.split(source.read_rows(rule, start, stop))
        index = [slice(None)] * array.ndim
        index[rule.rows] = slice(start, stop)
        yield (*part.index, *index), part.leaf, array


def cast(array: np.ndarray, dtype: np.dtype, what: str) -> np.ndarray:
    """An array in a dtype; UserError names `what` if its numbers are too large for it."""
    if array.dtype == dtype:
        return array
    found = array.astype(dtype, order="K")
    if dtype.itemsize < array.dtype.itemsize:
        check_finite(found.ravel(order="K"), f"{what} as {dtype}")
    return found


def _claim(partial: Path, source: Source, dtype: np.dtype | None) -> None:
    """Make `partial` ours, or see that it is: the same source, and the same way to convert it."""
    weight_shape = {"weight_shape": source.weight_shape_dtype()}
    files = {
        "config.json": json.dumps(to_dict(source.cfg), indent=1),
        HUB: json.dumps(source.hub, indent=1),
        NOTES: json.dumps(weight_shape),
    }
    claim = json.dumps({"dtype": str(dtype), "source": _identity(source), "files": files})
    held = partial / CLAIM
    if not held.exists():
        # The claim is written last: a start that was cut short left no more than these files.
        names = {*files, CLAIM, LOCK}
        if foreign := sorted(set(os.listdir(partial)) - names - {f"{n}.tmp" for n in names}):
            raise UserError(
                f"{partial}: holds {foreign[0]!r:.80}, which no conversion of ours left; remove it "
                "or name another directory"
            )
        for name, text in files.items():
            replace(partial / name, text)
        replace(held, claim)
    elif held.read_bytes() != claim.encode():
        raise UserError(
            f"{partial}: holds another conversion, or its source has changed; remove it or name "
            "another directory"
        )


def _identity(source: Source) -> str:
    """A digest that differs for other weights: every tensor's place, every file's size and time."""
    digest, seen = blake2b(), set()
    for name in source.files.names():
        info = source.files.info(name)
        if info.file not in seen:
            seen.add(info.file)
            found = info.file.stat()
            digest.update(repr((found.st_size, found.st_mtime_ns)).encode())
        digest.update(repr((*info[:3], info.file.name, *info[4:])).encode())
    return digest.hexdigest()


@contextmanager
def _locked(partial: Path, out: Path) -> Iterator[None]:
    """Alone at work in `partial`; UserError: another conversion is."""
    with writing(partial):
        file = (partial / LOCK).open("a")
    with file:
        try:
            flock(file, LOCK_EX | LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"{partial}: another conversion is writing to it; wait for it, or name another "
                "directory"
            ) from error
        except OSError as error:  # a file system without locks
            print(f"warning: {partial} cannot be locked: {error.strerror}", file=sys.stderr)
        # Another conversion may have come to its end between the check and the lock.
        if os.path.lexists(out):
            raise UserError(f"{out}: exists; name another directory or remove it")
        yield


def _done(partial: Path) -> set[str]:
    """The tensors that are noted as being on the disk."""
    log = partial / DONE
    return set(log.read_text(errors="replace").splitlines()) if log.exists() else set()


def _note(store: Store, log: TextIO, names: list[str]) -> None:
    """Write down that tensors are on the disk, once they are."""
    store.flush()
    with writing(store.directory):
        log.writelines(f"{name}\n" for name in names)
        log.flush()
