"""A run that is killed, stopped or finds no room is, once finished, the run without all that."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from kimijax.checkpoint import restore_latest
from kimijax.train import Saves, fit
from tests.test_loop import said
from tests.toy import STEPS, phases, start

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run that nothing happened to."""
    out = tmp_path_factory.mktemp("whole")
    fit(start(), phases(), out, {}, saves=Saves(every=2))
    return out


def run(out: Path, *more: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "tests.toy", "--out", str(out), *more],
        cwd=ROOT, env=os.environ | {"TQDM_DISABLE": "1"}, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True,
    )


def finish(process: subprocess.Popen) -> tuple[int, str]:
    said, _ = process.communicate(timeout=60)
    return process.returncode, said


def lines(out: Path) -> int:
    log = out / "metrics.jsonl"
    return log.read_text().count("\n") if log.exists() else 0


def until(process: subprocess.Popen, ready) -> bool:
    """Whether it came so far before it ended."""
    while process.poll() is None:
        if ready():
            return True
        time.sleep(0.0005)
    return False


def assert_same(out: Path, whole: Path):
    assert said(out) == said(whole)
    got, want = (restore_latest(at / "state", start()) for at in (out, whole))
    assert (got.step, got.beside) == (want.step, want.beside) == (sum(STEPS), want.beside)
    np.testing.assert_array_equal(got.state.params["w"], want.state.params["w"])


def kill_until_done(out: Path, seed: int, kills: int) -> int:
    """Kill at random moments, every other time while a state is written; how often one was."""
    rng, halves = random.Random(seed), 0
    for i in range(kills):
        process, far = run(out), lines(out) + rng.randint(1, 5)
        if until(process, lambda far=far: lines(out) >= far):
            if i % 2:
                time.sleep(rng.uniform(0, 0.2))
            elif until(process, lambda: any((out / "state").glob("*.tmp"))):
                time.sleep(rng.uniform(0, 0.03))
        process.send_signal(signal.SIGKILL)
        assert finish(process)[0] in (-signal.SIGKILL, 0)
        halves += any((out / "state").glob("*.tmp"))
    code, error = finish(run(out))
    assert code == 0, error
    return halves


def test_a_run_killed_at_random_moments_is_the_run_that_was_not(whole, tmp_path):
    assert kill_until_done(tmp_path / "run", seed=1, kills=3) > 0
    assert_same(tmp_path / "run", whole)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 7))
def test_runs_killed_twenty_times(whole, tmp_path, seed):
    assert kill_until_done(tmp_path / "run", seed, kills=4) > 0
    assert_same(tmp_path / "run", whole)


def test_a_signal_stops_after_the_step_and_a_second_one_at_once(whole, tmp_path):
    process = run(tmp_path)
    assert until(process, lambda: lines(tmp_path) >= 5)
    process.send_signal(signal.SIGTERM)
    assert finish(process)[0] == 130
    assert restore_latest(tmp_path / "state", start()).step == lines(tmp_path) < sum(STEPS)
    process, far = run(tmp_path), lines(tmp_path) + 3
    assert until(process, lambda: lines(tmp_path) >= far)
    process.send_signal(signal.SIGSTOP)  # both signals come within one step
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGCONT)
    code, text = finish(process)
    assert code == 130 and "stopped without saving; the same command goes on" in text
    assert "state saved" not in text
    assert restore_latest(tmp_path / "state", start()).step <= lines(tmp_path) < sum(STEPS)
    assert finish(run(tmp_path)) == (0, "")
    assert_same(tmp_path, whole)


def test_a_full_disk_is_said_in_one_line_and_the_checkpoints_stay(whole, tmp_path):
    code, error = finish(run(tmp_path, "--full_at", "5"))  # during step 6, which is saved
    assert code == 2 and error.count("\n") == 1, error
    assert error.startswith(f"error: {tmp_path / 'state' / 'step_00000006'}: cannot save the state")
    assert error.endswith(": File too large; make room, earlier checkpoints are whole\n")
    left = sorted(path.name for path in (tmp_path / "state").iterdir())
    assert left == ["step_00000002", "step_00000004"]
    assert restore_latest(tmp_path / "state", start()).step == 4
    assert finish(run(tmp_path)) == (0, "")
    assert_same(tmp_path, whole)
    assert json.loads((tmp_path / "run.json").read_text()) == {}
