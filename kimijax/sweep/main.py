"""The command line of an experiment that is a sweep."""

import argparse
import fcntl
import json
import shlex
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from kimijax.cli import run_module
from kimijax.commands.paths import path, writable
from kimijax.errors import UserError
from kimijax.sweep.jobs import LOG, Job, Stopped, last_line, python_module, run_jobs
from kimijax.sweep.plot import Plot, draw
from kimijax.sweep.settings import Done, Settings, by_name
from kimijax.sweep.table import write, write_tables

RESULT = "result.json"
LAUNCHERS = {
    "local": "{command}",
    "slurm": "sbatch --job-name={name} --output={log} --wrap={quoted}",
    "xpk": 'xpk workload create --cluster="$CLUSTER" --tpu-type="$TPU_TYPE" --workload={name} '
           "--command={quoted}",
}


@dataclass(frozen=True)
class Sweep:
    """An experiment.

    runs  settings of all runs, given those that have ended well: what is tuned first and repeated
          with more seeds afterwards can look at the results so far
    run   (settings, directory) -> result, JSON values; numbers are averaged over `seed`
    """

    runs: Callable[[Sequence[Done]], Iterable[Settings]]
    run: Callable[[Settings, Path], dict]
    plots: tuple[Plot, ...] = ()


def main(sweep: Sweep, description: str | None) -> None:
    """The command of an experiment's file. Does not return: it exits."""
    run_module(add_arguments, lambda args: _main(sweep, args), description)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What all sweeps have."""
    add = parser.add_argument
    add("--out", type=path, required=True, metavar="DIR", help="a directory per run, and the table")
    add("--only", metavar="RUN", help="this run, in this process")
    add("--jobs", type=int, default=1, metavar="N", help="processes at a time (default: 1)")
    add("--dry_run", nargs="?", const="local", choices=sorted(LAUNCHERS),
        help="print a line for every run that is missing: for this machine, slurm or xpk")


def _main(sweep: Sweep, args: argparse.Namespace) -> int:
    if args.jobs < 1:
        raise UserError(f"--jobs must be 1 or more, got {args.jobs}")
    out = writable(args.out)
    if args.only is not None:
        return _one(sweep, out, args.only)
    if args.dry_run:
        wanted, done = _state(sweep, out)
        for job in _jobs(out, [name for name in wanted if name not in done]):
            print(_line(args.dry_run, job))
        return 0
    return _all(sweep, out, args.jobs)


def _all(sweep: Sweep, out: Path, at_once: int) -> int:
    """Run what is missing until nothing new is asked for, then write the table."""
    codes: dict[str, int] = {}
    while True:
        wanted, done = _state(sweep, out)
        missing = [name for name in wanted if name not in done and name not in codes]
        if not missing:
            break
        try:
            codes |= run_jobs(_jobs(out, missing), at_once)
        except Stopped:
            print(f"stopped; the same command goes on, results so far in {out}")
            return 130
    found = [done[name] for name in wanted if name in done]
    if found:
        print(write_tables(found, out))
        for plot in sweep.plots:
            draw(plot, found, out / f"{plot.y}_by_{plot.x}.png")
    failed = [name for name in wanted if name not in done]
    for name in failed:
        log = out / name / LOG
        print(f"failed: {name} (exit {codes[name]}): {last_line(log)}; see {log}")
    print(f"{len(found)} of {len(wanted)} runs; results in {out}")
    return 1 if failed else 0


def _one(sweep: Sweep, out: Path, only: str) -> int:
    wanted, done = _state(sweep, out)
    if only not in wanted:
        raise UserError(f"--only {only!r:.200}: there is no such run; there are "
                        f"{', '.join(wanted)[:2000]}")
    if only in done:
        print(f"{only}: done before, {json.dumps(done[only].result)[:500]}")
        return 0
    directory = out / only
    directory.mkdir(parents=True, exist_ok=True)
    with _alone(directory):
        began = time.monotonic()
        result = sweep.run(wanted[only], directory)
        entry = {"settings": wanted[only], "result": result, "seconds": time.monotonic() - began}
        write(directory / RESULT, json.dumps(entry, indent=1) + "\n")
    print(f"{only}: {json.dumps(result)[:500]}")
    return 0


def _state(sweep: Sweep, out: Path) -> tuple[dict[str, Settings], dict[str, Done]]:
    """All runs that are asked for so far, and those of them that are done, by name."""
    done: dict[str, Done] = {}
    while True:
        wanted = by_name(sweep.runs(list(done.values())))
        found = {name: _read(out / name / RESULT, settings) for name, settings in wanted.items()}
        found = {name: run for name, run in found.items() if run is not None}
        if found.keys() == done.keys():
            return wanted, found
        done = found


def _read(file: Path, settings: Settings) -> Done | None:
    if not file.exists():
        return None
    try:
        entry = json.loads(file.read_text(encoding="utf-8"))
        found = Done(entry["settings"], dict(entry["result"]))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{file}: is no result of a run: {error}; delete it to run it again"
                        ) from error
    if found.settings != json.loads(json.dumps(settings)):
        raise UserError(f"{file}: is of a run with other settings; give this sweep its own --out")
    return Done(settings, found.result)


def _jobs(out: Path, names: Iterable[str]) -> list[Job]:
    command = [*python_module(), "--out", str(out), "--only"]
    return [Job(name, [*command, name], out / name) for name in names]


def _line(launcher: str, job: Job) -> str:
    command = shlex.join(["python", *job.command[1:]])
    # Names of jobs are no file names: both launchers want letters, digits and dashes.
    name = "".join(c if c.isalnum() else "-" for c in job.name).lower()[:60].strip("-")
    return LAUNCHERS[launcher].format(
        command=command, quoted=shlex.quote(command), name=name,
        log=shlex.quote(str(job.directory / LOG)),
    )


@contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """UserError: another process runs this run."""
    with (directory / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f"{directory}: another process is at this run; wait for it") from error
        yield
