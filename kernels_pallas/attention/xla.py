"""Blockwise attention in plain XLA: linear memory, forward and backward, on any device.

Query tiles x key tiles. A pair of tiles is skipped when the positions say that no query of the
one can see a key of the other: data decides, so any order of the sequence works, and an ordered
one costs half. The backward recomputes the probabilities of a tile pair from lse:

    P = exp(S - lse),  dV = P^T dO,  dS = P * (dO V^T - delta),  delta = sum(dO * O) - d_lse

Heads of one KV head are folded into rows, so that a product is [rows*heads, n] x [n, keys].
"""

import functools

import jax
import jax.numpy as jnp

from kernels_pallas.attention.ref import visible
from kernels_pallas.partial import Partial, empty, from_logits, merge

TILE_Q, TILE_K = 512, 512
FAR = jnp.iinfo(jnp.int32).max


def contract(eqn, a, b):
    """einsum with a float32 result; float32 inputs are multiplied in float32 on every device."""
    exact = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.einsum(eqn, a, b, precision=exact, preferred_element_type=jnp.float32)


def attention(q, kv, *, scale: float) -> Partial:
    """The op's xla form. See the package docstring for the contract."""
    return Partial(*_attention(q, kv, scale))


def _tile(x, size, axis, fill=0):
    """Pad `axis` to a multiple of size and split it; the tile index becomes the leading axis."""
    pad = -x.shape[axis] % size
    widths = [(0, pad if a == axis else 0) for a in range(x.ndim)]
    x = jnp.pad(x, widths, constant_values=fill)
    x = x.reshape(*x.shape[:axis], -1, size, *x.shape[axis + 1 :])
    return jnp.moveaxis(x, axis, 0)


def _tiles(group, size):
    """A Queries or Keys (or matching gradients) cut along its sequence; pads have segment -1."""
    return jax.tree.map(lambda x: _tile(x, size, 1), group._replace(seg=group.seg + 1))


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


