"""Programs of a mesh of TPU chips that are not there: what their compiler says of them."""

import json
import os
import subprocess
import sys

import pytest

from kernels_pallas import aot
from tests.parallel import aot_train
from tests.parallel.aot_decode import TOKENS

pytestmark = pytest.mark.skipif(aot.available() is not None, reason=str(aot.available()))


def said_by(module: str, lines: int) -> list[dict]:
    """The last lines that a module of these tests prints."""
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | aot.environment()
    done = subprocess.run(
        [sys.executable, "-m", f"tests.parallel.{module}"], env=env, text=True,
        capture_output=True, timeout=300,
    )
    assert done.returncode == 0, done.stderr[-500:]
    return [json.loads(line) for line in done.stdout.splitlines()[-lines:]]


def test_a_token_copies_nothing_of_a_long_cache_or_of_the_experts():
    dense, int8, experts = said_by("aot_decode", 3)
    assert dense["cache"] >= 4 * TOKENS["dense"] * 576 * 2
    assert 1 <= int8["cache"] / (8 * TOKENS["dense"] * (512 + 4 + 64 * 2)) < 1.05
    for said in (dense, int8):
        assert said["temp"] < 0.02 * said["cache"]
    one = 192 * 3 * 7168 * 2048 * 2  # bytes of a layer's experts on a chip
    assert experts["weights"] >= 2 * one
    assert experts["temp"] < 0.02 * one


@pytest.fixture(scope="module")
def step():
    """What the compiler says of a training step."""
    return said_by("aot_train", 1)[0]


def test_a_layer_computes_while_weights_come(step):
    """No chip waits for a gather in the loop over layers, or for a hop of the ring."""
    looped = [c for c in step["collectives"] if c["loops"]]
    sends = {"all-gather", "reduce-scatter", "collective-permute"}
    assert {c["kind"] for c in looped} >= sends
    assert [c for c in looped if c["kind"] in sends and not c["asynchronous"]] == []
    assert all(gather["kinds"] for gather in step["gathers"])

    # Experts' come as bfloat16, those of the forward pass while the ring attends.
    t, held = aot_train, aot_train.EXPERTS // 2
    matrices = {f"bf16[1,{held},{t.WIDTH},{t.FFN}]", f"bf16[1,{held},{t.FFN},{t.WIDTH}]"}
    large = [gather for gather in step["gathers"] if gather["shape"] in matrices]
    assert len(large) == 6
    assert sum("while" in gather["kinds"] for gather in large) == 3
    shapes = [c["shape"] for c in looped if c["kind"] == "all-gather"]
    assert not {name.replace("bf16", "f32") for name in matrices} & set(shapes)

    # All projections of a layer come as one array, in the forward pass and in the backward.
    mla, whole = t.layers().layers[0].mixer, f"bf16[{t.WIDTH},"
    sizes = mla.heads * (mla.nope_dim + mla.rope_dim + mla.v_dim), mla.kv_rank, mla.rope_dim
    side_by_side = f"{whole}{sum(sizes) + 3 * t.FFN}]"
    assert [shape for shape in shapes if shape.startswith(whole)] == 2 * [side_by_side]


def test_a_backward_pass_attends_no_second_time(step):
    """Layers are computed again, attention is kept: the ring goes round once each way."""
    hops = [c for c in step["collectives"] if c["kind"] == "collective-permute" and c["loops"]]
    latents = f"(bf16[1,{aot_train.TOKENS // 8},{aot_train.layers().layers[0].mixer.kv_rank}]"
    rings = {c["loops"][-1] for c in hops if c["shape"] == latents and len(c["loops"]) > 1}
    assert len(rings) == 2


def test_tokens_go_to_experts_and_back_once_a_layer(step):
    """The forward pass, and the backward with the layer computed again."""
    n, width = aot_train.TOKENS // 8, aot_train.WIDTH
    ways = {"all-gather": f"bf16[1,{2 * n},{width}]", "reduce-scatter": f"bf16[1,{n},{width}]"}
    found = {}
    for c in step["collectives"]:
        if c["loops"] and c["shape"] == ways.get(c["kind"]):
            found.setdefault(c["loops"][0], []).append(c["kind"])
    there, back = "all-gather", "reduce-scatter"
    assert sorted(map(sorted, found.values())) == [[there, there, back], [there, back]]
