"""Which process of a job this is, from the environment that its launcher made.

    KIMIJAX_COORDINATOR=HOST:PORT  KIMIJAX_PROCESSES=N  KIMIJAX_PROCESS=I   by hand
    KIMIJAX_COORDINATOR  KIMIJAX_PROCESSES  JOB_COMPLETION_INDEX            indexed Kubernetes jobs
    TPU_WORKER_HOSTNAMES=a,b,...  TPU_WORKER_ID                             GKE, of pods with TPUs
    SLURM_STEP_NODELIST  SLURM_NTASKS  SLURM_PROCID  SLURM_JOB_ID           srun

A TPU VM knows it from its metadata server, as jax.distributed does (`of_tpu_vm`).
"""

import os
import re
import urllib.request
from collections.abc import Mapping
from typing import NamedTuple

from kimijax.errors import UserError

PORT = 8482  # that of jax.distributed on TPUs
METADATA = "http://{}/computeMetadata/v1/instance/attributes/{}"


class Place(NamedTuple):
    """Of a process in its job."""

    coordinator: str  # host:port of process 0
    processes: int
    process: int

    def options(self) -> list[str]:
        """Those of a command of ours; none where it is alone."""
        if self.processes == 1:
            return []
        named = zip(self._fields, self, strict=True)
        return [text for name, value in named for text in (f"--{name}", str(value))]


ALONE = Place("", 1, 0)


def place_of(env: Mapping[str, str]) -> Place:
    """The place that an environment speaks of; ALONE: of none. UserError: of half of one."""
    if int(env.get("MEGASCALE_NUM_SLICES") or 1) > 1:
        raise UserError(
            f"MEGASCALE_NUM_SLICES={env['MEGASCALE_NUM_SLICES']}: a mesh lies in one slice; start "
            "the job with one"
        )
    if env.get("KIMIJAX_COORDINATOR") or env.get("KIMIJAX_PROCESSES"):
        index = "JOB_COMPLETION_INDEX" if env.get("JOB_COMPLETION_INDEX") else "KIMIJAX_PROCESS"
        index = "KIMIJAX_PROCESS" if env.get("KIMIJAX_PROCESS") else index
        where, count, index = _needed(env, "KIMIJAX_COORDINATOR", "KIMIJAX_PROCESSES", index)
        return _place(where, count, index)
    if env.get("TPU_WORKER_HOSTNAMES"):
        hosts, index = _needed(env, "TPU_WORKER_HOSTNAMES", "TPU_WORKER_ID")
        return _of_hosts(hosts.split(","), index)
    if env.get("SLURM_STEP_NODELIST"):
        nodes, count, index, job = _needed(
            env, "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_JOB_ID"
        )
        # Two jobs may share a node: each its own port, of the 4096 highest, as jax chooses it.
        return _place(f"{_first(nodes)}:{int(job) % 4096 + 61440}", count, index)
    return ALONE


def of_tpu_vm(env: Mapping[str, str] = os.environ) -> Place:
    """The place of a Cloud TPU VM. UserError: no metadata server answers, so this is none."""
    hosts, index = (_metadata(env, x) for x in ("worker-network-endpoints", "agent-worker-number"))
    # An entry is a host, or name:id:ip.
    return _of_hosts([entry.split(":")[-1] for entry in hosts.split(",")], index)


def _metadata(env: Mapping[str, str], key: str) -> str:
    url = METADATA.format(env.get("GCE_METADATA_IP", "metadata.google.internal"), key)
    request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.read().decode()
    except (OSError, ValueError) as error:
        why = f"--tpu_vm: {url}: {error}; leave it out where this is no TPU VM"
        raise UserError(why) from error


def _of_hosts(hosts: list[str], index: str) -> Place:
    return _place(f"{hosts[0].strip()}:{PORT}", str(len(hosts)), index)


def _first(nodes: str) -> str:
    """Of a list such as "node[003-010,12],other"."""
    head, start = re.fullmatch(r"([^\[,]+)(?:\[(\w+))?.*", nodes).groups()
    return head + (start or "")


def _needed(env: Mapping[str, str], *names: str) -> list[str]:
    if missing := [name for name in names if not env.get(name)]:
        there = [name for name in names if name not in missing]
        raise UserError(f"{' and '.join(missing)} missing beside {' and '.join(there)}: set all "
                        "of them, or none")
    return [env[name] for name in names]


def _place(coordinator: str, processes: str, process: str) -> Place:
    if not (processes.isdecimal() and process.isdecimal() and int(process) < int(processes)):
        raise UserError(f"process {process!r:.20} of {processes!r:.20}: give their number, and "
                        "each its own index below that, from 0")
    return Place(coordinator, int(processes), int(process))
