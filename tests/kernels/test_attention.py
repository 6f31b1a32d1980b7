"""attention: xla = ref, forward and gradient, in every order and with every mask; merge = whole."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kernels_pallas.attention.xla as xla
from kernels_pallas.attention import Keys, Queries, attention, attention_grads
from kernels_pallas.partial import merge
from tests.conftest import array, assert_close

FAR = np.iinfo(np.int32).max


def _inputs(rng, *, t=40, s=40, h=4, g=2, rope=True, window=None, order=None, dtype=jnp.float32):
    """Two packed documents with some padding and unwritten slots."""
    b = 2

    def normal(*shape):
        return array(rng.normal(size=shape), dtype)

    pos = np.tile(np.concatenate([np.arange(s // 2), np.arange(s - s // 2)]), (b, 1))
    seg = np.tile(np.repeat([0, 1], [s // 2, s - s // 2]), (b, 1))
    seg[:, 3], seg[1, :2], pos[0, -2:] = -1, -1, FAR
    since = np.maximum(pos - window + 1, 0) if window else np.zeros_like(pos)
    order = np.arange(s) if order is None else order
    pos, seg, since = (array(x[:, order], jnp.int32) for x in (pos, seg, since))
    q = Queries(
        normal(b, t, h, 8), normal(b, t, h, 6) if rope else None, pos[:, :t], seg[:, :t],
        since[:, :t],
    )
    k_rope = normal(b, s, 6) if rope else None
    return q, Keys(normal(b, s, g, 8), normal(b, s, g, 5), k_rope, pos, seg)


def _floats(q, kv):
    return q.nope, q.rope, kv.key, kv.value, kv.rope


def _loss(floats, q, kv, impl, cotangents):
    nope, q_rope, key, value, k_rope = floats
    q, kv = q._replace(nope=nope, rope=q_rope), kv._replace(key=key, value=value, rope=k_rope)
    p = attention(q, kv, scale=0.3, impl=impl)
    lse = jnp.where(jnp.isneginf(p.lse), 0.0, p.lse)
    return jnp.sum(p.out * cotangents[0]) + jnp.sum(lse * cotangents[1]), p


@functools.cache
def _value_and_grad(impl, tiles):
    del tiles  # part of the cache key: tile sizes are read while tracing
    return jax.jit(
        lambda f, q, kv, c: jax.value_and_grad(_loss, has_aux=True)(f, q, kv, impl, c)
    )


@functools.cache
def _forward(impl):
    return jax.jit(functools.partial(attention, scale=0.3, impl=impl))


CASES = {
    "grouped with rope": {},
    "window": {"window": 7},
    "one KV head, no rope": {"g": 1, "rope": False},
    "permuted": {"order": np.random.default_rng(1).permutation(40)},
}


@pytest.mark.parametrize("tiles", [(512, 1024), (16, 8)], ids=["one tile", "blockwise"])
@pytest.mark.parametrize("name", CASES)
def test_xla_equals_reference_forward_and_gradient(name, tiles, rng, monkeypatch):
    monkeypatch.setattr(xla, "TILE_Q", tiles[0])
    monkeypatch.setattr(xla, "TILE_K", tiles[1])
    q, kv = _inputs(rng, **CASES[name])
    cotangents = (
        array(rng.normal(size=(2, 40, 4, 5))),
        array(rng.normal(size=(2, 40, 4))),
    )
    got, want = (
        _value_and_grad(impl, tiles)(_floats(q, kv), q, kv, cotangents) for impl in ("xla", "ref")
    )
    assert_close(got, want)


def test_bfloat16_is_near_the_float32_reference(rng):
    q, kv = _inputs(rng, dtype=jnp.bfloat16)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, (q, kv))
    got, want = _forward("xla")(q, kv), _forward("ref")(*wide)
    assert_close((got.out, got.lse), (want.out, want.lse), jnp.bfloat16)


def test_merge_over_disjoint_keys_is_the_whole_forward_and_gradient(rng):
    q, kv = _inputs(rng)
    cotangent = array(rng.normal(size=(2, 40, 4, 5)))

    def cut(kv, part):
        return jax.tree.map(lambda x: x[:, part], kv)

    def loss(floats, pieces):
        nope, q_rope, key, value, k_rope = floats
        queries = q._replace(nope=nope, rope=q_rope)
        keys = kv._replace(key=key, value=value, rope=k_rope)
        parts = [attention(queries, cut(keys, p), scale=0.3, impl="xla") for p in pieces]
        return jnp.sum(functools.reduce(merge, parts).out * cotangent)

    halves = (slice(0, 17), slice(17, 40))
    got = jax.jit(jax.value_and_grad(lambda f: loss(f, halves)))(_floats(q, kv))
    want = jax.jit(jax.value_and_grad(lambda f: loss(f, (slice(0, 40),))))(_floats(q, kv))
    assert_close(got, want)


def test_max_logit_is_the_largest_visible_scaled_logit(rng):
    q, kv = _inputs(rng, rope=False)
    got = np.asarray(_forward("xla")(q, kv).max_logit)
    assert_close(got, _forward("ref")(q, kv).max_logit)
    assert np.isneginf(got[:, 3]).all()  # padding sees nothing


def test_wrong_names_and_shapes_raise_with_the_values(rng):
    q, kv = _inputs(rng)
    with pytest.raises(ValueError, match="cuda.*ref.*xla"):
        attention(q, kv, scale=1.0, impl="cuda")
    with pytest.raises(ValueError, match=r"\(2, 40, 4, 7\)"):
        attention(q._replace(nope=q.nope[..., :7]), kv, scale=1.0, impl="xla")
    with pytest.raises(ValueError, match="rotary"):
        attention(q._replace(rope=None), kv, scale=1.0, impl="xla")


@pytest.mark.parametrize("rope", [True, False])
@pytest.mark.parametrize("impl, tiles", [("ref", 512), ("xla", 512), ("xla", 16)])
def test_gradients_of_sets_of_keys_sum_to_that_of_all(rope, impl, tiles, rng, monkeypatch):
    """What a ring does at each hop, against the gradient of attention to all keys at once."""
    monkeypatch.setattr(xla, "TILE_Q", tiles)
    monkeypatch.setattr(xla, "TILE_K", tiles)
    q, kv = _inputs(rng, rope=rope)
    cotangents = [array(rng.normal(size=s)) for s in ((2, 40, 4, 5), (2, 40, 4))]
    # Of the same shapes as in the test of one tile.
    (_, p), want = _value_and_grad("ref", (512, 1024))(_floats(q, kv), q, kv, cotangents)
    d_lse = jnp.where(jnp.isneginf(p.lse), 0.0, cotangents[1])
    delta = jnp.sum(p.out * cotangents[0], -1) - d_lse

    @jax.jit
    def parts(q, kv, *rest):
        cut = lambda at: jax.tree.map(lambda x: x[:, at], kv)  # noqa: E731
        keys = cut(slice(0, 18)), cut(slice(18, 40))
        return [attention_grads(q, k, *rest, scale=0.3, impl=impl) for k in keys]

    a, b = parts(q, kv, p.lse, cotangents[0], delta)
    queries = jax.tree.map(jnp.add, a[0], b[0])
    keys = jax.tree.map(lambda x, y: jnp.concatenate([x, y], 1), a[1], b[1])
    assert_close((*queries, keys.key, keys.value, keys.rope), want)


@pytest.mark.parametrize("batch, heads, size", [(1, 16, 2048), (1, 64, 1024), (64, 64, 256)])
def test_tiles_of_a_gpu_are_as_large_as_their_logits_may_be(monkeypatch, batch, heads, size):
    q = Queries(jax.ShapeDtypeStruct((batch, 4096, heads, 128), jnp.bfloat16), *[None] * 4)
    assert xla.tile_sizes(q) == (xla.TILE_Q, xla.TILE_K)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert xla.tile_sizes(q) == (size, size)


def test_gradients_by_an_unknown_name(rng):
    q, kv = _inputs(rng)
    with pytest.raises(ValueError, match="unknown impl='mosaic'"):
        attention_grads(q, kv, None, None, None, scale=1.0, impl="mosaic")
