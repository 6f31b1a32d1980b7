"""Grouped products on a GPU beside those of other packages, at the shapes of cases.py.

Matrices of bfloat16 and random groups. torch and tokamax are optional, as is the GPU: a row says
what is missing.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.beside import Shape, of_jax, of_torch
from kernels_pallas.grouped_matmul import grouped_matmul
from kernels_pallas.grouped_matmul.cases import GPU


def _tokamax(x, w, sizes, *, implementation):
    import tokamax

    return tokamax.ragged_dot(x, w, sizes, implementation=implementation)


def _torch(torch, x, w, sizes):
    return torch.nn.functional.grouped_mm(x, w, offs=sizes.cumsum(0).to(torch.int32))


def shape_of(*, m: int, g: int, k: int, n: int) -> Shape:
    """All that there are for m rows of k numbers and g matrices k x n."""
    rng = np.random.default_rng(0)
    array = lambda *shape: jnp.asarray(  # noqa: E731
        rng.standard_normal(shape, "float32"), jnp.bfloat16
    )
    sizes = jnp.asarray(rng.multinomial(m, np.full(g, 1 / g)), jnp.int32)
    args = array(m, k), array(g, k, n), sizes
    tokamax = lambda name: lambda: of_jax(  # noqa: E731
        functools.partial(_tokamax, implementation=name), *args
    )
    return Shape(
        {
            "xla": lambda: of_jax(functools.partial(grouped_matmul, impl="xla"), *args),
            "jax_ragged_dot": lambda: of_jax(jax.lax.ragged_dot, *args),
            "tokamax_triton": tokamax("triton"),
            "tokamax_mosaic": tokamax("mosaic"),
            "torch_grouped_mm": lambda: of_torch(_torch, *args),
        },
        flops=2.0 * m * k * n,
        moved=2.0 * (m * k + int((sizes > 0).sum()) * k * n + m * n),
    )


SHAPES = {name: functools.partial(shape_of, **dims) for name, dims in GPU.items()}
