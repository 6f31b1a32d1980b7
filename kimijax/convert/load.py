"""A checkpoint directory of any kind as (config, params) in memory."""

from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from kimijax.checkpoint import load_model
from kimijax.config import ModelConfig, MoEConfig
from kimijax.config_tree import from_dict
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
    """A model: its config, {"params": ...}, and the hub's config.json if it has one."""

    cfg: ModelConfig
    params: dict
    hub: dict | None


def load(directory: str | Path, dtype: str = "float32", keep: bool = False) -> Loaded:
    """Read a Hugging Face directory or one of ours.

    dtype  "float32" or "bfloat16", of the weights that are not kept quantised
    keep   experts stay quantised as they are stored; UserError if they are not
    """
    directory = Path(directory)
    if is_hub(directory):
        with open_source(directory, keep) as source:
            params = read_params(source, DTYPES[dtype])
        return Loaded(source.cfg, {"params": params}, source.hub)
    if stored(directory / PARAMS):
        return _load_store(directory, DTYPES[dtype], keep)
    if keep:
        raise UserError(f"{directory}: its weights are not quantised, there is nothing to keep")
    cfg, params = load_model(directory)
    cast = {
        name: x.astype(leaf_dtype(name, np.dtype(np.float32), DTYPES[dtype]))
        for name, x in flatten_dict(params, sep=".").items()
    }
    return Loaded(cfg, unflatten_dict(cast, sep="."), None)


def _load_store(directory: Path, dtype: np.dtype, keep: bool) -> Loaded:
    """A converted directory: its experts are as they were converted."""
    cfg = read_config(directory)
    quantised = any(isinstance(x.ffn, MoEConfig) and x.ffn.weights for x in cfg.layers)
    if keep and not quantised:
        raise UserError(f"{directory}: its weights are not quantised, there is nothing to keep")
    leaves, reader = {}, Reader(directory / PARAMS)
    for name, x in parameter_shapes(cfg).items():
        leaf = reader.read(name)
        if leaf.shape != x.shape:
            raise UserError(f"{directory}: {name} has shape {leaf.shape}, not {x.shape}")
        leaves[name] = jax.device_put(leaf.astype(leaf_dtype(name, x.dtype, dtype), copy=False))
    hub = directory / HUB
    return Loaded(
        cfg, {"params": unflatten_dict(leaves, sep=".")}, read_json(hub) if hub.exists() else None
    )


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


def read_params(source: Source, dtype: np.dtype) -> dict:
    """Every parameter in memory, nested; a stacked leaf is filled index by index."""
    leaves = {
        name: np.empty(x.shape, leaf_dtype(name, x.dtype, dtype))
        for name, x in parameter_shapes(source.cfg).items()
    }
    for rule in source.rules():
        for part, array in zip(rule.parts, rule.split(source.read(rule)), strict=True):
            if not np.isfinite(array).all():
                raise UserError(f"{source.directory}: {rule.name} is not finite everywhere")
            leaves[part.leaf][part.index] = array
    return unflatten_dict({n: jax.device_put(x) for n, x in leaves.items()}, sep=".")
