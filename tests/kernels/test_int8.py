"""Latents in words of int8: what rounding does to them, and every op that reads them = floats."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kernels_pallas.latent.xla as latent_xla
from kernels_pallas.int8 import LEVELS, narrow, widen
from kernels_pallas.latent import latent_attention, latent_attention_grads
from kernels_pallas.latent_decode import latent_decode
from kernels_pallas.ring import ring_attention
from kernels_pallas.select import select
from tests.conftest import assert_close
from tests.kernels.test_latent import CASES, _latents
from tests.kernels.test_latent_decode import _inputs
from tests.kernels.test_select import _chosen

WAYS = [  # the reference widens to float32, whatever the queries are
    ("ref", jnp.float32), ("xla", jnp.float32), ("pallas_interpret", jnp.float32),
    ("xla", jnp.bfloat16), ("pallas_interpret", jnp.bfloat16),
]


def test_a_number_is_off_by_half_a_step_at_most(rng):
    x = jnp.asarray(rng.normal(size=(5, 7, 24)) * 10 ** rng.uniform(-6, 6, (5, 7, 1)), jnp.float32)
    x = x.at[0, 0].set(0).at[0, 1].set(1e-42)  # nothing, and less than what is told from it
    words, scale = narrow(x)
    assert words.shape == (5, 7, 6) and words.dtype == jnp.int32 and scale.dtype == jnp.float32
    np.testing.assert_allclose(scale[1:], jnp.abs(x[1:]).max(-1) / LEVELS, rtol=1e-6)
    wide = np.asarray(widen(words, scale, jnp.float32))
    assert np.isfinite(wide).all() and (wide[0, 0] == 0).all() and scale[0, 0] == 0
    assert (np.abs(wide - x) <= np.asarray(scale)[..., None] * (0.5 + 1e-4)).all()
    np.testing.assert_allclose(np.abs(wide[1:]).max(-1), np.abs(x[1:]).max(-1), rtol=1e-6)


def test_every_level_comes_back(rng):
    x = jnp.asarray(rng.permutation(np.arange(-127, 129)), jnp.float32).at[0].set(127.0)
    x = jnp.clip(x, -127, 127)
    words, scale = narrow(x * 0.25)
    assert scale == 0.25
    np.testing.assert_array_equal(widen(words, scale, jnp.float32), x * 0.25)


def test_what_cannot_be_is_refused(rng):
    with pytest.raises(ValueError, match="6 numbers a token are no multiple of 4"):
        narrow(jnp.ones((2, 6)))
    with pytest.raises(NotImplementedError, match="train with a cache of floats"):
        jax.grad(lambda x: widen(*narrow(x), jnp.float32).sum())(jnp.ones((2, 8)))


def _both(kv, dtype):
    """Latents in words, and the floats that they stand for."""
    words, scale = narrow(kv.latent)
    return kv._replace(latent=words, scale=scale), kv._replace(latent=widen(words, scale, dtype))


@pytest.mark.parametrize("impl, dtype", WAYS)
def test_decoding_from_words_is_decoding_from_their_floats(impl, dtype, rng):
    q, pages, *rest = _inputs(rng, t=3, window=300, dtype=dtype)
    narrow_pages, wide = _both(pages, dtype)
    scale = narrow_pages.scale.reshape(2, 12, 2, 128)
    call = jax.jit(functools.partial(latent_decode, scale=0.3, impl=impl))
    got, want = call(q, narrow_pages._replace(scale=scale), *rest), call(q, wide, *rest)
    jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.mark.parametrize("impl, dtype", WAYS)
@pytest.mark.parametrize("name", ["window, fewer queries", "shuffled"])
def test_attention_to_words_is_attention_to_their_floats(name, impl, dtype, rng, monkeypatch):
    monkeypatch.setattr(latent_xla, "PIECE", 256)
    q, kv, up = _latents(rng, dtype, **CASES[name])
    call = jax.jit(functools.partial(latent_attention, scale=0.3, impl=impl))
    got, want = (call(q, x, up) for x in _both(kv, dtype))
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_pieces_of_latents_are_all_of_them(rng, monkeypatch):
    q, kv, up = _latents(rng, t=300, s=700, window=90)
    call = functools.partial(latent_attention, q, kv, up, scale=0.3, impl="xla")
    whole = call()
    monkeypatch.setattr(latent_xla, "PIECE", 64)
    assert_close(call(), whole)


@pytest.mark.parametrize("impl", ["ref", "xla"])
def test_chosen_words_are_their_floats(impl, rng):
    q, blocks, ids = _chosen(rng)
    words, scale = narrow(blocks)
    call = jax.jit(functools.partial(select, scale=0.4, impl=impl))
    got = call(q, words, jnp.int32(1), ids, token_scale=scale)
    want = call(q, widen(words, scale, q.dtype), jnp.int32(1), ids)
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_attention_is_off_by_no_more_than_rounding_can_move_it(rng):
    """Logits move by scale |q| s / 2, weights by e^(2 of that), values by s / 2 besides."""
    q, pages, *rest = _inputs(rng, rope=False)
    pages = pages._replace(rope=None)
    words, _ = _both(pages, jnp.float32)
    step = float(words.scale.max())
    words = words._replace(scale=words.scale.reshape(2, 12, 2, 128))
    call = functools.partial(latent_decode, layer=rest[0], table=rest[1], scale=0.3, impl="ref")
    got, want = call(q, words), call(q, pages)
    moved = 0.3 * jnp.abs(q.nope).sum(-1) * step / 2  # of a logit, at most
    assert (jnp.abs(got.lse - want.lse) <= moved + 1e-5).all()
    most = float(jnp.abs(pages.latent).max())
    bound = (jnp.exp(2 * moved) - 1) * most + step / 2
    assert (jnp.abs(got.out - want.out) <= bound[..., None]).all()
    assert float(jnp.abs(got.out - want.out).max()) > 1e-4  # it is not the same


def test_ops_that_read_no_words_say_so(rng):
    q, blocks, ids = _chosen(rng)
    words, scale = narrow(blocks)
    call = functools.partial(select, q, words, jnp.int32(1), ids, scale=0.4)
    with pytest.raises(NotImplementedError, match="words of int8, kernels do not widen them"):
        call(impl="pallas_interpret", token_scale=scale)
    with pytest.raises(ValueError, match="words of int8 have one for each token"):
        call(impl="xla", token_scale=scale[..., :-1])
    q, kv, up = _latents(rng)
    kv, _ = _both(kv, jnp.float32)
    with pytest.raises(ValueError, match="words of int8 have one for each token"):
        latent_attention(q, kv._replace(scale=None), up, scale=1.0, impl="xla")
    with pytest.raises(ValueError, match="int8 latents have no gradient"):
        latent_attention_grads(q, kv, up, None, None, None, scale=1.0, impl="xla")
    with pytest.raises(ValueError, match="int8 latents do not travel"):
        ring_attention(q, kv, up, scale=1.0, axes=("x",), impl="pallas")
