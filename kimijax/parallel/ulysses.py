"""Queries of a few heads come together; their keys too, or in a ring of groups (hybrid).

Ulysses (arXiv:2309.14509) on all devices, or (USP, arXiv:2405.07719) on groups of neighbours: a
group is then what a device is to the ring. Its latents travel together, and every device of it
attends for its share of the heads to what comes by.
"""

import functools

import jax
import jax.numpy as jnp

from kernels_pallas.partial import Partial
from kimijax.parallel.device import Local, floats_of, join
from kimijax.parallel.gather import gather, scatter
from kimijax.parallel.ring import ring_backward, ring_forward


def ulysses_forward(at: Local, q, kv, up) -> Partial:
    """All tokens of a share of the heads."""
    return _forward(at, lambda q, kv, up: at.keys_of(kv, up, q), q, kv, up)


def ulysses_backward(at: Local, q, kv, up, *row):
    """The mirror of ulysses_forward."""
    read = lambda q, kv, up, *row: at.grads_of(kv, up, q, *row)  # noqa: E731
    return _backward(at, read, q, kv, up, *row)


def hybrid_forward(at: Local, q, kv, up) -> Partial:
    """The tokens of a group, for a share of the heads; the latents of all groups come by."""
    ring, group = at.over(at.names[:-1]), at.over(at.names[-1:])
    return _forward(group, functools.partial(ring_forward, ring), q, kv, up)


def hybrid_backward(at: Local, q, kv, up, *row):
    """The mirror of hybrid_forward."""
    ring, group = at.over(at.names[:-1]), at.over(at.names[-1:])
    return _backward(group, functools.partial(ring_backward, ring), q, kv, up, *row)


def _forward(at: Local, read, q, kv, up) -> Partial:
    q, kv, take = _few_heads(at, q, kv, up)
    return to_tokens(at, read(q, *take(kv, up)))


def _backward(at: Local, read, q, kv, up, lse, d_out, delta):
    """Gradients of what heads share are summed, in float32."""
    q, kv, take = _few_heads(at, q, kv, up)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), (floats_of(kv), up))
    _, pull = jax.vjp(lambda f, up: _floats(take(join(kv, f), up)), *wide)
    row = (to_heads(at, x) for x in (lse, d_out, delta))
    d_q, d_kv, d_up = read(q, *take(kv, up), *row)
    d_kv, d_up = pull((d_kv, d_up))
    return to_tokens(at, d_q), scatter(at, d_kv), d_up


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


def _floats(pair):
    kv, up = pair
    return floats_of(kv), up
