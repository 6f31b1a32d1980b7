"""Small kernels for the tests of kernels_pallas.aot, listed as an op lists its own."""

import functools
import os
import time

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.aot import Case

SIZE = 512


def _square(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape or (SIZE, SIZE), dtype)


def _product(blocks: int):
    """A row of `blocks` square blocks times as many, in a grid whose product is behind a branch."""

    def kernel(live, a, b, out):
        @pl.when(pl.program_id(0) == 0)
        def _():
            out[...] = jnp.zeros_like(out)

        @pl.when(live[pl.program_id(0)] > 0)
        def _():
            out[...] += jnp.dot(a[...], b[...], preferred_element_type=jnp.float32)

    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1,
        grid=(blocks,),
        in_specs=[pl.BlockSpec((SIZE, SIZE), lambda i, _: (0, i)),
                  pl.BlockSpec((SIZE, SIZE), lambda i, _: (i, 0))],
        out_specs=pl.BlockSpec((SIZE, SIZE), lambda i, _: (0, 0)),
    )
    out = _square(dtype=jnp.float32)
    call = pl.pallas_call(kernel, out_shape=out, grid_spec=grid, name="product")
    wide, tall = _square(SIZE, SIZE * blocks), _square(SIZE * blocks, SIZE)
    return call, (jax.ShapeDtypeStruct((blocks,), jnp.int32), wide, tall)


def _copies(rows: int, scratch: bool):
    """A kernel that takes rows x 1024 floats of VMEM, as scratch or as a block."""

    def kernel(x, out, *rest):
        out[:8] = x[:8]

    shape = (8, 1024) if scratch else (rows, 1024)
    call = pl.pallas_call(
        kernel, out_shape=jax.ShapeDtypeStruct(shape, jnp.float32), name="large",
        scratch_shapes=[pltpu.VMEM((rows, 1024), jnp.float32)] if scratch else [], grid=(2,),
        in_specs=[pl.BlockSpec(shape, lambda i: (0, 0))],
        out_specs=pl.BlockSpec(shape, lambda i: (0, 0)),
    )
    return call, (jax.ShapeDtypeStruct(shape, jnp.float32),)


def _refuses():
    raise NotImplementedError("product[pallas]: 3 heads\nare odd")


def _dies():
    os.write(2, b"Check failed: 1 == 2\n")
    os._exit(7)


def _hangs():
    time.sleep(600)


def _plain():
    return jnp.dot, (_square(), _square())


PRODUCT = Case(functools.partial(_product, 4), frozenset({"ci", "bench"}), "512", SIZE**3)
AOT = {
    ("product", "pallas"): PRODUCT,
    ("scratch", "pallas"): Case(functools.partial(_copies, 2**17, True)),
    ("blocks", "pallas"): Case(functools.partial(_copies, 2**14, False)),
    ("refused", "pallas"): Case(_refuses),
    ("death", "pallas"): Case(_dies),
    ("hang", "pallas"): Case(_hangs),
    ("no kernel", "xla"): Case(_plain),
    ("wrong macs", "pallas"): PRODUCT._replace(macs=4 * SIZE**3, tags=frozenset()),
}
