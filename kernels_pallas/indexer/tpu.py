"""Block choice as a TPU kernel: scores and the k best of them in VMEM, nothing else in HBM.

Scores lie transposed, blocks down and LANE queries across, so that all queries are searched at
once. Grid: row, block of queries, tile of the store; a tile without a candidate is not read. What
a query may choose is what an attention may see of a key at a block's first position, so bounds and
masks are those of attention.

    s = max_g K_g q,   while any max(s) > held[k]:  insert max(s) into held, strike it out of s

Held scores are in order. The largest of a tile comes first, of equals the lower, and after what is
held already, so ties go to the lower block. A tile of n comes with k/n new ones on average: all
tiles together cost some k (1 + ln n) strikes for a query, whose slowest of LANE decides.

VMEM, bfloat16, 2 x 128 keys: a tile of 512 blocks 256 KiB twice, scores 256 KiB, held 64 KiB.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas import limits
from kernels_pallas.attention.bounds import FAR, key_bounds, pairs, query_bounds, span
from kernels_pallas.attention.tile import LANE, SUB, columns, dot, pad, up, visible

TILE = 512  # blocks searched at a time
TURN = 4  # strikes between two looks at whether there are more


def unsupported(q, keys) -> str | None:
    """Why the kernel does not search keys for q, or None."""
    b, m = q.shape[:2]
    why = limits.numbers(q=q, keys=keys)
    return why or limits.scalars(2 * b * pl.cdiv(m, LANE), f"{b} x {m} queries")


def top_blocks(q, keys, layer, block_pos, block_seg, before, seg, k, interpret: bool = False):
    """The op's TPU form. See the package docstring for the contract."""
    (b, m, i), (c, g) = q.shape, keys.shape[2:4]
    tile, rows = min(TILE, up(c, SUB)), up(k, 8)
    queries = pad(q.swapaxes(1, 2), LANE, 2)
    of_q = jnp.stack([pad(before - 1, LANE, 1), pad(seg, LANE, 1, -1)], 1)
    of_q = jnp.concatenate([of_q, jnp.zeros_like(of_q[:, :1])], 1)  # b 3 m: since the start
    of_k = jnp.stack([pad(block_pos, tile, 1, FAR), pad(block_seg, tile, 1, -1)], 1)
    first, count = span(pairs(
        query_bounds(of_q[:, 0], of_q[:, 1], of_q[:, 2], LANE),
        key_bounds(of_k[:, 0], of_k[:, 1], tile),
    ))
    groups = first.shape[1]

    def at(b, n, j, first, count):
        met = b * groups + n
        return first[met] + jnp.minimum(j, jnp.maximum(count[met] - 1, 0))

    across = lambda x: pl.BlockSpec((None, x, LANE), lambda b, n, j, *_: (b, 0, n))  # noqa: E731
    out = lambda dtype: jax.ShapeDtypeStruct((b, rows, groups * LANE), dtype)  # noqa: E731
    best, ids = pl.pallas_call(
        functools.partial(_kernel, groups=groups),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(b, groups, jnp.maximum(count.max(), 1)),
            in_specs=[
                across(i), across(3),
                pl.BlockSpec(
                    (None, None, tile * g, i),
                    lambda b, n, j, layer, *known: (layer[0], b, at(b, n, j, *known), 0),
                ),
                pl.BlockSpec(
                    (None, 2, tile), lambda b, n, j, _, *known: (b, 0, at(b, n, j, *known))
                ),
            ],
            out_specs=[across(rows), across(rows)],
            scratch_shapes=[
                pltpu.VMEM((rows, LANE), jnp.float32) for rows in (tile * g, tile)
            ],
        ),
        out_shape=[out(jnp.float32), out(jnp.int32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary")
        ),
        interpret=interpret,
        name="top_blocks",
    )(
        jnp.reshape(layer, 1), first.reshape(-1), count.reshape(-1), queries, of_q,
        keys.reshape(-1, b, c * g, i), of_k,
    )
    back = lambda x: x[:, :k, :m].swapaxes(1, 2)  # noqa: E731
    return back(best), back(ids)


def _kernel(layer, first, count, q, of_q, keys, of_k, best, ids, products, scores, *, groups):
    row, n, j = (pl.program_id(axis) for axis in range(3))
    met = row * groups + n

    @pl.when(j == 0)
    def _():
        best[...] = jnp.full_like(best, -jnp.inf)
        ids[...] = jnp.full_like(ids, -1)

    @pl.when(j < count[met])
    def _():
        most = _score(q, of_q, keys, of_k, products, scores)
        start = (first[met] + j) * scores.shape[0]
        some = lambda x: jnp.any(x).astype(jnp.int32)  # noqa: E731

        def turn(_):
            for _ in range(TURN):
                taken = _strike(scores, start, best, ids)
            return some(taken)

        jax.lax.while_loop(lambda more: more > 0, turn, some(most > best[-1:]))


def _score(q, of_q, keys, of_k, products, scores):
    """Write the scores of a tile, -inf for what is no candidate; their largest, 1 LANE."""
    most, g = jnp.full((1, LANE), -jnp.inf), products.shape[0] // scores.shape[0]
    products[...] = dot(keys[...], q[...], (1, 0))
    for at in range(0, scores.shape[0], SUB):
        s = functools.reduce(
            jnp.maximum, (products[pl.ds(at * g + n, SUB, stride=g)] for n in range(g))
        )
        seen = visible(of_q, *columns(of_k, at), pl.ds(0, LANE))
        s = jnp.where(seen, s, -jnp.inf)
        scores[pl.ds(at, SUB)] = s
        most = jnp.maximum(most, s.max(0, keepdims=True))
    return most


def _strike(scores, start, best, ids):
    """Move the largest score of each query to where it belongs; whether it belongs anywhere."""
    s, held, of_held = scores[...], best[...], ids[...]
    row = jax.lax.broadcasted_iota(jnp.int32, s.shape, 0)
    top = s.max(0, keepdims=True)
    at = jnp.where(s == top, row, s.shape[0]).min(0, keepdims=True)
    scores[...] = jnp.where(row == at, -jnp.inf, s)
    taken = top > held[-1:]
    # Those that stay are the first; where the one above stays and this one does not is the place.
    stays = held >= top
    place = jax.lax.broadcasted_iota(jnp.int32, held.shape, 0)
    here = place == stays.astype(jnp.int32).sum(0, keepdims=True)
    moved = lambda x: pltpu.roll(x, 1, 0)  # noqa: E731
    best[...] = jnp.where(stays, held, jnp.where(here, top, moved(held)))
    ids[...] = jnp.where(stays, of_held, jnp.where(here, at + start, moved(of_held)))
    return taken
