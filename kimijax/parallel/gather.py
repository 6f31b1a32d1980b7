"""All latents come to every device: for its own queries, or (Ulysses) for all of a few heads."""

import functools

import jax

from kernels_pallas.partial import Partial
from kimijax.parallel.device import Local, floats_of, join


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


def to_heads(at: Local, tree):
    """b t h ... -> b N*t h/N ...: all tokens of a few heads."""
    return jax.tree.map(
        lambda x: jax.lax.all_to_all(x, at.names, split_axis=2, concat_axis=1, tiled=True), tree
    )


def to_tokens(at: Local, tree):
    """The way back."""
    return jax.tree.map(
        lambda x: jax.lax.all_to_all(x, at.names, split_axis=1, concat_axis=2, tiled=True), tree
    )


def _few_heads(at: Local, q, kv, up):
    """Queries of this device's share of heads, and what their keys are made of."""
    heads, share = q.nope.shape[2], q.nope.shape[2] // at.axes.ways
    first = jax.lax.axis_index(at.names) * share
    where = gather(at, q._replace(nope=None, rope=None))
    q = where._replace(nope=to_heads(at, q.nope), rope=to_heads(at, q.rope))
    take = functools.partial(at.source.mine, first=first, count=share, heads=heads)
    return q, gather(at, kv), take


def ulysses_forward(at: Local, q, kv, up) -> Partial:
    """All tokens of a share of the heads."""
    q, kv, take = _few_heads(at, q, kv, up)
    return to_tokens(at, at.keys_of(*take(kv, up), q))


def ulysses_backward(at: Local, q, kv, up, lse, d_out, delta):
    """The mirror; gradients of what heads share are summed."""
    q, kv, take = _few_heads(at, q, kv, up)
    _, pull = jax.vjp(lambda f, up: _floats(take(join(kv, f), up)), floats_of(kv), up)
    row = (to_heads(at, x) for x in (lse, d_out, delta))
    own_kv, own_up = take(kv, up)
    d_q, d_kv, d_up = at.grads_of(own_kv, own_up, q, *row)
    like = lambda d, x: d.astype(x.dtype)  # noqa: E731
    d_kv, d_up = pull(jax.tree.map(like, (d_kv, d_up), (floats_of(own_kv), own_up)))
    return to_tokens(at, d_q), scatter(at, d_kv), d_up


def _floats(pair):
    kv, up = pair
    return floats_of(kv), up
