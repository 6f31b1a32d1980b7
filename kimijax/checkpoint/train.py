"""The state of a training run: a directory per step, arrays by orbax, a manifest over all files.

Orbax does not checksum arrays (flipped bits restore in silence), so a manifest with the size and
digest of every file is written last and checked first.
"""

import hashlib
import json
import os
import re
import shutil
import sys
from pathlib import Path
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np

from kimijax.checkpoint.common import brief, describe, difference, sync
from kimijax.errors import UserError
from kimijax.parallel.processes import is_first, meet, on_first

MANIFEST, LEAVES, ARRAYS = "manifest.json", "leaves.json", "arrays"
STEP = re.compile(r"step_(\d{8,})(\.old)?")  # .old: on its way out, its successor not yet in place


def save_state(directory: str | os.PathLike, step: int, state: object, keep: int = 2) -> None:
    """Write a pytree of arrays and numbers to directory/step_00000123; keep the newest `keep`.

    Whatever happens while it writes, the checkpoints that were there stay whole. All processes of
    a job call it, process 0 writes: its host holds the state.
    """
    if keep < 1:
        raise ValueError(f"{keep=} must be 1 or more")
    state = on_first(state)
    if is_first():
        _replace(Path(directory).absolute(), step, state, keep)
    meet()


def _replace(directory: Path, step: int, state: object, keep: int) -> None:
    """The new checkpoint once it is whole, then without the oldest ones."""
    final = directory / f"step_{step:08d}"
    new, old = final.with_suffix(".tmp"), final.with_suffix(".old")
    try:
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)
        _write_state(new, state)
        if final.exists():
            shutil.rmtree(old, ignore_errors=True)
            final.rename(old)
        new.rename(final)
        sync([directory])
    except OSError as error:
        raise UserError(f"{final}: cannot save the state: {brief(error)}") from error
    finally:
        shutil.rmtree(new, ignore_errors=True)
    earlier = [path for at, path in _checkpoints(directory) if at < step]
    for path in [old, *earlier[keep - 1 :], *directory.glob("step_*.tmp")]:
        shutil.rmtree(path, ignore_errors=True)


def restore_latest(
    directory: str | os.PathLike, abstract_state: object
) -> tuple[int, object] | None:
    """(step, state) of the newest checkpoint that is whole; None if there is none at all.

    abstract_state  the state or its description: ShapeDtypeStructs (with the sharding wanted),
                    arrays, numbers. Damaged checkpoints are named on stderr; UserError if no
                    checkpoint is whole or the state in it is another one.
    """
    directory = Path(directory).absolute()
    damaged = []
    for step, path in _checkpoints(directory):
        if reason := _damage(path):
            damaged.append(f"{path.name} {reason}")
            print(f"warning: {path}: {reason} and is not used", file=sys.stderr)
        else:
            return step, _read_state(path, abstract_state)
    if damaged:
        raise UserError(
            f"{directory}: no checkpoint is whole: {'; '.join(damaged)}; remove them to start anew"
        )
    return None


def _checkpoints(directory: Path) -> list[tuple[int, Path]]:
    """(step, path), newest first."""
    if not directory.exists():
        return []
    if not directory.is_dir():
        raise UserError(f"{directory}: is not a directory; name one for checkpoints")
    found = [(STEP.fullmatch(path.name), path) for path in directory.iterdir() if path.is_dir()]
    found = [(int(match[1]), match[2] is None, path) for match, path in found if match]
    return [(step, path) for step, _, path in sorted(found, reverse=True)]


def _orbax() -> ModuleType:
    # Imported late: 0.4 s and 28 MiB that inference does without.
    import orbax.checkpoint

    return orbax.checkpoint


def _write_state(path: Path, state: object) -> None:
    """Leaves by name, what they are, and the manifest last, all on the disk on return."""
    leaves = _leaves(state)
    (path / LEAVES).write_text(json.dumps(describe(leaves), indent=1))
    stored = {
        name: leaf if isinstance(leaf, jax.Array) else np.asarray(leaf)
        for name, leaf in leaves.items()
        if np.size(leaf)  # orbax refuses empty arrays; the description says all of them
    }
    ocp = _orbax()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=0, active_processes={0}, barrier_sync_key_prefix="first"
    )
    handler = ocp.StandardCheckpointHandler(multiprocessing_options=alone)
    with ocp.Checkpointer(handler, multiprocessing_options=alone) as checkpointer:
        checkpointer.save(path / ARRAYS, args=ocp.args.StandardSave(stored))
    sync(path.rglob("*"))
    (path / MANIFEST).write_bytes(_manifest(path))
    sync([path / MANIFEST, path])


def _read_state(path: Path, abstract_state: object) -> object:
    wanted = _leaves(abstract_state)
    if wrong := difference(json.loads((path / LEAVES).read_text()), describe(wanted)):
        raise UserError(
            f"{path}: was made with another configuration: it {wrong}; name another directory or "
            f"remove this one"
        )
    targets = {name: _target(leaf) for name, leaf in wanted.items() if np.size(leaf)}
    ocp = _orbax()
    with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
        stored = checkpointer.restore(path / ARRAYS, args=ocp.args.StandardRestore(targets))
    leaves = [_like(leaf, stored.get(name)) for name, leaf in wanted.items()]
    return jax.tree.unflatten(jax.tree.structure(abstract_state), leaves)


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


def _leaves(tree: object) -> dict[str, object]:
    paths = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): leaf for path, leaf in paths}


def _manifest(path: Path) -> bytes:
    """Size and digest of every file, in one canonical form: equal texts are equal files."""
    files = {}
    for file in sorted(path.rglob("*")):
        name = file.relative_to(path).as_posix()
        if file.is_file() and name != MANIFEST:
            with file.open("rb") as stream:
                digest = hashlib.file_digest(stream, "blake2b").hexdigest()
            files[name] = {"size": file.stat().st_size, "blake2b": digest}
    return json.dumps(files, indent=1).encode()


def _damage(path: Path) -> str | None:
    """Why a checkpoint cannot be trusted; None: every file is as it was written."""
    try:
        if not (path / MANIFEST).is_file():
            return f"has no {MANIFEST}"
        listed, found = (path / MANIFEST).read_bytes(), _manifest(path)
        if listed == found:
            return None
        listed, found = json.loads(listed), json.loads(found)
        wrong = [name for name in listed | found if listed.get(name) != found.get(name)]
        return f"differs from its {MANIFEST} in {wrong[0]!r}"
    except OSError as error:
        return f"cannot be read: {brief(error)}"
    except (ValueError, TypeError, IndexError):  # no JSON, no dict, or no such text
        return f"has a damaged {MANIFEST}"
