"""attention on a TPU, interpreted: = ref, forward and gradient, whatever is not masked."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.attention import attention, bounds, ref, tile, tpu, tpu_bwd
from kernels_pallas.attention.vjp import at_once
from tests.conftest import array, assert_close
from tests.kernels.test_attention import _floats, _inputs, _loss

SHUFFLED = np.random.default_rng(1).permutation(600)
ZIGZAG = np.concatenate([np.arange(i * 75, (i + 1) * 75) for i in (0, 7, 1, 6, 2, 5, 3, 4)])
CASES = {
    "one block": {"t": 40, "s": 40},
    "fewer queries, ragged": {"t": 130, "s": 600},
    "window": {"window": 90},
    "one KV head, no rope": {"g": 1, "rope": False},
    "zigzag": {"order": ZIGZAG},
    "shuffled": {"order": SHUFFLED},
}


@pytest.fixture
def small_blocks(monkeypatch):
    """Several blocks and pieces in 600 tokens, some in sight whole, some in part, some not."""
    monkeypatch.setattr(tile, "LANES", 128)
    monkeypatch.setattr(tile, "PIECE", 128)
    for module in (tpu, tpu_bwd):
        monkeypatch.setattr(module, "BLOCK_Q", 256)
        monkeypatch.setattr(module, "BLOCK_K", 1024)  # of float32: 256


@pytest.mark.parametrize("name", CASES)
def test_kernels_equal_the_reference_forward_and_gradient(name, rng, small_blocks):
    q, kv = _inputs(rng, **{"t": 600, "s": 600, **CASES[name]})
    t = q.pos.shape[1]
    cotangents = [array(rng.normal(size=s)) for s in ((2, t, 4, 5), (2, t, 4))]
    got, want = (
        jax.jit(jax.value_and_grad(functools.partial(_loss, impl=impl, cotangents=cotangents),
                                   has_aux=True))(_floats(q, kv), q, kv)
        for impl in ("pallas_interpret", "ref")
    )
    assert_close(got, want)


def test_bfloat16_is_near_the_float32_reference(rng, small_blocks):
    q, kv = _inputs(rng, t=600, s=600, dtype=jnp.bfloat16)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, (q, kv))
    cotangents = [
        array(rng.normal(size=s)) for s in ((2, 600, 4, 5), (2, 600, 4))
    ]

    def run(impl, q, kv):
        loss = functools.partial(_loss, impl=impl, cotangents=cotangents)
        return jax.jit(jax.value_and_grad(loss, has_aux=True))(_floats(q, kv), q, kv)

    (_, got), d_got = run("pallas_interpret", q, kv)
    (_, want), d_want = run("ref", *wide)
    assert all(d.dtype == jnp.bfloat16 for d in d_got)
    assert_close((got.out, got.lse, d_got), (want.out, want.lse, d_want), jnp.bfloat16)


def test_a_row_and_a_batch_row_that_see_nothing(rng):
    q, kv = _inputs(rng)
    kv = kv._replace(seg=kv.seg.at[1].set(-1))
    q = q._replace(since=q.since.at[0, 5].set(bounds.FAR))
    got, want = (attention(q, kv, scale=0.3, impl=i) for i in ("pallas_interpret", "ref"))
    assert_close(got, want)
    assert np.isneginf(got.lse[1]).all() and np.isneginf(got.lse[0, 5]).all()
    assert (np.asarray(got.out[1]) == 0).all()


def test_bounds_never_say_what_masks_deny(rng):
    """any_pair and every_pair against the mask of all pairs, over random and ordered positions."""
    skipped = whole = 0
    for seed in range(20):
        order = None if seed % 2 else np.random.default_rng(seed).permutation(256)
        q, kv = _inputs(np.random.default_rng(seed), t=256, s=256, window=70 if seed % 3 else None,
                        order=order)
        of_q = bounds.query_bounds(q.pos, q.seg, q.since, 16)
        of_k = bounds.key_bounds(kv.pos, kv.seg, 32)
        seen = np.asarray(ref.visible(q, kv)).reshape(2, 16, 16, 8, 32)
        met = np.asarray(bounds.pairs(of_q, of_k))
        every = np.asarray(bounds.every_pair(
            *(jax.tree.map(lambda x, axis=axis: jnp.expand_dims(x, axis), b)
              for b, axis in ((of_q, -1), (of_k, -2)))
        ))
        assert not (seen.any((2, 4)) & ~met).any()
        assert not (~seen.all((2, 4)) & every).any()
        first, count = bounds.span(jnp.asarray(met))
        at = np.arange(8)
        covered = (at >= first[..., None]) & (at < (first + count)[..., None])
        assert not (met & ~covered).any()
        skipped, whole = skipped + (~met).sum(), whole + every.sum()
    assert skipped > 1000 and whole > 200  # the bounds are of use


@pytest.mark.parametrize(
    "execution", ["on_wait", pytest.param("eager", marks=pytest.mark.slow)]
)
def test_transfers_of_the_backward_have_no_race(rng, small_blocks, execution):
    """Gradients of queries go to HBM and back beside the work; on a simulated TPU."""
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call as simulator

    q, kv = _inputs(rng, t=300, s=600, h=2, g=1)
    p = jax.jit(functools.partial(ref.attention, scale=0.3))(q, kv)
    d_out = array(rng.normal(size=p.out.shape))
    rest = (q, kv, p.lse, d_out, jnp.sum(p.out * d_out, -1))
    params = pltpu.InterpretParams(detect_races=True, dma_execution_mode=execution)
    got = jax.jit(functools.partial(at_once(tpu_bwd.backward(params)), scale=0.3))(*rest)
    assert_close(got, jax.jit(functools.partial(ref.attention_grads, scale=0.3))(*rest))
    assert not simulator.races.races_found
