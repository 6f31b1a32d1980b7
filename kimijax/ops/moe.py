"""Tokens to experts without dropping any, in two ways.

Tiled: sorted, padded per expert to tiles; a scan over tiles computes the whole MLP of each, at most
one tile per expert more than needed. Grouped: sorted, then a kernel for each of the three products
(kernels_pallas.grouped_matmul). Packed matrices are read as they are stored in both.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas.grouped_matmul import Weights, grouped_matmul, matrix
from kernels_pallas.grouped_matmul.xla import tile_rows

UNROLLED = 64  # tiles of a row each that are written out and not looped over


class Dispatch(NamedTuple):
    """Where each (token, choice) went."""

    slot: jax.Array  # n k   row in the tiled buffer; behind its end where the choice goes nowhere
    source: jax.Array  # tiles*tile   token of each row; n where the row is padding
    expert: jax.Array  # tiles   expert of a tile
    live: jax.Array  # tiles   the tile has rows


def dispatch(ids: jax.Array, experts: int, tile: int) -> Dispatch:
    """Plan the tiles for expert choices `ids` n k; others than 0 .. experts-1 go nowhere."""
    n, k = ids.shape
    flat = ids.reshape(-1)
    mine = (flat >= 0) & (flat < experts)
    flat = jnp.where(mine, flat, experts)
    tiles = (n * k + min(experts, n * k) * (tile - 1)) // tile  # what the worst load needs
    order = order_of(flat, experts)
    counts = jnp.zeros(experts, jnp.int32).at[flat].add(1, mode="drop")
    padded = -(-counts // tile) * tile
    ends = jnp.cumsum(padded)
    shift = (ends - padded) - (jnp.cumsum(counts) - counts)  # buffer row minus sorted rank
    slot_sorted = jnp.arange(n * k) + shift[jnp.minimum(flat[order], experts - 1)]
    slot_sorted = jnp.where(mine[order], slot_sorted, tiles * tile)
    slot = jnp.zeros(n * k, jnp.int32).at[order].set(slot_sorted.astype(jnp.int32))
    source = jnp.full(tiles * tile, n, jnp.int32).at[slot_sorted].set(order // k, mode="drop")
    starts = jnp.arange(tiles) * tile
    expert = jnp.minimum(jnp.searchsorted(ends, starts, side="right"), experts - 1)
    return Dispatch(slot.reshape(n, k), source, expert, starts < ends[-1])


def order_of(ids: jax.Array, most: int) -> jax.Array:
    """The stable argsort of n ids from 0 to `most`.

    An id and its place in one number: a TPU's sort of one array is a third of the code, and of the
    compiler's time, of one that carries another along.
    """
    n = ids.shape[0]
    if (most + 1) * n > jnp.iinfo(jnp.int32).max:
        return jnp.argsort(ids, stable=True)
    return jax.lax.sort(ids * n + jnp.arange(n, dtype=ids.dtype), is_stable=False) % n


def tiled_experts(
    x: jax.Array, ids: jax.Array, weight: jax.Array, gate: Weights, up: Weights, down: Weights,
    layer: jax.Array | None = None,
) -> jax.Array:
    """Weighted SwiGLU experts of each token, by tiles: x b t d, ids and weight b t k -> b t d.

    gate and up are e d f, down e f d; packed ones are expanded an expert at a time. Ids outside
    0 .. e-1 add nothing.

    layer  int32 scalar: matrices are stacks l e ..., of which this slice is meant; it is not copied
    """
    flat, ids, weight = (a.reshape(-1, a.shape[-1]) for a in (x, ids, weight))
    experts = count(gate, layer)
    plan = dispatch(ids, experts, tile_rows(ids.size, experts))
    return combine(expert_mlp(flat, plan, gate, up, down, layer), plan, weight).reshape(x.shape)


def grouped_experts(
    x: jax.Array, ids: jax.Array, weight: jax.Array, gate: Weights, up: Weights, down: Weights,
    layer: jax.Array | None = None, *, impl: str,
) -> jax.Array:
    """The same by products over tokens sorted by expert, `impl` of grouped_matmul: for a TPU."""
    flat, k, experts = x.reshape(-1, x.shape[-1]), ids.shape[-1], count(gate, layer)
    n, ids = flat.shape[0], ids.reshape(-1)
    mine = (ids >= 0) & (ids < experts)
    ids = jnp.where(mine, ids, experts)
    order = order_of(ids, experts)
    sizes = jnp.zeros(experts, jnp.int32).at[ids].add(1, mode="drop")
    product = partial(grouped_matmul, sizes=sizes, layer=layer, impl=impl)
    rows = flat[order // k]
    out = product(jax.nn.silu(product(rows, gate)) * product(rows, up), down)
    back = jnp.zeros(n * k, jnp.int32).at[order].set(jnp.arange(n * k, dtype=jnp.int32))
    out = out[back].reshape(n, k, -1)  # a choice that goes nowhere lies behind the last group: 0
    weight = weight.reshape(n, k).astype(out.dtype)
    return jnp.einsum("nkd,nk->nd", out, weight).reshape(x.shape)


def count(experts: Weights, layer: jax.Array | None) -> int:
    """How many experts there are, of one layer or of each in a stack."""
    return jax.tree.leaves(experts)[0].shape[0 if layer is None else 1]


def expert_mlp(
    x: jax.Array, plan: Dispatch, gate: Weights, up: Weights, down: Weights,
    layer: jax.Array | None = None,
) -> jax.Array:
    """SwiGLU of each row's expert: x n d, gate and up e d f, down e f d -> rows of the buffer.

    Packed matrices are expanded one expert at a time.
    """
    n, d = x.shape
    tiles = plan.expert.shape[0]
    tile = plan.source.shape[0] // tiles
    padded = jnp.concatenate([x, jnp.zeros((1, d), x.dtype)])
    rows = padded[plan.source].reshape(-1, tile, d)

    def mlp(row, expert):
        at = expert if layer is None else (layer, expert)
        h = jax.nn.silu(row @ matrix(gate, at, x.dtype))
        h = h * (row @ matrix(up, at, x.dtype))
        return h @ matrix(down, at, x.dtype)

    if tile == 1 and tiles <= UNROLLED:
        # Every tile has its row. Written out, the slice of an expert is one with that of its layer;
        # a loop would have the experts of the layer copied for it, those that nobody chose too.
        return jnp.concatenate([mlp(rows[i], plan.expert[i]) for i in range(tiles)])

    def one(_, xs):
        row, expert, live = xs
        return None, jax.lax.cond(live, lambda: mlp(row, expert), lambda: jnp.zeros_like(row))

    return jax.lax.scan(one, None, (rows, plan.expert, plan.live))[1].reshape(-1, d)


def combine(rows: jax.Array, plan: Dispatch, weight: jax.Array) -> jax.Array:
    """Weighted sum of each token's expert outputs: weight n k -> n d."""
    chosen = rows.at[plan.slot].get(mode="fill", fill_value=0)
    return jnp.einsum("nkd,nk->nd", chosen, weight.astype(rows.dtype))
