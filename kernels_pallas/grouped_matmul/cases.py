"""Named shapes of grouped_matmul, to time and to compile; and the bytes that it moves.

CASES: (call, arguments, needed FLOPs, products of the dense reference); AOT: see kernels_pallas.aot.
"""

import functools

import jax
import jax.numpy as jnp

from kernels_pallas.aot import Case
from kernels_pallas.grouped_matmul import Fp8, Int4, Int8, Weights, grouped_matmul
from kernels_pallas.grouped_matmul.tpu import PIECE, rows_of, sizes_of


def held(form: str, *lead: int, k: int, n: int) -> Weights:
    """Shapes of matrices ... k n in a form."""
    array = lambda dtype, *shape: jax.ShapeDtypeStruct((*lead, *shape), dtype)  # noqa: E731
    match form:
        case "int8":
            return Int8(array(jnp.int8, n, k), array(jnp.float32, n))
        case "int4":
            return Int4(array(jnp.int32, n, k // 8), array(jnp.bfloat16, n, k // 32))
        case "fp8":
            return Fp8(array(jnp.uint8, n, k), array(jnp.float32, -(-n // 128), -(-k // 128)))
    return array(jnp.dtype(form), k, n)


def _case(rng, *, m, g, k, n):
    """Random groups of rows."""
    ids = rng.integers(0, g, m)
    x, w = (jnp.asarray(rng.standard_normal(s, "float32")) for s in ((m, k), (g, k, n)))
    sizes = jnp.asarray([(ids == i).sum() for i in range(g)], jnp.int32)
    return functools.partial(grouped_matmul), (x, w, sizes), 2.0 * m * k * n, m * g * n


CASES = {
    "4096 rows, 64 groups": functools.partial(_case, m=4096, g=64, k=256, n=256),
    "64 rows, 64 groups": functools.partial(_case, m=64, g=64, k=256, n=256),
}

K2 = {"k": 7168, "n": 2048}
DOWN = {"k": 2048, "n": 7168}


def _make(form: str, *, m, g, k, n, layers=None, gradient=None):
    x = jax.ShapeDtypeStruct((m, k), jnp.bfloat16)
    lead = (g,) if layers is None else (layers, g)
    args = x, held(form, *lead, k=k, n=n), jax.ShapeDtypeStruct((g,), jnp.int32)
    if layers is not None:
        args = *args, jax.ShapeDtypeStruct((), jnp.int32)

    def call(x, w, sizes, layer=None):
        return grouped_matmul(x, w, sizes, layer=layer, impl="pallas")

    if gradient is None:
        return call, args

    def pulled(x, w, sizes, d_out):
        diff, other = ((x,), w) if gradient == "x" else ((w,), x)
        f = (lambda x: call(x, other, sizes)) if gradient == "x" else (
            lambda w: call(other, w, sizes))
        return jax.vjp(f, *diff)[1](d_out)

    return pulled, (*args, jax.ShapeDtypeStruct((m, n), jnp.bfloat16))


def _forward(form: str, tags: str, **dims) -> Case:
    """A turn of the inner loop: a tile of rows times a piece of the matrix."""
    call, (x, w, sizes, *_) = _make(form, **dims)
    stack = w if "layers" in dims else jax.tree.map(
        lambda a: jax.ShapeDtypeStruct((1, *a.shape), a.dtype), w)
    size = sizes_of(x, stack, dims["k"], dims["n"], dims["g"])
    rows = size.rows
    macs = rows * size.columns * size.form.chunk
    return Case(
        functools.partial(_make, form, **dims), frozenset(tags.split()), form, macs,
        pairs=rows * size.columns,
    )


FORMS = ("bfloat16", "int8", "fp8", "int4")
AOT = {
    (f"{m} x {k}, {g} of {n}", f"pallas {form}"): _forward(form, tags, m=m, g=g, k=k, n=n)
    for m, g, tags, dims in (
        (32768, 24, "bench k2", K2), (32768, 6, "k2", K2), (32768, 24, "bench k2", DOWN),
        (512, 24, "k2", K2), (64, 24, "bench k2", K2), (64, 6, "k2", DOWN),
    )
    for k, n in [dims.values()]
    for form in FORMS
}
