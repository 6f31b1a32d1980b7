"""Named shapes of attention, to time and to compile.

CASES: (call, arguments, needed FLOPs, logits of the dense reference); AOT: see kernels_pallas.aot.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.aot import Case
from kernels_pallas.attention import Keys, Queries, attention, attention_grads, tile, tpu, tpu_bwd


def _case(rng, *, b, t, s, h, g, n, v, reach):
    """Queries at the end of s keys, each seeing `reach` of them (None: all of its past)."""

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    pos = np.tile(np.arange(s, dtype=np.int32), (b, 1))
    seg = np.zeros_like(pos)
    since = np.maximum(pos - reach + 1, 0) if reach else np.zeros_like(pos)
    q = Queries(normal(b, t, h, n), None, pos[:, -t:], seg[:, -t:], since[:, -t:])
    kv = Keys(normal(b, s, g, n), normal(b, s, g, v), None, pos, seg)
    pairs = b * float((pos[0, -t:] - since[0, -t:] + 1).sum())
    call = functools.partial(attention, scale=n**-0.5)
    return call, (q, kv), 2 * pairs * h * (n + v), b * t * s * h


CASES = {
    "window tiles 64x96": functools.partial(
        _case, b=64, t=64, s=96, h=4, g=1, n=32, v=32, reach=32
    ),
    "local tiles of latents": functools.partial(
        _case, b=64, t=64, s=96, h=2, g=1, n=64, v=64, reach=64
    ),
    "causal 4096, 8 heads": functools.partial(
        _case, b=1, t=4096, s=4096, h=8, g=8, n=64, v=64, reach=None
    ),
    "latents, chunk at 32K": functools.partial(
        _case, b=1, t=4096, s=32768, h=2, g=1, n=64, v=64, reach=None
    ),
}


def _abstract(*, t, s, h, g, n, p, v, dtype=jnp.bfloat16):
    """A row of t queries and s keys, shapes only."""
    array = lambda *shape: jax.ShapeDtypeStruct((1, *shape), dtype)  # noqa: E731
    where = lambda length: jax.ShapeDtypeStruct((1, length), jnp.int32)  # noqa: E731
    q = Queries(array(t, h, n), array(t, h, p) if p else None, where(t), where(t), where(t))
    return q, Keys(array(s, g, n), array(s, g, v), array(s, p) if p else None, where(s), where(s))


def _forward(**shape):
    return functools.partial(attention, scale=0.1, impl="pallas"), _abstract(**shape)


def _gradients(**shape):
    """Of one set of keys, as a ring's hop asks for them."""
    q, kv = _abstract(**shape)
    b, t, h, _ = q.nope.shape
    row = jax.ShapeDtypeStruct((b, t, h), jnp.float32)
    d_out = jax.ShapeDtypeStruct((b, t, h, kv.value.shape[-1]), jnp.float32)
    call = functools.partial(attention_grads, scale=0.1, impl="pallas")
    return call, (q, kv, row, d_out, row)


def key_bytes(n: int, p: int, v: int) -> int:
    """That a key brings, bfloat16, with its value, position and segment."""
    return 2 * (n + p + v) + 8


def query_bytes(n: int, p: int, v: int) -> int:
    """That a query brings and takes backward: it and its cotangent in both orders, lse, delta and
    positions; its gradient, float32, is read and written."""
    return 4 * (n + p + v) + 8 * (n + p) + 20


def _aot(n, p, v) -> dict:
    """Forward and gradients of two heads at 4096 tokens, of blocks seen whole and in part.

    Forward a block of queries stays and keys come by, backward the other way about.
    """
    shape = {"t": 4096, "s": 4096, "h": 2, "g": 2, "n": n, "p": p, "v": v}
    dims, piece, tags = f"{n + p}/{v}", tile.PIECE**2, frozenset({"bench"})
    found = {}
    for what, make, whole, products, moved in (
        ("", _forward, tpu.BLOCK_Q * tpu.BLOCK_K, n + p + v, key_bytes(n, p, v) / tpu.BLOCK_Q),
        (" gradients", _gradients, tpu_bwd.BLOCK_Q * tpu_bwd.BLOCK_K, 3 * (n + p) + 2 * v,
         query_bytes(n, p, v) / tpu_bwd.BLOCK_K),
    ):
        for part, pairs in (("", whole), (" masked", piece)):
            found[f"{dims}{what}{part}", "pallas"] = Case(
                functools.partial(make, **shape), tags, dims, pairs * products, pairs * moved,
                pairs=pairs, largest=pairs > piece,
            )
    return found


# Causal, to time on a GPU, of which two heads would leave most idle (gpu_peers.py).
GPU = {
    f"{128 + p}/128, {t} tokens": {"t": t, "h": 16, "n": 128, "p": p, "v": 128}
    for p in (0, 64) for t in (4096, 16384)
}
SMALL = {"t": 300, "s": 700, "h": 4, "g": 2, "n": 128, "p": 64, "v": 128}
LONG = {"t": 2**21, "s": 2**21, "h": 1, "g": 1, "n": 128, "p": 64, "v": 128}
ABSORBED = {"t": 2048, "s": 8192, "h": 16, "g": 1, "n": 512, "p": 64, "v": 512}
CI, K2 = frozenset({"ci"}), frozenset({"k2"})
AOT = {
    **_aot(128, 0, 128), **_aot(128, 64, 128),
    ("grouped, ragged", "pallas"): Case(functools.partial(_forward, **SMALL), CI),
    ("grouped, ragged, gradients", "pallas"): Case(functools.partial(_gradients, **SMALL), CI),
    ("float32, ragged", "pallas"): Case(
        functools.partial(_forward, **SMALL | {"dtype": jnp.float32}), CI
    ),
    ("2M tokens", "pallas"): Case(functools.partial(_forward, **LONG), K2),
    ("2M tokens, gradients", "pallas"): Case(functools.partial(_gradients, **LONG), K2),
    ("absorbed", "pallas"): Case(functools.partial(_forward, **ABSORBED), K2),
}
