"""Implementations side by side: the same answer, in turns, and a reason for those that are not."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import bench, beside
from kernels_pallas.attention import gpu_peers as attention_peers
from kernels_pallas.grouped_matmul import gpu_peers as grouped_peers

HOW = {"rounds": 2, "least": 0.0}


@pytest.fixture(scope="module")
def best():
    return beside.rates(64, 1024)


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """Without other packages, whether they are installed or not."""
    for name in ("torch", "tokamax"):
        monkeypatch.setitem(sys.modules, name, None)


def by_impl(shape, best):
    return {row["impl"]: row for row in beside.rows("op", "case", shape, best, **HOW)}


@pytest.mark.parametrize("shape", [
    lambda: attention_peers.shape_of(t=32, h=2, n=32, p=16, v=32),
    lambda: grouped_peers.shape_of(m=32, g=3, k=32, n=16),
], ids=["attention", "grouped_matmul"])
def test_ours_agrees_with_others_and_the_rest_say_why_not(shape, best):
    got = by_impl(shape(), best)
    there = {"xla", "jax_nn_xla", "jax_ragged_dot"} & set(got)
    assert len(there) == 2
    for name in there:
        row = got.pop(name)
        assert "error" not in row and 0 <= row["off"] < 0.02
        assert min(row[x] for x in ("ms", "times", "of_matmul", "of_copy")) > 0
    assert got.pop("(matmul)")["unit"] == "FLOP" and got.pop("(copy)")["rate"] > 0
    assert len(got) >= 3 and all(row["absent"] for row in got.values())
    for name, row in got.items():
        if name.startswith(("torch", "tokamax")):
            assert row["absent"].startswith("not installed: "), row
        else:
            assert not row["absent"].startswith("not installed"), row


def test_a_wrong_answer_is_an_error_and_a_refusal_a_reason(best):
    x = jnp.arange(8.0)

    def refuse():
        raise ValueError("odd\nheads")

    shape = beside.Shape({
        "xla": lambda: beside.of_jax(jnp.negative, x), "wrong": lambda: beside.of_jax(jnp.abs, x),
        "none": refuse,
    }, 16.0, 64.0)
    got = by_impl(shape, best)
    assert got["xla"]["off"] == 0 and got["xla"]["times"] == 1
    assert got["wrong"]["error"] == "differs from xla by 2 of its largest number"
    assert got["none"]["absent"] == "ValueError: odd heads"
    assert by_impl(shape._replace(makers={"xla": refuse}), best)["xla"]["error"]


def test_turns_alternate_and_a_quick_call_is_repeated(monkeypatch):
    clock, log = [0.0], []
    monkeypatch.setattr(beside.time, "perf_counter", lambda: clock[0])

    def contender(name, cost):
        def start():
            log.append(name)
            clock[0] += cost

        return beside.Contender(start, lambda x: x, np.asarray)

    got = beside.seconds({"a": contender("a", 1.0), "b": contender("b", 4.0)}, rounds=3, least=2.0)
    assert "".join(log) == "aabb" + "aab" + "baa" + "aab"
    np.testing.assert_allclose(got["b"] / got["a"], 4.0)


def test_a_gpu_has_its_own_table(monkeypatch, capsys, best):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    shape = attention_peers.shape_of(t=32, h=1, n=16, p=0, v=16)
    monkeypatch.setattr(attention_peers, "SHAPES", {"tiny": lambda: shape._replace(
        makers={k: shape.makers[k] for k in ("xla", "tokamax_triton")})})
    monkeypatch.setattr(beside, "rates", lambda: best)
    monkeypatch.setattr(bench, "timed", lambda names: [{
        "op": names[0], "case": "c", "impl": "xla", "ms": 1.0, "gflops": 1.0, "of_peak": 1.0}])
    assert bench.main(["attention", "kda"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert "of matmul" in said[0] and "(matmul)" in said[1] and "TFLOP/s" in said[1]
    assert said[3].split()[:3] == ["attention", "tiny", "xla"]
    assert "not installed" in said[4] and "GFLOP/s" in said[5] and said[6].startswith("kda")
