"""The definition of attention over positions: dense, float32."""

import jax
import jax.numpy as jnp

from kernels_pallas.partial import Partial, from_logits

HIGHEST = jax.lax.Precision.HIGHEST


def visible(q, kv) -> jax.Array:
    """b t s: the key is of the query's segment, not in its future and not before its sight."""
    k_pos, k_seg = kv.pos[:, None, :], kv.seg[:, None, :]
    same = (q.seg[..., None] == k_seg) & (k_seg >= 0)
    return same & (k_pos <= q.pos[..., None]) & (k_pos >= q.since[..., None])


def attention(q, kv, *, scale: float) -> Partial:
    """softmax(scale q k^T) v over the visible keys."""
    b, t, h, n = q.nope.shape
    g = kv.key.shape[2]
    f32 = jnp.float32

    def contract(eqn, *args):
        return jnp.einsum(eqn, *(a.astype(f32) for a in args), precision=HIGHEST)

    heads = q.nope.reshape(b, t, g, h // g, n)
    logits = contract("btgin,bsgn->btgis", heads, kv.key)
    if q.rope is not None:
        logits += contract("btgip,bsp->btgis", q.rope.reshape(b, t, g, h // g, -1), kv.rope)
    seen = visible(q, kv)[:, :, None, None, :]
    p = from_logits(logits * scale, seen, lambda w: contract("btgis,bsgv->btgiv", w, kv.value))
    return Partial(
        p.out.reshape(b, t, h, -1), p.lse.reshape(b, t, h), p.max_logit.reshape(b, t, h)
    )


def attention_grads(q, kv, lse, d_out, delta, *, scale: float):
    """P = exp(S - lse), dV = P^T dO, dS = P * (dO V^T - delta) * scale, then dS into both sides."""
    b, t, h, n = q.nope.shape
    g = kv.key.shape[2]

    def contract(eqn, *args):
        return jnp.einsum(eqn, *(a.astype(jnp.float32) for a in args), precision=HIGHEST)

    fold = lambda x: x.reshape(b, t, g, h // g, *x.shape[3:])  # noqa: E731
    logits = contract("btgin,bsgn->btgis", fold(q.nope), kv.key)
    if q.rope is not None:
        logits += contract("btgip,bsp->btgis", fold(q.rope), kv.rope)
    seen = visible(q, kv)[:, :, None, None, :]
    row = jnp.where(jnp.isneginf(lse), 0.0, lse)
    p = jnp.where(seen, jnp.exp(logits * scale - fold(row)[..., None]), 0.0)
    d_p = contract("btgiv,bsgv->btgis", fold(d_out), kv.value)
    d_s = p * (d_p - fold(delta)[..., None]) * scale
    d_nope = contract("btgis,bsgn->btgin", d_s, kv.key).reshape(b, t, h, n)
    d_key = contract("btgis,btgin->bsgn", d_s, fold(q.nope))
    d_value = contract("btgis,btgiv->bsgv", p, fold(d_out))
    d_kv = kv._replace(key=d_key, value=d_value, rope=None, pos=None, seg=None)
    if q.rope is None:
        return (d_nope, None), d_kv
    d_rope = contract("btgis,bsp->btgip", d_s, kv.rope).reshape(q.rope.shape)
    return (d_nope, d_rope), d_kv._replace(rope=contract("btgis,btgip->bsp", d_s, fold(q.rope)))
