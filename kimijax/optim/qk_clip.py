"""QK-Clip: weights of queries and keys shrunk where attention logits grew too large.

    S = max logit of a head over the batch (scale included),  gamma = min(1, tau / S)
    per-head parts of query and key: times sqrt(gamma);  a query's part for the rotary key that all
    heads share: times gamma, and that key is left alone

(Kimi K2, arXiv:2507.20534, section 2.1.) S is the forward's own: every Partial carries it.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from kimijax.config import CompressedConfig, MLAConfig, ModelConfig, WindowConfig
from kimijax.errors import UserError


def qk_clip(cfg: ModelConfig, tau: float = 100.0) -> Callable:
    """clip(params, max_logit) -> params: after the step, by the logits of its forward.

    max_logit  by (group, layer of its repeats): l h; of layers that have none (KDA) there is none
    UserError: tau or the config cannot be clipped by.
    """
    if not tau > 0:
        raise UserError(f"QK-Clip's tau must be above 0, got {tau!r}")
    for n, layer in enumerate(cfg.layers):
        if getattr(layer.mixer, "qk_norm", None) is not None:
            raise UserError(
                f"layer {n} normalises its queries and keys: their logits do not follow the "
                "weights that QK-Clip shrinks; set its qk_norm to None, or leave QK-Clip out"
            )

    def clip(params, max_logit):
        groups = dict(params["params"])
        for (i, name), logit in max_logit.items():
            gamma = jnp.where(logit > tau, tau / logit, 1.0)
            group = groups[f"group_{i}"]
            mixer = cfg.groups[i].layers[int(name.removeprefix("layer_"))].mixer
            layer = {**group[name], "mixer": clipped(mixer, group[name]["mixer"], gamma)}
            groups[f"group_{i}"] = {**group, name: layer}
        return {**params, "params": groups}

    return clip


def clipped(
    cfg: MLAConfig | WindowConfig | CompressedConfig, mixer: dict, gamma: jax.Array
) -> dict:
    """The weights of an attention layer (stacked over l) with its heads' gamma l h applied."""
    match cfg:
        case MLAConfig():
            shared = jnp.arange(cfg.nope_dim + cfg.rope_dim) >= cfg.nope_dim
            q = jnp.where(shared, gamma[..., None], jnp.sqrt(gamma)[..., None])  # l h k
            return _times(mixer, {"q": q, "w_uk": jnp.sqrt(gamma)[..., None]})
        case CompressedConfig():
            root = jnp.sqrt(gamma)[..., None]
            return _times(mixer, {"q": root, "w_uk": root})
        case WindowConfig():
            # A key serves a group of heads: the one with the largest logit decides.
            groups = gamma.reshape(gamma.shape[0], cfg.kv_heads, -1)
            least = jnp.sqrt(groups.min(-1, keepdims=True))  # l g 1
            q = jnp.broadcast_to(least, groups.shape).reshape(*gamma.shape, 1)
            return _times(mixer, {"q": q, "key": least})


def _times(mixer: dict, factors: dict[str, jax.Array]) -> dict:
    """Weights l d h k times factors l h k or l h 1; of a projection or as they are."""
    new = dict(mixer)
    for name, factor in factors.items():
        old = mixer[name]
        w = old["w"] if isinstance(old, dict) else old
        w = w * factor[:, None].astype(w.dtype)
        new[name] = {**old, "w": w} if isinstance(old, dict) else w
    return new
