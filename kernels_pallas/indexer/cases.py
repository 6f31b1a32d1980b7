"""Named shapes of the indexer: (call, arguments, needed FLOPs, scores of the dense reference)."""

import functools

import jax.numpy as jnp

from kernels_pallas.indexer import top_blocks


def _case(rng, *, m, c, past, g=2, i=32, k=8):
    """m queries over a store of c blocks, of which the first `past` are candidates."""
    q = jnp.asarray(rng.normal(size=(1, m, i)), jnp.float32)
    keys = jnp.asarray(rng.standard_normal(size=(1, 1, c, g, i), dtype="float32"))
    pos, zero = jnp.arange(c, dtype=jnp.int32)[None], jnp.zeros((1, c), jnp.int32)
    before = jnp.full((1, m), past, jnp.int32)
    call = functools.partial(top_blocks, k=k)
    return (
        call, (q, keys, jnp.int32(0), pos, zero, before, zero[:, :m]), 2.0 * m * past * g * i,
        m * c * g,
    )


CASES = {
    "64 groups, all of 65,536": functools.partial(_case, m=64, c=65536, past=65536),
    "64 groups, 2,048 of 65,536": functools.partial(_case, m=64, c=65536, past=2048),
    "one token, all of 65,536": functools.partial(_case, m=1, c=65536, past=65536),
}
