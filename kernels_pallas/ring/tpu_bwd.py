"""Attention to latents that travel around a ring, backward: one kernel for all hops.

    d_C = sum over devices of the own d_C,   d_Q and d_W = sums over visitors, which stay here

Latents travel as forward. The gradient of a visitor follows one hop behind: it is on its way while
the device computes its own share, then both are added and the sum goes on.

    hop     send latents, and the sum of the hop before | own share (row, block of latents, head,
            block of queries: latent/tpu_bwd.py) | wait for both | sum = share + what came

After the last hop one more send brings every gradient home. What each core gives to the latents is
a share of its own.

VMEM, bfloat16, K2: 16 MiB as in latent/tpu_bwd.py, and for the sum at the end of a hop three blocks
of 2.5 MiB (four with two cores), all twice; the compiler uses some of it for both: 20 to 26 MiB.
HBM: two slots of latents; in float32 two of shares for each core, and what comes.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.attention.tile import LOG2E, Blocks, Scalars, blocks_for, nth
from kernels_pallas.attention.tile_bwd import Query, ask, query_specs
from kernels_pallas.latent.tpu import Inputs, keys_of
from kernels_pallas.latent.tpu_bwd import (
    BLOCK_K,
    BLOCK_Q,
    Grown,
    Step,
    finish,
    named_scratch,
    scratch_for,
    start,
    step,
)
from kernels_pallas.ring.hops import (
    SPLIT,
    Axes,
    Link,
    Slots,
    anywhere,
    compiled_for,
    cores_for,
    neighbours,
    semaphores,
    simulated,
    visits,
)
from kernels_pallas.ring.tpu import own, slots_for

COLLECTIVE = 9
LATENTS, GRADIENTS = 0, 1  # kinds of what travels


class Out(NamedTuple):
    """References in HBM."""

    query: jax.Array  # b h n+p t
    up: tuple  # h r n and h r v
    slots: Slots
    shares: Slots  # core 2 b s ...   that of the first core becomes the sum and travels
    came: Slots  # b s r and b s p: the sum of the devices before

    def to_add(self, slot) -> list:
        """(here, there): the sum goes to where the next device awaits it."""
        return list(zip(self.shares.at(0, slot), self.arrived(), strict=True))

    def arrived(self) -> list:
        """References to what came."""
        return [x for x in self.came if x is not None]


class Hop(NamedTuple):
    """Which hop this is."""

    index: jax.Array
    slot: jax.Array
    steps: jax.Array  # blocks of queries that a block of this visitor meets at most


def grads(q, kv, up, lse, d_out, delta, *, scale: float, axes: Axes, interpret=False):
    """The op's TPU form. See the package docstring for the contract."""
    s, interpret = kv.pos.shape[1], simulated(interpret)
    cores = cores_for(q.nope.shape[2], interpret)
    asked = ask(q, lse, d_out, delta, scale=scale, block_q=BLOCK_Q)
    blocks = blocks_for(asked.query.where.shape[2], s, BLOCK_Q, BLOCK_K, kv.latent.dtype)
    x = keys_of(kv, up, blocks)
    of_hops = visits(axes, asked.query.where, kv, blocks, by_keys=True)
    x, sums, slots = x._replace(k_where=of_hops.where), start(asked, up), slots_for(x)
    width, travels = len(Scalars._fields), Slots(x.latent, x.rope)
    f32 = lambda *lead: lambda x: jax.ShapeDtypeStruct((*lead, *x.shape), jnp.float32)  # noqa: E731
    shapes = Out(
        *jax.tree.map(f32(), sums), slots, jax.tree.map(f32(cores, 2), travels),
        jax.tree.map(f32(), travels),
    )

    def kernel(*refs):
        known, (steps, ends, q, x, _, out, scratch, copied, *link) = (
            Scalars(*refs[:width]), refs[width:]
        )
        link = Link.of(axes, cores, ends, link)
        _kernel(known, steps, q, x, out, named_scratch(scratch), copied, link, blocks)

    first = width + 2 + len(jax.tree.leaves((asked.query, x)))
    (out,) = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=width + 2,
            grid=(cores,),
            in_specs=[anywhere(asked.query), anywhere(x), anywhere(sums)],
            out_specs=(anywhere(shapes),),
            scratch_shapes=[scratch_for(x, blocks), pltpu.SemaphoreType.DMA, *semaphores(2)],
        ),
        out_shape=(shapes,),
        input_output_aliases={first + i: i for i in range(3)},
        compiler_params=compiled_for(axes, COLLECTIVE),
        interpret=interpret,
        name="ring_attention_grads",
    )(*of_hops.known, of_hops.steps, neighbours(axes), asked.query, x, sums)
    d_latent, d_rope = out.came
    d_kv = kv._replace(
        latent=d_latent[:, :s], k_rope=None if d_rope is None else d_rope[:, :s] / LOG2E,
        pos=None, seg=None,
    )
    d_q, d_up = finish(asked, (out.query, out.up))
    return d_q, d_kv, d_up


