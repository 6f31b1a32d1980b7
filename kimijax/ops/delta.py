"""The delta rule over runs that lie anywhere: each from zero, then put together.

The rule is linear in the state, so a run maps the state before it to A S + B, and the output of a
token is o + C S. Both come out of one pass over values that are extended by the identity: columns
that start as the identity and write nothing become A and C. Maps compose associatively; pointer
jumping along the order of the runs takes log2(runs) rounds whose traffic does not depend on length.
"""

import jax
import jax.numpy as jnp

from kernels_pallas.kda import kda
from kimijax.cache import Tokens
from kimijax.ops.runs import split

HIGHEST = jax.lax.Precision.HIGHEST


def delta_rule(ops, q, k, v, g, beta, state, start, tokens: Tokens):
    """The contract of kernels_pallas.kda over a row of runs: (out b t h v, state b h k v)."""
    if tokens.runs == 1:
        return ops.kda(q, k, v, g, beta, state, start)
    out, last = ops.delta(*(split(x, tokens) for x in (q, k, v, g, beta, start)))
    size, previous = v.shape[-1], tokens.previous
    grow, add = _composed(last[..., size:], last[..., :size], previous)
    after = _apply(grow, state[:, None]) + add  # b r h k v: the state after each run
    at = previous[..., None, None, None]
    before = jnp.where(
        at >= 0, jnp.take_along_axis(after, jnp.maximum(at, 0), 1), state[:, None]
    )
    out = out[..., :size] + jnp.einsum(
        "brthj,brhjv->brthv", out[..., size:], before, precision=HIGHEST
    )
    # Runs behind the last token are padding: they know nothing of the runs before them.
    ends = jnp.maximum(tokens.used - 1, 0) // (tokens.pos.shape[1] // tokens.runs)
    state = jnp.take_along_axis(after, ends[:, None, None, None, None], 1)[:, 0]
    return out.reshape(v.shape), state


def delta_runs(q, k, v, g, beta, start, *, impl: str):
    """Runs b r t ... of the rule, each from zero: (b r t h v+k, b r h k v+k), values then maps."""
    b, r, t, h, size = k.shape
    flat = lambda x: x.reshape(-1, *x.shape[2:])  # noqa: E731
    wide = jnp.concatenate([v, jnp.zeros((b, r, t, h, size), v.dtype)], -1)
    first = jnp.concatenate([jnp.zeros((size, v.shape[-1])), jnp.eye(size)], -1)
    first = jnp.broadcast_to(first, (b * r, h, *first.shape))
    out, last = kda(*(flat(x) for x in (q, k, wide, g, beta)), first, flat(start), impl=impl)
    return out.reshape(b, r, *out.shape[1:]), last.reshape(b, r, *last.shape[1:])


def _apply(grow, state):
    return jnp.einsum("brhij,brhjv->brhiv", grow, jnp.broadcast_to(
        state, (*grow.shape[:3], *state.shape[3:])), precision=HIGHEST)


def _composed(grow, add, previous):
    """Maps of each run with those of all runs before it: state -> grow state + add."""
    for _ in range((previous.shape[1] - 1).bit_length()):
        at = jnp.maximum(previous, 0)
        take = lambda x: jnp.take_along_axis(x, at[..., None, None, None], 1)  # noqa: B023, E731
        has = (previous >= 0)[..., None, None, None]
        add = jnp.where(has, _apply(grow, take(add)) + add, add)
        grow = jnp.where(has, _apply(grow, take(grow)), grow)
        previous = jnp.where(previous >= 0, jnp.take_along_axis(previous, at, 1), -1)
    return grow, add
