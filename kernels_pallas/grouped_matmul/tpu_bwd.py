"""Gradients of grouped_matmul as TPU kernels.

    dX[rows of e] = dY[rows of e] W_e^T      dW_e = X[rows of e]^T dY[rows of e]

dX of floats is the kernel forward. Packed matrices are contracted over their outputs as they lie:
a tile of rows has all of its inputs in an accumulator, and blocks of outputs follow each other,
widened as they are multiplied; they are read again for every visit, and one core of a chip does it
all, as visits of a tile write the same rows. dW has blocks of inputs x outputs, and adds up the
visits of a group; empty groups are visited too, for their zeros.

VMEM, bfloat16. dX of K2's gate: tiles of 256 rows, 512 outputs x 7168 inputs: int4 block 1.75 MiB
(int8, fp8 3.5), result 3.5, dY 0.25, all twice, accumulator 7: 18 to 22 MiB. dW: 512 rows, 1024
inputs x 1024 outputs: X and dY 1 MiB, twice, accumulator 4, result 2 (float32 4), twice: 12 to 16.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.attention.tile import dot
from kernels_pallas.grouped_matmul.expand import (
    Form,
    columns,
    each,
    form_of,
    piece,
    restored,
    specs,
    stacked,
)
from kernels_pallas.grouped_matmul.tpu import PIECE, VMEM, divisor, forward, keep, part, rows_of
from kernels_pallas.grouped_matmul.visits import Visits, visits_of
from kernels_pallas.grouped_matmul.weights import Int4, Int8, Packed, Weights, shape

ROWS, OUTPUTS, WIDE = 256, 512, 1024  # of packed dX rows and outputs; of dW inputs and outputs
FIELDS = len(Visits._fields)


def product(x, weights: Weights, sizes, layer, back: bool = False, *, interpret: bool = False):
    """Rows times the matrices; back: transposed."""
    if back and isinstance(weights, Packed):
        return _through_packed(x, weights, sizes, layer, interpret)
    return forward(x, weights, sizes, layer, back, interpret=interpret)


def _through_packed(d_out, weights: Packed, sizes, layer, interpret: bool) -> jax.Array:
    """dX m k of dY m n."""
    m, groups, dtype = d_out.shape[0], sizes.shape[0], d_out.dtype
    if layer is None:
        weights = jax.tree.map(lambda w: w[None], weights)
    k, n = shape(weights)[-2:]
    form, block = form_of(weights, k), divisor(n, OUTPUTS)
    rows, wide, last = min(ROWS, rows_of(m, groups, 2)), form.pieces * form.chunk, n // block - 1
    known, count = visits_of(sizes, layer, m, rows)
    held = stacked(weights, block)

    def at(v, j, *known):
        known = Visits(*known)
        # Rows behind the last group read nothing.
        return known.layer[0], known.held[v], jnp.where(known.group[v] < groups, j, last)

    def kernel(*refs):
        _through(Visits(*refs[:FIELDS]), refs[FIELDS:], groups, form)

    d_x = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=FIELDS,
            grid=(count, last + 1),
            in_specs=[
                pl.BlockSpec((rows, block), lambda v, j, *known: (Visits(*known).read[v], j)),
                specs(held, form, block, at),
            ],
            out_specs=pl.BlockSpec((rows, wide), lambda v, j, *known: (Visits(*known).tile[v], 0)),
            scratch_shapes=[pltpu.VMEM((rows, wide), jnp.float32)],
        ),
        out_shape=jax.ShapeDtypeStruct((m, wide), dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary", "arbitrary"), vmem_limit_bytes=VMEM
        ),
        interpret=interpret,
        name="grouped_matmul_back",
    )(*known, d_out, held)
    return restored(d_x, k) if isinstance(weights, Int4) else d_x


def _through(known: Visits, refs, groups: int, form: Form) -> None:
    """Add a block of outputs to all inputs of a visit's rows."""
    d_out, w, out, acc = refs
    v, j, last = pl.program_id(0), pl.program_id(1), pl.num_programs(1) - 1
    group, first = known.group[v], known.tile[v] * d_out.shape[0]

    @pl.when(j == 0)
    def _():
        acc[...] = jnp.zeros_like(acc)

    @pl.when(group < groups)
    def _():
        dy = d_out[...]
        if isinstance(w, Int8):
            dy = (dy.astype(jnp.float32) * w.scale[...].astype(jnp.float32)).astype(dy.dtype)

        def add(c):
            acc[:, columns(c, form.chunk)] += dot(dy, piece(w, c, form, dy.dtype), (1, 0))

        each(form.pieces, add)

    @pl.when(j == last)
    def _():
        low, high = known.start[group] - first, known.start[group + 1] - first
        keep(out, slice(None), acc[...], low, high)


