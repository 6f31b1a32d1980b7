"""Two processes over loopback compute what one does; a dead or missing one is named."""

import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from kimijax.errors import UserError
from kimijax.parallel.processes import join
from tests.conftest import assert_close

ROOT = Path(__file__).parents[2]
DEAD = 60  # seconds in which a dead process must be noticed


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """Both processes' run: the folder, exit codes, what each said, when the survivor ended."""
    out, port = tmp_path_factory.mktemp("processes"), free_port()
    running = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.parallel.worker", str(port), str(index), str(out)],
            cwd=ROOT, env=os.environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for index in (0, 1)
    ]
    said, ended = ["", ""], [0.0, 0.0]

    def listen(i):
        said[i], _ = running[i].communicate()
        ended[i] = time.time()

    readers = [threading.Thread(target=listen, args=(i,)) for i in (0, 1)]
    for reader in readers:
        reader.start()
    yield out, running, readers, said, ended
    for process, reader in zip(running, readers, strict=True):
        process.kill()
        reader.join()


def test_two_processes_give_the_answer_of_one(job):
    from tests.parallel.worker import Job, initial_params, results

    out, running, _, said, _ = job
    want = results(Job(None, initial_params()))  # while they work
    while not (out / "got.npz").exists():
        assert all(p.poll() is None or (out / "got.npz").exists() for p in running), said
        time.sleep(0.1)
    with np.load(out / "got.npz") as held:
        got = dict(held)
    assert_close(got, want)


def test_a_killed_process_ends_the_job_and_is_named(job):
    out, running, readers, said, ended = job
    for reader in readers:
        reader.join(timeout=2 * DEAD)
    killed = float((out / "killed").read_text())
    assert running[1].returncode == -9, said[1]
    assert running[0].returncode not in (0, None), said[0]
    assert ended[0] - killed < DEAD
    assert "The following tasks are unhealthy (stopped sending heartbeats):\n1" in said[0]


def test_who_does_not_come_is_named_to_those_who_did():
    where, faults = f"127.0.0.1:{free_port()}", {}

    def come(index):
        with pytest.raises(UserError) as error:
            join(where, 3, index, patience=2)
        faults[index] = str(error.value)

    came = [threading.Thread(target=come, args=(i,)) for i in (0, 2)]
    for process in came:
        process.start()
    for process in came:
        process.join()
    want = f"process 1 of 3 did not come to {where} within 2 s; start it with this coordinator"
    assert faults[0].startswith(want) and faults[2] == faults[0]


def test_a_coordinator_that_does_not_answer_is_named():
    where = f"127.0.0.1:{free_port()}"
    with pytest.raises(UserError, match=f"process 0 of 2 did not answer at {where} within 1 s"):
        join(where, 2, 1, patience=1)


@pytest.mark.parametrize(
    "coordinator, processes, index, message",
    [
        ("here", 2, 0, "write it as host:port"),
        ("here:0", 2, 0, "write it as host:port"),
        ("here:99999", 2, 0, "write it as host:port"),
        (":80", 2, 0, "write it as host:port"),
        ("here:8476", 2, 2, "process 2 of 2: give the number"),
        ("here:8476", 0, 0, "process 0 of 0: give the number"),
    ],
)
def test_what_names_no_process_is_refused(coordinator, processes, index, message):
    with pytest.raises(UserError, match=message):
        join(coordinator, processes, index, patience=1)


def test_a_port_that_is_taken_is_said():
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match="cannot listen there.*choose another port"):
            join(f"127.0.0.1:{port}", 2, 0, patience=1)
