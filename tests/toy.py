"""A run that takes milliseconds a step, for tests of the loop; and a command that can be killed.

python -m tests.toy --out DIR [--full_at STEP]
"""

import argparse
import functools
import resource
import sys
import time
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kimijax.cli import run_module
from kimijax.train import Interrupted, Numbered, Phase, Saves, fit

STEPS = (14, 10)
PAUSE = 0.03  # seconds a batch takes: as long as a save, so that signals fall into both


class State(NamedTuple):
    """As the loop needs it, with arrays that do not compress."""

    step: jax.Array
    params: dict


class Walk:
    """Batches of a random walk: where it is cannot be told from a number of steps."""

    def __init__(self, seed: int, pause: float = 0.0):
        self._rng, self._at, self._pause = np.random.default_rng(seed), 0.0, pause

    def __next__(self) -> np.float32:
        time.sleep(self._pause)
        self._at += self._rng.normal()
        return np.float32(self._at)

    def get_state(self) -> dict:
        return {"rng": self._rng.bit_generator.state, "at": self._at}

    def set_state(self, state: dict) -> None:
        self._rng.bit_generator.state, self._at = state["rng"], state["at"]


def start() -> State:
    """The first state, 1 MB."""
    w = np.random.default_rng(0).normal(size=(500, 500)).astype(np.float32)
    return State(jnp.int32(0), {"w": jnp.asarray(w)})


@functools.partial(jax.jit, donate_argnums=0, static_argnames="rate")
def step(state: State, batch, rate: float):
    """Chaotic enough that a batch left out or done twice is seen in all later losses."""
    w = state.params["w"]
    w = w + rate * jnp.sin(3 * w + batch)
    return State(state.step + 1, {"w": w}), {"loss": jnp.mean(w * w), "batch": batch}


def phases(pause: float = 0.0) -> list[Phase]:
    """Two kinds of steps, and two kinds of iterators."""

    def batch_of(i: int) -> np.float32:
        time.sleep(pause)
        return np.float32(i * i % 7)

    steps = [functools.partial(step, rate=rate) for rate in (0.1, 0.3)]
    return [
        Phase("short", STEPS[0], steps[0], lambda: Walk(5, pause), 10),
        Phase("long", STEPS[1], steps[1], lambda: Numbered(batch_of), 20),
    ]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options."""
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--full_at", type=int, help="from then on no file can exceed 100 kB")


def main(args: argparse.Namespace) -> int:
    """Train; saved every second step."""
    state = start()
    said = phases(PAUSE)

    def fill(state, batch):
        if int(state.step) == args.full_at:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        return step(state, batch, rate=0.1)

    if args.full_at is not None:
        said[0] = said[0]._replace(step=fill)
    try:
        fit(state, said, args.out, {}, saves=Saves(every=2))
    except Interrupted as stopped:
        print(stopped)
        return 130
    assert "tensorboardX" not in sys.modules
    return 0


if __name__ == "__main__":
    run_module(add_arguments, main, __doc__)
