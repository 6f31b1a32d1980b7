"""Latents in 8 bits with a float32 scale for each token: the largest of its numbers over 127.

    q = round(x / scale),  |q scale - x| <= scale / 2
"""

import jax
import jax.numpy as jnp

LEVELS = 127  # on either side of zero
LANE = 128  # of a TPU


@jax.custom_jvp
def narrow(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Tokens ... r -> (int8 ... r, float32 scale ...). A token of zeros has scale 0.

    No gradient: asking for one raises.
    """
    x = x.astype(jnp.float32)
    scale = jnp.abs(x).max(-1) / LEVELS
    steps = x / jnp.where(scale > 0, scale, 1.0)[..., None]
    return jnp.round(steps).astype(jnp.int8), scale


@narrow.defjvp
def _no_gradient(primals, tangents):
    raise NotImplementedError("rounding to int8 has no gradient: train with a cache of floats")


def widen(x: jax.Array, scale: jax.Array | None, dtype: jnp.dtype) -> jax.Array:
    """What `narrow` gave as numbers ... r of a dtype, rounded once. scale None: x is no int8."""
    if scale is None:
        return x.astype(dtype)
    return (x.astype(jnp.float32) * scale[..., None]).astype(dtype)


def widen_in_kernel(x: jax.Array, scale: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """`widen` of tokens n r whose scales lie in lanes, 1 n, as a kernel of a TPU loads them."""
    n, r = x.shape
    wide = jnp.broadcast_to(scale, (LANE, n)).T
    wide = jnp.concatenate([wide] * (-(-r // LANE)), 1)
    return (x.astype(jnp.float32) * wide[:, :r]).astype(dtype)


def check(op: str, x: jax.Array, scale: jax.Array | None) -> None:
    """ValueError: int8 without a scale for each token, or a scale of what is no int8."""
    want = x.shape[:-1] if x.dtype == jnp.int8 else None
    have = None if scale is None else scale.shape
    if have != want:
        raise ValueError(
            f"{op}: {x.dtype} latents {x.shape} have scales {have}, want {want}: int8 has one for "
            "each token, others have none"
        )
