"""Named shapes of kda: (call, arguments, needed FLOPs, logits of the reference: none)."""

import functools

import jax
import jax.numpy as jnp

from kernels_pallas.aot import Case
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


def _abstract(*, h, k, v, t=65536, dtype=jnp.bfloat16, gradient=False):
    like = lambda *shape, dtype=jnp.float32: jax.ShapeDtypeStruct(shape, dtype)  # noqa: E731
    args = (
        like(1, t, h, k, dtype=dtype), like(1, t, h, k, dtype=dtype), like(1, t, h, v, dtype=dtype),
        like(1, t, h, k), like(1, t, h), like(1, h, k, v), like(1, t, dtype=bool),
    )
    call = functools.partial(kda, impl="pallas")

    def total(*args):
        out, state = call(*args)
        return out.sum() + state.sum()

    return (jax.grad(total, tuple(range(6))) if gradient else call), args


def _compiled(dims: dict, tags: str, gradient: bool = False) -> Case:
    """The block is a step of the grid: a chunk of 64 tokens, of 4 heads forward and 2 backward.

    A chunk and head have three products with the state and four of tokens with tokens; one of
    float32 is six of bfloat16, and a gradient computes the chunk again and has twice as many.
    """
    k, v, c = dims["k"], dims["v"], 64
    macs = 6 * c * (3 * k * v + 2 * c * (k + v)) * (3 * 2 if gradient else 4)
    token = 2 * (2 * k + v) + 4 * k + 4 * v + 4  # q, k, v; g, out or its cotangent, beta
    grown = 2 * (2 * k + v) + 4 * k + 4  # gradients in the dtypes of what they are of
    moved = 2 * (c * (token + grown) + 4 * k * v) if gradient else 4 * c * token
    return Case(
        functools.partial(_abstract, **dims, gradient=gradient), frozenset(tags.split()),
        f"{k}/{v}", macs, moved, kernel="kda_grads" if gradient else "kda",
    )


KIMI_LINEAR = {"h": 32, "k": 128, "v": 128}
AOT = {
    ("32 heads of 128", "pallas"): _compiled(KIMI_LINEAR, "ci bench k2"),
    ("32 heads of 128 gradients", "pallas"): _compiled(KIMI_LINEAR, "ci bench k2", True),
    ("8 heads of 64", "pallas"): _compiled({"h": 8, "k": 64, "v": 64}, ""),
}
