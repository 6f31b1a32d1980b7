"""What may come between: a signal to stop, a stretch of steps to be traced."""

import os
import signal
from contextlib import ExitStack
from pathlib import Path

import jax

from kimijax.checkpoint.places import local


class Interrupted(Exception):
    """SIGINT or SIGTERM came; the state is saved and the same command goes on from it."""


class Stop:
    """While entered, SIGINT and SIGTERM only ask for a stop after a step; the second stops at once.

    That is as safe as a kill: files are finished under another name.
    """

    def __init__(self):
        self.asked = False

    def __enter__(self) -> "Stop":
        self._old = {s: signal.signal(s, self._heard) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_) -> None:
        for s, handler in self._old.items():
            signal.signal(s, handler)

    def _heard(self, *_) -> None:
        if self.asked:
            os.write(2, b"\nstopped without saving; the same command goes on from the last save\n")
            os._exit(130)
        self.asked = True


class Trace:
    """While entered, traces a range of steps with jax.profiler, for TensorBoard or Perfetto."""

    def __init__(self, folder: Path, steps: range):
        self._folder, self._steps, self._on = folder, steps, False
        self._kept = ExitStack()

    def __enter__(self) -> "Trace":
        return self

    def __exit__(self, *_) -> None:
        if self._on:
            self._stop()

    def _stop(self) -> None:
        jax.profiler.stop_trace()
        self._kept.close()  # it is brought to where it belongs

    def before(self, step: int, state: object) -> None:
        """Begin or end the trace, where `step` is the first or has passed the last."""
        if (step in self._steps) != self._on:
            jax.block_until_ready(state)
            if self._on:
                self._stop()
            else:
                jax.profiler.start_trace(self._kept.enter_context(local(self._folder)))
            self._on = not self._on
