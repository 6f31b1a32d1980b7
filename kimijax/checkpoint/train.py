"""The state of a training run, restored on any mesh by any number of processes.

    step_00000123/arrays/             by orbax, every process its own shards
                  leaves.json         names, dtypes and shapes of all arrays
                  beside_00000.json   what the loop keeps beside the state, a file per process
                  manifest.json       size and digest of every file, written last

Saver writes it while training goes on; it is built under step_00000123.tmp and then renamed. In a
bucket it is built where it stays, and is none before its manifest is there.
"""

import json
import os
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kimijax.checkpoint.common import brief, describe, difference
from kimijax.checkpoint.manifest import MANIFEST, damage
from kimijax.checkpoint.places import absolute, in_bucket
from kimijax.errors import UserError
from kimijax.parallel.processes import anywhere

LEAVES, ARRAYS, BESIDE = "leaves.json", "arrays", "beside"
STEP = re.compile(r"step_(\d{8,})(\.old)?")  # .old: on its way out, its successor not yet in place


class Restored(NamedTuple):
    """What a checkpoint held."""

    step: int
    state: Any
    beside: Any  # JSON value that this process saved beside the state


def restore_latest(
    directory: str | os.PathLike, abstract_state: object, verify: bool = True
) -> Restored | None:
    """The newest checkpoint that is whole; None if there is none at all. All processes call it.

    abstract_state  the state or its description: ShapeDtypeStructs (with the sharding wanted),
                    arrays, numbers. Damaged checkpoints are named on stderr; UserError if no
                    checkpoint is whole or the state in it is another one.
    verify          False: huge files are not read twice, only names and sizes are compared
    """
    directory = absolute(directory)
    damaged = []
    for step, path in checkpoints(directory):
        reason = damage(path, verify)
        if not anywhere([reason is not None])[0]:
            return Restored(step, _read_state(path, abstract_state), _read_beside(path))
        reason = reason or "is damaged, as another process says,"
        damaged.append(f"{path.name} {reason}")
        print(f"warning: {path}: {reason} and is not used", file=sys.stderr)
    if damaged:
        raise UserError(
            f"{directory}: no checkpoint is whole: {'; '.join(damaged)}; remove them to start anew"
        )
    return None


def checkpoints(directory: Path) -> list[tuple[int, Path]]:
    """(step, path), newest first; in a bucket only finished ones."""
    if not directory.exists():
        return []
    if not directory.is_dir():
        raise UserError(f"{directory}: is not a directory; name one for checkpoints")
    found = [(STEP.fullmatch(path.name), path) for path in directory.iterdir() if path.is_dir()]
    found = [(int(match[1]), match[2] is None, path) for match, path in found if match]
    found = [(step, path) for step, _, path in sorted(found, reverse=True)]
    return [x for x in found if _finished(x[1])] if in_bucket(directory) else found


def unfinished(directory: Path) -> list[Path]:
    """What a save left that came to no end, whether it goes on or not."""
    if not in_bucket(directory):
        return [*directory.glob("step_*.tmp")]
    found = [path for path in directory.iterdir() if STEP.fullmatch(path.name)]
    return [path for path in found if not _finished(path)]


def _finished(path: Path) -> bool:
    return (path / MANIFEST).exists()


def orbax() -> ModuleType:
    """orbax.checkpoint, imported late: 0.4 s and 28 MiB that inference does without."""
    import orbax.checkpoint

    return orbax.checkpoint


def leaves_of(tree: object) -> dict[str, object]:
    """The leaves of a state by name, as checkpoints list them."""
    paths = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): leaf for path, leaf in paths}


def _read_state(path: Path, abstract_state: object) -> object:
    wanted = leaves_of(abstract_state)
    if wrong := difference(_json(path / LEAVES), describe(wanted)):
        raise UserError(
            f"{path}: was made with another configuration: it {wrong}; name another directory or "
            f"remove this one"
        )
    targets = {name: _target(leaf) for name, leaf in wanted.items() if np.size(leaf)}
    ocp = orbax()
    try:
        with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
            stored = checkpointer.restore(path / ARRAYS, args=ocp.args.StandardRestore(targets))
    except (OSError, ValueError) as error:  # tensorstore's own are ValueErrors
        raise UserError(f"{path}: cannot be read: {brief(error)}; remove it") from error
    leaves = [_like(leaf, stored.get(name)) for name, leaf in wanted.items()]
    return jax.tree.unflatten(jax.tree.structure(abstract_state), leaves)


def _read_beside(path: Path) -> Any:
    """Each process its own; of another number of processes only what was the same in all."""
    saved = [_json(file) for file in sorted(path.glob(f"{BESIDE}_*.json"))]
    if len(saved) == jax.process_count():
        return saved[jax.process_index()]
    if not saved or any(other != saved[0] for other in saved):
        raise UserError(
            f"{path}: {len(saved)} processes saved it, each at its own place in the data, which "
            f"{jax.process_count()} cannot take over; start {len(saved)}"
        )
    return saved[0]


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON: {brief(error)}") from error


def _target(leaf: object) -> jax.ShapeDtypeStruct | np.ndarray:
    """What orbax is to make of a leaf. It would otherwise ask for the devices of the writer."""
    if not isinstance(leaf, jax.Array | jax.ShapeDtypeStruct):
        return np.asarray(leaf)
    sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _like(leaf: object, value: object) -> object:
    if isinstance(leaf, bool | int | float):
        return type(leaf)(value)
    if value is None:
        return (np if isinstance(leaf, np.ndarray) else jnp).zeros(leaf.shape, leaf.dtype)
    return value
