"""A chunk of the delta rule for two heads, as the TPU kernels compute it.

Everything lies transposed, channels down; across are LANES = 2 heads x 64 tokens, so that sums over
channels are sums of registers and what is triangular in a head is one product for both. i, j are
tokens of a chunk, a = exp g, and exp(G_i - G_j) is the product of a over j < m <= i:

    A_ij = beta_i sum_k k_i k_j exp(G_i - G_j), j < i;    B_ij the same of q_i, without beta, j <= i
    E = beta (V - S (K exp G)),   U = E (I + A)^-T,   O = S (Q exp G) + U B^T
    S' = S exp G_C + U (K exp(G_C - G))^T                 (S is v x k here: O^T and U^T of xla.py)

No decay is ever divided by another, and none is the exponential of a difference: those within SUB
tokens are built by moving keys on, a token and its decay at a time, which gives A and B diagonal by
diagonal; those between blocks meet in the middle as in xla.py. A document that starts is a decay
of zero. The inverse is by forward substitution within SUB tokens, for all blocks of both heads at
once and diagonal by diagonal; blocks are then joined twice: M' = M - M A M.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.attention.tile import dot

CHUNK, SUB, HEADS = 64, 16, 2
LANES = HEADS * CHUNK


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def roll(x, shift: int, axis: int = 1):
    """x[i] goes to i + shift."""
    return pltpu.roll(x, shift % x.shape[axis], axis)


roll.defvjp(
    lambda x, shift, axis: (roll(x, shift, axis), None),
    lambda shift, axis, _, d: (roll(d, -shift, axis),),
)


def lane(shape):
    """Which token of the chunk, 64 more for the second head."""
    return jax.lax.broadcasted_iota(jnp.int32, shape, 1)


def row(shape):
    """The index down."""
    return jax.lax.broadcasted_iota(jnp.int32, shape, 0)


def block(at, size: int):
    """Which block of `size`, a power of two."""
    return at >> (size.bit_length() - 1)


def chunk(states, q, k, v, g, beta):
    """([state v k of each head] after the chunk, out v l); q, k, g are k l, v v l, beta 1 l."""
    decay = jnp.exp(g)
    since, until, total, middle = _decays(decay)
    of_k, of_q = _diagonals(q, k, decay)
    inverse, pairs = _spread(_substituted([beta * x for x in of_k])), _spread(of_q)
    for size, meeting in middle.items():
        k_cross, q_cross = _cross(q, k, meeting, size)
        inverse = _joined(inverse, beta * k_cross, size)
        pairs += _insert(q_cross, size)
    answers, read = _from_state(states, k * since, q * since)
    u = dot(beta * (v - answers), inverse, (1, 0))
    out = read + dot(u, pairs, (1, 0))
    kept, total = k * until, total.T
    after = [
        total[h * CHUNK : h * CHUNK + 1] * state
        + dot(jnp.where(block(lane(u.shape), CHUNK) == h, u, 0.0), kept, (1, 1))
        for h, state in enumerate(states)
    ]
    return after, out


def _decays(decay):
    """Of each token, k l: the decay since its chunk began (its own included), until the chunk ends,
    of the whole chunk, and {size: between it and the middle of its two blocks of that size}."""
    at, middle = lane(decay.shape), {}
    since, until, total, size = decay, jnp.ones_like(decay), decay, 1
    while size < CHUNK:
        late = at & size != 0
        if size >= SUB:
            middle[size] = jnp.where(late, since, until)
        beside = jnp.where(late, roll(total, size), roll(total, -size))
        since = jnp.where(late, since * beside, since)
        until = jnp.where(late, until, until * beside)
        total, size = total * beside, 2 * size
    return since, until, total, middle


def _diagonals(q, k, decay):
    """<k_i, k_i-d> and <q_i, k_i-d>, decayed, of d < SUB: lists of 1 l; 0 beyond the block."""
    decay = jnp.where(lane(decay.shape) & (SUB - 1) == 0, 0.0, decay)
    of_k, of_q, moved = [jnp.zeros_like(k[:1])], [(q * k).sum(0, keepdims=True)], k
    for _ in range(1, SUB):
        moved = decay * roll(moved, 1)
        of_k.append((k * moved).sum(0, keepdims=True))
        of_q.append((q * moved).sum(0, keepdims=True))
    return of_k, of_q


def _substituted(a):
    """Diagonals of (I + A)^-1: m_d[i] = - sum_f m_f[i] a_(d-f)[i-f], m_0 = 1."""
    moved = jnp.concatenate(a, 0)
    at = row(moved.shape)
    rest, found = -moved, [jnp.ones_like(a[0])]
    for f in range(1, SUB):
        found.append(rest[f : f + 1])
        moved = jnp.where(at == 0, 0.0, roll(roll(moved, 1), 1, 0))
        rest = rest - found[f] * moved
    return found


def _spread(diagonals):
    """The transposed matrix l l of diagonals: x[j, i] is the (i-j)-th at i."""
    x = jnp.concatenate(diagonals[::-1], 0)
    at, size = lane(x.shape), 1
    while size < SUB:
        x, size = jnp.where(at & size == 0, roll(x, -size, 0), x), 2 * size
    x = jnp.concatenate([x] * (LANES // SUB), 0)
    return jnp.where(block(lane(x.shape), SUB) == block(row(x.shape), SUB), x, 0.0)


def _early(x, size):
    """The rows of every other block."""
    return jnp.concatenate([x[i : i + size] for i in range(0, x.shape[0], 2 * size)], 0)


def _insert(early, size, other=None):
    """Rows l of those of every other block; between them those of `other`, or zeros."""
    other = jnp.zeros((LANES, LANES), early.dtype) if other is None else other
    blocks = []
    for i in range(0, early.shape[0], size):
        blocks += [early[i : i + size], other[2 * i + size : 2 * i + 2 * size]]
    return jnp.concatenate(blocks, 0)


def _cross(q, k, meeting, size):
    """Pairs of the later of two blocks (across) with the earlier (down, l/2): <k, k>, <q, k>."""
    near = k * meeting
    late = lane(near.shape) & size != 0
    # One product for both: queries of the later block take the place of keys of the earlier.
    asking = jnp.where(late, near, roll(q * meeting, -size))
    both = dot(_early(near.T, size), asking, (1, 0))
    at = lane(both.shape)
    mine = (at & size != 0) & (block(row(both.shape), size) == block(at, 2 * size))
    return jnp.where(mine, both, 0.0), jnp.where(mine, roll(both, size), 0.0)


def _joined(inverse, cross, size):
    """The inverse of blocks twice as large, transposed as all is."""
    early = _early(inverse, size)
    more = dot(dot(early, _insert(cross, size), (1, 0)), inverse, (1, 0))
    return _insert(early - more, size, inverse)


def _from_state(states, k, q):
    """S k and S q, v l: a product for each head, its keys beside its queries."""
    first = lane(k.shape) < CHUNK
    a = dot(states[0], jnp.where(first, k, roll(q, CHUNK)), (1, 0))
    b = dot(states[1], jnp.where(first, roll(k, CHUNK), q), (1, 0))
    first = lane(a.shape) < CHUNK
    return jnp.where(first, a, roll(b, CHUNK)), jnp.where(first, roll(a, CHUNK), b)
