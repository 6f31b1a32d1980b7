"""Chosen blocks gathered, then one small dense attention per tile. Memory: m k j r per piece."""

import jax
import jax.numpy as jnp

from kernels_pallas.attention.xla import contract
from kernels_pallas.int8 import widen
from kernels_pallas.partial import Partial, from_logits

PIECE = 128  # tiles gathered at a time: bounds the gathered copy of the latents


def select(q, blocks, layer, ids, *, scale: float, token_scale=None) -> Partial:
    """The op's xla form. See the package docstring for the contract."""
    b, m = ids.shape[:2]
    if m <= PIECE:
        return _select(q, blocks, layer, ids, scale, token_scale)
    pad = -m % PIECE
    cut = lambda x, fill: jnp.moveaxis(  # noqa: E731
        jnp.pad(x, ((0, 0), (0, pad)) + ((0, 0),) * (x.ndim - 2), constant_values=fill)
        .reshape(b, -1, PIECE, *x.shape[2:]), 1, 0,
    )
    pieces = jax.lax.map(
        lambda xs: _select(xs[0], blocks, layer, xs[1], scale, token_scale),
        (cut(q, 0), cut(ids, -1)),
    )
    join = lambda x: jnp.moveaxis(x, 0, 1).reshape(b, m + pad, *x.shape[3:])[:, :m]  # noqa: E731
    return Partial(*(join(x) for x in pieces))


def _select(q, blocks, layer, ids, scale, token_scale) -> Partial:
    b, m, t, h, r = q.shape
    k, j = ids.shape[-1], blocks.shape[3]
    row = jnp.arange(b)[:, None, None]

    def chosen(stack):
        return stack.at[layer, row, jnp.maximum(ids, 0)].get(mode="promise_in_bounds")

    latents = chosen(blocks)
    if token_scale is not None:
        latents = widen(latents, chosen(token_scale), q.dtype)
    latents = latents.reshape(b, m, k * j, r)
    # Heads fold into rows: [t*h, r] x [r, k*j] is one well-shaped product per tile.
    logits = contract("bmir,bmsr->bmis", q.reshape(b, m, t * h, r) * scale, latents)
    seen = jnp.repeat(ids >= 0, j, axis=-1)[:, :, None, :]
    p = from_logits(
        logits, seen, lambda w: contract("bmis,bmsr->bmir", w.astype(latents.dtype), latents)
    )
    return Partial(*(x.reshape(b, m, t, h, *x.shape[3:]) for x in p))
