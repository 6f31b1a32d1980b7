"""The frame that makes a product and its transposes one differentiable function."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from kernels_pallas.grouped_matmul.weights import Packed


def differentiable(forward: Callable, d_weights: Callable) -> Callable:
    """(x, weights, sizes, layer) -> m n from two functions.

    forward    (x, weights, sizes, layer, back=) -> rows times the matrices; back: transposed
    d_weights  (x, d_out, sizes, dtype) -> g k n

    Packed weights and their scales have no gradient. That of a stack is as large as the stack,
    zeros but for one layer.
    """

    @jax.custom_vjp
    def product(x, weights, sizes, layer):
        return forward(x, weights, sizes, layer)

    def fwd(x, weights, sizes, layer):
        return forward(x, weights, sizes, layer), (x, weights, sizes, layer)

    def bwd(residuals, d_out):
        x, weights, sizes, layer = residuals
        d_x = forward(d_out, weights, sizes, layer, back=True)
        if isinstance(weights, Packed):
            return d_x, None, None, None
        d_w = d_weights(x, d_out, sizes, weights.dtype)
        if layer is not None:
            d_w = jnp.zeros_like(weights).at[layer].set(d_w)
        return d_x, d_w, None, None

    product.defvjp(fwd, bwd)
    return product
