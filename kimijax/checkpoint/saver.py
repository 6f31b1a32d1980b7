"""Saving a training state while training goes on.

`save` holds the loop up until the arrays are on the host (their memory may then be taken by the
next step); files, digests and the rename into place are made in the background, one checkpoint at
a time. Of several processes each writes its own shards and digests a share of the files; process 0
finishes. Whatever happens while one is written, the checkpoints that were there stay whole; but in
a bucket, where nothing is renamed, one of the same step goes before it is written anew.
"""

import functools
import json
import logging
import os
import re
import sys
import threading
from pathlib import Path
from typing import Any

import jax
import numpy as np

from kimijax.checkpoint.common import brief, describe, sync
from kimijax.checkpoint.manifest import MANIFEST, write_manifest, write_part
from kimijax.checkpoint.places import absolute, in_bucket, remove
from kimijax.checkpoint.train import (
    ARRAYS,
    BESIDE,
    LEAVES,
    checkpoints,
    leaves_of,
    orbax,
    unfinished,
)
from kimijax.errors import UserError
from kimijax.parallel.processes import is_first, meet

PATIENCE_MS = 1_200_000  # for the slowest process to write its part, as long as orbax waits


def save_state(
    directory: str | os.PathLike, step: int, state: object, keep: int = 2, beside: Any = None
) -> None:
    """One checkpoint, whole on return; see Saver. All processes of a job call it."""
    with Saver(directory, keep) as saver:
        saver.save(step, state, beside)


class Saver:
    """Writes checkpoints of one run in the background, at most one at a time.

    keep        how many of the newest stay
    keep_every  checkpoints at multiples of so many steps stay for ever; 0: none does
    Every method is called by all processes of the job. UserError: a checkpoint was not written.
    """

    def __init__(self, directory: str | os.PathLike, keep: int = 2, keep_every: int = 0):
        if keep < 1 or keep_every < 0:
            raise ValueError(f"{keep=} must be 1 or more, {keep_every=} 0 or more")
        self.directory, self.keep, self.keep_every = absolute(directory), keep, keep_every
        self._orbax = self._writing = self._failed = None
        self._count = 0  # of saves: the names of barriers

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind, *_) -> None:
        """The save in flight is finished in any case; its fault does not hide another."""
        try:
            if kind is None:
                self.wait()
            elif self._writing is not None:
                self._writing.join()  # without meeting the others: they may be elsewhere
        finally:
            if self._orbax is not None:
                self._orbax.close()

    def save(self, step: int, state: object, beside: Any = None) -> None:
        """Begin to write a pytree of arrays and numbers to directory/step_00000123.

        Waits for the save before. beside: a JSON value of this process, kept with the state.
        """
        self._join()
        built = "" if in_bucket(self.directory) else ".tmp"
        new = self.directory / f"step_{step:08d}{built}"
        try:
            self._begin(new, state, beside)
        except (OSError, ValueError) as error:
            self._give_up(new)
            raise _fault(new, error) from error
        self._count += 1
        self._writing = threading.Thread(target=self._finish, args=(new, step), daemon=True)
        self._writing.start()

    def check(self) -> None:
        """Raise what went wrong in the background so far. Does not wait, nor meet the others."""
        if self._failed is not None:
            failed, self._failed = self._failed, None
            raise failed

    def wait(self) -> None:
        """Return when the checkpoint last begun is whole, for all processes."""
        waits = self._writing is not None
        self._join()
        if waits:
            meet()

    def _join(self) -> None:
        if self._writing is not None:
            self._writing.join()
            self._writing = None
        self.check()

    def _begin(self, new: Path, state: object, beside: Any) -> None:
        leaves = leaves_of(state)
        if is_first():
            remove(new, MANIFEST)
            if not in_bucket(new):
                new.mkdir(parents=True)
            (new / LEAVES).write_text(json.dumps(describe(leaves), indent=1))
        meet()  # the others write when the directory is there
        (new / f"{BESIDE}_{jax.process_index():05d}.json").write_text(json.dumps(beside))
        stored = {
            name: _apart(leaf)
            for name, leaf in leaves.items()
            if np.size(leaf)  # orbax refuses empty arrays; the description says all of them
        }
        ocp = orbax()
        if self._orbax is None:
            _quiet_orbax()
            self._orbax = ocp.AsyncCheckpointer(ocp.StandardCheckpointHandler())
        self._orbax.save(new / ARRAYS, args=ocp.args.StandardSave(stored))

    def _finish(self, new: Path, step: int) -> None:
        """In the background: what `_begin` began becomes a checkpoint, the oldest ones go."""
        try:
            self._orbax.wait_until_finished()  # in all processes
            write_part(new)
            barrier = orbax().multihost.get_barrier_sync_fn()
            barrier(key=f"{new.name}.{self._count}", timeout_ms=PATIENCE_MS)
            if is_first():
                write_manifest(new)
                if not in_bucket(new):
                    self._rename(new)
                self._tidy(step)
        except BaseException as error:
            self._give_up(new)
            # Of the file system, of tensorstore, of jax's barriers.
            expected = isinstance(error, OSError | ValueError | RuntimeError)
            self._failed = _fault(new, error) if expected else error

    def _rename(self, new: Path) -> None:
        final, old = new.with_suffix(""), new.with_suffix(".old")
        if final.exists():
            remove(old)
            final.rename(old)
        new.rename(final)
        sync([self.directory])
        remove(old)

    def _tidy(self, step: int) -> None:
        earlier = [(at, path) for at, path in checkpoints(self.directory) if at < step]
        stale = [
            path for at, path in earlier[self.keep - 1 :]
            if not self.keep_every or at % self.keep_every
        ]
        for path in [*stale, *unfinished(self.directory)]:
            remove(path, MANIFEST)

    def _give_up(self, new: Path) -> None:
        if is_first():
            remove(new, MANIFEST)


def _apart(leaf: object) -> jax.Array | np.ndarray:
    """What is written of a leaf, whatever becomes of the leaf.

    Orbax copies from devices to the host. On a CPU it would read the array itself, and a step that
    takes its memory would wait until all is written.
    """
    if not isinstance(leaf, jax.Array):
        return np.array(leaf)
    on_host = next(iter(leaf.sharding.device_set)).platform == "cpu"
    return jax.device_put(leaf, leaf.sharding, may_alias=False) if on_host else leaf


def _fault(new: Path, error: BaseException) -> UserError:
    # tensorstore says why at the end of a long list of paths.
    code = re.search(r"os_error_code='(\d+)'", str(error))
    why = os.strerror(int(code[1])) if code else brief(error)
    return UserError(
        f"{new.with_suffix('')}: cannot save the state: {why}; make room, earlier checkpoints are "
        "whole"
    )


@functools.cache
def _quiet_orbax() -> None:
    """Of a save that fails, one error is raised; what orbax and tensorstore print of it is not."""
    logging.getLogger("absl").addFilter(
        lambda record: not record.pathname.endswith(("async_checkpointer.py", "futures/future.py"))
    )
    usual = sys.unraisablehook

    def hook(what):
        # tensorstore's other writes fail after orbax, at the first one, has closed its loop.
        if str(what.exc_value) != "Event loop is closed":
            usual(what)

    sys.unraisablehook = hook