def _logits(q, kv, scale):
    """Scaled float32 logits b g t i s, and their mask."""
    b, t, h, _ = q.nope.shape
    g = kv.key.shape[2]
    query, key = q.nope, kv.key
    if q.rope is not None:  # one product: to add two would pass the largest array once more
        shared = jnp.broadcast_to(kv.rope[:, :, None], (*key.shape[:3], kv.rope.shape[-1]))
        query = jnp.concatenate([query, q.rope.astype(query.dtype)], -1)
        key = jnp.concatenate([key, shared.astype(key.dtype)], -1)
    query = query.reshape(b, t, g, h // g, -1) * scale
    return contract("btgin,bsgn->bgtis", query, key), visible(q, kv)[:, None, :, None, :]


def _pair(q, kv, scale) -> Partial:
    """One tile of queries against one tile of keys."""
    b, t, h, _ = q.nope.shape
    logits, seen = _logits(q, kv, scale)
    weigh = lambda w: contract("bgtis,bsgv->bgtiv", w.astype(kv.value.dtype), kv.value)  # noqa: E731
    p = from_logits(logits, seen, weigh)
    return Partial(*(jnp.moveaxis(x, 1, 2).reshape(b, t, h, *x.shape[4:]) for x in p))


def _forward(q, kv, scale) -> Partial:
    b, t, h, _ = q.nope.shape
    if t <= TILE_Q and kv.pos.shape[1] <= TILE_K:
        return _pair(q, kv, scale)
    k_tiles = _tiles(kv, TILE_K)

    def per_query_tile(q_tile):
        q_tile = q_tile._replace(seg=q_tile.seg - 1)

        def step(acc, k_tile):
            k_tile = k_tile._replace(seg=k_tile.seg - 1)
            use = lambda: merge(acc, _pair(q_tile, k_tile, scale))  # noqa: E731
            return jax.lax.cond(overlap(q_tile, k_tile), use, lambda: acc), None

        start = empty((b, q_tile.pos.shape[1], h), kv.value.shape[-1])
        return jax.lax.scan(step, start, k_tiles)[0]

    out = jax.lax.map(per_query_tile, _tiles(q, min(TILE_Q, t)))
    return Partial(*(_untile(x, t) for x in out))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _attention(q, kv, scale):
    return _forward(q, kv, scale)


def _fwd(q, kv, scale):
    # Under a scan over layers, jax would compute what positions alone decide once for all of them:
    # the masks of all tile pairs, kept in memory. The barrier ties them to the layer.
    p = _forward(*jax.lax.optimization_barrier((q, kv)), scale)
    return p, (q, kv, p.out, p.lse)


def _pair_bwd(q, kv, lse, d_out, delta, scale):
    """Gradients of one tile pair: (d_nope, d_rope, d_key, d_value, d_k_rope)."""
    b, t, h, n = q.nope.shape
    g = kv.key.shape[2]
    fold = lambda x: jnp.moveaxis(x.reshape(b, t, g, h // g, *x.shape[3:]), 1, 2)  # noqa: E731
    unfold = lambda x: jnp.moveaxis(x, 1, 2).reshape(b, t, h, -1)  # noqa: E731
    logits, seen = _logits(q, kv, scale)
    row = fold(lse)[..., None]
    p = jnp.where(seen, jnp.exp(logits - jnp.where(jnp.isneginf(row), 0.0, row)), 0.0)
    d_o = fold(d_out)
    d_value = contract("bgtis,bgtiv->bsgv", p, d_o)
    d_p = contract("bgtiv,bsgv->bgtis", d_o, kv.value.astype(jnp.float32))
    d_s = p * (d_p - fold(delta)[..., None]) * scale
    d_nope = unfold(contract("bgtis,bsgn->bgtin", d_s, kv.key.astype(jnp.float32)))
    d_key = contract("bgtis,bgtin->bsgn", d_s, fold(q.nope.astype(jnp.float32)))
    if q.rope is None:
        return d_nope, None, d_key, d_value, None
    d_rope = unfold(contract("bgtis,bsp->bgtip", d_s, kv.rope.astype(jnp.float32)))
    d_k_rope = contract("bgtis,bgtip->bsp", d_s, fold(q.rope.astype(jnp.float32)))
    return d_nope, d_rope, d_key, d_value, d_k_rope


def _bwd(scale, residuals, cotangent):
    q, kv, out, lse = residuals
    d_out, d_lse, _ = cotangent
    # An empty row's lse is -inf whatever the inputs: its cotangent must not come in as NaN or inf.
    d_lse = jnp.where(jnp.isneginf(lse), 0.0, d_lse)
    delta = jnp.sum(out * d_out, -1) - d_lse
    grads = attention_grads(q, kv, lse, d_out, delta, scale=scale)
    d_nope, d_rope, d_key, d_value, d_k_rope = grads
    cast = lambda x, like: None if like is None else x.astype(like.dtype)  # noqa: E731
    # None: positions and segments are integers, they have no gradient.
    no_data = {"pos": None, "seg": None}
    d_q = q._replace(nope=cast(d_nope, q.nope), rope=cast(d_rope, q.rope), since=None, **no_data)
    d_kv = kv._replace(
        key=cast(d_key, kv.key), value=cast(d_value, kv.value), rope=cast(d_k_rope, kv.rope),
        **no_data,
    )
    return d_q, d_kv


def attention_grads(q, kv, lse, d_out, delta, *, scale: float):
    """The op's xla form. See the package docstring for the contract."""
    t, s = q.pos.shape[1], kv.pos.shape[1]
    whole = t <= TILE_Q and s <= TILE_K
    return (_pair_bwd if whole else _blockwise_bwd)(q, kv, lse, d_out, delta, scale)


def _blockwise_bwd(q, kv, lse, d_out, delta, scale):
    """Key tiles outside, query tiles inside; the query gradient is carried whole."""
    t, s = q.pos.shape[1], kv.pos.shape[1]
    tile_q = min(TILE_Q, t)
    q_tiles = _tiles(q, tile_q)
    rows = tuple(_tile(x, tile_q, 1) for x in (lse, d_out, delta))
    zeros = lambda x: None if x is None else jnp.zeros(x.shape, jnp.float32)  # noqa: E731

    def per_key_tile(d_q, k_tile):
        k_tile = k_tile._replace(seg=k_tile.seg - 1)

        def step(d_kv, xs):
            q_tile, (lse_t, d_out_t, delta_t), d_q_tile = xs
            q_tile = q_tile._replace(seg=q_tile.seg - 1)

            def use():
                d = _pair_bwd(q_tile, k_tile, lse_t, d_out_t, delta_t, scale)
                return jax.tree.map(jnp.add, (d_q_tile, d_kv), (d[:2], d[2:]))

            d_q_new, d_kv = jax.lax.cond(
                overlap(q_tile, k_tile), use, lambda: (d_q_tile, d_kv)
            )
            return d_kv, d_q_new

        start = (zeros(k_tile.key), zeros(k_tile.value), zeros(k_tile.rope))
        d_kv, d_q = jax.lax.scan(step, start, (q_tiles, rows, d_q))
        return d_q, d_kv

    start = (zeros(q_tiles.nope), zeros(q_tiles.rope))
    d_q, d_kv = jax.lax.scan(per_key_tile, start, _tiles(kv, TILE_K))
    back = lambda x, length: None if x is None else _untile(x, length)  # noqa: E731
    return *(back(x, t) for x in d_q), *(back(x, s) for x in d_kv)


_attention.defvjp(_fwd, _bwd)
