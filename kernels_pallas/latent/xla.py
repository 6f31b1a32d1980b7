"""Every key and value made first, in the dtype of the latents, then attention by tiles."""

import jax
import jax.numpy as jnp

from kernels_pallas.attention import Keys
from kernels_pallas.attention import xla as attention
from kernels_pallas.attention.xla import contract
from kernels_pallas.partial import Partial


def expand(kv, up) -> Keys:
    """The key and value of every head."""
    make = lambda w: jnp.einsum("bsr,rhn->bshn", kv.latent, w.astype(kv.latent.dtype))  # noqa: E731
    return Keys(make(up[0]), make(up[1]), kv.k_rope, kv.pos, kv.seg)


def forward(q, kv, up, *, scale: float) -> Partial:
    """The op's xla form. See the package docstring for the contract."""
    return attention.forward(q, expand(kv, up), scale=scale)


def grads(q, kv, up, lse, d_out, delta, *, scale: float):
    """The op's xla form. See the package docstring for the contract."""
    d_q, d_keys = attention.grads(q, expand(kv, up), lse, d_out, delta, scale=scale)
    own, dtype = (d_keys.key, d_keys.value), kv.latent.dtype
    narrow = lambda x: x.astype(dtype)  # noqa: E731
    own, latent, up = jax.tree.map(narrow, (own, kv.latent, tuple(up)))
    d_latent = contract("bshn,rhn->bsr", own[0], up[0]) + contract("bshn,rhn->bsr", own[1], up[1])
    d_up = tuple(contract("bsr,bshn->rhn", latent, d) for d in own)
    return d_q, kv._replace(latent=d_latent, k_rope=d_keys.rope, pos=None, seg=None), d_up
