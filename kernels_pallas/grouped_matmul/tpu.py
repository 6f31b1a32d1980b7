"""Rows sorted by group times the matrices of their groups, as a TPU kernel.

    Y[rows of group e] = X[rows of group e] W_e          back: X W_e^T, nothing transposed in memory

Grid: block of result columns, visit (see visits.py). All that is contracted lies in VMEM, so while
visits of a group follow each other its matrix stays: matrices are read once a call, and only those
of groups with rows. X is read once for each block of columns.

A tile with rows of one group alone is one product, contracted a piece at a time. Of another, only
pieces of PIECE rows that have some of the group are computed. Packed matrices are widened once per
group and block of columns, then multiplied by each of its tiles. With few rows to a group a tile is
small, and a piece of the matrix is widened in the same schedule as it is multiplied. That takes
longer than to read it for int4 and, before tpu7x, for fp8: 5 and 9 vector operations a number.

VMEM of K2's gate, bfloat16, tiles of 512 rows, 7168 contracted, 1024 columns: X 7 MiB and W 14,
both twice; result 1, twice, accumulator 2: 46 MiB (the compiler takes 48). int8, fp8: W 7 twice and
14 widened; int4: W 3.5 twice, scales 0.4 twice and 14 widened.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas import limits
from kernels_pallas.attention.tile import LANE, dot, up
from kernels_pallas.grouped_matmul.expand import (
    Form,
    columns,
    each,
    form_of,
    permuted,
    piece,
    specs,
    stacked,
)
from kernels_pallas.grouped_matmul.visits import Visits, visits_of
from kernels_pallas.grouped_matmul.weights import Int4, Int8, Packed, Weights, shape

ROWS, PIECE, LEAST = 512, 128, 64  # of a tile at most, decided upon, of a tile at least
SUBLANES = 16  # rows that lie together in bfloat16
TURN, WIDEST = 2**30, 2048  # products of a turn of the inner loop, and what it contracts, at most
VMEM, BLOCKS = 56 << 20, 50 << 20  # bytes a kernel may use, and its blocks


class Sizes(NamedTuple):
    """How a call is cut."""

    rows: int  # of a tile
    columns: int  # of a block
    chunk: int  # contracted in a turn
    form: Form  # of packed matrices
    held: bool  # widened matrices are kept

    @property
    def wide(self) -> int:
        """What is contracted, padded to whole pieces."""
        return self.form.pieces * self.form.chunk


def rows_of(m: int, groups: int, itemsize: int) -> int:
    """Of a tile: what a group has on average, within bounds.

    LEAST rows are multiplied while the matrix unit is loaded: with fewer a group had more visits.
    """
    if m >= groups * 2 * PIECE:
        return ROWS * 2 // itemsize
    return min(PIECE if m > groups * LEAST else LEAST, up(m, SUBLANES))


def sizes_of(x, weights: Weights, a: int, b: int, groups: int) -> Sizes:
    """As many of b columns as fit with all `a` that are contracted, in an even number of blocks.

    Even, so that both cores of a chip have the same to do.
    """
    form, size = form_of(weights, a), x.dtype.itemsize
    rows = rows_of(x.shape[0], groups, size)
    while rows > PIECE and 2 * rows * a * size > BLOCKS // 3:
        rows //= 2
    packed = isinstance(weights, Packed)
    held = packed and rows > PIECE
    own = sum(w.size * w.dtype.itemsize for w in jax.tree.leaves(weights)) / (
        groups * a * b * jax.tree.leaves(weights)[0].shape[0]
    )
    column = a * (2 * own + held * size) + rows * (2 * size + 8)
    width = part(b, int((BLOCKS - 2 * rows * a * size) / column), 2)
    chunk = form.chunk
    if held or not packed:
        wide = form.pieces * chunk
        chunk = divisor(wide, max(min(TURN // (rows * width), WIDEST), LANE))
    return Sizes(rows, width, chunk, form, held)


def part(x: int, most: int, parts: int = 1) -> int:
    """Columns of a block, `most` or fewer: x is cut in `parts`, or a multiple of so many.

    A multiple of 128, so the last block may reach behind x.
    """
    if x <= LANE:
        return x
    sizes = (up(pl.cdiv(x, n), LANE) for n in range(parts, parts * x, parts))
    return next(size for size in sizes if size <= max(most, LANE))


def divisor(x: int, most: int) -> int:
    """The largest multiple of 128 that divides x, of `most` at most; x itself if there is none."""
    return max((d for d in range(LANE, most + 1, LANE) if x % d == 0), default=x)


class Refs(NamedTuple):
    """What a step of the grid has in VMEM."""

    x: Any  # rows a
    w: Any  # a block of the weights
    out: Any  # rows columns
    acc: Any  # rows columns   float32
    held: Any  # columns a   widened, or None


def unsupported(x, weights: Weights, sizes, layer) -> str | None:
    """Why the kernels do not multiply x by the weights, or None."""
    packed = isinstance(weights, Packed)
    if why := limits.numbers(x=x) or (None if packed else limits.numbers(weights=weights)):
        return why
    a, b = shape(weights)[-2:]
    lead = () if layer is not None else (1,)
    stack = jax.tree.map(lambda w: jax.ShapeDtypeStruct(lead + w.shape, w.dtype), weights)
    size = sizes_of(x, stack, a, b, sizes.shape[0])
    blocks = [(size.rows, a, x.dtype.itemsize)]
    if not packed:
        blocks.append((a, size.columns, weights.dtype.itemsize))
    return limits.windows(VMEM, f"{a} numbers to contract", *blocks)


def forward(x, weights, sizes, layer, back: bool = False, *, interpret: bool = False) -> jax.Array:
    """The op's TPU form. back: rows times the transposed matrices (of floats)."""
    m, groups = x.shape[0], sizes.shape[0]
    if layer is None:
        weights = jax.tree.map(lambda w: w[None], weights)
    a, b = shape(weights)[-2:][:: -1 if back else 1]
    size = sizes_of(x, weights, a, b, groups)
    if isinstance(weights, Int4):
        x = permuted(x)
    packed = isinstance(weights, Packed)
    weights = stacked(weights, size.columns) if packed else weights
    known, count = visits_of(sizes, layer, m, size.rows)
    fields = len(Visits._fields)

    def kernel(*refs):
        known, (x, w, out, acc, *held) = Visits(*refs[:fields]), refs[fields:]
        refs = Refs(x, w, out, acc, held[0] if held else None)
        _kernel(known, refs, groups, size, packed or back)

    def of_rows(width, index):
        return pl.BlockSpec(
            (size.rows, width), lambda j, v, *known: index(Visits(*known), v, j)
        )

    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=fields,
            grid=(pl.cdiv(b, size.columns), count),
            in_specs=[
                of_rows(size.wide, lambda known, v, j: (known.read[v], 0)),
                _weights_spec(weights, size, back),
            ],
            out_specs=of_rows(size.columns, lambda known, v, j: (known.tile[v], j)),
            scratch_shapes=[
                pltpu.VMEM((size.rows, size.columns), jnp.float32),
                *([pltpu.VMEM((size.columns, size.wide), x.dtype)] if size.held else []),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct((m, b), x.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM
        ),
        interpret=interpret,
        name="grouped_matmul",
    )(*known, x, weights)


