"""A run of the loop over several processes, milliseconds a step, each with batches of its own.

python -m tests.pod.tiny --out DIR --notes DIR --mesh seq=2 [--coordinator ... --processes 2 ...]
"""

import argparse
import os
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from kimijax.cli import run_module
from kimijax.commands.mesh import add_mesh
from kimijax.commands.processes import job_of
from kimijax.parallel.mesh import make_mesh, parse_mesh
from kimijax.parallel.processes import is_first
from kimijax.train import Interrupted, Phase, Saves, fit
from tests import bucket as buckets
from tests.toy import Walk

STEPS = 40
PAUSE = 0.03  # seconds a batch takes


class Small(NamedTuple):
    """A state of one array."""

    step: jax.Array
    w: jax.Array


class Part:
    """This process's part of every batch."""

    def __init__(self, where):
        self.where, self.walk = where, Walk(jax.process_index(), PAUSE)

    def __next__(self):
        return jax.make_array_from_process_local_data(self.where, np.full(4, next(self.walk)))

    def get_state(self) -> dict:
        return self.walk.get_state()

    def set_state(self, state: dict) -> None:
        self.walk.set_state(state)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options."""
    parser.add_argument("--out", required=True)
    parser.add_argument("--notes", type=Path, required=True, help="who runs, and what comes of it")
    add_mesh(parser)


def main(args: argparse.Namespace) -> int:
    """Train; saved every third step."""
    buckets.reach()
    args.notes.mkdir(parents=True, exist_ok=True)
    (args.notes / f"pid{args.process}").write_text(str(os.getpid()))
    with job_of(args):
        mesh = make_mesh(parse_mesh(args.mesh))
        whole, dealt = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), ("seq",)))
        size = 4 * jax.process_count()

        @partial(jax.jit, out_shardings=(Small(whole, dealt), whole))
        def step(state, batch):
            w = jnp.sin(3 * state.w + batch)
            return Small(state.step + 1, w), {"loss": w.sum()}

        zero = jax.make_array_from_callback((size,), dealt, lambda at: np.zeros(size, "f4")[at])
        start = Small(jax.device_put(np.int32(0), whole), zero)
        phases = [Phase("only", STEPS, step, lambda: Part(dealt), size)]
        try:
            end = fit(start, phases, args.out, {}, saves=Saves(every=3))
        except Interrupted as stopped:
            print(stopped, flush=True)
            return 130
        w = jax.jit(lambda w: w, out_shardings=whole)(end.w)
        if is_first():
            np.save(args.notes / "w.npy", np.asarray(w))
    return 0


if __name__ == "__main__":
    run_module(add_arguments, main, __doc__)
