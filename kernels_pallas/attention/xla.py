"""Blockwise attention in plain XLA: linear memory, forward and backward, on any device.

Query tiles x key tiles. A pair of tiles is skipped when the positions say that no query of the
one can see a key of the other: data decides, so any order of the sequence works, and an ordered
one costs half. The backward recomputes the probabilities of a tile pair from lse:

    P = exp(S - lse),  dV = P^T dO,  dS = P * (dO V^T - delta),  delta = sum(dO * O) - d_lse

Heads stand before the sequence, those of one KV head folded into rows, so that a product of a KV
head is [rows*heads, n] x [n, keys] and nothing is transposed within the loops.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas.attention.ref import visible
from kernels_pallas.partial import Partial, empty, from_logits, merge

TILE_Q, TILE_K = 256, 256  # they stay in the cache of a CPU
LARGEST, LOGITS = 2048, 2**27  # on a GPU: rows of a tile, and logits of a pair of tiles
FAR = jnp.iinfo(jnp.int32).max


class Rows(NamedTuple):
    """Queries of g KV heads, i each, scaled, the rotary part behind the rest."""

    query: jax.Array  # b g t i n+p
    pos: jax.Array
    seg: jax.Array
    since: jax.Array


class Columns(NamedTuple):
    """Keys, the rotary part behind the rest, and values."""

    key: jax.Array  # b g s n+p
    value: jax.Array  # b g s v
    pos: jax.Array
    seg: jax.Array


def contract(eqn, a, b):
    """einsum with a float32 result; float32 inputs are multiplied in float32 on every device."""
    exact = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.einsum(eqn, a, b, precision=exact, preferred_element_type=jnp.float32)


def _tile(x, size, axis, fill=0):
    """Pad `axis` to a multiple of size and split it; the tile index becomes the leading axis."""
    pad = -x.shape[axis] % size
    widths = [(0, pad if a == axis else 0) for a in range(x.ndim)]
    x = jnp.pad(x, widths, constant_values=fill)
    x = x.reshape(*x.shape[:axis], -1, size, *x.shape[axis + 1 :])
    return jnp.moveaxis(x, axis, 0)


def tiles(group, size):
    """A Queries or Keys cut along its sequence; pads have segment -1."""
    cut = jax.tree.map(lambda x: _tile(x, size, 1), group._replace(seg=group.seg + 1))
    return cut._replace(seg=cut.seg - 1)


def _untile(x, length):
    """The inverse of _tile on axis 1."""
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]


def overlap(q, kv) -> jax.Array:
    """Whether any query can see any key, from bounds alone; both need pos and seg, q since too."""
    q_live, k_live = q.seg >= 0, (kv.seg >= 0) & (kv.pos < FAR)
    past = jnp.where(k_live, kv.pos, FAR).min() <= jnp.where(q_live, q.pos, -1).max()
    near = jnp.where(k_live, kv.pos, -1).max() >= jnp.where(q_live, q.since, FAR).min()
    return past & near & q_live.any() & k_live.any()


def _fold(x, g):
    """b t h ... -> b g t h/g ..."""
    return jnp.moveaxis(x.reshape(*x.shape[:2], g, -1, *x.shape[3:]), 2, 1)


def _unfold(x):
    """The inverse of _fold."""
    x = jnp.moveaxis(x, 1, 2)
    return x.reshape(*x.shape[:2], -1, *x.shape[4:])


def tile_sizes(q) -> tuple[int, int]:
    """Queries and keys of a tile.

    On a GPU a pair of tiles is a dozen kernels and a condition that the host waits for: few large
    ones are seven times as fast as those that suit a CPU.
    """
    if jax.default_backend() != "gpu":
        return TILE_Q, TILE_K
    b, _, heads, _ = q.nope.shape
    size = LARGEST
    while b * heads * size**2 > LOGITS and size > TILE_Q:
        size //= 2
    return size, size


def _rows(q, g, scale) -> Rows:
    """Queries as the products want them."""
    query = q.nope
    if q.rope is not None:  # one product: to add two would pass the largest array once more
        query = jnp.concatenate([query, q.rope.astype(query.dtype)], -1)
    return Rows(_fold(query * scale, g), q.pos, q.seg, q.since)


def _columns(kv) -> Columns:
    """Keys and values as the products want them."""
    key = kv.key
    if kv.rope is not None:
        shared = jnp.broadcast_to(kv.rope[:, :, None], (*key.shape[:3], kv.rope.shape[-1]))
        key = jnp.concatenate([key, shared.astype(key.dtype)], -1)
    return Columns(jnp.moveaxis(key, 2, 1), jnp.moveaxis(kv.value, 2, 1), kv.pos, kv.seg)


def _logits(rows, columns):
    """Scaled float32 logits b g t i s, and their mask."""
    logits = contract("bgtin,bgsn->bgtis", rows.query, columns.key)
    return logits, visible(rows, columns)[:, None, :, None, :]


def _pair(rows, columns) -> Partial:
    """One tile of queries against one tile of keys, b g t i ..."""
    value = columns.value
    weigh = lambda w: contract("bgtis,bgsv->bgtiv", w.astype(value.dtype), value)  # noqa: E731
    return from_logits(*_logits(rows, columns), weigh)


def forward(q, kv, *, scale: float) -> Partial:
    """The op's xla form. See the package docstring for the contract."""
    t, g, (tile_q, tile_k) = q.nope.shape[1], kv.key.shape[2], tile_sizes(q)
    if t <= tile_q and kv.pos.shape[1] <= tile_k:
        return Partial(*map(_unfold, _pair(_rows(q, g, scale), _columns(kv))))
    columns = jax.vmap(_columns)(tiles(kv, tile_k))

    def per_query_tile(q_tile):
        rows = _rows(q_tile, g, scale)

        def step(acc, columns):
            use = lambda: merge(acc, _pair(rows, columns))  # noqa: E731
            return jax.lax.cond(overlap(rows, columns), use, lambda: acc), None

        start = empty(rows.query.shape[:4], kv.value.shape[-1])
        return Partial(*map(_unfold, jax.lax.scan(step, start, columns)[0]))

    out = jax.lax.map(per_query_tile, tiles(q, min(tile_q, t)))
    return Partial(*(_untile(x, t) for x in out))


