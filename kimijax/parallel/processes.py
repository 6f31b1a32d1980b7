"""One job of several processes: each enters `join` first, then jax shows the devices of all.

jax ends a process that waits in vain for another with a stack trace, after the silence of a
heartbeat. So every process keeps the line on which the roll was called (roll.py): whoever ends
before its work is done is noticed at once, and the others say which it was and end as well.
"""

import atexit
import functools
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kimijax.errors import Lost, UserError
from kimijax.parallel.roll import Line, address, answer_roll, call_roll

PATIENCE = 300  # seconds in which every process has to come
HEARTBEAT = 30  # seconds without a sign of life after which jax ends the job: a process that hangs
GRACE = 5  # seconds in which process 0 may tidy up once another is gone
DONE = "done"


@contextmanager
def join(
    coordinator: str, processes: int, index: int, patience: int = PATIENCE,
    heartbeat: int = HEARTBEAT,
) -> Iterator[None]:
    """Come together with the other processes; before anything else is asked of jax.

    The block ends when it has ended in all of them. If a process ends before that, the others name
    it on stderr and end, whatever they do at the time: with the code of Lost if it is simply gone,
    with 2 if it said that it failed, which would only happen again.

    coordinator  host:port of process 0, the same for all; it must be free there
    processes    how many there are
    index        which one this is, from 0
    patience     seconds to wait for the others; Lost names one that did not come
    heartbeat    seconds after which jax ends the job of a process that lives and is silent
    """
    address(coordinator)
    if not 0 <= index < processes:
        raise UserError(
            f"process {index} of {processes}: give the number of processes, and each its own index "
            "below that, from 0"
        )
    if index == 0:
        lines = call_roll(coordinator, processes, patience)
    else:
        lines = answer_roll(coordinator, processes, index, patience)
    watch = _Watch(lines, processes, index)
    try:
        jax.distributed.initialize(
            coordinator, processes, index, initialization_timeout=patience,
            heartbeat_timeout_seconds=heartbeat, shutdown_timeout_seconds=heartbeat,
        )
        yield
        watch.leave()
    except BaseException as error:
        watch.fail(error)
        raise


def is_first() -> bool:
    """Whether this process writes the files of its job; true of a process that is alone."""
    return jax.process_index() == 0


def meet() -> None:
    """Wait until every process is here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("meet")


def anywhere(flags: list[bool]) -> list[bool]:
    """Which flags are up in any process: what all of them have to decide alike."""
    if jax.process_count() == 1:
        return flags
    return multihost_utils.process_allgather(np.array(flags)).any(0).tolist()


def vote(flags: Callable[[], list[bool]]) -> Callable[[], list[bool]]:
    """`anywhere` that the devices decide in the order of their work: begun now, asked for later.

    Unlike `anywhere` it does not wait for work that is given to the devices in between. A process
    that is alone looks at its flags when it is asked.
    """
    if jax.process_count() == 1:
        return flags
    mesh, any_of = _voting()
    cast = multihost_utils.host_local_array_to_global_array(
        np.array([flags()]), mesh, PartitionSpec("process")
    )
    result = any_of(cast)
    return lambda: np.asarray(result.addressable_data(0)).tolist()


@functools.cache
def _voting() -> tuple[Mesh, Callable]:
    devices = np.array(jax.devices()).reshape(jax.process_count(), -1)
    mesh = Mesh(devices, ("process", "device"))
    whole = NamedSharding(mesh, PartitionSpec())
    return mesh, jax.jit(lambda votes: votes.any(0), out_shardings=whole)


def on_first(tree):
    """Arrays of all devices on the host of process 0, whole, one after the other; None elsewhere.

    In a job of one process they stay where they are.
    """
    if jax.process_count() == 1:
        return tree

    def fetch(x):
        whole = multihost_utils.process_allgather(x, tiled=True)
        return whole if is_first() else None

    return jax.tree.map(fetch, tree)


class _Watch:
    """Hears on the lines to the other processes who is done and who is gone."""

    def __init__(self, lines: dict[int, Line], processes: int, index: int):
        self.lines, self.processes, self.index = lines, processes, index
        self.done = {other: threading.Event() for other in lines}
        self.lost, self.over, self.lock = threading.Event(), False, threading.Lock()
        self.code = Lost.code  # with which this process ends where another has
        for other in lines:
            threading.Thread(target=self._listen, args=(other,), daemon=True).start()

    def _listen(self, other: int) -> None:
        said = self.lines[other].hear()
        if said == DONE:
            self.done[other].set()
            return
        with self.lock:
            if self.over:
                return
            self.over = True
        said = said or f"{Lost.code} process {other} of {self.processes} is gone"
        code, fault = said.split(maxsplit=1)
        text = f"\nerror: {fault}; start all processes of the job again"  # behind a progress bar
        print(text, file=sys.stderr, flush=True)
        self._tell(said)
        self.code = int(code)
        self.lost.set()
        if self.index == 0:  # the others write no files, and have nothing to tidy up
            time.sleep(GRACE)
        os._exit(self.code)

    def _tell(self, text: str) -> None:
        for line in self.lines.values():
            line.say(text)

    def leave(self) -> None:
        """The work is done here: wait until it is done everywhere."""
        if self.index > 0:
            self._tell(DONE)
        for done in self.done.values():
            done.wait()
        with self.lock:
            self.over = True
        if self.index == 0:
            self._tell(DONE)

    def fail(self, error: BaseException) -> None:
        """The work ends with an error: of this process, or because another is gone."""
        code = {UserError: UserError.code, Lost: Lost.code, KeyboardInterrupt: 130}.get(
            type(error), 1
        )
        # What waits for a process that is gone may raise before its end is heard here, and a save
        # that failed so says that it could not be written.
        if not isinstance(error, KeyboardInterrupt) and self.lost.wait(1):
            error = SystemExit(code := self.code)
        with self.lock:
            mine, self.over = not self.over, True
        if mine:
            self._tell(f"{UserError.code} process {self.index} of {self.processes} failed")
        # jax would wait here, at the exit, for processes that do not come.
        atexit.register(os._exit, code)
        if not mine:
            raise error
