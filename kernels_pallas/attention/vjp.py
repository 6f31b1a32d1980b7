"""The frame that makes a forward and a backward of attention one differentiable function."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp


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
