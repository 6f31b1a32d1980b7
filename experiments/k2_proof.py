"""Do a training step and a decoding step of Kimi K2 at two million tokens fit 512 TPU chips?

Ask     Bytes per chip, all 61 layers, one row of 2,097,152 tokens: of forward and backward, or of
        one more token behind a cache of so many.
Run     python -m experiments.k2_proof [--job train|decode] [--tokens 2097152]
Cost    about two minutes on 2 cores (decode: 15 s); needs libtpu (the extra [aot]) and no TPU.
Answer  v5p:8x8x8, of 95.7 GB. train: 6.9 GiB of arguments and 26.8 GiB of temporaries; without
        computing layers a second time 543 GB of temporaries: it does not fit. decode: 51.4 GiB of
        arguments and 0.18 GiB of temporaries.

Weights in bfloat16. train: dealt over data and seq, experts over expert = 4; zigzag; a step of
gradients without an optimizer. decode: experts over expert = 64, other weights on every chip.
Compiled by the TPU's own compiler, not run: no time is measured.
"""

import argparse
import os

from kimijax.cli import run_module

# Read once, when jax and libtpu are loaded.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

TOPOLOGY = "v5p:8x8x8"
SIZES = {"train": {"seq": 128, "expert": 4}, "decode": {"seq": 8, "expert": 64}}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the proof."""
    parser.add_argument("--job", choices=sorted(SIZES), default="train")
    parser.add_argument("--tokens", type=int, default=2**21)


def main(args: argparse.Namespace) -> int:
    """Lower by shapes, compile, print what the compiler says."""
    from kimijax import presets
    from kimijax.parallel.mesh import topology_mesh
    from kimijax.parallel.plan import Plan

    mesh, train = topology_mesh(TOPOLOGY, SIZES[args.job]), args.job == "train"
    plan = Plan(mesh, order="zigzag" if train else "contiguous", train=train, remat=train)
    build = {"train": training, "decode": decoding}[args.job]
    memory = build(presets.kimi_k2(), plan, args.tokens).compile().memory_analysis()
    for what in ("argument", "temp", "output"):
        size = getattr(memory, f"{what}_size_in_bytes") / 2**30
        print(f"{what}: {size:.2f} GiB per chip of {TOPOLOGY}")
    return 0


def shapes(tree, places, dtype=None):
    """Arrays that lie at their places, of which there are no numbers."""
    import jax

    return jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, dtype or x.dtype, sharding=place),
        tree, places,
    )


def weights(cfg, plan):
    """(the model of a plan, its weights in bfloat16)"""
    import flax.linen as nn
    import jax.numpy as jnp

    from kimijax.model import Model, abstract_params
    from kimijax.ops.attend import local

    found = nn.unbox(abstract_params(Model(cfg, local())))
    return Model(cfg, plan.ops(), jnp.bfloat16), shapes(found, plan.shardings(cfg), jnp.bfloat16)


def training(cfg, plan, tokens: int):
    """Loss and gradients of a row of tokens, lowered."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec

    model, params = weights(cfg, plan)
    row = NamedSharding(plan.mesh, PartitionSpec(None, plan.axes.tokens))
    tokens = jax.ShapeDtypeStruct((1, tokens), jnp.int32, sharding=row)

    def loss(params, ids, pos, seg, targets):
        hidden = model.apply(params, ids, pos, seg, runs=2 * plan.ways).hidden
        logits = model.apply(params, hidden, method="head")
        right = jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
        return jnp.mean(jax.nn.logsumexp(logits, -1) - right)

    step = jax.jit(jax.value_and_grad(loss), out_shardings=(None, plan.shardings(cfg)))
    return step.lower(params, *[tokens] * 4)


def decoding(cfg, plan, tokens: int):
    """Logits of one token behind a cache of `tokens`, and the cache with it, lowered."""
    import functools

    import jax
    import jax.numpy as jnp

    from kimijax.cache import empty_cache

    model, params = weights(cfg, plan)
    cache = jax.eval_shape(
        functools.partial(empty_cache, cfg, 1, tokens, jnp.bfloat16, plan.ways)
    )
    one = jax.ShapeDtypeStruct((1, 1), jnp.int32)

    def step(params, cache, token):
        out = model.apply(params, token, cache=cache, fresh=jnp.ones(token.shape, bool))
        logits = model.apply(params, out.hidden[:, -1], method="head")
        return logits, plan.ops().deal(out.cache)

    step = jax.jit(step, donate_argnums=1)
    return step.lower(params, shapes(cache, plan.cache_shardings(cache)), one)


if __name__ == "__main__":
    run_module(add_arguments, main, __doc__)
