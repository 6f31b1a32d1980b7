"""Attention of a sharded sequence: one wrapper, three ways to bring keys and queries together.

`attend` has the signature of the local one. Its custom_vjp stands outside: forward and backward are
each a shard_map of their own, residuals are the inputs and (out, lse), and the gradients of the
weights are summed explicitly over every axis that shards queries. (Differentiated inside one
shard_map with check_vma=False they came out too large in silence.)

    ring     keys travel as latents, each hop projects the visitor's and merges a Partial
    gather   all latents come to every device
    ulysses  queries of a few heads come together, all latents come to every device
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from kernels_pallas.attention import Keys, Queries, attention, attention_grads, overlap
from kernels_pallas.partial import Partial, empty, merge
from kimijax.errors import UserError

STRATEGIES = ("ring", "gather", "ulysses")


@dataclass(frozen=True)
class Axes:
    """The mesh axes that hold rows, tokens and heads."""

    mesh: Mesh
    rows: tuple[str, ...] = ("data",)
    tokens: tuple[str, ...] = ("seq", "expert")
    heads: tuple[str, ...] = ("tensor",)

    @property
    def ways(self) -> int:
        """Devices over which the tokens of a row lie."""
        return math.prod(self.mesh.shape[a] for a in self.tokens)

    def place(self, shape: tuple[int, int]) -> tuple[tuple[str, ...] | None, ...]:
        """Axes of rows and of tokens b t: None where they cannot be dealt out, as one token."""
        rows = math.prod(self.mesh.shape[a] for a in self.rows)
        return (
            None if shape[0] % rows else self.rows,
            None if shape[1] % self.ways else self.tokens,
        )

    def queries(self) -> PartitionSpec:
        """Of b t h ..."""
        return PartitionSpec(self.rows, self.tokens, self.heads)

    def keys(self) -> PartitionSpec:
        """Of b t ..., every head's."""
        return PartitionSpec(self.rows, self.tokens)


class Source(NamedTuple):
    """What travels, and how keys are made of it.

    project  (kv, up) -> Keys; kv a NamedTuple with pos and seg, up weights (() for none)
    mine     (kv, up, first, count) -> the same of `count` heads from `first`, of `heads` in all
    specs    (axes, kv, up) -> PartitionSpecs of kv and of up
    """

    project: Callable[[Any, Any], Keys]
    mine: Callable[[Any, Any, jax.Array, int, int], tuple[Any, Any]]
    specs: Callable[[Axes, Any, Any], tuple[Any, Any]]


class Local(NamedTuple):
    """What the strategies need to know on a device."""

    axes: Axes
    source: Source
    scale: float
    impl: str

    @property
    def names(self) -> tuple[str, ...]:
        return self.axes.tokens

    def keys_of(self, kv, up, q: Queries) -> Partial:
        return attention(q, self.source.project(kv, up), scale=self.scale, impl=self.impl)

    def grads_of(self, kv, up, q: Queries, lse, d_out, delta):
        """(d_q nope and rope, d_kv floats, d_up), float32, of the keys that lie here."""
        wide = lambda x: x.astype(jnp.float32)  # noqa: E731
        keys = self.source.project(kv, up)
        d_nope, d_rope, *d_keys = attention_grads(
            q, keys, lse, d_out, delta, scale=self.scale, impl=self.impl
        )

        def project(floats, up):
            keys = self.source.project(join(kv, floats), up)
            return keys.key, keys.value, keys.rope

        _, pull = jax.vjp(project, *jax.tree.map(wide, (floats_of(kv), up)))
        d_kv, d_up = pull(tuple(d_keys))
        return (d_nope, d_rope), d_kv, d_up


def floats_of(kv):
    """kv without its positions and segments."""
    return kv._replace(pos=None, seg=None)


def join(kv, floats):
    """`floats` with the positions and segments of kv."""
    return floats._replace(pos=kv.pos, seg=kv.seg)


def zeros_like(tree):
    """float32 zeros in the shapes of a tree."""
    return jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), tree)


