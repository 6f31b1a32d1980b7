"""Programs of a mesh of TPU chips that are not there: what their compiler says of memory."""

import json
import os
import subprocess
import sys

import pytest

from kernels_pallas import aot
from tests.parallel.aot_decode import TOKENS

pytestmark = pytest.mark.skipif(aot.available() is not None, reason=str(aot.available()))


def test_a_token_copies_nothing_of_a_long_cache_or_of_the_experts():
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | aot.environment()
    done = subprocess.run(
        [sys.executable, "-m", "tests.parallel.aot_decode"], env=env, text=True,
        capture_output=True, timeout=120,
    )
    assert done.returncode == 0, done.stderr[-500:]
    dense, experts = map(json.loads, done.stdout.splitlines()[-2:])
    assert dense["cache"] >= 4 * TOKENS["dense"] * 576 * 2
    assert dense["temp"] < 0.02 * dense["cache"]
    one = 192 * 3 * 7168 * 2048 * 2  # bytes of a layer's experts on a chip
    assert experts["weights"] >= 2 * one
    assert experts["temp"] < 0.02 * one
