"""Launching: the commands of every way, as programs would take them; nothing is run in a cloud."""

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.pod import launch
from experiments.pod.commands import WAYS
from experiments.pod.slices import slice_of
from kimijax.errors import UserError

ROOT = Path(__file__).parents[2]
JOB = ("--name k2 --topology v5p:4x4x4 --project my-proj --zone us-east5-a --bucket gs://bkt "
       "--cluster c --image reg/i:1").split()
MODULE = ["experiments.pretrain", "--data", "gs://bkt/a b=2,gs://bkt/c", "--mesh", "seq=64",
          "--out", "gs://bkt/runs/x"]
CHILD = ["-m", "experiments.pod.entry", "--", "experiments.pretrain", "--data",
         "/bucket/a b=2,/bucket/c", "--mesh", "seq=64", "--out", "gs://bkt/runs/x"]


def parsed(*more: str, job=JOB, module=MODULE) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    launch.add_arguments(parser)
    return parser.parse_args([*job, *more, "--dry_run", "--", *module])


@pytest.fixture
def script(capsys):
    """What a dry run prints: (the commands, each as its words; all of the text)."""

    def run(*more: str, **other) -> tuple[list[list[str]], str]:
        assert launch.main(parsed(*more, **other)) == 0
        text = capsys.readouterr().out
        lines = re.sub(r"^cat >.*?^END$", "", text, flags=re.M | re.S).splitlines()
        return [shlex.split(line) for line in lines if line and line[0] != "#"][1:], text

    return run


def options(command: list[str]) -> dict[str, str]:
    return dict(word.partition("=")[::2] for word in command if word.startswith("--"))


TPUS = {"--project": "my-proj", "--zone": "us-east5-a", "--quiet": ""}


def test_a_tpu_vm(script):
    commands, text = script("--on", "tpu_vm", "--spot")
    bucket, pack, create, copy, set_up, start = commands
    assert bucket[:5] == ["gcloud", "storage", "buckets", "describe", "gs://bkt"]
    assert pack[:4] == ["git", "-C", str(ROOT), "archive"] and pack[-1] == "HEAD"
    assert create[:6] == ["gcloud", "compute", "tpus", "tpu-vm", "create", "k2"]
    assert options(create) == TPUS | {
        "--accelerator-type": "v5p-128", "--version": "v2-alpha-tpuv5", "--spot": ""}
    archive = options(pack)["--output"]
    assert copy[3:7] == ["tpu-vm", "scp", archive, "k2:kimijax.tar.gz"]
    for command in (copy, set_up, start):
        assert options(command)["--worker"] == "all"
    remote = shlex.split(options(set_up)["--command"])
    assert remote[-4:] == ["bash", "kimijax/experiments/pod/setup.sh", "bkt", "/bucket"]
    remote = shlex.split(options(start)["--command"])
    python = remote.index("$HOME/kimijax/.venv/bin/python")
    assert remote[:2] == ["sudo", "systemd-run"] and "--property=KillMode=mixed" in remote[:python]
    assert remote[python + 1 :] == [*CHILD[:2], "--tpu_vm", *CHILD[2:]]
    assert "# v5p:4x4x4: v5p-128, 64 chips, 16 hosts of 4" in text
    assert "# delete: gcloud compute tpus tpu-vm delete k2" in text


def test_a_queued_resource_is_waited_for(script):
    commands, text = script("--on", "queued")
    create, wait = commands[2:4]
    assert create[:6] == ["gcloud", "compute", "tpus", "queued-resources", "create", "k2"]
    assert options(create) == TPUS | {
        "--accelerator-type": "v5p-128", "--runtime-version": "v2-alpha-tpuv5", "--node-id": "k2"}
    assert wait[:2] == ["until", "["] and "queued-resources describe k2" in wait[2]
    assert "# delete: gcloud compute tpus queued-resources delete k2 --force" in text
    assert [command[4] for command in commands[4:]] == ["scp", "ssh", "ssh"]


