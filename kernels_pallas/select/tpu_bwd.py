"""Attention to chosen blocks as a TPU kernel, backward: one pass for all gradients.

With keys down and rows across, as in the forward; a block is key and value, so it has two sums:

    P^T = 2^(S^T - lse),  dP^T = C dO^T,  dS^T = P^T * (dP^T - delta)
    dQ^T = C^T dS^T,      dC = dS^T Q + P^T dO

Rows stay, chosen blocks come by, five products for a pair. dQ^T is summed in VMEM; dC of a chunk
over a step's rows is summed in VMEM and then added to what HBM holds: that is read while the
chunk is worked on and written while the next is, twice 4 r bytes a token beside 5 r rows products
of it. A tile's blocks are distinct, so only the next step may want what is being written: a step
ends by waiting for it. Cores that share a chip would meet in dC: each part of the tiles has one of
its own, float32, and they are added up in the end. Instead, lists of the tiles that chose a block
would let blocks stay and need no sums in HBM, but seven products, and 6 r bytes of every row for
every block: at 64 keys the reading alone would take longer than all of this.

VMEM, bfloat16, r 512, 2048 rows x 512 keys: queries and their gradient 2 MiB, cotangents 4, all
twice; in bfloat16 2; dQ^T 4; chunks 2 x 0.5, dC 2 x 1 and 1; in flight 4 MiB: 30 MiB.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.attention.tile import LOG2E, VMEM, dot
from kernels_pallas.partial import MASKED
from kernels_pallas.select.tpu import (
    Chunks,
    Sizes,
    by_chunk,
    flat,
    lists,
    scratch,
    sizes,
    specs,
)


class Rows(NamedTuple):
    """References to the rows of a step, or all of a call."""

    query: jax.Array  # rows r
    d_out: jax.Array  # rows r   float32; of the dtype of the store where it is multiplied
    lse: jax.Array  # 1 rows   base 2; a large number for rows that saw nothing
    delta: jax.Array  # 1 rows


def add_chunk(
    x: Rows, chunk, d_rows, d_chunk, lanes: int, keys: tuple, scale: float
) -> None:
    """Add what all rows and keys, (first, count), of a chunk give to one another; one schedule.

    d_rows r rows and d_chunk keys r are the sums.
    """
    keys = pl.ds(*keys)
    key = chunk[keys]
    groups = [pl.ds(at, lanes) for at in range(0, x.query.shape[0], lanes)]

    def products(at):
        return dot(key, x.query[at], (1, 1)) * (scale * LOG2E), dot(key, x.d_out[at], (1, 1))

    def spend(at, p, d_s):
        d_rows[:, at] += dot(key, d_s, (0, 0))
        d_chunk[keys] += dot(p, x.d_out[at], (1, 0)) + dot(d_s, x.query[at], (1, 0))

    made, waiting = products(groups[0]), None
    for at, ahead in zip(groups, [*groups[1:], None], strict=True):
        (s, d_p), made = made, None if ahead is None else products(ahead)
        p = jnp.exp2(s - x.lse[:, at])
        d_s = p * (d_p - x.delta[:, at]) * scale
        if waiting is not None:
            spend(*waiting)
        waiting = at, p.astype(key.dtype), d_s.astype(key.dtype)
    spend(*waiting)


class Sums(NamedTuple):
    """dC on its way between HBM and VMEM."""

    hbm: jax.Array  # c j r
    sums: jax.Array  # 2 keys r   of this chunk, and of the one before, which is being written
    before: jax.Array  # keys r   of other steps, from HBM
    reading: jax.Array  # semaphores
    writing: jax.Array

    def _copy(self, buffer, u, block, semaphore, back: bool):
        j = self.hbm.shape[1]
        ends = (buffer.at[pl.ds(u * j, j)], self.hbm.at[block])
        return pltpu.make_async_copy(*(ends if back else ends[::-1]), semaphore)

    def read(self, u, block):
        """The copy of what HBM holds of a block."""
        return self._copy(self.before, u, block, self.reading, False)

    def write(self, slot, u, block):
        """The copy of the sum of a block back to HBM."""
        return self._copy(self.sums.at[slot], u, block, self.writing, True)


def _step(chunks: Chunks, sums: Sums, add) -> None:
    """add(chunk, its sum, how many blocks are left) of every chunk of a step, sums kept in HBM."""
    step, steps = pl.program_id(2), pl.num_programs(2)

    def use(n, chunk, left):
        slot = jax.lax.rem(n, 2)
        mine = sums.sums.at[slot]
        chunks.each(chunks.mine, n, lambda u, block: sums.read(u, block).start())
        mine[...] = jnp.zeros_like(mine)
        add(chunk, mine, left)
        chunks.each(chunks.mine, n, lambda u, block: sums.read(u, block).wait())
        mine[...] += sums.before[...]  # of blocks that are not there: what is never written
        pl.when(n > 0)(lambda: settle(n - 1))
        chunks.each(chunks.mine, n, lambda u, block: sums.write(slot, u, block).start())

    def settle(n):
        slot = jax.lax.rem(n, 2)
        chunks.each(chunks.mine, n, lambda u, block: sums.write(slot, u, block).wait())

    last = chunks.run(step, steps, use) - 1
    settle(last)


def grads(q, blocks, layer, ids, lse, d_out, delta, *, scale: float, interpret: bool = False):
    """Gradients of q and blocks, of their dtypes.

    lse    b m t h     of the forward
    d_out  b m t h r   its cotangent
    delta  b m t h     sum(out * d_out) - d_lse
    """
    size, rows = sizes(q, blocks, ids), q.shape[2] * q.shape[3]
    across = lambda x: flat(x, size)[:, :, None]  # noqa: E731
    of_rows = Rows(
        flat(q, size), flat(d_out, size),
        across(jnp.where(jnp.isneginf(lse), -MASKED, lse * LOG2E)), across(delta),
    )
    d_q, d_store = _call(of_rows, blocks, layer, lists(ids), size, scale, interpret)
    total = sum(d_store[n] for n in range(size.parts))  # slices: one fusion with what follows
    mine = jnp.arange(blocks.shape[0])[:, None, None, None, None] == layer
    d_blocks = jnp.where(mine, total, 0.0).astype(blocks.dtype)
    return d_q[:, :, :rows].reshape(q.shape), d_blocks


def _call(x: Rows, blocks, layer, table, size: Sizes, scale: float, interpret):
    """dQ b m rows r, and dC of each part, float32: parts b c j r."""
    (b, c, j, r), k = blocks.shape[1:], table.shape[-1] - 1
    spec, anywhere = specs(size, k, r), pl.BlockSpec(memory_space=pl.ANY)
    f32 = functools.partial(pltpu.VMEM, dtype=jnp.float32)
    d_store = jax.ShapeDtypeStruct((size.parts, b, c, j, r), jnp.float32)

    def kernel(layer, mine, following, rows, store, _, d_q, d_store, *refs):
        (d_out, d_rows, sums, before, reading, writing), way = refs[:6], refs[6:]
        row, part = pl.program_id(0), pl.program_id(1)
        d_out[...] = rows.d_out[...].astype(d_out.dtype)
        d_rows[...] = jnp.zeros_like(d_rows)
        x = rows._replace(d_out=d_out)

        def add(chunk, d_chunk, left):
            by_chunk(chunk, left, j, lambda at, keys: add_chunk(
                x, chunk, d_rows, d_chunk, size.lanes, (at, keys), scale
            ))

        _step(
            Chunks(mine, following, store.at[layer[0], row], *way),
            Sums(d_store.at[part, row], sums, before, reading, writing), add,
        )

        @pl.loop(0, size.rows, step=size.lanes)
        def _(at):
            at = pl.ds(pl.multiple_of(at, size.lanes), size.lanes)
            d_q[at] = d_rows[:, at].T.astype(d_q.dtype)

    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(b, size.parts, size.tiles * size.pieces),
            in_specs=[
                spec.mine, spec.following, Rows(spec.rows, spec.rows, spec.lanes, spec.lanes),
                anywhere, anywhere,
            ],
            out_specs=[spec.rows, anywhere],
            scratch_shapes=[
                pltpu.VMEM((size.rows, r), blocks.dtype), f32((r, size.rows)),
                f32((2, size.unroll * j, r)), f32((size.unroll * j, r)),
                pltpu.SemaphoreType.DMA, pltpu.SemaphoreType.DMA, *scratch(size, blocks),
            ],
        ),
        out_shape=[jax.ShapeDtypeStruct(x.query.shape, x.query.dtype), d_store],
        input_output_aliases={4 + len(x): 1},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM
        ),
        interpret=interpret,
        name="select_grads",
    )(
        jnp.reshape(layer, 1), table, table, x, blocks, jnp.zeros(d_store.shape, d_store.dtype)
    )
