"""Attention to latents as a TPU kernel, forward: keys and values are made in VMEM.

    K = C W_uk,  V = C W_uv   of SUB latents C and one head, then as in attention/tile.py

A block of latents is multiplied again for every block of queries: with 2,048 of them that is 1/5 of
what follows. Where a block of keys is seen whole, keys are made within the schedule of its steps;
where in part, a piece of them is made first and lies in scratch.

VMEM, bfloat16, K2 (latent 512, key 128 + 64, value 128), 2048 queries x 512 keys: queries 0.8 MiB,
latents 0.5 + 0.1, weights 0.25, all twice; out 1 MiB twice, accumulator 1, made keys 0.25. int8
latents, half of that, are widened as they are loaded.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas import limits
from kernels_pallas.attention.tile import (
    SUB,
    VMEM,
    Blocks,
    Scalars,
    Sides,
    State,
    attend,
    blocks_for,
    by_pieces,
    decide,
    dot,
    keys_at,
    nth,
    pad,
    queries_at,
    scalars,
)
from kernels_pallas.attention.tpu import asked_of, too_long
from kernels_pallas.int8 import widen_in_kernel
from kernels_pallas.partial import Partial

BLOCK_Q, BLOCK_K = 2048, 512


class Inputs(NamedTuple):
    """What kernels read, padded, heads before the sequence."""

    q: tuple  # b h n t and b h p t (or None), times scale / ln 2
    q_where: jax.Array  # b 3 t: pos, seg, since
    latent: jax.Array  # b s r, or words
    rope: jax.Array | None  # b s p
    k_where: jax.Array  # b 2 s: pos, seg
    up: tuple  # h r n and h r v
    scale: jax.Array | None = None  # b 1 s   of words


def unsupported(
    q, kv, up, block_q: int = BLOCK_Q, block_k: int = BLOCK_K
) -> str | None:
    """Why no kernel with such blocks attends q to latents, or None. Weights are cast to theirs."""
    latent = {"latent": kv.latent} if kv.scale is None else {"weights": up[0]}
    why = limits.numbers(q_nope=q.nope, q_rope=q.rope, k_rope=kv.k_rope, **latent)
    blocks = blocks_for(q.pos.shape[1], kv.pos.shape[1], block_q, block_k, made_in(kv, up))
    return why or too_long(q, kv, blocks)


def made_in(kv, up) -> jnp.dtype:
    """The dtype of keys and values that are made: of the latents, of int8 ones of the weights."""
    return kv.latent.dtype if kv.scale is None else up[0].dtype


def keys_of(kv, up, blocks: Blocks) -> Inputs:
    """Latents and weights in the layout of the kernels; queries are left out."""
    return Inputs(
        None, None, pad(kv.latent, blocks.k, 1),
        None if kv.k_rope is None else pad(kv.k_rope, blocks.k, 1), keys_at(kv, blocks),
        tuple(jnp.moveaxis(w.astype(made_in(kv, up)), 1, 0) for w in up),
        None if kv.scale is None else pad(kv.scale[:, None], blocks.k, 2),
    )


def make(x: Inputs, rows) -> tuple:
    """Keys and values of some latents of a block, in their dtype."""
    latent = x.latent[rows]
    if x.scale is not None:
        latent = widen_in_kernel(latent, x.scale[:, rows], x.up[0].dtype)
    return tuple(dot(latent, w[...], (1, 0)).astype(latent.dtype) for w in x.up)


def forward(q, kv, up, *, scale: float, interpret: bool = False) -> Partial:
    """The op's TPU form. See the package docstring for the contract."""
    (b, t, h, _), s = q.nope.shape, kv.pos.shape[1]
    dtype = made_in(kv, up)
    blocks = blocks_for(t, s, BLOCK_Q, BLOCK_K, dtype)
    x = keys_of(kv, up, blocks)._replace(
        q=asked_of(q, scale, blocks), q_where=queries_at(q, blocks)
    )
    known = scalars(x.q_where, x.k_where, blocks)
    (n, v), length, width = (w.shape[2] for w in x.up), x.q_where.shape[-1], len(Scalars._fields)
    in_specs, out_specs = specs(x, blocks)
    keys = x.k_where.shape[-1] // blocks.k

    def kernel(*refs):
        known, x, *refs = Scalars(*refs[:width]), *refs[width:]
        _kernel(known, x, Partial(*refs[:3]), State(*refs[3:6]), refs[6:], blocks, keys)

    made = [pltpu.VMEM((blocks.k_piece, size), dtype) for size in (n, v)]
    out = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=width,
            grid=(b, h, length // blocks.q, jnp.maximum(known.count.max(), 1)),
            in_specs=[in_specs],
            out_specs=out_specs,
            scratch_shapes=[
                *(pltpu.VMEM((rows, blocks.q), jnp.float32) for rows in (v, 1, 1)), *made
            ],
        ),
        out_shape=Partial(*(
            jax.ShapeDtypeStruct((b, h, rows, length), jnp.float32) for rows in (v, 1, 1)
        )),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=VMEM,
        ),
        interpret=interpret,
        name="latent_attention",
    )(*known, x)
    back = lambda x: jnp.moveaxis(x, 3, 1)[:, :t]  # noqa: E731
    return Partial(back(out.out), back(out.lse)[..., 0], back(out.max_logit)[..., 0])


