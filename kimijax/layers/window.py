"""Grouped-query attention: to the last tokens (cost and cache do not grow) or to all of them."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from kernels_pallas.attention import Keys, Queries
from kernels_pallas.partial import finish, merge, sink
from kimijax.cache import Memory, Tokens, keep_last, place, tile_length
from kimijax.config import WindowConfig
from kimijax.layers.base import Proj, RMSNorm, weight
from kimijax.layers.mla import attend_all
from kimijax.ops.attend import Ops
from kimijax.ops.rope import cos_sin, rotate
from kimijax.ops.runs import tiles, tiles_with_halo


class Window(nn.Module):
    """Over the last `window` tokens, itself included; without a window over all of the past."""

    cfg: WindowConfig
    ops: Ops

    @nn.compact
    def __call__(self, x, tokens: Tokens, memory: Memory | None):
        c, d = self.cfg, x.shape[-1]
        q = Proj((d, c.heads, c.head_dim), ("embed", "heads", "head_dim"), name="q")(
            "btd,dhk->bthk", x
        )
        kv = ((d, c.kv_heads, c.head_dim), ("embed", "kv_heads", "head_dim"))
        key = Proj(*kv, name="key")("btd,dgk->btgk", x)
        value = Proj(*kv, name="value")("btd,dgk->btgk", x)
        if c.qk_norm is not None:
            q = RMSNorm(c.qk_norm, name="q_norm")(q)
            key = RMSNorm(c.qk_norm, name="k_norm")(key)
        if c.rope:
            cos, sin = cos_sin(tokens.pos, c.rope)
            q, key = (_rotate_first(a, cos, sin, c.rope.dim) for a in (q, key))
        if c.window is None:
            p, memory = self._attend_all(q, key, value, tokens, memory)
        else:
            p = self._attend(q, key, value, tokens, memory)
        if c.sink is not None:
            logit = weight(self, "sink", (c.heads,), ("heads",), nn.initializers.constant(c.sink))
            p = merge(p, sink(logit, p))
        if memory is not None and c.window is not None:
            memory = memory.put(
                key=keep_last(memory.get("key"), key, tokens.used),
                value=keep_last(memory.get("value"), value, tokens.used),
            )
        out = Proj((c.heads, c.head_dim, d), ("heads", "head_dim", "embed"), 2, name="out")(
            "bthk,hkd->btd", finish(p, x.dtype)
        )
        return out, memory, {"max_logit": p.max_logit.max((0, 1))}

    def _attend_all(self, q, key, value, tokens, memory):
        """Keys and values of the call, or of a cache that then holds them."""
        queries = Queries(q, None, tokens.pos, tokens.seg, jnp.zeros_like(tokens.pos))
        keys = Keys(key, value, None, tokens.pos, tokens.seg)
        if memory is not None:
            at = place(memory.cache, tokens)
            memory = memory.write(at, head_keys=key, head_values=value)
        return attend_all(self.ops, queries, keys, (), self.cfg.head_dim**-0.5, memory), memory

    def _attend(self, q, key, value, tokens, memory):
        """Tiles of queries against the tile and the window before it."""
        c, (b, t) = self.cfg, tokens.pos.shape
        past = _past(key, value, tokens, memory, c.window)
        since = jnp.maximum(tokens.pos - c.window + 1, 0)
        queries = Queries(q, None, tokens.pos, tokens.seg, since)
        keys = Keys(key, value, None, tokens.pos, tokens.seg)
        length = tile_length(c.window)
        if not tokens.aligned or t // tokens.runs % length:
            length = t // tokens.runs
        queries = jax.tree.map(lambda a: tiles(a, tokens, length), queries)
        keys = jax.tree.map(lambda a, h: tiles_with_halo(a, h, tokens, length), keys, past)
        p = self.ops.tiled(queries, keys, scale=c.head_dim**-0.5)
        return jax.tree.map(lambda a: a.reshape(b, t, *a.shape[4:]), p)


def _past(key, value, tokens, memory, n) -> Keys:
    """The n tokens before the call."""
    if memory is None:
        none = jnp.zeros((key.shape[0], n, *key.shape[2:]), key.dtype)
        far = jnp.full((key.shape[0], n), -1, jnp.int32)
        return Keys(none, none, None, far, far)
    pos, seg = tokens.past_pos[:, -n:], tokens.past_seg[:, -n:]
    old_key, old_value = memory.get("key"), memory.get("value")
    return Keys(old_key.astype(key.dtype), old_value.astype(value.dtype), None, pos, seg)


def _rotate_first(x, cos, sin, dim):
    """Rotate the first `dim` channels of each head."""
    turned = rotate(x[..., :dim], cos[:, :, None], sin[:, :, None])
    return turned if dim == x.shape[-1] else jnp.concatenate([turned, x[..., dim:]], -1)
