"""Launch a program of this project on a TPU pod: every command is printed, then run.

  python -m experiments.pod.launch --name k2 --on queued --topology v5p:8x8x8 --project P \\
      --zone us-east5-a --bucket gs://B --dry_run -- experiments.pretrain --model kimi_k2 \\
      --curriculum k2 --data gs://B/web=7,gs://B/code --mesh data=4,seq=32,expert=4 \\
      --dtype bfloat16 --out gs://B/runs/k2

--on tpu_vm    a TPU VM, made at once           --on queued  a queued resource, waited for
--on xpk, gke  a cluster that has such nodes, JobSet and the Cloud Storage FUSE CSI driver
What runs is the commit of this checkout, or --image. --dry_run prints a shell script, runs nothing
and needs no cloud. Every host starts experiments.pod.entry, which joins them and begins again after
what a pod does to its hosts; the program goes on from its last save.

--out gs://... is written without a mount (kimijax/checkpoint/places.py); other paths in the bucket
are read from its mount. Metrics arrive there with each save, as do TensorBoard's events; --profile
10-12 of a program brings a trace of every host. To see them: tensorboard --logdir gs://B/runs/k2,
with xprof installed for the traces. Make the bucket in the region of the slice:
gcloud storage buckets create gs://B --location=us-east5 --uniform-bucket-level-access
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from experiments.pod.entry import check_module
from kimijax.cli import run_module
from kimijax.errors import UserError

if TYPE_CHECKING:
    from experiments.pod.commands import Job, Plan, Step

WAYS = ("tpu_vm", "queued", "xpk", "gke")
AGAIN = 30  # seconds
ENDED = {"FAILED", "SUSPENDED", "SUSPENDING", "DELETING"}  # states that a queued resource stays in
FORMS = {
    "name": (r"[a-z]([-a-z0-9]{0,26}[a-z0-9])?", "up to 28 letters, digits and dashes"),
    "bucket": (r"gs://[a-z0-9][-_.a-z0-9]{1,61}[a-z0-9]", "gs://NAME, without a folder"),
    "project": (r"[a-z][-a-z0-9:.]{4,60}[a-z0-9]", "the id of a Google Cloud project"),
    "zone": (r"[a-z]+-[a-z]+[0-9]+(-[a-z])?", "a zone, as us-east5-a, of a cluster its location"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options, and after -- the module with its own."""
    add = parser.add_argument
    add("--name", required=True, help="of the slice and the job")
    add("--topology", required=True, metavar="KIND:AxBxC", help="as of kimijax plan")
    add("--on", required=True, choices=WAYS)
    add("--project", required=True)
    add("--zone", required=True)
    add("--bucket", required=True, metavar="gs://NAME")
    add("--cluster", help="of GKE (--on xpk, gke)")
    add("--image", help="of a container in which the project is installed (--on xpk, gke)")
    add("--account", default="default", help="service account of Kubernetes (--on gke)")
    add("--spot", action="store_true", help="cheaper, and taken away at any time")
    add("--reuse", action="store_true",
        help="the slice is there, of xpk the storage: start anew on it, with this checkout")
    add("--dry_run", action="store_true")
    add("command", nargs="+", metavar="-- MODULE ARGUMENT", help="as of python -m")


def main(args: argparse.Namespace) -> int:
    """Print the commands, run them; the first that fails ends it."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # nothing is computed here
    from experiments.pod import commands

    job = job_of(args)
    plan = commands.WAYS[args.on](job)
    where = job.where
    print(f"# {where.pod.topology}: {where.accelerator}, {where.pod.chips} chips, {where.hosts} "
          f"hosts of {where.per_host}", flush=True)
    manifest = commands.manifest_of(job) if plan.manifest else None
    if args.dry_run:
        print("set -euo pipefail")
        if manifest:
            print(f"cat >{manifest} <<'END'\n{json.dumps(plan.manifest, indent=1)}\nEND")
        print("\n".join(map(printed, plan.steps)))
    else:
        _run(plan, manifest)
    for what, argv in plan.later.items():
        print(f"# {what}: {shlex.join(argv)}")
    return 0


def job_of(args: argparse.Namespace) -> Job:
    """The Job of the options. UserError: one of them names nothing."""
    from experiments.pod.commands import Job
    from experiments.pod.slices import slice_of
    from kimijax.parallel.mesh import parse_mesh
    from kimijax.planner.search import check_product

    for name, (form, what) in FORMS.items():
        if not re.fullmatch(form, getattr(args, name)):
            raise UserError(f"--{name} {getattr(args, name)!r:.80}: give {what}")
    where = slice_of(args.topology)
    check_module(args.command[0])
    for before, text in zip(args.command, args.command[1:], strict=False):
        if before == "--mesh" or text.startswith("--mesh="):
            check_product(parse_mesh(text.removeprefix("--mesh=")), where.pod)
    kept = ("name", "project", "zone", "command", "cluster", "image", "account", "spot", "reuse")
    return Job(where=where, bucket=args.bucket.removeprefix("gs://"),
               **{name: getattr(args, name) for name in kept})


def printed(step: Step) -> str:
    """A step as a line of a shell script."""
    line = shlex.join(step.argv)
    if step.until is None:
        return line
    return f'until [ "$({line})" = {step.until} ]; do sleep {AGAIN}; done'


def _run(plan: Plan, manifest: str | None) -> None:
    programs = {step.argv[0] for step in plan.steps}
    if missing := [name for name in sorted(programs) if shutil.which(name) is None]:
        raise UserError(f"{' and '.join(missing)} not installed; do so, or see the commands "
                        "with --dry_run")
    if manifest:
        Path(manifest).write_text(json.dumps(plan.manifest, indent=1) + "\n")
    for step in plan.steps:
        print(printed(step), flush=True)
        if step.until is not None:
            _wait(step)
        elif code := subprocess.run(step.argv).returncode:
            raise UserError(f"exit code {code} of: {shlex.join(step.argv)}")


def _wait(step: Step) -> None:
    while True:
        done = subprocess.run(step.argv, stdout=subprocess.PIPE, text=True)
        said = done.stdout.strip()
        if done.returncode or said in ENDED:
            raise UserError(f"{said or f'exit code {done.returncode}'} is what this says: "
                            f"{shlex.join(step.argv)}")
        if said == step.until:
            return
        print(said, file=sys.stderr, flush=True)
        time.sleep(AGAIN)


if __name__ == "__main__":
    run_module(add_arguments, main, __doc__)
