"""Does a training step of Kimi K2 at two million tokens fit 512 TPU chips?

Ask     Bytes per chip of forward and backward, all 61 layers, one row of 2,097,152 tokens.
Run     python -m experiments.k2_proof [--tokens 2097152]
Cost    about two minutes on 2 cores; needs libtpu (the extra [aot]) and no TPU.
Answer  v5p:8x8x8: 6.9 GiB of arguments and 26.5 GiB of temporaries of 95.7 GB. Without computing
        layers a second time 543 GB of temporaries: it does not fit.

Weights in bfloat16, dealt over data and seq, experts over expert = 4; zigzag; a step of gradients
without an optimizer. Compiled by the TPU's own compiler, not run: no time is measured.
"""

import argparse
import os

from kimijax.cli import run_module

# Read once, when jax and libtpu are loaded.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

TOPOLOGY, SIZES = "v5p:8x8x8", {"seq": 128, "expert": 4}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the proof."""
    parser.add_argument("--tokens", type=int, default=2**21)


def main(args: argparse.Namespace) -> int:
    """Lower by shapes, compile, print what the compiler says."""
    import flax.linen as nn
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec

    from kimijax import presets
    from kimijax.model import Model, abstract_params
    from kimijax.ops.attend import local
    from kimijax.parallel.mesh import topology_mesh
    from kimijax.parallel.plan import Plan

    cfg = presets.kimi_k2()
    plan = Plan(topology_mesh(TOPOLOGY, SIZES), order="zigzag", train=True, remat=True)
    model, places = Model(cfg, plan.ops(), jnp.bfloat16), plan.shardings(cfg)
    params = jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16, sharding=place),
        nn.unbox(abstract_params(Model(cfg, local()))), places,
    )
    row = NamedSharding(plan.mesh, PartitionSpec(None, plan.axes.tokens))
    tokens = jax.ShapeDtypeStruct((1, args.tokens), jnp.int32, sharding=row)

    def loss(params, ids, pos, seg, targets):
        hidden = model.apply(params, ids, pos, seg, runs=2 * plan.ways).hidden
        logits = model.apply(params, hidden, method="head")
        right = jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
        return jnp.mean(jax.nn.logsumexp(logits, -1) - right)

    step = jax.jit(jax.value_and_grad(loss), out_shardings=(None, places))
    memory = step.lower(params, *[tokens] * 4).compile().memory_analysis()
    for what in ("argument", "temp", "output"):
        size = getattr(memory, f"{what}_size_in_bytes") / 2**30
        print(f"{what}: {size:.1f} GiB per chip of {TOPOLOGY}")
    return 0


if __name__ == "__main__":
    run_module(add_arguments, main, __doc__)
