"""The kernels of kda on a TPU, interpreted: = ref, forward and gradient, however tokens decay."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.kda import kda
from tests.conftest import array, assert_close
from tests.kernels.test_kda import STARTS, _inputs, _value_and_grads

INTERPRETED = "pallas_interpret"


@functools.cache
def run(impl):
    return jax.jit(functools.partial(kda, impl=impl))


def _cotangents(rng, floats):
    return tuple(array(rng.normal(size=floats[i].shape)) for i in (2, 5))


@pytest.mark.parametrize("t, h, strength, starts", [
    (150, 3, 0.1, ()), (150, 3, 20.0, STARTS), (17, 1, 1.0, ((1, 3),)),
], ids=["decays little", "decays at once", "one chunk and head"])
def test_kernels_equal_the_reference_forward_and_gradient(t, h, strength, starts, rng):
    *floats, start = _inputs(rng, t, h=h, strength=strength, starts=starts)
    if strength == 20.0:
        assert floats[3][:, :64].sum(1).min() < -500
    cotangents = _cotangents(rng, floats)
    got, want = (_value_and_grads(impl)(floats, start, cotangents) for impl in (INTERPRETED, "ref"))
    assert_close(got[0], want[0])
    for g, w in zip(got[1], want[1], strict=True):
        assert_close(g, w)


def test_bfloat16_is_near_the_float32_reference(rng):
    *floats, start = _inputs(rng, 100, starts=STARTS[:4])
    narrow = [x.astype(jnp.bfloat16) for x in floats[:3]] + floats[3:]
    cotangents = _cotangents(rng, floats)
    got = _value_and_grads(INTERPRETED)(narrow, start, cotangents)
    wide = [x.astype(jnp.float32) for x in narrow]
    want = _value_and_grads("ref")(wide, start, cotangents)
    assert [g.dtype for g in got[1]] == [x.dtype for x in narrow]
    assert_close(got[0], want[0])  # what was rounded was rounded for both
    for g, w in zip(got[1], want[1], strict=True):
        assert_close(g, w, g.dtype)


def test_equal_keys_without_decay_stay_exact(rng):
    """The system of a chunk is as far from diagonal as it gets."""
    q, k, v, g, beta, state, start = _inputs(rng, 150)
    args = (q, jnp.broadcast_to(k[:, :1], k.shape), v, 0 * g, jnp.ones_like(beta), state, start)
    assert_close(*(run(impl)(*args) for impl in (INTERPRETED, "ref")))


def test_a_gate_beyond_any_exponent_forgets(rng):
    """A decay that is zero has no gradient."""
    *floats, start = _inputs(rng, 150, h=3)
    floats[3] = floats[3].at[:, 10::7].set(-1e38)
    cotangents = _cotangents(rng, floats)
    got, want = (_value_and_grads(impl)(floats, start, cotangents) for impl in (INTERPRETED, "ref"))
    assert_close(got, want)


def test_pieces_equal_the_whole(rng):
    """Through the recurrence and through chunks that are not full."""
    *tokens, state, start = _inputs(rng, 150, starts=STARTS)
    want, outs = run("ref")(*tokens, state, start), []
    for a, z in ((0, 9), (9, 22), (22, 150)):  # the last are two whole chunks
        out, state = run(INTERPRETED)(*(x[:, a:z] for x in tokens), state, start[:, a:z])
        outs.append(out)
    assert_close((jnp.concatenate(outs, 1), state), want)


def test_bad_neighbours_do_not_leak(rng):
    """Heads share a block: one must not see the other, nor a padded one."""
    q, k, v, g, beta, state, start = _inputs(rng, 150, h=3)
    got = run(INTERPRETED)(q, k, v, g, beta, state, start)
    other = run(INTERPRETED)(q, k.at[:, :, 1].multiply(-3), v.at[:, :, 1].set(1e3), g, beta,
                             state.at[:, 1].set(1e3), start)
    for axis, mine, changed in zip((2, 1), got, other, strict=True):
        mine, changed = (np.delete(x, 1, axis) for x in (mine, changed))
        np.testing.assert_array_equal(mine, changed)
