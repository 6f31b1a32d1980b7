"""What a training run is: its state, fresh or dealt over a mesh."""

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec
from jax.tree_util import DictKey, tree_flatten_with_path, tree_map_with_path

from kimijax.model import Model
from kimijax.ops.attend import local
from kimijax.parallel.plan import Plan


class TrainState(NamedTuple):
    """All that a run is: saved whole, restored whole."""

    step: jax.Array  # int32, steps done
    params: Any
    opt_state: Any
    norm: jax.Array  # running mean of the norms of gradients; 0: there is none yet
    skipped: jax.Array  # int32, steps whose update was left out


def init_state(
    model: Model, optimizer: optax.GradientTransformation, seed: int,
    where: TrainState | None = None,
) -> TrainState:
    """A fresh state; a function of the seed alone.

    where  of each array (`state_shardings`); None: on one device
    """
    build = jax.jit(functools.partial(_init, model, optimizer), out_shardings=where)
    return build(np.uint32(seed))


def _init(model: Model, optimizer: optax.GradientTransformation, seed: jax.Array) -> TrainState:
    model = model.clone(ops=local())  # weights depend on none; one token cannot be dealt out
    ids = jnp.zeros((1, 1), jnp.int32)
    params = nn.unbox(model.init(jax.random.key(seed), ids, method="logits"))
    return fresh(params, optimizer)


def fresh(params, optimizer: optax.GradientTransformation) -> TrainState:
    """The state in which a run from these parameters begins."""
    return TrainState(
        jnp.int32(0), params, optimizer.init(params), jnp.float32(0), jnp.int32(0)
    )


def init_shapes(model: Model, optimizer: optax.GradientTransformation) -> TrainState:
    """Shapes and dtypes of a fresh state; nothing is allocated."""
    return jax.eval_shape(functools.partial(_init, model, optimizer), np.uint32(0))


def state_shardings(
    model: Model, optimizer: optax.GradientTransformation, plan: Plan
) -> TrainState:
    """Where a plan puts each array of a state: what an optimizer keeps of a weight, with it."""
    params = plan.shardings(model.cfg)
    whole = NamedSharding(plan.mesh, PartitionSpec())
    shapes = init_shapes(model, optimizer)
    keys = lambda path: tuple(k.key for k in path if isinstance(k, DictKey))  # noqa: E731
    known = {
        (keys(path), leaf.shape): sharding
        for (path, leaf), sharding in zip(
            tree_flatten_with_path(shapes.params)[0], jax.tree.leaves(params), strict=True
        )
    }

    def one(path, leaf):
        names = keys(path)  # the optimizer's own, then the weight's
        tails = ((names[i:], leaf.shape) for i in range(len(names)))
        return next((known[tail] for tail in tails if tail in known), whole)

    opt_state = tree_map_with_path(one, shapes.opt_state)
    return TrainState(whole, params, opt_state, whole, whole)
