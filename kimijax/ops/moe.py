"""Tokens to experts without dropping any: sorted, padded per expert to tiles, one product a tile.

jax.lax.ragged_dot on CPU computes every expert for every row; a scan over row tiles executes at
most one tile per expert more than needed, and tiles without rows are skipped.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from kimijax.config import FP8_BLOCK
from kimijax.ops.fp8 import numbers

LARGEST_TILE = 128
UNROLLED = 64  # tiles of a row each that are written out and not looped over


class Dispatch(NamedTuple):
    """Where each (token, choice) went."""

    slot: jax.Array  # n k   row in the tiled buffer; behind its end where the choice goes nowhere
    source: jax.Array  # tiles*tile   token of each row; n where the row is padding
    expert: jax.Array  # tiles   expert of a tile
    live: jax.Array  # tiles   the tile has rows


def tile_rows(rows: int, experts: int) -> int:
    """Rows of a tile, a power of two: with an even load, at most 1.3x the needed rows are computed.

    An expert's last tile is half padding on average.
    """
    most = max(1, int(0.6 * rows / experts))
    return min(LARGEST_TILE, 1 << (most.bit_length() - 1))


def dispatch(ids: jax.Array, experts: int, tile: int) -> Dispatch:
    """Plan the tiles for expert choices `ids` n k; others than 0 .. experts-1 go nowhere."""
    n, k = ids.shape
    flat = ids.reshape(-1)
    mine = (flat >= 0) & (flat < experts)
    flat = jnp.where(mine, flat, experts)
    tiles = (n * k + min(experts, n * k) * (tile - 1)) // tile  # what the worst load needs
    order = jnp.argsort(flat, stable=True)
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


class Int4(NamedTuple):
    """Matrices as the hub packs them: [out, in] in 4 bits, a scale per group of inputs."""

    packed: jax.Array  # e out in/8   int32, lowest bits first, stored as value + 8
    scale: jax.Array  # e out in/group


class Fp8(NamedTuple):
    """Matrices as the hub stores them: [out, in] float8_e4m3fn, a scale per square block."""

    codes: jax.Array  # e out in   uint8, its bits
    scale: jax.Array  # e ceil(out/block) ceil(in/block)   multiplied, whatever its hub name says


Experts = jax.Array | Int4 | Fp8  # e in out, or a packed form of it


def matrix(experts: Experts, expert: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """One expert's matrix [in, out] in the dtype of the activations."""
    match experts:
        case Int4(packed=packed, scale=scale):
            shifts = 4 * jnp.arange(8, dtype=jnp.int32)
            codes = (packed[expert][..., None] >> shifts & 15) - 8  # out in/8 8
            codes = codes.reshape(*scale.shape[1:], -1).astype(jnp.float32)
            w = codes * scale[expert].astype(jnp.float32)[..., None]
            return w.reshape(w.shape[0], -1).T.astype(dtype)
        case Fp8(codes=codes, scale=scale):
            rows, columns = codes.shape[1:]
            spread = jnp.repeat(jnp.repeat(scale[expert], FP8_BLOCK, 0), FP8_BLOCK, 1)
            return (numbers(codes[expert]) * spread[:rows, :columns]).T.astype(dtype)
    return experts[expert].astype(dtype)


def tiled_experts(
    x: jax.Array, ids: jax.Array, weight: jax.Array, gate: Experts, up: Experts, down: Experts
) -> jax.Array:
    """Weighted SwiGLU experts of each token, by tiles: x b t d, ids and weight b t k -> b t d.

    gate and up are e d f, down e f d; packed ones are expanded an expert at a time. Ids outside
    0 .. e-1 add nothing.
    """
    flat, ids, weight = (a.reshape(-1, a.shape[-1]) for a in (x, ids, weight))
    plan = dispatch(ids, _count(gate), tile_rows(ids.size, _count(gate)))
    return combine(expert_mlp(flat, plan, gate, up, down), plan, weight).reshape(x.shape)


def ragged_experts(
    x: jax.Array, ids: jax.Array, weight: jax.Array, gate: Experts, up: Experts, down: Experts
) -> jax.Array:
    """The same by jax.lax.ragged_dot over tokens sorted by expert: for a TPU, where it is a kernel.

    Elsewhere every expert is computed for every row. Packed experts are expanded all at once.
    """
    flat, k, experts = x.reshape(-1, x.shape[-1]), ids.shape[-1], _count(gate)
    n, ids = flat.shape[0], ids.reshape(-1)
    mine = (ids >= 0) & (ids < experts)
    ids = jnp.where(mine, ids, experts)
    order = jnp.argsort(ids, stable=True)
    sizes = jnp.zeros(experts, jnp.int32).at[ids].add(1, mode="drop")
    rows = flat[order // k]
    gate, up, down = (_expanded(w, x.dtype) for w in (gate, up, down))
    h = jax.nn.silu(jax.lax.ragged_dot(rows, gate, sizes)) * jax.lax.ragged_dot(rows, up, sizes)
    out = jax.lax.ragged_dot(h, down, sizes)
    back = jnp.zeros(n * k, jnp.int32).at[order].set(jnp.arange(n * k, dtype=jnp.int32))
    out = jnp.where(mine[:, None], out[back], 0).reshape(n, k, -1)
    weight = weight.reshape(n, k).astype(out.dtype)
    return jnp.einsum("nkd,nk->nd", out, weight).reshape(x.shape)


def _count(experts: Experts) -> int:
    return jax.tree.leaves(experts)[0].shape[0]


def _expanded(experts: Experts, dtype: jnp.dtype) -> jax.Array:
    """All matrices e in out."""
    if isinstance(experts, jax.Array):
        return experts.astype(dtype)
    return jax.lax.map(lambda e: matrix(experts, e, dtype), jnp.arange(_count(experts)))


def expert_mlp(
    x: jax.Array, plan: Dispatch, gate: Experts, up: Experts, down: Experts
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
        h = jax.nn.silu(row @ matrix(gate, expert, x.dtype))
        h = h * (row @ matrix(up, expert, x.dtype))
        return h @ matrix(down, expert, x.dtype)

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
