"""Attention over expanded heads as a TPU kernel, backward: one pass for all gradients.

Grid: row, head, block of keys, block of queries. What happens within is in tile_bwd.py.

VMEM, bfloat16, 192/128, 512 queries x 1024 keys: dK and dV 1.5 MiB as sums and 3 as outputs, dQ^T
3 x 0.4, queries and cotangents in both orders 2 x 0.9, keys and values 2 x 0.8: 9 MiB.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.attention.tile import (
    LOG2E,
    VMEM,
    Blocks,
    Scalars,
    blocks_for,
    keys_at,
    nth,
    scalars,
)
from kernels_pallas.attention.tile_bwd import (
    NONE,
    Asked,
    Key,
    Query,
    Sums,
    Transfer,
    ask,
    nothing,
    of_queries,
    query_scratch,
    query_specs,
    visit,
)
from kernels_pallas.attention.tpu import keys_of
from kernels_pallas.attention.vjp import Backward

BLOCK_Q, BLOCK_K = 512, 1024


def add(asked: Asked, d_query, kv, *, interpret: bool = False):
    """`Backward.add`: (dQ^T, gradients of the keys)."""
    b, h, _, t = asked.query.across[0].shape
    s, g = kv.key.shape[1:3]
    blocks = blocks_for(t, s, BLOCK_Q, BLOCK_K, kv.key.dtype)
    key, value = keys_of(kv, blocks)
    of_k = Key(key, value, keys_at(kv, blocks))
    known = scalars(asked.query.where, of_k.where, blocks, by_keys=True)
    d_query, d_key, d_rope, d_value = _call(asked.query, of_k, d_query, known, blocks, interpret)
    of_heads = lambda x: jnp.moveaxis(  # noqa: E731
        x.reshape(b, g, h // g, *x.shape[2:]).sum(2), 1, 2
    )[:, :s]
    return d_query, kv._replace(
        key=of_heads(d_key) / LOG2E, value=of_heads(d_value), pos=None, seg=None,
        rope=None if d_rope is None else d_rope.sum(1)[:, :s] / LOG2E,
    )


def backward(interpret: bool = False) -> Backward:
    """Of the package's contract."""
    return Backward(
        lambda *args, scale: ask(*args, scale=scale, block_q=BLOCK_Q), nothing,
        functools.partial(add, interpret=interpret),
        lambda asked, d_query: (of_queries(asked, d_query),), skips=True,
    )


def _kernel(known: Scalars, q: Query, k: Key, d_q, outs, scratch, *, blocks: Blocks, queries: int):
    row, head, j, m = (pl.program_id(axis) for axis in range(4))
    sums, transfer = Sums(*scratch[:5]), Transfer(d_q.at[row, head], *scratch[5:])
    steps, block_k = pl.num_programs(3), row * pl.num_programs(2) + j
    grown = (sums.key, sums.rope, sums.value)

    @pl.when(m == 0)
    def _():
        transfer.state[0], transfer.state[1] = NONE, 0
        for x in jax.tree.leaves(grown):
            x[...] = jnp.zeros_like(x)

    within = m < known.count[block_k]
    i = jnp.where(within, known.first[block_k] + m, 0)
    visit(known, (row * queries, i), block_k, within, q, k, sums, transfer, blocks)

    @pl.when(m == steps - 1)
    def _():
        transfer.settle(sums)
        for out, x in zip(jax.tree.leaves(outs), jax.tree.leaves(grown), strict=True):
            out[...] = x[...]


def _call(q: Query, k: Key, d_query, known: Scalars, blocks: Blocks, interpret: bool):
    """dQ^T b h n+p t, and of every head of queries d_key, d_rope (or None), d_value b h s ..."""
    (b, h, n, t), (g, s, v) = q.across[0].shape, k.value.shape[1:]
    p = 0 if q.across[1] is None else q.across[1].shape[2]
    queries, keys, width = t // blocks.q, s // blocks.k, len(Scalars._fields)

    def spec(shape, index):
        def at(b, h, j, m, *known):
            return index(b, h, j, nth(Scalars(*known), b * keys + j, m))

        return pl.BlockSpec(shape, at)

    own = lambda n: spec(  # noqa: E731
        (None, None, blocks.k, n), lambda b, m, j, i: (b, jax.lax.div(m, h // g), j, 0)
    )
    grown = lambda n: spec((None, None, blocks.k, n), lambda b, h, j, i: (b, h, j, 0))  # noqa: E731
    shared = spec((None, blocks.k, p), lambda b, h, j, i: (b, j, 0)) if p else None
    of_q = query_specs(q, blocks, lambda shape, f: spec(shape, lambda b, h, j, i: f(b, h, i)))
    of_k = Key((own(n), shared), own(v), spec((None, 2, blocks.k), lambda b, h, j, i: (b, 0, j)))
    f32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)  # noqa: E731
    vmem = lambda *shape: pltpu.VMEM(shape, jnp.float32)  # noqa: E731
    anywhere = pl.BlockSpec(memory_space=pl.ANY)

    def kernel(*refs):
        known, refs = Scalars(*refs[:width]), refs[width:]
        (of_q, of_k, _, d_q, *outs), scratch = refs[:7], refs[7:]
        _kernel(known, of_q, of_k, d_q, outs, scratch, blocks=blocks, queries=queries)

    call = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=width,
            grid=(b, h, keys, jnp.maximum(known.count.max(), 1)),
            in_specs=[of_q, of_k, anywhere],
            out_specs=[anywhere, grown(n), grown(p) if p else None, grown(v)],
            scratch_shapes=[
                vmem(blocks.k, n), vmem(blocks.k, p) if p else None, vmem(blocks.k, v),
                *query_scratch(n, p, blocks),
            ],
        ),
        out_shape=[
            f32(b, h, n + p, t), f32(b, h, s, n), f32(b, h, s, p) if p else None, f32(b, h, s, v)
        ],
        input_output_aliases={width + len(jax.tree.leaves((q, k))): 0},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=VMEM,
        ),
        interpret=interpret,
        name="attention_grads",
    )
    return call(*known, q, k, d_query)
