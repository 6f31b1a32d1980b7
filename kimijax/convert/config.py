"""Hugging Face config.json to a model configuration; `export_config` is the way back.

Both spellings are read: that of the hub (rope_theta and rope_scaling, counted layer lists) and
that of transformers 5 (rope_parameters, layer_types). Whatever would change the model and is not
supported is refused by name; nothing is guessed.
"""

from kimijax.config import (
    LARGEST,
    KDAConfig,
    MLAConfig,
    ModelConfig,
    MoEConfig,
    RopeConfig,
    SwiGLUConfig,
    YarnConfig,
)
from kimijax.errors import UserError
from kimijax.presets import decoder

DEEPSEEK = ("deepseek_v3", "kimi_k2")
LINEAR = "kimi_linear"
WRAPPER = "kimi_k25"  # text beside vision: the language model is in text_config
MOST_LAYERS, LARGEST_DIM = 10_000, 2**24

# Settings that would change the model, with the one value that is supported.
FIXED = {
    "hidden_act": "silu",
    "attention_bias": False,
    "tie_word_embeddings": False,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "moe_router_activation_func": "sigmoid",
    "moe_layer_freq": 1,
    "mla_use_nope": True,
    "rope_interleave": True,
    "mlp_bias": False,
    "sliding_window": None,
    "partial_rotary_factor": None,
    "use_grouped_topk": True,
}


def from_hub(data: dict) -> ModelConfig:
    """The configuration of a hub model; UserError names the key and the value."""
    text = text_config(data)
    for key, want in FIXED.items():
        if text.get(key, want) != want:
            raise UserError(f"{key} {text[key]!r:.60} is not supported, only {want!r}")
    if text.get("num_key_value_heads", text.get("num_attention_heads")) != _int(
        text, "num_attention_heads"
    ):
        raise UserError(
            f"num_key_value_heads {text['num_key_value_heads']!r} differs from "
            "num_attention_heads: MLA has one latent for all heads"
        )
    linear = text["model_type"] == LINEAR
    eps = _number(text, "rms_norm_eps")
    _check_types(text, linear)
    return decoder(
        vocab=_int(text, "vocab_size"),
        width=_int(text, "hidden_size"),
        mixers=_hybrid(text, eps) if linear else (_mla(text, _rope(text)),) * _layers(text),
        dense=_int(text, "first_k_dense_replace", least=0),
        ffn=SwiGLUConfig(width=_int(text, "intermediate_size")),
        moe=_moe(text, linear),
        norm_eps=eps,
        context=_int(
            text, "model_max_length" if linear else "max_position_embeddings", most=LARGEST
        ),
    )


def text_config(data: dict) -> dict:
    """The part of a config.json that describes the language model."""
    if not isinstance(data, dict):
        raise UserError(f"a config must be a JSON object, not a {type(data).__name__}")
    kind = data.get("model_type")
    text = data.get("text_config") if kind == WRAPPER else data
    if not isinstance(text, dict):
        raise UserError(f"text_config must be an object, got {text!r}")
    inner = text.get("model_type")
    if inner not in (*DEEPSEEK, LINEAR) or (kind == WRAPPER and inner not in DEEPSEEK):
        known = ", ".join((*DEEPSEEK, LINEAR, WRAPPER))
        raise UserError(f"model_type {inner!r} is not supported: there are {known}")
    return text


def _layers(text: dict) -> int:
    return _int(text, "num_hidden_layers", most=MOST_LAYERS)


def _check_types(text: dict, linear: bool) -> None:
    """The lists of transformers 5 must say what the other keys do."""
    n, dense = _layers(text), _int(text, "first_k_dense_replace", least=0)
    full = full_attention_layers(text) if linear else set(range(n))
    wanted = {
        "layer_types": ["full_attention" if i in full else "linear_attention" for i in range(n)],
        "mlp_layer_types": ["dense" if i < dense else "sparse" for i in range(n)],
    }
    for key, want in wanted.items():
        if text.get(key, want) != want:
            raise UserError(f"{key} {text[key]!r:.60} contradicts the other keys of the config")


def _mla(text: dict, rope: RopeConfig | None) -> MLAConfig:
    return MLAConfig(
        heads=_int(text, "num_attention_heads"),
        q_rank=None if text.get("q_lora_rank") is None else _int(text, "q_lora_rank"),
        kv_rank=_int(text, "kv_lora_rank"),
        nope_dim=_int(text, "qk_nope_head_dim"),
        rope_dim=_int(text, "qk_rope_head_dim"),
        v_dim=_int(text, "v_head_dim"),
        rope=rope,
    )


def _hybrid(text: dict, eps: float) -> tuple[MLAConfig | KDAConfig, ...]:
    """One mixer per layer of Kimi Linear."""
    n, full = _layers(text), full_attention_layers(text)
    linear = _object(text, "linear_attn_config")
    if linear.get("gate_lower_bound") is not None:
        raise UserError(f"gate_lower_bound {linear['gate_lower_bound']!r:.60} is not supported")
    kda = KDAConfig(
        heads=_int(linear, "num_heads"),
        head_dim=_int(linear, "head_dim"),
        conv=_int(linear, "short_conv_kernel_size"),
        gate_rank=_int(linear, "head_dim"),
        norm_eps=eps,
    )
    mla = _mla(text, None)
    return tuple(mla if i in full else kda for i in range(n))


