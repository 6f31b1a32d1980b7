"""Named shapes of select: (call, arguments, needed FLOPs, logits of the dense reference)."""

import functools

import jax.numpy as jnp

from kernels_pallas.select import select


def _case(rng, *, m, t, h, r, c, j, k):
    q = jnp.asarray(rng.normal(size=(1, m, t, h, r)), jnp.float32)
    blocks = jnp.asarray(rng.standard_normal(size=(1, 1, c, j, r), dtype="float32"))
    ids = jnp.asarray(rng.integers(0, c, (1, m, k)), jnp.int32)
    call = functools.partial(select, scale=r**-0.5)
    return call, (q, blocks, jnp.int32(0), ids), 4.0 * m * t * h * k * j * r, m * t * h * c * j


CASES = {
    "64 groups, 8 of 65,536 blocks": functools.partial(
        _case, m=64, t=64, h=2, r=64, c=65536, j=32, k=8
    ),
    "64 groups, 8 of 256 blocks": functools.partial(
        _case, m=64, t=64, h=2, r=64, c=256, j=32, k=8
    ),
    "one token, 8 of 65,536 blocks": functools.partial(
        _case, m=1, t=1, h=2, r=64, c=65536, j=32, k=8
    ),
}
