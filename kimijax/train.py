"""One visible training loop around a pure, donated step."""

import functools
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec
from jax.tree_util import DictKey, tree_flatten_with_path, tree_map_with_path
from tqdm import tqdm

from kimijax.checkpoint import restore_latest, save_state
from kimijax.errors import UserError
from kimijax.model import Model
from kimijax.ops.attend import local
from kimijax.parallel.plan import Plan
from kimijax.parallel.processes import anywhere, is_first, meet

SAVE_SECONDS = 60.0


class TrainState(NamedTuple):
    """All that a run is: saved whole, restored whole."""

    step: jax.Array  # int32, steps done
    params: Any
    opt_state: Any


class Interrupted(Exception):
    """SIGINT or SIGTERM came; the state is saved and the same command goes on from it."""


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
    return TrainState(jnp.int32(0), params, optimizer.init(params))


def state_shardings(
    model: Model, optimizer: optax.GradientTransformation, plan: Plan
) -> TrainState:
    """Where a plan puts each array of a state: what an optimizer keeps of a weight, with it."""
    params = plan.shardings(model.cfg)
    whole = NamedSharding(plan.mesh, PartitionSpec())
    shapes = jax.eval_shape(functools.partial(_init, model, optimizer), np.uint32(0))
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

    return TrainState(whole, params, tree_map_with_path(one, shapes.opt_state))


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


def fit(
    state: TrainState,
    step: Callable,
    batch_of: Callable[[int], Any],
    steps: int,
    out: Path,
    tokens_of: Callable[[int], int],
    run: dict,
) -> TrainState:
    """Train to `steps`, resuming from `out` if it holds a state of this run.

    Every step adds a line to metrics.jsonl. The state is saved each minute, at the end and on
    SIGINT or SIGTERM, which then raise Interrupted. `run` is what the run is made of (JSON
    values); UserError if `out` holds another one. Of several processes the first writes, and
    all read a state to resume from: they have to see the same `out`.
    """
    _claim(out, run)
    if (found := restore_latest(out / "state", state)) is not None:
        state = found[1]
    first = int(state.step)
    log = _log_until(out / "metrics.jsonl", first) if is_first() else open(os.devnull, "w")
    stop, saved = _Stop(), time.monotonic()
    done = sum(tokens_of(i) for i in range(first))
    total = done + sum(tokens_of(i) for i in range(first, steps))
    with log, stop, tqdm(total=total, initial=done, unit="tok", unit_scale=True) as bar:
        for i in range(first, steps):
            began = time.perf_counter()
            state, metrics = step(state, batch_of(i))
            metrics = {k: np.asarray(v).tolist() for k, v in jax.device_get(metrics).items()}
            _write_line(log, {"step": i + 1, "seconds": time.perf_counter() - began} | metrics)
            bar.update(tokens_of(i))
            bar.set_postfix({k: f"{v:.3f}" for k, v in metrics.items() if np.ndim(v) == 0})
            asked, due = anywhere([stop.asked, time.monotonic() - saved > SAVE_SECONDS])
            if asked or due:
                save_state(out / "state", i + 1, state)
                saved = time.monotonic()
            if asked:
                raise Interrupted(f"stopped after step {i + 1} of {steps}, state saved in {out}")
    save_state(out / "state", steps, state)
    return state


def _claim(out: Path, run: dict) -> None:
    """Note in `out` which run lives there; a state of another one must not be resumed."""
    path = out / "run.json"
    if is_first() and not path.exists():
        out.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(run, indent=1))
        temporary.replace(path)
    meet()  # the others look when it is there
    if not path.exists():
        raise UserError(f"{path} is not there for all processes; give an --out that they share")
    if _json(path) != json.loads(json.dumps(run)):
        raise UserError(f"{out} holds another run (see {path}); give this one its own --out")


def _json(path: Path):
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from error


class _Stop:
    """While entered, SIGINT and SIGTERM only ask for a stop at the end of the step."""

    def __init__(self):
        self.asked = False

    def __enter__(self):
        ask = lambda *_: setattr(self, "asked", True)  # noqa: E731
        self._old = {s: signal.signal(s, ask) for s in (signal.SIGINT, signal.SIGTERM)}

    def __exit__(self, *_):
        for s, handler in self._old.items():
            signal.signal(s, handler)


def _log_until(path: Path, step: int):
    """The log opened for appending, without the lines of steps after `step`."""
    lines = []
    if path.exists():
        for line in path.read_text().splitlines():
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:
                break  # a line cut short by a crash; its step is done again
            if not isinstance(entry, dict) or not isinstance(entry.get("step"), int):
                raise UserError(f"{path} is no log of a run: it has the line {line[:80]!r}")
            if entry["step"] > step:
                break
            lines.append(line)
    path.write_text("".join(line + "\n" for line in lines))
    return path.open("a")


def _write_line(log, entry: dict) -> None:
    log.write(json.dumps(entry) + "\n")
    log.flush()
