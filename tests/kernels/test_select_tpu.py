"""select on a TPU, interpreted: = ref, forward and gradient, whatever was chosen."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.select import ref, select, tpu, tpu_bwd
from tests.conftest import array, assert_close


def _inputs(rng, dtype=jnp.float32, b=1, m=4, t=40, h=7, r=16, c=12, j=8, k=7):
    """A tile that chose nothing, one that chose less than k; ids in any order."""
    q = array(rng.normal(size=(b, m, t, h, r)), dtype)
    blocks = array(rng.normal(size=(2, b, c, j, r)), dtype)
    ids = np.stack([[rng.permutation(c)[:k] for _ in range(m)] for _ in range(b)])
    ids[0, 0], ids[-1, -1, 1::2] = -1, -1
    cotangents = [array(rng.normal(size=s)) for s in (q.shape, q.shape[:-1])]
    return q, blocks, array(ids, jnp.int32), cotangents


def _loss(floats, ids, cotangents, impl):
    p = select(*floats, jnp.int32(1), ids, scale=0.4, impl=impl)
    lse = jnp.where(jnp.isneginf(p.lse), 0.0, p.lse)
    d_out, d_lse = cotangents
    return jnp.sum(p.out * d_out) + jnp.sum(lse * d_lse), p


def _both(impl, q, blocks, ids, cotangents):
    f = jax.value_and_grad(functools.partial(_loss, impl=impl), has_aux=True)
    return jax.jit(f)((q, blocks), ids, cotangents)


@pytest.fixture
def small(monkeypatch):
    """Three blocks of eight to a chunk; of float32 128 rows to a step, three steps to a tile."""
    monkeypatch.setattr(tpu, "ROWS", 256)
    monkeypatch.setattr(tpu, "LANES", 128)
    monkeypatch.setattr(tpu, "KEYS", 24)


CASES = {
    "steps and chunks": {},
    "an odd number of tiles": {"m": 3, "t": 9},
    "rows of a batch": {"b": 2, "m": 3, "t": 5, "h": 2},
    "one choice, few rows": {"t": 1, "h": 2, "k": 1},
    "all blocks": {"c": 6, "k": 6, "t": 8},
}


@pytest.mark.parametrize("name", CASES)
def test_kernels_equal_the_reference_forward_and_gradient(name, rng, small):
    args = _inputs(rng, **CASES[name])
    got, want = (_both(impl, *args) for impl in ("pallas_interpret", "ref"))
    assert_close(got, want)
    out, lse, _ = got[0][1]
    assert np.isneginf(lse[0, 0]).all() and (np.asarray(out[0, 0]) == 0).all()


def test_bfloat16_is_near_the_float32_reference(rng, small):
    q, blocks, ids, cotangents = _inputs(rng, jnp.bfloat16)
    wide = (x.astype(jnp.float32) for x in (q, blocks))
    (_, got), d_got = _both("pallas_interpret", q, blocks, ids, cotangents)
    (_, want), d_want = _both("ref", *wide, ids, cotangents)
    assert all(d.dtype == jnp.bfloat16 for d in d_got)
    assert_close((got.out, got.lse, d_got), (want.out, want.lse, d_want), jnp.bfloat16)


@pytest.mark.parametrize("execution, dims", [
    pytest.param("eager", {"m": 4, "t": 10}, marks=pytest.mark.slow),
    ("on_wait", {"m": 4, "t": 10}), ("on_wait", {"m": 1, "t": 40}),
], ids=["eager, two parts", "two parts", "one tile"])
def test_copies_have_no_race(rng, small, execution, dims):
    """On a simulated TPU of two cores; blocks come ahead of the work, sums go back after it."""
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call as simulator

    q, blocks, ids, (d_out, d_lse) = _inputs(rng, h=7, r=8, c=8, **dims)
    ids = ids.at[0, 0].set(jnp.arange(7, dtype=jnp.int32))  # where there is one tile, it chose
    rest = (q, blocks, jnp.int32(1), ids)
    params = pltpu.InterpretParams(
        detect_races=True, dma_execution_mode=execution, num_cores_or_threads=2
    )
    got = jax.jit(functools.partial(tpu.forward, scale=0.4, interpret=params))(*rest)
    want, vjp = jax.vjp(lambda q, c: ref.select(q, c, *rest[2:], scale=0.4), q, blocks)
    assert_close(got, want)
    delta = jnp.sum(want.out * d_out, -1) - d_lse
    got = jax.jit(functools.partial(tpu_bwd.grads, scale=0.4, interpret=params))(
        *rest, want.lse, d_out, delta
    )
    assert_close(got, vjp(want._replace(out=d_out, lse=d_lse, max_logit=jnp.zeros_like(d_lse))))
    assert not simulator.races.races_found
