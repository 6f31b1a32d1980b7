"""Training on a mesh: the losses and weights of one device."""

import jax
import optax
import pytest

from experiments.train_needle import loss_of, optimizer_of
from kimijax.data.needles import batch
from kimijax.model import Model, abstract_params
from kimijax.ops.attend import local
from kimijax.parallel.mesh import make_mesh
from kimijax.parallel.plan import Plan
from kimijax.train import init_state, make_step, state_shardings
from tests.conftest import assert_close, small_needle
from tests.test_train import TASK, TEXT


def trained(plan):
    """(metrics of each of two steps, state after them, where it should lie)."""
    model = Model(small_needle(), local(exact=True) if plan is None else plan.ops())
    optimizer = optimizer_of(abstract_params(model), optax.constant_schedule(0.01))
    where = None if plan is None else state_shardings(model, optimizer, plan)
    state = init_state(model, optimizer, 0, where)
    step, said = make_step(loss_of(model), optimizer, balance_rate=1e-3, where=where), []
    for i in range(2):
        state, metrics = step(state, batch(TASK, TEXT, 0, i))
        said.append(jax.device_get(metrics))
    return said, state, where


@pytest.mark.slow  # tests/test_step.py has another model on a mesh
def test_two_steps_on_a_mesh_are_those_of_one_device():
    want, *_ = trained(None)
    mesh = make_mesh({"data": 2, "seq": 2, "expert": 2})
    got, state, where = trained(Plan(mesh, train=True, exact=True))
    for g, w in zip(got, want, strict=True):
        assert_close(g, w)
    lies = jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), state, where)
    assert all(jax.tree.leaves(lies))
    dealt = [s for s in jax.tree.leaves(where.opt_state) if not s.is_fully_replicated]
    assert len(dealt) >= 10  # what the optimizer keeps of a weight lies with it
