"""Closed forms of the planner against the compiler of TPUs, for a model with K2's layers."""

import dataclasses
import json
import os
import subprocess
import sys

import pytest

from kernels_pallas import aot
from kimijax import presets
from kimijax.config import ModelConfig
from kimijax.config_tree import override, to_dict
from kimijax.planner.chips import pod_of

pytestmark = pytest.mark.skipif(aot.available() is not None, reason=str(aot.available()))
PLAN = "from kimijax.cli import run; run()"
RAGGED = """
import sys
import jax, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P
from kimijax.parallel.exchange import not_ragged
from kimijax.parallel.mesh import topology_mesh

mesh = topology_mesh(sys.argv[1], {"expert": 16, "seq": int(sys.argv[2])})
print("ragged" if not_ragged(mesh) is None else "padded")
send = lambda x, n: jax.lax.ragged_all_to_all(x, x, n, n, n, n, axis_name="expert")
send = jax.shard_map(
    send, mesh=mesh, in_specs=(P(mesh.axis_names), P()), out_specs=P(mesh.axis_names),
    check_vma=False,
)
shape = lambda size, dtype, spec: jax.ShapeDtypeStruct(
    size, dtype, sharding=NamedSharding(mesh, spec)
)
x = shape((64 * mesh.size, 2, 128), jnp.bfloat16, P(mesh.axis_names))
jax.jit(send).lower(x, shape((16,), jnp.int32, P())).compile()
"""


def small_k2() -> ModelConfig:
    """K2's layers at a seventh of its width: one dense and six with 32 experts."""
    cfg = override(presets.kimi_k2(), {
        "width": 1024, "vocab": 16_384, "groups.0.layers.0.ffn.width": 4096,
        **{f"groups.{i}.layers.0.mixer.{name}": n for i in (0, 1)
           for name, n in (("heads", 8), ("q_rank", 512))},
        **{f"groups.1.layers.0.ffn.{name}": n
           for name, n in (("experts", 32), ("width", 1024), ("shared_width", 1024))},
    })
    return dataclasses.replace(
        cfg, groups=(cfg.groups[0], dataclasses.replace(cfg.groups[1], repeat=6))
    )


@pytest.fixture
def plan(tmp_path):
    """`kimijax plan --prove` of a small model: (exit code, what it wrote, its stderr)."""
    # Flags that tests set for a CPU would reach the compiler too.
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | aot.environment()

    def run(*args, cfg=None):
        (tmp_path / "config.json").write_text(json.dumps(to_dict(cfg or small_k2())))
        file = tmp_path / "plan.json"
        command = [sys.executable, "-c", PLAN, "plan", "--model", str(tmp_path), "--prove"]
        command += ["--json", str(file), *args]
        done = subprocess.run(command, env=env, text=True, capture_output=True, timeout=900)
        assert file.exists(), done.stderr[-500:]
        return done.returncode, json.loads(file.read_text()), done.stderr

    return run


@pytest.mark.parametrize(
    "job, args",
    [
        ("decode", "--context 4194304 --topology v5p:2x2x1 --mesh seq=2,expert=2 --weights int4"),
        ("decode", "--context 4194304 --topology v5p:2x2x1 --mesh seq=2,expert=2 --cache int8"),
        pytest.param("prefill", "--context 524288 --topology v6e:2x2 --mesh seq=2,expert=2 "
                     "--chunk 65536 --cache int8", marks=pytest.mark.slow),
        pytest.param("prefill", "--context 32768 --topology v5p:2x2x1 --mesh seq=2,expert=2",
                     marks=pytest.mark.slow),
        pytest.param("prefill", "--context 524288 --topology v5p:2x2x1 --mesh seq=2,expert=2 "
                     "--chunk 65536", marks=pytest.mark.slow),
        pytest.param("decode", "--context 4194304 --topology v6e:2x2 --mesh seq=2,expert=2",
                     marks=pytest.mark.slow),
        # More chips of v5e than a ragged exchange is compiled for.
        pytest.param("prefill", "--context 524288 --topology v5e:8x8 --mesh seq=4,expert=16",
                     marks=pytest.mark.slow),
    ],
)
def test_the_closed_form_is_near_what_is_proven(plan, job, args):
    code, said, _ = plan("--job", job, *args.split())
    form, proven = said["closed_form"], said["proven"]
    assert code == 0 and proven["fits"] and proven["compile_seconds"] > 0
    assert form["bytes_per_chip"] == pytest.approx(proven["bytes_per_chip"], rel=0.1)
    kinds = {c["kind"] for c in proven["collectives"]}
    rings = job == "prefill" and "--chunk" not in args
    assert kinds >= ({"collective-permute"} if rings else {"all-reduce"})
    assert said["exchange"] != ["padded"] or "all-to-all" in kinds


@pytest.mark.slow
def test_the_closed_form_of_a_training_step_is_near_what_is_proven(plan):
    """Four layers of K2 as they are: formulas of temporaries are for layers of that size."""
    cfg = presets.kimi_k2()
    cfg = dataclasses.replace(
        cfg, groups=(cfg.groups[0], dataclasses.replace(cfg.groups[1], repeat=3))
    )
    args = "--job train --context 262144 --topology v5p:4x4x4 --mesh seq=16,expert=4"
    code, said, _ = plan(*args.split(), cfg=cfg)
    form, proven = said["closed_form"], said["proven"]
    assert code == 0 and proven["fits"]
    assert form["bytes_per_chip"] == pytest.approx(proven["bytes_per_chip"], rel=0.1)
    late = [c for c in proven["collectives"] if c["kind"] in ("all-gather", "reduce-scatter")]
    assert late and all(c["asynchronous"] for c in late)


def test_what_does_not_fit_names_its_buffers(plan):
    code, said, errors = plan("--job", "prefill", "--context", "1048576", "--topology", "v5e:1x1",
                              "--mesh", "seq=1", "--weights", "bf16")
    proven = said["proven"]
    assert code == 3 and not proven["fits"] and "RESOURCE_EXHAUSTED" in proven["refused"]
    assert proven["bytes_per_chip"] > said["closed_form"]["memory_per_chip"]
    assert proven["largest_buffers"][0]["bytes"] > 2**28
    assert "Traceback" not in errors


@pytest.mark.parametrize("topology", ["v5e:4x4", "v5e:4x8", "v6e:4x8"])
def test_a_ragged_exchange_is_chosen_where_it_is_compiled(topology):
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | aot.environment()
    command = [sys.executable, "-c", RAGGED, topology, str(pod_of(topology).devices // 16)]
    done = subprocess.run(command, env=env, text=True, capture_output=True, timeout=300)
    assert done.stdout.split() == ["ragged" if done.returncode == 0 else "padded"], done.stderr
    refused = "Ragged all-to-all is currently not supported" in done.stderr
    assert refused == (done.returncode != 0), done.stderr[-500:]
