"""The options that make a command one process of several, on as many machines as there are."""

import argparse
import os
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout


def add_processes(parser: argparse.ArgumentParser) -> None:
    """--coordinator, --processes and --process, of a command that runs a model."""
    add = parser.add_argument
    add("--coordinator", metavar="HOST:PORT", help="of process 0, where the processes of one job "
        "meet: the same command is started N times, with --mesh over the devices of all")
    add("--processes", type=int, metavar="N", help="how many there are")
    add("--process", type=int, metavar="I", help="which one this is, from 0; it alone writes files")


@contextmanager
def job_of(args: argparse.Namespace) -> Iterator[None]:
    """Come together with the other processes, if the options speak of any; before jax begins.

    Every process computes; process 0 alone prints and shows progress. UserError: an option is
    missing, or a process did not come.
    """
    from kimijax.errors import UserError

    names = ("coordinator", "processes", "process", "mesh")
    missing = [f"--{name}" for name in names if getattr(args, name) is None]
    if not {"--coordinator", "--processes", "--process"} - {*missing}:
        yield
        return
    if missing:
        raise UserError(
            f"{' and '.join(missing)} missing: a process of several needs --coordinator, "
            "--processes, --process and --mesh"
        )
    from kimijax.parallel.processes import join

    with join(args.coordinator, args.processes, args.process):
        first = args.process == 0
        if not first:
            os.environ["TQDM_DISABLE"] = "1"  # read when tqdm is imported, which commands do later
        with open(os.dup(1) if first else os.devnull, "w") as said, redirect_stdout(said):
            os.dup2(2, 1)  # the transport between CPU hosts prints to what was our output
            yield
