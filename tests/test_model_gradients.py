"""The model read in different ways gives the same gradient of every weight."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kimijax.cache import empty_cache, run_length
from kimijax.config_tree import override
from kimijax.model import Model
from kimijax.ops.attend import local
from tests.conftest import CONFIGS, array, assert_close, model_and_params

T = 256


@pytest.fixture
def ids():
    return _ids()


def _ids():
    return array(np.random.default_rng(0).integers(0, 64, (2, T)), jnp.int32)


@functools.cache
def one_pass(name: str):
    """Gradient of the sum of sines of all hidden states, in one call."""
    model, params = model_and_params(name)
    loss = lambda params: jnp.sum(jnp.sin(model.apply(params, _ids()).hidden))  # noqa: E731
    return jax.jit(jax.grad(loss))(params)


@pytest.mark.parametrize("name, size", [
    ("needle", 64),
    pytest.param("kimi", 1, marks=pytest.mark.slow),
    pytest.param("needle", 1, marks=pytest.mark.slow),
    pytest.param("kimi", 64, marks=pytest.mark.slow),
])
def test_through_the_cache(name, size, ids):
    """Calls of `size` tokens, the cache in the carry of a scan."""
    model, params = model_and_params(name)

    def loss(params):
        def step(cache, piece):
            out = model.apply(params, piece, cache=cache, aligned=size > 1)
            return out.cache, out.hidden

        pieces = jnp.moveaxis(ids.reshape(2, -1, size), 1, 0)
        hidden = jax.lax.scan(step, empty_cache(CONFIGS[name](), 2, T), pieces)[1]
        return jnp.sum(jnp.sin(hidden))

    assert_close(jax.jit(jax.grad(loss))(params), one_pass(name))


def test_in_any_order(ids, rng):
    model, params = model_and_params("needle")
    order = jnp.asarray(rng.permutation(T))
    slots = jnp.broadcast_to(order, (2, T))

    def loss(params):
        return jnp.sum(jnp.sin(model.apply(params, ids[:, order], slots=slots).hidden))

    assert_close(jax.jit(jax.grad(loss))(params), one_pass("needle"))


DOCUMENT = 100  # tokens of each of two packed documents; the second starts at a run


def _packed():
    at = jnp.arange(T)
    pos = at % 128
    seg = jnp.where(pos < DOCUMENT, at // 128, -1)
    return tuple(jnp.broadcast_to(x, (2, T)) for x in (pos, seg))


def _documents(x):
    """b 256 ... -> 2b 100 ...: the documents of packed rows as rows of their own."""
    return x.reshape(4, 128, *x.shape[2:])[:, :DOCUMENT]


@pytest.mark.parametrize("name", ["needle", pytest.param("kimi", marks=pytest.mark.slow)])
def test_packed_is_separate_forward_and_gradient(name, ids):
    assert 128 % run_length(CONFIGS[name]()) == 0
    model, params = model_and_params(name)
    cotangent = jax.random.normal(jax.random.key(2), (2, T, 32))

    def loss(params, ids, cotangent, *where):
        hidden = model.apply(params, ids, *where).hidden
        hidden = _documents(hidden) if where else hidden
        return jnp.sum(hidden * _documents(cotangent)), hidden

    value_and_grad = jax.jit(jax.value_and_grad(loss, has_aux=True))
    got = value_and_grad(params, ids, cotangent, *_packed())
    want = value_and_grad(params, _documents(ids), cotangent)
    assert_close(got, want)


def test_choosing_every_block_is_exact_attention(ids):
    cfg = override(CONFIGS["needle"](), {"groups.1.layers.0.mixer.index.top_k": T // 32})
    _, params = model_and_params("needle")

    def value_and_grad(exact):
        model = Model(cfg, local(exact=exact))

        def loss(params):
            hidden = model.apply(params, ids).hidden
            return jnp.sum(jnp.sin(hidden)), hidden

        value, grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
        for name in ("index_query", "index_key", "index_gate", "index_bias"):
            del grads["params"]["group_1"]["layer_0"]["mixer"][name]  # no gradient either way
        return value, grads

    assert_close(value_and_grad(False), value_and_grad(True))
