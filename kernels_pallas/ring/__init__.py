"""Attention to latents that travel around a ring of devices, in one kernel each way.

For code that runs on every device of a shard_map (check_vma=False): each holds some queries, and
latents of its own tokens. While a device attends to a visitor, remote DMA brings the next; it needs
no collective of XLA but an all_gather of positions and segments. The same answer as
kernels_pallas.latent gives for all latents at once.
"""

import jax

from kernels_pallas import limits
from kernels_pallas.partial import Partial
from kernels_pallas.ring import tpu, tpu_bwd

# b batch, t query, s key, h head, r latent, n key dim, p rotary dim, v value dim; of one device
IMPLS = {"pallas": False, "pallas_interpret": True}  # name -> whether a TPU is simulated


def ring_attention(
    q, kv, up: tuple[jax.Array, jax.Array], *, scale: float, axes: tuple[str, ...], impl: str
) -> Partial:
    """Attention of `q` (Queries) to the latents of all devices along `axes`; out b t h v.

    kv    Latents of this device, as many on each; order is free, masks come from positions
    up    (w_uk r h n, w_uv r h v), the same everywhere
    axes  mesh axes, the ring goes along the last one first; other axes hold rings of their own

    Not differentiable by itself: see ring_attention_grads. ValueError: an unknown impl, or int8
    latents.
    """
    interpret = _interpret(impl)
    _check_floats(kv)
    limits.check("ring_attention", impl, tpu.unsupported, q, kv, up)
    return tpu.forward(q, kv, up, scale=scale, axes=axes, interpret=interpret)


def ring_attention_grads(
    q, kv, up, lse: jax.Array, d_out: jax.Array, delta: jax.Array, *, scale: float,
    axes: tuple[str, ...], impl: str,
):
    """Gradients (nope, rope), kv, up in their own structure, positions None; float32.

    lse, d_out, delta  as of kernels_pallas.attention.attention_grads

    Those of kv are sums over all devices of the ring. Those of the weights are of the device's own
    queries: the caller sums them over the ring. ValueError as of ring_attention.
    """
    row, interpret = (lse, d_out, delta), _interpret(impl)
    _check_floats(kv)
    limits.check("ring_attention_grads", impl, tpu.unsupported, q, kv, up)
    return tpu_bwd.grads(q, kv, up, *row, scale=scale, axes=axes, interpret=interpret)


def _check_floats(kv) -> None:
    if kv.scale is not None:
        raise ValueError("ring_attention: int8 latents do not travel: hand on floats")


def _interpret(impl: str) -> bool:
    if impl not in IMPLS:
        raise ValueError(f"ring_attention: unknown {impl=}, there are {sorted(IMPLS)}")
    return IMPLS[impl]
