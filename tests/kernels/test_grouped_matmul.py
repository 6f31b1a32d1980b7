"""grouped_matmul: xla and the kernels of a TPU = ref, for any sizes of groups and forms held."""

import jax
import jax.numpy as jnp
import pytest

from kernels_pallas.grouped_matmul import Fp8, Int4, Int8, grouped_matmul
from tests.conftest import array, assert_close

SIZES = {
    "uneven, an empty one, rows behind": (300, 0, 37, 200),
    "one has everything": (0, 600, 0, 0),
    "all empty": (0, 0, 0, 0),
}


def held(rng, form: str, *lead: int, k: int, n: int):
    """Matrices k n in a form; packed ones of any bits that are numbers."""
    draw = lambda *shape: array(rng.uniform(0.5, 1.5, (*lead, *shape)))  # noqa: E731
    match form:
        case "int8":
            return Int8(array(rng.integers(-128, 128, (*lead, n, k)), jnp.int8), draw(n))
        case "int4":
            words = rng.integers(-(2**31), 2**31, (*lead, n, k // 8))
            return Int4(array(words, jnp.int32), draw(n, k // 32).astype(jnp.bfloat16))
        case "fp8":
            codes = rng.integers(0, 127, (*lead, n, k)) + 128 * rng.integers(0, 2, (*lead, n, k))
            return Fp8(array(codes, jnp.uint8), draw(-(-n // 128), -(-k // 128)))
    return array(rng.normal(size=(*lead, k, n)), form)


def value_and_grads(x, weights, sizes, cotangent, impl, layer=None):
    """The product and its gradients, those of floats' matrices too."""
    diff = (x, weights) if isinstance(weights, jax.Array) else (x,)

    @jax.jit
    def run(*diff):
        call = lambda x, w=weights: grouped_matmul(x, w, sizes, layer=layer, impl=impl)  # noqa: E731
        y, pull = jax.vjp(call, *diff)
        return y, pull(cotangent.astype(y.dtype))

    return run(*diff)


def compare(rng, sizes, form, dtype=jnp.float32, *, m, k, n, impl, layer=None):
    lead = (2, len(sizes)) if layer is not None else (len(sizes),)
    weights = held(rng, form, *lead, k=k, n=n)
    x, cotangent = (array(rng.normal(size=(m, d)), dtype) for d in (k, n))
    args = x, weights, array(sizes, jnp.int32), cotangent
    layer = None if layer is None else jnp.int32(layer)
    got, want = (value_and_grads(*args, i, layer) for i in (impl, "ref"))
    assert jax.tree.map(lambda a: a.dtype, got) == jax.tree.map(lambda a: a.dtype, want)
    assert_close(got, want, dtype)


@pytest.mark.parametrize("impl", ["xla", "pallas_interpret"])
@pytest.mark.parametrize("sizes", SIZES)
def test_equals_the_reference_for_any_sizes(sizes, impl, rng):
    """Of 600 rows, which are no multiple of a tile, in one piece or in tiles of several."""
    compare(rng, SIZES[sizes], "float32", m=600, k=256, n=256, impl=impl)


FORMS = ("int8", "int4", "fp8")


@pytest.mark.parametrize("impl", ["xla", "pallas_interpret"])
@pytest.mark.parametrize("form", FORMS)
def test_packed_matrices_are_their_numbers(form, impl, rng):
    """Tiles of several pieces: matrices are widened once; 160 inputs are no whole chunk."""
    compare(rng, (300, 0, 290), form, m=800, k=160, n=300, impl=impl)


@pytest.mark.parametrize("form", FORMS)
def test_few_rows_and_the_layer_of_a_stack(form, rng):
    """Small tiles: matrices are widened as they are multiplied, a piece of inputs at a time."""
    compare(rng, (3, 20), form, m=25, k=2048, n=640, impl="pallas_interpret", layer=1)


@pytest.mark.parametrize("impl", ["xla", "pallas_interpret"])
def test_a_stack_of_floats(impl, rng):
    compare(rng, (3, 0, 20), "float32", m=25, k=128, n=256, impl=impl, layer=1)


@pytest.mark.parametrize("form", ["bfloat16", "float32", *FORMS])
def test_bfloat16_is_near_the_float32_reference(form, rng):
    compare(rng, (600, 3, 250), form, jnp.bfloat16, m=1100, k=256, n=256, impl="pallas_interpret")


def test_wrong_names_and_shapes_raise_with_the_values(rng):
    x, w, sizes = jnp.ones((4, 32)), held(rng, "float32", 2, k=32, n=8), jnp.ones(2, jnp.int32)
    with pytest.raises(ValueError, match="cuda.*pallas.*ref.*xla"):
        grouped_matmul(x, w, sizes, impl="cuda")
    with pytest.raises(ValueError, match=r"\(4, 32\).*g k n \(2, 32, 8\).*\(3,\)"):
        grouped_matmul(x, w, jnp.ones(3, jnp.int32), impl="xla")
    with pytest.raises(ValueError, match="stacks need a layer"):
        grouped_matmul(x, w[None], sizes, impl="xla")
    for form in FORMS:
        packed = held(rng, form, 2, k=32, n=8)
        with pytest.raises(ValueError, match=rf"{type(packed).__name__}.*\(2, 32, 8\).*scales"):
            grouped_matmul(x, packed._replace(scale=packed.scale[:, :0]), sizes, impl="xla")
