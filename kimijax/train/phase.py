"""The phases of a run: a curriculum of context lengths, each with its own step and batches."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

from kimijax.errors import UserError


class Batches(Protocol):
    """An iterator that can be put back where it was; those of grain are."""

    def __next__(self) -> Any: ...

    def get_state(self) -> dict:
        """Where it is, as JSON values."""

    def set_state(self, state: dict) -> None:
        """Go on from there."""


class Phase(NamedTuple):
    """A stretch of training of one kind."""

    name: str
    steps: int
    step: Callable  # jitted: (state, batch) -> (state, dict of metrics); may donate the state
    batches: Callable[[], Batches]  # from the phase's first on
    tokens: int  # of a batch, in all processes
    flops: float = 0.0  # of a step, on all devices; 0: not known
    evaluate: Callable[[Any], dict] | None = None  # state -> metrics, after every `every` steps
    every: int = 0  # 0: after the phase alone


class At(NamedTuple):
    """A step to be done."""

    step: int  # of the run, from 1
    index: int  # of the phase
    phase: Phase
    batches: Batches
    evaluate: bool  # after it

    def batch(self) -> Any:
        """The step's batch. UserError: there is none."""
        try:
            return next(self.batches)
        except StopIteration:
            raise UserError(
                f"phase {self.phase.name}: there is no batch for step {self.step}; give a data "
                f"set that repeats, or fewer than {self.phase.steps} steps"
            ) from None

    def place(self) -> dict:
        """Where the data is after `batch`, to be saved with the state after the step."""
        return {"phase": self.index, "batches": self.batches.get_state()}


class Numbered:
    """Batches made from their number alone."""

    def __init__(self, batch_of: Callable[[int], Any]):
        self._batch_of, self._next = batch_of, 0

    def __next__(self) -> Any:
        self._next += 1
        return self._batch_of(self._next - 1)

    def get_state(self) -> dict:
        """The number of the next batch."""
        return {"next": self._next}

    def set_state(self, state: dict) -> None:
        """Go on with that number."""
        self._next = state["next"]


def remaining(phases: tuple[Phase, ...], done: int, place: dict | None) -> Iterator[At]:
    """The steps after `done` of all phases; the iterator of a phase is made when it begins.

    place  what `At.place` said after step `done`, None before the first. UserError: it does not
           belong there.
    """
    start = 0
    for index, phase in enumerate(phases):
        first, start = start, start + phase.steps
        if done >= start:
            continue
        batches = phase.batches()
        if done > first:
            if not isinstance(place, dict) or place.get("phase") != index:
                raise UserError(
                    f"step {done} lies in phase {phase.name}, but the checkpoint was saved with "
                    f"{place!r:.80}; give the run the phases that it had, or its own --out"
                )
            batches.set_state(place["batches"])
        for i in range(max(done - first, 0), phase.steps):
            last, due = i + 1 == phase.steps, phase.every and (i + 1) % phase.every == 0
            evaluate = phase.evaluate is not None and bool(last or due)
            yield At(first + i + 1, index, phase, batches, evaluate)