def full_attention_layers(text: dict) -> set[int]:
    """Layers of full attention, counted from 0; the released lists count from 1.

    A config without the lists is refused: the default of the reference is not the released layout.
    """
    n, linear = _layers(text), _object(text, "linear_attn_config")
    full, kda = (linear.get(k) for k in ("full_attn_layers", "kda_layers"))
    for name, layers in (("full_attn_layers", full), ("kda_layers", kda)):
        if not isinstance(layers, list) or not all(type(i) is int for i in layers):
            raise UserError(f"linear_attn_config.{name} must be a list of layers, got {layers!r}")
    if sorted([*full, *kda]) != list(range(1, n + 1)):
        raise UserError(
            f"linear_attn_config: full_attn_layers {full} and kda_layers {kda} must hold every "
            f"layer from 1 to {n} once"
        )
    if not kda or not full:
        raise UserError(f"full_attn_layers {full} and kda_layers {kda} both need a layer")
    return {i - 1 for i in full}


def _moe(text: dict, linear: bool) -> MoEConfig:
    names = (
        ("num_experts", "num_experts_per_token", "num_shared_experts", "num_expert_group",
         "moe_renormalize")
        if linear
        else ("n_routed_experts", "num_experts_per_tok", "n_shared_experts", "n_group",
              "norm_topk_prob")
    )
    experts, top_k, shared, groups, renormalize = names
    width = _int(text, "moe_intermediate_size")
    normalize = text.get(renormalize)
    if not isinstance(normalize, bool):
        raise UserError(f"{renormalize} must be true or false, got {normalize!r}")
    return MoEConfig(
        experts=_int(text, experts),
        top_k=_int(text, top_k),
        width=width,
        shared_width=_int(text, shared) * width,
        groups=_int(text, groups),
        top_groups=_int(text, "topk_group"),
        normalize=normalize,
        scaling=_number(text, "routed_scaling_factor"),
    )


def _rope(text: dict) -> RopeConfig:
    """From rope_parameters (transformers 5), or rope_theta and rope_scaling (hub).

    Where a config has both they must say the same.
    """
    modern, hub = text.get("rope_parameters"), text.get("rope_scaling")
    if modern is None:
        return _rope_of(text, {} if hub is None else hub)
    rope = _rope_of(text, modern)
    if hub is not None and _rope_of(text, hub) != rope:
        raise UserError("rope_parameters and rope_scaling contradict one another")
    return rope


def _rope_of(text: dict, scaling: object) -> RopeConfig:
    if not isinstance(scaling, dict):
        raise UserError(f"rope scaling must be an object, got {scaling!r:.60}")
    thetas = {_number(x, "rope_theta") for x in (scaling, text) if x.get("rope_theta") is not None}
    if len(thetas) != 1:
        raise UserError(f"rope_theta must be given, and once: got {sorted(thetas)}")
    kinds = {scaling[key] for key in ("rope_type", "type") if isinstance(scaling.get(key), str)}
    kind = kinds.pop() if kinds else "default"
    if kinds or kind not in ("default", "yarn"):
        raise UserError(
            f"rope type {scaling.get('rope_type', scaling.get('type'))!r} is not supported: there "
            "are 'default' and 'yarn'"
        )
    if scaling.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise UserError(f"partial_rotary_factor {scaling['partial_rotary_factor']!r:.60} is not 1")
    yarn = _yarn(text, scaling) if kind == "yarn" else None
    return RopeConfig(theta=thetas.pop(), dim=_int(text, "qk_rope_head_dim"), yarn=yarn)


def _yarn(text: dict, scaling: dict) -> YarnConfig:
    if scaling.get("truncate", True) is not True:
        raise UserError(f"yarn truncate {scaling['truncate']!r:.60} is not supported, only true")
    context = _int(text, "max_position_embeddings", most=LARGEST)
    original = _int(scaling, "original_max_position_embeddings", context, most=LARGEST)
    optional = {
        name: _number(scaling, name)
        for name in ("mscale", "mscale_all_dim", "attention_factor")
        if scaling.get(name) is not None
    }
    return YarnConfig(
        factor=_number(scaling, "factor", context / original),
        original=original,
        beta_fast=_number(scaling, "beta_fast", 32.0) or 32.0,
        beta_slow=_number(scaling, "beta_slow", 1.0) or 1.0,
        **optional,
    )


def _object(data: dict, key: str) -> dict:
    value = data.get(key)
    if not isinstance(value, dict):
        raise UserError(f"{key} must be an object, got {value!r}")
    return value


def _int(
    data: dict, key: str, default: int | None = None, least: int = 1, most: int = LARGEST_DIM
) -> int:
    value = data.get(key)
    value = default if value is None else value
    if type(value) is not int or not least <= value <= most:
        raise UserError(f"{key} must be a whole number from {least} to {most}, got {value!r:.60}")
    return value


def _number(data: dict, key: str, default: float | None = None) -> float:
    value = data.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= LARGEST:
        raise UserError(f"{key} must be a number, got {value!r:.60}")
    return float(value)
