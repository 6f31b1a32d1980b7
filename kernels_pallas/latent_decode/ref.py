"""The definition: a row's pages one behind the other, then dense attention; float32."""

import jax
import jax.numpy as jnp

from kernels_pallas.attention import Keys
from kernels_pallas.attention import ref as attention
from kernels_pallas.partial import Partial


def gathered(pages, layer, table, dtype) -> Keys:
    """The pages of each row as keys of one head, which every query head reads."""
    row, none = jnp.maximum(table, 0), (table < 0)[..., None]
    flat = lambda x: x.reshape(x.shape[0], -1, *x.shape[3:])  # noqa: E731
    latent = pages.latent[layer, row].astype(jnp.float32)
    if pages.scale is not None:
        latent = latent * pages.scale[layer, row][..., None]
    latent = flat(latent).astype(dtype)[:, :, None]
    rope = None if pages.rope is None else flat(unpair(pages.rope[layer, row])).astype(dtype)
    seg = flat(jnp.where(none, -1, pages.seg[row]))
    return Keys(latent, latent, rope, flat(pages.pos[row]), seg)


def unpair(rope: jax.Array) -> jax.Array:
    """`pair` undone: ... j/2 2p -> ... j p."""
    *lead, rows, width = rope.shape
    halves = rope.reshape(*lead, rows // 128, 128, 2, width // 2)
    return jnp.moveaxis(halves, -2, -3).reshape(*lead, 2 * rows, width // 2)


def decode(q, pages, layer, table, *, scale: float) -> Partial:
    """Attention to all pages of a row."""
    return attention.attention(q, gathered(pages, layer, table, jnp.float32), scale=scale)
