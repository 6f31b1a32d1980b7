"""The partial attention that merges: what one set of keys contributes to each query.

Softmax over a union of disjoint key sets follows from the softmax over each of them:

    out = (e^lse_a out_a + e^lse_b out_b) / (e^lse_a + e^lse_b),    lse = log(e^lse_a + e^lse_b)

`merge` is associative and commutative, with `empty` as identity (the online softmax of
Milakov and Gimelshein, arXiv:1805.02867, written as a monoid). Blocks, ring hops, cache and
chunk, selected blocks and window: each is one Partial, and the answer is their merge.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Partial(NamedTuple):
    """Attention of queries to one set of keys, float32 until `finish`.

    A query that saw no key has out 0, lse -inf and max_logit -inf.
    """

    out: jax.Array  # ... v   softmax-weighted values over these keys alone
    lse: jax.Array  # ...     log of the softmax denominator
    max_logit: jax.Array  # ...     largest scaled logit seen; carries no gradient


def empty(shape: tuple[int, ...], value_dim: int) -> Partial:
    """The identity of `merge`: queries of `shape` that have seen no key."""
    nothing = jnp.full(shape, -jnp.inf, jnp.float32)
    return Partial(jnp.zeros((*shape, value_dim), jnp.float32), nothing, nothing)


def sink(logit: jax.Array, like: Partial) -> Partial:
    """One key without a value, its logit broadcast to the queries of `like` (a learned sink)."""
    lse = jnp.broadcast_to(logit.astype(jnp.float32), like.lse.shape)
    return Partial(jnp.zeros_like(like.out), lse, jnp.full_like(lse, -jnp.inf))


def merge(a: Partial, b: Partial) -> Partial:
    """The Partial over the union of two disjoint key sets.

    -inf needs the double where: exp(-inf - -inf) is NaN, forward and backward.
    """
    top = jax.lax.stop_gradient(jnp.maximum(a.lse, b.lse))
    top = jnp.where(jnp.isneginf(top), 0.0, top)
    weight_a, weight_b = jnp.exp(a.lse - top), jnp.exp(b.lse - top)
    total = weight_a + weight_b
    seen = total > 0
    safe = jnp.where(seen, total, 1.0)
    out = (weight_a / safe)[..., None] * a.out + (weight_b / safe)[..., None] * b.out
    lse = jnp.where(seen, top + jnp.log(safe), -jnp.inf)
    max_logit = jax.lax.stop_gradient(jnp.maximum(a.max_logit, b.max_logit))
    return Partial(out, lse, max_logit)


def finish(partial: Partial, dtype: jnp.dtype) -> jax.Array:
    """The attention output in the dtype of the activations."""
    return partial.out.astype(dtype)


def from_logits(logits: jax.Array, seen: jax.Array, weigh) -> Partial:
    """Softmax of float32 logits ... s where `seen`; `weigh(p)` contracts p ... s with the values.

    Inside, the masked value is finite; at the boundary an empty row has lse -inf.
    """
    logits = jnp.where(seen, logits, MASKED)
    top = jax.lax.stop_gradient(logits.max(-1))
    any_seen = top > MASKED / 2
    # What is masked is exp of less than -1e29, which is 0: the mask is not looked at again.
    weights = jnp.exp(logits - jnp.where(any_seen, top, 0.0)[..., None])
    total = weights.sum(-1)
    safe = jnp.where(any_seen, total, 1.0)
    lse = jnp.where(any_seen, top + jnp.log(safe), -jnp.inf)
    max_logit = jnp.where(any_seen, top, -jnp.inf)
    return Partial(weigh(weights) / safe[..., None], lse, jax.lax.stop_gradient(max_logit))


MASKED = -1e30
