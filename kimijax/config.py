"""Configuration: a tree of frozen dataclasses. The type of a field picks the module.

`config_tree` changes named fields, and turns the tree into JSON and back.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from kimijax.errors import UserError

T = TypeVar("T")

LARGEST = 2**31 - 1  # of any number in a config: beyond it shapes overflow
MOST_LAYERS = 100_000  # with their repeats: `ModelConfig.layers` writes them out


def _positive(cfg, *names: str) -> None:
    for name in names:
        value = getattr(cfg, name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
            raise UserError(f"{type(cfg).__name__}.{name} must be a number above 0, got {value!r}")
        _at_most(cfg, name, LARGEST)


def _at_most(cfg, name: str, most: float, least: float = 0) -> None:
    value = getattr(cfg, name)
    if not least <= value <= most:
        raise UserError(
            f"{type(cfg).__name__}.{name} must be from {least:g} to {most:g}, got {value!r:.60}"
        )


@dataclass(frozen=True, kw_only=True)
class YarnConfig:
    """YaRN (arXiv:2309.00071): slow channels turn `factor` times slower, at every position.

    Channels that turn more than `beta_fast` times within `original` positions keep their speed,
    those that turn less than `beta_slow` times are slowed, between them it is interpolated.
    """

    factor: float
    original: int  # positions of the training before the extension
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    attention_factor: float | None = None  # of cosine and sine, instead of that of the mscales

    def __post_init__(self):
        _positive(self, "factor", "original", "beta_fast", "beta_slow")
        _at_most(self, "factor", 1e6, 1)
        for name in ("beta_fast", "beta_slow"):
            _at_most(self, name, 1e6, 1e-3)
        if self.beta_fast < self.beta_slow:
            raise UserError(f"beta_fast {self.beta_fast} is below beta_slow {self.beta_slow}")
        for name, least in (("mscale", 0), ("mscale_all_dim", 0), ("attention_factor", 1e-3)):
            if getattr(self, name) is not None:
                _at_most(self, name, 1e3, least)

    @property
    def amplitude(self) -> float:
        """What cosine and sine are multiplied by."""
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return self._gain(self.mscale) / self._gain(self.mscale_all_dim)
        return self._gain(1.0)

    @property
    def logit_gain(self) -> float:
        """What attention logits are multiplied by besides (dimension)^-1/2."""
        return self._gain(self.mscale_all_dim) ** 2 if self.mscale_all_dim else 1.0

    def _gain(self, mscale: float) -> float:
        return 0.1 * mscale * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary positions: channel pair i turns by position * theta^(-2i/dim), slower with yarn."""

    theta: float = 50_000.0
    dim: int = 64
    yarn: YarnConfig | None = None

    def __post_init__(self):
        _positive(self, "theta", "dim")
        _at_most(self, "theta", 1e12, 1.001)
        _at_most(self, "dim", 2**16)
        if self.dim % 2:
            raise UserError(f"rope dim {self.dim} must be even: rope rotates pairs")


@dataclass(frozen=True, kw_only=True)
class WindowConfig:
    """Grouped-query attention to the last `window` tokens (None: all), an optional learned sink."""

    heads: int = 4
    kv_heads: int = 1
    head_dim: int = 64
    window: int | None = 32
    rope: RopeConfig | None = None  # rope.dim may be below head_dim: the rest has no position
    sink: float | None = 0.0  # initial sink logit; None: no sink
    qk_norm: float | None = None  # epsilon of norms of a head's queries and keys; None: none

    def __post_init__(self):
        _positive(self, "heads", "kv_heads", "head_dim")
        _positive(self, *("window",) * (self.window is not None))
        _positive(self, *("qk_norm",) * (self.qk_norm is not None))
        if self.heads % self.kv_heads:
            raise UserError(f"heads {self.heads} must be a multiple of kv_heads {self.kv_heads}")
        if self.rope and self.rope.dim > self.head_dim:
            raise UserError(f"rope dim {self.rope.dim} exceeds head_dim {self.head_dim}")


@dataclass(frozen=True, kw_only=True)
class Int4Config:
    """Expert matrices held as 4-bit integers with a scale per `group` inputs (K2-Thinking)."""

    group: int = 32

    def __post_init__(self):
        _positive(self, "group")
        if self.group % 8:
            raise UserError(f"int4 group {self.group} must be a multiple of 8")


FP8_BLOCK = 128


@dataclass(frozen=True, kw_only=True)
class Fp8Config:
    """Matrices held as float8_e4m3fn with a scale per 128 x 128 (K2, DeepSeek-V3)."""


