"""A whole model over eight devices is the model on one: `make matrix` has every composition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kimijax.model import Model
from kimijax.parallel.mesh import make_mesh
from kimijax.parallel.plan import Plan
from tests.conftest import CONFIGS, assert_close, model_and_params

T = 256


@pytest.fixture(scope="module")
def ids():
    return np.random.default_rng(0).integers(0, 64, (2, T)).astype(np.int32)


def _value_and_grad(model, order=lambda x: x):
    def loss(params, call, runs):
        hidden = order(model.apply(params, **call, runs=runs).hidden)
        return jnp.sum(jnp.sin(hidden)), hidden

    return jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=2)


@pytest.mark.slow  # make matrix has more layers in more ways
@pytest.mark.parametrize("train", [False, True], ids=["serving", "training"])
def test_forward_and_the_gradient_of_every_weight(train, ids):
    """Training deals weights over data and seq too, and computes layers a second time."""
    model, params = model_and_params("kimi")
    want = _value_and_grad(model)(params, {"ids": ids}, 1)
    mesh = make_mesh({"data": 2, "seq": 2, "expert": 2})
    plan = Plan(mesh, order="zigzag", train=train, remat=train)
    cfg = CONFIGS["kimi"]()
    call, back = plan.arrange(cfg, ids)
    runs = call.pop("runs")
    step = _value_and_grad(Model(cfg, plan.ops()), back.restore)
    got = step(jax.device_put(params, plan.shardings(cfg)), call, runs)
    assert_close(got, want)
    embed = plan.shardings(cfg)["params"]["group_0"]["layer_0"]["mixer"]["q_down"]["w"].spec
    assert ("data" in str(embed)) == train


@pytest.mark.slow
def test_masks_are_not_kept_for_every_layer(ids):
    """Positions are the same in all layers: jax would hoist all masks, which grow with S^2."""
    def temporaries(tokens):
        model, params = model_and_params("kimi")
        shape = jax.ShapeDtypeStruct((1, tokens), jnp.int32)
        loss = lambda p, ids: jnp.sum(model.apply(p, ids).hidden)  # noqa: E731
        compiled = jax.jit(jax.grad(loss)).lower(params, shape).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries(8192) < 2.5 * temporaries(4096)
