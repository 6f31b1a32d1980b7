"""The entry of every host: whose process it is, and when it begins again."""

import http.server
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from experiments.pod.entry import command_of
from experiments.pod.environment import ALONE, Place, of_tpu_vm, place_of
from kimijax.checkpoint.places import locate
from kimijax.errors import UserError
from kimijax.train.log import read_log
from tests import bucket as buckets
from tests.parallel.test_processes import free_port

ROOT = Path(__file__).parents[2]


def env(text: str) -> dict[str, str]:
    return dict(pair.split("=", 1) for pair in text.split())


@pytest.mark.parametrize(
    "text, want",
    [
        ("PATH=/bin", ALONE),
        ("KIMIJAX_COORDINATOR=a:1 KIMIJAX_PROCESSES=4 KIMIJAX_PROCESS=3", Place("a:1", 4, 3)),
        ("KIMIJAX_COORDINATOR=a:1 KIMIJAX_PROCESSES=4 JOB_COMPLETION_INDEX=2", Place("a:1", 4, 2)),
        ("TPU_WORKER_HOSTNAMES=k-0.k,k-1.k TPU_WORKER_ID=1", Place("k-0.k:8482", 2, 1)),
        ("TPU_WORKER_HOSTNAMES=localhost TPU_WORKER_ID=0", Place("localhost:8482", 1, 0)),
        ("KIMIJAX_COORDINATOR=a:1 KIMIJAX_PROCESSES=2 KIMIJAX_PROCESS=1 JOB_COMPLETION_INDEX=0 "
         "TPU_WORKER_HOSTNAMES=k TPU_WORKER_ID=0", Place("a:1", 2, 1)),
        ("SLURM_STEP_NODELIST=n7 SLURM_NTASKS=2 SLURM_PROCID=1 SLURM_JOB_ID=4097",
         Place("n7:61441", 2, 1)),
        ("SLURM_STEP_NODELIST=n[003-010,12],m1 SLURM_NTASKS=9 SLURM_PROCID=0 SLURM_JOB_ID=1",
         Place("n003:61441", 9, 0)),
        ("SLURM_STEP_NODELIST=a-1,b[2-3] SLURM_NTASKS=3 SLURM_PROCID=2 SLURM_JOB_ID=1",
         Place("a-1:61441", 3, 2)),
    ],
)
def test_the_environment_says_whose_process_it_is(text, want):
    assert place_of(env(text)) == want


@pytest.mark.parametrize(
    "text, message",
    [
        ("KIMIJAX_PROCESSES=2", "KIMIJAX_COORDINATOR and KIMIJAX_PROCESS missing beside KIMIJAX_P"),
        ("TPU_WORKER_HOSTNAMES=a,b", "TPU_WORKER_ID missing beside TPU_WORKER_HOSTNAMES"),
        ("TPU_WORKER_HOSTNAMES=a,b TPU_WORKER_ID=2", "process '2' of '2': give their number"),
        ("KIMIJAX_COORDINATOR=a:1 KIMIJAX_PROCESSES=x KIMIJAX_PROCESS=0", "process '0' of 'x'"),
        ("MEGASCALE_NUM_SLICES=2", "MEGASCALE_NUM_SLICES=2: a mesh lies in one slice"),
    ],
)
def test_half_an_environment_is_refused(text, message):
    with pytest.raises(UserError, match=message):
        place_of(env(text))


def test_a_tpu_vm_is_asked(tmp_path):
    answers = {"agent-worker-number": "1", "worker-network-endpoints": "t:0:10.0.0.2,t:1:10.0.0.3"}

    class Metadata(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            assert self.headers["Metadata-Flavor"] == "Google"
            self.send_response(200)
            self.end_headers()
            self.wfile.write(answers[self.path.rpartition("/")[2]].encode())

        def log_message(self, *_):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Metadata) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        where = {"GCE_METADATA_IP": f"127.0.0.1:{server.server_port}"}
        assert of_tpu_vm(where) == Place("10.0.0.2:8482", 2, 1)
        answers["worker-network-endpoints"] = "host-a,host-b"
        assert of_tpu_vm(where) == Place("host-a:8482", 2, 1)
        server.shutdown()
    with pytest.raises(UserError, match="--tpu_vm: http://127.0.0.1.*this is no TPU VM"):
        of_tpu_vm(where)


def test_the_command_of_a_process():
    got = command_of(["experiments.pretrain", "--mesh", "seq=2"], Place("a:1", 2, 1))
    assert got[1:] == ["-m", "experiments.pretrain", "--mesh", "seq=2", "--coordinator", "a:1",
                       "--processes", "2", "--process", "1"]
    assert command_of(["experiments.pretrain"], ALONE)[1:] == ["-m", "experiments.pretrain"]
    with pytest.raises(UserError, match="'experiments.pretran' is no module; near ones are exper"):
        command_of(["experiments.pretran"], ALONE)
    with pytest.raises(UserError, match="--process: the environment says it already"):
        command_of(["experiments.pretrain", "--process=1"], Place("a:1", 2, 1))


