"""What test_processes.py runs in each of two processes, and in one for the answer wanted.

python -m tests.parallel.worker PORT INDEX OUT: OUT/got.npz from process 0; then both go on
training until process 1 kills itself.
"""

import os
import signal
import sys
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from kimijax.cache import empty_cache
from kimijax.checkpoint import restore_latest, save_state
from kimijax.config import GroupConfig, KDAConfig, LayerConfig, MLAConfig, ModelConfig, SwiGLUConfig
from kimijax.model import Model, abstract_params
from kimijax.ops.attend import local
from kimijax.parallel.mesh import make_mesh
from kimijax.parallel.plan import Plan
from kimijax.parallel.processes import join
from kimijax.train import Interrupted, Phase, TrainState, fit, make_step
from kimijax.train.rows import placed, rows_of, share
from tests.toy import Walk

TOKENS, CHUNK = 72, 32  # two chunks and decoding; a row that is padded on eight devices


def config() -> ModelConfig:
    """One MLA and one KDA layer."""
    mla = MLAConfig(heads=2, q_rank=None, kv_rank=8, nope_dim=8, rope_dim=0, v_dim=8, rope=None)
    kda = KDAConfig(heads=2, head_dim=8, conv=4, gate_rank=8)
    ffn = SwiGLUConfig(width=16)
    layers = tuple(LayerConfig(mixer=mixer, ffn=ffn) for mixer in (mla, kda))
    return ModelConfig(vocab=32, width=16, groups=(GroupConfig(layers=layers),), embed_std=1.0)


class Job:
    """The same work on one device (plan None) or on a plan's, results as numpy arrays."""

    def __init__(self, plan: Plan | None, params):
        self.plan, self.cfg = plan, config()
        self.model = Model(self.cfg, local() if plan is None else plan.ops())
        ids = np.random.default_rng(1).integers(0, 32, (1, TOKENS)).astype(np.int32)
        self.ids = ids
        self.call, self.restore, self.runs = {"ids": ids}, lambda x: x, None
        if plan is not None:
            self.call, arranged = plan.arrange(self.cfg, ids)
            self.runs, self.restore = self.call.pop("runs"), arranged.restore
            params = self.everywhere(params, plan.shardings(self.cfg))
        optimizer = optax.sgd(0.1)
        step, norm, skipped = (self.whole(t(0)) for t in (np.int32, np.float32, np.int32))
        self.state = TrainState(step, params, optimizer.init(params), norm, skipped)
        self.step = make_step(self.loss, optimizer)

    def everywhere(self, tree, shardings):
        """Host arrays that every process has -> global arrays."""
        return jax.tree.map(
            lambda x, s: jax.make_array_from_callback(x.shape, s, lambda at: np.asarray(x)[at]),
            tree, shardings,
        )

    def whole(self, x):
        """A host array, on every device."""
        if self.plan is None:
            return jnp.asarray(x)
        spec = jax.sharding.NamedSharding(self.plan.mesh, jax.sharding.PartitionSpec())
        return self.everywhere(x, spec)

    def back(self, tree):
        """Global arrays -> host arrays, whole."""
        if self.plan is None:
            return jax.tree.map(np.asarray, tree)
        spec = jax.sharding.NamedSharding(self.plan.mesh, jax.sharding.PartitionSpec())
        return jax.tree.map(np.asarray, jax.jit(lambda x: x, out_shardings=spec)(tree))

    def loss(self, params, batch):
        out = self.model.apply(params, **batch, runs=self.runs)
        hidden = self.restore(out.hidden)
        return jnp.mean(jnp.sin(hidden)), ({"hidden": hidden}, out.aux)

    def train(self):
        """One step: (hidden states before it, params after it)."""
        batch = {name: self.whole(x) for name, x in self.call.items()}
        self.state, metrics = self.step(self.state, batch)
        return metrics["hidden"], self.state.params

    def read(self):
        """Hidden states of the row read in chunks and token by token, with the trained params."""
        ways = 1 if self.plan is None else self.plan.ways
        make = lambda: empty_cache(self.cfg, 1, TOKENS, ways=ways)  # noqa: E731
        where = None if self.plan is None else self.plan.cache_shardings(jax.eval_shape(make))
        cache, found = jax.jit(make, out_shardings=where)(), []
        apply = jax.jit(self.extend, static_argnames="aligned", donate_argnums=2)
        for at, length in ((0, CHUNK), (CHUNK, CHUNK), *((2 * CHUNK + i, 1) for i in range(3))):
            ids = self.whole(self.ids[:, at : at + length])
            hidden, cache = apply(self.state.params, ids, cache, aligned=length == CHUNK)
            found.append(self.back(hidden))
        return np.concatenate(found, 1)

    def extend(self, params, ids, cache, aligned):
        out = self.model.apply(params, ids, cache=cache, aligned=aligned)
        return out.hidden, out.cache


