"""The grouped products of other packages at the shapes of cases.py, to compare cycles with.

jax's megablox and tokamax compute whole tiles for every visit; of theirs a grid step is the block,
512 rows x 1024 inputs x 1024 outputs. tokamax takes packed matrices k n as qwix quantises them, so
those of a checkpoint would be transposed. tokamax comes with the extra [bench].

jax.lax.ragged_dot is not here: on v6e there is no kernel whose schedule could be read. On v5p there
is one (libtpu 0.0.52): at 32768 x 7168, 24 of 2048 its matrix units are busy for 0.90 of its block.
"""

import functools

import jax
import jax.numpy as jnp

from kernels_pallas.aot import Case
from kernels_pallas.grouped_matmul.cases import DOWN, K2

BENCH = frozenset({"bench"})


def _arrays(m: int, g: int, k: int, n: int):
    array = jax.ShapeDtypeStruct
    return (
        array((m, k), jnp.bfloat16), array((g, k, n), jnp.bfloat16), array((g,), jnp.int32)
    )


def _megablox(tiling, **dims):
    from jax.experimental.pallas.ops.tpu.megablox import gmm

    call = functools.partial(gmm, preferred_element_type=jnp.bfloat16, tiling=tiling)
    return call, _arrays(**dims)


def _tokamax(tiling, form="bfloat16", **dims):
    from tokamax._src.ops.ragged_dot.pallas_mosaic_tpu_kernel import gmm

    x, w, sizes = _arrays(**dims)
    if form == "int8":
        import qwix

        g, k, n = w.shape
        w = qwix.QArray(
            jax.ShapeDtypeStruct(w.shape, jnp.int8),
            jax.ShapeDtypeStruct((g, 1, n), jnp.float32),
        )

    def call(x, w, sizes):
        return gmm(
            x, w, sizes, precision=jax.lax.Precision.DEFAULT, out_dtype=jnp.bfloat16, tiling=tiling
        )

    return call, (x, w, sizes)


def _cases(m: int, g: int, k: int, n: int):
    """Of one shape."""
    name, dims = f"{m} x {k}, {g} of {n}", {"m": m, "g": g, "k": k, "n": n}
    rows = min(m, 512)
    tiling = (rows, 1024, 1024)
    macs = rows * 1024 * 1024

    def case(make, held, **how) -> Case:
        moved = 2 * rows * 1024 + (1 if held == "int8" else 2) * 1024**2  # both inputs
        of = functools.partial(make, **how, **dims)
        return Case(of, BENCH, held, macs, moved, pairs=macs // 1024)

    return {
        (name, "jax_megablox"): case(_megablox, "bfloat16", tiling=tiling),
        (name, "tokamax"): case(_tokamax, "bfloat16", tiling=tiling),
        (name, "tokamax_int8"): case(_tokamax, "int8", tiling=tiling, form="int8"),
    }


AOT = {
    key: case
    for m, g, dims in ((32768, 24, K2), (32768, 24, DOWN), (64, 24, K2))
    for key, case in _cases(m, g, **dims).items()
}
