"""One decoder layer: the types of its config's fields pick the modules."""

import flax.linen as nn

from kimijax.cache import Memory, Tokens
from kimijax.config import (
    CompressedConfig,
    KDAConfig,
    LayerConfig,
    MLAConfig,
    MoEConfig,
    SwiGLUConfig,
    WindowConfig,
)
from kimijax.layers.base import Conv, RMSNorm
from kimijax.layers.compressed import Compressed
from kimijax.layers.ffn import Held, MoE, SwiGLU
from kimijax.layers.kda import KDA
from kimijax.layers.mla import MLA
from kimijax.layers.window import Window
from kimijax.ops.attend import Ops

MIXERS = {WindowConfig: Window, MLAConfig: MLA, CompressedConfig: Compressed, KDAConfig: KDA}
FFNS = {SwiGLUConfig: SwiGLU, MoEConfig: MoE}


class Layer(nn.Module):
    """x += mixer(conv(norm(x))), x += ffn(norm(x))."""

    cfg: LayerConfig
    eps: float
    ops: Ops

    @nn.compact
    def __call__(self, x, tokens: Tokens, memory: Memory | None, held: Held | None = None):
        """x b t d -> (x, memory, what the layer reports of itself).

        held  its experts, to be read where they lie; None: as parameters of its own
        """
        h = RMSNorm(self.eps, name="norm")(x)
        if self.cfg.conv:
            past = None if memory is None else memory.get("conv")
            h, past = Conv(self.cfg.conv, name="conv")(h, past, tokens)
            memory = None if memory is None else memory.put(conv=past)
        mixer = MIXERS[type(self.cfg.mixer)](self.cfg.mixer, self.ops, name="mixer")
        y, memory, seen = mixer(h, tokens, memory)
        x = x + y
        ffn = FFNS[type(self.cfg.ffn)](self.cfg.ffn, self.ops, name="ffn")
        h = RMSNorm(self.eps, name="ffn_norm")(x)
        y, loads = ffn(h, tokens) if held is None else ffn(h, tokens, held)
        return x + y, memory, {"mixer": seen, "ffn": loads}
