"""latent_attention: xla and the kernels of a TPU = ref, forward and gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.attention import tile
from kernels_pallas.attention.vjp import at_once
from kernels_pallas.latent import (
    Latents,
    latent_attention,
    latent_attention_grads,
    ref,
    tpu,
    tpu_bwd,
)
from tests.conftest import array, assert_close
from tests.kernels.test_attention import _inputs

CASES = {
    "one block": {},
    "window, fewer queries": {"t": 300, "s": 600, "window": 90},
    "no rope, an odd head": {"t": 300, "s": 300, "rope": False, "h": 3},
    "shuffled": {"t": 400, "s": 400, "order": np.random.default_rng(1).permutation(400)},
}


@pytest.fixture
def small_blocks(monkeypatch):
    """Several blocks and pieces in a few hundred tokens."""
    monkeypatch.setattr(tile, "LANES", 128)
    monkeypatch.setattr(tile, "PIECE", 128)
    for module in (tpu, tpu_bwd):
        monkeypatch.setattr(module, "BLOCK_Q", 256)
        monkeypatch.setattr(module, "BLOCK_K", 1024)  # of float32: 256


def _latents(rng, dtype=jnp.float32, **case):
    """Queries, latents and weights."""
    case = {"h": 4, **case}
    q, kv = _inputs(rng, g=case["h"], dtype=dtype, **case)
    normal = lambda *shape: array(0.3 * rng.normal(size=shape), dtype)  # noqa: E731
    latents = Latents(normal(*kv.pos.shape, 12) / 0.3, kv.rope, kv.pos, kv.seg)
    return q, latents, (normal(12, case["h"], 8), normal(12, case["h"], 5))


def _loss(floats, q, kv, impl, cotangents):
    (nope, rope), (latent, k_rope), up = floats
    q, kv = q._replace(nope=nope, rope=rope), kv._replace(latent=latent, k_rope=k_rope)
    p = latent_attention(q, kv, up, scale=0.3, impl=impl)
    lse = jnp.where(jnp.isneginf(p.lse), 0.0, p.lse)
    return jnp.sum(p.out * cotangents[0]) + jnp.sum(lse * cotangents[1]), p


def _value_and_grad(inputs, impl, rng):
    q, kv, up = inputs
    b, t, h = q.nope.shape[:3]
    cotangents = [array(rng.normal(size=s)) for s in ((b, t, h, 5), (b, t, h))]
    floats = (q.nope, q.rope), (kv.latent, kv.k_rope), up
    return jax.jit(jax.value_and_grad(
        functools.partial(_loss, impl=impl, cotangents=cotangents), has_aux=True
    ))(floats, q, kv)


@pytest.mark.parametrize("impl", ["xla", "pallas_interpret"])
@pytest.mark.parametrize("name", CASES)
def test_equals_the_reference_forward_and_gradient(name, impl, small_blocks):
    inputs = _latents(np.random.default_rng(0), **CASES[name])
    got, want = (_value_and_grad(inputs, i, np.random.default_rng(2)) for i in (impl, "ref"))
    assert_close(got, want)


@pytest.mark.parametrize("impl", ["xla", "pallas_interpret"])
def test_bfloat16_is_near_the_float32_reference(impl, small_blocks):
    inputs = _latents(np.random.default_rng(0), jnp.bfloat16, t=300, s=300)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, inputs)
    (_, got), d_got = _value_and_grad(inputs, impl, np.random.default_rng(2))
    (_, want), d_want = _value_and_grad(wide, "ref", np.random.default_rng(2))
    assert_close((got.out, got.lse, d_got), (want.out, want.lse, d_want), jnp.bfloat16)


@pytest.mark.parametrize(
    "execution", ["on_wait", pytest.param("eager", marks=pytest.mark.slow)]
)
def test_transfers_of_the_backward_have_no_race(rng, small_blocks, execution):
    """Gradients of queries and of weights go to HBM and back; on a simulated TPU."""
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call as simulator

    q, kv, up = _latents(rng, t=300, s=300, h=2)
    p = jax.jit(functools.partial(ref.forward, scale=0.3))(q, kv, up)
    d_out = array(rng.normal(size=p.out.shape))
    rest = (q, kv, up, p.lse, d_out, jnp.sum(p.out * d_out, -1))
    params = pltpu.InterpretParams(detect_races=True, dma_execution_mode=execution)
    got = jax.jit(functools.partial(at_once(tpu_bwd.backward(params)), scale=0.3))(*rest)
    assert_close(got, jax.jit(functools.partial(ref.grads, scale=0.3))(*rest))
    assert not simulator.races.races_found


def test_wrong_names_and_shapes_raise_with_the_values(rng):
    q, kv, up = _latents(rng)
    call = functools.partial(latent_attention, scale=1.0)
    with pytest.raises(ValueError, match="cuda.*pallas.*ref.*xla"):
        call(q, kv, up, impl="cuda")
    with pytest.raises(ValueError, match=r"\(12, 3, 8\)"):
        call(q, kv, (up[0][:, :3], up[1]), impl="xla")
    with pytest.raises(ValueError, match="rotary"):
        call(q._replace(rope=None), kv, up, impl="xla")
    with pytest.raises(ValueError, match="unknown impl='mosaic'"):
        latent_attention_grads(q, kv, up, None, None, None, scale=1.0, impl="mosaic")
