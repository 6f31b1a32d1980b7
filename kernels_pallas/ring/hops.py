"""How devices of a ring hand on what travels, from within a kernel.

Two slots in HBM: a device works on one while the other fills. Its left neighbour writes to it, by
remote DMA, and may do so once it was told that the slot is free:

    hop     send slot -> the right one's other slot | work on slot | wait for both | free the slot

Without the last a fast neighbour writes into what is still being read. All wait for both neighbours
once, at the start: before that their buffers may hold something else.
"""

from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.attention.tile import Blocks, Scalars, keys_at, scalars

Axes = tuple[str, ...]


def neighbours(axes: Axes) -> jax.Array:
    """Coordinates on the axes of the next device and of the one before, flat, for `Link.of`."""
    sizes = [jax.lax.axis_size(a) for a in axes]
    here, ways = jax.lax.axis_index(axes), jax.lax.axis_size(axes)
    found = [jnp.unravel_index((here + step) % ways, sizes) for step in (1, -1)]
    return jnp.stack(jax.tree.leaves(found)).astype(jnp.int32)


class Link(NamedTuple):
    """To both neighbours; semaphores are scratch of the kernel."""

    ways: int
    right: dict  # where they are on the mesh
    left: dict
    room: jax.Array  # how often the right one may be written to
    sent: jax.Array  # of each kind of what travels
    came: jax.Array

    @staticmethod
    def of(axes: Axes, ends: jax.Array, semaphores) -> "Link":
        """From `neighbours` in scalar memory and `semaphores` in scratch."""
        count = len(axes)
        at = lambda first: {a: ends[first + i] for i, a in enumerate(axes)}  # noqa: E731
        return Link(jax.lax.axis_size(axes), at(0), at(count), *semaphores)

    def meet(self) -> None:
        """Both neighbours are in this kernel: what it writes to is there."""
        if self.ways > 1:
            barrier = pltpu.get_barrier_semaphore()
            for device in (self.left, self.right):
                pl.semaphore_signal(barrier, device_id=device)
            pl.semaphore_wait(barrier, 2)

    def wait_for_room(self) -> None:
        """The right one has read what it got a hop ago."""
        pl.semaphore_wait(self.room, 1)

    def give_room(self) -> None:
        """The left one may write to what was read."""
        pl.semaphore_signal(self.room, device_id=self.left)

    def send(self, kind: int, pairs) -> None:
        """Start to write references (here, there): `there` at the right one."""
        for copy in self._copies(kind, pairs):
            copy.start()

    def wait(self, kind: int, pairs) -> None:
        """What was sent has left, and as much has come from the left one."""
        for copy in self._copies(kind, pairs):
            copy.wait()

    def _copies(self, kind: int, pairs) -> Iterator:
        for i, (here, there) in enumerate(pairs):
            yield pltpu.make_async_remote_copy(
                here, there, self.sent.at[kind, i], self.came.at[kind, i], device_id=self.right
            )


def semaphores(kinds: int) -> list:
    """Scratch for a Link: `kinds` of up to two arrays each."""
    return [
        pltpu.SemaphoreType.REGULAR, pltpu.SemaphoreType.DMA((kinds, 2)),
        pltpu.SemaphoreType.DMA((kinds, 2)),
    ]


def fill(copied: jax.Array, pairs) -> None:
    """Copy references (from, to) of this device, one after another."""
    for here, there in pairs:
        copy = pltpu.make_async_copy(here, there, copied)
        copy.start()
        copy.wait()


class Visits(NamedTuple):
    """What is known of all hops before the first: 8 bytes a token, so they come by all_gather."""

    where: jax.Array  # hops b 2 s   positions and segments of each visitor
    known: Scalars  # first and count, keys and k_pieces: hop by hop, row by row
    steps: jax.Array  # hops   the largest count; 0: nobody here sees the visitor


def visits(axes: Axes, q_where, kv, blocks: Blocks, by_keys: bool = False) -> Visits:
    """Of queries b 3 t and the visitors in the order in which they come.

    Scalars take as much as those of one device with all keys: 48 bytes for 512 keys.
    """
    ways = jax.lax.axis_size(axes)
    where = jax.lax.all_gather(keys_at(kv, blocks), axes)
    where = where[(jax.lax.axis_index(axes) - jnp.arange(ways)) % ways]
    each = jax.vmap(lambda k: scalars(q_where, k, blocks, by_keys))(where)
    steps = each.count.max(1)
    own = each.queries[0], each.q_pieces[0]
    return Visits(where, Scalars(*own, *(x.reshape(-1) for x in each[2:])), steps)


def simulated(interpret):
    """Parameters of a simulated TPU, for True; a pipeline asks what chip it is on, and is told."""
    if not interpret:
        return interpret
    from jax._src.pallas.mosaic import tpu_info  # there is no public way to say it

    tpu_info.registry.setdefault(
        "cpu", lambda: pltpu.get_tpu_info_for_chip(pltpu.ChipVersion.TPU_V5E, 1)
    )
    return pltpu.InterpretParams() if interpret is True else interpret
