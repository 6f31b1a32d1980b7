"""Attention of MLA to latents, returned as a Partial: keys and values are made where they are used.

A token is one latent and one rotary key for all heads; the expanded form multiplies fewer numbers
than the absorbed one while queries are many. In a kernel no expanded key ever reaches memory.
"""

import functools
from typing import NamedTuple

import jax

from kernels_pallas import int8, limits
from kernels_pallas.attention import Queries
from kernels_pallas.attention.vjp import at_once, differentiable, summed
from kernels_pallas.latent import ref, tpu, tpu_bwd, xla
from kernels_pallas.partial import Partial

# b batch, t query, s key, h head, r latent, n key dim, p rotary dim, v value dim
BACKWARD = {
    "ref": summed(ref.grads),
    "xla": summed(xla.grads),
    "pallas": tpu_bwd.backward(),
    "pallas_interpret": tpu_bwd.backward(interpret=True),
}
GRADS = {name: at_once(backward) for name, backward in BACKWARD.items()}
FORWARD = {
    "ref": ref.forward,
    "xla": xla.forward,
    "pallas": tpu.forward,
    "pallas_interpret": functools.partial(tpu.forward, interpret=True),
}
IMPLS = {
    name: f if name == "ref" else differentiable(f, GRADS[name]) for name, f in FORWARD.items()
}


class Latents(NamedTuple):
    """What MLA caches and sends: one latent a token, one rotary key shared by all heads."""

    latent: jax.Array  # b s r     or int32 b s r/4 with `scale`: words of int8 (see int8.py)
    k_rope: jax.Array | None  # b s p   rotated by its absolute position
    pos: jax.Array  # b s
    seg: jax.Array  # b s
    scale: jax.Array | None = None  # b s   float32: a latent is its int8 times this


def latent_attention(
    q: Queries, kv: Latents, up: tuple[jax.Array, jax.Array], *, scale: float, impl: str
) -> Partial:
    """Causal attention of `q` by position; `up` is (w_uk r h n, w_uv r h v). out b t h v.

    Masks, order and `impl` are those of kernels_pallas.attention. Differentiable in all float
    inputs, through out and lse; int8 latents are read forward alone. They are widened to the dtype
    of `up` where keys are made. ValueError: an unknown impl, or shapes that do not fit.
    """
    if impl not in IMPLS:
        raise ValueError(f"latent_attention: unknown {impl=}, there are {sorted(IMPLS)}")
    int8.check("latent_attention", kv.latent, kv.scale)
    (h, n), r = q.nope.shape[2:], int8.width(kv.latent, kv.scale)
    if up[0].shape != (r, h, n) or up[1].shape[:2] != (r, h):
        raise ValueError(
            f"latent_attention: queries b t h n {q.nope.shape} and latents b s r {kv.latent.shape} "
            f"do not fit weights r h n {up[0].shape} and r h v {up[1].shape}"
        )
    if (q.rope is None) != (kv.k_rope is None):
        raise ValueError("latent_attention: queries and keys both have a rotary part, or neither")
    limits.check("latent_attention", impl, tpu.unsupported, q, kv, up)
    return (IMPLS if kv.scale is None else FORWARD)[impl](q, kv, up, scale=scale)


def latent_attention_grads(
    q: Queries, kv: Latents, up, lse, d_out, delta, *, scale: float, impl: str
):
    """Gradients of one set of latents within attention over many: (nope, rope, kv, up).

    lse, d_out, delta  as of kernels_pallas.attention.attention_grads
    kv, up             in their own structure, positions None

    float32; ValueError for an unknown impl or for int8 latents.
    """
    if impl not in GRADS:
        raise ValueError(f"latent_attention_grads: unknown {impl=}, there are {sorted(GRADS)}")
    if kv.scale is not None:
        raise ValueError("latent_attention_grads: int8 latents have no gradient: hand on floats")
    sizes = tpu_bwd.BLOCK_Q, tpu_bwd.BLOCK_K
    limits.check("latent_attention_grads", impl, tpu.unsupported, q, kv, up, *sizes)
    return GRADS[impl](q, kv, up, lse, d_out, delta, scale=scale)