def results(job: Job) -> dict[str, np.ndarray]:
    """Everything the job computes, by name."""
    hidden, params = job.train()
    leaves = {f"param{i}": x for i, x in enumerate(jax.tree.leaves(job.back(params)))}
    return {"whole": job.back(hidden), **leaves, "cached": job.read()}


class Small(NamedTuple):
    """A state of one array."""

    step: jax.Array
    w: jax.Array


class Own:
    """Batches of which every process gives its own part, from its own place."""

    def __init__(self, where, index: int, stop_at: int | None):
        self.where, self.walk, self.at, self.stop_at = where, Walk(index), 0, stop_at

    def __next__(self):
        self.at += 1
        if self.at == self.stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return jax.make_array_from_process_local_data(self.where, np.full(4, next(self.walk)))

    def get_state(self) -> dict:
        return self.walk.get_state() | {"next": self.at}

    def set_state(self, state: dict) -> None:
        self.at = state.pop("next")
        self.walk.set_state(state)


def fitted(index: int, out: Path) -> dict[str, np.ndarray]:
    """Six steps of the loop, and again with a signal to process 1 alone at the third."""
    mesh = make_mesh({"seq": 8})
    whole, dealt = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), ("seq",)))

    @partial(jax.jit, out_shardings=(Small(whole, dealt), whole))
    def step(state, batch):
        w = jnp.sin(state.w + batch)
        return Small(state.step + 1, w), {"loss": w.sum()}

    def train(to: str, stop_at: int | None):
        zero = jax.make_array_from_callback((8,), dealt, lambda at: np.zeros(8, np.float32)[at])
        start = Small(jax.device_put(np.int32(0), whole), zero)
        batches = lambda: Own(dealt, index, stop_at if index == 1 else None)  # noqa: E731
        return fit(start, [Phase("only", 6, step, batches, 8)], out / to, {})

    end = {"fit_whole": train("whole", None).w}
    try:
        train("cut", 3)
    except Interrupted as stopped:
        (out / f"stopped{index}").write_text(str(stopped))
    end["fit_cut"] = train("cut", None).w
    return {k: np.asarray(jax.jit(lambda x: x, out_shardings=whole)(w)) for k, w in end.items()}


ROWS = np.arange(8 * TOKENS, dtype=np.int32).reshape(8, TOKENS)


def dealt_rows(job: Job, plan: Plan) -> dict[str, np.ndarray]:
    """A batch of which every process brings the rows that it has to, whole; and those parts."""
    part, parts = share(plan, len(ROWS))
    own = ROWS[part * len(ROWS) // parts : (part + 1) * len(ROWS) // parts]
    rows = rows_of(own, own % 7, own * 0, own.astype(np.float32))
    return {f"rows_{parts}": job.back(placed(plan, job.cfg, len(ROWS), rows).ids)}


def initial_params():
    """Fixed random weights, on the host."""
    rng = np.random.default_rng(0)
    shapes = nn.unbox(abstract_params(Model(config(), local())))
    return jax.tree.map(lambda x: (rng.normal(size=x.shape) * 0.3).astype(np.float32), shapes)


def main(port: str, index: int, out: Path) -> None:
    """One of the two processes."""
    jax.config.update("jax_num_cpu_devices", 4)
    with join(f"127.0.0.1:{port}", 2, index, patience=60):
        work(index, out)


def work(index: int, out: Path) -> None:
    """What both do, until one of them is gone."""
    job = Job(Plan(make_mesh({"seq": 8})), initial_params())
    got = results(job)
    save_state(out / "state", 1, job.state)
    job.state = restore_latest(out / "state", job.state).state
    again = jax.tree.leaves(job.back(job.state.params))
    got |= {f"restored{i}": x for i, x in enumerate(again)}
    got |= fitted(index, out)
    for sizes in ({"data": 8}, {"data": 4, "seq": 2}, {"seq": 8}):
        got |= dealt_rows(job, Plan(make_mesh(sizes), order="zigzag"))
    if index == 0:
        np.savez(out / "part.npz", **got)
        (out / "part.npz").rename(out / "got.npz")
    for step in range(10_000):
        jax.block_until_ready(job.train())
        if index == 1 and step == 3:
            (out / "killed").write_text(str(time.time()))
            os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
