"""The frame that makes a forward and a backward of attention one differentiable function."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp


def differentiable(forward: Callable, grads: Callable) -> Callable:
    """(q, kv, *, scale) -> Partial from two functions of the package's contracts.

    forward  (q, kv, *, scale) -> Partial
    grads    (q, kv, lse, d_out, delta, *, scale) -> (nope, rope, key, value, k_rope)

    Residuals are the inputs, out and lse. A Partial's gradient is delta = sum(out d_out) - d_lse;
    the cotangent of max_logit is dropped.
    """

    @functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
    def attention(q, kv, scale):
        return forward(q, kv, scale=scale)

    def fwd(q, kv, scale):
        # Under a scan over layers, jax would compute what positions alone decide once for all of
        # them: the masks of all tile pairs, kept in memory. The barrier ties them to the layer.
        p = forward(*jax.lax.optimization_barrier((q, kv)), scale=scale)
        return p, (q, kv, p.out, p.lse)

    def bwd(scale, residuals, cotangent):
        q, kv, out, lse = residuals
        d_out, d_lse, _ = cotangent
        # An empty row's lse is -inf whatever the inputs: its cotangent must not be NaN or inf.
        d_lse = jnp.where(jnp.isneginf(lse), 0.0, d_lse)
        delta = jnp.sum(out * d_out, -1) - d_lse
        d_nope, d_rope, *d_keys = grads(q, kv, lse, d_out, delta, scale=scale)
        cast = lambda x, like: None if like is None else x.astype(like.dtype)  # noqa: E731
        d_key, d_value, d_k_rope = map(cast, d_keys, (kv.key, kv.value, kv.rope))
        # None: positions and segments are integers, they have no gradient.
        none = {"pos": None, "seg": None}
        return (
            q._replace(nope=cast(d_nope, q.nope), rope=cast(d_rope, q.rope), since=None, **none),
            kv._replace(key=d_key, value=d_value, rope=d_k_rope, **none),
        )

    attention.defvjp(fwd, bwd)
    return lambda q, kv, *, scale: attention(q, kv, scale)
