"""One visible training loop around a pure, donated step."""

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from kimijax.checkpoint import restore_latest, save_state
from kimijax.errors import UserError
from kimijax.parallel.processes import anywhere, is_first, meet
from kimijax.train.state import TrainState

SAVE_SECONDS = 60.0


class Interrupted(Exception):
    """SIGINT or SIGTERM came; the state is saved and the same command goes on from it."""


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
