"""Blocks of the past: local regions, the stores that hold blocks, choosing and reading them.

A block is (segment, position // block). Stores are disjoint: the frozen past, if there is one, and
the rows of the call's own cache. A block's id counts through the stores in order.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas.attention import Keys, Queries
from kernels_pallas.partial import Partial, empty, merge
from kimijax.cache import FAR, Memory, Tokens, place
from kimijax.config import CompressedConfig
from kimijax.ops.attend import Latents, Ops
from kimijax.ops.norm import rms
from kimijax.ops.runs import tiles, tiles_with_halo


class IndexWeights(NamedTuple):
    """What makes index queries of hidden states, and summary keys of a block's latents."""

    query: jax.Array  # d i
    key: jax.Array  # g r i
    gate: jax.Array  # r g
    bias: jax.Array  # j g


class Store(NamedTuple):
    """Latents by block with their summary keys, stacked over layers."""

    latent: jax.Array  # l b c j r   or int32 l b c j r/4 with `scale`: words of int8
    keys: jax.Array  # l b c g i
    layer: jax.Array  # int32
    block_pos: jax.Array  # b c   first position; int32 max: not complete
    block_seg: jax.Array  # b c
    scale: jax.Array | None = None  # l b c j   float32


def local_start(pos: jax.Array, c: CompressedConfig) -> jax.Array:
    """The first position of a query's local region: `window` tokens before its group.

    Blocks are candidates when they end before it, so regions and choices are disjoint.
    """
    group = c.index.group
    return jnp.maximum(pos // group * group - c.window, 0)


def block_table(pos: jax.Array, seg: jax.Array, block: int) -> tuple[jax.Array, jax.Array]:
    """First position (int32 max where not complete) and segment of each block; b s -> b s/block."""
    pos, seg = (x.reshape(x.shape[0], -1, block) for x in (pos, seg))
    first, last = pos[..., 0], pos[..., -1]
    whole = (last - first == block - 1) & (first % block == 0)
    whole &= (seg[..., 0] == seg[..., -1]) & (seg[..., 0] >= 0) & (last < FAR)
    return jnp.where(whole, first, FAR), jnp.where(whole, seg[..., 0], -1)


def index_query(x: jax.Array, w: IndexWeights) -> jax.Array:
    """b m d -> b m i, of unit root mean square."""
    return rms(jnp.einsum("bmd,di->bmi", x, w.query.astype(x.dtype)), 1e-6)


def summary_keys(latent: jax.Array, w: IndexWeights) -> jax.Array:
    """Blocks b c j r -> b c g i: latents pooled by g learned gates, projected, normed."""
    gate = jnp.einsum("bcjr,rg->bcjg", latent, w.gate.astype(latent.dtype)) + w.bias
    pooled = jnp.einsum("bcjg,bcjr->bcgr", jax.nn.softmax(gate, axis=2), latent)
    return rms(jnp.einsum("bcgr,gri->bcgi", pooled, w.key.astype(latent.dtype)), 1e-6)


def own_store(c: CompressedConfig, kv: Latents, w: IndexWeights) -> Store:
    """The call's own tokens as a store: where there is no cache."""
    pad = ((0, 0), (0, -kv.pos.shape[1] % c.index.block))
    latent = jnp.pad(kv.latent, (*pad, (0, 0)))
    latent = latent.reshape(latent.shape[0], -1, c.index.block, latent.shape[-1])
    table = block_table(
        jnp.pad(kv.pos, pad, constant_values=FAR), jnp.pad(kv.seg, pad, constant_values=-1),
        c.index.block,
    )
    return Store(latent[None], summary_keys(latent, w)[None], jnp.int32(0), *table)


def stores_of(
    c: CompressedConfig,
    kept: dict[str, jax.Array],
    w: IndexWeights,
    tokens: Tokens,
    memory: Memory,
) -> tuple[list[Store], Memory]:
    """Write the call's latents and the blocks it touches; every store that may be read then.

    kept  the latents as the memory keeps them
    """
    block, cache = c.index.block, memory.cache
    memory = memory.write(place(cache, tokens), **kept)
    t, size = tokens.pos.shape[1], cache.pos.shape[1]
    # Blocks that hold a slot of this call. A slice that would leave the store slides back whole
    # blocks; those were complete before the call and are left as they are.
    touched = t // block if tokens.aligned else t // block + 2
    here = (tokens.count - cache.first + cache.lead) // block
    start = jnp.minimum(here, size // block - touched)
    latent = memory.latents_at(start * block, touched * block, memory.state["keys"].dtype)
    latent = latent.reshape(latent.shape[0], touched, block, -1)
    pos, seg = (cache.slots(x, start * block, touched * block) for x in (cache.pos, cache.seg))
    new_pos, new_seg = block_table(pos, seg, block)
    at = start[:, None] + jnp.arange(touched)
    at = jnp.where(at >= here[:, None], cache.index(at * block) // block, size)
    memory = memory.write(
        at, keys=summary_keys(latent, w), block_pos=new_pos, block_seg=new_seg
    )
    stores = [_store(memory.state, memory.repeat, block)]
    if memory.frozen is not None:
        stores.insert(0, _store(memory.frozen, memory.repeat, block))
    return stores, memory


def _store(state: dict, repeat: jax.Array, block: int) -> Store:
    latent, scale = state["latent"], state.get("latent_scale")
    lead = latent.shape[:2]
    blocks = latent.reshape(*lead, -1, block, latent.shape[-1])
    return Store(
        blocks, state["keys"], repeat, state["block_pos"][repeat], state["block_seg"][repeat],
        None if scale is None else scale.reshape(*lead, -1, block),
    )


def choose(
    c: CompressedConfig,
    ops: Ops,
    x: jax.Array,
    w: IndexWeights,
    stores: list[Store],
    tokens: Tokens,
    memory: Memory | None,
) -> tuple[jax.Array, Memory | None, jax.Array]:
    """Block ids for the queries of a call: one choice per group, or b t k where tokens differ.

    Returns (ids b m k, memory with the choice of the open group, first positions of the chosen).
    """
    group, t = c.index.group, tokens.pos.shape[1]

    def search(x, pos, seg):
        """Choices of some tokens of the call: x b m d, pos and seg b m."""
        return _search(c, ops, index_query(x, w), local_start(pos, c), seg, stores)

    everyone = (x, tokens.pos, tokens.seg)
    last = jnp.maximum(tokens.used - 1, 0)[:, None, None]
    if tokens.aligned and tokens.fresh is None and t % group == 0:
        ids = search(*(a.reshape(a.shape[0], -1, group, *a.shape[2:])[:, :, 0] for a in everyone))
        last = last // group
        open_choice = jnp.take_along_axis(ids, last, 1)[:, 0]
    else:
        # The group of a token began `behind` places earlier, perhaps in an earlier call.
        behind = (tokens.count[:, None] + jnp.arange(t)) % group
        leader = jnp.arange(t) - behind
        if tokens.fresh is not None:
            own = search(*everyone)
            ids = jnp.take_along_axis(own, jnp.maximum(leader, 0)[..., None], 1)
        else:
            first = (-tokens.count % group)[:, None]
            leaders = jnp.minimum(first + jnp.arange(t // group + 1) * group, t - 1)
            nth = jnp.maximum(leader - first, 0) // group
            row = jnp.arange(leaders.shape[0])[:, None]
            found = search(*(a[row, leaders] for a in everyone))
            ids = jnp.take_along_axis(found, nth[..., None], 1)
        held = jnp.full_like(ids[:, 0], -1) if memory is None else memory.get("choice")
        ids = jnp.where((leader >= 0)[..., None], ids, held[:, None])
        ids = jnp.where(_same_document(tokens, leader)[..., None], ids, -1)
        open_choice = jnp.take_along_axis(ids, last, 1)[:, 0]
        if tokens.fresh is not None:
            ids = jnp.where(tokens.fresh[..., None], own, ids)
    if memory is not None:
        some = tokens.used[:, None] > 0  # a row of padding leaves the open group's choice alone
        memory = memory.put(choice=jnp.where(some, open_choice, memory.get("choice")))
    return ids, memory, _positions(ids, stores)


def _same_document(tokens: Tokens, leader: jax.Array) -> jax.Array:
    """Whether each token is of the segment of the token at place `leader` of the call, b t.

    A choice is handed on within a document only, wherever in a group the next document starts.
    """
    seg = jnp.concatenate([tokens.past_seg, tokens.seg], 1)
    at = jnp.broadcast_to(leader, tokens.seg.shape) + tokens.past_seg.shape[1]
    return jnp.take_along_axis(seg, at, 1) == tokens.seg


def _search(c, ops, q, before, seg, stores) -> jax.Array:
    """The best blocks over all stores, as ids that count through them."""
    found, offset = [], 0
    for s in stores:
        scores, ids = ops.top_blocks(
            q, s.keys, s.layer, s.block_pos, s.block_seg, before, seg, k=c.index.top_k
        )
        found.append((scores, jnp.where(ids >= 0, ids + offset, -1)))
        offset += s.block_pos.shape[1]
    if len(found) == 1:
        return found[0][1]
    scores, ids = (jnp.concatenate(x, -1) for x in zip(*found, strict=True))
    _, at = jax.lax.top_k(scores, c.index.top_k)
    return jnp.take_along_axis(ids, at, -1)


def _within(ids: jax.Array, stores: list[Store]):
    """Each store with the ids that lie in it, -1 elsewhere."""
    offset = 0
    for s in stores:
        local, size = ids - offset, s.block_pos.shape[1]
        yield s, jnp.where((local >= 0) & (local < size) & (ids >= 0), local, -1)
        offset += size


def _positions(ids: jax.Array, stores: list[Store]) -> jax.Array:
    """First positions of chosen blocks, -1 for none."""
    out = jnp.full_like(ids, -1)
    for s, local in _within(ids, stores):
        pos = jax.vmap(lambda p, i: p[i])(s.block_pos, jnp.maximum(local, 0))
        out = jnp.where(local >= 0, pos, out)
    return out


def read_chosen(
    c: CompressedConfig,
    ops: Ops,
    q: jax.Array,
    ids: jax.Array,
    stores: list[Store],
    tokens: Tokens,
) -> Partial:
    """Absorbed queries b t h r against their chosen blocks in every store."""
    b, t, h, r = q.shape
    group = t // ids.shape[1]
    tiles = q.reshape(b, ids.shape[1], -1, h, r)
    parts = [
        ops.select(tiles, s.latent, s.layer, local, scale=c.scale, token_scale=s.scale)
        for s, local in _within(ids, stores)
    ]
    p = parts[0] if len(parts) == 1 else merge(*parts)
    p = jax.tree.map(lambda a: a.reshape(b, t, *a.shape[3:]), p)
    same = _same_document(tokens, jnp.arange(t) // group * group)[..., None]
    return jax.tree.map(lambda a, e: jnp.where(same if a.ndim == 3 else same[..., None], a, e),
                        p, empty((b, t, h), r))


def attend_local(
    c: CompressedConfig,
    ops: Ops,
    q: jax.Array,
    kv: Latents,
    lead: Latents | None,
    tokens: Tokens,
) -> Partial:
    """Absorbed queries b t h r against their local region; `lead` is what lies before the call."""
    b, t = tokens.pos.shape
    group = c.index.group
    if lead is None:
        lead = Latents(
            jnp.zeros((b, c.window, c.kv_rank), q.dtype), None,
            jnp.full((b, c.window), -1, jnp.int32), jnp.full((b, c.window), -1, jnp.int32),
        )
    queries = Queries(q, None, tokens.pos, tokens.seg, local_start(tokens.pos, c))
    length = group if tokens.aligned and t // tokens.runs % group == 0 else t // tokens.runs
    queries = jax.tree.map(lambda a: tiles(a, tokens, length), queries)
    kv = jax.tree.map(lambda a, h: tiles_with_halo(a, h, tokens, length), kv, lead)
    one = kv.latent[..., None, :]
    p = ops.tiled(queries, Keys(one, one, None, kv.pos, kv.seg), scale=c.scale)
    return jax.tree.map(lambda a: a.reshape(b, t, *a.shape[4:]), p)
