"""The frames that a forward and a backward of attention stand in.

`differentiable` makes one function of them. A ring has many sets of keys for the same queries:
`Backward` prepares those once and adds up in place what the sets share.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Backward(NamedTuple):
    """Gradients of attention to one set of keys after another, of the same queries.

    ask     (q, lse, d_out, delta, scale=) -> asked          what does not change from set to set
    start   (asked, *weights) -> sums                        of what sets share: nothing yet
    add     (asked, sums, kv, *weights) -> sums, d_kv        one set; sums may be changed in place
    finish  (asked, sums) -> (d_nope, d_rope), *d_weights    float32
    skips   a set of which no query sees a key costs next to nothing: no need to ask before
    """

    ask: Callable[..., Any]
    start: Callable[..., Any]
    add: Callable[..., tuple[Any, Any]]
    finish: Callable[[Any, Any], tuple]
    skips: bool


def summed(grads: Callable) -> Backward:
    """From the gradients of one set: grads(q, kv, *weights, lse, d_out, delta, scale=)."""

    def ask(q, *row, scale):
        return q, row, scale

    def start(asked, *weights):
        like = lambda x: jnp.zeros(x.shape, jnp.float32)  # noqa: E731
        return jax.tree.map(like, ((asked[0].nope, asked[0].rope), *weights))

    def add(asked, sums, kv, *weights):
        q, row, scale = asked
        d_q, d_kv, *d_weights = grads(q, kv, *weights, *row, scale=scale)
        return jax.tree.map(jnp.add, sums, (d_q, *d_weights)), d_kv

    return Backward(ask, start, add, lambda asked, sums: sums, skips=False)


def at_once(backward: Backward) -> Callable:
    """The other way about: the gradients of one set."""

    def grads(q, kv, *rest, scale):
        *weights, lse, d_out, delta = rest
        asked = backward.ask(q, lse, d_out, delta, scale=scale)
        sums, d_kv = backward.add(asked, backward.start(asked, *weights), kv, *weights)
        d_q, *d_weights = backward.finish(asked, sums)
        return d_q, d_kv, *d_weights

    return grads


def differentiable(forward: Callable, grads: Callable) -> Callable:
    """(q, *keys, scale=) -> Partial from two functions; keys are any trees.

    forward  (q, *keys, scale=) -> Partial
    grads    (q, *keys, lse, d_out, delta, scale=) -> (d_nope, d_rope), *d_keys, float32, positions
             and segments None

    Residuals are the inputs, out and lse. A Partial's gradient is delta = sum(out d_out) - d_lse;
    the cotangent of max_logit is dropped.
    """

    @functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
    def attention(scale, q, *keys):
        return forward(q, *keys, scale=scale)

    def fwd(scale, q, *keys):
        # Under a scan over layers, jax would compute what positions alone decide once for all of
        # them: the masks of all tile pairs, kept in memory. The barrier ties them to the layer.
        p = forward(*jax.lax.optimization_barrier((q, *keys)), scale=scale)
        return p, (q, keys, p.out, p.lse)

    def bwd(scale, residuals, cotangent):
        q, keys, out, lse = residuals
        d_out, d_lse, _ = cotangent
        # An empty row's lse is -inf whatever the inputs: its cotangent must not be NaN or inf.
        d_lse = jnp.where(jnp.isneginf(lse), 0.0, d_lse)
        delta = jnp.sum(out * d_out, -1) - d_lse
        (d_nope, d_rope), *d_keys = grads(q, *keys, lse, d_out, delta, scale=scale)
        # None: positions and segments are integers, they have no gradient.
        d_q = q._replace(nope=d_nope, rope=d_rope, pos=None, seg=None, since=None)
        return tuple(jax.tree.map(
            lambda d, x: None if d is None else d.astype(x.dtype), (d_q, *d_keys), (q, *keys),
            is_leaf=lambda x: x is None,
        ))

    attention.defvjp(fwd, bwd)
    return lambda q, *keys, scale: attention(scale, q, *keys)
