"""Compressed attention with blocks dealt over devices: a choice in two stages, then chosen pairs.

Choosing: every device takes the k best of its own blocks for all queries, then each query the best
of those; ties go to the lower position, as on one device. Reading: where blocks are fewer than
queries (a whole row) blocks travel around the ring, where they are many (a cache) queries are
gathered; either way a device works on the chosen blocks that are there and on no others.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from kernels_pallas.indexer import top_blocks as top_blocks_here
from kernels_pallas.partial import Partial, empty, merge
from kernels_pallas.select import select as select_here
from kimijax.cache import FAR
from kimijax.parallel.axes import Axes
from kimijax.parallel.store import gathered, merge_over

PIECES = 4  # a tile's choices are worked on in so many steps; steps without a block are skipped


def top_blocks(axes: Axes, impl: str, q, keys, layer, block_pos, block_seg, before, seg, *, k: int):
    """The contract of kernels_pallas.indexer; ids count through the devices' blocks in order."""
    rows, dealt = axes.place(seg.shape)
    asked, held = P(rows, dealt), P(rows, axes.tokens)

    @functools.partial(
        jax.shard_map, mesh=axes.mesh, check_vma=False, out_specs=(asked, asked),
        in_specs=(asked, P(None, rows, axes.tokens), P(), held, held, asked, asked),
    )
    def local(q, keys, layer, block_pos, block_seg, before, seg):
        if dealt:
            q, before, seg = gathered((q, before, seg), axes.tokens)
        scores, ids = top_blocks_here(
            q, keys, layer, block_pos, block_seg, before, seg, k=k, impl=impl
        )
        pos = jax.vmap(lambda p, i: p[i])(block_pos, jnp.maximum(ids, 0))
        pos = jnp.where(ids >= 0, pos, FAR)
        first = jax.lax.axis_index(axes.tokens) * block_pos.shape[1]
        found = (-scores, pos, jnp.where(ids >= 0, ids + first, -1))
        if dealt:  # each device ends the search for its own queries
            exchange = functools.partial(
                jax.lax.all_to_all, axis_name=axes.tokens, split_axis=1, concat_axis=2, tiled=True
            )
        else:
            exchange = functools.partial(
                jax.lax.all_gather, axis_name=axes.tokens, axis=2, tiled=True
            )
        scores, _, ids = jax.lax.sort(tuple(exchange(x) for x in found), num_keys=2)
        return -scores[..., :k], ids[..., :k]

    q, keys = jax.lax.stop_gradient((q, keys))
    return local(q, keys, layer, block_pos, block_seg, before, seg)


def select(
    axes: Axes, impl: str, q, blocks, layer, ids, *, scale: float, token_scale=None
) -> Partial:
    """The contract of kernels_pallas.select, with ids as `top_blocks` here gives them."""
    rows, dealt = axes.place(ids.shape[:2])
    asked = P(rows, dealt)
    travel = dealt and blocks.shape[2] * blocks.shape[3] < ids.shape[1] * q.shape[2] * q.shape[3]

    @functools.partial(
        jax.shard_map, mesh=axes.mesh, check_vma=False, out_specs=Partial(asked, asked, asked),
        in_specs=(asked, P(None, rows, axes.tokens), P(), asked),
    )
    def local(q, store, layer, ids):
        read = functools.partial(_chosen, impl=impl, scale=scale)
        if travel:
            return _around(axes, read, q, jax.tree.map(lambda x: x[layer][None], store), ids)
        if dealt:
            q, ids = gathered((q, ids), axes.tokens)
        here = _within(ids, jax.lax.axis_index(axes.tokens), store[0].shape[2])
        return merge_over(read(q, store, layer, here), axes.tokens, bool(dealt))

    return local(q, (blocks, token_scale), layer, ids)


def _around(axes: Axes, read, q, store, ids) -> Partial:
    """Blocks of every device (and their scales, if any) come by, N - 1 sends."""
    me, ways = jax.lax.axis_index(axes.tokens), axes.ways
    hops = [(i, (i + 1) % ways) for i in range(ways)]

    def use(acc, store, n):
        here = _within(ids, (me - n) % ways, store[0].shape[2])
        return merge(acc, read(q, store, jnp.int32(0), here))

    def hop(carry, n):
        acc, store = carry
        coming = jax.lax.ppermute(store, axes.tokens, hops)
        return (use(acc, store, n), coming), None

    start = (empty(q.shape[:-1], q.shape[-1]), store)
    (acc, store), _ = jax.lax.scan(hop, start, jnp.arange(ways - 1))
    return use(acc, store, ways - 1)


def _within(ids, owner, size: int):
    """Ids as they count on their owner; -1 for those of others."""
    own = ids - owner * size
    return jnp.where((own >= 0) & (own < size) & (ids >= 0), own, -1)


def _chosen(q, store, layer, ids, *, impl: str, scale: float) -> Partial:
    """Attention to the ids that are not -1, as few steps as the tile with most of them needs."""
    blocks, token_scale = store
    ids = jnp.take_along_axis(ids, jnp.argsort(ids < 0, axis=-1, stable=True), -1)
    most = (ids >= 0).sum(-1).max()
    width = -(-ids.shape[-1] // PIECES)
    pad = -ids.shape[-1] % width
    ids = jnp.pad(ids, ((0, 0), (0, 0), (0, pad)), constant_values=-1)
    steps = jnp.moveaxis(ids.reshape(*ids.shape[:2], -1, width), 2, 0)

    def step(acc, xs):
        n, some = xs
        use = lambda: merge(  # noqa: E731
            acc,
            select_here(q, blocks, layer, some, scale=scale, impl=impl, token_scale=token_scale),
        )
        return jax.lax.cond(n * width < most, use, lambda: acc), None

    start = empty(q.shape[:-1], q.shape[-1])
    return jax.lax.scan(step, start, (jnp.arange(len(steps)), steps))[0]
