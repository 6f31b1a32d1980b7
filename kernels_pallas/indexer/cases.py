"""Named shapes of the indexer: (call, arguments, needed FLOPs, scores of the dense reference)."""

import functools

import jax
import jax.numpy as jnp

from kernels_pallas.aot import Case
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


def _abstract(*, m, c, g, i, k, layers, dtype=jnp.bfloat16):
    number = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)  # noqa: E731
    args = (
        jax.ShapeDtypeStruct((1, m, i), dtype), jax.ShapeDtypeStruct((layers, 1, c, g, i), dtype),
        number(), number(1, c), number(1, c), number(1, m), number(1, m),
    )
    return functools.partial(top_blocks, k=k, impl="pallas"), args


def _compiled(tags: str, **dims) -> Case:
    """Of a tile of 512 blocks and 128 queries: scores, and one turn of the search."""
    g, i = dims["g"], dims["i"]
    make = functools.partial(_abstract, **dims)
    return Case(make, frozenset(tags.split()), f"{g}x{i}", 512 * 128 * g * i, 512 * (2 * g * i + 8))


AOT = {
    ("64 of 16,384", "pallas"): _compiled(
        "ci bench k2", m=16384, c=16384, g=2, i=128, k=64, layers=4
    ),
    ("8 of 65,536", "pallas"): _compiled("ci bench", m=32768, c=65536, g=2, i=32, k=8, layers=1),
    ("8 of 65,536, one token", "pallas"): _compiled(
        "bench", m=1, c=65536, g=2, i=32, k=8, layers=1
    ),
}
