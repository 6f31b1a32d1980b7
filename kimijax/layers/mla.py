"""Multi-head latent attention, DeepSeek-V3 form (models of the Kimi K2 and Moonlight families)."""

import flax.linen as nn
import jax.numpy as jnp

from kernels_pallas.attention import Keys, Queries
from kernels_pallas.partial import Partial, finish, merge
from kimijax.cache import FAR, Memory, Tokens, place
from kimijax.config import MLAConfig
from kimijax.layers.base import Proj, RMSNorm, fan_in, matrix
from kimijax.ops.attend import Latents, Ops, Stored
from kimijax.ops.rope import cos_sin, rotate


class MLA(nn.Module):
    """Heads share one latent per token, which is all that is cached."""

    cfg: MLAConfig
    ops: Ops

    @nn.compact
    def __call__(self, x, tokens: Tokens, memory: Memory | None):
        c, d = self.cfg, x.shape[-1]
        q_nope, q_rope = self._queries(x)
        latent = self._proj("kv", (d, c.kv_rank), ("embed", "latent"))("btd,dr->btr", x)
        latent, k_rope = RMSNorm(c.latent_eps, name="kv_norm")(latent), None
        if c.rope_dim:
            k_rope = self._proj("k_rope", (d, c.rope_dim), ("embed", "head_dim"))("btd,dp->btp", x)
        if c.rope:
            cos, sin = cos_sin(tokens.pos, c.rope)
            q_rope = rotate(q_rope, cos[:, :, None], sin[:, :, None])
            k_rope = rotate(k_rope, cos, sin)
        up = tuple(
            matrix(self, name, (c.kv_rank, c.heads, n), ("latent", "heads", "head_dim"),
                   fan_in(c.kv_rank), c.weights)
            for name, n in (("w_uk", c.nope_dim), ("w_uv", c.v_dim))
        )
        reach = c.window or FAR
        since = jnp.maximum(tokens.pos - (reach - 1), 0)
        q = Queries(q_nope, q_rope, tokens.pos, tokens.seg, since)
        kv = Latents(latent, k_rope, tokens.pos, tokens.seg)
        if memory is not None:
            new = memory.kept(latent) | ({} if k_rope is None else {"k_rope": k_rope})
            memory = memory.write(place(memory.cache, tokens), **new)
        p = attend_all(self.ops, q, kv, up, c.scale, memory)
        out = self._proj("out", (c.heads, c.v_dim, d), ("heads", "head_dim", "embed"), 2)
        out = out("bthv,hvd->btd", finish(p, x.dtype))
        return out, memory, {"max_logit": p.max_logit.max((0, 1))}

    def _queries(self, x):
        """b t h n and b t h p (None without rotary part)."""
        c = self.cfg
        dims = c.nope_dim + c.rope_dim
        name, width = "embed", x.shape[-1]
        if c.q_rank:
            x = self._proj("q_down", (width, c.q_rank), ("embed", "q_rank"))("btd,dq->btq", x)
            x = RMSNorm(c.latent_eps, name="q_norm")(x)
            name, width = "q_input", c.q_rank
        q = self._proj("q", (width, c.heads, dims), (name, "heads", "head_dim"))
        q = q("btd,dhk->bthk", x)
        return (q[..., : c.nope_dim], q[..., c.nope_dim :] if c.rope_dim else None)

    def _proj(self, name: str, shape: tuple[int, ...], axes: tuple[str, ...], inputs: int = 1):
        return Proj(shape, axes, inputs, form=self.cfg.weights, name=name)


def attend_all(
    ops: Ops, q: Queries, kv: Latents | Keys, up, scale: float, memory: Memory | None
) -> Partial:
    """Exact attention to all of the past: the call alone (kv), or every store of its memory."""
    if memory is None:
        return ops.attend(q, kv, up, scale=scale)
    cache = memory.cache
    if cache.frozen is None:
        return ops.recall(q, _stored(memory.state, memory.repeat, cache), up, scale=scale)
    # The new store begins with copies of the frozen one's end: each slot counts once.
    old = cache.frozen
    slot = old.places() - old.lead + old.first[:, None]
    old = old.replace(seg=jnp.where(slot < cache.first[:, None], old.seg, -1))
    own = cache.replace(seg=jnp.where(cache.places() < cache.lead, -1, cache.seg))
    return merge(
        ops.recall(q, _stored(memory.frozen, memory.repeat, old), up, scale=scale),
        ops.recall(q, _stored(memory.state, memory.repeat, own), up, scale=scale),
    )


def _stored(state, repeat, cache) -> Stored | Keys:
    if "head_keys" in state:
        key, value = state["head_keys"][repeat], state["head_values"][repeat]
        return Keys(key, value, None, cache.pos, cache.seg)
    rope, scale = state.get("k_rope"), state.get("latent_scale")
    return Stored(state["latent"], rope, repeat, cache.pos, cache.seg, scale)
