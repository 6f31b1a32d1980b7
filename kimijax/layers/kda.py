"""Kimi Delta Attention: a recurrent layer whose state forgets by channel (arXiv:2510.26692).

    q, k, v = silu(conv(W x)),  q and k of unit length per head,  q scaled by K^-1/2
    g = -exp(A) softplus(F x + dt),  beta = sigmoid(B x)
    S <- diag(exp g) S,  S <- S + k (beta (v - S^T k))^T,  o = S^T q
    out = W_o (rms(o) sigmoid(G x))

The state of a row is one matrix per head: cost and cache do not grow with the context.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from kimijax.cache import Memory, Tokens
from kimijax.config import KDAConfig
from kimijax.layers.base import Proj, fan_in, weight
from kimijax.ops.attend import Ops
from kimijax.ops.delta import delta_rule
from kimijax.ops.norm import unit
from kimijax.ops.runs import begins, shifts


class KDA(nn.Module):
    """Gated delta rule over heads of `head_dim` keys and values; a document starts from zero."""

    cfg: KDAConfig
    ops: Ops

    @nn.compact
    def __call__(self, x, tokens: Tokens, memory: Memory | None):
        c, b = self.cfg, x.shape[0]
        q, k, v, memory = self._qkv(x, tokens, memory)
        g, beta = self._gates(x, tokens)
        if memory is None:
            state = jnp.zeros((b, c.heads, c.head_dim, c.head_dim), jnp.float32)
        else:
            state = memory.get("delta")
        o, state = delta_rule(self.ops, q, k, v, g, beta, state, begins(tokens), tokens)
        if memory is not None:
            memory = memory.put(delta=state)
        return self._out(x, o), memory, {}

    def _qkv(self, x, tokens, memory):
        """Query, key, value b t h k after the convolution; those of padding are zero."""
        c, d = self.cfg, x.shape[-1]
        shape, axes = (d, c.heads, c.head_dim), ("embed", "heads", "head_dim")
        u = jnp.stack([Proj(shape, axes, name=n)("btd,dhk->bthk", x) for n in "qkv"], 2)
        flat = u.reshape(*u.shape[:2], -1)
        past = memory.get("past") if memory is not None and c.conv > 1 else None
        flat_past = None if past is None else past.reshape(*past.shape[:2], -1)
        earlier, flat_past = shifts(flat, flat_past, tokens, c.conv - 1)
        taps = [
            weight(self, f"conv_{n}", (c.conv, *shape[1:]), ("tap", *axes[1:]), fan_in(c.conv))
            for n in "qkv"
        ]
        taps = jnp.stack(taps, 1).astype(x.dtype)
        u = sum(a.reshape(u.shape) * taps[j] for j, a in enumerate([flat, *earlier]))
        if past is not None:
            memory = memory.put(past=flat_past.reshape(past.shape))
        live = (tokens.seg >= 0)[..., None, None]
        q, k, v = (jnp.where(live, a, 0) for a in jnp.moveaxis(jax.nn.silu(u), 2, 0))
        return unit(q) * c.head_dim**-0.5, unit(k), v, memory

    def _gates(self, x, tokens):
        """Log decay b t h k and write strength b t h, float32; padding leaves the state alone."""
        c, d = self.cfg, x.shape[-1]
        f = self._low_rank("f", x)
        rate = weight(self, "A_log", (c.heads,), ("heads",), nn.initializers.zeros)
        shift = weight(
            self, "dt_bias", (c.heads, c.head_dim), ("heads", "head_dim"), nn.initializers.zeros
        )
        f = f.astype(jnp.float32) + shift.astype(jnp.float32)
        g = -jnp.exp(rate.astype(jnp.float32))[:, None] * jax.nn.softplus(f)
        beta = Proj((d, c.heads), ("embed", "heads"), name="beta")("btd,dh->bth", x)
        live = tokens.seg >= 0
        beta = jnp.where(live[..., None], jax.nn.sigmoid(beta.astype(jnp.float32)), 0.0)
        return jnp.where(live[..., None, None], g, 0.0), beta

    def _low_rank(self, name, x):
        """b t d -> b t h k through gate_rank channels."""
        c, rank = self.cfg, self.cfg.gate_rank
        x = Proj((x.shape[-1], rank), ("embed", "gate_rank"), name=f"{name}_down")(
            "btd,dr->btr", x
        )
        shape, axes = (rank, c.heads, c.head_dim), ("gate_rank", "heads", "head_dim")
        return Proj(shape, axes, name=f"{name}_up")("btr,rhk->bthk", x)

    def _out(self, x, o):
        """Norm and gate of each head in float32, cast once, then the output projection."""
        c, d = self.cfg, x.shape[-1]
        gate = self._low_rank("g", x)
        norm = weight(self, "o_norm", (c.head_dim,), ("norm",), nn.initializers.ones)
        o = o * jax.lax.rsqrt(jnp.mean(o * o, -1, keepdims=True) + c.norm_eps)
        o = o * norm.astype(jnp.float32) * jax.nn.sigmoid(gate.astype(jnp.float32))
        return Proj((c.heads, c.head_dim, d), ("heads", "head_dim", "embed"), 2, name="out")(
            "bthk,hkd->btd", o.astype(x.dtype)
        )
