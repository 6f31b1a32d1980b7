"""A model configuration to the config.json of the hub's classes, which transformers loads."""

from kimijax.config import (
    KDAConfig,
    MLAConfig,
    ModelConfig,
    MoEConfig,
    RopeConfig,
    SwiGLUConfig,
)
from kimijax.convert.config import LINEAR, from_hub
from kimijax.errors import UserError


def to_hub(cfg: ModelConfig) -> dict:
    """config.json of a model in the hub's spelling, which transformers loads.

    UserError if the model is none that the hub's classes describe.
    """
    mixers = [layer.mixer for layer in cfg.layers]
    mla = next((m for m in mixers if isinstance(m, MLAConfig)), None)
    kda = next((m for m in mixers if isinstance(m, KDAConfig)), None)
    dense = [layer.ffn for layer in cfg.layers if isinstance(layer.ffn, SwiGLUConfig)]
    moe = next((x.ffn for x in cfg.layers if isinstance(x.ffn, MoEConfig)), None)
    if mla is None or moe is None or not dense or cfg.context is None:
        raise UserError(
            "this model has no hub form: it needs MLA layers, a dense first layer, experts and a "
            "context"
        )
    common = _common(cfg, mla, moe, dense[0], len(dense))
    data = common | (_deepseek_keys(cfg, mla, moe) if kda is None else _linear_keys(cfg, kda, moe))
    if from_hub(data) != _described(cfg):
        raise UserError("this model has no hub form: its layers differ in more than their kind")
    return data


def _described(cfg: ModelConfig) -> ModelConfig:
    """`cfg` without what a hub config does not hold."""
    return ModelConfig(
        vocab=cfg.vocab, width=cfg.width, groups=cfg.groups, norm_eps=cfg.norm_eps,
        context=cfg.context,
    )


def _common(cfg, mla: MLAConfig, moe: MoEConfig, ffn: SwiGLUConfig, dense: int) -> dict:
    return {
        "vocab_size": cfg.vocab,
        "hidden_size": cfg.width,
        "num_hidden_layers": len(cfg.layers),
        "num_attention_heads": mla.heads,
        "num_key_value_heads": mla.heads,
        "q_lora_rank": mla.q_rank,
        "kv_lora_rank": mla.kv_rank,
        "qk_nope_head_dim": mla.nope_dim,
        "qk_rope_head_dim": mla.rope_dim,
        "v_head_dim": mla.v_dim,
        "intermediate_size": ffn.width,
        "moe_intermediate_size": moe.width,
        "first_k_dense_replace": dense,
        "moe_layer_freq": 1,
        "topk_group": moe.top_groups,
        "routed_scaling_factor": moe.scaling,
        "rms_norm_eps": cfg.norm_eps,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "use_cache": True,
    }


def _deepseek_keys(cfg, mla: MLAConfig, moe: MoEConfig) -> dict:
    return {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "n_routed_experts": moe.experts,
        "num_experts_per_tok": moe.top_k,
        "n_shared_experts": moe.shared_width // moe.width,
        "n_group": moe.groups,
        "norm_topk_prob": moe.normalize,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "attention_bias": False,
        "num_nextn_predict_layers": 0,
        "max_position_embeddings": cfg.context,
        **_rope_keys(mla.rope),
    }


def _rope_keys(rope: RopeConfig | None) -> dict:
    if rope is None:
        raise UserError("this model has no hub form: MLA without rotary positions and without KDA")
    if rope.yarn is None:
        return {"rope_theta": rope.theta, "rope_scaling": None}
    y = rope.yarn
    scaling = {
        "type": "yarn",
        "factor": y.factor,
        "original_max_position_embeddings": y.original,
        "beta_fast": y.beta_fast,
        "beta_slow": y.beta_slow,
    }
    for name in ("mscale", "mscale_all_dim", "attention_factor"):
        if getattr(y, name) is not None:
            scaling[name] = getattr(y, name)
    return {"rope_theta": rope.theta, "rope_scaling": scaling}


def _linear_keys(cfg, kda: KDAConfig, moe: MoEConfig) -> dict:
    full = [i + 1 for i, x in enumerate(cfg.layers) if isinstance(x.mixer, MLAConfig)]
    rest = [i + 1 for i, x in enumerate(cfg.layers) if isinstance(x.mixer, KDAConfig)]
    return {
        "architectures": ["KimiLinearForCausalLM"],
        "model_type": LINEAR,
        "head_dim": kda.head_dim,
        "num_experts": moe.experts,
        "num_experts_per_token": moe.top_k,
        "num_shared_experts": moe.shared_width // moe.width,
        "num_expert_group": moe.groups,
        "use_grouped_topk": True,
        "moe_renormalize": moe.normalize,
        "moe_router_activation_func": "sigmoid",
        "mla_use_nope": True,
        "model_max_length": cfg.context,
        "pad_token_id": cfg.vocab - 1,  # as released; the reference's default may lie outside
        "rope_theta": 10_000.0,
        "rope_scaling": None,
        "linear_attn_config": {
            "full_attn_layers": full,
            "kda_layers": rest,
            "num_heads": kda.heads,
            "head_dim": kda.head_dim,
            "short_conv_kernel_size": kda.conv,
        },
    }
