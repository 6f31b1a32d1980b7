"""The definition: a row's pages one behind the other, then dense attention; float32."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas.attention import Keys
from kernels_pallas.attention import ref as attention
from kernels_pallas.int8 import widen
from kernels_pallas.partial import Partial


class Places(NamedTuple):
    """Where the tokens of a page are: j."""

    pos: jax.Array
    seg: jax.Array


def places(pages, page) -> Places:
    """Of one page; -1 is none, and its tokens are padding."""
    at = jnp.maximum(page, 0)
    return Places(pages.pos[at], jnp.where(page < 0, -1, pages.seg[at]))


def keys_of(pages, layer, page, dtype) -> Keys:
    """One page as keys of one head, which every query head reads; without rows."""
    at = jnp.maximum(page, 0)
    latent = pages.latent[layer, at]
    if pages.scale is not None:
        latent = widen(latent, pages.scale[layer, at].reshape(-1), jnp.float32)
    latent = latent.astype(dtype)[:, None]
    rope = None if pages.rope is None else unpair(pages.rope[layer, at]).astype(dtype)
    return Keys(latent, latent, rope, *places(pages, page))


def unpair(rope: jax.Array) -> jax.Array:
    """`pair` undone: ... j/2 2p -> ... j p."""
    *lead, rows, width = rope.shape
    halves = rope.reshape(*lead, rows // 128, 128, 2, width // 2)
    return jnp.moveaxis(halves, -2, -3).reshape(*lead, 2 * rows, width // 2)


def decode(q, pages, layer, table, *, scale: float) -> Partial:
    """Attention to all pages of a row, one behind the other."""
    keys = jax.vmap(jax.vmap(lambda page: keys_of(pages, layer, page, jnp.float32)))(table)
    keys = jax.tree.map(lambda x: x.reshape(x.shape[0], -1, *x.shape[3:]), keys)
    return attention.attention(q, keys, scale=scale)
