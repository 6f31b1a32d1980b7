"""Strategy ring_dma is the ring of ppermute and attention of one device, on simulated TPUs."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.attention import Queries
from kimijax.errors import UserError
from kimijax.ops.attend import Latents, attend
from kimijax.parallel.attend import sharded
from kimijax.parallel.axes import Axes
from kimijax.parallel.mesh import make_mesh
from kimijax.parallel.order import make_order
from kimijax.parallel.plan import Plan
from kimijax.parallel.sources import HEADS, LATENTS
from tests.conftest import array, assert_close

TOKENS, H, SCALE = 64, 2, 0.3
LOCAL = functools.partial(attend, scale=SCALE, impl="xla", form="expanded")


def _inputs(order: str, rope: bool = True):
    """(queries, latents, weights): two documents in one row, in an order of four devices."""
    places = make_order(order, TOKENS, 4, 1, 0).places
    rng = np.random.default_rng(0)
    normal = lambda *shape: array(rng.normal(size=shape))  # noqa: E731
    pos = array(places[None], jnp.int32)
    seg = (pos >= 40).astype(jnp.int32)
    pos = pos - 40 * seg
    q_rope, k_rope = (normal(1, TOKENS, H, 4), normal(1, TOKENS, 4)) if rope else (None, None)
    q = Queries(normal(1, TOKENS, H, 8), q_rope, pos, seg, 0 * pos)
    kv = Latents(normal(1, TOKENS, 16), k_rope, pos, seg)
    return q, kv, (normal(16, H, 8), normal(16, H, 8))


def _value_and_grads(call, inputs):
    """The Partial, and the gradient of every float input."""
    q, kv, up = inputs
    rng = np.random.default_rng(1)
    d_out, d_lse = (rng.normal(size=(1, TOKENS, H, *v)).astype(np.float32) for v in ((8,), ()))

    def loss(q_floats, kv_floats, up):
        p = call(Queries(*q_floats, *q[2:]), Latents(*kv_floats, *kv[2:]), up)
        return jnp.sum(p.out * d_out) + jnp.sum(p.lse * d_lse), p

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(q[:2], kv[:2], up)


@pytest.mark.parametrize("mesh, order, rope", [
    pytest.param({"seq": 2, "expert": 2, "tensor": 2}, "zigzag", True, marks=pytest.mark.slow),
    ({"seq": 2}, "zigzag", True),
    pytest.param({"seq": 1}, "contiguous", False, marks=pytest.mark.slow),
], ids=["eight", "two", "one, no rope"])
def test_forward_and_every_gradient(mesh, order, rope):
    mesh, inputs = make_mesh(mesh), _inputs(order, rope)
    plan = Plan(mesh, strategy="ring_dma", impl="pallas_interpret")
    got = _value_and_grads(functools.partial(plan.ops().attend, scale=SCALE), inputs)
    assert_close(got, _value_and_grads(LOCAL, inputs))
    ring = sharded(Axes(mesh), "ring", LATENTS, "xla", SCALE)
    assert_close(got, _value_and_grads(ring, inputs))


@pytest.mark.parametrize("source, impl, said", [
    (HEADS, "pallas_interpret", "ring_dma sends latents, these layers send keys; name strategy"),
    (LATENTS, "xla", "ring_dma is a kernel of TPUs, which impl xla is not; name impl pallas"),
    (LATENTS, "pallas", "impl pallas needs TPUs, these devices are cpu: .* no remote DMA"),
])
def test_what_cannot_be_is_refused(source, impl, said):
    with pytest.raises(UserError, match=said):
        sharded(Axes(make_mesh({"seq": 2})), "ring_dma", source, impl, SCALE)


def test_plans_that_cannot_be_are_refused():
    plan = Plan(make_mesh({"seq": 2}), strategy="ring_dma")
    with pytest.raises(UserError, match="which impl xla is not"):
        plan.ops().attend(*_inputs("contiguous"), scale=SCALE)
    with pytest.raises(UserError, match="no simulated TPU a second time; leave remat out"):
        dataclasses.replace(plan, impl="pallas_interpret", remat=True).ops()
