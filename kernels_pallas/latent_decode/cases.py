"""Named shapes of decoding from latents, to time and to compile; and the bytes that it moves.

CASES: (call, arguments, needed FLOPs, logits of the dense reference); AOT: see kernels_pallas.aot.
"""

import functools
import math

import jax
import jax.numpy as jnp

from kernels_pallas.aot import Case
from kernels_pallas.attention import Queries
from kernels_pallas.latent_decode import Pages, latent_decode

KIMI = {"h": 64, "r": 512, "p": 64, "j": 512}


def _shapes(*, b, t, n, layers, h, r, p, j, dtype=jnp.bfloat16, int8=False):
    """Shapes and dtypes of queries, pages and table; n pages a row."""
    c, array = b * n, jax.ShapeDtypeStruct
    where = array((b, t), jnp.int32)
    q = Queries(array((b, t, h, r), dtype), array((b, t, h, p), dtype), where, where, where)
    latent, scale = array((layers, c, j, r), dtype), None
    if int8:
        latent = array((layers, c, j, r // 4), jnp.int32)
        scale = array((layers, c, j // 128, 128), jnp.float32)
    pages = Pages(
        latent, array((layers, c, j // 2, 2 * p), dtype), array((c, j), jnp.int32),
        array((c, j), jnp.int32), scale,
    )
    return q, pages, array((), jnp.int32), array((b, n), jnp.int32)


def _case(rng, **dims):
    """One row that sees all of its pages."""
    shapes = _shapes(b=1, layers=1, dtype=jnp.float32, **dims)
    q, pages, _, table = jax.tree.map(
        lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), shapes
    )
    n, j = table.shape[1], dims["j"]
    slots = jnp.arange(n * j, dtype=jnp.int32).reshape(n, j)
    q = q._replace(pos=jnp.full_like(q.pos, n * j), seg=q.seg * 0, since=q.since * 0)
    pages = pages._replace(pos=slots, seg=slots * 0)
    logits = math.prod(q.nope.shape[:3]) * n * j
    flops = 2.0 * logits * (2 * dims["r"] + dims["p"])
    call = functools.partial(latent_decode, scale=0.1)
    return call, (q, pages, jnp.int32(0), jnp.arange(n, dtype=jnp.int32)[None]), flops, logits


CASES = {
    "4 heads, 8192 tokens": functools.partial(_case, t=1, n=16, h=4, r=128, p=32, j=512),
}


def hbm_bytes(q: Queries, pages: Pages, tokens: int) -> int:
    """That a call moves when each of `tokens` tokens of the pages is seen, a page at a time.

    The sum over steps of the grid of the blocks whose index changes: every page once, queries and
    results once for each part of the table.
    """
    own = [pages.latent, pages.rope, pages.scale]
    a_token = sum(x.size * x.dtype.itemsize for x in own if x is not None) / (
        math.prod(pages.latent.shape[:3])
    ) + 2 * 4  # position and segment
    rows = math.prod(q.nope.shape[:3])
    asked = rows * (q.nope.shape[3] + 2 * q.rope.shape[3]) * q.nope.dtype.itemsize
    given = rows * (q.nope.shape[3] + 2) * 4
    return int(tokens * a_token) + 2 * (asked + given)


def _make(**dims):
    return functools.partial(latent_decode, scale=0.1, impl="pallas"), _shapes(**KIMI, **dims)


def _macs(t: int) -> int:
    """Of a page: scores and values of all heads."""
    return KIMI["j"] * t * KIMI["h"] * (2 * KIMI["r"] + KIMI["p"])


def _page(t: int, int8: bool = False) -> Case:
    """Of t queries to a page of a long cache."""
    bytes_, scale = (1, 4) if int8 else (2, 0)
    moved = KIMI["j"] * (bytes_ * KIMI["r"] + 2 * KIMI["p"] + 8 + scale)
    make = functools.partial(_make, t=t, int8=int8, **LONG)
    return Case(make, BENCH, "576/512", _macs(t), moved, pairs=KIMI["j"] * 64 * t)


LONG = {"b": 1, "n": 256, "layers": 4}  # 131,072 tokens
BENCH, CI, K2 = frozenset({"bench", "k2"}), frozenset({"ci"}), frozenset({"k2"})
AOT = {
    ("1 of 131,072", "pallas"): _page(1),
    ("4 of 131,072", "pallas"): _page(4),
    ("1 of 131,072, int8", "pallas"): _page(1, int8=True),
    ("ragged batch", "pallas"): Case(
        functools.partial(_make, t=1, b=8, n=3, layers=2), CI, "576/512"
    ),
}


def main() -> None:
    """Bytes a token beside those of its latent and rotary key."""
    for name, how in (("bfloat16", {}), ("int8", {"int8": True})):
        q, pages, *_ = _shapes(**KIMI, t=1, **LONG, **how)
        tokens = math.prod(pages.pos.shape)
        least = (KIMI["r"] + KIMI["p"]) * 2
        moved = hbm_bytes(q, pages, tokens) / tokens
        print(f"{name}: {moved:.1f} bytes a token, {moved / least:.3f} of {least}")


if __name__ == "__main__":
    main()
