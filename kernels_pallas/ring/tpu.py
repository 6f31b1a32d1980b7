"""Attention to latents that travel around a ring, forward: one kernel for all hops.

    K = C W_uk,  V = C W_uv   of the visitor's latents C, merged into what the visitors before gave

While the pipeline of a hop runs (row, head, block of queries, block of latents: latent/tpu.py) the
DMA engines bring the next visitor (hops.py). Between hops what a block of queries has seen lies in
HBM as it is in VMEM, not yet divided: the last hop makes a Partial of it. A hop whose visitor
nobody here sees has no steps.

VMEM, bfloat16, K2 (latent 512, key 128 + 64, value 128), 2048 queries x 512 keys: queries 0.8 MiB,
latents 0.5 + 0.1, weights 0.25, out 1 MiB, what was before 1, all twice; made keys 0.25: 8 MiB.
HBM: two slots of the latents.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.attention.tile import Blocks, Scalars, State, blocks_for, queries_at
from kernels_pallas.attention.tpu import asked_of
from kernels_pallas.latent.tpu import (
    BLOCK_K,
    BLOCK_Q,
    Inputs,
    keys_of,
    meet,
    specs,
)
from kernels_pallas.latent.tpu import unsupported as unsupported
from kernels_pallas.partial import Partial
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

COLLECTIVE = 8


def forward(q, kv, up, *, scale: float, axes: Axes, interpret=False) -> Partial:
    """The op's TPU form. See the package docstring for the contract."""
    (b, t, h, _), s = q.nope.shape, kv.pos.shape[1]
    interpret = simulated(interpret)
    blocks, cores = blocks_for(t, s, BLOCK_Q, BLOCK_K, kv.latent.dtype), cores_for(h, interpret)
    x = keys_of(kv, up, blocks)._replace(
        q=asked_of(q, scale, blocks), q_where=queries_at(q, blocks)
    )
    of_hops = visits(axes, x.q_where, kv, blocks)
    # The first hop starts every query's state and the last one ends it, whatever they see.
    steps = of_hops.steps.at[jnp.array([0, -1])].max(1)
    x, slots = x._replace(k_where=of_hops.where), slots_for(x)
    width, v, length = len(Scalars._fields), x.up[1].shape[2], x.q_where.shape[-1]
    made = [pltpu.VMEM((blocks.k_piece, w.shape[2]), kv.latent.dtype) for w in x.up]

    def kernel(*refs):
        known, (steps, ends, x, out, slots, made, copied, *link) = (
            Scalars(*refs[:width]), refs[width:]
        )
        link = Link.of(axes, cores, ends, link)
        _kernel(known, steps, x, State(*out), slots, made, copied, link, blocks)

    shapes = tuple(jax.ShapeDtypeStruct((b, h, rows, length), jnp.float32) for rows in (v, 1, 1))
    out, _ = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=width + 2,
            grid=(cores,),
            in_specs=[anywhere(x)],
            out_specs=(anywhere(shapes), anywhere(slots)),
            scratch_shapes=[made, pltpu.SemaphoreType.DMA, *semaphores(1)],
        ),
        out_shape=(shapes, slots),
        compiler_params=compiled_for(axes, COLLECTIVE),
        interpret=interpret,
        name="ring_attention",
    )(*of_hops.known, steps, neighbours(axes), x)
    back = lambda x: jnp.moveaxis(x, 3, 1)[:, :t]  # noqa: E731
    return Partial(back(out[0]), back(out[1])[..., 0], back(out[2])[..., 0])


def slots_for(x: Inputs) -> Slots:
    """Shapes of what travels."""
    double = lambda x: jax.ShapeDtypeStruct((2, *x.shape), x.dtype)  # noqa: E731
    return Slots(*jax.tree.map(double, (x.latent, x.rope)))


def own(x: Inputs, slots: Slots) -> list:
    """(from, to): the device's own latents go to the first slot."""
    mine = [ref for ref in (x.latent, x.rope) if ref is not None]
    return list(zip(mine, slots.at(0), strict=True))


def _kernel(
    known: Scalars, steps, x: Inputs, out: State, slots: Slots, made, copied, link: Link,
    blocks: Blocks,
):
    link.begin(copied, own(x, slots))

    @pl.loop(0, link.ways)
    def _(hop):
        slot = jax.lax.rem(hop, 2)
        going, more = slots.hand_on(slot), hop < link.ways - 1
        link.speak(link.wait_for_room, more & (hop > 0))
        link.speak(lambda: link.send(0, going), more)
        at = (hop, slot, steps[hop], link.ways)
        pl.when(at[2] > 0)(lambda: _attend(known, x, out, slots, made, at, blocks))
        link.join()
        link.speak(lambda: link.wait(0, going), more)
        link.speak(link.give_room, hop < link.ways - 2)
        link.join()


def _attend(
    known: Scalars, x: Inputs, out: State, slots: Slots, made, at: tuple, blocks: Blocks
) -> None:
    """Merge a visitor into what all queries have seen."""
    hop, slot, steps, ways = at
    b, h = x.q[0].shape[:2]
    queries, keys = x.q_where.shape[-1] // blocks.q, x.k_where.shape[-1] // blocks.k
    latent, *rope = slots.at(slot)
    here = x._replace(latent=latent, rope=rope[0] if rope else None, k_where=x.k_where.at[hop])

    def body(*refs):
        block, (*before, acc, top, total) = _named(refs[:-6], bool(rope)), refs[-6:]
        state = State(acc, top, total)
        row, i, j = (pl.program_id(axis) for axis in (0, 2, 3))
        last, block_q = j == pl.num_programs(3) - 1, row * queries + i
        met = (hop * b + row) * queries + i
        block_k = (hop * b + row) * keys + known.first[met] + j
        pl.when((j == 0) & (hop == 0))(state.clear)

        @pl.when((j == 0) & (hop > 0))
        def _():
            for ref, old in zip(state, before, strict=True):
                ref[...] = old[...]

        meet(known, (block_q, block_k), j < known.count[met], block, state, made, blocks)
        pl.when(last & (hop == ways - 1))(lambda: state.write(Partial(*state)))

    of_inputs, of_state = specs(x, blocks, known, hop * b)
    pltpu.emit_pipeline(
        body, grid=(b, h, queries, steps),
        in_specs=[*_listed(of_inputs), *of_state], out_specs=list(of_state),
        core_axis=0, dimension_semantics=(pltpu.ARBITRARY, SPLIT, *(pltpu.ARBITRARY,) * 2),
    )(*_listed(here), *out, *out)


def _listed(x: Inputs) -> list:
    """What there is of it, in order."""
    every = [*x.q, x.q_where, x.latent, x.rope, x.k_where, *x.up]
    return [part for part in every if part is not None]


def _named(parts, rope: bool) -> Inputs:
    """The way back."""
    parts = iter(parts)
    maybe = lambda: next(parts) if rope else None  # noqa: E731
    return Inputs(
        (next(parts), maybe()), next(parts), next(parts), maybe(), next(parts),
        (next(parts), next(parts)),
    )