def _weights_spec(weights: Weights, size: Sizes, back: bool):
    """Blocks of columns of the result and all that is contracted; weights of a stack."""
    def at(j, v, *known):
        known = Visits(*known)
        return known.layer[0], known.held[v], j

    if isinstance(weights, Packed):
        return specs(weights, size.form, size.columns, at)
    dims = [None, None, *weights.shape[2:]]
    dims[2 if back else 3] = size.columns
    last = (lambda j: (j, 0)) if back else (lambda j: (0, j))
    return pl.BlockSpec(dims, lambda *grid: (*at(*grid)[:2], *last(grid[0])))


def _kernel(known: Visits, refs: Refs, groups: int, size: Sizes, outputs_first: bool):
    v = pl.program_id(1)
    group, first = known.group[v], known.tile[v] * size.rows
    low, high = known.start[group] - first, known.start[group + 1] - first  # the group's rows
    real, whole = group < groups, (low <= 0) & (high >= size.rows)
    step = min(size.rows, PIECE)

    if size.held:
        fresh = (v == 0) | (known.group[jnp.maximum(v - 1, 0)] != group)

        @pl.when(fresh & real)
        def _():
            def widen(c):
                refs.held[:, columns(c, size.form.chunk)] = piece(
                    refs.w, c, size.form, refs.held.dtype
                )

            each(size.form.pieces, widen)

    if size.rows > step:
        @pl.when(real & whole)
        def _():
            _multiply(refs, size, outputs_first, slice(None))
            refs.out[...] = _result(refs, slice(None)).astype(refs.out.dtype)

    @pl.when(real & ~(whole & (size.rows > step)))
    def _():
        @pl.loop(jax.lax.div(jnp.maximum(low, 0), step),
                 jax.lax.div(jnp.minimum(high, size.rows) + step - 1, step))
        def _(p):
            rows = pl.ds(pl.multiple_of(p * step, step), step)
            _multiply(refs, size, outputs_first, rows)
            keep(refs.out, rows, _result(refs, rows), low - p * step, high - p * step)

    @pl.when(~real)
    def _():
        keep(refs.out, slice(None), jnp.zeros_like(refs.acc), low, high)


def _multiply(refs: Refs, size: Sizes, outputs_first: bool, rows) -> None:
    """The accumulator of some rows: x times the matrix, a piece at a time."""
    refs.acc[rows] = jnp.zeros_like(refs.acc[rows])

    def add(c):
        lanes = columns(c, size.chunk)
        if not outputs_first:
            w = refs.w[lanes].astype(refs.x.dtype)
        elif size.held:
            w = refs.held[:, lanes]
        elif isinstance(refs.w, Packed):
            w = piece(refs.w, c, size.form, refs.x.dtype)
        else:
            w = refs.w[:, lanes].astype(refs.x.dtype)
        refs.acc[rows] += dot(refs.x[rows, lanes], w, (1, int(outputs_first)))

    each(size.wide // size.chunk, add)


def _result(refs: Refs, rows) -> jax.Array:
    acc = refs.acc[rows]
    return acc * refs.w.scale[...].astype(jnp.float32) if isinstance(refs.w, Int8) else acc


def keep(out, rows, values, low, high) -> None:
    """Write rows from low to high alone: others belong to other groups."""
    row = jax.lax.broadcasted_iota(jnp.int32, values.shape, 0)
    mine = (row >= low) & (row < high)
    out[rows] = jnp.where(mine, values, out[rows].astype(jnp.float32)).astype(out.dtype)