def _kernel(known: Scalars, x: Inputs, out: Partial, state: State, made, blocks: Blocks, keys: int):
    row, i, j = (pl.program_id(axis) for axis in (0, 2, 3))
    last = j == pl.num_programs(3) - 1
    block_q = row * pl.num_programs(2) + i
    block_k = row * keys + known.first[block_q] + j
    pl.when(j == 0)(state.clear)
    meet(known, (block_q, block_k), j < known.count[block_q], x, state, made, blocks)
    pl.when(last)(lambda: state.write(out))


def meet(
    known: Scalars, pair: tuple, within, x: Inputs, state: State, made, blocks: Blocks
) -> None:
    """Merge a block of keys into the state of one of queries, if there is such a pair.

    pair  places of both among the bounds that are known
    made  scratch for the key and the value of a piece
    """
    decision = decide(known, *pair, within)

    def rope(rows):
        return None if x.rope is None else x.rope[rows]

    @pl.when(decision.whole)
    def _():
        def load(at):
            rows = pl.ds(at, SUB)
            key, value = make(x, rows)
            return key, rope(rows), value

        sides = Sides(x.q, x.q_where, load, x.k_where)
        attend(sides, state, blocks.lanes, (0, blocks.q), (0, blocks.k), masked=False)

    @pl.when(decision.part)
    def _():
        def prepare(start):
            for ref, new in zip(made, make(x, pl.ds(start, blocks.k_piece)), strict=True):
                ref[...] = new

        def use(query, start):
            def load(at):
                rows = pl.ds(at - start, SUB)
                return made[0][rows], rope(pl.ds(at, SUB)), made[1][rows]

            sides = Sides(x.q, x.q_where, load, x.k_where)
            of_q, of_k = (query, blocks.q_piece), (start, blocks.k_piece)
            attend(sides, state, blocks.lanes, of_q, of_k, masked=True)

        by_pieces(known, *pair, blocks, prepare, use)


def specs(x: Inputs, blocks: Blocks, known: Scalars | None = None, row=0) -> tuple[Inputs, Partial]:
    """Blocks of the inputs and outputs; latents that nobody needs are not read.

    known, row  where they are no scalar prefetch: the references, and the first row to look up
    """
    queries = x.q_where.shape[-1] // blocks.q

    def spec(shape, index):
        return pl.BlockSpec(shape, lambda b, h, i, *_: index(b, h, i))

    def met(shape, index):
        def at(b, h, i, j, *fetched):
            of_q = (row + b) * queries + i
            return index(b, nth(known or Scalars(*fetched), of_q, j))

        return pl.BlockSpec(shape, at)

    def across(n):
        return n and spec((None, None, n, blocks.q), lambda b, h, i: (b, h, 0, i))

    def shared(n):
        return n and met((None, blocks.k, n), lambda b, j: (b, j, 0))

    def own(w):
        return spec((None, *w.shape[1:]), lambda b, h, i: (h, 0, 0))

    p, v = None if x.rope is None else x.rope.shape[2], x.up[1].shape[2]
    of_inputs = Inputs(
        (across(x.q[0].shape[2]), across(p)),
        spec((None, 3, blocks.q), lambda b, h, i: (b, 0, i)),
        shared(x.latent.shape[2]), shared(p),
        met((None, 2, blocks.k), lambda b, j: (b, 0, j)), tuple(map(own, x.up)),
        None if x.scale is None else met((None, 1, blocks.k), lambda b, j: (b, 0, j)),
    )
    return of_inputs, Partial(across(v), across(1), across(1))
