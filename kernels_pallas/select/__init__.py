"""Attention to chosen blocks of a latent store, returned as a Partial.

A tile of queries shares one choice of k blocks; cost is proportional to the chosen pairs. Absorbed
MLA: the latent is key and value. The choice lies wholly in the past of every query of its tile
(the indexer sees to that), so a chosen block is visible whole and no position is compared here.
"""

import functools

import jax

from kernels_pallas import int8, limits
from kernels_pallas.partial import Partial
from kernels_pallas.select import ref, tpu, tpu_bwd, xla
from kernels_pallas.select.vjp import differentiable

# b batch, m tile of queries, t query of a tile, h head, r latent, l layer, c block of the store,
# j token of a block, k choice
IMPLS = {
    "ref": ref.select,
    "xla": xla.select,
    "pallas": differentiable(tpu.forward, tpu_bwd.grads),
    "pallas_interpret": differentiable(
        functools.partial(tpu.forward, interpret=True),
        functools.partial(tpu_bwd.grads, interpret=True),
    ),
}


def select(
    q: jax.Array,
    blocks: jax.Array,
    layer: jax.Array,
    ids: jax.Array,
    *,
    scale: float,
    impl: str,
    token_scale: jax.Array | None = None,
) -> Partial:
    """Attend each tile of `q` to its chosen blocks; out b m t h r, lse and max_logit b m t h.

    q       b m t h r   absorbed queries
    blocks  l b c j r   the stacked store; `layer` (int32 scalar) names the slice, never copied
    ids     b m k       int32 blocks, distinct within a tile; -1 chooses nothing
    token_scale  l b c j   of blocks in words of int8, l b c j r/4 (see int8.py): a latent is its
                           int8 times this. Not read by kernels, not differentiable in blocks

    `impl`: "ref", "xla", "pallas" (a TPU) or "pallas_interpret" (the same kernels, interpreted on
    any device). Differentiable in q and blocks, through out and lse. ValueError for an unknown impl
    or shapes that do not fit.
    """
    if impl not in IMPLS:
        raise ValueError(f"select: unknown {impl=}, there are {sorted(IMPLS)}")
    int8.check("select", blocks, token_scale)
    (b, m), (rows, r) = ids.shape[:2], (blocks.shape[1], int8.width(blocks, token_scale))
    if q.shape[:2] != (b, m) or b != rows or q.shape[-1] != r:
        raise ValueError(
            f"select: queries b m t h r {q.shape}, blocks l b c j r {blocks.shape} and ids b m k "
            f"{ids.shape} must agree in b, m and r"
        )
    limits.check("select", impl, tpu.unsupported, q, blocks, ids)
    if token_scale is None:
        return IMPLS[impl](q, blocks, layer, ids, scale=scale)
    return IMPLS[impl](q, blocks, layer, ids, scale=scale, token_scale=token_scale)
