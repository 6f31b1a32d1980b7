"""Feed-forward layers: SwiGLU, and routed experts beside a shared one."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from kernels_pallas.grouped_matmul import Fp8, Int4, Weights
from kimijax.cache import Tokens
from kimijax.config import FP8_BLOCK, Fp8Config, Int4Config, MoEConfig, SwiGLUConfig
from kimijax.layers.base import Proj, fan_in, weight
from kimijax.ops.attend import Ops


class SwiGLU(nn.Module):
    """down(silu(gate x) * up x)."""

    cfg: SwiGLUConfig
    ops: Ops

    @nn.compact
    def __call__(self, x, tokens: Tokens):
        d, f, form = x.shape[-1], self.cfg.width, self.cfg.weights
        gate = Proj((d, f), ("embed", "ffn"), form=form, name="gate")("btd,df->btf", x)
        up = Proj((d, f), ("embed", "ffn"), form=form, name="up")("btd,df->btf", x)
        down = Proj((f, d), ("ffn", "embed"), form=form, name="down")
        return down("btf,fd->btd", jax.nn.silu(gate) * up), {}


class Held(NamedTuple):
    """Parameters of a layer as they lie, those of all repeats of its group.

    A scan over layers slices what it scans: experts of a layer would be copied for it.
    """

    stacks: dict[str, jax.Array]  # by name, l ...
    repeat: jax.Array  # int32: the slice that is this layer's


class MoE(nn.Module):
    """Sigmoid-scored experts chosen with a correction bias (DeepSeek-V3's noaux_tc).

    The bias takes part in the choice alone and has no gradient: training moves it by the load.
    """

    cfg: MoEConfig
    ops: Ops

    @nn.compact
    def __call__(self, x, tokens: Tokens, held: Held | None = None):
        c, d = self.cfg, x.shape[-1]
        ids, w = self._route(x)
        shapes = {"gate": (d, c.width), "up": (d, c.width), "down": (c.width, d)}
        names = {"gate": ("embed", "ffn"), "up": ("embed", "ffn"), "down": ("ffn", "embed")}
        experts = [self._experts(n, shapes[n], names[n], held) for n in shapes]
        routed = self.ops.experts(x, ids, w, *experts, held and held.repeat)
        shared = SwiGLUConfig(width=c.shared_width, weights=c.shared_weights)
        shared, _ = SwiGLU(shared, self.ops, name="shared")(x, tokens)
        return routed + shared, {
            "load": _load(ids, tokens.seg >= 0, c.experts),
            "experts": ids,
        }

    def _experts(
        self, name: str, shape: tuple[int, int], axes: tuple[str, str], held: Held | None
    ) -> Weights:
        """The matrices (in, out) of all experts, in the form that the config names."""
        c, (inputs, outputs) = self.cfg, shape
        empty = nn.initializers.zeros
        match c.weights:
            case None:
                axes = ("expert", *(("routed", "routed_out") if name == "down" else axes))
                own = weight(self, name, (c.experts, *shape), axes, fan_in(inputs))
                return own if held is None else held.stacks[name]
            case Int4Config(group=g):
                if inputs % g or g % 8:
                    raise ValueError(f"int4 {name}: groups of {g} do not divide {inputs} inputs")
                made = (("packed", inputs // 8, jnp.int32), ("scale", inputs // g, jnp.bfloat16))
                kind, rows = Int4, outputs
            case Fp8Config():
                blocks = -(-inputs // FP8_BLOCK)
                made = (("codes", inputs, jnp.uint8), ("scale", blocks, jnp.float32))
                kind, rows = Fp8, -(-outputs // FP8_BLOCK)
        axes = ("expert", axes[1], axes[0])
        own = {
            f"{name}_{part}": weight(
                self, f"{name}_{part}",
                (c.experts, outputs if part != "scale" else rows, columns), axes, empty,
                dtype,
            )
            for part, columns, dtype in made
        }
        return kind(*(own[n] if held is None else held.stacks[n] for n in own))

    def _route(self, x):
        """Expert ids and weights, b t k, in float32."""
        c = self.cfg
        axes = ("embed", "expert")
        w_router = weight(self, "router", (x.shape[-1], c.experts), axes, fan_in(x.shape[-1]))
        bias = weight(self, "bias", (c.experts,), ("expert",), nn.initializers.zeros)
        logits = jnp.einsum(
            "btd,de->bte", x.astype(jnp.float32), w_router, precision=jax.lax.Precision.HIGHEST
        )
        scores = jax.nn.sigmoid(logits)
        biased = _allowed(c, scores + jax.lax.stop_gradient(bias))
        _, ids = jax.lax.top_k(biased, c.top_k)
        w = jnp.take_along_axis(scores, ids, -1)
        if c.normalize:
            w = w / (w.sum(-1, keepdims=True) + 1e-20)
        return ids, w * c.scaling


def _allowed(c: MoEConfig, biased: jax.Array) -> jax.Array:
    """Biased scores ... e, -inf outside the best `top_groups` groups (DeepSeek-V3, eq. 16)."""
    if c.groups == 1:
        return biased
    groups = biased.reshape(*biased.shape[:-1], c.groups, c.experts // c.groups)
    best = jax.lax.top_k(groups, 2)[0].sum(-1)
    _, kept = jax.lax.top_k(best, c.top_groups)
    keep = (kept[..., None] == jnp.arange(c.groups)).any(-2)
    return jnp.where(keep[..., None], groups, -jnp.inf).reshape(biased.shape)


def _load(ids, live, experts):
    """Share of each expert in the choices b t k of the tokens that are not padding."""
    # Whole numbers: floats that collide a TPU sorts before it adds them.
    counts = jnp.zeros(experts, jnp.int32).at[ids].add(live[..., None].astype(jnp.int32))
    counts = counts.astype(jnp.float32)
    return counts / jnp.maximum(counts.sum(), 1.0)
