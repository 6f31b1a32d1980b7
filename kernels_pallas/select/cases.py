"""Named shapes of select: (call, arguments, needed FLOPs, logits of the dense reference)."""

import functools

import jax
import jax.numpy as jnp

from kernels_pallas.aot import Case
from kernels_pallas.attention import Keys, Queries, attention
from kernels_pallas.attention.cases import key_bytes, query_bytes
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


# Per tile of 64 queries, what a chip has of a row that is dealt out: all of the store, 256 tiles.
K2 = {"m": 256, "t": 64, "h": 64, "r": 512, "c": 16384, "j": 64, "k": 64}
NEEDLE = {"m": 4096, "t": 64, "h": 2, "r": 64, "c": 65536, "j": 32, "k": 8}


def _abstract(*, m, t, h, r, c, j, k, dtype=jnp.bfloat16, gradient=False):
    call = functools.partial(select, scale=r**-0.5, impl="pallas")
    args = (
        jax.ShapeDtypeStruct((1, m, t, h, r), dtype), jax.ShapeDtypeStruct((1, 1, c, j, r), dtype),
        jax.ShapeDtypeStruct((), jnp.int32), jax.ShapeDtypeStruct((1, m, k), jnp.int32),
    )
    return (_gradient(call) if gradient else call), args


def _dense(*, m, t, h, r, c, j, k, dtype=jnp.bfloat16, gradient=False):
    """`attention` to as many keys as a tile chooses, all of them seen: what select compares to."""
    def call(q, latent, pos, of_keys):
        zero = jnp.zeros_like(pos)
        kv = Keys(latent, latent, None, of_keys, jnp.zeros_like(of_keys))
        return attention(Queries(q, None, pos, zero, zero), kv, scale=r**-0.5, impl="pallas")

    pos = [jax.ShapeDtypeStruct((1, n), jnp.int32) for n in (m * t, k * j)]
    args = (
        jax.ShapeDtypeStruct((1, m * t, h, r), dtype), jax.ShapeDtypeStruct((1, k * j, 1, r), dtype)
    )
    return (_gradient(call) if gradient else call), (*args, *pos)


def _gradient(call):
    def total(*args):
        p = call(*args)
        return p.out.sum() + p.lse.sum()

    return jax.grad(total, (0, 1))


def _compiled(make, dims: dict, rows: int, keys: int, tags: str, gradient: bool = False) -> Case:
    """Of so many rows and keys of an inner block."""
    r, products = dims["r"], 5 if gradient else 2
    if make is _dense:  # keys come by and are read as values too; backward queries do
        moved = rows * query_bytes(r, 0, r) if gradient else keys * key_bytes(r, 0, r)
    else:  # chosen blocks, whose gradients are read and written
        moved = keys * r * (2 + 8 if gradient else 2)
    return Case(
        functools.partial(make, **dims, gradient=gradient), frozenset(tags.split()), f"{r}/{r}",
        rows * keys * r * products, moved, "grads" if gradient else "", pairs=rows * keys,
    )


AOT = {
    ("64 of 16,384", "pallas"): _compiled(_abstract, K2, 2048, 512, "bench k2"),
    ("64 of 16,384", "dense"): _compiled(_dense, K2, 1024, 2048, "bench"),
    ("64 of 16,384 gradients", "pallas"): _compiled(_abstract, K2, 2048, 512, "bench k2", True),
    ("64 of 16,384 gradients", "dense"): _compiled(_dense, K2, 512, 512, "bench", True),
    ("8 of 65,536", "pallas"): _compiled(_abstract, NEEDLE, 128, 256, "ci bench"),
    ("8 of 65,536 gradients", "pallas"): _compiled(_abstract, NEEDLE, 128, 256, "ci bench", True),
}
