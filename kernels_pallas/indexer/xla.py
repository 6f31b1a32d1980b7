"""Block choice by tiles of the store, stopping at the last candidate: cost follows the past, not S.

Within a tile the search is in two steps, exact and cheap where a sort is not: the largest score of
each LANE blocks, the k best lanes, then the k best within those and the k held so far. Held ids are
lower than the tile's, lanes are kept in order and top_k is stable, so ties go to the lower block.
"""

import functools

import jax
import jax.numpy as jnp

from kernels_pallas.attention.xla import contract

TILE, LANE = 8192, 64  # blocks searched at a time, blocks of a lane
SCORES = 64 * TILE  # few queries take longer tiles: as many scores, fewer steps


def top_blocks(q, keys, layer, block_pos, block_seg, before, seg, k):
    """The op's xla form. See the package docstring for the contract."""
    b, m, i = q.shape
    c, g = keys.shape[2:4]
    tile = min(c, max(TILE, SCORES // (b * m) // LANE * LANE))
    live = jnp.max(jnp.where(block_pos < before.max(), jnp.arange(c), -1)) + 1

    def step(n, held):
        # The last tile slides back to stay inside; what it sees again is masked.
        start = jnp.minimum(n * tile, c - tile)
        if tile == c:
            scores = _scores_as_they_lie(q, keys[layer])
        else:
            part = jax.lax.dynamic_slice(keys, (layer, 0, start, 0, 0), (1, b, tile, g, i))[0]
            scores = _scores_key_by_key(q, part)
        cut = lambda x: jax.lax.dynamic_slice_in_dim(x, start, tile, 1)[:, None]  # noqa: E731
        ids = start + jnp.arange(tile)
        seen = (cut(block_pos) < before[..., None]) & (cut(block_seg) == seg[..., None])
        seen &= (seg >= 0)[..., None] & (ids >= n * tile)
        return _hold(held, jnp.where(seen, scores, -jnp.inf), start, k)

    nothing = (jnp.full((b, m, k), -jnp.inf, jnp.float32), jnp.full((b, m, k), -1, jnp.int32))
    best, ids = jax.lax.fori_loop(0, -(-live // tile), step, nothing)
    return best, jnp.where(jnp.isneginf(best), -1, ids)


def _scores_as_they_lie(q, keys):
    """Block scores b m c of b m i against b c g i, the keys read once and not copied."""
    b, c, g, i = keys.shape
    scores = contract("bmi,bsi->bms", q, keys.reshape(b, c * g, i))
    return scores.reshape(*scores.shape[:2], c, g).max(-1)


def _scores_key_by_key(q, keys):
    """The same for many queries: a maximum over neighbours in memory costs more than a product."""
    products = (contract("bmi,bsi->bms", q, keys[:, :, n]) for n in range(keys.shape[2]))
    return functools.reduce(jnp.maximum, products)


def _hold(held, scores, start, k):
    """Merge a tile's scores b m tile into the k held (scores, ids)."""
    b, m, tile = scores.shape
    if tile % LANE == 0 and tile // LANE > k:
        lanes = scores.reshape(b, m, tile // LANE, LANE)
        _, lane = jax.lax.top_k(lanes.max(-1), k)
        lane = jnp.sort(lane, -1)
        scores = jnp.take_along_axis(lanes, lane[..., None], 2).reshape(b, m, k * LANE)
        ids = (lane[..., None] * LANE + jnp.arange(LANE)).reshape(b, m, k * LANE)
    else:
        ids = jnp.broadcast_to(jnp.arange(tile), scores.shape)
    scores = jnp.concatenate([held[0], scores], -1)
    ids = jnp.concatenate([held[1], (ids + start).astype(jnp.int32)], -1)
    best, at = jax.lax.top_k(scores, k)
    return best, jnp.take_along_axis(ids, at, -1)
