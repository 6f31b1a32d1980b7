"""The delta rule in chunks: matmuls inside a chunk, a scan over chunks that carries the state.

With G the cumulated log decay inside the chunk (own token included), S the state before it, and
i, j tokens of one document:

    <a_i, k_j> = sum_k a_ik k_jk exp(G_ik - G_jk)
    u_i = beta_i (v_i - (k_i exp G_i)^T S - sum_{j<i} <k_i, k_j> u_j)
    o_i = (q_i exp G_i)^T S + sum_{j<=i} <q_i, k_j> u_j
    S'  = diag(exp G_C) S + sum_j (k_j exp(G_C - G_j)) u_j^T

G reaches -548 in a chunk, so exp(G_i) exp(-G_j) would overflow. Blocks double in size instead,
from one token to the chunk, and a later half meets the earlier one in the middle: rows carry the
decay since the middle, columns the decay until it. Every exponent is a sum of log decays, never
positive, forward and backward, and a short sum never loses digits as the difference of long ones.
(Inside blocks of 16 the full difference, 16 x 16 x k numbers, took five times as long on a CPU.)
Memory: one state per chunk is kept for the backward pass, all else is computed again.
"""

import jax
import jax.numpy as jnp

from kernels_pallas.attention.xla import contract
from kernels_pallas.kda import ref

CHUNK = 64  # a power of two
RECURRENT = 16  # up to so many tokens the recurrence is less work than a padded chunk


def kda(q, k, v, g, beta, state, start):
    """The op's xla form. See the package docstring for the contract."""
    b, t, h, _ = q.shape
    if t <= RECURRENT:
        return ref.kda(q, k, v, g, beta, state, start)
    pad = -t % CHUNK

    def cut(x):
        """b t ... -> n b c ..., chunks first; pads are zero: they neither decay nor write."""
        x = jnp.pad(x, ((0, 0), (0, pad)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(b, -1, CHUNK, *x.shape[2:]), 1, 0)

    heads = (jnp.moveaxis(cut(x.astype(jnp.float32)), 3, 2) for x in (q, k, v, g, beta))
    doc = jnp.cumsum(cut(start), -1, dtype=jnp.int32)
    # Inside a scan nothing can merge the two passes, so the barrier against it would only cost.
    chunk = jax.checkpoint(_chunk, prevent_cse=False)
    state, out = jax.lax.scan(chunk, state.astype(jnp.float32), (*heads, doc))
    return jnp.moveaxis(out, (0, 3), (1, 2)).reshape(b, t + pad, h, -1)[:, :t], state


def _chunk(state, xs):
    """One chunk: (state after it b h k v, out b h c v)."""
    q, k, v, g, beta, doc = xs  # b h c k, b h c k, b h c v, b h c k, b h c, b c
    since, until, k_pairs, q_pairs = _pairs(q, k, g)
    same = doc[:, None, :, None] == doc[:, None, None, :]
    # Only tokens before the first start see the incoming state; only those after the last start
    # write to the outgoing one.
    carried = jnp.exp(since) * (doc == 0)[:, None, :, None]
    kept = jnp.exp(until) * (doc == doc[:, -1:])[:, None, :, None]
    error = beta[..., None] * (v - contract("bhck,bhkv->bhcv", k * carried, state))
    system = jnp.where(same, beta[..., None] * k_pairs, 0.0)
    u = contract("bhij,bhjv->bhiv", _inverse(system), error)
    out = contract("bhck,bhkv->bhcv", q * carried, state)
    out += contract("bhij,bhjv->bhiv", jnp.where(same, q_pairs, 0.0), u)
    state = carried[:, :, -1, :, None] * state + contract("bhck,bhcv->bhkv", k * kept, u)
    return state, out


def _pairs(q, k, g):
    """Log decays b h c k since the chunk's first token and until its last; pairs b h i j.

    `since` includes a token's own decay, `until` does not. The pairs are <k_i, k_j> for j < i and
    <q_i, k_j> for j <= i, zero elsewhere.
    """
    since = g[:, :, :, None]  # b h n c k: n blocks of c tokens
    until = jnp.zeros_like(since)
    q_pairs = (q * k).sum(-1)[..., None, None]  # b h n c c
    k_pairs = jnp.zeros_like(q_pairs)
    while (size := since.shape[3]) < CHUNK:
        (since_0, since_1), (until_0, until_1) = _halves(since), _halves(until)
        (k_0, k_1), (_, q_1) = _halves(_blocks(k, size)), _halves(_blocks(q, size))
        early, late = k_0 * jnp.exp(until_0), jnp.exp(since_1)
        k_pairs = _join(k_pairs, contract("bhnik,bhnjk->bhnij", k_1 * late, early))
        q_pairs = _join(q_pairs, contract("bhnik,bhnjk->bhnij", q_1 * late, early))
        since = jnp.concatenate([since_0, since_1 + since_0[..., -1:, :]], -2)
        until = jnp.concatenate([until_0 + since_1[..., -1:, :], until_1], -2)
    return since[:, :, 0], until[:, :, 0], k_pairs[:, :, 0], q_pairs[:, :, 0]


@jax.custom_vjp
def _inverse(lower):
    """(I + lower)^-1 of b h i j; what is not strictly below the diagonal is not read.

    Forward substitution by blocks that double in size: [[A, 0], [B, D]]^-1 =
    [[A^-1, 0], [-D^-1 B A^-1, D^-1]]. Matmuls only; a triangular solve goes row by row.
    """
    b, h = lower.shape[:2]
    inverse = jnp.ones((b, h, CHUNK, 1, 1), jnp.float32)
    while (size := inverse.shape[-1]) < CHUNK:
        n = CHUNK // (2 * size)
        below = lower.reshape(b, h, n, 2 * size, n, 2 * size)[..., size:, :, :size]
        below = jnp.moveaxis(jnp.diagonal(below, axis1=2, axis2=4), -1, 2)  # b h n i j
        early, late = _halves(inverse)
        product = contract("bhnij,bhnjk->bhnik", below, early)
        inverse = _join(inverse, -contract("bhnij,bhnjk->bhnik", late, product))
    return inverse[:, :, 0]


def _inverse_fwd(lower):
    inverse = _inverse(lower)
    return inverse, inverse


def _inverse_bwd(inverse, d_inverse):
    """d(M^-1) = -M^-1 dM M^-1: two products instead of the way back through every doubling."""
    product = contract("bhij,bhkj->bhik", d_inverse, inverse)
    return (-jnp.tril(contract("bhji,bhjk->bhik", inverse, product), -1),)


_inverse.defvjp(_inverse_fwd, _inverse_bwd)


def _blocks(x, size):
    """b h c k -> b h n c k: the chunk as n blocks of `size` tokens."""
    return x.reshape(*x.shape[:2], -1, size, x.shape[-1])


def _halves(x):
    """b h n ... -> the earlier and the later of neighbouring blocks, each b h n/2 ..."""
    x = x.reshape(*x.shape[:2], -1, 2, *x.shape[3:])
    return x[:, :, :, 0], x[:, :, :, 1]


def _join(blocks, cross):
    """Neighbouring diagonal blocks b h n c c and what lies below the first: b h n/2 2c 2c."""
    early, late = _halves(blocks)
    top = jnp.concatenate([early, jnp.zeros_like(cross)], -1)
    return jnp.concatenate([top, jnp.concatenate([cross, late], -1)], -2)
