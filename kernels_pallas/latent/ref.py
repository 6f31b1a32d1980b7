"""The definition of attention to latents: every key and value made, then attention; float32."""

import jax
import jax.numpy as jnp

from kernels_pallas.attention import Keys
from kernels_pallas.attention import ref as attention
from kernels_pallas.int8 import widen
from kernels_pallas.partial import Partial

HIGHEST = jax.lax.Precision.HIGHEST


def expand(kv, up) -> Keys:
    """The key and value of every head."""
    latent = kv.latent if kv.scale is None else widen(kv.latent, kv.scale, jnp.float32)
    latent, *up = (x.astype(jnp.float32) for x in (latent, *up))
    key, value = (jnp.einsum("bsr,rhn->bshn", latent, w, precision=HIGHEST) for w in up)
    return Keys(key, value, kv.k_rope, kv.pos, kv.seg)


def forward(q, kv, up, *, scale: float) -> Partial:
    """Attention to the expanded keys."""
    return attention.attention(q, expand(kv, up), scale=scale)


def grads(q, kv, up, lse, d_out, delta, *, scale: float):
    """Gradients of the expanded keys, pulled back."""
    d_q, d_keys = attention.attention_grads(q, expand(kv, up), lse, d_out, delta, scale=scale)
    latent, *up = (x.astype(jnp.float32) for x in (kv.latent, *up))
    own = d_keys.key, d_keys.value
    d_latent = sum(
        jnp.einsum("bshn,rhn->bsr", d, w, precision=HIGHEST) for d, w in zip(own, up, strict=True)
    )
    d_up = tuple(jnp.einsum("bsr,bshn->rhn", latent, d, precision=HIGHEST) for d in own)
    return d_q, kv._replace(latent=d_latent, k_rope=d_keys.rope, pos=None, seg=None), d_up
