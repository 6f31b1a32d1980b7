"""The definition: a row's pages one behind the other, then dense attention; float32."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas.attention import Keys
from kernels_pallas.attention import ref as attention
from kernels_pallas.partial import Partial


class Places(NamedTuple):
    """Where keys are: b s."""

    pos: jax.Array
    seg: jax.Array


def places(pages, table) -> Places:
    """Of the tokens of each row's pages, one behind the other."""
    seg = jnp.where((table < 0)[..., None], -1, pages.seg[jnp.maximum(table, 0)])
    return Places(*map(_flat, (pages.pos[jnp.maximum(table, 0)], seg)))


def gathered(pages, layer, table, dtype) -> Keys:
    """The pages of each row as keys of one head, which every query head reads."""
    row = jnp.maximum(table, 0)
    latent = pages.latent[layer, row]
    if pages.scale is not None:
        latent = latent.astype(jnp.float32) * pages.scale[layer, row][..., None]
    latent = _flat(latent).astype(dtype)[:, :, None]
    rope = None if pages.rope is None else _flat(unpair(pages.rope[layer, row])).astype(dtype)
    return Keys(latent, latent, rope, *places(pages, table))


def _flat(x: jax.Array) -> jax.Array:
    """b n j ... -> b n*j ..."""
    return x.reshape(x.shape[0], -1, *x.shape[3:])


def unpair(rope: jax.Array) -> jax.Array:
    """`pair` undone: ... j/2 2p -> ... j p."""
    *lead, rows, width = rope.shape
    halves = rope.reshape(*lead, rows // 128, 128, 2, width // 2)
    return jnp.moveaxis(halves, -2, -3).reshape(*lead, 2 * rows, width // 2)


def decode(q, pages, layer, table, *, scale: float) -> Partial:
    """Attention to all pages of a row."""
    return attention.attention(q, gathered(pages, layer, table, jnp.float32), scale=scale)
