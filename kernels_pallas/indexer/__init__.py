"""Which blocks of the past a query should read: block scores and the k best of them.

A block has g summary keys; its score is the largest dot product with the index query. Candidates
are the blocks of the query's segment that end before its local region. Ties go to the lower block.
"""

import functools

import jax

from kernels_pallas import limits
from kernels_pallas.indexer import ref, tpu, xla

# b batch, m query, i index dim, l layer, c block, g summary key of a block, k choice
IMPLS = {
    "ref": ref.top_blocks,
    "xla": xla.top_blocks,
    "pallas": tpu.top_blocks,
    "pallas_interpret": functools.partial(tpu.top_blocks, interpret=True),
}


def top_blocks(
    q: jax.Array,
    keys: jax.Array,
    layer: jax.Array,
    block_pos: jax.Array,
    block_seg: jax.Array,
    before: jax.Array,
    seg: jax.Array,
    *,
    k: int,
    impl: str,
) -> tuple[jax.Array, jax.Array]:
    """The k best candidate blocks of each query: (scores b m k, ids b m k), best first.

    q          b m i        index queries
    keys       l b c g i    stacked summary keys; `layer` (int32 scalar) names the slice
    block_pos  b c          int32 position of a block's first token; int32 max: not complete
    block_seg  b c          int32
    before     b m          int32; a candidate's first position is below it
    seg        b m          int32; a candidate is of this segment, -1 has none

    Where there are fewer candidates than k, the score is -inf and the id -1. `impl`: "ref", "xla",
    "pallas" (a TPU) or "pallas_interpret" (the same kernel, interpreted on any device). No
    gradient: what trains the indexer is a loss of its own.
    """
    if impl not in IMPLS:
        raise ValueError(f"top_blocks: unknown {impl=}, there are {sorted(IMPLS)}")
    if q.shape[0] != keys.shape[1] or q.shape[-1] != keys.shape[-1] or before.shape != q.shape[:2]:
        raise ValueError(
            f"top_blocks: queries b m i {q.shape}, keys l b c g i {keys.shape} and before b m "
            f"{before.shape} must agree in b, m and i"
        )
    limits.check("top_blocks", impl, tpu.unsupported, q, keys)
    q, keys = jax.lax.stop_gradient((q, keys))
    return IMPLS[impl](q, keys, layer, block_pos, block_seg, before, seg, k)
