"""The frame that makes a forward and a backward of select one differentiable function."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp


def differentiable(forward: Callable, grads: Callable) -> Callable:
    """(q, blocks, layer, ids, scale=) -> Partial from two functions.

    forward  (q, blocks, layer, ids, scale=) -> Partial
    grads    (q, blocks, layer, ids, lse, d_out, delta, scale=) -> d_q, d_blocks

    As attention/vjp.py: residuals are the inputs, out and lse; delta = sum(out d_out) - d_lse; the
    cotangent of max_logit is dropped.
    """

    @functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
    def select(scale, *args):
        return forward(*args, scale=scale)

    def fwd(scale, *args):
        p = forward(*args, scale=scale)
        return p, (args, p.out, p.lse)

    def bwd(scale, residuals, cotangent):
        args, out, lse = residuals
        d_out, d_lse, _ = cotangent
        # An empty row's lse is -inf whatever the inputs: its cotangent must not be NaN or inf.
        d_lse = jnp.where(jnp.isneginf(lse), 0.0, d_lse)
        delta = jnp.sum(out * d_out, -1) - d_lse
        d_q, d_blocks = grads(*args, lse, d_out, delta, scale=scale)
        return d_q, d_blocks, None, None  # layer and ids are integers

    select.defvjp(fwd, bwd)
    return lambda *args, scale: select(scale, *args)
