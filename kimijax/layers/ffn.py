"""Feed-forward layers: SwiGLU, and routed experts beside a shared one."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from kimijax.cache import Tokens
from kimijax.config import MoEConfig, SwiGLUConfig
from kimijax.layers.base import Proj, fan_in, weight
from kimijax.ops.moe import combine, dispatch, expert_mlp

TILE = 128  # rows of one expert product


class SwiGLU(nn.Module):
    """down(silu(gate x) * up x)."""

    cfg: SwiGLUConfig

    @nn.compact
    def __call__(self, x, tokens: Tokens):
        d, f = x.shape[-1], self.cfg.width
        gate = Proj((d, f), ("embed", "ffn"), name="gate")("btd,df->btf", x)
        up = Proj((d, f), ("embed", "ffn"), name="up")("btd,df->btf", x)
        down = Proj((f, d), ("ffn", "embed"), name="down")
        return down("btf,fd->btd", jax.nn.silu(gate) * up), {}


class MoE(nn.Module):
    """Sigmoid-scored experts chosen with a correction bias (DeepSeek-V3's noaux_tc, one group).

    The bias takes part in the choice alone and has no gradient: training moves it by the load.
    """

    cfg: MoEConfig

    @nn.compact
    def __call__(self, x, tokens: Tokens):
        c, (b, t, d) = self.cfg, x.shape
        flat = x.reshape(b * t, d)
        ids, w = self._route(flat)
        plan = dispatch(ids, c.experts, min(TILE, b * t * c.top_k))
        axes_in, axes_out = ("expert", "embed", "ffn"), ("expert", "ffn", "embed")
        gate = weight(self, "gate", (c.experts, d, c.width), axes_in, fan_in(d))
        up = weight(self, "up", (c.experts, d, c.width), axes_in, fan_in(d))
        down = weight(self, "down", (c.experts, c.width, d), axes_out, fan_in(c.width))
        routed = combine(expert_mlp(flat, plan, gate, up, down), plan, w).reshape(b, t, d)
        shared, _ = SwiGLU(SwiGLUConfig(width=c.shared_width), name="shared")(x, tokens)
        return routed + shared, {"load": _load(ids, tokens.seg.reshape(-1) >= 0, c.experts)}

    def _route(self, x):
        """Expert ids and weights, n k, in float32."""
        c = self.cfg
        axes = ("embed", "expert")
        w_router = weight(self, "router", (x.shape[-1], c.experts), axes, fan_in(x.shape[-1]))
        bias = weight(self, "bias", (c.experts,), ("expert",), nn.initializers.zeros)
        logits = jnp.einsum(
            "nd,de->ne", x.astype(jnp.float32), w_router, precision=jax.lax.Precision.HIGHEST
        )
        scores = jax.nn.sigmoid(logits)
        _, ids = jax.lax.top_k(scores + jax.lax.stop_gradient(bias), c.top_k)
        w = jnp.take_along_axis(scores, ids, -1)
        if c.normalize:
            w = w / (w.sum(-1, keepdims=True) + 1e-20)
        return ids, w * c.scaling


def _load(ids, live, experts):
    """Share of each expert in the choices n k of the tokens that are not padding."""
    counts = jnp.zeros(experts, jnp.float32).at[ids].add(live[:, None].astype(jnp.float32))
    return counts / jnp.maximum(counts.sum(), 1.0)
