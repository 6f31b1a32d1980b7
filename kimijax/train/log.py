"""What is seen of a run: metrics.jsonl, TensorBoard, the progress bar."""

import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import jax
import numpy as np
from tqdm import tqdm

from kimijax.checkpoint.common import brief
from kimijax.checkpoint.places import in_bucket, upload
from kimijax.errors import UserError
from kimijax.parallel.processes import is_first
from kimijax.train.phase import Phase


class Log:
    """A line per step in out/metrics.jsonl, a step late: it is fetched while the next one runs.

    Nothing is appended to in a bucket: all is in files here, which `sync` copies there.

    "seconds" are from one step's end to the next one's, as the loop notices them: where batches
    take longer than steps, a batch counts with the step before.

    done    steps; lines of later ones are cut
    total   tokens of the run, and `seen` of them before this start
    peak    FLOP/s of all devices, for "mfu"; None: not known
    tensorboard  scalars go to out/tensorboard too
    """

    def __init__(
        self, out: Path, done: int, total: int, seen: int, peak: float | None, tensorboard: bool
    ):
        self.path = out / "metrics.jsonl"
        self._out, first = out, is_first()
        self._folder = tempfile.TemporaryDirectory() if first and in_bucket(out) else None
        local = Path(self._folder.name) if self._folder else out
        self._board = _board(local, done) if tensorboard and first else None
        log = local / self.path.name
        self._file = _open_until(self.path, log, done) if first else open(os.devnull, "w")
        self._bar = tqdm(total=total, initial=seen, unit="tok", unit_scale=True)
        self._peak, self._held, self._since = peak, None, time.perf_counter()

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, kind, *_) -> None:
        if kind is None or issubclass(kind, UserError):  # not where the step itself may have failed
            self.write()
        self._bar.close()
        self._file.close()
        if self._board is not None:
            self._board.close()
        if self._folder is not None:
            self._upload()
            self._folder.cleanup()

    def step(self, step: int, phase: Phase, metrics: dict[str, jax.Array]) -> None:
        """Hold what a step will say, and write what the one before it said."""
        self.write()
        self._held = step, phase, metrics

    def write(self, evaluate: Callable[[], dict] | None = None) -> None:
        """Wait for the step that is held and write its line.

        evaluate  gives more values, named eval_...; its time is not the step's
        """
        if self._held is None:
            return
        (step, phase, metrics), self._held = self._held, None
        values = {k: _plain(v) for k, v in jax.device_get(metrics).items()}
        seconds = time.perf_counter() - self._since
        if evaluate is not None:
            values |= {f"eval_{k}": _plain(v) for k, v in evaluate().items()}
        self._since = time.perf_counter() if evaluate else self._since + seconds
        values |= {
            "seconds": seconds,
            "tokens_per_second": phase.tokens / seconds,
            "mfu": phase.flops / seconds / self._peak if self._peak and phase.flops else None,
        }
        self._put(json.dumps({"step": step, "phase": phase.name} | values, allow_nan=False) + "\n")
        self._show(step, phase, values)

    def _show(self, step: int, phase: Phase, values: dict) -> None:
        kinds = (bool, int, float, str)
        scalars = {k: float(v) for k, v in values.items() if isinstance(v, kinds)}
        self._bar.update(phase.tokens)
        self._bar.set_postfix({k: f"{v:.3g}" for k, v in scalars.items() if k != "seconds"})
        if self._board is not None:
            for name, value in scalars.items():
                self._board.add_scalar(name, value, step)

    def sync(self) -> None:
        """All lines written so far reach the disk: a checkpoint follows that counts on them."""
        if is_first():
            with _writing(self.path):
                os.fsync(self._file.fileno())
        if self._board is not None:
            self._board.flush()
        self._upload()

    def _upload(self) -> None:
        if self._folder is not None:
            with _writing(self.path):
                upload(Path(self._folder.name), self._out)

    def _put(self, text: str) -> None:
        with _writing(self.path):
            self._file.write(text)
            self._file.flush()


def read_log(path: Path) -> list[dict]:
    """The lines of a metrics.jsonl, numbers that are not finite as floats again."""
    return [
        {k: v if k == "phase" else _number(v) for k, v in json.loads(line).items()}
        for line in path.read_text().splitlines()
    ]


def _plain(value: Any) -> Any:
    """JSON values of an array or number. NaN and infinities, which JSON lacks, become strings."""
    array = np.asarray(value)
    native = array.dtype.kind in "biuf"
    return _named((array if native else array.astype(np.float64)).tolist())


def _named(value: Any) -> Any:
    if isinstance(value, list):
        return [_named(x) for x in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _number(value: Any) -> Any:
    if isinstance(value, list):
        return [_number(x) for x in value]
    return float(value) if isinstance(value, str) else value


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {brief(error)}; make room") from error


def _open_until(path: Path, local: Path, step: int) -> TextIO:
    """The log opened for appending as `local`, without the lines of steps after `step`."""
    found, kept = path.read_text().splitlines() if path.exists() else [], []
    for line in found:
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            entry = None
            if line is found[-1]:
                break  # cut short by a crash; its step is done again
        if not isinstance(entry, dict) or not isinstance(entry.get("step"), int):
            raise UserError(f"{path} is no log of a run: it has the line {line[:80]!r}; remove it")
        if entry["step"] > step:
            break
        kept.append(line)
    temporary = local.with_suffix(".tmp")
    with _writing(path):
        temporary.write_text("".join(line + "\n" for line in kept))
        temporary.replace(local)
        return local.open("a")


def _board(out: Path, done: int):
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise UserError("TensorBoard needs tensorboardX: pip install 'kimijax[train]'") from error
    # What is done again is hidden. Files are named by the second: two starts within one need more.
    return SummaryWriter(
        str(out / "tensorboard"), purge_step=done + 1, filename_suffix=f".{done + 1}"
    )
