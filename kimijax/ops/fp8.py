"""Matrices in 8 bits: the bits of float8_e4m3fn, held as bytes.

XLA for a CPU has no 8-bit floats: it reads them from a stack of layers by way of a float16 copy of
the whole stack, made anew in every call. Bytes it slices as they lie.
"""

import jax
import jax.numpy as jnp

from kernels_pallas.grouped_matmul import numbers
from kimijax.config import FP8_BLOCK


def expand(codes: jax.Array, scale: jax.Array) -> jax.Array:
    """numbers * scale, float32 of the shape of the codes: every product is rounded once.

    codes  inputs... outputs...   uint8
    scale  blocks outputs...   one for FP8_BLOCK inputs, counted over all of their dims
    """
    flat = numbers(codes).reshape(-1, *scale.shape[1:])
    return (flat * jnp.repeat(scale, FP8_BLOCK, 0)[: len(flat)]).reshape(codes.shape)
