"""The conversions: hub to store, store to hub, hub to hub (expanded or in another dtype)."""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np
from flax.traverse_util import flatten_dict

from kimijax.config import ModelConfig
from kimijax.config_tree import expanded
from kimijax.convert.export_config import to_hub
from kimijax.convert.header import DTYPES as FILE_DTYPES
from kimijax.convert.header import reading
from kimijax.convert.load import CONFIG, is_hub, open_store
from kimijax.convert.names import Rule, rules
from kimijax.convert.source import DTYPES, SHAPES, Source, open_source, prefix, read_json
from kimijax.convert.store import NOTES, PARAMS, stored
from kimijax.convert.to_store import (
    BESIDE,
    beside,
    cast,
    convert_to_store,
    row_slices,
    stored_dtype,
)
from kimijax.convert.unfinished import remove_unfinished
from kimijax.convert.write import ShardWriter
from kimijax.errors import UserError

Progress = Callable[[int, int], None]  # (bytes just done, bytes in all)
NAMES = {dtype: name for name, dtype in FILE_DTYPES.items()}
BF16 = np.dtype(ml_dtypes.bfloat16)


class Report(NamedTuple):
    """What of a source is not in its conversion as it was."""

    skipped: int = 0  # tensors that no text model needs
    expanded: tuple[str, ...] = ()  # those that could not be kept quantised


def convert(
    source: Path, out: Path, to: str, dtype: str | None, keep: bool, on_bytes: Progress
) -> Report:
    """Convert a directory.

    to     "orbax" or "hf"
    dtype  of floats, "float32" or "bfloat16"; None: as stored, bfloat16 where it was quantised
    keep   modules stay quantised as they are stored
    """
    if out.name in ("", ".."):
        raise UserError(f"{out}: must end in the name of a new directory")
    left = to == "hf" and remove_unfinished(out, (CONFIG, *BESIDE))
    if not left and os.path.lexists(out):  # a link to nothing exists, too
        raise UserError(f"{out}: exists; name another directory or remove it")
    wanted = None if dtype is None else DTYPES[dtype]
    if is_hub(source):
        with open_source(source, keep) as opened:
            if to == "orbax":
                convert_to_store(opened, out, wanted, on_bytes)
            else:
                _hub_to_hub(opened, out, wanted, on_bytes)
            return Report(opened.skipped, tuple(opened.expanded()) if keep else ())
    if not stored(source / PARAMS):
        raise UserError(
            f"{source}: is no Hugging Face directory and no conversion of one; other models of "
            "ours have no hub form"
        )
    if to == "orbax":
        raise UserError(f"{source}: is an orbax checkpoint already")
    _store_to_hub(source, out, wanted, on_bytes)
    return Report()


def export(
    cfg: ModelConfig, params: dict, out: Path, dtype: str | None = None, hub: dict | None = None
) -> None:
    """Write parameters in memory as a Hugging Face checkpoint that transformers loads.

    params  {"params": ...} as `Model.apply` takes them
    dtype   "float32" or "bfloat16"; None: as they are
    hub     the config.json to write; None: made from `cfg`, UserError if the hub has no such model
    """
    leaves = flatten_dict(params["params"], sep=".")

    def held(rule: Rule) -> np.dtype:
        return np.dtype(leaves[rule.parts[0].leaf].dtype)

    def arrays(rule: Rule, rows: slice | None) -> np.ndarray:
        array = rule.join(*(np.asarray(leaves[p.leaf][p.index]) for p in rule.parts))
        return array if rows is None else array[rows]

    wanted = None if dtype is None else DTYPES[dtype]
    kinds = {rule.name: _file_dtype(rule, held(rule), wanted) for rule in rules(cfg)}
    _write(cfg, to_hub(cfg) if hub is None else hub, out, kinds, arrays, lambda *_: None, "I64",
           new=False)


def _hub_to_hub(source: Source, out: Path, dtype: np.dtype | None, on_bytes: Progress) -> None:
    kinds = {r.name: stored_dtype(source, r, dtype) for r in source.rules()}

    def arrays(rule: Rule, rows: slice | None) -> np.ndarray:
        if rows is None or source.forms[rule.name] != "as is":
            return source.read(rule)[... if rows is None else rows]
        return source.read_rows(rule, rows.start, rows.stop)

    shape = source.weight_shape_dtype()
    _write(source.cfg, source.hub, out, kinds, arrays, on_bytes, shape, beside(source.directory))


