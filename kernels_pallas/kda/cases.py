"""Named shapes of kda: (call, arguments, needed FLOPs, logits of the reference: none)."""

import functools

import jax.numpy as jnp

from kernels_pallas.kda import kda


def _case(rng, *, b, t, h, k, v):
    """Keys of unit length and decays of every strength, one document a row."""

    def normal(*shape):
        return jnp.asarray(rng.standard_normal(size=shape, dtype="float32"))

    q, key = normal(b, t, h, k), normal(b, t, h, k)
    q, key = (x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (q, key))
    beta = jnp.asarray(rng.uniform(size=(b, t, h)), jnp.float32)
    decay = -jnp.exp(normal(b, t, h, k) - 2)
    state, start = jnp.zeros((b, h, k, v), jnp.float32), jnp.zeros((b, t), bool)
    # Per token: the state decays, answers the key, takes the correction and answers the query.
    flops = 7.0 * b * t * h * k * v
    return kda, (q * k**-0.5, key, normal(b, t, h, v), decay, beta, state, start), flops, 0


CASES = {
    "2048 tokens, 8 heads of 64": functools.partial(_case, b=1, t=2048, h=8, k=64, v=64),
    "2048 tokens, 32 heads of 128": functools.partial(_case, b=1, t=2048, h=32, k=128, v=128),
    "one token, 32 heads of 128": functools.partial(_case, b=1, t=1, h=32, k=128, v=128),
}