def _kernel(
    known: Scalars, steps, q: Query, x: Inputs, out: Out, scratch: tuple, copied, link: Link,
    blocks: Blocks,
):
    link.begin(copied, own(x, out.slots))

    @pl.loop(0, link.ways)
    def _(hop):
        slot = jax.lax.rem(hop, 2)
        going, behind = out.slots.hand_on(slot), out.to_add(1 - slot)
        more, follows = hop < link.ways - 1, hop > 0
        link.speak(link.wait_for_room, follows)
        link.speak(lambda: link.send(LATENTS, going), more)
        link.speak(lambda: link.send(GRADIENTS, behind), follows)
        at = Hop(hop, slot, steps[hop])
        pl.when(at.steps > 0)(lambda: _share(known, q, x, out, scratch, at, link, blocks))
        link.join()
        link.speak(lambda: link.wait(LATENTS, going), more)
        link.speak(lambda: link.wait(GRADIENTS, behind), follows)
        link.speak(lambda: _add(out, at, link.cores, blocks))
        link.speak(link.give_room)
        link.join()

    @link.speak
    def _():
        home = out.to_add((link.ways - 1) % 2)
        link.wait_for_room()
        link.send(GRADIENTS, home)
        link.wait(GRADIENTS, home)


def _share(
    known: Scalars, q: Query, x: Inputs, out: Out, scratch: tuple, hop: Hop, link: Link,
    blocks: Blocks,
) -> None:
    """What the device's own queries give to a visitor, and it to them."""
    (b, h, _, t), s = q.across[0].shape, x.k_where.shape[-1]
    queries, keys = t // blocks.q, s // blocks.k
    latent, *rope = out.slots.at(hop.slot)
    asked, tree = jax.tree.flatten(q)
    heads = h // link.cores  # of this core, from core x heads on

    def body(*refs):
        of_q, refs = jax.tree.unflatten(tree, refs[: len(asked)]), refs[len(asked) :]
        (latent, *k_rope), refs = refs[: 1 + len(rope)], refs[1 + len(rope) :]
        (k_where, *up), grown = refs[:3], refs[3:]
        row, j, head, m = (pl.program_id(axis) for axis in range(4))
        here = head - link.core * heads
        at = Step(
            row, head, (hop.index * b + row) * keys + j, m, m == pl.num_programs(3) - 1,
            here == 0, here == heads - 1,
        )
        of_x = Inputs(None, None, latent, k_rope[0] if rope else None, k_where, tuple(up))
        grown = Grown(out.query, out.up, grown[0], grown[1] if rope else None)
        step(known, at, of_q, of_x, grown, *scratch, blocks, queries)

    def spec(shape, index):
        return pl.BlockSpec(shape, lambda b, j, h, m: index(b, j, h))

    def met(shape, index):
        def at(row, j, head, m):
            return index(row, head, nth(known, (hop.index * b + row) * keys + j, m))

        return pl.BlockSpec(shape, at)

    down = [
        spec((None, blocks.k, ref.shape[-1]), lambda b, j, h: (b, j, 0))
        for ref in (x.latent, x.rope) if ref is not None
    ]
    in_specs = [
        *jax.tree.leaves(query_specs(q, blocks, met)), *down,
        spec((None, 2, blocks.k), lambda b, j, h: (b, 0, j)),
        *(spec((None, *w.shape[1:]), lambda b, j, h: (h, 0, 0)) for w in x.up),
    ]

    pltpu.emit_pipeline(
        body, grid=(b, keys, h, hop.steps), in_specs=in_specs, out_specs=down, core_axis=0,
        dimension_semantics=(*(pltpu.ARBITRARY,) * 2, SPLIT, pltpu.ARBITRARY),
    )(
        *asked, latent, *rope, x.k_where.at[hop.index], *x.up, *out.shares.at(link.core, hop.slot)
    )


def _add(out: Out, hop: Hop, cores: int, blocks: Blocks) -> None:
    """The share of each core, if there are any, and what came become the sum."""
    b, s, _ = out.came.latent.shape
    kinds = len(out.arrived())

    def body(*refs):
        came, *shares, sums = (refs[i : i + kinds] for i in range(0, len(refs), kinds))
        for kind, sum_ in enumerate(sums):
            total = jnp.where(hop.index > 0, came[kind][...], 0.0)
            for share in shares:
                total += jnp.where(hop.steps > 0, share[kind][...], 0.0)
            sum_[...] = total

    shares = [out.shares.at(core, hop.slot) for core in range(cores)]
    specs = [
        pl.BlockSpec((None, blocks.k, x.shape[-1]), lambda b, j: (b, j, 0)) for x in out.arrived()
    ]
    pltpu.emit_pipeline(
        body, grid=(b, s // blocks.k), in_specs=specs * (1 + cores), out_specs=specs,
    )(*out.arrived(), *sum(shares, []), *shares[0])
