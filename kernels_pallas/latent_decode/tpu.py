"""Attention of a few queries to pages of latents as a TPU kernel.

Queries of all heads lie side by side in lanes, a page lies down: S^T = C Q^T and O^T = C^T P^T as
in attention/tile.py, C read once for both. Two rotary keys share a row of 128: a half of the lanes
is blanked, and the query stands there twice.

Of more queries than fit, each `ROWS` read all pages for themselves.

Grid: part of the table, row, page of it. Pages that no query sees are sorted behind and not read,
those that all see are not masked. Parts are for the cores of a chip: each gives a Partial of its
own, and they are merged. int8 latents are widened as they are loaded.

One token in 64 heads fills half of the lanes, and the matrix units take twice as long as the memory
of a v5p (1,505 cycles a page of 512, 0.86 us, to 0.43); four tokens keep them busy at 0.88.

VMEM, bfloat16, K2 (64 heads, latent 512, rotary 64), 1 query, pages of 512: page 0.5 + 0.06 MiB,
twice; queries 0.2, out and accumulator 0.25 each.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas import limits
from kernels_pallas.attention.bounds import (
    any_pair,
    every_pair,
    key_bounds,
    query_bounds,
)
from kernels_pallas.attention.tile import (
    LANE,
    LANES,
    LOG2E,
    SUB,
    VMEM,
    Sides,
    State,
    attend,
    pad,
    up,
)
from kernels_pallas.int8 import widen_in_kernel
from kernels_pallas.partial import Partial, merge

PARTS = 2
ROWS = 2048  # queries of all heads that lie side by side at most; more read the pages again


class Known(NamedTuple):
    """What the scalar core reads first. Parts and rows one after another."""

    layer: jax.Array
    page: jax.Array  # of a part and row, those that are seen first
    whole: jax.Array  # 1: seen by all queries
    count: jax.Array  # pages that are seen, of a part and row


class Inputs(NamedTuple):
    """What the kernel reads: queries b ... rows across, and the stacks."""

    q: tuple  # b r rows and b 2p rows (or None), times scale / ln 2
    q_where: jax.Array  # b 3 rows
    latent: jax.Array  # l c j r, or words
    rope: jax.Array | None  # l c j/2 2p
    k_where: jax.Array  # c 2 j
    scale: jax.Array | None  # l c j/128 128


def unsupported(q, pages, table) -> str | None:
    """Why the kernel does not attend q to pages, or None."""
    latent = pages.latent if pages.scale is None else None  # int8 is widened to what q is
    why = limits.numbers(q_nope=q.nope, q_rope=q.rope, latent=latent, rope=pages.rope)
    return why or limits.scalars(2 * up(table.size, PARTS), f"pages of a table {table.shape}")


def decode(q, pages, layer, table, *, scale: float, interpret: bool = False) -> Partial:
    """The op's TPU form. See the package docstring for the contract."""
    (b, t, h), dtype = q.nope.shape[:3], q.nope.dtype
    if t > (few := max(1, ROWS // h)):
        parts = -(-t // few)
        back = lambda x: x.reshape(b, parts * few, *x.shape[2:])[:, :t]  # noqa: E731
        q, table = _apart(q, parts, few), jnp.repeat(table, parts, 0)
        return jax.tree.map(back, decode(q, pages, layer, table, scale=scale, interpret=interpret))
    lanes = LANE if t * h <= LANE else LANES

    def across(x):  # b t h n -> b n rows
        x = (x.astype(jnp.float32) * (scale * LOG2E)).astype(dtype)
        return pad(x.reshape(b, t * h, -1).swapaxes(1, 2), lanes, 2)

    rope = None if q.rope is None else jnp.concatenate([across(q.rope)] * 2, 1)
    where = jnp.stack([jnp.repeat(x, h, 1) for x in (q.pos, q.seg, q.since)], 1)
    q_where = jnp.concatenate([
        pad(where[:, i : i + 1], lanes, 2, fill) for i, fill in enumerate((0, -1, 0))
    ], 1)
    x = Inputs(
        (across(q.nope), rope), q_where, pages.latent, pages.rope,
        jnp.stack([pages.pos, pages.seg], 1),
        _in_hbm(pages.scale, interpret),
    )
    out = _call(x, _known(q, pages, layer, table), lanes, interpret)
    back = lambda x: x[..., : t * h].swapaxes(2, 3).reshape(PARTS, b, t, h, -1)  # noqa: E731
    out = Partial(back(out.out), back(out.lse)[..., 0], back(out.max_logit)[..., 0])
    return functools.reduce(merge, (jax.tree.map(lambda x, i=i: x[i], out) for i in range(PARTS)))


def _in_hbm(x, interpret: bool):
    """The array where it is: XLA would bring a stack that fits to VMEM whole for each layer."""
    if x is None or interpret:
        return x
    return pltpu.with_memory_space_constraint(x, pltpu.HBM)


def _apart(q, parts: int, few: int):
    """Queries as `parts` times the rows of `few` each, those that are missing seeing nothing."""
    def cut(x, fill=0):
        x = pad(x, few, 1, fill)
        return x.reshape(-1, few, *x.shape[2:])

    return jax.tree.map(cut, q)._replace(seg=cut(q.seg, -1))


def _known(q, pages, layer, table) -> Known:
    """Pages dealt out to parts, those that are seen first."""
    table = pad(table, PARTS, 1, -1)
    b, n = table.shape
    of_q = query_bounds(q.pos, q.seg, q.since, q.pos.shape[1])
    of_k = jax.tree.map(
        lambda x: x[:, 0][jnp.maximum(table, 0)],
        key_bounds(pages.pos, pages.seg, pages.pos.shape[1]),
    )
    seen, whole = (f(of_q, of_k) & (table >= 0) for f in (any_pair, every_pair))
    deal = lambda x: jnp.moveaxis(x.reshape(b, n // PARTS, PARTS), 2, 0)  # noqa: E731
    seen, whole, table = map(deal, (seen, whole, table))
    first = jnp.argsort(~seen, -1, stable=True)
    take = lambda x: jnp.take_along_axis(x, first, -1).reshape(-1).astype(jnp.int32)  # noqa: E731
    count = seen.sum(-1).reshape(-1).astype(jnp.int32)
    return Known(jnp.reshape(layer, (1,)).astype(jnp.int32), take(table), take(whole), count)


def _kernel(known: Known, x: Inputs, out: Partial, state: State, lanes: int, pages: int):
    part, row, n = (pl.program_id(axis) for axis in range(3))
    last, own = n == pl.num_programs(2) - 1, part * pl.num_programs(1) + row
    within = n < known.count[own]
    whole = within & (known.whole[own * pages + n] == 1)

    def load(at):
        rows = pl.ds(at, SUB)
        latent = x.latent[rows]
        if x.scale is not None:
            latent = widen_in_kernel(latent, x.scale[pl.ds(at // SUB, 1)], x.q[0].dtype)
        if x.rope is None:
            return latent, None, latent
        both = x.rope[pl.ds(at // (2 * SUB) * SUB, SUB)]
        left = jax.lax.broadcasted_iota(jnp.int32, both.shape, 1) < both.shape[1] // 2
        mine = left if at % (2 * SUB) == 0 else ~left
        return latent, jnp.where(mine, both, jnp.zeros_like(both)), latent

    sides = Sides(x.q, x.q_where, load, x.k_where)
    rows, tokens = x.q_where.shape[1], x.latent.shape[0]
    pl.when(n == 0)(state.clear)
    for masked, now in ((False, whole), (True, within & ~whole)):
        @pl.when(now)
        def _(masked=masked):
            attend(sides, state, lanes, (0, rows), (0, tokens), masked=masked)

    pl.when(last)(lambda: state.write(out))


def _call(x: Inputs, known: Known, lanes: int, interpret: bool) -> Partial:
    """A Partial of each part: out part b r rows, lse and max_logit part b 1 rows."""
    (b, r, rows), j = x.q[0].shape, x.latent.shape[2]
    pages = known.page.shape[0] // (PARTS * b)

    def spec(shape, index):
        def at(part, b_, n, *refs):
            known, own = Known(*refs), part * b + b_
            n = jnp.minimum(n, jnp.maximum(known.count[own] - 1, 0))
            page = jnp.maximum(known.page[own * pages + n], 0)
            return index(part, b_, page, known.layer[0])

        return pl.BlockSpec(shape, at)

    asked = lambda n: spec((None, n, rows), lambda part, b, page, layer: (b, 0, 0))  # noqa: E731
    stack = lambda *shape: spec(  # noqa: E731
        (None, None, *shape), lambda part, b, page, layer: (layer, page, 0, 0)
    )
    given = lambda n: spec(  # noqa: E731
        (None, None, n, rows), lambda part, b, page, layer: (part, b, 0, 0)
    )
    in_specs = Inputs(
        (asked(r), None if x.rope is None else asked(x.q[1].shape[1])), asked(3),
        stack(*x.latent.shape[2:]),
        None if x.rope is None else stack(j // 2, x.rope.shape[3]),
        spec((None, 2, j), lambda part, b, page, layer: (page, 0, 0)),
        None if x.scale is None else stack(*x.scale.shape[2:]),
    )

    def kernel(*refs):
        known, x, *refs = Known(*refs[:4]), *refs[4:]
        _kernel(known, x, Partial(*refs[:3]), State(*refs[3:]), lanes, pages)

    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(PARTS, b, jnp.maximum(known.count.max(), 1)),
            in_specs=[in_specs],
            out_specs=Partial(given(r), given(1), given(1)),
            scratch_shapes=[pltpu.VMEM((n, rows), jnp.float32) for n in (r, 1, 1)],
        ),
        out_shape=Partial(*(
            jax.ShapeDtypeStruct((PARTS, b, n, rows), jnp.float32) for n in (r, 1, 1)
        )),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=VMEM,
        ),
        interpret=interpret,
        name="latent_decode",
    )(*known, x)
