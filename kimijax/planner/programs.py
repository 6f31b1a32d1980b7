"""The jitted functions of a job as a run calls them, lowered by shapes for a mesh."""

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from kimijax.generate import decoder
from kimijax.model import Model
from kimijax.optim import muon, qk_clip
from kimijax.parallel.plan import Plan
from kimijax.planner import job as jobs
from kimijax.planner.job import RATE, Job
from kimijax.train.loss import Rows, language_model
from kimijax.train.state import init_shapes, state_shardings
from kimijax.train.step import make_step


def lower(job: Job, plan: Plan) -> jax.stages.Lowered:
    """The program of a job; nothing is allocated."""
    build = {"prefill": prefill, "decode": decode, "train": train}[job.kind]
    return build(job, plan)


def prefill(job: Job, plan: Plan) -> jax.stages.Lowered:
    """Hidden states of whole rows, as `kimijax logits` has them, and logits of what follows.

    In chunks: a call of `kimijax generate`, which reads one behind a cache that is donated.
    """
    if job.chunk is not None:
        read = decoder(job.cfg, plan.ops(), jnp.dtype(job.dtype)).prefill
        ids = jax.ShapeDtypeStruct((job.batch, job.chunk), jnp.int32)
        live = jax.ShapeDtypeStruct((job.batch,), jnp.int32)
        return read.lower(jobs.weights(job, plan), jobs.cache(job, plan), ids, live)
    model = Model(job.cfg, plan.ops(), jnp.dtype(job.dtype))
    ids, runs = rows(job, plan)
    last = jobs.place_of_last(job, plan)

    def read(params, ids, pos, seg):
        hidden = model.apply(params, ids, pos, seg, runs=runs).hidden
        return hidden, model.apply(params, hidden[:, last], method="head")

    return plan.ops().jit(read).lower(jobs.weights(job, plan), ids, ids, ids)


def decode(job: Job, plan: Plan) -> jax.stages.Lowered:
    """Logits of one more token of each row, and the cache, which is donated, with it."""
    model = Model(job.cfg, plan.ops(), jnp.dtype(job.dtype))
    token = jax.ShapeDtypeStruct((job.batch, 1), jnp.int32)

    def step(params, cache, token):
        out = model.apply(params, token, cache=cache, fresh=jnp.ones(token.shape, bool))
        logits = model.apply(params, out.hidden[:, -1], method="head")
        return logits, plan.ops().deal(out.cache)

    return plan.ops().jit(step, donate_argnums=1).lower(
        jobs.weights(job, plan), jobs.cache(job, plan), token
    )


def train(job: Job, plan: Plan) -> jax.stages.Lowered:
    """A step of training with MuonClip; its state is donated."""
    model = Model(job.cfg, plan.ops(), jnp.dtype(job.dtype))
    shardings = plan.shardings(job.cfg)
    optimizer = muon(jobs.boxed(job.cfg), RATE, dtype=jnp.bfloat16, shardings=shardings)
    where = state_shardings(model, optimizer, plan)
    state = jobs.shapes(init_shapes(model, optimizer), where)
    ids, runs = rows(job, plan)
    weight = jax.ShapeDtypeStruct(ids.shape, jnp.float32, sharding=ids.sharding)
    # Logits of normed queries and keys do not follow the weights that QK-Clip shrinks.
    normed = any(getattr(layer.mixer, "qk_norm", None) for layer in job.cfg.layers)
    step = make_step(
        language_model(model, runs=runs), optimizer, balance_rate=1e-3,
        qk_clip=None if normed else qk_clip(job.cfg, tau=100.0), where=where,
    )
    return step.lower(state, Rows(ids, ids, ids, ids, weight))


def rows(job: Job, plan: Plan) -> tuple[jax.ShapeDtypeStruct, int]:
    """(int32 tokens b t at their places, the runs of a row)"""
    tokens, runs = jobs.row(job, plan)
    shape = job.batch, tokens
    where = NamedSharding(plan.mesh, PartitionSpec(*plan.axes.place(shape)))
    return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=where), runs
