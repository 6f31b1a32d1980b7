"""Which tiles of rows meet which groups, worked out on the device and read by the scalar core.

Rows are sorted by group. A visit is a tile of rows and a group that has rows in it; visits follow
the rows, so a tile is written in one go and a matrix is read once. An empty group has no visit.
Rows behind the last group are a group of their own, without a matrix.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl


class Visits(NamedTuple):
    """int32; arrays of a visit are as long as there can be visits."""

    layer: jax.Array  # 1
    group: jax.Array  # v   the number of groups is the one of the rows behind
    tile: jax.Array  # v
    held: jax.Array  # v   the matrix in VMEM: where there is none to multiply, that before
    read: jax.Array  # v   the same of tiles
    start: jax.Array  # g+2   first row of a group, and the end


def visits_of(
    sizes: jax.Array, layer: jax.Array | None, m: int, rows: int, empty: bool = False
) -> tuple[Visits, jax.Array]:
    """Visits of m rows in tiles of `rows`, and their number.

    empty  groups without rows have a visit too, and rows behind the last group none: what
           gradients of matrices want
    """
    groups, tiles = sizes.shape[0], pl.cdiv(m, rows)
    ends = jnp.concatenate([jnp.cumsum(sizes), jnp.full(1, m, sizes.dtype)]).astype(jnp.int32)
    start = jnp.concatenate([jnp.zeros(1, jnp.int32), ends])
    first, last = start[:-1] // rows, (ends - 1) // rows
    count = jnp.where(ends > start[:-1], last - first + 1, int(empty))
    if empty:
        first, count = jnp.minimum(first, tiles - 1), count.at[groups].set(0)
    until, total = jnp.cumsum(count), ends[groups - 1]
    v = jnp.arange(tiles + groups + 1, dtype=jnp.int32)
    group = jnp.minimum((until <= v[:, None]).sum(1), groups)
    tile = jnp.clip(first[group] + v - (until - count)[group], 0, tiles - 1)
    real = jnp.max(jnp.where(sizes > 0, jnp.arange(groups), 0))
    known = Visits(
        jnp.reshape(0 if layer is None else layer, 1).astype(jnp.int32), group, tile,
        jnp.minimum(group, real), jnp.minimum(tile, jnp.maximum(total - 1, 0) // rows), start,
    )
    return jax.tree.map(lambda x: x.astype(jnp.int32), known), until[-1]
