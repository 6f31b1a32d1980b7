"""Training: the state of a run, a step, and one visible loop over phases."""

from kimijax.train.guard import Interrupted
from kimijax.train.log import read_log
from kimijax.train.loop import Saves, fit
from kimijax.train.phase import Batches, Numbered, Phase
from kimijax.train.state import TrainState, init_state, state_shardings
from kimijax.train.step import balance, make_step

__all__ = [
    "Batches", "Interrupted", "Numbered", "Phase", "Saves", "TrainState", "balance", "fit",
    "init_state", "make_step", "read_log", "state_shardings",
]
