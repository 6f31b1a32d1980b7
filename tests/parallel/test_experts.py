"""Experts over devices say what they say on one, whatever the routing, forward and gradient."""

import functools
import logging
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.grouped_matmul import Int4
from kimijax.errors import UserError
from kimijax.ops.moe import tiled_experts
from kimijax.parallel.exchange import choose, chosen
from kimijax.parallel.mesh import make_mesh
from kimijax.parallel.plan import Plan
from kimijax.planner.chips import pod_of
from kimijax.planner.job import abstract_mesh
from tests.conftest import array, assert_close

ROWS, TOKENS, WIDTH, FFN, EXPERTS = 2, 32, 8, 16, 16


def choices(routing: str, k: int) -> jax.Array:
    """Different experts b t k of each token."""
    rng = np.random.default_rng(1)
    among = {"even": EXPERTS, "all to one device": EXPERTS // 8}[routing]
    ids = np.stack([rng.permutation(among)[:k] for _ in range(ROWS * TOKENS)])
    return array(ids, jnp.int32).reshape(ROWS, TOKENS, k)


def value_and_grads(compute, ids):
    """The output, and the gradient of tokens, weights of choices and experts."""
    rng = np.random.default_rng(0)
    draw = lambda *s: array(rng.normal(size=s))  # noqa: E731
    matrices = draw(EXPERTS, WIDTH, FFN), draw(EXPERTS, WIDTH, FFN), draw(EXPERTS, FFN, WIDTH)
    x, weight, cotangent = draw(ROWS, TOKENS, WIDTH), draw(*ids.shape), draw(ROWS, TOKENS, WIDTH)

    def loss(x, weight, matrices):
        y = compute(x, ids, weight, *matrices)
        return jnp.sum(y * cotangent), y

    grads = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)
    return jax.jit(grads)(x, weight, matrices)


@functools.cache
def want(routing: str, k: int):
    return value_and_grads(tiled_experts, choices(routing, k))


@pytest.mark.parametrize("exchange", ["gather", "padded"])
@pytest.mark.parametrize("mesh, routing, k", [
    ({"expert": 8}, "even", 2),  # in four rounds
    ({"expert": 8}, "all to one device", 2),
    ({"expert": 8}, "all to one device", 1),
    ({"seq": 4, "expert": 2}, "even", 6),  # several choices on a device
    ({"data": 2, "expert": 2, "tensor": 2}, "even", 2),
], ids=str)
def test_exchanged_tokens_are_those_of_one_device(mesh, routing, k, exchange):
    compute = Plan(make_mesh(mesh), exchange=exchange).ops().experts
    assert_close(value_and_grads(compute, choices(routing, k)), want(routing, k))


@pytest.mark.parametrize("mesh", [{"data": 2, "seq": 2, "expert": 2}, {"seq": 4, "tensor": 2}],
                         ids=str)
def test_matrices_dealt_in_training_are_those_of_one_device(mesh):
    compute = Plan(make_mesh(mesh), train=True).ops().experts
    assert_close(value_and_grads(compute, choices("even", 2)), want("even", 2))


def test_matrices_travel_as_they_are_multiplied_and_gradients_are_summed_in_float32():
    compute = Plan(make_mesh({"data": 2, "seq": 4}), train=True).ops().experts
    ids = choices("even", 2)
    x = jnp.zeros((ROWS, TOKENS, WIDTH), jnp.bfloat16)
    up, down = jnp.zeros((EXPERTS, WIDTH, FFN)), jnp.zeros((EXPERTS, FFN, WIDTH))

    def loss(matrices):
        return compute(x, ids, jnp.zeros(ids.shape), *matrices).astype(jnp.float32).sum()

    text = str(jax.make_jaxpr(jax.grad(loss))((up, up, down)))
    kind = lambda name: re.findall(rf":(\w+)\[[\d,]*\] = {name}\[", text)  # noqa: E731
    assert kind("all_gather") == ["bf16"] * 3
    assert kind("reduce_scatter") == ["f32"] * 3


def test_rounds_need_not_divide_the_tokens():
    ids = choices("even", 2)[:, :24]  # 6 tokens a device, four rounds of 2
    rng = np.random.default_rng(0)
    x, weight, *matrices = (array(rng.normal(size=s)) for s in (
        (ROWS, 24, WIDTH), ids.shape, (EXPERTS, WIDTH, FFN), (EXPERTS, WIDTH, FFN),
        (EXPERTS, FFN, WIDTH),
    ))
    compute = Plan(make_mesh({"expert": 8}), exchange="padded").ops().experts
    got = jax.jit(compute)(x, ids, weight, *matrices)
    assert_close(got, tiled_experts(x, ids, weight, *matrices))


@pytest.mark.parametrize("tokens", [TOKENS, 1], ids=["a row", "a token that every device has"])
def test_experts_kept_in_four_bits(tokens):
    rng = np.random.default_rng(0)

    def draw(outputs, inputs):
        codes = rng.integers(-(2**31), 2**31, (EXPERTS, outputs, inputs // 8)).astype(np.int32)
        scale = rng.uniform(0.1, 0.2, (EXPERTS, outputs, 1)).astype(np.float32)
        return Int4(jnp.asarray(codes), jnp.asarray(scale))

    matrices = draw(FFN, WIDTH), draw(FFN, WIDTH), draw(WIDTH, FFN)
    ids = choices("even", 2)[:, :tokens]
    x, weight = (array(rng.normal(size=s))
                 for s in ((ROWS, tokens, WIDTH), ids.shape))
    compute = Plan(make_mesh({"seq": 2, "expert": 4})).ops().experts
    got = jax.jit(compute)(x, ids, weight, *matrices)
    assert_close(got, tiled_experts(x, ids, weight, *matrices))


@pytest.mark.parametrize("topology, seq, long", [
    ("v5p:4x4x4", 4, "ragged"), ("v5e:4x4", 1, "ragged"), ("v5e:4x8", 2, "padded"),
    ("v5e:8x8", 4, "padded"), ("v6e:8x8", 4, "ragged"),
])
def test_the_longer_axis_exchanges_what_was_asked_for(topology, seq, long):
    """By what libtpu compiles for the devices (test_planner_aot asks it)."""
    kind = pod_of(topology).kind
    of = lambda ways: choose(abstract_mesh({"seq": seq * 16 // ways, "expert": ways}, kind), 8)  # noqa: E731
    assert [of(ways) for ways in (2, 8, 16)] == ["gather", "gather", long]


def test_an_exchange_that_devices_do_not_have_is_refused(caplog):
    mesh = make_mesh({"expert": 8})
    with pytest.raises(UserError, match="exchange 'post': there are gather, ragged, padded"):
        Plan(mesh, exchange="post")
    with pytest.raises(UserError, match="exchange ragged: XLA has no ragged all-to-all for CPUs"):
        Plan(mesh, exchange="ragged")
    with caplog.at_level(logging.INFO):
        chosen.cache_clear()
        assert [chosen(mesh, k) for k in (2, 2, 8)] == ["padded", "padded", "gather"]
    assert [r.getMessage() for r in caplog.records] == [
        "2 choices of a token, expert = 8: padded (XLA has no ragged all-to-all for CPUs)"
    ]
