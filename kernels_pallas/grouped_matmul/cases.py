"""Named shapes of grouped_matmul, to time and to compile; and the bytes that it moves.

CASES: (call, arguments, needed FLOPs, numbers of the dense reference); AOT: see kernels_pallas.aot.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.aot import Case
from kernels_pallas.grouped_matmul import Fp8, Int4, Int8, Weights, grouped_matmul, tpu_bwd
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
    return grouped_matmul, (x, w, sizes), 2.0 * m * k * n, m * g * n


FORMS = ("bfloat16", "int8", "fp8", "int4")
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


def _bytes(form: str, k: int, n: int) -> int:
    """Of a matrix."""
    return sum(w.size * w.dtype.itemsize for w in jax.tree.leaves(held(form, k=k, n=n)))


def moved(form: str, sizes: np.ndarray, m: int, g: int, k: int, n: int) -> tuple[int, int]:
    """(HBM bytes, rows computed) of a call with these sizes of groups, forward, bfloat16 rows.

    Bytes: x for every block of columns, matrices of groups with rows and results once.
    """
    x, w = jax.ShapeDtypeStruct((m, k), jnp.bfloat16), held(form, 1, g, k=k, n=n)
    size, start = sizes_of(x, w, k, n, g), 0
    computed = 0
    for rows in sizes:
        end, tile, piece = start + rows, size.rows, min(size.rows, PIECE)
        for first in range(start - start % tile, end, tile):
            low, high = max(start, first), min(end, first + tile)
            whole = high - low == tile
            computed += tile if whole else (-(-high // piece) - low // piece) * piece
        start = end
    matrix = _bytes(form, k, n)
    asked = 2 * m * k * -(-n // size.columns)
    return asked + matrix * int((sizes > 0).sum()) + 2 * m * n, computed


def _each(form: str, m: int, g: int, k: int, n: int, turn: int) -> float:
    """HBM bytes of one of the turns of a call, of so many products, groups all alike."""
    even = np.full(g, m // g) + (np.arange(g) < m % g)
    size, rows = moved(form, even, m, g, k, n)
    return size / (rows * k * n / turn)


def _through(form: str, rows: int, k: int, n: int) -> float:
    """HBM bytes of a turn of dX of packed matrices: one is read again for each tile of rows."""
    turns = (n / tpu_bwd.OUTPUTS) * (k / 1024)
    return (_bytes(form, k, n) + 2 * rows * (n + k)) / turns


def _case_of(form: str, tags: str, macs: int, moved: float, gradient=None, **dims) -> Case:
    """`pairs` so that cycles are those of 512 x 512 x 1024 products."""
    kernel = "d_weights" if gradient == "w" else "back" if gradient and form != "bfloat16" else ""
    make = functools.partial(_make, form, gradient=gradient, **dims)
    return Case(make, frozenset(tags.split()), form, macs, moved, kernel, pairs=macs // 1024)


def _turn(form: str, m: int, g: int, k: int, n: int, back: bool = False) -> int:
    """Products of a turn of the inner loop: a tile of rows times a piece of the matrix."""
    x, w = jax.ShapeDtypeStruct((m, n if back else k), jnp.bfloat16), held(form, 1, g, k=k, n=n)
    size = sizes_of(x, w, *((n, k) if back else (k, n)), g)
    return size.rows * size.columns * size.chunk


def _forward(form: str, tags: str, **dims) -> Case:
    turn = _turn(form, **dims)
    return _case_of(form, tags, turn, _each(form, **dims, turn=turn), **dims)


def _gradients(**dims) -> dict[tuple[str, str], Case]:
    """Of the matrices, and of x through floats and packed ones."""
    name, m, g, k, n = _name(**dims), *(dims[x] for x in "mgkn")
    rows = rows_of(m, g, 2)
    few, wide = min(rows, tpu_bwd.ROWS), tpu_bwd.WIDE
    back = _turn("bfloat16", back=True, **dims)
    # Rows and cotangents come by, and a gradient is written when a group's visits are over.
    of_w = 4 * rows * wide + 2 * wide**2 / (m / g / rows + 1)
    return {
        (f"{name} d_w", "pallas_bfloat16"): _case_of(
            "bfloat16", "bench k2", rows * wide**2, of_w, "w", **dims),
        (f"{name} d_x", "pallas_bfloat16"): _case_of(
            "bfloat16", "bench k2", back, _each("bfloat16", m, g, n, k, back), "x", **dims),
        **{
            (f"{name} d_x", f"pallas_{form}"): _case_of(
                form, "bench k2", few * tpu_bwd.OUTPUTS * 1024, _through(form, few, k, n),
                "x", **dims)
            for form in FORMS[1:]
        },
    }


def _name(m: int, g: int, k: int, n: int) -> str:
    return f"{m} x {k}, {g} of {n}"


BENCH = [  # a chip of 16 or of 64, K2's gate and down; a batch that decodes
    {"m": 32768, "g": 24, **K2}, {"m": 32768, "g": 24, **DOWN}, {"m": 64, "g": 24, **K2},
]
GPU = {_name(**dims): dims for dims in BENCH}  # to time (gpu_peers.py)
OTHER = [{"m": 32768, "g": 6, **K2}, {"m": 512, "g": 24, **K2}, {"m": 64, "g": 6, **DOWN}]
STACK = {"m": 8, "g": 24, "layers": 4, **K2}
SMALL = {"m": 2500, "g": 4, "k": 1408, "n": 700}
CI = frozenset({"ci"})
AOT = {
    **{
        (_name(**dims), f"pallas_{form}"): _forward(form, tags, **dims)
        for tags, shapes in (("bench k2", BENCH), ("k2", OTHER))
        for dims in shapes
        for form in FORMS
    },
    **_gradients(**BENCH[0]),
    **{
        (name, f"pallas_{form}"): Case(functools.partial(_make, form, **dims), CI, form)
        for name, dims in (("few, one layer of 4", STACK), ("odd sizes", SMALL))
        for form in FORMS
    },
    **{
        (f"odd sizes d_{of}", f"pallas_{form}"): Case(
            functools.partial(_make, form, gradient=of, **SMALL), CI, form)
        for of, form in (("w", "bfloat16"), ("x", "bfloat16"), ("x", "int4"))
    },
}


def main() -> None:
    """Of random groups: bytes beside the least there are, rows computed beside those needed."""
    for dims in BENCH + OTHER:
        sizes = np.random.default_rng(0).multinomial(dims["m"], np.full(dims["g"], 1 / dims["g"]))
        for form in FORMS:
            w = held(form, int((sizes > 0).sum()), k=dims["k"], n=dims["n"])
            least = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(w)) + 2 * dims["m"] * (
                dims["k"] + dims["n"])
            size, rows = moved(form, sizes, **dims)
            print(f"{_name(**dims):26} {form:8} {size / 2**20:7.0f} MiB, {size / least:.2f} of the "
                  f"least; {rows / dims['m']:.2f} rows computed for one")


if __name__ == "__main__":
    main()