def add(a, b):
    """Sum of two trees."""
    return jax.tree.map(jnp.add, a, b)


def ring_forward(at: Local, q, kv, up) -> Partial:
    """N - 1 sends, each begun before the attention to what is here."""
    width = jax.eval_shape(at.source.project, kv, up).value.shape[-1]

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
    none = zeros_like(floats_of(kv))

    def use(kv, d_q, d_kv, d_up):
        def work():
            own_q, own_kv, own_up = at.grads_of(kv, up, q, lse, d_out, delta)
            return add(d_q, own_q), own_kv, add(d_up, own_up)

        d_q, own, d_up = jax.lax.cond(overlap(q, kv), work, lambda: (d_q, none, d_up))
        return d_q, add(d_kv, own), d_up

    def hop(carry, _):
        kv, d_q, d_kv, d_up = carry
        coming = send(at, kv)
        return in_turn((coming, *use(kv, d_q, d_kv, d_up))), None

    def lagged(carry, x):
        kv, d_q, d_kv, d_up = carry
        return hop((kv, d_q, send(at, d_kv), d_up), x)

    start = (kv, zeros_like((q.nope, q.rope)), none, zeros_like(up))
    if at.axes.ways > 1:
        start, _ = hop(start, None)
    carry, _ = jax.lax.scan(lagged, start, length=max(at.axes.ways - 2, 0), unroll=_unroll(at))
    kv, d_q, d_kv, d_up = carry
    if at.axes.ways > 1:
        d_kv = send(at, d_kv)
    d_q, d_kv, d_up = use(kv, d_q, d_kv, d_up)
    return d_q, send(at, d_kv), d_up


def send(at: Local, tree):
    """To the next device of the ring."""
    ways = at.axes.ways
    hops = [(i, (i + 1) % ways) for i in range(ways)]
    return jax.tree.map(lambda x: jax.lax.ppermute(x, at.names, hops), tree)


def in_turn(carry):
    """What a hop leaves, all of it before the next begins.

    Sends depend on sends alone: the compiler of TPUs would do those of several hops in a row, and
    attend to what they brought when there is nothing left to hide them.
    """
    return jax.lax.optimization_barrier(carry)


def _unroll(at: Local) -> int:
    """On a TPU a plain scan copies what travels in every hop; two hops a body copy nothing."""
    return 2 if at.axes.mesh.devices.flat[0].platform == "tpu" and at.axes.ways > 2 else 1


def gather(at: Local, tree):
    """Tokens of all devices, in their order: b t ... -> b N*t ..."""
    return jax.tree.map(lambda x: jax.lax.all_gather(x, at.names, axis=1, tiled=True), tree)


def scatter(at: Local, tree):
    """Sums over devices of b N*t ..., each keeping its own tokens."""
    return jax.tree.map(
        lambda x: jax.lax.psum_scatter(x, at.names, scatter_dimension=1, tiled=True), tree
    )


def gather_forward(at: Local, q, kv, up) -> Partial:
    """Every latent is here; own queries."""
    return at.keys_of(gather(at, kv), up, q)


def gather_backward(at: Local, q, kv, up, lse, d_out, delta):
    """The mirror of gather_forward."""
    d_q, d_kv, d_up = at.grads_of(gather(at, kv), up, q, lse, d_out, delta)
    return d_q, scatter(at, d_kv), d_up


def to_heads(at: Local, tree):
    """b t h ... -> b N*t h/N ...: all tokens of a few heads."""
    return jax.tree.map(
        lambda x: jax.lax.all_to_all(x, at.names, split_axis=2, concat_axis=1, tiled=True), tree
    )


def to_tokens(at: Local, tree):
    """The way back."""
    return jax.tree.map(
        lambda x: jax.lax.all_to_all(x, at.names, split_axis=1, concat_axis=2, tiled=True), tree
    )


def _few_heads(at: Local, q, kv, up):
    """Queries of this device's share of heads, and what their keys are made of."""
    heads, share = q.nope.shape[2], q.nope.shape[2] // at.axes.ways
    first = jax.lax.axis_index(at.names) * share
    where = gather(at, q._replace(nope=None, rope=None))
    q = where._replace(nope=to_heads(at, q.nope), rope=to_heads(at, q.rope))
    take = functools.partial(at.source.mine, first=first, count=share, heads=heads)
    return q, gather(at, kv), take


