"""Tokens to experts without dropping any: sorted, padded per expert to tiles, one product a tile.

jax.lax.ragged_dot on CPU computes every expert for every row; a scan over row tiles executes at
most one tile per expert more than needed, and tiles without rows are skipped.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Dispatch(NamedTuple):
    """Where each (token, choice) went."""

    slot: jax.Array  # n k   row in the tiled buffer
    source: jax.Array  # tiles*tile   token of each row; n where the row is padding
    expert: jax.Array  # tiles   expert of a tile
    live: jax.Array  # tiles   the tile has rows


def dispatch(ids: jax.Array, experts: int, tile: int) -> Dispatch:
    """Plan the tiles for expert choices `ids` n k."""
    n, k = ids.shape
    flat = ids.reshape(-1)
    tiles = -(-n * k // tile) + experts
    order = jnp.argsort(flat, stable=True)
    counts = jnp.zeros(experts, jnp.int32).at[flat].add(1)
    padded = -(-counts // tile) * tile
    ends = jnp.cumsum(padded)
    shift = (ends - padded) - (jnp.cumsum(counts) - counts)  # buffer row minus sorted rank
    slot_sorted = jnp.arange(n * k) + shift[flat[order]]
    slot = jnp.zeros(n * k, jnp.int32).at[order].set(slot_sorted.astype(jnp.int32))
    source = jnp.full(tiles * tile, n, jnp.int32).at[slot_sorted].set(order // k)
    starts = jnp.arange(tiles) * tile
    expert = jnp.minimum(jnp.searchsorted(ends, starts, side="right"), experts - 1)
    return Dispatch(slot.reshape(n, k), source, expert, starts < ends[-1])


def expert_mlp(
    x: jax.Array, plan: Dispatch, gate: jax.Array, up: jax.Array, down: jax.Array
) -> jax.Array:
    """SwiGLU of each row's expert: x n d, gate and up e d f, down e f d -> rows of the buffer."""
    n, d = x.shape
    tile = plan.source.shape[0] // plan.expert.shape[0]
    padded = jnp.concatenate([x, jnp.zeros((1, d), x.dtype)])
    rows = padded[plan.source].reshape(-1, tile, d)

    def one(_, xs):
        row, expert, live = xs

        def use():
            h = jax.nn.silu(row @ gate[expert].astype(x.dtype)) * (row @ up[expert].astype(x.dtype))
            return h @ down[expert].astype(x.dtype)

        return None, jax.lax.cond(live, use, lambda: jnp.zeros_like(row))

    return jax.lax.scan(one, None, (rows, plan.expert, plan.live))[1].reshape(-1, d)


def combine(rows: jax.Array, plan: Dispatch, weight: jax.Array) -> jax.Array:
    """Weighted sum of each token's expert outputs: weight n k -> n d."""
    return jnp.einsum("nkd,nk->nd", rows[plan.slot], weight.astype(rows.dtype))
