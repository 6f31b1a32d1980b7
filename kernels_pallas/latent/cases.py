"""Named shapes of attention to latents, to time and to compile.

CASES: (call, arguments, needed FLOPs, logits of the dense reference); AOT: see kernels_pallas.aot.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.aot import Case
from kernels_pallas.attention import Queries
from kernels_pallas.attention.cases import query_bytes
from kernels_pallas.latent import Latents, latent_attention, latent_attention_grads, tpu, tpu_bwd


def _shapes(*, t, s, h, r, n, p, v):
    """Of nope, rope, latent, k_rope, w_uk and w_uv, one row."""
    return (1, t, h, n), (1, t, h, p), (1, s, r), (1, s, p), (r, h, n), (r, h, v)


def _case(rng, *, t, s, **dims):
    """Queries at the end of s keys, each seeing all of its past."""
    arrays = (jnp.asarray(rng.normal(size=x), jnp.float32) for x in _shapes(t=t, s=s, **dims))
    nope, rope, latent, k_rope, *up = arrays
    pos, zero = np.arange(s, dtype=np.int32)[None], np.zeros((1, s), np.int32)
    q = Queries(nope, rope, pos[:, -t:], zero[:, -t:], zero[:, -t:])
    pairs = float((pos[0, -t:] + 1).sum())
    width = dims["n"] + dims["p"] + dims["v"]
    flops = 2 * dims["h"] * (pairs * width + s * dims["r"] * (dims["n"] + dims["v"]))
    call = functools.partial(latent_attention, scale=0.1)
    return call, (q, Latents(latent, k_rope, pos, zero), tuple(up)), flops, t * s * dims["h"]


SMALL = {"h": 4, "r": 64, "n": 32, "p": 16, "v": 32}
CASES = {
    "causal 4096, 4 heads": functools.partial(_case, t=4096, s=4096, **SMALL),
    "chunk at 32K, 4 heads": functools.partial(_case, t=2048, s=32768, **SMALL),
}


def _abstract(dtype=jnp.bfloat16, **shape):
    nope, rope, latent, k_rope, *up = (
        jax.ShapeDtypeStruct(x, dtype) for x in _shapes(**shape)
    )
    where = lambda length: jax.ShapeDtypeStruct((1, length), jnp.int32)  # noqa: E731
    t, s = shape["t"], shape["s"]
    q = Queries(nope, rope, where(t), where(t), where(t))
    return q, Latents(latent, k_rope, where(s), where(s)), tuple(up)


def _forward(int8=False, **shape):
    q, kv, up = _abstract(**shape)
    if int8:
        kv = kv._replace(
            latent=jax.ShapeDtypeStruct((*kv.pos.shape, shape["r"] // 4), jnp.int32),
            scale=jax.ShapeDtypeStruct(kv.pos.shape, jnp.float32),
        )
    return functools.partial(latent_attention, scale=0.1, impl="pallas"), (q, kv, up)


def _gradients(**shape):
    """Of one set of latents, as a ring's hop asks for them."""
    q, kv, up = _abstract(**shape)
    row = jax.ShapeDtypeStruct(q.nope.shape[:3], jnp.float32)
    d_out = jax.ShapeDtypeStruct((*q.nope.shape[:3], up[1].shape[-1]), jnp.float32)
    call = functools.partial(latent_attention_grads, scale=0.1, impl="pallas")
    return call, (q, kv, up, row, d_out, row)


KIMI = {"r": 512, "n": 128, "p": 64, "v": 128}
FEW, ALL = {**KIMI, "h": 2}, {**KIMI, "h": 64}
AHEAD, AFTER = tpu.BLOCK_Q * tpu.BLOCK_K, tpu_bwd.BLOCK_Q * tpu_bwd.BLOCK_K
MOVED_AHEAD = tpu.BLOCK_K * (2 * (512 + 64) + 8)  # latents come by
MOVED_INT8 = tpu.BLOCK_K * (512 + 4 + 2 * 64 + 8)
MOVED_AFTER = tpu_bwd.BLOCK_Q * query_bytes(128, 64, 128)  # queries do
CI, BENCH, K2 = frozenset({"ci"}), frozenset({"bench"}), frozenset({"k2"})
AOT = {
    # A key and a value are needed once for 2,048 queries: more often is work, not use.
    ("192/128", "pallas"): Case(
        functools.partial(_forward, t=4096, s=4096, **FEW), BENCH, "192/128",
        AHEAD * (192 + 128) + AHEAD // 2048 * 512 * (128 + 128), MOVED_AHEAD, pairs=AHEAD,
    ),
    ("192/128, int8", "pallas"): Case(
        functools.partial(_forward, int8=True, t=4096, s=4096, **FEW), BENCH, "192/128",
        AHEAD * (192 + 128) + AHEAD // 2048 * 512 * (128 + 128), MOVED_INT8, pairs=AHEAD,
    ),
    ("192/128 gradients", "pallas"): Case(
        functools.partial(_gradients, t=4096, s=4096, **FEW), BENCH, "192/128",
        AFTER * (3 * 192 + 2 * 128), MOVED_AFTER, pairs=AFTER,
    ),
    ("ragged", "pallas"): Case(functools.partial(_forward, t=300, s=700, **FEW), CI),
    ("ragged, int8", "pallas"): Case(
        functools.partial(_forward, int8=True, t=300, s=700, **FEW), CI
    ),
    ("ragged, gradients", "pallas"): Case(functools.partial(_gradients, t=300, s=700, **FEW), CI),
    ("K2, a chunk at 2M", "pallas"): Case(functools.partial(_forward, t=4096, s=2**21, **ALL), K2),
    ("K2, a chunk at 2M, int8", "pallas"): Case(
        functools.partial(_forward, int8=True, t=4096, s=2**21, **ALL), K2
    ),
    ("K2, a hop", "pallas"): Case(functools.partial(_gradients, t=4096, s=4096, **ALL), K2),
}
