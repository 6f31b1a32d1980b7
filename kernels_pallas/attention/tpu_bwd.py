"""Attention over expanded heads as a TPU kernel, backward: one pass for all gradients.

With keys down and queries across, as in the forward:

    P^T = 2^(S^T - lse)           dV  = P^T dO             dP^T = V dO^T
    dS^T = P^T * (dP^T - delta)   dK  = dS^T Q             dQ^T = K^T dS^T

Five products where a pass for keys and another for queries need seven. A block of keys stays while
the blocks of queries come by; dK and dV are summed in VMEM. dQ^T is summed in HBM: its block is
read while the step computes and written while the next does, two small transfers beside work that
takes ten times as long.

VMEM, bfloat16, 192/128, 512 queries x 1024 keys: dK and dV 1.5 MiB as sums and 3 as outputs, dQ^T
3 x 0.4, queries and cotangents in both orders 2 x 0.9, keys and values 2 x 0.8: 9 MiB.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.attention.tile import (
    LOG2E,
    SUB,
    VMEM,
    Blocks,
    Scalars,
    blocks_for,
    by_pieces,
    columns,
    decide,
    dot,
    nth,
    pad,
    scalars,
    scores,
    visible,
)
from kernels_pallas.attention.tpu import inputs
from kernels_pallas.partial import MASKED

BLOCK_Q, BLOCK_K = 512, 1024
NONE = -1  # no block is being written


class Sums(NamedTuple):
    """Scratch: gradients while they grow."""

    key: jax.Array  # k n
    rope: jax.Array | None  # k p
    value: jax.Array  # k v
    query: jax.Array  # 2 n+p q   of this step, and of the one before, which is being written
    before: jax.Array  # n+p q   of the steps before, from HBM


class Query(NamedTuple):
    """References to a block of queries, in both orders."""

    across: tuple  # n q and p q (or None), times scale / ln 2
    down: tuple  # q n and q p
    d_across: jax.Array  # v q
    d_down: jax.Array  # q v
    lse: jax.Array  # 1 q   base 2; a large number for queries that saw nothing
    delta: jax.Array  # 1 q
    where: jax.Array  # 3 q


class Key(NamedTuple):
    """References to a block of keys."""

    key: tuple  # k n and k p (or None)
    value: jax.Array  # k v
    where: jax.Array  # 2 k


def add_pair(
    q: Query, k: Key, sums: Sums, d_query, lanes: int, queries: tuple, keys: tuple, masked: bool
) -> None:
    """Add what queries and keys, (first, count) of each, give to one another; one schedule."""
    groups = [pl.ds(queries[0] + c, lanes) for c in range(0, queries[1], lanes)]
    steps = [(keys[0] + i, c) for i in range(0, keys[1], SUB) for c in range(len(groups))]

    def products(at, c):
        rows, at = pl.ds(at, SUB), groups[c]
        rope = None if k.key[1] is None else k.key[1][rows]
        d_p = dot(k.value[rows], q.d_across[:, at], (1, 0))
        return scores(q.across, k.key[0][rows], rope, at), d_p

    def spend(at, c, p, d_s):
        rows, at = pl.ds(at, SUB), groups[c]
        sums.value[rows] += dot(p, q.d_down[at], (1, 0))
        sums.key[rows] += dot(d_s, q.down[0][at], (1, 0))
        n = k.key[0].shape[1]
        d_query[:n, at] += dot(k.key[0][rows], d_s, (0, 0))
        if sums.rope is not None:
            sums.rope[rows] += dot(d_s, q.down[1][at], (1, 0))
            d_query[n:, at] += dot(k.key[1][rows], d_s, (0, 0))

    made, waiting, where = products(*steps[0]), None, None
    for n, (at, c) in enumerate(steps):
        following = products(*steps[n + 1]) if n + 1 < len(steps) else None
        (s, d_p), here = made, groups[c]
        p = jnp.exp2(s - q.lse[:, here])
        if masked:
            where = columns(k.where, at) if c == 0 else where
            p = jnp.where(visible(q.where, *where, here), p, 0.0)
        d_s = p * (d_p - q.delta[:, here])
        if waiting is not None:
            spend(*waiting)
        cast = lambda x: x.astype(k.value.dtype)  # noqa: E731
        made, waiting = following, (at, c, cast(p), cast(d_s))
    spend(*waiting)


class Transfer(NamedTuple):
    """dQ^T on its way between HBM and VMEM; scratch."""

    hbm: jax.Array  # n+p t   of a head
    state: jax.Array  # SMEM: the block that is being written, and which of two buffers is next
    reading: jax.Array  # semaphores
    writing: jax.Array

    def _copy(self, block, buffer, semaphore, back: bool):
        size = buffer.shape[1]
        there = self.hbm.at[:, pl.ds(pl.multiple_of(block * size, size), size)]
        ends = (buffer, there) if back else (there, buffer)
        return pltpu.make_async_copy(*ends, semaphore)

    def settle(self, sums: Sums) -> None:
        """Wait for what is being written, if anything is."""
        @pl.when(self.state[0] != NONE)
        def _():
            last = sums.query.at[1 - self.state[1]]
            self._copy(self.state[0], last, self.writing, True).wait()
            self.state[0] = NONE

    def begin(self, block, sums: Sums):
        """Start to read a block; the buffer to add to, which is empty."""
        self._copy(block, sums.before, self.reading, False).start()
        mine = sums.query.at[self.state[1]]
        mine[...] = jnp.zeros_like(mine)
        return mine

    def end(self, block, mine, sums: Sums) -> None:
        """Add what was there before, and start to write."""
        self._copy(block, sums.before, self.reading, False).wait()
        mine[...] += sums.before[...]
        self.settle(sums)
        self._copy(block, mine, self.writing, True).start()
        self.state[0], self.state[1] = block, 1 - self.state[1]


def _kernel(known: Scalars, q: Query, k: Key, d_q, outs, scratch, *, blocks: Blocks, queries: int):
    row, head, j, m = (pl.program_id(axis) for axis in range(4))
    sums, transfer = Sums(*scratch[:5]), Transfer(d_q.at[row, head], *scratch[5:])
    steps, block_k = pl.num_programs(3), row * pl.num_programs(2) + j
    grown = (sums.key, sums.rope, sums.value)

    @pl.when(m == 0)
    def _():
        transfer.state[0], transfer.state[1] = NONE, 0
        for x in jax.tree.leaves(grown):
            x[...] = jnp.zeros_like(x)

    within = m < known.count[block_k]
    i = jnp.where(within, known.first[block_k] + m, 0)
    decision = decide(known, row * queries + i, block_k, within)

    @pl.when(decision.whole | decision.part)
    def _():
        mine = transfer.begin(i, sums)
        add = functools.partial(add_pair, q, k, sums, mine, blocks.lanes)

        @pl.when(decision.whole)
        def _():
            add((0, blocks.q), (0, blocks.k), masked=False)

        @pl.when(decision.part)
        def _():
            def use(query, key):
                add((query, blocks.q_piece), (key, blocks.k_piece), masked=True)

            by_pieces(known, row * queries + i, block_k, blocks, lambda key: None, use)

        transfer.end(i, mine, sums)

    @pl.when(m == steps - 1)
    def _():
        transfer.settle(sums)
        for out, x in zip(jax.tree.leaves(outs), jax.tree.leaves(grown), strict=True):
            out[...] = x[...]


def grads(q, kv, lse, d_out, delta, *, scale: float, interpret: bool = False):
    """`attention_grads` of the package as a TPU kernel. See there for the contract."""
    (b, t, h, n), (s, g) = q.nope.shape, kv.key.shape[1:3]
    blocks = blocks_for(t, s, BLOCK_Q, BLOCK_K, kv.key.dtype)
    x = inputs(q, kv, scale, blocks)
    known = scalars(x.q_where, x.k_where, blocks, by_keys=True)
    row = lambda x: pad(jnp.moveaxis(x, 1, 2), blocks.q, 2)[:, :, None]  # noqa: E731
    d_across = pad(jnp.moveaxis(d_out.astype(kv.value.dtype), 1, 3), blocks.q, 3)
    turn = lambda x: x.swapaxes(2, 3)  # noqa: E731
    of_q = Query(
        x.q, jax.tree.map(turn, x.q), d_across, turn(d_across),
        row(jnp.where(jnp.isneginf(lse), -MASKED, lse * LOG2E)), row(delta), x.q_where,
    )
    d_query, d_key, d_rope, d_value = _call(of_q, Key(x.key, x.value, x.k_where), known, blocks,
                                            interpret)
    d_query = jnp.moveaxis(d_query, 3, 1)[:, :t] * scale
    of_heads = lambda x: jnp.moveaxis(  # noqa: E731
        x.reshape(b, g, h // g, *x.shape[2:]).sum(2), 1, 2
    )[:, :s]
    d_key, d_value = of_heads(d_key) / LOG2E, of_heads(d_value)
    d_kv = kv._replace(key=d_key, value=d_value, rope=None, pos=None, seg=None)
    if q.rope is None:
        return (d_query, None), d_kv
    d_rope = d_rope.sum(1)[:, :s] / LOG2E
    return (d_query[..., :n], d_query[..., n:]), d_kv._replace(rope=d_rope)


def _call(q: Query, k: Key, known: Scalars, blocks: Blocks, interpret: bool):
    """dQ^T b h n+p t, and of every head of queries d_key, d_rope (or None), d_value b h s ..."""
    (b, h, n, t), (g, s) = q.across[0].shape, k.value.shape[1:3]
    p = 0 if q.across[1] is None else q.across[1].shape[2]
    v, queries, keys = k.value.shape[3], t // blocks.q, s // blocks.k
    width = len(Scalars._fields)

    def spec(shape, index):
        def at(b, h, j, m, *known):
            return index(b, h, j, nth(Scalars(*known), b * keys + j, m))

        return pl.BlockSpec(shape, at)

    across = lambda n: spec((None, None, n, blocks.q), lambda b, h, j, i: (b, h, 0, i))  # noqa: E731
    down = lambda n: spec((None, None, blocks.q, n), lambda b, h, j, i: (b, h, i, 0))  # noqa: E731
    own = lambda n: spec(  # noqa: E731
        (None, None, blocks.k, n), lambda b, m, j, i: (b, jax.lax.div(m, h // g), j, 0)
    )
    grown = lambda n: spec((None, None, blocks.k, n), lambda b, h, j, i: (b, h, j, 0))  # noqa: E731
    shared = spec((None, blocks.k, p), lambda b, h, j, i: (b, j, 0)) if p else None
    of_q = Query(
        (across(n), across(p) if p else None), (down(n), down(p) if p else None),
        across(v), down(v), across(1), across(1),
        spec((None, 3, blocks.q), lambda b, h, j, i: (b, 0, i)),
    )
    of_k = Key((own(n), shared), own(v), spec((None, 2, blocks.k), lambda b, h, j, i: (b, 0, j)))
    f32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)  # noqa: E731
    vmem = lambda *shape: pltpu.VMEM(shape, jnp.float32)  # noqa: E731
    anywhere = pl.BlockSpec(memory_space=pl.ANY)

    def kernel(*refs):
        known, refs = Scalars(*refs[:width]), refs[width:]
        (of_q, of_k, _, d_q, *outs), scratch = refs[:7], refs[7:]
        _kernel(known, of_q, of_k, d_q, outs, scratch, blocks=blocks, queries=queries)

    call = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=width,
            grid=(b, h, keys, jnp.maximum(known.count.max(), 1)),
            in_specs=[of_q, of_k, anywhere],
            out_specs=[anywhere, grown(n), grown(p) if p else None, grown(v)],
            scratch_shapes=[
                vmem(blocks.k, n), vmem(blocks.k, p) if p else None, vmem(blocks.k, v),
                vmem(2, n + p, blocks.q), vmem(n + p, blocks.q), pltpu.SMEM((2,), jnp.int32),
                pltpu.SemaphoreType.DMA, pltpu.SemaphoreType.DMA,
            ],
        ),
        out_shape=[
            f32(b, h, n + p, t), f32(b, h, s, n), f32(b, h, s, p) if p else None, f32(b, h, s, v)
        ],
        input_output_aliases={width + len(jax.tree.leaves((q, k))): 0},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=VMEM,
        ),
        interpret=interpret,
        name="attention_grads",
    )
    return call(*known, q, k, jnp.zeros((b, h, n + p, t), jnp.float32))
