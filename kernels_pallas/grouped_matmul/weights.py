"""Forms in which the matrices of groups are held, and one of them as numbers.

Floats are g in out. Packed forms are as checkpoints on the hub store them, outputs first.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

BLOCK = 128  # outputs x inputs that share a scale of Fp8


class Int8(NamedTuple):
    """A scale per output."""

    values: jax.Array  # g out in   int8
    scale: jax.Array  # g out


class Int4(NamedTuple):
    """4 bits, eight inputs to a word, a scale per group of inputs (32 on the hub)."""

    packed: jax.Array  # g out in/8   int32, lowest bits first, stored as value + 8
    scale: jax.Array  # g out in/group


class Fp8(NamedTuple):
    """float8_e4m3fn, a scale per square block."""

    codes: jax.Array  # g out in   uint8, its bits
    scale: jax.Array  # g ceil(out/128) ceil(in/128)   multiplied, whatever its hub name says


Packed = Int8 | Int4 | Fp8
Weights = jax.Array | Packed


def shape(weights: Weights) -> tuple[int, ...]:
    """... g in out, however they are held."""
    if not isinstance(weights, Packed):
        return weights.shape
    *lead, out, inputs = weights[0].shape
    return *lead, inputs * (8 if isinstance(weights, Int4) else 1), out


def numbers(codes: jax.Array) -> jax.Array:
    """The float32 that the bytes of float8_e4m3fn stand for."""
    return jax.lax.bitcast_convert_type(codes, jnp.float8_e4m3fn).astype(jnp.float32)


def matrix(weights: Weights, at: jax.Array | tuple, dtype: jnp.dtype) -> jax.Array:
    """The matrix in out of a group, or of (layer, group) of a stack, in a dtype."""
    match weights:
        case Int8(values=values, scale=scale):
            w = values[at].astype(jnp.float32) * scale[at].astype(jnp.float32)[:, None]
            return w.T.astype(dtype)
        case Int4(packed=packed, scale=scale):
            shifts, scale = 4 * jnp.arange(8, dtype=jnp.int32), scale[at]
            codes = (packed[at][..., None] >> shifts & 15) - 8  # out in/8 8
            codes = codes.reshape(*scale.shape, -1).astype(jnp.float32)
            w = codes * scale.astype(jnp.float32)[..., None]
            return w.reshape(w.shape[0], -1).T.astype(dtype)
        case Fp8(codes=codes, scale=scale):
            rows, columns = codes.shape[-2:]
            spread = jnp.repeat(jnp.repeat(scale[at], BLOCK, 0), BLOCK, 1)
            return (numbers(codes[at]) * spread[:rows, :columns]).T.astype(dtype)
    return weights[at].astype(dtype)
