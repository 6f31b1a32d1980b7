"""kda: xla = ref = golden data; chunks = whole; packed documents = separate ones."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.kda import kda
from tests.conftest import array, assert_close

GOLDEN = pathlib.Path(__file__).parents[1] / "goldens" / "kda.npz"
IMPLS = ("xla", "ref")


@functools.cache
def run(impl):
    return jax.jit(functools.partial(kda, impl=impl))


def _inputs(rng, t, *, b=2, h=2, k=8, v=6, strength=1.0, starts=()):
    """q, k, v, g, beta, a nonzero state, start; keys lean one way, so that they interact."""

    def unit(*shape, lean=0.0):
        x = rng.normal(size=shape) + lean
        return x / np.linalg.norm(x, axis=-1, keepdims=True)

    start = np.zeros((b, t), bool)
    for row, at in starts:
        start[row, at] = True
    floats = (
        unit(b, t, h, k) * k**-0.5,
        unit(b, t, h, k, lean=0.5),
        rng.normal(size=(b, t, h, v)),
        -strength * rng.exponential(size=(b, t, h, k)) * rng.uniform(size=(b, 1, h, k)),
        rng.uniform(size=(b, t, h)),
        rng.normal(size=(b, h, k, v)),
    )
    return *(array(x) for x in floats), jnp.asarray(start)


@functools.cache
def _value_and_grads(impl):
    """(out, state) and the gradients of a random linear function of them."""

    def both(floats, start, cotangents):
        value, vjp = jax.vjp(lambda *x: kda(*x, start, impl=impl), *floats)
        return value, vjp(cotangents)

    return jax.jit(both)


# 0, 63 and 64 are the edges of a chunk; neighbours make a document of one token.
STARTS = ((0, 0), (0, 5), (0, 6), (0, 63), (0, 64), (0, 100), (1, 64), (1, 149))


@pytest.mark.parametrize(
    "t, strength, starts",
    [
        (150, 0.1, ()),
        (150, 1.0, STARTS),
        (150, 20.0, ()),
        (150, 20.0, STARTS),
        (17, 1.0, ((1, 3),)),
        (16, 1.0, ((1, 3),)),
    ],
)
def test_xla_equals_reference_forward_and_gradient(t, strength, starts, rng):
    *floats, start = _inputs(rng, t, strength=strength, starts=starts)
    if strength == 20.0:
        assert floats[3][:, :64].sum(1).min() < -500
    b, _, h, k = floats[0].shape
    shapes = (floats[2].shape, floats[5].shape)
    cotangents = tuple(array(rng.normal(size=s)) for s in shapes)
    got, want = (_value_and_grads(impl)(floats, start, cotangents) for impl in IMPLS)
    assert_close(got, want)


def test_equal_keys_without_decay_stay_exact(rng):
    """The system of a chunk is as far from diagonal as it gets."""
    q, k, v, g, beta, state, start = _inputs(rng, 150)
    args = (q, jnp.broadcast_to(k[:, :1], k.shape), v, 0 * g, jnp.ones_like(beta), state, start)
    assert_close(*(run(impl)(*args) for impl in IMPLS))


def test_padding_leaves_the_state_unchanged(rng):
    args = _inputs(rng, 150, starts=STARTS[:6])
    live = jnp.arange(150) < 101
    q, k, v, g, beta, state, start = args
    g, beta = jnp.where(live[:, None, None], g, 0.0), jnp.where(live[:, None], beta, 0.0)
    got = run("xla")(q, k, v, g, beta, state, start)[1]
    assert_close(got, run("ref")(*(x[:, :101] for x in args[:5]), state, start[:, :101])[1])


@pytest.mark.parametrize("impl", IMPLS)
def test_carried_state_equals_one_pass(impl, rng):
    *tokens, state, start = _inputs(rng, 150, starts=STARTS)
    want, outs = run(impl)(*tokens, state, start), []
    # 1 and 9 tokens go through the recurrence, 50 and 90 through chunks that are not full.
    for a, z in ((0, 1), (1, 10), (10, 60), (60, 150)):
        out, state = run(impl)(*(x[:, a:z] for x in tokens), state, start[:, a:z])
        outs.append(out)
    assert_close((jnp.concatenate(outs, 1), state), want)


def test_packed_documents_equal_separate_ones(rng):
    *tokens, state, _ = _inputs(rng, 150)
    edges = (0, 50, 60, 150)
    start = jnp.zeros((2, 150), bool).at[:, jnp.array(edges[1:-1])].set(True)
    got, outs = run("xla")(*tokens, state, start), []
    for a, z in zip(edges, edges[1:], strict=False):
        document = (x[:, a:z] for x in tokens)
        # Before its first document a row has a state, before the others nothing.
        before = state if a == 0 else jnp.zeros_like(state)
        out, last = run("xla")(*document, before, jnp.zeros((2, z - a), bool))
        outs.append(out)
    assert_close(got, (jnp.concatenate(outs, 1), last))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("gate", ["softplus", "lower5"])
def test_golden(gate, impl):
    data = np.load(GOLDEN)
    q, k, v, beta, state = (data[f"kda_{name}"] for name in ("q", "k", "v", "beta", "S0"))
    start = np.zeros(q.shape[:2], bool)
    q = q * np.float32(q.shape[-1] ** -0.5)
    got = run(impl)(q, k, v, data[f"kda_{gate}_g"], beta, state, start)
    assert_close(got, (data[f"kda_{gate}_o"], data[f"kda_{gate}_state"]))


def test_wrong_calls_raise(rng):
    args = list(_inputs(rng, 4))
    with pytest.raises(ValueError, match="impl='fast'"):
        kda(*args, impl="fast")
    args[5] = jnp.swapaxes(args[5], 2, 3)
    with pytest.raises(ValueError, match="state is"):
        kda(*args, impl="ref")
