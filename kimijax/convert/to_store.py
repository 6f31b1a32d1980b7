"""A Hugging Face checkpoint to a directory of ours: config.json and params/, streamed.

One hub tensor at a time is read, laid out and written at its index of the stacked leaf, so memory
does not grow with the model. What is written is noted; an interrupted conversion goes on there.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from kimijax.config_tree import to_dict
from kimijax.convert.header import DTYPES as FILE_DTYPES
from kimijax.convert.names import Rule
from kimijax.convert.source import DTYPES, KEPT_FLOAT32, Source, leaf_dtype
from kimijax.convert.store import HUB, NOTES, PARAMS, Leaf, Store
from kimijax.errors import UserError
from kimijax.model import parameter_shapes

DTYPE, DONE = "dtype.txt", "converted.log"  # there until the conversion is complete
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
    total = sum(source.size(rule) for rule in source.rules())
    done = _claim(partial, source, dtype)
    store = Store(partial / PARAMS, plan(source, dtype))
    with (partial / DONE).open("a") as log:
        names, size = [], 0
        for rule in source.rules():
            if rule.name not in done:
                for index, name, array in _pieces(source, rule, store.leaves):
                    store.write(name, index, _cast(array, store.leaves[name].dtype))
                names.append(rule.name)
            read = source.size(rule)
            size += read
            on_bytes(read, total)
            if size > NOTE_EVERY:
                _note(store, log, names)
                names, size = [], 0
        _note(store, log, names)
    store.finish()
    for name in BESIDE:
        if (source.directory / name).is_file():
            shutil.copyfile(source.directory / name, partial / name)
    for name in (DONE, DTYPE):
        (partial / name).unlink()
    partial.rename(out)


def plan(source: Source, dtype: np.dtype | None) -> dict[str, Leaf]:
    """Every leaf: chunks of one hub tensor (or some rows of a large one), order as they lie."""
    shapes = parameter_shapes(source.cfg)
    leaves: dict[str, Leaf] = {}
    for rule in source.rules():
        found = stored_dtype(source, rule, dtype)
        for part in rule.parts:
            shape, lead = shapes[part.leaf].shape, len(part.index)
            kind = found if dtype is None else leaf_dtype(part.leaf, shapes[part.leaf].dtype, found)
            if part.leaf in leaves:
                if leaves[part.leaf].dtype.itemsize < kind.itemsize:  # layers differ: the widest
                    leaves[part.leaf] = replace(leaves[part.leaf], dtype=kind)
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


def _cast(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    return array if array.dtype == dtype else array.astype(dtype, order="K")


def _claim(partial: Path, source: Source, dtype: np.dtype) -> set[str]:
    """Make `partial`, or find what is done in it."""
    config = json.dumps(to_dict(source.cfg), indent=1)
    notes = json.dumps({"weight_shape": source.weight_shape_dtype()})
    files = {
        "config.json": config, HUB: json.dumps(source.hub, indent=1), NOTES: notes,
        DTYPE: str(dtype),
    }
    if not partial.exists():
        partial.mkdir(parents=True)
        for name, text in files.items():
            (partial / name).write_text(text)
    if any(not (partial / n).is_file() or (partial / n).read_text() != text
           for n, text in files.items()):
        raise UserError(f"{partial}: holds another conversion; remove it or name another directory")
    log = partial / DONE
    return set(log.read_text().splitlines()) if log.exists() else set()


def _note(store: Store, log, names: list[str]) -> None:
    """Write down that tensors are on the disk, once they are."""
    store.flush()
    log.writelines(f"{name}\n" for name in names)
    log.flush()
