"""All latents come to every device, for its own queries."""

import jax

from kernels_pallas.partial import Partial
from kimijax.parallel.device import Local


def gather(at: Local, tree):
    """Tokens of all devices, in their order: b t ... -> b N*t ..."""
    return jax.tree.map(lambda x: jax.lax.all_gather(x, at.names, axis=1, tiled=True), tree)


def scatter(at: Local, tree):
    """Sums over devices of b N*t ..., each keeping its own tokens."""
    return jax.tree.map(
        lambda x: jax.lax.psum_scatter(x, at.names, scatter_dimension=1, tiled=True), tree
    )


def gather_forward(at: Local, q, kv, up) -> Partial:
    """Every latent is here; own queries."""
    return at.keys_of(gather(at, kv), up, q)


def gather_backward(at: Local, q, kv, up, lse, d_out, delta):
    """The mirror of gather_forward."""
    d_q, d_kv, d_up = at.grads_of(gather(at, kv), up, q, lse, d_out, delta)
    return d_q, scatter(at, d_kv), d_up
