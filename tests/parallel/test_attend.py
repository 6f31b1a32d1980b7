"""Attention of a sharded row is that of one device, forward and gradient, in any order."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.attention import Keys, Queries
from kimijax.errors import UserError
from kimijax.ops.attend import Latents, attend
from kimijax.parallel.attend import check, sharded
from kimijax.parallel.axes import Axes
from kimijax.parallel.mesh import make_mesh
from kimijax.parallel.plan import Plan
from kimijax.parallel.sources import HEADS, LATENTS
from tests.conftest import array, assert_close

ROWS, TOKENS, H, SCALE = 2, 64, 8, 0.3


def _floats(*shapes):
    rng = np.random.default_rng(0)
    return [array(rng.normal(size=s)) for s in shapes]


def _inputs(source):
    """(queries, what travels, weights) of two documents a row, every token at a random place."""
    place = np.random.default_rng(1).permutation(TOKENS)
    pos = array(np.broadcast_to(place, (ROWS, TOKENS)), jnp.int32)
    seg = (pos >= 40).astype(jnp.int32)
    pos = pos - 40 * seg
    lead = (ROWS, TOKENS)
    nope, rope, shared, *held = _floats((*lead, H, 8), (*lead, H, 4), (*lead, 4), *(
        ((*lead, 16), (16, H, 8), (16, H, 8)) if source is LATENTS else ((*lead, 2, 8),) * 2
    ))
    q = Queries(nope, rope, pos, seg, jnp.zeros_like(pos))
    if source is LATENTS:
        return q, Latents(held[0], shared, pos, seg), tuple(held[1:])
    return q, Keys(*held, shared, pos, seg), ()


def _value_and_grads(call, source):
    """The Partial, and the gradient of every float input."""
    q, kv, up = _inputs(source)
    d_out, d_lse = _floats((ROWS, TOKENS, H, 8), (ROWS, TOKENS, H))

    floats = kv._fields.index("pos")

    def loss(q_floats, kv_floats, up):
        p = call(Queries(*q_floats, *q[2:]), type(kv)(*kv_floats, *kv[floats:]), up)
        return jnp.sum(p.out * d_out) + jnp.sum(p.lse * d_lse), p

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(
        q[:2], kv[:floats], up
    )


@functools.cache
def _want(source):
    return _value_and_grads(
        lambda *args: attend(*args, scale=SCALE, impl="xla", form="expanded"), source
    )


@pytest.mark.parametrize("source", [LATENTS, HEADS], ids=["latents", "keys"])
@pytest.mark.parametrize("mesh, strategy", [
    ({"seq": 4, "expert": 2}, "hybrid"),
    ({"data": 2, "seq": 2, "expert": 2}, "hybrid"),
    ({"expert": 8}, "hybrid"),  # one group: a ring of one
    ({"seq": 8}, "hybrid:4"),
    ({"seq": 2, "expert": 4}, "hybrid:2"),
    ({"seq": 4, "tensor": 2}, "hybrid:2"),
    ({"seq": 4, "tensor": 2}, "ring"),
    ({"seq": 8}, "ulysses"),
], ids=str)
def test_forward_and_every_gradient(mesh, strategy, source):
    call = sharded(Axes(make_mesh(mesh)), strategy, source, "xla", SCALE)
    assert_close(_value_and_grads(call, source), _want(source))


@pytest.mark.parametrize("mesh, strategy, source", [
    ({"seq": 4}, "ring", LATENTS), ({"seq": 2}, "ring", HEADS),
    ({"seq": 2, "expert": 2}, "hybrid", LATENTS),
], ids=["latents", "keys", "hybrid"])
def test_kernels_of_a_tpu_give_the_same(mesh, strategy, source):
    """Interpreted; a ring hands gradients of queries and weights from hop to hop to be added to."""
    call = sharded(Axes(make_mesh(mesh)), strategy, source, "pallas_interpret", SCALE)
    assert_close(_value_and_grads(call, source), _want(source))


@pytest.mark.parametrize("mesh, strategy, heads, said", [
    ({"seq": 4, "expert": 2}, "hybrid", 7, "7 heads are no multiple of 2 for hybrid on seq x"),
    ({"seq": 4, "tensor": 2}, "hybrid:4", 12, "12 heads are no multiple of 8 for hybrid:4"),
    ({"seq": 8}, "hybrid", 8, "along the mesh axis expert, which has one; name the size"),
    ({"seq": 8}, "hybrid:3", 6, "seq x expert = 8 devices are no groups of 3; choose a divisor"),
    ({"seq": 8}, "hybrid:0", 8, "strategy 'hybrid:0': there are ring, gather"),
])
def test_groups_that_cannot_be_are_refused(mesh, strategy, heads, said):
    with pytest.raises(UserError, match=said):
        check(Axes(make_mesh(mesh)), strategy, heads, 128)


def test_key_heads_that_cannot_be_dealt_out_are_named():
    """Three query heads of one device would read one key head and half of another."""
    q, kv, _ = _inputs(HEADS)
    tripled = lambda x: jnp.concatenate([x] * 3, 2)  # noqa: E731
    q = q._replace(nope=tripled(q.nope)[:, :, :12], rope=tripled(q.rope)[:, :, :12])
    kv = kv._replace(key=tripled(kv.key), value=tripled(kv.value))
    call = Plan(make_mesh({"seq": 8}), strategy="hybrid:4").ops().attend
    with pytest.raises(UserError, match="6 key heads cannot be dealt out with 3 of 12 heads"):
        jax.eval_shape(lambda *args: call(*args, (), scale=SCALE), q, kv)