def test_a_slice_that_is_there_is_started_anew(script):
    commands, _ = script("--on", "queued", "--reuse")
    assert not any("create" in command for command in commands)
    assert options(commands[2])["--command"] == "sudo systemctl stop kimijax || true"


def test_a_workload_of_xpk(script):
    where = {"--cluster": "c", "--project": "my-proj", "--zone": "us-east5-a"}
    (_, attach, create), _ = script("--on", "xpk")
    assert attach[:4] == ["xpk", "storage", "attach", "bkt"]
    assert options(attach) == where | {
        "--type": "gcsfuse", "--bucket": "bkt", "--mount-point": "/bucket", "--readonly": "false",
        "--auto-mount": "false", "--size": "1",
        "--mount-options": "implicit-dirs"}
    assert create[:3] == ["xpk", "workload", "create"]
    said = options(create)
    assert shlex.split(said.pop("--command")) == ["exec", "python", *CHILD]
    assert said == where | {
        "--workload": "k2", "--tpu-type": "v5p-4x4x4", "--docker-image": "reg/i:1",
        "--storage": "bkt", "--max-restarts": "100"}
    assert len(script("--on", "xpk", "--reuse")[0]) == 2


def test_a_jobset_of_gke(script):
    commands, text = script("--on", "gke", "--spot", "--account", "writer")
    assert [command[0] for command in commands] == ["gcloud", "gcloud", "kubectl"]
    assert commands[2] == ["kubectl", "apply", "--filename=k2.jobset.json"]
    held = json.loads(re.search(r"^cat >k2.jobset.json <<'END'\n(.*?)^END$", text, re.M | re.S)[1])
    assert (held["apiVersion"], held["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    [part] = held["spec"]["replicatedJobs"]
    job = part["template"]["spec"]
    assert job["parallelism"] == job["completions"] == 16 and job["completionMode"] == "Indexed"
    [rule] = job["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob" and rule["onExitCodes"]["values"] == [2]
    pod = job["template"]["spec"]
    assert pod["restartPolicy"] == "Never" and pod["serviceAccountName"] == "writer"
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5p-slice",
        "cloud.google.com/gke-tpu-topology": "4x4x4", "cloud.google.com/gke-spot": "true"}
    [container] = pod["containers"]
    assert container["command"] == ["python", *CHILD] and container["image"] == "reg/i:1"
    assert container["resources"] == {"limits": {"google.com/tpu": 4}}
    [mount], [volume] = container["volumeMounts"], pod["volumes"]
    assert mount == {"name": volume["name"], "mountPath": "/bucket"}
    assert volume["csi"]["volumeAttributes"]["bucketName"] == "bkt"


@pytest.mark.parametrize(
    "topology, accelerator, hosts, chips",
    [
        ("v5e:1x1", "v5litepod-1", 1, 1),
        ("v5e:2x4", "v5litepod-8", 1, 8),
        ("v5e:16x16", "v5litepod-256", 64, 4),
        ("v6e:4x4", "v6e-16", 4, 4),
        ("v5p:2x2x1", "v5p-8", 1, 4),
        ("v5p:8x8x8", "v5p-1024", 128, 4),
        ("tpu7x:4x4x4", "tpu7x-128", 16, 4),
    ],
)
def test_slices(topology, accelerator, hosts, chips):
    found = slice_of(topology)
    assert (found.accelerator, found.hosts, found.per_host) == (accelerator, hosts, chips)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"--topology": "v5p:8x8x9"}, "--topology v5p:8x8x9: v5p is to be had as v5p:8x8x8"),
        ({"--topology": "v5q:4x4x6"}, "topology 'v5q:4x4x6' is none; near ones are v5"),
        ({"--topology": "v5p:4x4x6"}, "--topology v5p:4x4x6: v5p is to be had as v5p:4x4x8"),
        ({"--topology": "v5e:1x2"}, "--topology v5e:1x2: v5e is to be had as v5e:2x2"),
        ({"--topology": "tpu7x:4x4x4", "--mesh": "seq=128"}, "tpu7x is not to be had as a TPU VM"),
        ({"--mesh": "seq=8"}, "has 8 devices, v5p:4x4x4 has 64"),
        ({"--name": "K2"}, "--name 'K2': give up to 28 letters"),
        ({"--bucket": "gs://bkt/x"}, "--bucket 'gs://bkt/x': give gs://NAME"),
        ({"--bucket": "bkt"}, "--bucket 'bkt': give gs://NAME"),
        ({"--zone": "here"}, "--zone 'here': give a zone"),
        ({"--data": "gs://bkt2/x"}, "'gs://bkt2/x': gs://bkt is what hosts mount"),
        ({"module": "experiments.pretran"}, "near ones are experiments.pretrain"),
    ],
)
def test_what_cannot_be_launched_is_refused(change, message):
    words = [*JOB, "--on", "tpu_vm"], list(MODULE)
    if "module" in change:
        words[1][0] = change.pop("module")
    for name, value in change.items():
        held = words[0] if name in words[0] else words[1]
        held[held.index(name) + 1] = value
    with pytest.raises(UserError, match=re.escape(message)):
        launch.main(parsed(job=words[0], module=words[1]))


