"""The conversions: hub to store, store to hub, hub to hub (expanded or in another dtype)."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
from flax.traverse_util import flatten_dict

from kimijax.config import ModelConfig, MoEConfig
from kimijax.convert.export_config import to_hub
from kimijax.convert.header import DTYPES as FILE_DTYPES
from kimijax.convert.load import is_hub, read_config
from kimijax.convert.names import Rule, rules
from kimijax.convert.source import DTYPES, Source, open_source, prefix, read_json
from kimijax.convert.store import HUB, NOTES, PARAMS, Reader, stored
from kimijax.convert.to_store import BESIDE, convert_to_store, row_slices, stored_dtype
from kimijax.convert.write import ShardWriter
from kimijax.errors import UserError

Progress = Callable[[int, int], None]  # (bytes just done, bytes in all)
NAMES = {dtype: name for name, dtype in FILE_DTYPES.items()}
BF16 = np.dtype(ml_dtypes.bfloat16)


def convert(
    source: Path, out: Path, to: str, dtype: str | None, keep: bool, on_bytes: Progress
) -> int:
    """Convert a directory; returns how many tensors of the source were left out.

    to     "orbax" or "hf"
    dtype  of floats, "float32" or "bfloat16"; None: as stored, bfloat16 where it was quantised
    keep   quantised experts stay as stored
    """
    if out.exists():
        raise UserError(f"{out}: exists; name another directory or remove it")
    wanted = None if dtype is None else DTYPES[dtype]
    if is_hub(source):
        with open_source(source, keep) as opened:
            if to == "orbax":
                convert_to_store(opened, out, wanted, on_bytes)
            else:
                _hub_to_hub(opened, out, wanted, on_bytes)
            return opened.skipped
    if not stored(source / PARAMS):
        raise UserError(
            f"{source}: is no Hugging Face directory and no conversion of one; other models of "
            "ours have no hub form"
        )
    if to == "orbax":
        raise UserError(f"{source}: is an orbax checkpoint already")
    _store_to_hub(source, out, wanted, on_bytes)
    return 0


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
        own = np.dtype(leaves[rule.parts[0].leaf].dtype)
        return own if rule.dtypes or dtype is None else _as(rule, DTYPES[dtype])

    def arrays(rule: Rule, rows: slice | None) -> np.ndarray:
        array = rule.join(*(np.asarray(leaves[p.leaf][p.index]) for p in rule.parts))
        return array if rows is None else array[rows]

    kinds = {rule.name: held(rule) for rule in rules(cfg)}
    _write(cfg, to_hub(cfg) if hub is None else hub, out, kinds, arrays, lambda *_: None, "I64")


def _hub_to_hub(source: Source, out: Path, dtype: np.dtype | None, on_bytes: Progress) -> None:
    kinds = {r.name: stored_dtype(source, r, dtype) for r in source.rules()}

    def arrays(rule: Rule, rows: slice | None) -> np.ndarray:
        if rows is None or source.forms[rule.name] != "as is":
            return source.read(rule)[... if rows is None else rows]
        return source.read_rows(rule, rows.start, rows.stop)

    _write(source.cfg, source.hub, out, kinds, arrays, on_bytes, source.weight_shape_dtype())
    _copy_beside(source.directory, out)


def _store_to_hub(source: Path, out: Path, dtype: np.dtype | None, on_bytes: Progress) -> None:
    cfg = read_config(source)
    hub = read_json(source / HUB) if (source / HUB).exists() else to_hub(cfg)
    reader = Reader(source / PARAMS)
    kinds = {}
    for rule in rules(cfg):
        held = reader.dtype(rule.parts[0].leaf)
        kinds[rule.name] = held if rule.dtypes or dtype is None else _as(rule, dtype)

    def arrays(rule: Rule, rows: slice | None) -> np.ndarray:
        if rows is None:
            return rule.join(*(reader.read(part.leaf, part.index) for part in rule.parts))
        part = reader.read(rule.parts[0].leaf, (*[slice(None)] * rule.rows, rows))
        return part if rule.rows == 0 else part.T

    shape = read_json(source / NOTES).get("weight_shape")
    _write(cfg, hub, out, kinds, arrays, on_bytes, shape)
    _copy_beside(source, out)


def _as(rule: Rule, dtype: np.dtype) -> np.dtype:
    """The dtype of a float tensor when all are asked for in `dtype`."""
    exact = rule.name.endswith((".e_score_correction_bias", ".A_log", ".dt_bias"))
    return np.dtype(np.float32) if exact else dtype


def _write(cfg, hub, out: Path, kinds, arrays, on_bytes: Progress, shape_dtype: str) -> None:
    """Shards, index and config.json of a hub checkpoint."""
    start = prefix(hub)
    plan = {start + r.name: (NAMES[kinds[r.name]], r.shape) for r in rules(cfg)}
    shapes = dict(_weight_shapes(cfg, start))
    plan |= dict.fromkeys(shapes, (shape_dtype, (2,)))
    total = sum(int(np.prod(shape)) * FILE_DTYPES[kind].itemsize for kind, shape in plan.values())
    with ShardWriter(out, plan) as writer:
        for rule in rules(cfg):
            for rows in row_slices(rule, kinds[rule.name]):
                array = arrays(rule, rows).astype(kinds[rule.name], copy=False)
                if rows is None:
                    writer.put(start + rule.name, array)
                else:
                    writer.put_rows(start + rule.name, rows.start, array)
                on_bytes(array.nbytes, total)
        for name, shape in shapes.items():
            writer.put(name, np.array(shape, FILE_DTYPES[shape_dtype]))
        (out / "config.json").write_text(json.dumps(_config(cfg, hub, kinds), indent=1))


def _weight_shapes(cfg: ModelConfig, start: str) -> Iterator[tuple[str, tuple[int, int]]]:
    """The tensors beside packed int4 weights that say their shape."""
    for rule in rules(cfg):
        if rule.name.endswith("_packed"):
            name = start + rule.name.removesuffix("_packed")
            yield f"{name}_shape", (rule.shape[0], rule.shape[1] * 8)


def _config(cfg: ModelConfig, hub: dict, kinds: dict[str, np.dtype]) -> dict:
    """The source's config.json, true of what is written: dtype, and quantisation if kept."""
    kept = any(isinstance(x.ffn, MoEConfig) and x.ffn.weights for x in cfg.layers)
    dtype = "bfloat16" if kinds["model.embed_tokens.weight"] == BF16 else "float32"
    data = dict(hub)
    for part in (data, data.get("text_config")):
        if not isinstance(part, dict):
            continue
        if not kept:
            part.pop("quantization_config", None)
        for key in ("dtype", "torch_dtype"):
            if key in part:
                part[key] = dtype
    if not {"dtype", "torch_dtype"} & data.keys():
        data["torch_dtype"] = dtype
    return data


def _copy_beside(source: Path, out: Path) -> None:
    """Tokenizer and generation settings go along."""
    for name in BESIDE:
        if (source / name).is_file():
            shutil.copyfile(source / name, out / name)
