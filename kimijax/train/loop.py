"""One visible training loop around pure, donated steps."""

import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from kimijax.checkpoint import Restored, Saver, restore_latest
from kimijax.checkpoint.places import in_bucket, locate
from kimijax.errors import UserError
from kimijax.parallel.processes import is_first, meet, vote
from kimijax.train.guard import Interrupted, Stop, Trace
from kimijax.train.log import Log
from kimijax.train.phase import Phase, remaining

SAVE_SECONDS = 60.0


@dataclass(frozen=True, kw_only=True)
class Saves:
    """When a run is saved, beside its end, and which checkpoints stay."""

    seconds: float = SAVE_SECONDS  # since the last one
    every: int = 0  # steps; 0: by time alone
    keep: int = 2  # of the newest
    keep_every: int = 0  # steps at whose multiples it is saved too, and kept for ever; 0: none
    verify: bool = True  # every byte before resuming; False: names and sizes

    def __post_init__(self):
        for name in ("every", "keep_every"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} = {getattr(self, name)} steps: give 0 or more")
        if self.keep < 1:
            raise UserError(f"keep = {self.keep} checkpoints: give 1 or more")

    def due(self, step: int, since: float) -> bool:
        """Whether to save after a step, `since` being when it was saved last (monotonic)."""
        at = (n and step % n == 0 for n in (self.every, self.keep_every))
        return any(at) or time.monotonic() - since > self.seconds


def fit(
    state: Any, phases: Sequence[Phase], out: str | os.PathLike, run: dict, *,
    saves: Saves = Saves(), peak: float | None = None, tensorboard: bool = False,
    profile: range = range(0),
) -> Any:
    """Train through all phases, resuming from `out` if it holds a state of this run.

    Every step adds a line to out/metrics.jsonl. The state and the place in the data are saved in
    the background as `saves` says, at the end, and on SIGINT or SIGTERM, which then raise
    Interrupted. Of several processes the first writes the log; all have to see the same `out`, a
    directory or gs://BUCKET/..., where the log arrives with each save.

    state        a pytree; its `step` counts over all phases
    run          what the run is made of (JSON values); UserError if `out` holds another one
    peak         FLOP/s of all devices, for the "mfu" of each line
    tensorboard  scalars go to out/tensorboard as well (extra [train])
    profile      steps traced into out/profile, the first is 1
    """
    out = locate(out)
    _claim(out, run)
    fresh = Restored(int(state.step), state, None)
    done, state, place = restore_latest(out / "state", state, saves.verify) or fresh
    total, step = sum(phase.steps for phase in phases), done
    if done > total:
        raise UserError(f"{out} has done {done} steps, the phases have {total}; give it more")
    with (
        Stop() as stop,
        Saver(out / "state", saves.keep, saves.keep_every) as saver,
        Log(out, done, *_tokens(phases, done), peak, tensorboard) as log,
        Trace(out / "profile", profile) as trace,
    ):
        saved = time.monotonic()
        for at in remaining(tuple(phases), done, place):
            step, batch = at.step, at.batch()
            trace.before(step, state)
            asked = vote(lambda: [stop.asked, saves.due(step, saved)])  # noqa: B023
            state, metrics = at.phase.step(state, batch)
            log.step(step, at.phase, metrics)  # waits for the step before; this one runs
            stopping, due = asked()
            if at.evaluate:
                log.write(partial(at.phase.evaluate, state))
            if stopping or due or step == total:
                log.write()
                log.sync()
                saver.save(step, state, at.place())
                saved = time.monotonic()
            saver.check()
            if stopping and step < total:
                saver.wait()
                raise Interrupted(f"stopped after step {step} of {total}, state saved in {out}")
    return state


def _tokens(phases: Sequence[Phase], done: int) -> tuple[int, int]:
    """Of the whole run, and of the steps done."""
    seen = start = 0
    for phase in phases:
        seen += min(max(done - start, 0), phase.steps) * phase.tokens
        start += phase.steps
    return sum(phase.steps * phase.tokens for phase in phases), seen


def _claim(out: Path, run: dict) -> None:
    """Note in `out` which run lives there; a state of another one must not be resumed."""
    path = out / "run.json"
    if is_first() and not path.exists():
        if in_bucket(out):
            path.write_text(json.dumps(run, indent=1))
        else:
            out.mkdir(parents=True, exist_ok=True)
            temporary = path.with_suffix(".tmp")
            temporary.write_text(json.dumps(run, indent=1))
            temporary.replace(path)
    meet()  # the others look when it is there
    if not path.exists():
        raise UserError(f"{path} is not there for all processes; give an --out that they share")
    if _json(path) != json.loads(json.dumps(run)):
        raise UserError(f"{out} holds another run (see {path}); give this one its own --out")


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from error
