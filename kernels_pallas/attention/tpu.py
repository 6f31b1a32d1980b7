"""Attention over expanded heads as a TPU kernel, forward.

Scores lie transposed, keys down and queries across: S^T = K Q^T and O^T = V^T P^T. The statistics
of a query are then a row of lanes and reductions over keys are sums of registers (in the usual
order they go through the cross-lane unit), P^T enters the matrix unit as it lies, and a unit 256
wide is full in the second product although a value has 128 numbers.

    m' = max(m, max_k S),  P = 2^(S - m'),  l' = l 2^(m - m') + sum_k P,  O' = O 2^(m - m') + P V

in base 2: q comes in times scale / ln 2. A key of 192 is two products, 128 and the 64 of the rotary
part, which all heads share; v5p and v5e charge the second as a whole one.

Grid: row, head, block of queries, block of keys. A block of keys that no query of the block can see
(bounds.py) is not read, one that all see is not masked; between the two, pieces of it are decided
upon one by one. Within, SUB keys x LANES queries at a time, and three of these steps are in flight,
as all that happens between two branches is one schedule: products for the next, exponentials of
this one, values of the last.

VMEM, bfloat16, 192/128, 1024 queries x 2048 keys: queries 0.4 MiB, keys 0.5 + 0.5 (rotary, padded),
values 0.5, all twice; out 0.5 MiB twice, accumulator 0.5; scores in flight, 3 x 128 KiB: 6 MiB.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

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
PIECE = 512  # keys that are decided upon together
BLOCK_Q, BLOCK_K = 1024, 2048
VMEM = 48 << 20  # bytes a kernel may use; it takes a fraction, the compiler's limit is lower
LOG2E = 1.4426950408889634


class Blocks(NamedTuple):
    """Sizes that fit a call: every one divides the next."""

    lanes: int  # queries of a step
    q: int
    piece: int
    k: int


def blocks_for(t: int, s: int, block_q: int, block_k: int, dtype) -> Blocks:
    """For t queries and s keys, which are padded to multiples of `q` and `k`.

    An exact float32 product is six of the matrix unit: a smaller block is as long a schedule.
    """
    lanes = LANE if t <= LANE else LANES
    block_k = block_k // 4 if dtype == jnp.float32 else block_k
    q = min(block_q, up(t, lanes))
    piece = min(PIECE, up(s, SUB))
    return Blocks(lanes, q, piece, min(max(block_k // piece, 1) * piece, up(s, piece)))


def up(x: int, size: int) -> int:
    """x, or the next multiple of size."""
    return -(-x // size) * size


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


class Inputs(NamedTuple):
    """What kernels read, padded, heads before the sequence."""

    q: tuple  # b h n t and b h p t (or None), times scale / ln 2
    q_where: jax.Array  # b 3 t: pos, seg, since
    key: tuple  # b g s n and b s p (or None)
    value: jax.Array  # b g s v
    k_where: jax.Array  # b 2 s: pos, seg


def inputs(q, kv, scale: float, blocks: Blocks) -> Inputs:
    """Queries and keys in the layout of the kernels."""
    def across(x):
        x = (x.astype(jnp.float32) * (scale * LOG2E)).astype(x.dtype)
        return pad(jnp.moveaxis(x, 1, 3), blocks.q, 3)

    down = lambda x: pad(jnp.moveaxis(x, 1, 2), blocks.k, 2)  # noqa: E731
    q_where = [pad(q.pos, blocks.q, 1), pad(q.seg, blocks.q, 1, -1), pad(q.since, blocks.q, 1)]
    k_where = [pad(kv.pos, blocks.k, 1, FAR), pad(kv.seg, blocks.k, 1, -1)]
    return Inputs(
        (across(q.nope), None if q.rope is None else across(q.rope)), jnp.stack(q_where, 1),
        (down(kv.key), None if kv.rope is None else pad(kv.rope, blocks.k, 1)), down(kv.value),
        jnp.stack(k_where, 1),
    )


class Scalars(NamedTuple):
    """What the scalar core reads before anything else, flat, rows of the batch one after another.

    Bounds are laid out block by block, field by field.
    """

    queries: jax.Array
    keys: jax.Array
    pieces: jax.Array
    first: jax.Array  # of a block of queries its first of keys, or the other way about
    count: jax.Array  # and how many to the last


def scalars(x: Inputs, blocks: Blocks, by_keys: bool = False) -> Scalars:
    """Bounds of the blocks of a call; `first` and `count` of queries, or of keys."""
    of_q = query_bounds(*(x.q_where[:, i] for i in range(3)), blocks.q)
    of_k, of_pieces = (
        key_bounds(x.k_where[:, 0], x.k_where[:, 1], size) for size in (blocks.k, blocks.piece)
    )
    flat = lambda bounds: jnp.stack(bounds, -1).reshape(-1)  # noqa: E731
    met = pairs(of_q, of_k)
    first, count = span(met.swapaxes(-1, -2) if by_keys else met)
    return Scalars(flat(of_q), flat(of_k), flat(of_pieces), first.reshape(-1), count.reshape(-1))


def read(kind, ref, block):
    """The bounds of one block."""
    width = len(kind._fields)
    return kind(*(ref[block * width + i] for i in range(width)))


class State(NamedTuple):
    """What a block of queries has seen so far; scratch of a kernel."""

    acc: jax.Array  # v q   not yet divided
    top: jax.Array  # 1 q   greatest score, base 2
    total: jax.Array  # 1 q


def columns(where_ref, at):
    """Positions and segments of SUB keys, down, the same in every lane."""
    def turn(row):
        return jnp.broadcast_to(where_ref[row : row + 1, pl.ds(at, SUB)], (LANE, SUB)).T

    return turn(0), turn(1)


def visible(where, k_pos, k_seg, lanes):
    """Which of SUB keys the queries of some lanes see."""
    wide = lambda x: jnp.concatenate([x] * (lanes.size // LANE), 1)  # noqa: E731
    k_pos, k_seg = wide(k_pos), wide(k_seg)
    pos, seg, since = (where[i : i + 1, lanes] for i in range(3))
    return (k_pos <= pos) & (k_pos >= since) & (k_seg == seg) & (k_seg >= 0)


def scores(q_refs, k_refs, at, lanes):
    """S^T of SUB keys and some lanes of queries; one product, as a unit may be 256 deep."""
    key, query = k_refs[0][pl.ds(at, SUB)], q_refs[0][:, lanes]
    if q_refs[1] is not None:
        key = jnp.concatenate([key, k_refs[1][pl.ds(at, SUB)]], 1)
        query = jnp.concatenate([query, q_refs[1][:, lanes]], 0)
    return dot(key, query, (1, 0))


def attend(x: Inputs, state: State, blocks: Blocks, start, keys: int, masked: bool) -> None:
    """Merge `keys` keys from `start` into the state; one schedule."""
    groups = [pl.ds(c, blocks.lanes) for c in range(0, blocks.q, blocks.lanes)]
    steps = [(start + i, c) for i in range(0, keys, SUB) for c in range(len(groups))]
    top, total = ([ref[:, lanes] for lanes in groups] for ref in (state.top, state.total))

    def values(at, c, p, shrink):
        lanes = groups[c]
        more = dot(x.value[pl.ds(at, SUB)], p.astype(x.value.dtype), (0, 0))
        state.acc[:, lanes] = state.acc[:, lanes] * shrink + more

    s, waiting, where = scores(x.q, x.key, steps[0][0], groups[0]), None, None
    for n, (at, c) in enumerate(steps):
        following = None
        if n + 1 < len(steps):
            following = scores(x.q, x.key, steps[n + 1][0], groups[steps[n + 1][1]])
        if masked:
            where = columns(x.k_where, at) if c == 0 else where
            s = jnp.where(visible(x.q_where, *where, groups[c]), s, MASKED)
        highest = jnp.maximum(top[c], s.max(0, keepdims=True))
        p, shrink = jnp.exp2(s - highest), jnp.exp2(top[c] - highest)
        total[c], top[c] = total[c] * shrink + p.sum(0, keepdims=True), highest
        if waiting is not None:
            values(*waiting)
        s, waiting = following, (at, c, p, shrink)
    values(*waiting)
    for lanes, most, sum_ in zip(groups, top, total, strict=True):
        state.top[:, lanes], state.total[:, lanes] = most, sum_


def _kernel(known: Scalars, x: Inputs, out: Partial, state: State, blocks: Blocks, keys: int):
    row, i, j = (pl.program_id(axis) for axis in (0, 2, 3))
    block_q = row * pl.num_programs(2) + i

    @pl.when(j == 0)
    def _():
        state.acc[...] = jnp.zeros_like(state.acc)
        state.top[...] = jnp.full_like(state.top, MASKED)
        state.total[...] = jnp.zeros_like(state.total)

    block_k = row * keys + known.first[block_q] + j
    within = j < known.count[block_q]
    of_q = read(QueryBounds, known.queries, block_q)
    of_k = read(KeyBounds, known.keys, jnp.where(within, block_k, 0))
    every = within & every_pair(of_q, of_k)
    per = blocks.k // blocks.piece

    @pl.when(every)
    def _():
        attend(x, state, blocks, 0, blocks.k, masked=False)

    @pl.when(within & ~every & any_pair(of_q, of_k))
    def _():
        @pl.loop(0, per)
        def _(n):
            @pl.when(any_pair(of_q, read(KeyBounds, known.pieces, block_k * per + n)))
            def _():
                start = pl.multiple_of(n * blocks.piece, blocks.piece)
                attend(x, state, blocks, start, blocks.piece, masked=True)

    @pl.when(j == pl.num_programs(3) - 1)
    def _():
        seen = state.top[...] > MASKED / 2
        total = jnp.where(seen, state.total[...], 1.0)
        out.out[...] = jnp.where(seen, state.acc[...] / total, 0.0)
        out.lse[...] = jnp.where(seen, (state.top[...] + jnp.log2(total)) / LOG2E, -jnp.inf)
        out.max_logit[...] = jnp.where(seen, state.top[...] / LOG2E, -jnp.inf)


def forward(q, kv, *, scale: float, interpret: bool = False) -> Partial:
    """The op's TPU form. See the package docstring for the contract."""
    (b, t, h, _), s = q.nope.shape, kv.pos.shape[1]
    blocks = blocks_for(t, s, BLOCK_Q, BLOCK_K, kv.key.dtype)
    x = inputs(q, kv, scale, blocks)
    known = scalars(x, blocks)
    v, length = x.value.shape[-1], x.q_where.shape[-1]
    in_specs, out_specs = _specs(x, blocks)
    keys = up(s, blocks.k) // blocks.k

    def kernel(*refs):
        known, x, out, state = Scalars(*refs[:5]), refs[5], Partial(*refs[6:9]), State(*refs[9:])
        _kernel(known, x, out, state, blocks, keys)

    out = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(known),
            grid=(b, h, length // blocks.q, jnp.maximum(known.count.max(), 1)),
            in_specs=[in_specs],
            out_specs=out_specs,
            scratch_shapes=[pltpu.VMEM((rows, blocks.q), jnp.float32) for rows in (v, 1, 1)],
        ),
        out_shape=Partial(*(
            jax.ShapeDtypeStruct((b, h, rows, length), jnp.float32) for rows in (v, 1, 1)
        )),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=VMEM,
        ),
        interpret=interpret,
        name="attention",
    )(*known, x)
    back = lambda x: jnp.moveaxis(x, 3, 1)[:, :t]  # noqa: E731
    return Partial(back(out.out), back(out.lse)[..., 0], back(out.max_logit)[..., 0])


