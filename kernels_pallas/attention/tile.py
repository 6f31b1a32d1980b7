"""What the attention kernels of a TPU share: blocks, what is known of them, and one schedule.

Scores lie transposed, keys down and queries across: S^T = K Q^T and O^T = V^T P^T. The statistics
of a query are then a row of lanes and reductions over keys are sums of registers (in the usual
order they go through the cross-lane unit), P^T enters the matrix unit as it lies, and a unit 256
wide is full in the second product although a value has 128 numbers.

    m' = max(m, max_k S),  P = 2^(S - m'),  l' = l 2^(m - m') + sum_k P,  O' = O 2^(m - m') + P V

in base 2: q comes in times scale / ln 2. SUB keys x LANES queries at a time, and three of these
steps are in flight, as all that happens between two branches is one schedule: products for the
next, exponentials of this one, values of the last.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels_pallas.attention.bounds import (
    FAR,
    KeyBounds,
    QueryBounds,
    any_pair,
    every_pair,
    key_bounds,
    pairs,
    query_bounds,
    span,
)
from kernels_pallas.partial import MASKED, Partial

LANE = 128
SUB, LANES = 128, 256  # keys x queries of one step
PIECE = 512  # so many queries and keys are decided upon where a block is seen in part
VMEM = 48 << 20  # bytes a kernel may use; it takes a fraction, the compiler's limit is lower
LOG2E = 1.4426950408889634


class Blocks(NamedTuple):
    """Sizes that fit a call: a block of queries, and of keys, and pieces that divide them."""

    lanes: int  # queries of a step
    q_piece: int
    q: int
    k_piece: int
    k: int


def up(x: int, size: int) -> int:
    """x, or the next multiple of size."""
    return -(-x // size) * size


def blocks_for(t: int, s: int, block_q: int, block_k: int, dtype) -> Blocks:
    """For t queries and s keys, which are padded to multiples of `q` and `k`.

    An exact float32 product is six of the matrix unit: a smaller block is as long a schedule.
    """
    lanes = LANE if t <= LANE else LANES
    block_k = max(block_k // 4, PIECE) if dtype == jnp.float32 else block_k
    q_piece, k_piece = min(PIECE, up(t, lanes)), min(PIECE, up(s, SUB))
    return Blocks(
        lanes, q_piece, min(block_q, up(t, q_piece)), k_piece, min(block_k, up(s, k_piece))
    )


def pad(x, size: int, axis: int, fill=0):
    """`axis` up to a multiple of `size`."""
    widths = [(0, -x.shape[a] % size if a == axis else 0) for a in range(x.ndim)]
    return jnp.pad(x, widths, constant_values=fill)


def dot(a, b, contract: tuple[int, int]):
    """float32 product over one dim of each; float32 inputs are multiplied exactly."""
    exact = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        a, b, (((contract[0],), (contract[1],)), ((), ())),
        precision=exact, preferred_element_type=jnp.float32,
    )


def across(x, scale: float, blocks: Blocks):
    """Queries b t h n as kernels want them: b h n t, padded, times scale / ln 2."""
    x = (x.astype(jnp.float32) * (scale * LOG2E)).astype(x.dtype)
    return pad(jnp.moveaxis(x, 1, 3), blocks.q, 3)


def queries_at(q, blocks: Blocks) -> jax.Array:
    """Positions, segments and `since` of queries, b 3 t."""
    of_q = [pad(q.pos, blocks.q, 1), pad(q.seg, blocks.q, 1, -1), pad(q.since, blocks.q, 1)]
    return jnp.stack(of_q, 1)


def keys_at(kv, blocks: Blocks) -> jax.Array:
    """Positions and segments of keys, b 2 s."""
    return jnp.stack([pad(kv.pos, blocks.k, 1, FAR), pad(kv.seg, blocks.k, 1, -1)], 1)


class Scalars(NamedTuple):
    """What the scalar core reads before anything else, flat, rows of the batch one after another.

    Bounds are laid out block by block, field by field.
    """

    queries: jax.Array
    q_pieces: jax.Array
    keys: jax.Array
    k_pieces: jax.Array
    first: jax.Array  # of a block of queries its first of keys, or the other way about
    count: jax.Array  # and how many to the last


def scalars(q_where, k_where, blocks: Blocks, by_keys: bool = False) -> Scalars:
    """Bounds of the blocks of a call; `first` and `count` of queries, or of keys."""
    of_q, q_pieces = (
        query_bounds(q_where[:, 0], q_where[:, 1], q_where[:, 2], size)
        for size in (blocks.q, blocks.q_piece)
    )
    of_k, k_pieces = (
        key_bounds(k_where[:, 0], k_where[:, 1], size) for size in (blocks.k, blocks.k_piece)
    )
    flat = lambda bounds: jnp.stack(bounds, -1).reshape(-1)  # noqa: E731
    met = pairs(of_q, of_k)
    first, count = span(met.swapaxes(-1, -2) if by_keys else met)
    return Scalars(
        flat(of_q), flat(q_pieces), flat(of_k), flat(k_pieces), first.reshape(-1), count.reshape(-1)
    )


def nth(known: Scalars, block, n):
    """The n-th of the blocks that a block meets; the last one again when there are no more."""
    return known.first[block] + jnp.minimum(n, jnp.maximum(known.count[block] - 1, 0))


def read(kind, ref, block):
    """The bounds of one block."""
    width = len(kind._fields)
    return kind(*(ref[block * width + i] for i in range(width)))


class Decision(NamedTuple):
    """What is to be done with a block of queries and one of keys."""

    whole: jax.Array  # all see all: no mask
    part: jax.Array  # piece by piece


def decide(known: Scalars, block_q, block_k, within) -> Decision:
    """From the bounds of both; `within`: there is such a pair."""
    of_q = read(QueryBounds, known.queries, jnp.where(within, block_q, 0))
    of_k = read(KeyBounds, known.keys, jnp.where(within, block_k, 0))
    whole = within & every_pair(of_q, of_k)
    return Decision(whole, within & ~whole & any_pair(of_q, of_k))


def by_pieces(
    known: Scalars, block_q, block_k, blocks: Blocks, prepare: Callable, use: Callable
) -> None:
    """use(first query, first key) of every pair of pieces that may see each other.

    prepare(first key) comes before those of a piece of keys.
    """
    q_pieces, k_pieces = blocks.q // blocks.q_piece, blocks.k // blocks.k_piece
    of_block = read(QueryBounds, known.queries, block_q)

    @pl.loop(0, k_pieces)
    def _(n):
        of_k = read(KeyBounds, known.k_pieces, block_k * k_pieces + n)

        @pl.when(any_pair(of_block, of_k))
        def _():
            key = pl.multiple_of(n * blocks.k_piece, blocks.k_piece)
            prepare(key)

            @pl.loop(0, q_pieces)
            def _(m):
                @pl.when(any_pair(read(QueryBounds, known.q_pieces, block_q * q_pieces + m), of_k))
                def _():
                    use(pl.multiple_of(m * blocks.q_piece, blocks.q_piece), key)


def columns(where_ref, at):
    """Positions and segments of SUB keys, down, the same in every lane; padding has segment -2."""
    pos, seg = (where_ref[row : row + 1, pl.ds(at, SUB)] for row in range(2))
    down = lambda x: jnp.broadcast_to(x, (LANE, SUB)).T  # noqa: E731
    return down(pos), down(jnp.where(seg >= 0, seg, -2))  # a query of padding has -1


def visible(where, k_pos, k_seg, lanes):
    """Which of SUB keys, as `columns` has them, the queries of some lanes see.

    since <= k_pos <= pos is pos - k_pos <= pos - since as unsigned numbers, one comparison for two;
    signed ones compare alike when both are moved by their least.
    """
    wide = lambda x: jnp.concatenate([x] * (lanes.size // LANE), 1)  # noqa: E731
    pos, seg, since = (where[i : i + 1, lanes] for i in range(3))
    least = jnp.iinfo(jnp.int32).min
    seg = jnp.where(pos >= since, seg, -1)  # else the difference is no length
    return ((pos + least) - wide(k_pos) <= (pos - since) + least) & (wide(k_seg) == seg)


def scores(q_refs, key, rope, lanes):
    """S^T of some keys and some lanes of queries; one product, as a unit may be 256 deep."""
    query = q_refs[0][:, lanes]
    if rope is not None:
        key = jnp.concatenate([key, rope], 1)
        query = jnp.concatenate([query, q_refs[1][:, lanes]], 0)
    return dot(key, query, (1, 0))


class State(NamedTuple):
    """What a block of queries has seen so far; scratch of a kernel."""

    acc: jax.Array  # v q   not yet divided
    top: jax.Array  # 1 q   greatest score, base 2
    total: jax.Array  # 1 q

    def clear(self) -> None:
        """Nothing was seen."""
        self.acc[...] = jnp.zeros_like(self.acc)
        self.top[...] = jnp.full_like(self.top, MASKED)
        self.total[...] = jnp.zeros_like(self.total)

    def partial(self, at=slice(None)) -> Partial:
        """What some of the queries have seen: v q, 1 q, 1 q."""
        top = self.top[:, at]
        seen = top > MASKED / 2
        total = jnp.where(seen, self.total[:, at], 1.0)
        return Partial(
            jnp.where(seen, self.acc[:, at] / total, 0.0),
            jnp.where(seen, (top + jnp.log2(total)) / LOG2E, -jnp.inf),
            jnp.where(seen, top / LOG2E, -jnp.inf),
        )

    def write(self, out: Partial) -> None:
        """The Partial of all that was seen."""
        for ref, x in zip(out, self.partial(), strict=True):
            ref[...] = x


class Sides(NamedTuple):
    """Queries of a block, and how to come by keys."""

    q: tuple  # references n q and p q (or None)
    q_where: jax.Array  # 3 q
    load: Callable  # of SUB keys from a place: (key SUB n, rope SUB p or None, value SUB v)
    k_where: jax.Array  # 2 k


def attend(
    x: Sides, state: State, lanes: int, queries: tuple, keys: tuple, masked: bool
) -> None:
    """Merge keys into the state of queries, (first, count) of each; one schedule."""
    groups = [pl.ds(queries[0] + c, lanes) for c in range(0, queries[1], lanes)]
    steps = [(keys[0] + i, c) for i in range(0, keys[1], SUB) for c in range(len(groups))]
    top, total = ([ref[:, at] for at in groups] for ref in (state.top, state.total))

    def products(at, c, loaded):
        loaded = x.load(at) if c == 0 else loaded
        return scores(x.q, *loaded[:2], groups[c]), loaded

    def values(c, value, p, shrink):
        more = dot(value, p.astype(value.dtype), (0, 0))
        state.acc[:, groups[c]] = state.acc[:, groups[c]] * shrink + more

    ahead = 2 if masked else 1  # the first steps wait less for each other, and are more of a piece
    made, waiting, where = [], None, None
    for n, (at, c) in enumerate(steps):
        for later in steps[n + len(made) : n + 1 + ahead]:
            made.append(products(*later, made[-1][1] if made else None))
        s, (_, _, value) = made.pop(0)
        if masked:
            where = columns(x.k_where, at) if c == 0 else where
            s = jnp.where(visible(x.q_where, *where, groups[c]), s, MASKED)
        highest = jnp.maximum(top[c], s.max(0, keepdims=True))
        p, shrink = jnp.exp2(s - highest), jnp.exp2(top[c] - highest)
        total[c], top[c] = total[c] * shrink + p.sum(0, keepdims=True), highest
        if waiting is not None:
            values(*waiting)
        waiting = c, value, p, shrink
    values(*waiting)
    for at, most, sum_ in zip(groups, top, total, strict=True):
        state.top[:, at], state.total[:, at] = most, sum_
