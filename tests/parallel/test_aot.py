"""Programs of a mesh of TPU chips that are not there: what their compiler says of memory."""

import json
import os
import subprocess
import sys

import pytest

from kernels_pallas import aot
from tests.parallel.aot_decode import TOKENS

pytestmark = pytest.mark.skipif(aot.available() is not None, reason=str(aot.available()))


def test_a_token_behind_a_long_cache_copies_none_of_it():
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | aot.environment()
    done = subprocess.run(
        [sys.executable, "-m", "tests.parallel.aot_decode"], env=env, text=True,
        capture_output=True, timeout=120,
    )
    assert done.returncode == 0, done.stderr[-500:]
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["cache"] >= 4 * TOKENS * 576 * 2
    assert said["temp"] < 0.02 * said["cache"]
