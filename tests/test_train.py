"""Training: rows are what they claim, an interrupted run is the same run, loads are balanced."""

import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.train_needle import loss_of, optimizer_of, phases
from kimijax.data.needles import NeedleTask, batch
from kimijax.errors import UserError
from kimijax.model import Model, abstract_params
from kimijax.ops.attend import local
from kimijax.optim.matrices import matrices_of
from kimijax.train import Interrupted, Numbered, Phase, balance, fit, init_state, make_step
from tests.conftest import small_needle

TASK = NeedleTask(length=256, rows=2, needles=3, questions=1, watched=4)
TEXT = np.frombuffer(b"def f(x):\n    return x + 1\n" * 200, np.uint8)
STEPS = 4


@pytest.fixture(scope="module")
def made():
    """Initial state and jitted step of a small model."""
    model = Model(small_needle(), local(exact=True))
    optimizer = optimizer_of(abstract_params(model), optax.constant_schedule(0.01))
    step = make_step(loss_of(model), optimizer, balance_rate=1e-3)
    state = jax.device_get(init_state(model, optimizer, 0))
    return lambda: jax.tree.map(jnp.array, state), step  # a copy: the step takes its state's memory


def _fit(made, out, stop_at=None, run=None):
    start, step = made

    def batch_of(i):
        if i == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return batch(TASK, TEXT, 0, i)

    phase = Phase("all", STEPS, step, lambda: Numbered(batch_of), TASK.rows * TASK.length)
    return fit(start(), [phase], out, run or {})


@pytest.mark.slow  # test_loop.py has a smaller one
def test_interrupted_and_resumed_is_uninterrupted(made, tmp_path):
    whole = _fit(made, tmp_path / "whole")
    with pytest.raises(Interrupted, match="after step 2 of 4"):
        _fit(made, tmp_path / "cut", stop_at=1)
    resumed = _fit(made, tmp_path / "cut")
    jax.tree.map(np.testing.assert_array_equal, whole, resumed)
    with pytest.raises(UserError, match="another run"):
        _fit(made, tmp_path / "cut", run={"seed": 1})
    logs = [(tmp_path / d / "metrics.jsonl").read_text().count("\n") for d in ("whole", "cut")]
    assert logs == [STEPS, STEPS]


def test_rows_hold_their_needles_and_ask_for_them():
    for _, task in phases():
        b = batch(task, np.resize(TEXT, 10 * task.length), 3, 0)
        assert b.ids.shape == (task.rows, task.length)
        for ids, answers in zip(b.ids, b.answers, strict=True):
            text = bytes(ids.astype(np.uint8)).decode()
            digits = bytes(ids[answers + 1].astype(np.uint8)).decode()
            for i in range(0, len(digits), 5):
                end = answers[i] + 1
                asked = text[:end].rsplit("The pass key for ", 1)[1].split(" is ")[0]
                stated = f" The pass key for {asked} is {digits[i : i + 5]}. "
                assert 0 <= text.find(stated) < end - len(stated)
        again = batch(task, np.resize(TEXT, 10 * task.length), 3, 0)
        jax.tree.map(np.testing.assert_array_equal, b, again)


def test_matrices_are_told_from_the_rest_by_their_dims():
    assert matrices_of(("layers", "embed", "heads", "head_dim")) == ((1,), (2, 3))
    assert matrices_of(("layers", "heads", "head_dim", "embed")) == ((1, 2), (3,))
    assert matrices_of(("layers", "expert", "ffn", "embed")) == ((2,), (3,))
    assert matrices_of(("layers", "norm")) is None
    assert matrices_of(("layers", "tap", "embed")) is None


def test_balance_moves_the_bias_against_the_load():
    params = {"params": {"group_0": {"layer_0": {"ffn": {"bias": jnp.zeros((1, 3))}}}}}
    load = {(0, "layer_0"): jnp.array([[0.8, 0.1, 0.1]])}
    bias = balance(params, load, 0.3)["params"]["group_0"]["layer_0"]["ffn"]["bias"]
    np.testing.assert_allclose(bias, [[-0.4, 0.2, 0.2]], atol=1e-6)
