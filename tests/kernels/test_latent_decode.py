"""latent_decode: xla and the kernel of a TPU = ref, for any order and contents of pages."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.attention import Queries
from kernels_pallas.int8 import narrow
from kernels_pallas.latent_decode import Pages, latent_decode, pair, ref
from tests.conftest import array, assert_close

FAR = np.iinfo(np.int32).max


def _inputs(rng, *, t=1, h=4, rope=True, window=None, int8=False, dtype=jnp.float32, past=900):
    """Two rows of up to four pages in a store of twelve and two layers; one row is shorter."""
    b, n, j, r, p, c = 2, 4, 256, 24, 8, 12
    normal = lambda *shape: array(rng.normal(size=shape), dtype)  # noqa: E731
    table = rng.permutation(c)[: b * n].reshape(b, n)
    table[1, 3] = -1
    pos, seg = np.full((c, j), FAR), np.zeros((c, j), np.int32)
    for row, filled in enumerate((past, past // 2)):
        slots = np.where(np.arange(n * j) < filled, np.arange(n * j), FAR).reshape(n, j)
        for page, own in zip(table[row], slots, strict=True):
            if page >= 0:
                pos[page], seg[page, 5:9] = own, -1
    now = np.array([[past + i for i in range(t)], [past // 2 + i for i in range(t)]])
    since = np.maximum(now - window, 0) if window else np.zeros_like(now)
    q = Queries(
        normal(b, t, h, r), normal(b, t, h, p) if rope else None,
        *(array(x, jnp.int32) for x in (now, np.zeros_like(now), since)),
    )
    latent, scale = normal(2, c, j, r), None
    if int8:
        latent, scale = narrow(latent)
        scale = scale.reshape(2, c, j // 128, 128)
    keys = pair(normal(2, c, j, p)) if rope else None
    pages = Pages(latent, keys, array(pos, jnp.int32), jnp.asarray(seg), scale)
    return q, pages, jnp.int32(1), array(table, jnp.int32)


CASES = {
    "one token": {},
    "three tokens, a window": {"t": 3, "window": 300},
    "many heads": {"t": 2, "h": 100},
    "no rope": {"rope": False},
    "int8": {"int8": True},
    "more queries than fit": {"t": 11, "h": 512, "window": 300, "past": 400},
    "nothing written": {"past": 0},
}


@pytest.mark.parametrize("impl", ["xla", "pallas_interpret"])
@pytest.mark.parametrize("name", CASES)
def test_equals_the_reference(name, impl):
    inputs = _inputs(np.random.default_rng(0), **CASES[name])
    got, want = (
        jax.jit(functools.partial(latent_decode, scale=0.3, impl=i))(*inputs) for i in (impl, "ref")
    )
    assert_close(got, want)


@pytest.mark.parametrize("int8", [False, True])
def test_bfloat16_is_near_the_float32_reference(int8, rng):
    q, pages, *rest = _inputs(rng, dtype=jnp.bfloat16, int8=int8)
    got, want = (
        jax.jit(functools.partial(latent_decode, scale=0.3, impl=i))(q, pages, *rest)
        for i in ("pallas_interpret", "ref")
    )
    assert_close((got.out, got.lse), (want.out, want.lse), jnp.bfloat16)


def test_pairs_of_rotary_keys_come_back(rng):
    rope = jnp.asarray(rng.normal(size=(2, 512, 8)))
    paired = pair(rope)
    np.testing.assert_array_equal(ref.unpair(paired), rope)
    np.testing.assert_array_equal(paired[:, 0], np.concatenate([rope[:, 0], rope[:, 128]], -1))


def test_wrong_names_and_shapes_raise_with_the_values(rng):
    q, pages, layer, table = _inputs(rng)
    call = functools.partial(latent_decode, scale=1.0)
    with pytest.raises(ValueError, match="cuda.*pallas.*ref.*xla"):
        call(q, pages, layer, table, impl="cuda")
    with pytest.raises(ValueError, match=r"\(1, 4\)"):
        call(q, pages, layer, table[:1], impl="xla")
    with pytest.raises(ValueError, match="pages of 128 tokens, want a multiple of 256"):
        half = pages._replace(latent=pages.latent[:, :, :128], pos=pages.pos[:, :128])
        call(q, half, layer, table, impl="xla")
    with pytest.raises(ValueError, match="rotary"):
        call(q._replace(rope=None), pages, layer, table, impl="xla")
    with pytest.raises(ValueError, match="int8"):
        call(q, pages._replace(scale=jnp.ones((2, 12, 2, 128))), layer, table, impl="xla")
