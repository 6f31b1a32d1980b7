"""A model on disk: config.json and model.safetensors, read as if a stranger had made them."""

import contextlib
import json
import os
from collections.abc import Iterable
from pathlib import Path

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from kimijax.checkpoint.common import brief, describe, difference, sync
from kimijax.checkpoint.places import in_bucket, local, locate
from kimijax.config import ModelConfig
from kimijax.config_tree import from_dict, to_dict
from kimijax.errors import UserError
from kimijax.model import parameter_shapes

CONFIG, WEIGHTS = "config.json", "model.safetensors"
READ_AS = {"F32": "float32", "BF16": "float32"}


def save_model(directory: str | os.PathLike, cfg: ModelConfig, params: dict) -> None:
    """Write config.json and model.safetensors (float32, names joined by "."), each at once.

    directory  also gs://BUCKET/..., where config.json comes first and the weights at once
    params  nested dict of arrays, without the outer "params"
    """
    directory = locate(directory)
    if in_bucket(directory):
        with local(directory) as folder:
            return save_model(folder, cfg, params)
    flat = flatten_dict(params, sep=".")
    if wrong := difference(describe(flat), describe(parameter_shapes(cfg))):
        raise ValueError(f"these are not the parameters of this config: the tree {wrong}")
    # The library writes memory as it lies, so strided arrays have to be laid out first.
    tensors = {name: np.array(x, np.float32, order="C") for name, x in flat.items()}
    for name, tensor in tensors.items():
        _check_finite(directory, name, tensor)  # before it replaces a good one
    config = json.dumps(to_dict(cfg), indent=1, sort_keys=True, allow_nan=False)
    names = (WEIGHTS, CONFIG)
    temporary = [directory / f"{name}.tmp" for name in names]
    try:
        directory.mkdir(parents=True, exist_ok=True)
        # Two files cannot be replaced as one. The weights carry their config, so that a stop
        # between the renames shows when they are loaded.
        save_file(tensors, temporary[0], metadata={"config": config})
        temporary[1].write_text(config + "\n", encoding="utf-8")
        # The library makes files that only their owner may read.
        temporary[0].chmod(temporary[1].stat().st_mode)
        sync(temporary)
        for source, name in zip(temporary, names, strict=True):
            source.replace(directory / name)
        sync([directory])
    except (OSError, SafetensorError) as error:
        raise UserError(f"{directory}: cannot save the model: {brief(error)}") from error
    finally:
        for path in temporary:
            with contextlib.suppress(OSError):  # renamed, or never written
                path.unlink()


def load_model(directory: str | os.PathLike) -> tuple[ModelConfig, dict]:
    """The config and {"params": ...} as `Model.apply` takes them; UserError names file and fault.

    Weights are float32, or bfloat16 and then cast.
    """
    directory = Path(directory)
    if not directory.is_dir():
        state = "is not a directory" if directory.exists() else "does not exist"
        raise UserError(f"{directory}: {state}; name one with {CONFIG} and {WEIGHTS}")
    if missing := [name for name in (CONFIG, WEIGHTS) if not (directory / name).is_file()]:
        raise UserError(f"{directory}: lacks {' and '.join(missing)}; a model has both files")
    data, cfg = _read_config(directory / CONFIG)
    return cfg, {"params": unflatten_dict(_read_weights(directory / WEIGHTS, cfg, data), sep=".")}


def _read_config(path: Path) -> tuple[dict, ModelConfig]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        json.dumps(data, allow_nan=False)  # the parser takes NaN and 1e999, no model does
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as JSON: {brief(error)}") from error
    if not isinstance(data, dict):
        raise UserError(f"{path}: must be a JSON object, not a {type(data).__name__}")
    try:
        return data, from_dict(data)
    except (UserError, TypeError) as error:  # TypeError: a list where a name belongs
        raise UserError(f"{path}: {brief(error)}") from error


def _read_weights(path: Path, cfg: ModelConfig, config: dict) -> dict[str, jax.Array]:
    """The tensors by name, once everything about them has been checked."""
    tensors = {}
    try:
        with safe_open(path, framework="np") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            shapes = {name: tuple(x.get_shape()) for name, x in slices.items()}
            kinds = {name: READ_AS.get(x.get_dtype(), x.get_dtype()) for name, x in slices.items()}
            found = {name: f"{kinds[name]} {shape}" for name, shape in shapes.items()}
            wanted = describe(_build(path.with_name(CONFIG), cfg, shapes.values()))
            if wrong := difference(found, wanted):
                raise UserError(f"{path}: does not fit the {CONFIG} beside it: it {wrong}")
            _check_pair(path, file.metadata(), config)
            for name in wanted:
                tensor = file.get_tensor(name).astype(np.float32)  # a copy: the file may go
                _check_finite(path, name, tensor)
                # Not jnp.asarray, which compiles a program for every shape.
                tensors[name] = jax.device_put(tensor)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{path}: is truncated or no safetensors file: {brief(error)}; fetch it again"
        ) from error
    return tensors


def _build(
    path: Path, cfg: ModelConfig, shapes: Iterable[tuple[int, ...]]
) -> dict[str, jax.ShapeDtypeStruct]:
    try:
        _refuse_vast(cfg, shapes)
        return parameter_shapes(cfg)
    except Exception as error:  # whatever tracing stumbles over, the config asked for it
        raise UserError(f"{path}: no model can be built from it: {brief(error)}") from error


def _refuse_vast(cfg: ModelConfig, shapes: Iterable[tuple[int, ...]]) -> None:
    """Repeats and taps are dims of weights, and the time to trace a model grows with them."""
    largest = max((size for shape in shapes for size in shape if 0 not in shape), default=0)
    for group in cfg.groups:
        counts = [("repeat", group.repeat)]
        for layer in group.layers:
            counts += [("conv", layer.conv), ("taps", getattr(layer.mixer, "taps", 0))]
        for name, count in counts:
            if count > largest:
                raise UserError(f"{name} {count}, but the weights have no dim above {largest}")


def _check_finite(path: Path, name: str, tensor: np.ndarray) -> None:
    if bad := tensor.size - np.isfinite(tensor).sum():
        raise UserError(f"{path}: {name} holds {bad} of {tensor.size} numbers that are not finite")


def _check_pair(path: Path, metadata: dict[str, str] | None, config: dict) -> None:
    """Weights that carry a config must carry the one beside them."""
    try:
        same = "config" not in (metadata or {}) or json.loads(metadata["config"]) == config
    except (ValueError, RecursionError):
        same = False
    if not same:
        raise UserError(
            f"{path.with_name(CONFIG)}: is not the config that {path.name} was saved with (its "
            f'header holds that, under "config"): put it back, or save the model anew'
        )
