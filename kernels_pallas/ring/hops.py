"""How devices of a ring hand on what travels, from within a kernel.

Two slots in HBM: a device works on one while the other fills. Its left neighbour writes to it, by
remote DMA, and may do so once it was told that the slot is free:

    hop     send slot -> the right one's other slot | work on slot | wait for both | free the slot

Without the last a fast neighbour writes into what is still being read. All wait for both neighbours
once, at the start: before that their buffers may hold something else. Where a device has two cores
(v5p), each works for half of the heads; the first alone speaks with the neighbours, and both meet
before a slot is free and after the next has come.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.attention.tile import VMEM, Blocks, Scalars, keys_at, scalars

Axes = tuple[str, ...]
SPLIT = pltpu.PARALLEL  # of a pipeline: the dim that cores share out


def neighbours(axes: Axes) -> jax.Array:
    """Coordinates on the axes of the next device and of the one before, flat, for `Link.of`."""
    sizes = [jax.lax.axis_size(a) for a in axes]
    here, ways = jax.lax.axis_index(axes), jax.lax.axis_size(axes)
    found = [jnp.unravel_index((here + step) % ways, sizes) for step in (1, -1)]
    return jnp.stack(jax.tree.leaves(found)).astype(jnp.int32)


class Link(NamedTuple):
    """To both neighbours and between cores; semaphores are scratch of the kernel."""

    ways: int
    cores: int
    core: jax.Array  # which one this is
    right: dict  # where they are on the mesh
    left: dict
    room: jax.Array  # how often the right one may be written to
    met: jax.Array  # how often the other core came to a meeting
    sent: jax.Array  # of each kind of what travels
    came: jax.Array

    @staticmethod
    def of(axes: Axes, cores: int, ends: jax.Array, semaphores) -> "Link":
        """From `neighbours` in scalar memory and `semaphores` in scratch."""
        count = len(axes)
        at = lambda first: {a: ends[first + i] for i, a in enumerate(axes)}  # noqa: E731
        ways, core = jax.lax.axis_size(axes), pl.program_id(0)
        return Link(ways, cores, core, at(0), at(count), *semaphores)

    def begin(self, copied: jax.Array, pairs) -> None:
        """Copy what is one's own, (from, to) of this device, and meet both neighbours."""

        @self.speak
        def _():
            for here, there in pairs:
                copy = pltpu.make_async_copy(here, there, copied)
                copy.start()
                copy.wait()
            if self.ways > 1:
                barrier = pltpu.get_barrier_semaphore()
                for device in (self.left, self.right):
                    pl.semaphore_signal(barrier, device_id=device)
                pl.semaphore_wait(barrier, 2)

        self.join()

    def speak(self, f: Callable, when=True) -> None:
        """f() on the core that speaks with the neighbours."""
        pl.when((self.core == 0) & when)(f)

    def join(self) -> None:
        """All cores of the device have come here."""
        if self.cores > 1:
            pl.semaphore_signal(self.met, core_index=1 - self.core)
            pl.semaphore_wait(self.met, 1)

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
    count, transfers = pltpu.SemaphoreType.REGULAR, pltpu.SemaphoreType.DMA((kinds, 2))
    return [count, count, transfers, transfers]


class Slots(NamedTuple):
    """What travels, latents or their gradients: two places for each, in HBM."""

    latent: jax.Array  # 2 b s r
    rope: jax.Array | None  # 2 b s p

    def at(self, *place) -> list:
        """References to one of the places."""
        return [x.at[place] for x in self if x is not None]

    def hand_on(self, slot) -> list:
        """(here, there): what is in this slot goes to the other slot of the next device."""
        return list(zip(self.at(slot), self.at(1 - slot), strict=True))


class Visits(NamedTuple):
    """What is known of all hops before the first: 8 bytes a token, so they come by all_gather."""

    where: jax.Array  # hops b 2 s   positions and segments of each visitor
    known: Scalars  # first and count, keys and k_pieces: hop by hop, row by row
    steps: jax.Array  # hops   the largest count; 0: nobody here sees the visitor


def visits(axes: Axes, q_where, kv, blocks: Blocks, by_keys: bool = False) -> Visits:
    """Of queries b 3 t and the visitors in the order in which they come.

    Scalars take as much as those of one device with all keys: at 2M tokens 160 KiB, forward.
    """
    ways = jax.lax.axis_size(axes)
    where = jax.lax.all_gather(keys_at(kv, blocks), axes)
    where = where[(jax.lax.axis_index(axes) - jnp.arange(ways)) % ways]
    each = jax.vmap(lambda k: scalars(q_where, k, blocks, by_keys))(where)
    steps = each.count.max(1)
    own = each.queries[0], each.q_pieces[0]
    return Visits(where, Scalars(*own, *(x.reshape(-1) for x in each[2:])), steps)


def cores_for(heads: int, interpret) -> int:
    """Cores that share the heads out: those of the device, or one where they cannot."""
    there = interpret.num_cores_or_threads if interpret else pltpu.get_tpu_info().num_cores
    return there if there <= 2 and heads % there == 0 else 1


def simulated(interpret):
    """Parameters of a simulated TPU, for True; a pipeline asks what chip it is on, and is told."""
    if not interpret:
        return interpret
    from jax._src.pallas.mosaic import tpu_info  # there is no public way to say it

    tpu_info.registry.setdefault(
        "cpu", lambda: pltpu.get_tpu_info_for_chip(pltpu.ChipVersion.TPU_V5E, 1)
    )
    return pltpu.InterpretParams() if interpret is True else interpret


def compiled_for(axes: Axes, collective: int) -> pltpu.CompilerParams:
    """A grid of the cores; `collective` is an id that no other kernel of a program has."""
    return pltpu.CompilerParams(
        dimension_semantics=("parallel",), vmem_limit_bytes=VMEM,
        collective_id=collective if jax.lax.axis_size(axes) > 1 else None,
    )


def anywhere(tree):
    """Specs of arrays that stay in HBM."""
    return jax.tree.map(lambda _: pl.BlockSpec(memory_space=pl.ANY), tree)
