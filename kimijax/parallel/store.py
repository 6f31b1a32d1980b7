"""A cache whose slots are dealt over devices: queries come to the keys, Partials merge.

The cache stays where it is. A call's queries are few beside it: they are gathered, each device
attends to its own slots, and one reduction merges the Partials. What is appended goes to its owner.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from kernels_pallas.attention import Keys
from kernels_pallas.partial import Partial
from kimijax import rows as local_rows
from kimijax.ops import attend as local_ops
from kimijax.ops.attend import Stored
from kimijax.parallel.axes import Axes
from kimijax.rows import Rows, slots


def merge_over(p: Partial, axes: tuple[str, ...], scattered: bool) -> Partial:
    """The Partial over the keys of all devices; `scattered`: each keeps its share of axis 1."""
    top = jax.lax.pmax(jax.lax.stop_gradient(p.lse), axes)
    safe = jnp.where(jnp.isneginf(top), 0.0, top)
    weight = jnp.exp(p.lse - safe)[..., None]
    packed = jnp.concatenate([p.out * weight, weight], -1)  # one reduction instead of two
    most = jax.lax.pmax(jax.lax.stop_gradient(p.max_logit), axes)
    if scattered:
        packed = jax.lax.psum_scatter(packed, axes, scatter_dimension=1, tiled=True)
        share = packed.shape[1]
        own = lambda x: jax.lax.dynamic_slice_in_dim(  # noqa: E731
            x, jax.lax.axis_index(axes) * share, share, 1
        )
        safe, most = own(safe), own(most)
    else:
        packed = jax.lax.psum(packed, axes)
    total = packed[..., -1]
    seen = total > 0
    total = jnp.where(seen, total, 1.0)
    lse = jnp.where(seen, safe + jnp.log(total), -jnp.inf)
    return Partial(packed[..., :-1] / total[..., None], lse, most)


def gathered(tree, axes: tuple[str, ...]):
    """Axis 1 of every array from all devices, in their order."""
    return jax.tree.map(lambda x: jax.lax.all_gather(x, axes, axis=1, tiled=True), tree)


def recall(axes: Axes, impl: str, q, kv: Stored | Keys, up, *, scale: float) -> Partial:
    """Attention to a cache whose slots are dealt over devices; queries lie there, or everywhere."""
    rows, dealt = axes.place(q.pos.shape)
    spec = lambda *more: P(rows, dealt, *more)  # noqa: E731
    heads = spec(axes.heads)
    of_q = q._replace(
        nope=heads, rope=None if q.rope is None else heads, pos=spec(), seg=spec(), since=spec()
    )
    of_up = jax.tree.map(lambda _: P(None, axes.heads), up)

    @functools.partial(
        jax.shard_map, mesh=axes.mesh, in_specs=(of_q, _specs(axes, rows, kv), of_up),
        out_specs=Partial(heads, heads, heads), check_vma=False,
    )
    def local(q, kv, up):
        q = gathered(q, axes.tokens) if dealt else q
        p = local_ops.recall(q, kv, up, scale=scale, impl=impl)
        return merge_over(p, axes.tokens, bool(dealt))

    return local(q, kv, up)


def _specs(axes: Axes, rows, kv: Stored | Keys):
    """Where a cache lies."""
    own = P(rows, axes.tokens)
    if isinstance(kv, Keys):
        heads = P(rows, axes.tokens, axes.heads)
        return Keys(heads, heads, None, own, own)
    stack = P(None, rows, axes.tokens)
    rope, scale = (None if x is None else stack for x in (kv.rope, kv.scale))
    return Stored(stack, rope, P(), own, own, scale)


def dealt_rows(axes: Axes) -> Rows:
    """Reading and writing token rows of states l b s ... whose slots are dealt over devices."""

    def own(name, stack, at):
        """Places on this device; its size for those of others."""
        size = slots(name, stack)
        at = at - jax.lax.axis_index(axes.tokens) * size
        return jnp.where((at >= 0) & (at < size), at, size)

    def wrap(f, stack, at, out, *more):
        rows, _ = axes.place(at.shape)
        stacked = P(None, rows, axes.tokens)
        return jax.shard_map(
            f, mesh=axes.mesh, in_specs=(stacked, P(), *(P(rows),) * (1 + len(more))),
            out_specs=stacked if out == "stack" else P(rows), check_vma=False,
        )

    def read(name, stack, layer, at):
        def local(stack, layer, at):
            found = local_rows.read(name, stack, layer, own(name, stack, at))
            return jax.lax.psum(found, axes.tokens)

        return wrap(local, stack, at, "rows")(stack, layer, at)

    def write(name, stack, layer, at, x):
        def local(stack, layer, at, x):
            return local_rows.write(name, stack, layer, own(name, stack, at), x)

        return wrap(local, stack, at, "stack", x)(stack, layer, at, x)

    return Rows(read, write)
