"""Prints, as JSON, the collectives of a training step of two small layers, as a TPU compiles it.

With an optimizer that needs none: Muon's matrices would be half of what there is to compile. A
process of its own: flags that tests set for a CPU would reach the compiler too.
"""

import dataclasses
import json
import tempfile

import jax
import jax.numpy as jnp
import optax

from kernels_pallas import aot
from kimijax import presets
from kimijax.config import ModelConfig
from kimijax.config_tree import override
from kimijax.model import Model
from kimijax.parallel.mesh import topology_mesh
from kimijax.planner import hlo
from kimijax.planner.job import Job, layout, shapes
from kimijax.planner.programs import rows
from kimijax.train.loss import language_model
from kimijax.train.rows import Rows
from kimijax.train.state import init_shapes, state_shardings
from kimijax.train.step import make_step

WIDTH, FFN, EXPERTS, TOKENS = 512, 256, 8, 4096
MESH = {"seq": 4, "expert": 2}  # the devices of seq wind through two dims of the torus
COMPUTES = ("fusion", "custom-call", "while")


def layers() -> ModelConfig:
    """Two layers of K2, made small."""
    mixer = {"heads": 2, "q_rank": None, "kv_rank": 128}
    ffn = {"experts": EXPERTS, "top_k": 2, "width": FFN, "shared_width": FFN}
    cfg = override(presets.kimi_k2(), {
        "width": WIDTH, "vocab": 1024,
        **{f"groups.1.layers.0.{part}.{name}": n for part, sizes in (("mixer", mixer), ("ffn", ffn))
           for name, n in sizes.items()},
    })
    return dataclasses.replace(cfg, groups=(dataclasses.replace(cfg.groups[1], repeat=2),))


def lower(job: Job) -> jax.stages.Lowered:
    """Eight chips, one row."""
    plan = layout(job, topology_mesh("v5p:2x2x2", MESH))
    model, optimizer = Model(job.cfg, plan.ops(), jnp.dtype(job.dtype)), optax.sgd(1e-3)
    where = state_shardings(model, optimizer, plan)
    ids, runs = rows(job, plan)
    weight = jax.ShapeDtypeStruct(ids.shape, jnp.float32, sharding=ids.sharding)
    step = make_step(language_model(model, runs=runs), optimizer, where=where)
    state = shapes(init_shapes(model, optimizer), where)
    return step.lower(state, Rows(ids, ids, ids, ids, weight))


def meanwhile(program: hlo.Program) -> list[dict]:
    """What computes between the start and the arrival of each gather that a SparseCore does."""
    found = []
    for ops in program.computations.values():
        order = list(ops)
        for op in ops.values():
            if op.kind == "async-done" and "all-gather" in op.name:
                between = order[order.index(op.operands[0]) + 1 : order.index(op.name)]
                kinds = {ops[name].kind for name in between} & set(COMPUTES)
                found.append({"shape": op.shape.split("{")[0], "kinds": sorted(kinds)})
    return found


def main() -> None:
    """Compile it for chips that are not there."""
    lowered = lower(Job(layers(), "train", TOKENS))
    with tempfile.TemporaryDirectory() as folder:
        lowered.compile(compiler_options={"xla_dump_to": folder})
        program = hlo.parse(aot.program_text(folder))
    print(json.dumps({
        "collectives": [
            {"kind": c.kind, "asynchronous": c.asynchronous, "shape": c.op.shape.split("{")[0],
             "loops": c.loops} for c in hlo.collectives(program)
        ],
        "gathers": meanwhile(program),
    }))


if __name__ == "__main__":
    main()
