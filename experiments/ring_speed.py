"""How fast is the ring here and in the package ringattention, on eight virtual devices of a CPU?

Ask     Time of ringattention at its best chunk over ours in each order: forward, and forward with
        backward; the largest difference of the answers; how evenly an order spreads the work.
Run     make ring [ARGS="--tokens 8192 --rounds 5"]
        (or pip install --no-deps --target DIR ringattention==0.1.2, then
        PYTHONPATH=DIR python -m experiments.ring_speed [--tokens 8192] [--rounds 5])
Cost    about five minutes.
Answer  see the README's results.

Causal, float32, one row, 8 heads of 64, keys and values travel. Both sides are jitted, take and
give arrays that lie dealt out, and are measured in turn; the median of the rounds.
"""

import argparse
import functools
import os
import time
import types

from kimijax.cli import run_module

DEVICES, HEADS, DIM = 8, 8, 64
CHUNKS = (256, 512, 1024)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the measurement."""
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--run", type=int, default=64, help="tokens of a run in striped order")


def prepare() -> None:
    """Eight devices, one thread each; before jax is imported."""
    flag = f"--xla_force_host_platform_device_count={DEVICES}"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}"
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["NPROC"] = str(DEVICES)


def peer():
    """The package's ring attention; it asks for the platform through a module that jax dropped."""
    import jax

    jax.lib.xla_bridge = types.SimpleNamespace(
        get_backend=lambda: types.SimpleNamespace(platform=jax.default_backend())
    )
    import ringattention

    return ringattention.ringattention


def theirs(axes, chunk: int):
    """(q, key, value) -> output, by ringattention with chunks of `chunk` queries and keys."""
    import jax
    import jax.numpy as jnp

    ring, spec = peer(), axes.queries()
    how = {
        "causal_block_size": 1, "deterministic": True, "dropout_rng": None, "attn_pdrop": 0.0,
        "query_chunk_size": chunk, "key_chunk_size": chunk, "dtype": jnp.float32,
        "policy": jax.checkpoint_policies.nothing_saveable, "precision": None, "prevent_cse": True,
    }

    def local(q, key, value):
        return ring(q, key, value, None, None, None, axes.tokens, True, how)

    return jax.shard_map(
        local, mesh=axes.mesh, in_specs=(spec,) * 3, out_specs=spec, check_vma=False
    )


def ours(axes, places):
    """(q, key, value) -> output, by the ring of a plan over tokens that lie at `places`."""
    import jax.numpy as jnp

    from kernels_pallas.attention import Keys, Queries
    from kimijax.parallel.attend import sharded
    from kimijax.parallel.sources import HEADS as SOURCE

    pos = jnp.asarray(places, jnp.int32)[None]
    same = jnp.zeros_like(pos)
    attend = sharded(axes, "ring", SOURCE, "xla", DIM**-0.5)

    def call(q, key, value):
        queries = Queries(q, None, pos, same, same)
        return attend(queries, Keys(key, value, None, pos, same), ()).out

    return call


def both_passes(f):
    """(q, key, value, cotangent) -> the output and the gradients of all three."""
    import jax

    def call(q, key, value, cotangent):
        out, pull = jax.vjp(f, q, key, value)
        return out, *pull(cotangent)

    return call


def seconds(f, args) -> float:
    """Of one call, to the last device."""
    import jax

    began = time.perf_counter()
    jax.block_until_ready(f(*args))
    return time.perf_counter() - began


def rounds(calls: dict, count: int) -> dict[str, float]:
    """Median seconds by name of {name: (f, args)}, called in turn after one call each."""
    import numpy as np

    for f, args in calls.values():
        seconds(f, args)
    times = {name: [] for name in calls}
    for _ in range(count):
        for name, (f, args) in calls.items():
            times[name].append(seconds(f, args))
    return {name: float(np.median(t)) for name, t in times.items()}


def worst(got, want, back) -> float:
    """Largest difference of the arrays of `got`, brought back to the row's order, from `want`."""
    import numpy as np

    pairs = zip(got, want, strict=True)
    return max(float(np.abs(np.asarray(g)[:, back] - np.asarray(w)).max()) for g, w in pairs)


def main(args: argparse.Namespace) -> int:
    """Check that all give one answer, measure in turn, print the ratios."""
    prepare()
    import jax
    import numpy as np
    from jax.sharding import NamedSharding

    from kimijax.parallel.axes import Axes
    from kimijax.parallel.mesh import make_mesh
    from kimijax.parallel.order import ORDERS, device_work, make_order

    axes = Axes(make_mesh({"seq": DEVICES}))
    rng = np.random.default_rng(0)
    shape = (1, args.tokens, HEADS, DIM)
    arrays = [rng.normal(size=shape).astype(np.float32) for _ in range(4)]
    put = functools.partial(jax.device_put, device=NamedSharding(axes.mesh, axes.queries()))

    sides = {f"ringattention {c}": (theirs(axes, c), np.arange(args.tokens)) for c in CHUNKS}
    for kind in ORDERS:
        order = make_order(kind, args.tokens, DEVICES, args.run)
        work = device_work(order, DEVICES)
        print(f"{kind}: the busiest device has {work.max() / work.mean():.3f} of the mean work")
        sides[kind] = (ours(axes, order.places), order.places)

    forward, whole, want = {}, {}, None
    for name, (f, places) in sides.items():
        dealt = [put(x[:, places]) for x in arrays]
        forward[name] = (jax.jit(f), dealt[:3])
        whole[name] = (jax.jit(both_passes(f)), dealt)
        got = whole[name][0](*dealt)
        want = want or got
        error = worst(got, want, np.argsort(places))
        print(f"{name}: output and gradients at most {error:.1e} from {next(iter(sides))}")
    for title, calls in (("forward", forward), ("forward + backward", whole)):
        times = rounds(calls, args.rounds)
        best = min(t for name, t in times.items() if name.startswith("ringattention"))
        for name, t in times.items():
            print(f"{title}, {name}: {t:.3f} s, {best / t:.2f} times as fast as the package's best")
    return 0


if __name__ == "__main__":
    run_module(add_arguments, main, __doc__)
