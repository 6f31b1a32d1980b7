"""Matrices over the devices of a mesh while something is done to each of them.

A weight lies in pieces of its matrices. Whole matrices are dealt out where there are enough of
them, by one all-to-all there and one back: then nothing is summed. Of few matrices each device
takes a piece of the longer dim, and products over it are summed, which are no larger than the
square of the other.
XLA, told the same by shardings alone, gathers the whole weight on every device.
"""

import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from kimijax.ops.matrices import Matrices

ROWS, COLUMNS = 1, 2  # of n rows columns


class Held(NamedTuple):
    """A mesh axis over which rows or columns lie."""

    axis: str
    dim: int


def apply_dealt(
    f: Callable[..., jax.Array], x: jax.Array, matrices: Matrices, sharding: NamedSharding
) -> jax.Array:
    """f of the matrices of a weight that lies as `sharding` says, and lies so again.

    f(x, total)  n r c -> n r c, of whole matrices or pieces of their longer dim (c if r = c);
                 `total` sums what products over it give over the devices that hold the others
    """
    mesh = sharding.mesh
    n, rows, columns = matrices.sizes(x.shape)
    longer = ROWS if rows > columns else COLUMNS

    def local(x):
        return matrices.unstack(_moved(f, matrices.stack(x), held, longer, over, mesh), x.shape)

    held, counted = _held(matrices, sharding, x.ndim)
    sizes = n // counted, min(rows, columns), max(rows, columns)
    over = axes_over(mesh, sizes, held)
    run = jax.shard_map(
        local, mesh=mesh, in_specs=sharding.spec, out_specs=sharding.spec, check_vma=False
    )
    return run(jax.lax.with_sharding_constraint(x, sharding))


def _held(
    matrices: Matrices, sharding: NamedSharding, ndim: int
) -> tuple[tuple[Held, ...], int]:
    """The axes over rows and columns, outer ones first, and the devices that count apart."""
    spec = tuple(sharding.spec) + (None,) * (ndim - len(sharding.spec))
    batch, *parts = matrices.parts(ndim)
    names = lambda i: (spec[i],) if isinstance(spec[i], str) else spec[i] or ()  # noqa: E731
    held = tuple(
        Held(axis, dim)
        for dim, part in zip((ROWS, COLUMNS), parts, strict=True)
        for i in part for axis in names(i)
    )
    return held, math.prod(sharding.mesh.shape[a] for i in batch for a in names(i))


def _moved(
    f, x, held: tuple[Held, ...], longer: int, over: tuple[str, ...], mesh: Mesh
) -> jax.Array:
    """f of local n r c after matrices or pieces have come together, and everything back."""
    n = x.shape[0]
    x = jnp.pad(x, ((0, -n % math.prod(mesh.shape[a] for a in over)), (0, 0), (0, 0)))
    to = [0 if h.axis in over else longer for h in held]
    moves = [(h.axis, h.dim, there) for h, there in zip(held, to, strict=True) if h.dim != there]
    for axis, dim, there in reversed(moves):  # inner blocks join first
        x = jax.lax.all_to_all(x, axis, split_axis=there, concat_axis=dim, tiled=True)
    across = tuple(h.axis for h in held if h.axis not in over)
    y = f(x, partial(jax.lax.psum, axis_name=across) if across else lambda part: part)
    for axis, dim, there in moves:
        y = jax.lax.all_to_all(y, axis, split_axis=dim, concat_axis=there, tiled=True)
    return y[:n]


def axes_over(
    mesh: Mesh, sizes: tuple[int, int, int], held: tuple[Held, ...]
) -> tuple[str, ...]:
    """Of the axes that hold rows or columns, those to deal whole matrices over.

    Those with the least work for a device. A step of Newton and Schulz on a matrix: r^2 c products
    twice, which devices with other columns share, and r^3, which they do not; their sum over
    devices is counted as a tenth of the latter.
    """
    n, rows, columns = sizes
    axes = [h.axis for h in held]

    def ways(names):
        return math.prod(mesh.shape[a] for a in names)

    def work(over):
        across = ways(set(axes) - set(over))
        each = 2 * rows**2 * columns / across + rows**3 * (1.1 if across > 1 else 1)
        return -(-n // ways(over)) * each, len(over)

    choices = [s for k in range(len(axes) + 1) for s in itertools.combinations(axes, k)]
    return min((s for s in choices if columns % ways(set(axes) - set(s)) == 0), key=work)
