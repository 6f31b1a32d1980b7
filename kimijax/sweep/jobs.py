"""Runs as processes of this machine, so many at a time; a crash of one leaves the others."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

LOG = "log.txt"


class Job(NamedTuple):
    """A run and the command that runs it."""

    name: str
    command: Sequence[str]
    directory: Path


class _Worker(NamedTuple):
    job: Job
    process: subprocess.Popen
    cores: frozenset[int]


class Stopped(Exception):
    """SIGINT or SIGTERM came, and the runs that were going have ended."""


def run_jobs(jobs: Sequence[Job], at_once: int) -> dict[str, int]:
    """Exit codes by name. Each process gets its share of the cores and a log in its directory.

    Stopped: SIGINT or SIGTERM was handed on to the running ones, which had time to save.
    """
    waiting, running, codes = list(jobs), [], {}
    free = _shares(at_once)
    with _signals() as asked, tqdm(total=len(jobs), unit="run") as bar:
        while running or (waiting and not asked):
            while waiting and free and not asked:
                running.append(_start(waiting.pop(0), free.pop()))
            bar.set_postfix_str(" ".join(worker.job.name for worker in running)[:60])
            if asked:
                for worker in running:
                    worker.process.send_signal(signal.SIGTERM)
                asked_workers, running = running, []
                for worker in asked_workers:
                    codes[worker.job.name] = worker.process.wait()
                break
            time.sleep(0.1)
            for worker in [w for w in running if w.process.poll() is not None]:
                running.remove(worker)
                free.append(worker.cores)
                codes[worker.job.name] = worker.process.returncode
                bar.update()
    if asked:
        raise Stopped
    return codes


def _start(job: Job, cores: frozenset[int]) -> _Worker:
    job.directory.mkdir(parents=True, exist_ok=True)
    mine = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    with (job.directory / LOG).open("ab") as log:
        if mine is not None:
            os.sched_setaffinity(0, cores)  # what is started inherits it
        try:
            # A session of its own: Ctrl-C reaches it through this process, and once.
            process = subprocess.Popen(
                job.command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        finally:
            if mine is not None:
                os.sched_setaffinity(0, mine)
    return _Worker(job, process, cores)


def _shares(n: int) -> list[frozenset[int]]:
    """The cores of this process in n parts; more parts than cores share them."""
    if not hasattr(os, "sched_getaffinity"):
        return [frozenset()] * n
    cores = sorted(os.sched_getaffinity(0))
    return [frozenset(cores[i::n]) or frozenset(cores) for i in range(n)]


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Signals to stop that came while entered: a list that fills."""
    came: list[int] = []
    handled = (signal.SIGINT, signal.SIGTERM)
    old = {s: signal.signal(s, lambda number, frame: came.append(number)) for s in handled}
    try:
        yield came
    finally:
        for s, handler in old.items():
            signal.signal(s, handler)


def last_line(path: Path) -> str:
    """What a log ends with, for a message."""
    lines = path.read_text(errors="replace").split("\n") if path.exists() else []
    found = next((line.strip() for line in reversed(lines) if line.strip()), "it wrote nothing")
    return found.rsplit("\r", 1)[-1][:200]


def python_module() -> list[str]:
    """The command that started this module, without its arguments."""
    spec = sys.modules["__main__"].__spec__
    return [sys.executable, "-m", spec.name]