def _store_to_hub(source: Path, out: Path, dtype: np.dtype | None, on_bytes: Progress) -> None:
    cfg, hub, reader = open_store(source)
    hub = to_hub(cfg) if hub is None else hub
    shape = read_json(source / NOTES).get("weight_shape")
    if shape not in SHAPES:
        raise UserError(
            f"{source / NOTES}: weight_shape must be {' or '.join(SHAPES)}, got {shape!r:.80}; "
            "convert it again"
        )
    kinds = {
        rule.name: _file_dtype(rule, reader.dtype(rule.parts[0].leaf), dtype)
        for rule in rules(cfg)
    }

    def arrays(rule: Rule, rows: slice | None) -> np.ndarray:
        if rows is None:
            return rule.join(*(reader.read(part.leaf, part.index) for part in rule.parts))
        part = reader.read(rule.parts[0].leaf, (*[slice(None)] * rule.rows, rows))
        return part if rule.rows == 0 else part.T

    _write(cfg, hub, out, kinds, arrays, on_bytes, shape, beside(source))


def _file_dtype(rule: Rule, held: np.dtype, dtype: np.dtype | None) -> np.dtype:
    """The dtype in a hub file of what we hold in another, of floats `dtype` if one is given."""
    if rule.dtypes:
        return FILE_DTYPES[rule.dtypes[0]]
    if dtype is None:
        return held
    exact = rule.name.endswith((".e_score_correction_bias", ".A_log", ".dt_bias"))
    return np.dtype(np.float32) if exact else dtype


def _write(
    cfg: ModelConfig, hub: dict, out: Path, kinds: dict[str, np.dtype],
    arrays: Callable[[Rule, slice | None], np.ndarray], on_bytes: Progress, shape_dtype: str,
    files: Sequence[tuple[str, Path]] = (), new: bool = True,
) -> None:
    """Shards, index and config.json of a hub checkpoint; `files` go along."""
    start = prefix(hub)
    plan = {start + r.name: (NAMES[kinds[r.name]], r.shape) for r in rules(cfg)}
    shapes = dict(_weight_shapes(cfg, start))
    plan |= dict.fromkeys(shapes, (shape_dtype, (2,)))
    total = sum(int(np.prod(shape)) * FILE_DTYPES[kind].itemsize for kind, shape in plan.values())
    with ShardWriter(out, plan, new=new) as writer:
        writer.add(CONFIG, json.dumps(_config(cfg, hub, kinds), indent=1).encode())
        for name, path in files:
            with reading(path):
                content = path.read_bytes()
            writer.add(name, content)
        for rule in rules(cfg):
            for rows in row_slices(rule, kinds[rule.name]):
                array = cast(arrays(rule, rows), kinds[rule.name], f"{out}: {rule.name}")
                if rows is None:
                    writer.put(start + rule.name, array)
                else:
                    writer.put_rows(start + rule.name, rows.start, array)
                on_bytes(array.nbytes, total)
        for name, shape in shapes.items():
            writer.put(name, np.array(shape, FILE_DTYPES[shape_dtype]))


def _weight_shapes(cfg: ModelConfig, start: str) -> Iterator[tuple[str, tuple[int, int]]]:
    """The tensors beside packed int4 weights that say their shape."""
    for rule in rules(cfg):
        if rule.name.endswith("_packed"):
            name = start + rule.name.removesuffix("_packed")
            yield f"{name}_shape", (rule.shape[0], rule.shape[1] * 8)


def _config(cfg: ModelConfig, hub: dict, kinds: dict[str, np.dtype]) -> dict:
    """The source's config.json, true of what is written: dtype, and quantisation if kept."""
    kept = cfg != expanded(cfg)
    dtype = "bfloat16" if kinds["model.embed_tokens.weight"] == BF16 else "float32"
    names = _floats(cfg, prefix(hub))
    data = dict(hub)
    for part in ("", "text_config"):
        held = data if not part else data.get(part)
        if not isinstance(held, dict):
            continue
        held = dict(held)
        quant = held.pop("quantization_config", None)
        if kept and isinstance(quant, dict):
            held["quantization_config"] = _quantization(quant, names)
        held |= {key: dtype for key in ("dtype", "torch_dtype") if key in held}
        data = held if not part else data | {part: held}
    if not {"dtype", "torch_dtype"} & data.keys():
        data["torch_dtype"] = dtype
    return data


def _quantization(quant: dict, floats: list[str]) -> dict:
    """A quantization_config under which a reader takes these modules as floats."""
    fp8 = quant.get("quant_method") == "fp8"
    if fp8 and all(name.endswith("lm_head") for name in floats):
        return quant  # as released: unless a list names others, readers leave the head alone
    key = "modules_to_not_convert" if fp8 else "ignore"
    return quant | {key: _with(quant.get(key), floats)}


def _floats(cfg: ModelConfig, start: str) -> list[str]:
    """The modules with a matrix that are written as floats when others stay quantised."""
    other = ("embed_tokens.weight", ".gate.weight")  # not of class Linear
    return [
        start + rule.name.removesuffix(".weight") for rule in rules(cfg)
        if len(rule.shape) == 2 and rule.name.endswith(".weight") and not rule.dtypes
        and not rule.name.endswith(other)
    ]


def _with(names: object, more: list[str]) -> list:
    """A list of a foreign config with these names in it."""
    names = list(names) if isinstance(names, list) else []
    return [*names, *(name for name in more if name not in names)]