@pytest.mark.parametrize("on", ["xpk", "gke"])
def test_a_cluster_needs_its_name_and_an_image(on):
    with pytest.raises(UserError, match="--cluster and --image missing: .* docker build -f"):
        launch.main(parsed("--on", on, job=JOB[:-4]))


def program(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\n{text}\n")
    (folder / name).chmod(0o755)


def launched(tmp_path: Path, on: str) -> subprocess.CompletedProcess:
    """Not dry, with the programs of tmp_path alone."""
    return subprocess.run(
        [sys.executable, "-m", "experiments.pod.launch", *JOB, "--on", on, "--", *MODULE],
        cwd=tmp_path, capture_output=True, text=True, timeout=60,
        env=os.environ | {"PATH": str(tmp_path), "PYTHONPATH": str(ROOT)},
    )


def test_commands_are_run_until_one_fails(tmp_path):
    got = launched(tmp_path, "gke")
    assert got.returncode == 2 and got.stdout.startswith("# v5p:4x4x4")
    assert got.stderr == (
        "error: gcloud and kubectl not installed; do so, or see the commands with --dry_run\n"
    )
    program(tmp_path, "gcloud", 'echo "gcloud $*" >>log')
    program(tmp_path, "kubectl", 'echo "kubectl $*" >>log; exit 3')
    got = launched(tmp_path, "gke")
    assert got.returncode == 2
    assert got.stderr == "error: exit code 3 of: kubectl apply --filename=k2.jobset.json\n"
    ran = (tmp_path / "log").read_text().splitlines()
    assert [line.split()[0] for line in ran] == ["gcloud", "gcloud", "kubectl"]
    assert json.loads((tmp_path / "k2.jobset.json").read_text())["metadata"]["name"] == "k2"


def test_a_queued_resource_that_ends_is_not_waited_for(tmp_path):
    program(tmp_path, "git", "")
    program(tmp_path, "gcloud", 'case "$*" in *describe*state*) echo FAILED;; esac')
    got = launched(tmp_path, "queued")
    assert got.returncode == 2 and "error: FAILED is what this says: gcloud" in got.stderr


def shellcheck(*args: object, text: str | None = None) -> None:
    found = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if found is None:
        pytest.skip("shellcheck is not installed")
    got = subprocess.run([found, *map(str, args)], input=text, capture_output=True, text=True)
    assert got.returncode == 0, got.stdout + got.stderr


def test_shell_files_are_clean():
    listed = subprocess.run(["git", "-C", ROOT, "ls-files", "*.sh", ".ci/run"],
                            capture_output=True, text=True, check=True)
    files = [ROOT / name for name in listed.stdout.split()]
    assert ROOT / "experiments/pod/setup.sh" in files
    shellcheck(*files)


@pytest.mark.parametrize("on", WAYS)
def test_a_dry_run_is_a_shell_script(script, on):
    _, text = script("--on", on)
    # What ssh hands on is expanded on the hosts.
    shellcheck("--shell=bash", "--exclude=SC2016", "-", text=text)
