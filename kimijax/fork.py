"""A cache that stands on a frozen one: questions, beams and samples share one long document.

What the frozen cache holds is read, neither copied nor written. The new one begins with copies of
its last tokens, so that looking back never leaves an array.
"""

import jax
import jax.numpy as jnp

from kimijax.cache import FAR, LATENT, Cache, Memory, empty_cache, run_length
from kimijax.config import ModelConfig
from kimijax.rows import ROWS, Rows

TOKENS = (*LATENT, "k_rope", "head_keys", "head_values")  # states with numbers for every token
BLOCKS = ("keys", "block_pos", "block_seg")


def fork(cfg: ModelConfig, cache: Cache, room: int, rows: Rows = ROWS) -> Cache:
    """A cache that continues `cache`, which it reads and never writes, with `room` free slots.

    Cost: a copy of the last tokens, not of the past. If the slots of `cache` are dealt over
    devices, so are those of the new one.

    rows  how the plan that deals them reads and writes token rows
    """
    if cache.frozen is not None:
        raise ValueError("fork: the cache already stands on a frozen one; fork that one instead")
    size = cache.lead + run_length(cfg)
    new = empty_cache(cfg, cache.pos.shape[0], room, ways=cache.ways, latents=cache.latents)
    first = cache.count // cache.run * cache.run
    # The lead of the new store and the open run behind it are copies of the frozen store's end.
    # Blocks that are complete by now stay with the frozen store, later ones will be in the new.
    source = first - cache.first
    at = new.index(jnp.arange(size))
    live = jnp.arange(size) < (cache.count - first + cache.lead)[:, None]

    def table(old: jax.Array, fresh: jax.Array, none: int) -> jax.Array:
        return fresh.at[:, at].set(jnp.where(live, cache.slots(old, source, size), none))

    def state(old: dict, fresh: dict) -> dict:
        fresh = {n: x.astype(old[n].dtype) for n, x in fresh.items() if n in TOKENS + BLOCKS}
        stored = {n: x for n, x in fresh.items() if n in TOKENS}

        def copied(repeat, stored):
            end = Memory(cache, old, None, repeat, rows)
            ends = {n: end.window(n, source, size) for n in stored}
            start = Memory(new, stored, None, repeat, rows)
            return start.write(jnp.broadcast_to(at, live.shape), **ends).state

        repeats = len(jax.tree.leaves(old)[0])
        return old | fresh | (jax.lax.fori_loop(0, repeats, copied, stored) if stored else {})

    return new.replace(
        pos=table(cache.pos, new.pos, FAR),
        seg=table(cache.seg, new.seg, -1),
        count=cache.count,
        first=first,
        states=tuple(
            tuple(state(a, b) for a, b in zip(old, fresh, strict=True))
            for old, fresh in zip(cache.states, new.states, strict=True)
        ),
        frozen=cache,
    )
