"""A weight as a stack of matrices: n rows columns, and back."""

import math
from typing import NamedTuple

import jax


class Matrices(NamedTuple):
    """Which dims of a weight are the input of a matrix, and which its output; others count."""

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]

    def parts(self, ndim: int) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """The dims that count, those of rows and those of columns."""
        dims = range(ndim)
        batch = tuple(i for i in dims if i not in (*self.inputs, *self.outputs))
        return batch, self.inputs, self.outputs

    def sizes(self, shape: tuple[int, ...]) -> tuple[int, int, int]:
        """How many matrices, rows and columns."""
        return tuple(math.prod(shape[i] for i in part) for part in self.parts(len(shape)))

    def stack(self, x: jax.Array) -> jax.Array:
        """A weight, or a block of one -> n rows columns."""
        return x.transpose(sum(self.parts(x.ndim), ())).reshape(self.sizes(x.shape))

    def unstack(self, x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """The inverse of `stack`."""
        order = sum(self.parts(len(shape)), ())
        x = x.reshape([shape[i] for i in order])
        return x.transpose([order.index(i) for i in range(len(order))])