@dataclass(frozen=True, kw_only=True)
class MLAConfig:
    """Multi-head latent attention (DeepSeek-V3 form). Defaults are Kimi K2 without its YaRN.

    A head's key is its own part, made from the latent, and a part that all heads share.
    """

    heads: int = 64
    q_rank: int | None = 1536  # compressed query; None: projected directly
    kv_rank: int = 512  # the latent that is cached
    nope_dim: int = 128
    rope_dim: int = 64  # of the shared key, cached beside the latent; 0: none
    v_dim: int = 128
    rope: RopeConfig | None = RopeConfig()  # turns the shared key; None: it has no position (NoPE)
    window: int | None = None
    latent_eps: float = 1e-6  # of the latent norms, whatever the model's norm_eps
    weights: Fp8Config | None = None  # how all of its matrices are held; None: as floats

    def __post_init__(self):
        _positive(self, "heads", "kv_rank", "nope_dim", "v_dim", "latent_eps")
        _positive(self, *(n for n in ("q_rank", "window") if getattr(self, n) is not None))
        if self.rope and self.rope.dim != self.rope_dim:
            raise UserError(f"rope.dim {self.rope.dim} must be the rope_dim {self.rope_dim}")
        if self.rope_dim < 0:
            raise UserError(f"rope_dim must not be negative, got {self.rope_dim}")

    @property
    def scale(self) -> float:
        """What logits are multiplied by."""
        gain = self.rope.yarn.logit_gain if self.rope and self.rope.yarn else 1.0
        return (self.nope_dim + self.rope_dim) ** -0.5 * gain


@dataclass(frozen=True, kw_only=True)
class KDAConfig:
    """Kimi Delta Attention (arXiv:2510.26692): a recurrent state with per-channel decay."""

    heads: int = 32
    head_dim: int = 128  # of keys and of values
    conv: int = 4  # taps of the short convolutions of query, key and value
    gate_rank: int = 128  # of the low-rank maps to the decay and to the output gate
    norm_eps: float = 1e-5  # of the output norm

    def __post_init__(self):
        _positive(self, "heads", "head_dim", "gate_rank", "norm_eps")
        if not 1 <= self.conv <= 64:
            raise UserError(f"KDAConfig.conv must be 1 to 64 taps, got {self.conv!r}")


@dataclass(frozen=True, kw_only=True)
class IndexConfig:
    """Which blocks of the past are read: summary keys per block, a choice per group of queries."""

    dim: int = 32
    keys: int = 2  # summary keys of a block
    block: int = 32  # tokens of a block
    top_k: int = 8  # blocks chosen
    group: int = 64  # queries that share the choice made at their first token

    def __post_init__(self):
        _positive(self, "dim", "keys", "block", "top_k", "group")
        if self.group % self.block:
            raise UserError(f"index group {self.group} must be a multiple of block {self.block}")


@dataclass(frozen=True, kw_only=True)
class CompressedConfig:
    """NoPE latent attention to a local region and the chosen blocks, under one softmax."""

    heads: int = 2
    kv_rank: int = 64  # the latent that is cached: keys and values of all heads
    nope_dim: int = 32
    v_dim: int = 32
    taps: int = 2  # tokens whose hidden state enters a latent: the token itself and those before
    window: int = 32  # tokens before a group that its queries always see
    sink: float | None = 0.0
    index: IndexConfig = IndexConfig()

    def __post_init__(self):
        _positive(self, "heads", "kv_rank", "nope_dim", "v_dim", "taps", "window")
        if self.window % self.index.block or self.window > self.index.group:
            raise UserError(
                f"window {self.window} must be a multiple of the index block {self.index.block} "
                f"and at most the group {self.index.group}: regions and blocks must not overlap"
            )

    @property
    def scale(self) -> float:
        """What logits are multiplied by."""
        return self.nope_dim**-0.5


