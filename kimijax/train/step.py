"""One step: gradients, update, what follows an update. Pure, jitted, its state donated."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from kimijax.parallel.compiler import options
from kimijax.train.state import TrainState

NORM_MEMORY = 0.98  # of the running mean of gradient norms, per step
ByLayer = dict[tuple[int, str], jax.Array]  # (group, layer of its repeats) -> stacked over repeats


class Found(NamedTuple):
    """What a batch gives."""

    grads: Any
    metrics: dict[str, jax.Array]
    load: ByLayer  # l e, the share of each expert
    max_logit: ByLayer  # l h


def make_step(
    loss: Callable,
    optimizer: optax.GradientTransformation,
    *,
    balance_rate: float = 0.0,
    qk_clip: Callable[[Any, ByLayer], Any] | None = None,
    parts: int = 1,
    spike: float | None = None,
    where: TrainState | None = None,
):
    """jit(state, batch, *constants) -> (state, metrics); the state is donated.

    loss     (params, batch, *constants) -> (mean loss, (metrics, the model's aux)). A metric
             "weight" says how much the mean counts beside those of other parts of a batch
    balance_rate  by which routers move their correction bias against the load; 0: not at all
    qk_clip  (params, max_logit) -> params after the update, as `kimijax.optim.qk_clip`
    parts    in which a batch is read, one after the other: rows i, i + parts, ... are one
    spike    a step whose gradients' norm is above so many times its running mean leaves the
             weights alone, as one that is not finite always does; metrics tell it ("skipped")
    where    of each array of the state (`state_shardings`); None: on one device
    """

    def step(state: TrainState, batch, *constants):
        found = gradients(loss, parts, state.params, batch, *constants)
        norm = optax.tree.norm(found.grads)
        bad = ~jnp.isfinite(norm)
        if spike is not None:
            bad |= (state.norm > 0) & (norm > spike * state.norm)
        # Chosen leaf by leaf, which happens in place; jax.lax.cond keeps a second state.
        new = jax.tree.map(lambda a, b: jnp.where(bad, a, b), state, applied(state, found, norm))
        new = new._replace(step=state.step + 1, skipped=state.skipped + bad)
        more = {"grad_norm": norm, "skipped": bad.astype(jnp.int32)}
        if found.max_logit:
            more["max_logit"] = jnp.stack([x.max() for x in found.max_logit.values()]).max()
        return new, found.metrics | more

    def applied(state: TrainState, found: Found, norm: jax.Array) -> TrainState:
        updates, opt_state = optimizer.update(found.grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        params = balance(params, found.load, balance_rate) if balance_rate else params
        params = qk_clip(params, found.max_logit) if qk_clip else params
        mean = jnp.where(state.norm > 0, state.norm, norm)
        mean = NORM_MEMORY * mean + (1 - NORM_MEMORY) * norm
        return TrainState(state.step, params, opt_state, mean, state.skipped)

    # Metrics are whole on every device, as the step count is.
    return jax.jit(
        step, donate_argnums=0, out_shardings=where and (where, where.step),
        compiler_options=where and options(where.step.mesh),
    )


def gradients(loss: Callable, parts: int, params, batch, *constants) -> Found:
    """Of the mean loss over a batch read in parts, each of which counts by its weight."""

    def of(rows) -> tuple[tuple, ByLayer, jax.Array]:
        grads, (metrics, aux) = jax.grad(loss, has_aux=True)(params, rows, *constants)
        weight = jnp.asarray(metrics.get("weight", 1.0), jnp.float32)
        return (grads, metrics, _by_layer(aux, "ffn", "load")), _by_layer(
            aux, "mixer", "max_logit"
        ), weight

    if parts == 1:
        (grads, metrics, load), max_logit, _ = of(batch)
        return Found(grads, metrics, load, max_logit)

    def add(total, rows):
        (sums, most, weights), (means, logits, weight) = total, of(rows)
        sums = jax.tree.map(lambda s, x: s + weight * x, sums, means)
        return (sums, jax.tree.map(jnp.maximum, most, logits), weights + weight), None

    # Strided, so that a device keeps the rows that it holds.
    split = lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1)  # noqa: E731
    batch = jax.tree.map(split, batch)
    means, logits, weight = jax.eval_shape(of, jax.tree.map(lambda x: x[0], batch))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), (means, weight))
    lowest = jax.tree.map(lambda x: jnp.full(x.shape, -jnp.inf), logits)
    (sums, most, weight), _ = jax.lax.scan(add, (zeros[0], lowest, zeros[1]), batch)
    grads, metrics, load = jax.tree.map(lambda x: x / weight, sums)
    metrics |= {"weight": weight} if "weight" in metrics else {}
    return Found(grads, metrics, load, most)


def _by_layer(aux: tuple, part: str, name: str) -> ByLayer:
    """What the mixers or ffns of a model report under a name, where they do."""
    return {
        (i, layer): report[part][name]
        for i, group in enumerate(aux) for layer, report in group.items() if name in report[part]
    }


def balance(params, load: ByLayer, rate: float):
    """Correction biases moved against the load.

    b += rate (sign(e) - mean sign(e)), e = mean load - load.

    Auxiliary-loss-free balancing as Moonlight trains it (arXiv:2502.16982).
    """
    new = dict(params["params"])
    for (i, layer), share in load.items():
        sign = jnp.sign(share.mean(-1, keepdims=True) - share)
        at = (f"group_{i}", layer, "ffn", "bias")
        new = _updated(new, at, rate * (sign - sign.mean(-1, keepdims=True)))
    return {**params, "params": new}


def _updated(tree: dict, path: tuple[str, ...], change: jax.Array) -> dict:
    head, *rest = path
    value = _updated(tree[head], tuple(rest), change) if rest else tree[head] + change
    return {**tree, head: value}