def _specs(x: Inputs, blocks: Blocks) -> tuple[Inputs, Partial]:
    """Blocks of the inputs and outputs; keys that nobody needs are not read."""
    h, g, queries = x.q[0].shape[1], x.value.shape[1], x.q_where.shape[-1] // blocks.q

    def spec(shape, index):
        def at(b, h, i, j, *known):
            known, block = Scalars(*known), b * queries + i
            last = jnp.maximum(known.count[block] - 1, 0)
            return index(b, h, i, known.first[block] + jnp.minimum(j, last))

        return pl.BlockSpec(shape, at)

    def across(x):
        if x is not None:
            return spec((None, None, x, blocks.q), lambda b, h, i, j: (b, h, 0, i))

    def down(n):
        group = lambda b, m, i, j: (b, jax.lax.div(m, h // g), j, 0)  # noqa: E731
        return spec((None, None, blocks.k, n), group)

    n, v = x.q[0].shape[2], x.value.shape[3]
    p = None if x.q[1] is None else x.q[1].shape[2]
    rope = p and spec((None, blocks.k, p), lambda b, h, i, j: (b, j, 0))
    of_inputs = Inputs(
        (across(n), across(p)), spec((None, 3, blocks.q), lambda b, h, i, j: (b, 0, i)),
        (down(n), rope), down(v), spec((None, 2, blocks.k), lambda b, h, i, j: (b, 0, j)),
    )
    return of_inputs, Partial(across(v), across(1), across(1))
