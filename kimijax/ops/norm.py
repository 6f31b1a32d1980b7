"""Normalisation."""

import jax
import jax.numpy as jnp


def rms(x: jax.Array, eps: float) -> jax.Array:
    """x / rms(x) over the last axis, in the dtype of x."""
    x32 = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(x32), -1, keepdims=True) + eps)
    return (x32 * scale).astype(x.dtype)


def unit(x: jax.Array, eps: float = 1e-6) -> jax.Array:
    """x / sqrt(sum(x^2) + eps) over the last axis, in float32 (fla's l2norm)."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.sum(x * x, -1, keepdims=True) + eps)
