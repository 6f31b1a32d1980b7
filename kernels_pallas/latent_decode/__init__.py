"""Attention of a few queries to a long cache of latents as it lies, returned as a Partial.

The absorbed form of MLA: the latent is key and value of every head, and a token is read once for
all of them. A cache is pages of a stacked store; a row's table says which are its own, so a
contiguous cache is one whose pages follow each other. Positions are data: a page may be half full.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas import int8, limits
from kernels_pallas.attention import Queries
from kernels_pallas.latent_decode import ref, tpu, xla
from kernels_pallas.latent_decode.ref import unpair as unpair
from kernels_pallas.partial import Partial

# l layer, c page, j token of a page, r latent, p rotary dim, b row, n page of a row's table
IMPLS = {
    "ref": ref.decode,
    "xla": xla.decode,
    "pallas": tpu.decode,
    "pallas_interpret": lambda *args, **how: tpu.decode(*args, **how, interpret=True),
}
HALF = 128  # tokens of a page that follow each other in one half of the rows of `rope`


class Pages(NamedTuple):
    """Every layer's latents. On a TPU arrays 64 wide are padded: two rotary keys share a row."""

    latent: jax.Array  # l c j r     or int32 l c j r/4 with `scale`: words of int8 (see int8.py)
    rope: jax.Array | None  # l c j/2 2p   as `pair` lays them
    pos: jax.Array  # c j   int32; an unwritten slot is int32 max
    seg: jax.Array  # c j   int32, -1 is padding: never seen
    scale: jax.Array | None = None  # l c j/128 128   float32: a latent is its int8 times this


def pair(rope: jax.Array) -> jax.Array:
    """Rotary keys ... j p of a page -> ... j/2 2p; j is a multiple of 256.

    Of every 256 tokens the first 128 are the left half of 128 rows, the others the right half.
    """
    *lead, j, p = rope.shape
    groups = rope.reshape(*lead, j // (2 * HALF), 2, HALF, p)
    return jnp.moveaxis(groups, -3, -2).reshape(*lead, j // 2, 2 * p)


def latent_decode(
    q: Queries, pages: Pages, layer: jax.Array, table: jax.Array, *, scale: float, impl: str
) -> Partial:
    """Absorbed queries to the pages of their rows; out b t h r, lse and max_logit b t h.

    q      nope b t h r (absorbed), rope b t h p; a few, as t * h of them lie side by side
    layer  int32 scalar: the slice of the stacks, which is never copied
    table  b n   int32 pages of each row, in any order, distinct; -1 is none

    No gradient. ValueError: an unknown impl, or shapes that do not fit.
    """
    if impl not in IMPLS:
        raise ValueError(f"latent_decode: unknown {impl=}, there are {sorted(IMPLS)}")
    int8.check("latent_decode", pages.latent, pages.scale)
    (b, r), j = (q.nope.shape[0], q.nope.shape[-1]), pages.latent.shape[2]
    width, of_pages = int8.width(pages.latent, pages.scale), pages.latent.shape[1:3]
    if r != width or table.shape[0] != b or pages.pos.shape != of_pages:
        raise ValueError(
            f"latent_decode: queries b t h r {q.nope.shape}, pages l c j r {pages.latent.shape}, "
            f"positions c j {pages.pos.shape} and table b n {table.shape} must agree in b, c, j, r"
        )
    if j % (2 * HALF):
        raise ValueError(f"latent_decode: pages of {j} tokens, want a multiple of {2 * HALF}")
    if (q.rope is None) != (pages.rope is None):
        raise ValueError("latent_decode: queries and pages both have a rotary part, or neither")
    limits.check("latent_decode", impl, tpu.unsupported, q, pages, table)
    return IMPLS[impl](q, pages, layer, table, scale=scale)