def _pair_bwd(rows, columns, lse, d_out, delta):
    """Gradients of one tile pair: (d_query, d_key, d_value), in the shapes of Rows and Columns."""
    logits, seen = _logits(rows, columns)
    row = lse[..., None]
    p = jnp.where(seen, jnp.exp(logits - jnp.where(jnp.isneginf(row), 0.0, row)), 0.0)
    d_value = contract("bgtis,bgtiv->bgsv", p, d_out)
    d_p = contract("bgtiv,bgsv->bgtis", d_out, columns.value.astype(jnp.float32))
    d_s = p * (d_p - delta[..., None])
    d_query = contract("bgtis,bgsn->bgtin", d_s, columns.key.astype(jnp.float32))
    d_key = contract("bgtis,bgtin->bgsn", d_s, rows.query.astype(jnp.float32))
    return d_query, d_key, d_value


def grads(q, kv, lse, d_out, delta, *, scale: float):
    """The op's xla form. See the package docstring for the contract."""
    t, s, n, g = q.pos.shape[1], kv.pos.shape[1], q.nope.shape[-1], kv.key.shape[2]
    tile_q, tile_k = tile_sizes(q)
    if t <= tile_q and s <= tile_k:
        folded = (_fold(x, g) for x in (lse, d_out, delta))
        d_query, *d_kv = _pair_bwd(_rows(q, g, scale), _columns(kv), *folded)
        d_query = _unfold(d_query)
    else:
        d_query, d_kv = _blockwise_bwd(q, kv, lse, d_out, delta, scale)
    d_query = d_query * scale
    d_key, d_value = (jnp.moveaxis(x, 1, 2) for x in d_kv)
    d_kv = kv._replace(key=d_key[..., :n], value=d_value, rope=None, pos=None, seg=None)
    if q.rope is None:
        return (d_query, None), d_kv
    return (d_query[..., :n], d_query[..., n:]), d_kv._replace(rope=d_key[..., n:].sum(2))


def _blockwise_bwd(q, kv, lse, d_out, delta, scale):
    """Key tiles outside, query tiles inside; the query gradient is carried whole.

    d_query b t h ..., before the scale, and (d_key, d_value) b g s ...
    """
    t, s, g = q.pos.shape[1], kv.pos.shape[1], kv.key.shape[2]
    tile_q, tile_k = tile_sizes(q)
    tile_q = min(tile_q, t)
    rows = jax.vmap(lambda q: _rows(q, g, scale))(tiles(q, tile_q))
    along = tuple(jax.vmap(_fold, (0, None))(_tile(x, tile_q, 1), g) for x in (lse, d_out, delta))
    zeros = lambda x: jnp.zeros(x.shape, jnp.float32)  # noqa: E731

    def per_key_tile(d_query, k_tile):
        columns = _columns(k_tile)

        def step(d_kv, xs):
            rows, along, d_query = xs

            def use():
                d, *d_pair = _pair_bwd(rows, columns, *along)
                return tuple(map(jnp.add, d_kv, d_pair)), d_query + d

            return jax.lax.cond(overlap(rows, columns), use, lambda: (d_kv, d_query))

        start = zeros(columns.key), zeros(columns.value)
        d_kv, d_query = jax.lax.scan(step, start, (rows, along, d_query))
        return d_query, d_kv

    d_query, d_kv = jax.lax.scan(per_key_tile, zeros(rows.query), tiles(kv, tile_k))
    back = lambda x: jnp.moveaxis(_untile(jnp.moveaxis(x, 3, 2), s), 2, 1)  # noqa: E731
    return _untile(jax.vmap(_unfold)(d_query), t), tuple(map(back, d_kv))
