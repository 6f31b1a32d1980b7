"""Named model configurations. A preset is a function; `override` changes what a run needs."""

from kimijax.config import (
    CompressedConfig,
    GroupConfig,
    IndexConfig,
    KDAConfig,
    LayerConfig,
    MLAConfig,
    ModelConfig,
    MoEConfig,
    RopeConfig,
    SwiGLUConfig,
    WindowConfig,
    YarnConfig,
    group_layers,
)


def needle_2m() -> ModelConfig:
    """Bytes, 1.03 M parameters: two window layers, then one layer that reads all of the past.

    The window layers make of the last bytes a key; the compressed layer finds where that key was
    seen before and copies what followed. Two million tokens are 0.5 GiB of latents.
    """
    window = LayerConfig(
        mixer=WindowConfig(
            heads=4, kv_heads=1, head_dim=32, window=32, rope=RopeConfig(theta=1000.0, dim=32)
        ),
        ffn=SwiGLUConfig(width=320),
        conv=4,
    )
    compressed = LayerConfig(
        mixer=CompressedConfig(
            heads=2, kv_rank=64, nope_dim=32, v_dim=32, taps=2, window=32, index=IndexConfig()
        ),
        ffn=MoEConfig(experts=4, top_k=1, width=128, shared_width=128, normalize=False),
        conv=4,
    )
    return ModelConfig(
        vocab=256,
        width=192,
        groups=(
            GroupConfig(layers=(window,), repeat=2),
            GroupConfig(layers=(compressed,), repeat=1),
        ),
        embed_std=1.0,
    )


def decoder(
    *,
    vocab: int,
    width: int,
    mixers: tuple[MLAConfig | KDAConfig, ...],
    dense: int,
    ffn: SwiGLUConfig,
    moe: MoEConfig,
    norm_eps: float,
    context: int,
) -> ModelConfig:
    """A decoder of these mixers; the first `dense` layers have `ffn`, the rest `moe`."""
    layers = tuple(
        LayerConfig(mixer=mixer, ffn=ffn if n < dense else moe) for n, mixer in enumerate(mixers)
    )
    return ModelConfig(
        vocab=vocab, width=width, groups=group_layers(layers), norm_eps=norm_eps, context=context
    )


def moonlight_16b() -> ModelConfig:
    """Moonlight-16B-A3B (arXiv:2502.16982): 27 layers of MLA, 64 experts, 16.0 B parameters."""
    mla = MLAConfig(heads=16, q_rank=None, rope=RopeConfig(theta=50_000.0, dim=64))
    return decoder(
        vocab=163_840, width=2048, mixers=(mla,) * 27, dense=1, ffn=SwiGLUConfig(width=11_264),
        moe=MoEConfig(experts=64, top_k=6, width=1408, shared_width=2 * 1408, scaling=2.446),
        norm_eps=1e-5, context=8192,
    )


def kimi_k2() -> ModelConfig:
    """Kimi K2 Base and Instruct (arXiv:2507.20534): 61 layers of MLA, 384 experts, 1.03 T."""
    return _k2(factor=32.0, beta_fast=1.0, context=131_072)


def kimi_k2_0905() -> ModelConfig:
    """Kimi-K2-Instruct-0905: K2 with a YaRN factor of 64, 262,144 positions."""
    return _k2(factor=64.0, beta_fast=1.0, context=262_144)


def kimi_k2_thinking() -> ModelConfig:
    """Kimi-K2-Thinking: K2-0905 with YaRN betas 32 and 1."""
    return _k2(factor=64.0, beta_fast=32.0, context=262_144)


def kimi_k25_text() -> ModelConfig:
    """The language model of Kimi K2.5 and K2.6: as K2-Thinking."""
    return kimi_k2_thinking()


def _k2(*, factor: float, beta_fast: float, context: int) -> ModelConfig:
    return decoder(
        vocab=163_840, width=7168, mixers=(MLAConfig(rope=_k2_rope(factor, beta_fast)),) * 61,
        dense=1, ffn=SwiGLUConfig(width=18_432),
        moe=MoEConfig(experts=384, top_k=8, width=2048, shared_width=2048, scaling=2.827),
        norm_eps=1e-6, context=context,
    )


