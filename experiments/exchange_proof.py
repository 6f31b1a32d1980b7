"""What do K2's routed experts hold on a chip when 64 chips share them, by either exchange?

Ask     Bytes per chip of one layer's routed experts, forward and forward with backward.
Run     python -m experiments.exchange_proof [--tokens 4096] [--only ragged]
Cost    10 minutes on 2 busy cores; needs libtpu (the extra [aot]) and no TPU.
Answer  v5p, 4096 tokens a chip: ragged 8.8 GiB of temporaries forward and 18.2 GiB with backward of
        95.7; gather 56.1 GiB forward, and 140.7 with backward: it does not fit.

384 experts on expert = 64, 8 choices a token, bfloat16; --tokens are those of a chip. Compiled by
the TPU's own compiler, not run: no time is measured. Most of what ragged saves, it saves by working
in rounds, which keeps the products of one eighth of the tokens at a time.
"""

import argparse
import os

from kimijax.cli import run_module
from kimijax.errors import UserError

# Read once, when jax and libtpu are loaded.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

TOPOLOGY, CHIPS = "v5p:4x4x4", 64
WIDTH, FFN, EXPERTS, CHOICES = 7168, 2048, 384, 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the proof."""
    parser.add_argument("--tokens", type=int, default=4096, help="of a chip")
    parser.add_argument("--only", help="gather or ragged; default: both")


def programs(exchange: str, tokens: int):
    """(name, what the compiler says) of one layer's experts, without and with gradients."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec

    from kimijax.parallel.mesh import topology_mesh
    from kimijax.parallel.plan import Plan

    plan = Plan(topology_mesh(TOPOLOGY, {"expert": CHIPS}), exchange=exchange)
    experts, token = plan.ops().experts, PartitionSpec(None, plan.axes.tokens)

    def array(spec, *shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(plan.mesh, spec))

    row, dealt = (1, tokens * CHIPS), PartitionSpec("expert")
    args = (
        array(token, *row, WIDTH),
        array(token, *row, CHOICES, dtype=jnp.int32),
        array(token, *row, CHOICES, dtype=jnp.float32),
        *(array(dealt, EXPERTS, *shape) for shape in ((WIDTH, FFN), (WIDTH, FFN), (FFN, WIDTH))),
    )

    def both(x, ids, weight, *matrices):
        y, pull = jax.vjp(lambda x, *rest: experts(x, ids, *rest), x, weight, *matrices)
        return y, pull(y)

    for name, f in (("forward", experts), ("forward and backward", both)):
        lowered = jax.jit(f).lower(*args)
        try:
            size = lowered.compile().memory_analysis().temp_size_in_bytes / 2**30
            yield name, f"{size:.1f} GiB of temporaries"
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            yield name, str(error).splitlines()[0]


def main(args: argparse.Namespace) -> int:
    """Compile by shapes, print what the compiler says."""
    from kimijax.parallel.exchange import EXCHANGES

    if args.only not in (None, *EXCHANGES):
        raise UserError(f"--only {args.only!r:.40}: there are {', '.join(EXCHANGES)}")
    for exchange in [args.only] if args.only else EXCHANGES:
        for name, said in programs(exchange, args.tokens):
            print(f"{exchange}, {name}, per chip of {TOPOLOGY}: {said}", flush=True)
    return 0


if __name__ == "__main__":
    run_module(add_arguments, main, __doc__)