def d_weights(x, d_out, sizes, dtype, *, interpret: bool = False) -> jax.Array:
    """x^T d_out of every group, g k n."""
    (m, k), n, groups = x.shape, d_out.shape[1], sizes.shape[0]
    rows = rows_of(m, groups, x.dtype.itemsize)
    inputs, outputs = part(k, WIDE), part(n, WIDE)
    known, count = visits_of(sizes, None, m, rows, empty=True)

    def kernel(*refs):
        known, (x, d_out, out, acc) = Visits(*refs[:FIELDS]), refs[FIELDS:]
        _gather(known, x, d_out, out, acc, rows)

    of_rows = lambda width, axis: pl.BlockSpec(  # noqa: E731
        (rows, width), lambda i, j, v, *known: (Visits(*known).tile[v], (i, j)[axis])
    )
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=FIELDS,
            grid=(pl.cdiv(k, inputs), pl.cdiv(n, outputs), count),
            in_specs=[of_rows(inputs, 0), of_rows(outputs, 1)],
            out_specs=pl.BlockSpec(
                (None, inputs, outputs), lambda i, j, v, *known: (Visits(*known).group[v], i, j)
            ),
            scratch_shapes=[pltpu.VMEM((inputs, outputs), jnp.float32)],
        ),
        out_shape=jax.ShapeDtypeStruct((groups, k, n), dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM
        ),
        interpret=interpret,
        name="grouped_matmul_d_weights",
    )(*known, x, d_out)


def _gather(known: Visits, x, d_out, out, acc, size: int) -> None:
    """Add a visit to the matrix of its group."""
    v, count = pl.program_id(2), pl.num_programs(2)
    group, first = known.group[v], known.tile[v] * size
    low, high = known.start[group] - first, known.start[group + 1] - first
    whole, step = (low <= 0) & (high >= size), min(size, PIECE)
    before, after = known.group[jnp.maximum(v - 1, 0)], known.group[jnp.minimum(v + 1, count - 1)]

    @pl.when((v == 0) | (before != group))
    def _():
        acc[...] = jnp.zeros_like(acc)

    @pl.when(whole)
    def _():
        acc[...] += dot(x[...], d_out[...], (0, 0))

    @pl.when(~whole)
    def _():
        @pl.loop(jax.lax.div(jnp.maximum(low, 0), step),
                 jax.lax.div(jnp.minimum(high, size) + step - 1, step))
        def _(p):
            rows = pl.ds(pl.multiple_of(p * step, step), step)
            mine = functools.partial(_rows, low=low - p * step, high=high - p * step)
            acc[...] += dot(mine(x[rows]), mine(d_out[rows]), (0, 0))

    @pl.when((v == count - 1) | (after != group))
    def _():
        out[...] = acc[...].astype(out.dtype)


def _rows(values, low, high):
    """Zero outside of rows low to high: other groups, or what is no number behind the end."""
    row = jax.lax.broadcasted_iota(jnp.int32, values.shape, 0)
    return jnp.where((row >= low) & (row < high), values, jnp.zeros_like(values))
