"""The commands that bring a job to a slice, one list for each way to have one."""

import re
import shlex
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from experiments.pod.jobset import MOUNT_OPTIONS, jobset
from experiments.pod.slices import Slice
from kimijax.errors import UserError

ROOT = Path(__file__).parents[2]
MOUNT = "/bucket"  # where a host sees the bucket, to read data from
UNIT = "kimijax"  # of systemd, on a TPU VM
RESTARTS = 100  # of all hosts at once, by Kubernetes


class Step(NamedTuple):
    """One command."""

    argv: list[str]
    until: str | None = None  # it is asked again until this is what it says


class Plan(NamedTuple):
    """What a launch does, and what may be asked of the job afterwards."""

    steps: list[Step]
    later: dict[str, list[str]]
    manifest: dict | None = None  # written for the step that applies it


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is to be launched."""

    name: str
    where: Slice
    project: str
    zone: str
    bucket: str  # without gs://
    command: list[str]  # after --, as the user wrote it
    cluster: str | None = None
    image: str | None = None
    account: str = "default"
    spot: bool = False
    reuse: bool = False

    def entry(self, python: str, *options: str) -> list[str]:
        """What every host starts. Paths in the bucket become those in its mount, but for --out."""
        ours = re.compile(rf"gs://{re.escape(self.bucket)}(?![-_.\w])")
        command = []
        for before, text in zip(["", *self.command], self.command, strict=False):
            if before != "--out" and not text.startswith("--out="):
                text = ours.sub(MOUNT, text)
                if "gs://" in text:
                    raise UserError(f"{text!r:.200}: gs://{self.bucket} is what hosts mount")
            command.append(text)
        return [python, "-m", "experiments.pod.entry", *options, "--", *command]


def tpu_vm(job: Job) -> Plan:
    """A TPU VM that is made at once, or refused."""
    create = _gcloud(
        job, "tpu-vm", "create", job.name, f"--accelerator-type={job.where.accelerator}",
        f"--version={_runtime(job)}", *["--spot"][: job.spot],
    )
    return _on_vms(job, [Step(create)], {"delete": _gcloud(job, "tpu-vm", "delete", job.name)})


def queued(job: Job) -> Plan:
    """A TPU VM that is waited for."""
    create = _gcloud(
        job, "queued-resources", "create", job.name, f"--node-id={job.name}",
        f"--accelerator-type={job.where.accelerator}", f"--runtime-version={_runtime(job)}",
        *["--spot"][: job.spot],
    )
    state = _gcloud(job, "queued-resources", "describe", job.name, "--format=value(state.state)")
    delete = _gcloud(job, "queued-resources", "delete", job.name, "--force")
    return _on_vms(job, [Step(create), Step(state, "ACTIVE")], {"delete": delete})


def _on_vms(job: Job, create: list[Step], later: dict[str, list[str]]) -> Plan:
    """Bring the commit of this checkout to every host, set it up and start it."""
    archive = f"{tempfile.gettempdir()}/{UNIT}-{job.name}.tar.gz"
    pack = ["git", "-C", str(ROOT), "archive", f"--prefix={UNIT}/", f"--output={archive}", "HEAD"]
    copy = _gcloud(job, "tpu-vm", "scp", archive, f"{job.name}:{UNIT}.tar.gz", "--worker=all")
    bucket, mount, stop = shlex.quote(job.bucket), MOUNT, f"sudo systemctl stop {UNIT}"
    set_up = (f"rm -rf {UNIT} && tar -xzf {UNIT}.tar.gz && "
              f"bash {UNIT}/experiments/pod/setup.sh {bucket} {mount}")
    # systemd keeps it when ssh ends, and hands SIGTERM to the entry alone, which hands it on.
    unit = (
        f'sudo systemd-run --unit={UNIT} --collect --uid="$(id -u)" --gid="$(id -g)" '
        f'--setenv=HOME="$HOME" --working-directory="$HOME/{UNIT}" --property=KillMode=mixed '
        '--property=TimeoutStopSec=600 "$HOME"/'
    )
    start = unit + shlex.join(job.entry(f"{UNIT}/.venv/bin/python", "--tpu_vm"))
    before = [Step(_ssh(job, f"{stop} || true"))] if job.reuse else create
    steps = [
        Step(_bucket(job)), Step(pack), *before, Step(copy), Step(_ssh(job, set_up)),
        Step(_ssh(job, start)),
    ]
    follow = f"sudo journalctl --unit={UNIT} --follow"
    return Plan(steps, {
        "follow": _ssh(job, follow, "0"), "save and stop": _ssh(job, stop), **later,
    })


def xpk(job: Job) -> Plan:
    """A workload of xpk, which makes its own JobSet."""
    needs(job, "cluster", "image")
    where = [f"--cluster={job.cluster}", f"--project={job.project}", f"--zone={job.zone}"]
    storage = job.bucket.replace("_", "-")  # a name of Kubernetes
    attach = [
        "xpk", "storage", "attach", storage, "--type=gcsfuse", f"--bucket={job.bucket}",
        f"--mount-point={MOUNT}", "--readonly=false", "--auto-mount=false", "--size=1",
        f"--mount-options={MOUNT_OPTIONS}", *where,
    ]
    create = [
        "xpk", "workload", "create", f"--workload={job.name}",
        f"--tpu-type={job.where.names.prefix}-{job.where.sizes}", f"--docker-image={job.image}",
        f"--storage={storage}", f"--max-restarts={RESTARTS}", *where,
        # xpk hands signals to what its shell began last: that has to be the entry itself.
        f"--command=exec {shlex.join(job.entry('python'))}",
    ]
    steps = [Step(_bucket(job)), *([] if job.reuse else [Step(attach)]), Step(create)]
    return Plan(steps, {
        "list": ["xpk", "workload", "list", *where],
        "delete": ["xpk", "workload", "delete", f"--workload={job.name}", *where],
    })


def gke(job: Job) -> Plan:
    """A JobSet of ours."""
    needs(job, "cluster", "image")
    manifest = jobset(
        job.name, job.where, job.image, job.entry("python"), job.bucket, MOUNT, RESTARTS, job.spot,
        job.account,
    )
    credentials = ["gcloud", "container", "clusters", "get-credentials", job.cluster,
                   f"--location={job.zone}", f"--project={job.project}"]
    apply = ["kubectl", "apply", f"--filename={manifest_of(job)}"]
    pods = f"--selector=jobset.sigs.k8s.io/jobset-name={job.name}"
    return Plan([Step(_bucket(job)), Step(credentials), Step(apply)], {
        "list": ["kubectl", "get", "pods", pods],
        "follow": ["kubectl", "logs", "--follow", "--container=kimijax",
                   f"{pods},batch.kubernetes.io/job-completion-index=0"],
        "save and stop": ["kubectl", "delete", "jobset", job.name],
    }, manifest)


WAYS = {"tpu_vm": tpu_vm, "queued": queued, "xpk": xpk, "gke": gke}


def manifest_of(job: Job) -> str:
    """The file that the manifest is written to, here."""
    return f"{job.name}.jobset.json"


def needs(job: Job, *names: str) -> None:
    """UserError: an option is missing that this way to launch needs."""
    if missing := [f"--{name}" for name in names if getattr(job, name) is None]:
        raise UserError(
            f"{' and '.join(missing)} missing: name the GKE cluster, and an image, as one of "
            "git archive HEAD | docker build -f experiments/pod/Dockerfile -t IMAGE - && "
            "docker push IMAGE"
        )


def _runtime(job: Job) -> str:
    if job.where.names.runtime is None:
        raise UserError(f"--topology {job.where.pod.topology}: {job.where.pod.name} is not to be "
                        "had as a TPU VM; launch --on gke or xpk")
    return job.where.names.runtime


def _bucket(job: Job) -> list[str]:
    """Before anything costs money."""
    return ["gcloud", "storage", "buckets", "describe", f"gs://{job.bucket}",
            "--format=value(name,location)"]


def _gcloud(job: Job, *words: str) -> list[str]:
    where = [f"--project={job.project}", f"--zone={job.zone}", "--quiet"]
    return ["gcloud", "compute", "tpus", *words, *where]


def _ssh(job: Job, command: str, worker: str = "all") -> list[str]:
    return _gcloud(job, "tpu-vm", "ssh", job.name, f"--worker={worker}", f"--command={command}")
