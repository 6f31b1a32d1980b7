"""Compressed attention: NoPE latents, a block index, chosen blocks and a local region.

out = merge(local region, chosen blocks, sink): Partials over disjoint keys, one softmax.
A group of `index.group` queries reads the blocks that its first token chose, so a choice depends
on nothing later; a token marked fresh chooses for itself (questions and generated tokens do).
"""

import flax.linen as nn
import jax.numpy as jnp

from kernels_pallas.attention import Queries
from kernels_pallas.partial import finish, merge, sink
from kimijax.cache import Memory, Tokens, numbers, place
from kimijax.config import CompressedConfig
from kimijax.layers.base import fan_in, weight
from kimijax.layers.mla import attend_all
from kimijax.ops.attend import Latents, Ops, absorb, values
from kimijax.ops.blocks import (
    IndexWeights,
    attend_local,
    choose,
    own_store,
    read_chosen,
    stores_of,
)
from kimijax.ops.index_loss import index_loss
from kimijax.ops.norm import rms
from kimijax.ops.runs import shifts


class Compressed(nn.Module):
    """Latent attention whose cost per token grows with the context in the index alone."""

    cfg: CompressedConfig
    ops: Ops

    @nn.compact
    def __call__(self, x, tokens: Tokens, memory: Memory | None):
        c, d = self.cfg, x.shape[-1]
        latent, memory, w_kv = self._latents(x, tokens, memory)
        if memory is not None:
            kept = memory.kept(latent)
            latent = numbers(kept, x.dtype)  # as later calls will read them
        w_q, up, w_index = self._weights(w_kv)
        q = jnp.einsum("btd,dhn->bthn", x, w_q.astype(x.dtype))
        kv = Latents(latent, None, tokens.pos, tokens.seg)
        aux = {}
        if self.ops.exact:
            memory = memory and memory.write(place(memory.cache, tokens), **kept)
            queries = Queries(q, None, tokens.pos, tokens.seg, jnp.zeros_like(tokens.pos))
            p = attend_all(self.ops, queries, kv, up, c.scale, memory)
        else:
            stores, memory = (
                ([own_store(c, kv, w_index)], None)
                if memory is None
                else stores_of(c, kept, w_index, tokens, memory)
            )
            # Looked up after the write: a read of the old array would force a copy of it.
            lead = None if memory is None else _lead(c, memory, tokens, x.dtype)
            q = absorb(q, up[0])
            p = attend_local(c, self.ops, q, kv, lead, tokens)
            ids, memory, aux["chosen"] = choose(c, self.ops, x, w_index, stores, tokens, memory)
            p = merge(p, read_chosen(c, self.ops, q, ids, stores, tokens))
            p = p._replace(out=values(p.out, up[1]))
        logit = None
        if c.sink is not None:
            logit = weight(self, "sink", (c.heads,), ("heads",), nn.initializers.constant(c.sink))
            p = merge(p, sink(logit, p))
        if tokens.watch is not None:
            aux["index_loss"] = index_loss(c, x, w_q, up[0], logit, w_index, kv, tokens)
        w_out = weight(
            self, "out", (c.heads, c.v_dim, d), ("heads", "head_dim", "embed"),
            fan_in(c.heads * c.v_dim),
        )
        out = jnp.einsum("bthv,hvd->btd", finish(p, x.dtype), w_out.astype(x.dtype))
        return out, memory, aux | {"max_logit": p.max_logit.max((0, 1))}

    def _latents(self, x, tokens, memory):
        """One latent a token, from its own hidden state and the taps - 1 before it."""
        c, d = self.cfg, x.shape[-1]
        axes = ("tap", "embed", "latent")
        w_kv = weight(self, "kv", (c.taps, d, c.kv_rank), axes, _copying(c.nope_dim))
        past = memory.get("past") if memory is not None and c.taps > 1 else None
        earlier, past = shifts(x, past, tokens, c.taps - 1)
        latent = sum(
            jnp.einsum("btd,dr->btr", tap, w_kv[j].astype(x.dtype))
            for j, tap in enumerate([x, *earlier])
        )
        norm = weight(self, "kv_norm", (c.kv_rank,), ("norm",), nn.initializers.ones)
        latent = rms(latent, 1e-6) * norm.astype(x.dtype)
        if past is not None:
            memory = memory.put(past=past)
        return latent, memory, w_kv

    def _weights(self, w_kv):
        """Query, up-projections and index. They start tied: a query is the key of its context."""
        c, i, d = self.cfg, self.cfg.index, w_kv.shape[1]
        r, heads = c.kv_rank, ("heads", "head_dim")

        def tied_query(key, shape, dtype):
            return jnp.broadcast_to(w_kv[-1, :, None, : c.nope_dim], shape).astype(dtype)

        def tied_index(key, shape, dtype):
            return (w_kv[-1] @ w_key[0]).astype(dtype)

        def part(start):
            def init(key, shape, dtype):
                eye = jnp.eye(r, shape[-1], -start, dtype)
                return jnp.broadcast_to(eye[:, None], shape)

            return init

        def shared(key, shape, dtype):
            one = fan_in(r)(key, shape[1:], dtype)
            return jnp.broadcast_to(one, shape)

        w_q = weight(self, "q", (d, c.heads, c.nope_dim), ("embed", *heads), tied_query)
        w_uk = weight(self, "w_uk", (r, c.heads, c.nope_dim), ("latent", *heads), part(0))
        w_uv = weight(self, "w_uv", (r, c.heads, c.v_dim), ("latent", *heads), part(r - c.v_dim))
        w_key = weight(
            self, "index_key", (i.keys, r, i.dim), ("index_keys", "latent", "index"), shared
        )
        gate = weight(self, "index_gate", (r, i.keys), ("latent", "index_keys"), fan_in(r))
        bias = weight(
            self, "index_bias", (i.block, i.keys), ("block", "index_keys"),
            nn.initializers.normal(0.5),
        )
        query = weight(self, "index_query", (d, i.dim), ("embed", "index"), tied_index)
        return w_q, (w_uk, w_uv), IndexWeights(query, w_key, gate, bias)


def _copying(key_dim: int):
    """Keys start from the earliest tap, values from the token itself: an induction head."""

    def init(rng, shape, dtype):
        taps, d, r = shape
        w = fan_in(d)(rng, (d, r), dtype)
        is_key = jnp.arange(r) < key_dim
        own, earliest = jnp.where(is_key, 0.0, w), jnp.where(is_key, w, 0.0)
        if taps == 1:
            return w[None]
        return jnp.stack([own, *[jnp.zeros_like(w)] * (taps - 2), earliest])

    return init


def _lead(c: CompressedConfig, memory: Memory, tokens: Tokens, dtype) -> Latents:
    """The tokens before the call that a local region can reach."""
    n = c.window if tokens.aligned else c.window + c.index.group
    start = tokens.count - memory.cache.first + memory.cache.lead - n
    return Latents(
        memory.latents_at(start, n, dtype), None, tokens.past_pos[:, -n:], tokens.past_seg[:, -n:]
    )


