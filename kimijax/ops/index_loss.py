"""The loss that trains the block index: cross-entropy to where exact attention looks.

The idea of DeepSeek-V3.2's indexer training (KL to the summed attention of the heads), by block,
with two additions: the blocks of all rows of a batch compete, so that there are as many negatives
as in a long context; and callers say which queries matter.
"""

import jax
import jax.numpy as jnp

from kimijax.cache import Tokens
from kimijax.config import CompressedConfig
from kimijax.ops.attend import Latents, absorb
from kimijax.ops.blocks import IndexWeights, index_query, local_start, own_store


def index_loss(
    c: CompressedConfig,
    x: jax.Array,
    w_q: jax.Array,
    w_uk: jax.Array,
    sink: jax.Array | None,
    w: IndexWeights,
    kv: Latents,
    tokens: Tokens,
) -> jax.Array:
    """Mean over the watched queries, each weighted by itself and by its mass beyond the region.

    x b t d; w_q d h n; w_uk r h n; sink h. The target carries no gradient.
    """
    at = tokens.watch.at
    x = jnp.take_along_axis(x, at[..., None], 1)
    pos, seg = (jnp.take_along_axis(a, at, 1) for a in (tokens.pos, tokens.seg))
    store = own_store(c, kv, w)
    own = (store.block_pos[:, None] < local_start(pos, c)[..., None]) & (
        store.block_seg[:, None] == seg[..., None]
    )
    q = absorb(jnp.einsum("bmd,dhn->bmhn", x, w_q.astype(x.dtype)), w_uk)
    mass = jax.lax.stop_gradient(_mass(c, q, sink, kv, pos, seg))
    mass = jnp.where(own, mass, 0.0)
    scores = jnp.einsum("bmi,ecgi->bmecg", index_query(x, w), store.keys[0]).max(-1)
    b, m, _, n = scores.shape
    mine = jnp.eye(b, dtype=bool)[:, None, :, None]
    masked = jnp.where(mine & ~own[:, :, None], -1e30, scores)
    log_p = masked - jax.nn.logsumexp(masked, axis=(2, 3), keepdims=True)
    log_p = jnp.take_along_axis(log_p, jnp.arange(b)[:, None, None, None], 2)[:, :, 0]
    loss = -jnp.sum(jnp.where(own, mass * log_p, 0.0), -1)
    weight = tokens.watch.weight
    return jnp.sum(weight * loss) / jnp.maximum(weight.sum(), 1e-6)


def _mass(c, q, sink, kv, pos, seg) -> jax.Array:
    """Mean over heads of the exact attention of q b m h r on each block: b m c."""
    logits = jnp.einsum("bmhr,bsr->bmhs", q, kv.latent) * c.scale
    seen = (kv.pos[:, None] <= pos[..., None]) & (kv.seg[:, None] == seg[..., None])
    logits = jnp.where(seen[:, :, None], logits, -1e30)
    if sink is not None:
        extra = jnp.broadcast_to(sink[:, None], (*logits.shape[:3], 1))
        logits = jnp.concatenate([logits, extra], -1)
    p = jax.nn.softmax(logits, -1).mean(2)[..., : kv.pos.shape[1]]
    p = jnp.pad(p, ((0, 0), (0, 0), (0, -p.shape[-1] % c.index.block)))
    return p.reshape(*p.shape[:2], -1, c.index.block).sum(-1)
