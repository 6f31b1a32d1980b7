"""A checkpoint directory of any kind as (config, params) in memory."""

import functools
import os
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from kimijax.checkpoint import load_model
from kimijax.config import ModelConfig
from kimijax.config_tree import expanded, from_dict, override
from kimijax.convert.shards import Shardings, Shards
from kimijax.convert.source import (
    DTYPES,
    Source,
    leaf_dtype,
    open_source,
    read_hub_config,
    read_json,
)
from kimijax.convert.store import HUB, PARAMS, Reader, stored
from kimijax.errors import UserError
from kimijax.model import parameter_shapes

CONFIG = "config.json"


@dataclass(frozen=True)
class Loaded:
    """A model: its config, {"params": ...}, and the hub's config.json if it has one.

    `expanded` names the tensors that could not be kept quantised, if that was asked for.
    """

    cfg: ModelConfig
    params: dict
    hub: dict | None
    expanded: tuple[str, ...] = ()


def load(
    directory: str | Path, dtype: str = "float32", keep: bool = False,
    shardings: Shardings | None = None,
) -> Loaded:
    """Read a Hugging Face directory or one of ours.

    dtype      "float32" or "bfloat16", of the weights that are not kept quantised
    keep       modules stay quantised as they are stored; UserError if none is, whole
    shardings  config -> {name joined by ".": Sharding} of every parameter. Each device is given
               its shards and nothing else; the host holds one tensor of the hub, or a piece of
               an array of ours, at a time. UserError: a shape cannot be divided so. None: all
               of it is on the default device
    """
    directory = Path(directory)
    if is_hub(directory):
        with open_source(directory, keep) as source:
            params = read_params(source, DTYPES[dtype], shardings)
        not_kept = tuple(source.expanded()) if keep else ()
        return Loaded(source.cfg, {"params": params}, source.hub, not_kept)
    if stored(directory / PARAMS):
        return _load_store(directory, DTYPES[dtype], keep, shardings)
    if keep:
        raise UserError(f"{directory}: its weights are not quantised, there is nothing to keep")
    cfg, params = load_model(directory)
    leaves = _empty(cfg, DTYPES[dtype], shardings)
    for name, x in flatten_dict(params["params"], sep=".").items():
        leaves[name].put((), np.asarray(x))
    return Loaded(cfg, {"params": _assembled(leaves)}, None)


def _load_store(
    directory: Path, dtype: np.dtype, keep: bool, shardings: Shardings | None
) -> Loaded:
    """A converted directory: its weights are held as they were converted."""
    cfg, hub, reader = open_store(directory)
    if keep and cfg == expanded(cfg):
        raise UserError(f"{directory}: its weights are not quantised, there is nothing to keep")
    leaves = _empty(cfg, dtype, shardings)
    for name, leaf in leaves.items():
        leaf.fill(functools.partial(reader.read, name), reader.chunk(name))
    return Loaded(cfg, {"params": _assembled(leaves)}, hub)


def open_store(directory: Path) -> tuple[ModelConfig, dict | None, Reader]:
    """The config of a converted directory, the hub's config.json if it is there, and the arrays.

    UserError: the three are not of one model. No number is read.
    """
    cfg, path, hub = read_config(directory), directory / HUB, None
    if os.path.lexists(path):
        hub, described = read_hub_config(path)
        if described != _plain(cfg):
            raise UserError(
                f"{directory}: {CONFIG} and {HUB} describe different models; convert it again"
            )
    reader = Reader(directory / PARAMS)
    try:
        wanted = parameter_shapes(cfg)
    except UserError as error:
        raise UserError(f"{directory / CONFIG}: {error}") from error
    for name, x in wanted.items():
        shape, dtype = reader.shape(name), reader.dtype(name)
        # Floats that are not of a quantised form are stored in either dtype.
        exact = x.dtype != np.float32 or name.endswith("_scale")
        kinds = {np.dtype(x.dtype)} if exact else set(DTYPES.values())
        if shape != x.shape or dtype not in kinds:
            raise UserError(
                f"{directory / PARAMS}: {name} is {dtype} {shape}, but {CONFIG} makes it "
                f"{' or '.join(sorted(map(str, kinds)))} {x.shape}; convert it again"
            )
    return cfg, hub, reader


def _plain(cfg: ModelConfig) -> ModelConfig:
    """`cfg` without what a hub config does not say: weights as stored, how embeddings begin."""
    return override(expanded(cfg), {"embed_std": ModelConfig.embed_std})


def read_config(directory: Path) -> ModelConfig:
    """The configuration of a checkpoint directory; no weight is read."""
    if is_hub(directory):
        return read_hub_config(directory / CONFIG)[1]
    try:
        return from_dict(read_json(directory / CONFIG))
    except (UserError, TypeError) as error:
        raise UserError(f"{directory / CONFIG}: {error}") from error


def is_hub(directory: Path) -> bool:
    """Whether a model directory is of Hugging Face; UserError: it is none at all."""
    if not directory.is_dir():
        state = "is not a directory" if directory.exists() else "does not exist"
        raise UserError(f"{directory}: {state}; name a directory with {CONFIG} and weights")
    if not (directory / CONFIG).is_file():
        raise UserError(f"{directory}: lacks {CONFIG}; name a directory with it and weights")
    return "model_type" in read_json(directory / CONFIG)


def read_params(source: Source, dtype: np.dtype, shardings: Shardings | None = None) -> dict:
    """Every parameter, nested; a tensor of the hub that no device here holds is not read."""
    leaves, written = _empty(source.cfg, dtype, shardings), []
    for rule in source.rules():
        if any(leaves[part.leaf].holds(part.index) for part in rule.parts):
            arrays = rule.split(source.read(rule))
            # Read before the wait: the next tensor comes while the last one is on its way.
            jax.block_until_ready(written)
            written = [
                leaves[part.leaf].put(part.index, array)
                for part, array in zip(rule.parts, arrays, strict=True)
            ]
    return _assembled(leaves)


def _empty(
    cfg: ModelConfig, dtype: np.dtype, shardings: Shardings | None
) -> dict[str, Shards]:
    """Every parameter by its name joined by ".", to be filled; UserError: one cannot be divided."""
    shapes = parameter_shapes(cfg)
    layout = None if shardings is None else shardings(cfg)
    if layout is not None and (missing := sorted(shapes.keys() - layout.keys())):
        raise UserError(f"there is no sharding for {missing[0]} ({len(missing)} such parameters)")
    return {
        name: Shards(name, x.shape, leaf_dtype(name, x.dtype, dtype), layout and layout[name])
        for name, x in shapes.items()
    }


def _assembled(leaves: dict[str, Shards]) -> dict:
    """The parameters, nested, once they are filled."""
    return unflatten_dict({name: leaf.array() for name, leaf in leaves.items()}, sep=".")
