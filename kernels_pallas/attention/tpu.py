"""Attention over expanded heads as a TPU kernel, forward.

Grid: row, head, block of queries, block of keys. A block of keys that no query of the block can see
(bounds.py) is not read, one that all see is not masked; between the two, pieces of both are decided
upon one by one. What happens within is in tile.py. A key of 192 is two products on v5p and v5e, 128
and the 64 of the rotary part that all heads share; the second costs them as much as the first.

VMEM, bfloat16, 192/128, 1024 queries x 2048 keys: queries 0.4 MiB, keys 0.5 + 0.5 (rotary, padded),
values 0.5, all twice; out 0.5 MiB twice, accumulator 0.5; scores in flight, 3 x 128 KiB: 6 MiB.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas import limits
from kernels_pallas.attention.bounds import bounds_of
from kernels_pallas.attention.tile import (
    SUB,
    VMEM,
    Blocks,
    Scalars,
    Sides,
    State,
    across,
    attend,
    blocks_for,
    by_pieces,
    decide,
    keys_at,
    nth,
    pad,
    queries_at,
    scalars,
    up,
)
from kernels_pallas.partial import Partial

BLOCK_Q, BLOCK_K = 1024, 2048


class Inputs(NamedTuple):
    """What kernels read, padded, heads before the sequence."""

    q: tuple  # b h n t and b h p t (or None), times scale / ln 2
    q_where: jax.Array  # b 3 t: pos, seg, since
    key: tuple  # b g s n and b s p (or None)
    value: jax.Array  # b g s v
    k_where: jax.Array  # b 2 s: pos, seg


def unsupported(q, kv, block_q: int = BLOCK_Q, block_k: int = BLOCK_K) -> str | None:
    """Why no kernel with such blocks attends q to kv, or None."""
    why = limits.numbers(
        q_nope=q.nope, q_rope=q.rope, key=kv.key, value=kv.value, k_rope=kv.rope
    )
    return why or too_long(q, kv, blocks_for(*_lengths(q, kv), block_q, block_k, kv.key.dtype))


def too_long(q, kv, blocks: Blocks) -> str | None:
    """Why the bounds of these sequences are too many, or None."""
    t, s = _lengths(q, kv)
    t, s = up(t, blocks.q), up(s, blocks.k)
    count = bounds_of(
        q.pos.shape[0], (t // blocks.q, s // blocks.k), (t // blocks.q_piece, s // blocks.k_piece)
    )
    spans = 2 * q.pos.shape[0] * t // blocks.q
    return limits.scalars(count + spans, f"bounds of {q.pos.shape} queries and {kv.pos.shape} keys")


def _lengths(q, kv) -> tuple[int, int]:
    return q.pos.shape[1], kv.pos.shape[1]


def asked_of(q, scale: float, blocks: Blocks) -> tuple:
    """Queries in the layout of the kernels."""
    rope = None if q.rope is None else across(q.rope, scale, blocks)
    return across(q.nope, scale, blocks), rope


def keys_of(kv, blocks: Blocks) -> tuple:
    """(key, value) in the layout of the kernels."""
    down = lambda x: pad(jnp.moveaxis(x, 1, 2), blocks.k, 2)  # noqa: E731
    rope = None if kv.rope is None else pad(kv.rope, blocks.k, 1)
    return (down(kv.key), rope), down(kv.value)


def forward(q, kv, *, scale: float, interpret: bool = False) -> Partial:
    """The op's TPU form. See the package docstring for the contract."""
    (b, t, h, _), s = q.nope.shape, kv.pos.shape[1]
    blocks = blocks_for(t, s, BLOCK_Q, BLOCK_K, kv.key.dtype)
    key, value = keys_of(kv, blocks)
    x = Inputs(
        asked_of(q, scale, blocks), queries_at(q, blocks), key, value, keys_at(kv, blocks)
    )
    known = scalars(x.q_where, x.k_where, blocks)
    v, length, width = x.value.shape[-1], x.q_where.shape[-1], len(Scalars._fields)
    in_specs, out_specs = _specs(x, blocks)
    keys = up(s, blocks.k) // blocks.k

    def kernel(*refs):
        known, x, (*out, acc, top, total) = Scalars(*refs[:width]), refs[width], refs[width + 1 :]
        _kernel(known, x, Partial(*out), State(acc, top, total), blocks, keys)

    out = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=width,
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


def _kernel(known: Scalars, x: Inputs, out: Partial, state: State, blocks: Blocks, keys: int):
    row, i, j = (pl.program_id(axis) for axis in (0, 2, 3))
    last = j == pl.num_programs(3) - 1
    block_q = row * pl.num_programs(2) + i
    block_k = row * keys + known.first[block_q] + j
    decision = decide(known, block_q, block_k, j < known.count[block_q])

    def load(at):
        rows = pl.ds(at, SUB)
        return x.key[0][rows], None if x.key[1] is None else x.key[1][rows], x.value[rows]

    sides = Sides(x.q, x.q_where, load, x.k_where)
    pl.when(j == 0)(state.clear)

    @pl.when(decision.whole)
    def _():
        attend(sides, state, blocks.lanes, (0, blocks.q), (0, blocks.k), masked=False)

    @pl.when(decision.part)
    def _():
        def use(query, key):
            of_q, of_k = (query, blocks.q_piece), (key, blocks.k_piece)
            attend(sides, state, blocks.lanes, of_q, of_k, masked=True)

        by_pieces(known, block_q, block_k, blocks, lambda key: None, use)

    pl.when(last)(lambda: state.write(out))


def _specs(x: Inputs, blocks: Blocks) -> tuple[Inputs, Partial]:
    """Blocks of the inputs and outputs; keys that nobody needs are not read."""
    h, g, queries = x.q[0].shape[1], x.value.shape[1], x.q_where.shape[-1] // blocks.q

    def spec(shape, index):
        def at(b, h, i, j, *known):
            return index(b, h, i, nth(Scalars(*known), b * queries + i, j))

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
