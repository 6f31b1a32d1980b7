"""The definition of attention to chosen blocks: a dense mask over the whole store, float32."""

import jax
import jax.numpy as jnp

from kernels_pallas.int8 import widen
from kernels_pallas.partial import Partial, from_logits

HIGHEST = jax.lax.Precision.HIGHEST


def select(q, blocks, layer, ids, *, scale: float, token_scale=None) -> Partial:
    """softmax(scale q c^T) c over the tokens of the chosen blocks."""
    store = blocks[layer]  # b c j r
    if token_scale is not None:
        store = widen(store, token_scale[layer], jnp.float32)
    store = store.astype(jnp.float32)
    chosen = (ids[..., None] == jnp.arange(store.shape[1])).any(2)  # b m c
    logits = jnp.einsum("bmthr,bcjr->bmthcj", q.astype(jnp.float32), store, precision=HIGHEST)
    b, m, t, h, c, j = logits.shape
    seen = jnp.broadcast_to(chosen[:, :, None, None, :, None], (b, m, 1, 1, c, j))
    flat = store.reshape(b, c * j, -1)
    return from_logits(
        logits.reshape(b, m, t, h, c * j) * scale,
        seen.reshape(b, m, 1, 1, c * j),
        lambda w: jnp.einsum("bmths,bsr->bmthr", w, flat, precision=HIGHEST),
    )
