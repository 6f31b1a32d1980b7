"""Keys and values of a piece of the latents made first, in their dtype, then attention by tiles."""

import jax
import jax.numpy as jnp

from kernels_pallas.attention import Keys
from kernels_pallas.attention import xla as attention
from kernels_pallas.attention.xla import contract, overlap, tiles
from kernels_pallas.int8 import widen
from kernels_pallas.partial import Partial, empty, merge

PIECE = 4096  # latents of which every head's keys and values are held at one time


def expand(kv, up) -> Keys:
    """The key and value of every head."""
    latent = kv.latent if kv.scale is None else widen(kv.latent, kv.scale, up[0].dtype)
    make = lambda w: jnp.einsum("bsr,rhn->bshn", latent, w.astype(latent.dtype))  # noqa: E731
    return Keys(make(up[0]), make(up[1]), kv.k_rope, kv.pos, kv.seg)


def forward(q, kv, up, *, scale: float) -> Partial:
    """The op's xla form. See the package docstring for the contract."""
    if kv.pos.shape[1] <= PIECE:
        return attention.forward(q, expand(kv, up), scale=scale)

    def step(acc, piece):
        use = lambda: merge(  # noqa: E731
            acc, attention.forward(q, expand(piece, up), scale=scale)
        )
        return jax.lax.cond(overlap(q, piece), use, lambda: acc), None

    start = empty(q.nope.shape[:3], up[1].shape[-1])
    return jax.lax.scan(step, start, tiles(kv, PIECE))[0]


def grads(q, kv, up, lse, d_out, delta, *, scale: float):
    """The op's xla form. See the package docstring for the contract."""
    d_q, d_keys = attention.grads(q, expand(kv, up), lse, d_out, delta, scale=scale)
    own, dtype = (d_keys.key, d_keys.value), kv.latent.dtype
    narrow = lambda x: x.astype(dtype)  # noqa: E731
    own, latent, up = jax.tree.map(narrow, (own, kv.latent, tuple(up)))
    d_latent = contract("bshn,rhn->bsr", own[0], up[0]) + contract("bshn,rhn->bsr", own[1], up[1])
    d_up = tuple(contract("bsr,bshn->rhn", latent, d) for d in own)
    return d_q, kv._replace(latent=d_latent, k_rope=d_keys.rope, pos=None, seg=None), d_up
