"""Rows sorted by group times a matrix per group: ragged tokens x experts.

Matrices are floats or packed as checkpoints store them (weights.py), and then widened a tile at a
time. Empty groups cost nothing.
"""

import functools

import jax
import jax.numpy as jnp

from kernels_pallas import limits
from kernels_pallas.grouped_matmul import ref, tpu, tpu_bwd, xla
from kernels_pallas.grouped_matmul.vjp import differentiable
from kernels_pallas.grouped_matmul.weights import (
    BLOCK,
    Fp8,
    Int4,
    Int8,
    Packed,
    Weights,
    matrix,
    numbers,
    shape,
)

__all__ = [
    "BLOCK", "Fp8", "IMPLS", "Int4", "Int8", "Packed", "Weights", "grouped_matmul", "matrix",
    "numbers", "shape",
]

# m row, g group, k input, n output, l layer
IMPLS = {
    "ref": ref.grouped_matmul,
    "xla": differentiable(xla.forward, xla.d_weights),
    "pallas": differentiable(tpu_bwd.product, tpu_bwd.d_weights),
    "pallas_interpret": differentiable(
        functools.partial(tpu_bwd.product, interpret=True),
        functools.partial(tpu_bwd.d_weights, interpret=True),
    ),
}


def grouped_matmul(
    x: jax.Array, weights: Weights, sizes: jax.Array, *, layer: jax.Array | None = None, impl: str
) -> jax.Array:
    """Rows m k, sorted by group, times the matrices of their groups -> m n in the dtype of x.

    weights  g k n of floats, cast to the dtype of x, or a packed form; l g ... with `layer`
    sizes    g   int32: rows of each group, m at most together; rows behind them give 0
    layer    int32 scalar: the slice of stacked weights, which is never copied

    `impl`: "ref", "xla", "pallas" (a TPU) or "pallas_interpret" (the same kernels, interpreted on
    any device). Accumulates in float32. Differentiable in x, and in weights of floats. ValueError:
    an unknown impl, or shapes that do not fit.
    """
    if impl not in IMPLS:
        raise ValueError(f"grouped_matmul: unknown {impl=}, there are {sorted(IMPLS)}")
    held, lead = shape(weights), (0 if layer is None else 1)
    fits = len(held) == 3 + lead and x.ndim == 2
    if not fits or x.shape[1] != held[-2] or sizes.shape != held[lead : lead + 1]:
        raise ValueError(
            f"grouped_matmul: rows m k {x.shape}, weights {'l ' * lead}g k n {held} and sizes g "
            f"{sizes.shape} must agree in g and k{'' if lead else '; stacks need a layer'}"
        )
    if isinstance(weights, Packed):
        _check(weights, held)
    if x.shape[0] == 0:
        return jnp.zeros((0, held[-1]), x.dtype)
    limits.check("grouped_matmul", impl, tpu.unsupported, x, weights, sizes, layer)
    return IMPLS[impl](x, weights, sizes, layer)


def _check(weights: Packed, held: tuple[int, ...]) -> None:
    """Scales of packed weights. ValueError: they do not fit."""
    *lead, k, n = held
    match weights:
        case Int8():
            good = weights.scale.shape == (*lead, n)
        case Fp8():
            good = weights.scale.shape == (*lead, -(-n // BLOCK), -(-k // BLOCK))
        case Int4():
            groups = weights.scale.shape[-1]
            good = weights.scale.shape[:-1] == (*lead, n) and k % (8 * groups) == 0
    if not good:
        raise ValueError(
            f"grouped_matmul: {type(weights).__name__} matrices ... k n {held} do not fit scales "
            f"{weights.scale.shape}"
        )
