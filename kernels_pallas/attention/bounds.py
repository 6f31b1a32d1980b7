"""What positions and segments of whole blocks say: which pairs see nothing, which see everything.

A kernel decides by a block's extremes, not by a mask: memory grows with the number of blocks, and
any order of the sequence works (one in order costs half). Extremes are of live queries and keys,
those that are no padding and, for keys, written.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

FAR = jnp.iinfo(jnp.int32).max  # the position of an unwritten key


class QueryBounds(NamedTuple):
    """Of a block of queries, int32."""

    first: jax.Array  # least position
    last: jax.Array
    reach: jax.Array  # least `since`
    near: jax.Array  # greatest `since`
    low: jax.Array  # least segment
    high: jax.Array
    live: jax.Array  # 1: all are


class KeyBounds(NamedTuple):
    """Of a block of keys, int32."""

    first: jax.Array
    last: jax.Array
    low: jax.Array
    high: jax.Array
    live: jax.Array


def _least(x, live):
    return jnp.where(live, x, FAR).min(-1)


def _most(x, live):
    return jnp.where(live, x, -1).max(-1)


def query_bounds(pos, seg, since, size: int) -> QueryBounds:
    """Of blocks of `size` along the last axis, which it divides: ... t -> ... t/size."""
    pos, seg, since = (x.reshape(*x.shape[:-1], -1, size) for x in (pos, seg, since))
    live = seg >= 0
    return QueryBounds(
        _least(pos, live), _most(pos, live), _least(since, live), _most(since, live),
        _least(seg, live), _most(seg, live), live.all(-1).astype(jnp.int32),
    )


def key_bounds(pos, seg, size: int) -> KeyBounds:
    """Of blocks of `size` along the last axis, which it divides: ... s -> ... s/size."""
    pos, seg = (x.reshape(*x.shape[:-1], -1, size) for x in (pos, seg))
    live = (seg >= 0) & (pos < FAR)
    return KeyBounds(
        _least(pos, live), _most(pos, live), _least(seg, live), _most(seg, live),
        live.all(-1).astype(jnp.int32),
    )


def bounds_of(b: int, *blocks: tuple[int, int]) -> int:
    """How many numbers say it for b rows: of (blocks of queries, of keys), each pair summed up."""
    q, k = len(QueryBounds._fields), len(KeyBounds._fields)
    return b * sum(of_q * q + of_k * k for of_q, of_k in blocks)


def any_pair(q: QueryBounds, k: KeyBounds) -> jax.Array:
    """False: no query of the block sees a key of the other. True says nothing."""
    in_time = (k.first <= q.last) & (k.last >= q.reach)
    return in_time & (q.low <= k.high) & (k.low <= q.high)


def every_pair(q: QueryBounds, k: KeyBounds) -> jax.Array:
    """True: every query of the block sees every key of the other. False says nothing."""
    in_time = (k.last <= q.first) & (k.first >= q.near)
    one = (q.low == q.high) & (k.low == k.high) & (q.low == k.low)
    return in_time & one & (q.live * k.live == 1)


def pairs(q: QueryBounds, k: KeyBounds) -> jax.Array:
    """any_pair of every block of queries with every block of keys: ... m c."""
    down = jax.tree.map(lambda x: x[..., :, None], q)
    return any_pair(down, jax.tree.map(lambda x: x[..., None, :], k))


def span(pairs: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Along the last axis: the first that is true, and how many to the last that is."""
    last = pairs.shape[-1] - 1 - jnp.argmax(pairs[..., ::-1], -1)
    first = jnp.argmax(pairs, -1)
    count = jnp.where(pairs.any(-1), last - first + 1, 0)
    return first.astype(jnp.int32), count.astype(jnp.int32)
