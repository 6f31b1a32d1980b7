"""Keys travel around a ring as what they are made of; queries stay."""

import jax

from kernels_pallas.attention import overlap
from kernels_pallas.partial import Partial, empty, merge
from kimijax.parallel.device import Local, add, floats_of, zeros_like


def ring_forward(at: Local, q, kv, up) -> Partial:
    """N - 1 sends, each begun before the attention to what is here."""
    width = at.source.width(kv, up)

    def use(acc, kv):
        return jax.lax.cond(
            overlap(q, kv), lambda: merge(acc, at.keys_of(kv, up, q)), lambda: acc
        )

    def hop(carry, _):
        acc, kv = carry
        coming = send(at, kv)
        return in_turn((use(acc, kv), coming)), None

    start = (empty(q.nope.shape[:3], width), kv)
    (acc, kv), _ = jax.lax.scan(hop, start, length=at.axes.ways - 1, unroll=_unroll(at))
    return use(acc, kv)


def ring_backward(at: Local, q, kv, up, lse, d_out, delta):
    """Gradients of latents travel one hop behind their latents and arrive home.

    The gradient that comes in belongs to the visitor that is here: its send and that of the next
    visitor both overlap with the work on this one, which adds to it only afterwards.
    """
    none, of = zeros_like(floats_of(kv)), at.source.backward(at.impl)
    asked = of.ask(q, lse, d_out, delta, scale=at.scale)

    def use(kv, sums, d_kv):
        work = lambda: of.add(asked, sums, kv, up)  # noqa: E731
        if of.skips:
            # TPUs: or the gradient that comes in is waited for before the work that hides it.
            sums, own = work()
            d_kv, own = in_turn((d_kv, own))
        else:
            sums, own = jax.lax.cond(overlap(q, kv), work, lambda: (sums, none))
        return sums, add(d_kv, own)

    def hop(carry, _):
        kv, sums, d_kv = carry
        coming = send(at, kv)
        return in_turn((coming, *use(kv, sums, d_kv))), None

    def lagged(carry, x):
        kv, sums, d_kv = carry
        return hop((kv, sums, send(at, d_kv)), x)

    start = (kv, of.start(asked, up), none)
    if at.axes.ways > 1:
        start, _ = hop(start, None)
    carry, _ = jax.lax.scan(lagged, start, length=max(at.axes.ways - 2, 0), unroll=_unroll(at))
    kv, sums, d_kv = carry
    if at.axes.ways > 1:
        d_kv = send(at, d_kv)
    sums, d_kv = use(kv, sums, d_kv)
    d_q, d_up = of.finish(asked, sums)
    return d_q, send(at, d_kv), d_up


def send(at: Local, tree):
    """To the next device of the ring."""
    ways = at.axes.ways
    hops = [(i, (i + 1) % ways) for i in range(ways)]
    return jax.tree.map(lambda x: jax.lax.ppermute(x, at.names, hops), tree)


def in_turn(carry):
    """All of what a hop leaves, before the next begins.

    Sends depend on sends alone: the compiler of TPUs would do those of several hops in a row, and
    attend to what they brought when there is nothing left to hide them.
    """
    return jax.lax.optimization_barrier(carry)


def _unroll(at: Local) -> int:
    """On a TPU a plain scan copies what travels in every hop; two hops a body copy nothing."""
    return 2 if at.axes.mesh.devices.flat[0].platform == "tpu" and at.axes.ways > 2 else 1
