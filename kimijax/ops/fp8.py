"""Matrices in 8 bits, in our order of axes."""

import jax
import jax.numpy as jnp

from kimijax.config import FP8_BLOCK


def expand(codes: jax.Array, scale: jax.Array) -> jax.Array:
    """codes * scale, float32 of the shape of the codes: every product is rounded once.

    codes  inputs... outputs...   float8_e4m3fn
    scale  blocks outputs...   one for FP8_BLOCK inputs, counted over all of their dims
    """
    flat = codes.reshape(-1, *scale.shape[1:]).astype(jnp.float32)
    return (flat * jnp.repeat(scale, FP8_BLOCK, 0)[: len(flat)]).reshape(codes.shape)