def _k2_rope(factor: float, beta_fast: float, dim: int = 64, original: int = 4096) -> RopeConfig:
    yarn = YarnConfig(
        factor=factor, original=original, beta_fast=beta_fast, beta_slow=1.0, mscale=1.0,
        mscale_all_dim=1.0,
    )
    return RopeConfig(theta=50_000.0, dim=dim, yarn=yarn)


def kimi_linear_48b() -> ModelConfig:
    """Kimi-Linear-48B-A3B (arXiv:2510.26692): 20 layers of KDA, 7 of NoPE MLA, 256 experts."""
    full = {4, 8, 12, 16, 20, 24, 27}  # counted from 1, as the release does
    mla = MLAConfig(heads=32, q_rank=None, rope=None)
    kda = KDAConfig(heads=32, head_dim=128, gate_rank=128, norm_eps=1e-5)
    return decoder(
        vocab=163_840, width=2304, mixers=tuple(mla if n in full else kda for n in range(1, 28)),
        dense=1, ffn=SwiGLUConfig(width=9216),
        moe=MoEConfig(experts=256, top_k=8, width=1024, shared_width=1024, scaling=2.446),
        norm_eps=1e-5, context=1_048_576,
    )


def moonlight_tiny() -> ModelConfig:
    """Moonlight's layers at width 64."""
    return _tiny(
        _tiny_mla(q_rank=None, rope=RopeConfig(theta=50_000.0, dim=8)), shared=2, scaling=2.446,
        norm_eps=1e-5,
    )


def kimi_k2_tiny() -> ModelConfig:
    """K2's layers at width 64, YaRN over 32 positions."""
    return _tiny(_tiny_mla(rope=_k2_rope(32.0, 1.0, 8, 32)), scaling=2.827, norm_eps=1e-6)


def kimi_k2_0905_tiny() -> ModelConfig:
    """K2-0905's layers at width 64."""
    return _tiny(_tiny_mla(rope=_k2_rope(64.0, 1.0, 8, 32)), scaling=2.827, norm_eps=1e-6)


def kimi_k2_thinking_tiny() -> ModelConfig:
    """K2-Thinking's layers at width 64."""
    return _tiny(_tiny_mla(rope=_k2_rope(64.0, 32.0, 8, 32)), scaling=2.827, norm_eps=1e-6)


def kimi_k25_text_tiny() -> ModelConfig:
    """The layers of K2.5's language model at width 64."""
    return kimi_k2_thinking_tiny()


def kimi_linear_tiny() -> ModelConfig:
    """Kimi Linear's layers at width 64: three of KDA, one of NoPE MLA."""
    kda = KDAConfig(heads=4, head_dim=16, gate_rank=16, norm_eps=1e-5)
    mixers = (kda, kda, kda, _tiny_mla(q_rank=None, rope=None))
    return _tiny(*mixers, scaling=2.446, norm_eps=1e-5)


def _tiny_mla(*, q_rank: int | None = 24, rope: RopeConfig | None) -> MLAConfig:
    return MLAConfig(
        heads=4, q_rank=q_rank, kv_rank=32, nope_dim=16, rope_dim=8, v_dim=16, rope=rope
    )


def _tiny(*mixers, shared: int = 1, scaling: float, norm_eps: float) -> ModelConfig:
    return decoder(
        vocab=256, width=64, mixers=mixers if len(mixers) > 1 else mixers * 3, dense=1,
        ffn=SwiGLUConfig(width=160),
        moe=MoEConfig(experts=8, top_k=2, width=32, shared_width=32 * shared, scaling=scaling),
        norm_eps=norm_eps, context=4096,
    )


PRESETS = {
    f.__name__: f
    for f in (
        needle_2m, moonlight_16b, kimi_k2, kimi_k2_0905, kimi_k2_thinking, kimi_k25_text,
        kimi_linear_48b, moonlight_tiny, kimi_k2_tiny, kimi_k2_0905_tiny, kimi_k2_thinking_tiny,
        kimi_k25_text_tiny, kimi_linear_tiny,
    )
}
