"""Attention to latents as a TPU kernel, backward: made keys and their gradients stay in VMEM.

    dC = dK W_uk^T + dV W_uv^T,   dW_uk = C^T dK,   dW_uv = C^T dV

Grid: half of the heads, row, block of latents, head, block of queries. A block of latents stays
while all heads of a half come by, each with all its queries; gradients of the latents are summed in
VMEM, those of the queries and of a head's weights in HBM. Two halves because a chip may have two
cores: each takes one, and XLA adds what both give to the latents. What happens between a block of
queries and one of keys is in attention/tile_bwd.py.

VMEM, bfloat16, K2 (latent 512, key 128 + 64, value 128), 512 queries x 1024 latents: dC 2 MiB as a
sum and 4 as output, dK and dV 1.5, made keys 0.5, latents 2 x 1.3, weights 2 x 0.3 and their
gradients 1, dQ^T 3 x 0.4, queries and cotangents in both orders 2 x 0.9: 16 MiB.
"""

import functools
from typing import NamedTuple

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
    dot,
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
from kernels_pallas.attention.vjp import Backward
from kernels_pallas.latent.tpu import Inputs, keys_of, make

BLOCK_Q, BLOCK_K = 512, 1024


class Grown(NamedTuple):
    """Gradients, in HBM or in VMEM."""

    query: jax.Array | None  # b h n+p t
    up: tuple | None  # h r n and h r v
    latent: jax.Array  # 2 b s r, of each half of the heads
    rope: jax.Array | None  # 2 b s p


class Scratch(NamedTuple):
    """Besides that of attention/tile_bwd.py."""

    key: jax.Array  # k n   of one head
    value: jax.Array  # k v
    d_latent: jax.Array  # k r
    up: tuple  # r n and r v   what is in HBM
    copied: jax.Array  # a semaphore


def start(asked: Asked, up) -> tuple:
    """`Backward.start`: dQ^T, and gradients of the weights h r n and h r v."""
    return nothing(asked), tuple(jnp.zeros((w.shape[1], w.shape[0], w.shape[2])) for w in up)


def add(asked: Asked, sums: tuple, kv, up, *, interpret: bool = False):
    """`Backward.add`: (sums, gradients of the latents)."""
    s = kv.pos.shape[1]
    blocks = blocks_for(asked.query.where.shape[2], s, BLOCK_Q, BLOCK_K, kv.latent.dtype)
    x = keys_of(kv, up, blocks)
    known = scalars(asked.query.where, x.k_where, blocks, by_keys=True)
    out = _call(asked.query, x, sums, known, blocks, interpret)
    rope = None if out.rope is None else out.rope.sum(0)[:, :s] / LOG2E
    d_kv = kv._replace(latent=out.latent.sum(0)[:, :s], k_rope=rope, pos=None, seg=None)
    return (out.query, out.up), d_kv


def finish(asked: Asked, sums: tuple) -> tuple:
    """`Backward.finish`."""
    return of_queries(asked, sums[0]), tuple(jnp.moveaxis(w, 0, 1) for w in sums[1])


def backward(interpret: bool = False) -> Backward:
    """Of the package's contract."""
    return Backward(
        lambda *args, scale: ask(*args, scale=scale, block_q=BLOCK_Q), start,
        functools.partial(add, interpret=interpret), finish, skips=True,
    )


def _kernel(
    known: Scalars, q: Query, x: Inputs, out: Grown, sums: Sums, transfer: Transfer,
    scratch: Scratch, blocks: Blocks, queries: int,
):
    half, row, j, of_half, m = (pl.program_id(axis) for axis in range(5))
    heads, block_k = pl.num_programs(3), row * pl.num_programs(2) + j
    at = Step(
        row, half * heads + of_half, block_k, m, m == pl.num_programs(4) - 1, of_half == 0,
        of_half == heads - 1,
    )
    step(known, at, q, x, out, sums, transfer, scratch, blocks, queries)


class Step(NamedTuple):
    """Which step of a grid this is."""

    row: jax.Array
    head: jax.Array
    block_k: jax.Array  # the place of its bounds
    m: jax.Array  # of the blocks of queries that this one meets
    last: jax.Array  # of these
    first_head: jax.Array  # of those that come by
    last_head: jax.Array


def step(
    known: Scalars, at: Step, q: Query, x: Inputs, out: Grown, sums: Sums, transfer: Transfer,
    scratch: Scratch, blocks: Blocks, queries: int,
) -> None:
    """What a block of latents and one of queries give to one another in a head.

    queries  blocks of a row
    """
    transfer = transfer._replace(hbm=out.query.at[at.row, at.head])

    @pl.when(at.m == 0)
    def _():
        transfer.state[0], transfer.state[1] = NONE, 0
        sums.key[...], sums.value[...] = jnp.zeros_like(sums.key), jnp.zeros_like(sums.value)
        scratch.key[...], scratch.value[...] = make(x, slice(None))

    @pl.when((at.m == 0) & at.first_head)
    def _():
        scratch.d_latent[...] = jnp.zeros_like(scratch.d_latent)
        if sums.rope is not None:
            sums.rope[...] = jnp.zeros_like(sums.rope)

    within = at.m < known.count[at.block_k]
    i = jnp.where(within, known.first[at.block_k] + at.m, 0)
    of_k = Key((scratch.key, x.rope), scratch.value, x.k_where)
    visit(known, (at.row * queries, i), at.block_k, within, q, of_k, sums, transfer, blocks)

    @pl.when(at.last)
    def _():
        transfer.settle(sums)
        _pull(x, sums, scratch, tuple(w.at[at.head] for w in out.up))

    @pl.when(at.last & at.last_head)
    def _():
        out.latent[...] = scratch.d_latent[...]
        if sums.rope is not None:
            out.rope[...] = sums.rope[...]


