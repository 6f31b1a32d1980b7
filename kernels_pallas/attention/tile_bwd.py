"""What the backward kernels of a TPU share: one schedule for five products, and where dQ goes.

With keys down and queries across, as in tile.py:

    P^T = 2^(S^T - lse)           dV  = P^T dO             dP^T = V dO^T
    dS^T = P^T * (dP^T - delta)   dK  = dS^T Q             dQ^T = K^T dS^T

Five products where a pass for keys and another for queries need seven. A block of keys stays while
the blocks of queries come by; dK and dV are summed in VMEM. dQ^T is summed in HBM: its block is
read while the step computes and written while the next does, two small transfers beside work that
takes ten times as long.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.attention.tile import (
    LOG2E,
    SUB,
    Blocks,
    Scalars,
    blocks_for,
    by_pieces,
    columns,
    decide,
    dot,
    pad,
    queries_at,
    scores,
    visible,
)
from kernels_pallas.attention.tpu import asked_of
from kernels_pallas.partial import MASKED

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


def beside(parts: tuple, rows):
    """Some rows of both parts of queries or keys, or of the only one."""
    return jnp.concatenate([x[rows] for x in parts if x is not None], 1)


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
        # Both parts at once, as a unit may be 256 wide.
        d_key = dot(d_s, beside(q.down, at), (1, 0))
        n = k.key[0].shape[1]
        sums.key[rows] += d_key[:, :n]
        if sums.rope is not None:
            sums.rope[rows] += d_key[:, n:]
        d_query[:, at] += dot(beside(k.key, rows), d_s, (0, 0))

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
    """dQ^T of a head on its way between HBM and VMEM; scratch."""

    hbm: jax.Array  # n+p t
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


def visit(
    known: Scalars, block_q, block_k, within, q: Query, k: Key, sums: Sums, transfer: Transfer,
    blocks: Blocks,
) -> None:
    """All that a block of queries and one of keys give to one another, if there is such a pair.

    block_q  the first block of the row, and the one of the row
    """
    first, i = block_q
    decision = decide(known, first + i, block_k, within)

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

            by_pieces(known, first + i, block_k, blocks, lambda key: None, use)

        transfer.end(i, mine, sums)


class Asked(NamedTuple):
    """What does not change from one set of keys to the next."""

    query: Query  # arrays of all blocks
    tokens: int
    scale: float


def ask(q, lse, d_out, delta, *, scale: float, block_q: int) -> Asked:
    """`Backward.ask`, by the size of a block."""
    blocks = blocks_for(q.pos.shape[1], 1, block_q, SUB, q.nope.dtype)  # of queries alone
    refs = asked_of(q, scale, blocks)
    query = _queries(refs, queries_at(q, blocks), lse, d_out, delta, q.nope.dtype, blocks)
    return Asked(query, q.pos.shape[1], scale)


def nothing(asked: Asked) -> jax.Array:
    """dQ^T b h n+p t, empty."""
    b, h, n, t = asked.query.across[0].shape
    rope = asked.query.across[1]
    return jnp.zeros((b, h, n + (0 if rope is None else rope.shape[2]), t), jnp.float32)


def _queries(q_refs, q_where, lse, d_out, delta, dtype, blocks: Blocks) -> Query:
    row = lambda x: pad(jnp.moveaxis(x, 1, 2), blocks.q, 2)[:, :, None]  # noqa: E731
    turn = lambda x: x.swapaxes(2, 3)  # noqa: E731
    d_across = pad(jnp.moveaxis(d_out.astype(dtype), 1, 3), blocks.q, 3)
    return Query(
        q_refs, jax.tree.map(turn, q_refs), d_across, turn(d_across),
        row(jnp.where(jnp.isneginf(lse), -MASKED, lse * LOG2E)), row(delta), q_where,
    )


def query_specs(q: Query, blocks: Blocks, spec: Callable) -> Query:
    """Blocks of queries: spec(shape, (row, head, block of queries) -> index)."""
    across = lambda n: spec((None, None, n, blocks.q), lambda b, h, i: (b, h, 0, i))  # noqa: E731
    down = lambda n: spec((None, None, blocks.q, n), lambda b, h, i: (b, h, i, 0))  # noqa: E731
    sizes = tuple(x.shape[2] for x in jax.tree.leaves(q.across))
    wide, tall = (tuple(map(f, sizes)) + (None,) * (2 - len(sizes)) for f in (across, down))
    v = q.d_across.shape[2]
    return Query(
        wide, tall, across(v), down(v), across(1), across(1),
        spec((None, 3, blocks.q), lambda b, h, i: (b, 0, i)),
    )


def of_queries(asked: Asked, d_query) -> tuple[jax.Array, jax.Array | None]:
    """dQ^T b h n+p t' -> its two parts b t h n and b t h p (None without)."""
    n = asked.query.across[0].shape[2]
    d_query = jnp.moveaxis(d_query, 3, 1)[:, : asked.tokens] * asked.scale
    return d_query[..., :n], d_query[..., n:] if d_query.shape[-1] > n else None


def query_scratch(n: int, p: int, blocks: Blocks) -> list:
    """Of Sums: query and before; of Transfer all but the place in HBM."""
    return [
        pltpu.VMEM((2, n + p, blocks.q), jnp.float32), pltpu.VMEM((n + p, blocks.q), jnp.float32),
        pltpu.SMEM((2,), jnp.int32), pltpu.SemaphoreType.DMA, pltpu.SemaphoreType.DMA,
    ]
