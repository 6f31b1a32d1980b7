"""What does the ring of latents send and keep, and does the compiler hide what it sends?

Ask     Bytes sent next to a ring of expanded keys and values; temporaries from 4 to 64 chips;
        what runs between the start and the arrival of a send.
Run     python -m experiments.ring_proof [--only bytes,memory,order] [--tokens 8192]
Cost    about three minutes on 2 cores; bytes alone, which need no libtpu, ten seconds.
Answer  printed, a line per figure; the exit code is 1 if one misses its bound.

Programs are compiled at the heads of Kimi K2 and read, not run: bytes for 8 virtual CPU devices,
the rest for TPU v5p by libtpu (the extra [aot]), which needs no TPU. No time is measured.

At 2,048 tokens a chip the gradient of the last hop but one is sent after the last attention, where
nothing hides it: the exit code is 1. At 8,192 all are hidden. Rings of other sizes: not compiled.
"""

import argparse
import functools
import os

from kimijax.cli import run_module
from kimijax.errors import UserError
from kimijax.planner import hlo

# Read once, when jax and libtpu are loaded.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

HEADS, NOPE, ROPE, VALUE, RANK = 64, 128, 64, 128, 512
SHARE = 64  # tokens per device where bytes are counted
FORWARD, BOTH, GROWTH = 30, 20, 0.02  # the bounds
CHIPS = {4: "v5p:2x2x1", 64: "v5p:4x4x4"}


def ring_text(mesh, tokens: int, *, expanded: bool = False, grads: bool = False) -> tuple:
    """(text, temporary bytes) of the compiled ring over the mesh axis seq, per device.

    tokens    per device
    expanded  keys and values of every head travel, instead of latents
    grads     forward and backward, instead of forward
    """
    import jax

    from kimijax.parallel.attend import sharded
    from kimijax.parallel.axes import Axes
    from kimijax.parallel.sources import HEADS as KEYS
    from kimijax.parallel.sources import LATENTS

    axes = Axes(mesh)
    impl = "pallas" if mesh.devices.flat[0].platform == "tpu" else "xla"
    attend = sharded(axes, "ring", KEYS if expanded else LATENTS, impl, (NOPE + ROPE) ** -0.5)

    def both(floats, where, d_out):
        join = lambda a, b: a._replace(**b)  # noqa: E731
        call = lambda q, kv, up: attend(join(q, where[0]), join(kv, where[1]), up).out  # noqa: E731
        out, pull = jax.vjp(call, *floats)
        return out, pull(d_out)

    args, d_out = _inputs(axes, tokens * mesh.shape["seq"], expanded)
    if grads:
        lowered = jax.jit(both).lower(*_split(args), d_out)
    else:
        lowered = jax.jit(attend).lower(*args)
    compiled = lowered.compile()
    return compiled.as_text(), compiled.memory_analysis().temp_size_in_bytes