def ulysses_forward(at: Local, q, kv, up) -> Partial:
    """All tokens of a share of the heads."""
    q, kv, take = _few_heads(at, q, kv, up)
    return to_tokens(at, at.keys_of(*take(kv, up), q))


def ulysses_backward(at: Local, q, kv, up, lse, d_out, delta):
    """The mirror; gradients of what heads share are summed."""
    q, kv, take = _few_heads(at, q, kv, up)
    _, pull = jax.vjp(lambda f, up: _floats(take(join(kv, f), up)), floats_of(kv), up)
    row = (to_heads(at, x) for x in (lse, d_out, delta))
    own_kv, own_up = take(kv, up)
    d_q, d_kv, d_up = at.grads_of(own_kv, own_up, q, *row)
    like = lambda d, x: d.astype(x.dtype)  # noqa: E731
    d_kv, d_up = pull(jax.tree.map(like, (d_kv, d_up), (floats_of(own_kv), own_up)))
    return to_tokens(at, d_q), scatter(at, d_kv), d_up


def _floats(pair):
    kv, up = pair
    return floats_of(kv), up


FORWARD = {"ring": ring_forward, "gather": gather_forward, "ulysses": ulysses_forward}
BACKWARD = {"ring": ring_backward, "gather": gather_backward, "ulysses": ulysses_backward}


@functools.lru_cache(maxsize=64)
def sharded(axes: Axes, strategy: str, source: Source, impl: str, scale: float) -> Callable:
    """(q, kv, up) -> Partial over a sequence that lies on `axes.tokens`, differentiable."""
    at = Local(axes, source, scale, impl)
    rows, heads = axes.rows, axes.heads
    out_spec, row_spec = axes.queries(), axes.queries()

    def specs(q, kv, up):
        where = q._replace(nope=None, rope=None)
        of_q = jax.tree.map(lambda _: axes.keys(), where)._replace(
            nope=axes.queries(), rope=None if q.rope is None else axes.queries()
        )
        return of_q, *source.specs(axes, kv, up)

    def wrap(f, in_specs, out_specs):
        return jax.shard_map(
            f, mesh=axes.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
        )

    def forward(q, kv, up):
        f = functools.partial(FORWARD[strategy], at)
        out = Partial(out_spec, row_spec, row_spec)
        return wrap(lambda *args: Partial(*f(*args)), specs(q, kv, up), out)(q, kv, up)

    @jax.custom_vjp
    def attend(q, kv, up):
        return forward(q, kv, up)

    def fwd(q, kv, up):
        # Under a scan over layers, jax would compute what positions alone decide once for all of
        # them: the masks of all hops, kept in memory. The barrier ties them to the layer.
        p = forward(*jax.lax.optimization_barrier((q, kv, up)))
        return p, (q, kv, up, p.out, p.lse)

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
            (of_q, of_kv, of_up, row_spec, out_spec, row_spec),
            ((of_q.nope, of_q.rope), floats_of(of_kv), of_up),
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


def check(axes: Axes, strategy: str, heads: int, tokens: int) -> None:
    """UserError: the sequence or the heads cannot be dealt out so."""
    if strategy not in STRATEGIES:
        raise UserError(f"strategy {strategy!r:.40}: there are {', '.join(STRATEGIES)}")
    names, ways = " x ".join(axes.tokens), axes.ways
    if tokens % ways:
        raise UserError(
            f"{tokens} tokens are no multiple of {names} = {ways}; pad the row (Plan.arrange does)"
        )
    per = ways if strategy == "ulysses" else 1
    parts = per * math.prod(axes.mesh.shape[a] for a in axes.heads)
    if heads % parts:
        raise UserError(
            f"{heads} heads are no multiple of {parts} for {strategy} on {names} = {ways}; choose "
            "another strategy or a smaller axis"
        )
