"""One step: gradients, update, balance of experts. Pure, jitted, its state donated."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from kimijax.train.state import TrainState


def make_step(
    loss: Callable, optimizer: optax.GradientTransformation, balance_rate: float,
    where: TrainState | None = None,
):
    """jit(state, batch) -> (state, metrics). `loss(params, batch)` gives (scalar, (metrics, aux)).

    aux is the model's report; routers move their correction bias by the load it holds.
    where  of each array of the state (`state_shardings`); None: on one device
    """

    def step(state: TrainState, batch):
        gradient = jax.grad(loss, has_aux=True)
        grads, (metrics, aux) = gradient(state.params, batch)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = balance(optax.apply_updates(state.params, updates), aux, balance_rate)
        metrics |= {"grad_norm": optax.tree.norm(grads)}
        return TrainState(state.step + 1, params, opt_state), metrics

    # Metrics are whole on every device, as the step count is.
    return jax.jit(step, donate_argnums=0, out_shardings=where and (where, where.step))


def balance(params, aux: tuple, rate: float):
    """Correction biases moved against the load.

    b += rate (sign(e) - mean sign(e)), e = mean load - load.

    Auxiliary-loss-free balancing as Moonlight trains it (arXiv:2502.16982).
    """
    new = dict(params["params"])
    for i, group in enumerate(aux):
        for name, report in group.items():
            if "load" not in report["ffn"]:
                continue
            load = report["ffn"]["load"]
            sign = jnp.sign(load.mean(-1, keepdims=True) - load)
            at = (f"group_{i}", name, "ffn", "bias")
            new = _updated(new, at, rate * (sign - sign.mean(-1, keepdims=True)))
    return {**params, "params": new}


def _updated(tree: dict, path: tuple[str, ...], change: jax.Array) -> dict:
    head, *rest = path
    value = _updated(tree[head], tuple(rest), change) if rest else tree[head] + change
    return {**tree, head: value}