def _inputs(axes, length: int, expanded: bool):
    """Shapes of (queries, what travels, weights) at K2's heads, and of the output's gradient."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec

    from kernels_pallas.attention import Keys, Queries
    from kimijax.ops.attend import Latents

    def array(*shape, dtype=jnp.bfloat16):
        spec = axes.queries() if len(shape) == 4 else axes.keys()
        spec = spec if shape[0] == 1 else PartitionSpec()
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(axes.mesh, spec))

    heads = functools.partial(array, 1, length, HEADS)
    places = (array(1, length, dtype=jnp.int32),) * 2
    d_out = heads(VALUE, dtype=jnp.float32)
    if expanded:
        q = Queries(heads(NOPE + ROPE), None, *places, places[0])
        return (q, Keys(heads(NOPE + ROPE), heads(VALUE), None, *places), ()), d_out
    q = Queries(heads(NOPE), heads(ROPE), *places, places[0])
    kv = Latents(array(1, length, RANK), array(1, length, ROPE), *places)
    return (q, kv, (array(RANK, HEADS, NOPE), array(RANK, HEADS, VALUE))), d_out


def _split(args):
    """The arrays that have gradients, and by name those that have none."""
    q, kv, up = args
    where = [{k: v for k, v in x._asdict().items() if k in ("pos", "seg", "since")}
             for x in (q, kv)]
    bare = [x._replace(**dict.fromkeys(w)) for x, w in zip((q, kv), where, strict=True)]
    return (*bare, up), where


def saved(grads: bool) -> tuple[float, float, float]:
    """Bytes a token of latents and of expanded keys costs each device in a ring of 8; the ratio."""
    from kimijax.parallel.mesh import make_mesh

    mesh = make_mesh({"seq": 8})
    ours, theirs = (
        hlo.sent_bytes(hlo.parse(ring_text(mesh, SHARE, expanded=e, grads=grads)[0])) / SHARE
        for e in (False, True)
    )
    return ours, theirs, theirs / ours


def check_bytes(tokens: int) -> bool:
    """Forward, and forward and backward. Per token, whatever `tokens` a device holds."""
    del tokens
    good = True
    for grads, bound in ((False, FORWARD), (True, BOTH)):
        ours, theirs, ratio = saved(grads)
        what = "forward and backward" if grads else "forward"
        print(f"bytes {what}: {ours:.0f} a token of the device's, expanded {theirs:.0f}: "
              f"1/{ratio:.1f}, want 1/{bound}")
        good &= ratio >= bound
    return good


@functools.cache
def on_chips(chips: int, tokens: int) -> tuple:
    """The forward and backward program of so many TPU chips."""
    from kimijax.parallel.mesh import topology_mesh

    return ring_text(topology_mesh(CHIPS[chips], {"seq": chips}), tokens, grads=True)


def check_memory(tokens: int) -> bool:
    """Temporaries of forward and backward, tokens per chip fixed."""
    few, many = (on_chips(chips, tokens)[1] for chips in CHIPS)
    growth = many / few - 1
    print(f"memory: {few / 2**20:.1f} MiB of temporaries on 4 chips, {many / 2**20:.1f} on 64: "
          f"{growth:+.2%}, want less than {GROWTH:.0%}")
    return growth < GROWTH


def check_order(tokens: int) -> bool:
    """Every piece of the two programs that sends."""
    good = True
    for chips in CHIPS:
        program = hlo.parse(on_chips(chips, tokens)[0])
        for name, ops in program.computations.items():
            if any(op.kind in hlo.SENDS for op in ops.values()):
                hidden, lines = hops(ops, f"[1,{tokens},{RANK}]")
                print(f"order on {chips} chips, {name}: {'hidden' if hidden else 'NOT HIDDEN'}")
                print("\n".join(f"    {line}" for line in lines))
                good &= hidden
    return good


def hops(ops: dict[str, hlo.Op], latents: str) -> tuple[bool, list[str]]:
    """Whether attention runs while latents or their gradients travel; and the sequence.

    latents  the dims of a device's latents
    Attention is a kernel, or a conditional around it. Rotary keys and positions are a ninth of the
    bytes, and are left out. After the last attention the gradients go home, in one send: nothing is
    left to hide it.
    """
    large = [f for f in hlo.flights(ops) if latents in f.shape]
    order = list(ops.values())
    work = [
        i for i, op in enumerate(order)
        if op.kind == "conditional" or op.kind == "custom-call" and "latent_attention" in op.name
    ]
    events = [(i, "attend") for i in work]
    for f in large:
        kind = "gradient" if f.shape.startswith("f32") else "latent"
        events += [(f.start, f"start {kind}"), (f.done, f"done {kind}")]
    bare = [f for f in large if not any(f.start < i < f.done for i in work)]
    home = [f for f in bare if f.start > max(work)]
    return len(bare) == len(home) <= 1, [what for _, what in sorted(events)]


CHECKS = {"bytes": check_bytes, "memory": check_memory, "order": check_order}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the proof."""
    parser.add_argument("--only", default=",".join(CHECKS), metavar="CHECK[,CHECK...]")
    parser.add_argument("--tokens", type=int, default=8192, help="per chip, for memory and order")


def main(args: argparse.Namespace) -> int:
    """Print every figure; 1 if one misses its bound."""
    wanted = args.only.split(",")
    if unknown := sorted(set(wanted) - set(CHECKS)):
        raise UserError(f"--only {unknown[0]!r:.40}: there are {', '.join(CHECKS)}")
    return 0 if all([CHECKS[name](args.tokens) for name in wanted]) else 1


if __name__ == "__main__":
    run_module(add_arguments, main, __doc__)