def entry(*args: object, place: str = "") -> subprocess.Popen:
    flags = [f for f in os.environ["XLA_FLAGS"].split() if "device_count" not in f]
    return subprocess.Popen(
        [sys.executable, "-m", "experiments.pod.entry", *map(str, args)],
        cwd=ROOT, env=os.environ | {"XLA_FLAGS": " ".join(flags)} | env(place),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )


@pytest.mark.parametrize(
    "codes, starts, code, message",
    [
        ("75 -9 130 0", 4, 0, "tests.pod.ends ended with SIGKILL; again in 0 s (2 of 3)"),
        ("2 0", 1, 2, ""),
        ("1 0", 1, 1, ""),
        ("75 75 75 75 0", 4, 2, "ended with exit code 75 and was started 3 times again"),
    ],
)
def test_what_may_go_on_is_begun_again(tmp_path, codes, starts, code, message):
    running = entry("--restarts", 3, "--pause", 0, "--", "tests.pod.ends", tmp_path / "log",
                    *codes.split(), "--some", "--options", place="KIMIJAX_PROCESSES=1 "
                    "KIMIJAX_COORDINATOR=a:1 KIMIJAX_PROCESS=0")
    said, _ = running.communicate(timeout=60)
    assert running.returncode == code and message in said, said
    lines = (tmp_path / "log").read_text().splitlines()
    assert len(lines) == starts and all(line.endswith("--some --options") for line in lines)


def test_a_signal_goes_to_the_child_and_nothing_is_begun_again(tmp_path):
    running = entry("--", "tests.pod.ends", tmp_path / "log", "sleep", "0")
    until(lambda: (tmp_path / "log.asleep").exists(), running)
    running.send_signal(signal.SIGTERM)
    said, _ = running.communicate(timeout=30)
    assert running.returncode == 7 and said == "", said


def until(ready, *running: subprocess.Popen) -> None:
    end = time.monotonic() + 120
    while not ready():
        assert time.monotonic() < end and all(p.poll() is None for p in running), [
            p.communicate()[0] for p in running if p.poll() is not None]
        time.sleep(0.01)


def job(out: str, notes: Path, port: int, *which: int) -> list[subprocess.Popen]:
    return [
        entry("--pause", 0.1, "--", "tests.pod.tiny", "--out", out, "--notes", notes, "--mesh",
              "seq=2", place=f"KIMIJAX_COORDINATOR=127.0.0.1:{port} KIMIJAX_PROCESSES=2 "
              f"KIMIJAX_PROCESS={index}")
        for index in which
    ]


def steps(out: str) -> int:
    log = locate(out) / "metrics.jsonl"
    return log.read_text().count("\n") if log.exists() else 0


def losses(out: str) -> list[float]:
    return [line["loss"] for line in read_log(locate(out) / "metrics.jsonl")]


@pytest.fixture(params=["disk", pytest.param("bucket", marks=pytest.mark.slow)])
def out(request, tmp_path):
    """Where the run that is cut is kept."""
    if request.param == "disk":
        yield str(tmp_path / "cut")
    else:
        with buckets.bucket():
            yield "gs://bkt/cut"


def test_a_job_that_loses_processes_ends_as_one_that_does_not(out, tmp_path):
    """One is killed; then a host is told to go, and comes back."""
    whole, notes, port = tmp_path / "whole", tmp_path / "notes", free_port()
    for process in job(str(whole), whole, free_port(), 0, 1):
        said, _ = process.communicate(timeout=120)
        assert process.returncode == 0, said
    first, second = job(out, notes, port, 0, 1)
    until(lambda: steps(out) >= 8, first, second)
    killed = (notes / "pid1").read_text()
    os.kill(int(killed), signal.SIGKILL)
    until(lambda: (notes / "pid1").read_text() not in ("", killed), first, second)
    until(lambda: steps(out) >= 16, first, second)
    first.send_signal(signal.SIGTERM)
    said, _ = first.communicate(timeout=60)
    assert first.returncode == 130, said
    assert "error: process 1 of 2 is gone" in said and "ended with exit code 75; again in" in said
    assert re.search(r"stopped after step \d+ of 40, state saved", said), said
    assert second.poll() is None and steps(out) < 40
    again, = job(out, notes, port, 0)
    for process in (again, second):
        said, _ = process.communicate(timeout=120)
        assert process.returncode == 0, said
    assert "ended with SIGKILL; again" in said and "ended with exit code 130; again" in said
    assert len(losses(out)) == 40 and losses(out) == losses(str(whole))
    np.testing.assert_array_equal(np.load(notes / "w.npy"), np.load(whole / "w.npy"))
