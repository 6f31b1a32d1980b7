"""Tiles of rows padded per group, one product a tile, in plain XLA on any device.

jax.lax.ragged_dot on a CPU multiplies every row with every matrix. A scan over tiles computes at
most one tile per group more than needed; a packed matrix is expanded for its tile alone.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas.grouped_matmul.weights import Weights, matrix

LARGEST_TILE = 128


def tile_rows(rows: int, groups: int) -> int:
    """Rows of a tile, a power of two: with an even load, at most 1.3x the needed rows are computed.

    A group's last tile is half padding on average.
    """
    most = max(1, int(0.6 * rows / groups))
    return min(LARGEST_TILE, 1 << (most.bit_length() - 1))


class Tiles(NamedTuple):
    """Where rows lie once every group is padded to whole tiles."""

    source: jax.Array  # tiles tile   the row of each place; m where there is none
    group: jax.Array  # tiles
    live: jax.Array  # tiles   the tile has rows
    place: jax.Array  # m   of each row; behind the end for rows of no group


def tiles_of(sizes: jax.Array, m: int) -> Tiles:
    """For m rows, groups of `sizes` one after the other."""
    groups = sizes.shape[0]
    tile = tile_rows(m, groups)
    count = (m + min(groups, m) * (tile - 1)) // tile  # what the worst load needs
    ends, padded = jnp.cumsum(sizes), jnp.cumsum(-(-sizes // tile) * tile)
    shift = padded - -(-sizes // tile) * tile - (ends - sizes)  # place minus row
    starts = jnp.arange(count) * tile
    group = jnp.minimum(jnp.searchsorted(padded, starts, side="right"), groups - 1)
    row = starts[:, None] + jnp.arange(tile) - shift[group][:, None]
    own = (row < ends[group][:, None]) & (starts < padded[-1])[:, None]
    at = jnp.minimum(jnp.searchsorted(ends, jnp.arange(m), side="right"), groups - 1)
    place = jnp.where(jnp.arange(m) < ends[-1], jnp.arange(m) + shift[at], count * tile)
    return Tiles(jnp.where(own, row, m), group, starts < padded[-1], place)


def _dot(eqn: str, a: jax.Array, b: jax.Array) -> jax.Array:
    exact = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.einsum(eqn, a, b, precision=exact, preferred_element_type=jnp.float32)


def forward(x, weights: Weights, sizes, layer, back: bool = False) -> jax.Array:
    """The op's xla form. back: rows times the transposed matrices."""
    tiles = tiles_of(sizes, x.shape[0])
    rows = x.at[tiles.source].get(mode="fill", fill_value=0)

    def product(row, group):
        w = matrix(weights, group if layer is None else (layer, group), x.dtype)
        return _dot("mn,kn->mk" if back else "mk,kn->mn", row, w).astype(x.dtype)

    def one(_, xs):
        row, group, live = xs
        none = jax.eval_shape(product, row, group)
        use = lambda: product(row, group)  # noqa: E731
        return None, jax.lax.cond(live, use, lambda: jnp.zeros(none.shape, none.dtype))

    y = jax.lax.scan(one, None, (rows, tiles.group, tiles.live))[1]
    return y.reshape(-1, y.shape[-1]).at[tiles.place].get(mode="fill", fill_value=0)


def d_weights(x, d_out, sizes, dtype) -> jax.Array:
    """x^T d_out of every group, g k n in a dtype, added up in float32."""
    tiles = tiles_of(sizes, x.shape[0])
    x, d_out = (a.at[tiles.source].get(mode="fill", fill_value=0) for a in (x, d_out))

    def one(total, xs):
        a, b, group, live = xs
        use = lambda: total.at[group].add(_dot("mk,mn->kn", a, b))  # noqa: E731
        return jax.lax.cond(live, use, lambda: total), None

    start = jnp.zeros((sizes.shape[0], x.shape[-1], d_out.shape[-1]), jnp.float32)
    return jax.lax.scan(one, start, (x, d_out, tiles.group, tiles.live))[0].astype(dtype)
