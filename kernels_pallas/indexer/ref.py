"""The definition of block choice: all scores, one top-k."""

import jax
import jax.numpy as jnp


def top_blocks(q, keys, layer, block_pos, block_seg, before, seg, k):
    """max over a block's keys of q . key, candidates only, the k largest."""
    scores = jnp.einsum(
        "bmi,bcgi->bmcg", q.astype(jnp.float32), keys[layer].astype(jnp.float32),
        precision=jax.lax.Precision.HIGHEST,
    ).max(-1)  # b m c
    past = block_pos[:, None, :] < before[..., None]
    same = (block_seg[:, None, :] == seg[..., None]) & (seg[..., None] >= 0)
    scores = jnp.where(past & same, scores, -jnp.inf)
    if (short := k - scores.shape[-1]) > 0:
        scores = jnp.pad(scores, ((0, 0), (0, 0), (0, short)), constant_values=-jnp.inf)
    best, ids = jax.lax.top_k(scores, k)
    return best, jnp.where(jnp.isneginf(best), -1, ids)
