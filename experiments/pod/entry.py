"""What every host of a job starts: a module of ours, begun again when another process is lost.

  python -m experiments.pod.entry -- experiments.pretrain --model ... --mesh ... --out gs://B/run
  KIMIJAX_COORDINATOR=a:8482 KIMIJAX_PROCESSES=2 KIMIJAX_PROCESS=0 \\
      python -m experiments.pod.entry -- experiments.pretrain ...        # and 1, on another machine

The module runs as a child with --coordinator, --processes and --process as the environment has
them (environment.py: TPU VMs, GKE, slurm, or by hand). It is started again, after a pause that
doubles up to a minute, when it was killed, when another process of the job was lost or did not come
(exit code 75), and when it stopped because another host was asked to (130); it goes on from its
last save. An error of its own ends the entry with its code, as does success. SIGTERM and SIGINT,
which come before a host is taken away, are handed on: the child saves, and is not started again.
"""

import argparse
import difflib
import importlib.util
import os
import pkgutil
import signal
import subprocess
import sys
import time

import experiments
from experiments.pod.environment import Place, of_tpu_vm, place_of
from kimijax.cli import run_module
from kimijax.errors import Lost, UserError

RESTARTS = 50
PAUSE, LONGEST = 5.0, 60.0  # seconds; all hosts come back well within the patience of a roll call
STEADY = 600.0  # seconds of work after which failures are counted from 0 again
INTERRUPTED = 130


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options, and after -- the module with its own."""
    add = parser.add_argument
    add("--restarts", type=int, default=RESTARTS, metavar="N",
        help="in a row, none of them working for ten minutes (default: %(default)s)")
    add("--pause", type=float, default=PAUSE, metavar="SECONDS",
        help="before the first restart (default: %(default)s)")
    add("--tpu_vm", action="store_true", help="ask the metadata server of a Cloud TPU VM")
    add("command", nargs="+", metavar="-- MODULE ARGUMENT", help="as of python -m")


def main(args: argparse.Namespace) -> int:
    """Run the module until it ends by itself; its exit code."""
    if args.restarts < 0 or not 0 <= args.pause <= LONGEST:
        raise UserError(f"--restarts {args.restarts} --pause {args.pause}: give 0 or more, and a "
                        f"pause of up to {LONGEST:g} seconds")
    command = command_of(args.command, of_tpu_vm() if args.tpu_vm else place_of(os.environ))
    with Signals() as signals:
        failures = 0
        while True:
            began = time.monotonic()
            code = signals.run(command)
            if signals.asked or not may_go_on(code):
                return code if code >= 0 else 128 - code
            failures = 1 if time.monotonic() - began > STEADY else failures + 1
            if failures > args.restarts:
                raise UserError(f"{command[2]} ended with {said(code)} and was started "
                                f"{args.restarts} times again; see what it says above")
            pause = min(LONGEST, args.pause * 2 ** min(failures - 1, 10))
            print(f"entry: {command[2]} ended with {said(code)}; again in {pause:g} s "
                  f"({failures} of {args.restarts})", file=sys.stderr, flush=True)
            signals.sleep(pause)
            if signals.asked:
                return code if code >= 0 else 128 - code


def command_of(module: list[str], place: Place) -> list[str]:
    """The child's command line. UserError: there is no such module, or it names its own place."""
    name, *rest = module
    check_module(name)
    options = place.options()
    if twice := {*options[::2]} & {text.partition("=")[0] for text in rest}:
        raise UserError(f"{min(twice)}: the environment says it already ({place.process} of "
                        f"{place.processes} at {place.coordinator}); leave it out")
    return [sys.executable, "-m", name, *rest, *options]


def check_module(name: str) -> None:
    """UserError, with near ones: there is no such module."""
    try:
        if importlib.util.find_spec(name) is not None:
            return
    except (ImportError, ValueError):
        pass  # a parent of it is missing, or it is no name
    known = [f"experiments.{found.name}" for found in pkgutil.iter_modules(experiments.__path__)]
    near = difflib.get_close_matches(name, known, 3, 0.0)
    raise UserError(f"{name!r:.80} is no module; near ones are {', '.join(near)}")


def may_go_on(code: int) -> bool:
    """Whether what ended so may do better when it is started again."""
    return code < 0 or code in (Lost.code, INTERRUPTED)


def said(code: int) -> str:
    """An exit code, in words."""
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


class Signals:
    """While entered, SIGINT and SIGTERM go to the child, each as often as it comes."""

    def __init__(self):
        self.asked, self._child = False, None

    def __enter__(self) -> "Signals":
        self._old = {s: signal.signal(s, self._heard) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_) -> None:
        for s, handler in self._old.items():
            signal.signal(s, handler)

    def _heard(self, number: int, _) -> None:
        self.asked = True
        if self._child is not None:
            self._child.send_signal(number)

    def run(self, command: list[str]) -> int:
        """Run it to its end; minus the number of the signal that killed it."""
        # In a session of its own, so that Ctrl-C in a terminal reaches it through this one, once.
        self._child = subprocess.Popen(command, start_new_session=True)
        if self.asked:  # before there was a child
            self._child.terminate()
        code = self._child.wait()
        self._child = None
        return code

    def sleep(self, seconds: float) -> None:
        """Until a signal comes."""
        end = time.monotonic() + seconds
        while not self.asked and (left := end - time.monotonic()) > 0:
            time.sleep(min(left, 0.2))


if __name__ == "__main__":
    run_module(add_arguments, main, __doc__)