@dataclass(frozen=True, kw_only=True)
class SwiGLUConfig:
    """down(silu(gate x) * up x)."""

    width: int = 256
    weights: Fp8Config | None = None  # how its matrices are held; None: as floats

    def __post_init__(self):
        _positive(self, "width")


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """Routed experts chosen by sigmoid scores plus a correction bias, and one shared expert.

    With groups > 1 (DeepSeek-V3), only experts of the `top_groups` groups whose two best biased
    scores have the largest sum can be chosen.
    """

    experts: int = 4
    top_k: int = 1
    width: int = 128  # of one expert
    shared_width: int = 128
    groups: int = 1
    top_groups: int = 1
    normalize: bool = True  # the chosen scores sum to one
    scaling: float = 1.0
    weights: Int4Config | Fp8Config | None = None  # how routed experts are held; None: as floats
    shared_weights: Fp8Config | None = None  # the same of the shared expert

    def __post_init__(self):
        _positive(self, "experts", "top_k", "width", "shared_width", "scaling")
        _positive(self, "groups", "top_groups")
        _at_most(self, "experts", 2**16)
        if isinstance(self.weights, Int4Config) and self.width % self.weights.group:
            raise UserError(f"width {self.width} of experts is no multiple of {self.weights.group}")
        if self.experts % self.groups or self.top_groups > self.groups:
            raise UserError(
                f"groups {self.groups} must divide experts {self.experts}, and top_groups "
                f"{self.top_groups} not exceed them"
            )
        if self.groups > 1 and self.experts // self.groups < 2:
            raise UserError(f"a group needs 2 experts: {self.experts} in {self.groups} groups")
        if self.top_k > self.experts // self.groups * self.top_groups:
            raise UserError(f"top_k {self.top_k} exceeds the experts of {self.top_groups} groups")
        if self.top_k > self.experts:
            raise UserError(f"top_k {self.top_k} exceeds experts {self.experts}")
        if self.normalize and self.top_k == 1:
            raise UserError("normalize with top_k 1 makes every weight 1: the router cannot learn")


@dataclass(frozen=True, kw_only=True)
class LayerConfig:
    """Pre-norm residual block: x += mixer(conv(norm(x))), x += ffn(norm(x))."""

    mixer: WindowConfig | MLAConfig | CompressedConfig | KDAConfig
    ffn: SwiGLUConfig | MoEConfig
    conv: int = 0  # taps of a residual depthwise causal convolution before the mixer; 0: none

    def __post_init__(self):
        if self.conv != 0 and not 2 <= self.conv <= 64:
            raise UserError(f"LayerConfig.conv must be 0 or 2 to 64 taps, got {self.conv!r}")


@dataclass(frozen=True, kw_only=True)
class GroupConfig:
    """Layers that repeat; the model scans over the repeats."""

    layers: tuple[LayerConfig, ...]
    repeat: int = 1

    def __post_init__(self):
        _positive(self, "repeat")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder: embedding, groups of layers, norm, head."""

    vocab: int
    width: int
    groups: tuple[GroupConfig, ...]
    norm_eps: float = 1e-6
    embed_std: float = 0.02
    context: int | None = None  # positions the model was trained for; nothing stops at them

    def __post_init__(self):
        _positive(self, "vocab", "width", "norm_eps", "embed_std")
        if self.context is not None:
            _positive(self, "context")
        count = sum(len(group.layers) * group.repeat for group in self.groups)
        if count > MOST_LAYERS:
            raise UserError(f"a model of {count} layers is above {MOST_LAYERS}; lower its repeats")
        for layer in (layer for group in self.groups for layer in group.layers):
            form = getattr(layer.ffn, "weights", None)
            if isinstance(form, Int4Config) and self.width % form.group:
                raise UserError(f"width {self.width} is no multiple of int4 groups of {form.group}")

    def place(self, n: int) -> tuple[int, int, int]:
        """Where layer n of `layers` is: (group, repeat, place within the repeat)."""
        for i, g in enumerate(self.groups):
            if n < len(g.layers) * g.repeat:
                return i, *divmod(n, len(g.layers))
            n -= len(g.layers) * g.repeat
        raise IndexError("there is no such layer")

    @property
    def layers(self) -> tuple[LayerConfig, ...]:
        """Every layer in order, repeats written out."""
        return tuple(layer for g in self.groups for layer in g.layers * g.repeat)

    def of_layers(self, f: Callable[[LayerConfig], T]) -> list[T]:
        """f of every layer in order, asked once of those that repeat."""
        return [x for g in self.groups for x in [f(layer) for layer in g.layers] * g.repeat]


def group_layers(layers: tuple[LayerConfig, ...]) -> tuple[GroupConfig, ...]:
    """Groups that repeat, so that a model of many layers compiles as few.

    From the front, the pattern is taken whose repeats cover most layers, the shortest of those.
    """
    groups: list[GroupConfig] = []
    lone: list[LayerConfig] = []  # layers at the front that no repeated pattern begins with

    def flush():
        if lone:
            groups.append(GroupConfig(layers=tuple(lone)))
            lone.clear()

    while layers:
        covered, period = max(
            (_repeats(layers, p) * p, -p) for p in range(1, len(layers) + 1)
            if p == 1 or _repeats(layers, p) > 1
        )
        period = -period
        if covered > period:
            flush()
            groups.append(GroupConfig(layers=layers[:period], repeat=covered // period))
        else:
            lone.append(layers[0])
        layers = layers[covered:]
    flush()
    return tuple(groups)


def _repeats(layers: tuple[LayerConfig, ...], period: int) -> int:
    n = 1
    while layers[n * period : (n + 1) * period] == layers[:period]:
        n += 1
    return n
