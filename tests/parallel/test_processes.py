"""Two processes over loopback compute what one does; a dead or missing one is named."""

import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kimijax.checkpoint import restore_latest
from kimijax.errors import Lost, UserError
from kimijax.parallel.processes import join
from tests.conftest import assert_close
from tests.parallel.test_mesh_commands import GOLDENS, answers

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
    from tests.parallel.worker import ROWS, TOKENS, Job, Small, initial_params, results

    out, running, _, said, _ = job
    want = results(Job(None, initial_params()))  # while they work
    while not (out / "got.npz").exists():
        assert all(p.poll() is None or (out / "got.npz").exists() for p in running), said
        time.sleep(0.1)
    with np.load(out / "got.npz") as held:
        got = dict(held)
    alone = restore_latest(out / "state", Job(None, initial_params()).state).state.params
    for i, x in enumerate(jax.tree.leaves(alone)):
        np.testing.assert_array_equal(x, got[f"param{i}"])
    np.testing.assert_array_equal(got.pop("fit_cut"), got.pop("fit_whole"))
    stopped = {(out / f"stopped{index}").read_text() for index in (0, 1)}  # the signal reached one
    assert len(stopped) == 1 and "stopped after step" in stopped.pop()
    with pytest.raises(UserError, match="2 processes saved it, each at its own place"):
        restore_latest(out / "cut" / "state", Small(jnp.int32(0), jnp.zeros(8)))
    for parts in (1, 2):  # a process brings all rows where it holds some tokens of each
        np.testing.assert_array_equal(np.sort(got.pop(f"rows_{parts}"))[:, -TOKENS:], ROWS)
    restored = [name for name in got if name.startswith("restored")]
    assert len(restored) == len([name for name in want if name.startswith("param")])
    for name in restored:  # both saved and restored together
        np.testing.assert_array_equal(got.pop(name), got[name.replace("restored", "param")])
    assert_close(got, want)


def test_a_killed_process_ends_the_job_and_is_named(job):
    out, running, readers, said, ended = job
    for reader in readers:
        reader.join(timeout=2 * DEAD)
    killed = float((out / "killed").read_text())
    assert running[1].returncode == -9, said[1]
    assert running[0].returncode == Lost.code, said[0]
    assert ended[0] - killed < DEAD
    assert "error: process 1 of 2 is gone; start all processes of the job again\n" in said[0]
    assert "Traceback" not in said[0]


@pytest.mark.slow
def test_two_processes_of_a_command_write_the_file_of_one(tmp_path):
    known = answers("k2_tiny")
    np.save(tmp_path / "in.npy", known["gen_prompt"][:1])
    flags = [f for f in os.environ["XLA_FLAGS"].split() if "device_count" not in f]
    where = f"127.0.0.1:{free_port()}"
    running = [
        subprocess.Popen(
            [sys.executable, "-c", "from kimijax.cli import run; run()", "generate", "--checkpoint",
             GOLDENS / "k2_tiny", "--tokens", tmp_path / "in.npy", "--out",
             tmp_path / f"out{index}.npy", "--max_new", "3", "--mesh", "seq=2,expert=2",
             "--coordinator", where, "--processes", "2", "--process", str(index)],
            cwd=ROOT, env=os.environ | {"XLA_FLAGS": " ".join(flags)}, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True,
        )
        for index in (0, 1)
    ]
    said = [process.communicate(timeout=300) for process in running]
    assert [process.returncode for process in running] == [0, 0], said
    assert [out for out, _ in said] == ["", ""] and "tok/s" not in said[1][1]
    got = np.load(tmp_path / "out0.npy")[:, -3:]
    np.testing.assert_array_equal(got, known["gen_tokens"][:1, :3])
    assert not (tmp_path / "out1.npy").exists()


def test_who_does_not_come_is_named_to_those_who_did():
    where, faults = f"127.0.0.1:{free_port()}", {}

    def come(index):
        with pytest.raises(Lost) as error, join(where, 3, index, patience=2):
            pass
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
    fault = f"process 0 of 2 did not answer at {where} within 1 s"
    with pytest.raises(Lost, match=fault), join(where, 2, 1, patience=1):
        pass


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
    with pytest.raises(UserError, match=message), join(coordinator, processes, index, patience=1):
        pass


def test_a_port_that_is_taken_is_said():
    with socket.create_server(("", 0)) as taken:
        where = f"127.0.0.1:{taken.getsockname()[1]}"
        fault = "cannot listen there.*choose another port"
        with pytest.raises(UserError, match=fault), join(where, 2, 0, patience=1):
            pass
