"""Training: the state of a run, a step, and one visible loop."""

from kimijax.train.loop import Interrupted, fit
from kimijax.train.state import TrainState, init_state, state_shardings
from kimijax.train.step import balance, make_step

__all__ = [
    "Interrupted", "TrainState", "balance", "fit", "init_state", "make_step", "state_shardings",
]