def _pull(x: Inputs, sums: Sums, scratch: Scratch, d_up: tuple) -> None:
    """Gradients of a head's keys and values, to the latents and to its weights in HBM."""
    latent = x.latent[...]
    own = (sums.key[...] / LOG2E).astype(latent.dtype), sums.value[...].astype(latent.dtype)
    for d, w, there, here in zip(own, x.up, d_up, scratch.up, strict=True):
        before = pltpu.make_async_copy(there, here, scratch.copied)
        before.start()
        scratch.d_latent[...] += dot(d, w[...], (1, 1))
        d_w = dot(latent, d, (0, 0))
        before.wait()
        here[...] += d_w
        after = pltpu.make_async_copy(here, there, scratch.copied)
        after.start()
        after.wait()


def scratch_for(x: Inputs, blocks: Blocks) -> list:
    """Shapes, for `named_scratch`."""
    (n, v), r = (w.shape[2] for w in x.up), x.latent.shape[2]
    p = 0 if x.rope is None else x.rope.shape[2]
    vmem = lambda *shape: pltpu.VMEM(shape, jnp.float32)  # noqa: E731
    return [
        vmem(blocks.k, n), vmem(blocks.k, p) if p else None, vmem(blocks.k, v),
        *query_scratch(n, p, blocks),
        *(pltpu.VMEM((blocks.k, size), x.latent.dtype) for size in (n, v)),
        vmem(blocks.k, r), (vmem(r, n), vmem(r, v)), pltpu.SemaphoreType.DMA,
    ]


def named_scratch(refs) -> tuple[Sums, Transfer, Scratch]:
    """References to scratch by name; where a Transfer goes is not known yet."""
    return Sums(*refs[:5]), Transfer(None, *refs[5:8]), Scratch(*refs[8:])


def _call(
    q: Query, x: Inputs, sums: tuple, known: Scalars, blocks: Blocks, interpret: bool
) -> Grown:
    (b, h, n, t), (s, r), v = q.across[0].shape, x.latent.shape[1:], x.up[1].shape[2]
    p = 0 if x.rope is None else x.rope.shape[2]
    halves = 1 if h % 2 else 2
    keys, width = s // blocks.k, len(Scalars._fields)
    f32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)  # noqa: E731
    shapes = Grown(
        f32(b, h, n + p, t), (f32(h, r, n), f32(h, r, v)), f32(halves, b, s, r),
        f32(halves, b, s, p) if p else None,
    )

    def kernel(*refs):
        known, (of_q, of_x, _, *refs) = Scalars(*refs[:width]), refs[width:]
        out, scratch = Grown(*refs[:4]), named_scratch(refs[4:])
        _kernel(known, of_q, of_x, out, *scratch, blocks, t // blocks.q)

    in_specs, out_specs = _specs(q, x, blocks, shapes, h // halves, keys)
    first = width + len(jax.tree.leaves((q, x)))
    out = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=width,
            grid=(halves, b, keys, h // halves, jnp.maximum(known.count.max(), 1)),
            in_specs=in_specs,
            out_specs=out_specs,
            scratch_shapes=scratch_for(x, blocks),
        ),
        out_shape=list(shapes),
        input_output_aliases={first + i: i for i in range(3)},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", *("arbitrary",) * 4), vmem_limit_bytes=VMEM,
        ),
        interpret=interpret,
        name="latent_attention_grads",
    )(*known, q, x, sums)
    return Grown(*out)


def _specs(q: Query, x: Inputs, blocks: Blocks, out: Grown, heads: int, keys: int):
    """Blocks of inputs and outputs over (half, row, block of latents, head of the half, ...)."""
    def spec(shape, index):
        def at(half, b, j, h, m, *known):
            i = nth(Scalars(*known), b * keys + j, m)
            return index(half, b, half * heads + h, j, i)

        return pl.BlockSpec(shape, at)

    def shared(x):
        if x is not None:
            return spec((None, blocks.k, x.shape[-1]), lambda half, b, h, j, i: (b, j, 0))

    def grown(x):
        if x is not None:
            shape = (None, None, blocks.k, x.shape[-1])
            return spec(shape, lambda half, b, h, j, i: (half, b, j, 0))

    own = lambda w: spec((None, *w.shape[1:]), lambda half, b, h, j, i: (h, 0, 0))  # noqa: E731
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    of_q = query_specs(q, blocks, lambda shape, f: spec(shape, lambda half, b, h, j, i: f(b, h, i)))
    of_x = Inputs(
        None, None, shared(x.latent), shared(x.rope),
        spec((None, 2, blocks.k), lambda half, b, h, j, i: (b, 0, j)), tuple(map(own, x.up)),
    )
    in_specs = [of_q, of_x, (anywhere, (anywhere, anywhere))]
    return in_specs, [anywhere, (anywhere, anywhere), grown(out.latent), grown(out.rope)]
