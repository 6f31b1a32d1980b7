"""Attention of a sharded sequence: one wrapper, five ways to bring keys and queries together.

`attend` has the signature of the local one. Its custom_vjp stands outside: forward and backward are
each a shard_map of their own, residuals are the inputs and (out, lse), and the gradients of the
weights are summed explicitly over every axis that shards queries. (Differentiated inside one
shard_map with check_vma=False they came out too large in silence.)

    ring     keys travel as latents, each hop projects the visitor's and merges a Partial (ring.py)
    gather   all latents come to every device (gather.py)
    ulysses  queries of a few heads come together, all latents come to every device (ulysses.py)
    hybrid   ulysses within groups of neighbours, and a ring of the groups (ulysses.py)
    ring_dma ring as one kernel, which sends by remote DMA; of latents, on TPUs (dma.py)

Groups lie along the last token axis; "hybrid:4" names another size, whatever the axes are.
"""

import functools
import math
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from kernels_pallas.partial import Partial
from kimijax.errors import UserError
from kimijax.ops.attend import KEPT
from kimijax.parallel.axes import Axes
from kimijax.parallel.device import Local, Source, floats_of
from kimijax.parallel.dma import dma_backward, dma_forward, refused
from kimijax.parallel.gather import gather_backward, gather_forward
from kimijax.parallel.ring import ring_backward, ring_forward
from kimijax.parallel.ulysses import (
    hybrid_backward,
    hybrid_forward,
    ulysses_backward,
    ulysses_forward,
)

FORWARD = {
    "ring": ring_forward, "gather": gather_forward, "ulysses": ulysses_forward,
    "hybrid": hybrid_forward, "ring_dma": dma_forward,
}
BACKWARD = {
    "ring": ring_backward, "gather": gather_backward, "ulysses": ulysses_backward,
    "hybrid": hybrid_backward, "ring_dma": dma_backward,
}
STRATEGIES = (*FORWARD, "hybrid:N")


@functools.lru_cache(maxsize=64)
def sharded(axes: Axes, strategy: str, source: Source, impl: str, scale: float) -> Callable:
    """(q, kv, up) -> Partial over a sequence that lies on `axes.tokens`, differentiable."""
    axes, strategy = meeting(axes, strategy)
    if strategy == "ring_dma" and (why := refused(axes, source, impl)):
        raise UserError(why)
    at = Local(axes, source, scale, impl)
    rows, heads = axes.rows, axes.heads
    out_spec, row_spec = axes.queries(), axes.queries()
    specs = functools.partial(_specs, axes, source)
    wrap = functools.partial(jax.shard_map, mesh=axes.mesh, check_vma=False)

    def forward(q, kv, up):
        out = Partial(out_spec, row_spec, row_spec)
        f = lambda *args: Partial(*FORWARD[strategy](at, *args))  # noqa: E731
        return wrap(f, in_specs=specs(q, kv, up), out_specs=out)(q, kv, up)

    @jax.custom_vjp
    def attend(q, kv, up):
        return forward(q, kv, up)

    def fwd(q, kv, up):
        # Under a scan over layers, jax would compute what positions alone decide once for all of
        # them: the masks of all hops, kept in memory. The barrier ties them to the layer.
        p = forward(*jax.lax.optimization_barrier((q, kv, up)))
        # Kept where layers are computed a second time (model.py), in the dtype that it ends in.
        out, lse = (checkpoint_name(x, KEPT) for x in (p.out.astype(q.nope.dtype), p.lse))
        return Partial(out.astype(p.out.dtype), lse, p.max_logit), (q, kv, up, out, lse)

    def bwd(residuals, cotangent):
        q, kv, up, out, lse = residuals
        d_out, d_lse, _ = cotangent
        d_lse = jnp.where(jnp.isneginf(lse), 0.0, d_lse)
        delta = jnp.sum(out * d_out, -1) - d_lse

        def local(q, kv, up, lse, d_out, delta):
            d_q, d_kv, d_up = BACKWARD[strategy](at, q, kv, up, lse, d_out, delta)
            own = lambda s: set(jax.tree.leaves(tuple(s)))  # noqa: E731
            spread = lambda d, s: jax.lax.psum(  # noqa: E731
                d, [a for a in heads if a not in own(s)] or ()
            )
            d_kv = jax.tree.map(spread, d_kv, floats_of(of_kv))
            d_up = jax.tree.map(lambda d: jax.lax.psum(d, rows + axes.tokens), d_up)
            return d_q, d_kv, d_up

        of_q, of_kv, of_up = specs(q, kv, up)
        d_q, d_kv, d_up = wrap(
            local,
            in_specs=(of_q, of_kv, of_up, row_spec, out_spec, row_spec),
            out_specs=((of_q.nope, of_q.rope), floats_of(of_kv), of_up),
        )(q, kv, up, lse, d_out, delta)
        cast = lambda d, x: jax.tree.map(lambda d, x: d.astype(x.dtype), d, x)  # noqa: E731
        d_nope, d_rope = cast(d_q, (q.nope, q.rope))
        none = {"pos": None, "seg": None}
        return (
            q._replace(nope=d_nope, rope=d_rope, since=None, **none),
            cast(d_kv, floats_of(kv)), cast(d_up, up),
        )

    attend.defvjp(fwd, bwd)
    return attend


def _specs(axes: Axes, source: Source, q, kv, up):
    """PartitionSpecs of queries, of what travels and of weights."""
    where = q._replace(nope=None, rope=None)
    of_q = jax.tree.map(lambda _: axes.keys(), where)._replace(
        nope=axes.queries(), rope=None if q.rope is None else axes.queries()
    )
    return of_q, *source.specs(axes, kv, up)


def known(strategy: str) -> bool:
    """Whether it is one of STRATEGIES, with a number for N."""
    return strategy in FORWARD or bool(re.fullmatch(r"hybrid:[1-9][0-9]{0,5}", strategy))


def meeting(axes: Axes, strategy: str) -> tuple[Axes, str]:
    """Axes on which the strategy works, and its name without a number.

    UserError: there is no such strategy, or there are no such groups.
    """
    if not known(strategy):
        raise UserError(f"strategy {strategy!r:.40}: there are {', '.join(STRATEGIES)}")
    name, _, size = strategy.partition(":")
    if size:
        return axes.grouped(int(size)), name
    if name == "hybrid" and axes.over(axes.tokens[-1:]).ways == 1:
        raise UserError(
            f"hybrid groups devices along the mesh axis {axes.tokens[-1]}, which has one; name the "
            "size of a group, as hybrid:4, or another strategy"
        )
    return axes, name


def check(axes: Axes, strategy: str, heads: int, tokens: int) -> None:
    """UserError: the sequence or the heads cannot be dealt out so."""
    names, ways = " x ".join(axes.tokens), axes.ways
    axes, kind = meeting(axes, strategy)
    if tokens % ways:
        raise UserError(
            f"{tokens} tokens are no multiple of {names} = {ways}; pad the row (Plan.arrange does)"
        )
    sharing = {"ulysses": axes, "hybrid": axes.over(axes.tokens[-1:])}  # the heads, among them
    per = sharing[kind].ways if kind in sharing else 1
    parts = per * math.prod(axes.mesh.shape[a] for a in axes.heads)
    if heads % parts:
        raise UserError(
            f"{heads} heads are no multiple of {parts} for {strategy} on {names} = {ways}; choose "
            "another strategy or a smaller axis"
        )
