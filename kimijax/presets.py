"""Named model configurations. A preset is a function; `override` changes what a run needs."""

from kimijax.config import (
    CompressedConfig,
    GroupConfig,
    IndexConfig,
    LayerConfig,
    ModelConfig,
    MoEConfig,
    RopeConfig,
    SwiGLUConfig,
    WindowConfig,
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


PRESETS = {"needle_2m": needle_2m}
