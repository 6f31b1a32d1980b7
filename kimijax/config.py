"""Configuration: a tree of frozen dataclasses. The type of a field picks the module.

`override` makes a copy with named fields replaced; `to_dict` and `from_dict` turn the tree into
JSON and back, where a foreign file is checked key by key before anything is built from it.
"""

import dataclasses
import difflib
import types
import typing
from dataclasses import dataclass, fields, is_dataclass

from kimijax.errors import UserError


def _positive(cfg, *names: str) -> None:
    for name in names:
        value = getattr(cfg, name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
            raise UserError(f"{type(cfg).__name__}.{name} must be a number above 0, got {value!r}")


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary positions: channel pair i turns by position * theta^(-2i/dim)."""

    theta: float = 50_000.0
    dim: int = 64

    def __post_init__(self):
        _positive(self, "theta", "dim")
        if self.dim % 2:
            raise UserError(f"rope dim {self.dim} must be even: rope rotates pairs")


@dataclass(frozen=True, kw_only=True)
class WindowConfig:
    """Grouped-query attention to the last `window` tokens, with an optional learned sink."""

    heads: int = 4
    kv_heads: int = 1
    head_dim: int = 64
    window: int = 32
    rope: RopeConfig | None = None  # rope.dim may be below head_dim: the rest has no position
    sink: float | None = 0.0  # initial sink logit; None: no sink

    def __post_init__(self):
        _positive(self, "heads", "kv_heads", "head_dim", "window")
        if self.heads % self.kv_heads:
            raise UserError(f"heads {self.heads} must be a multiple of kv_heads {self.kv_heads}")
        if self.rope and self.rope.dim > self.head_dim:
            raise UserError(f"rope dim {self.rope.dim} exceeds head_dim {self.head_dim}")


@dataclass(frozen=True, kw_only=True)
class MLAConfig:
    """Multi-head latent attention (DeepSeek-V3 form). Defaults are Kimi K2 without its YaRN."""

    heads: int = 64
    q_rank: int | None = 1536  # compressed query; None: projected directly
    kv_rank: int = 512  # the latent that is cached
    nope_dim: int = 128
    v_dim: int = 128
    rope: RopeConfig | None = RopeConfig()  # one rotary key shared by all heads; None: NoPE
    window: int | None = None
    latent_eps: float = 1e-6  # of the latent norms, whatever the model's norm_eps

    def __post_init__(self):
        _positive(self, "heads", "kv_rank", "nope_dim", "v_dim", "latent_eps")
        _positive(self, *(n for n in ("q_rank", "window") if getattr(self, n) is not None))

    @property
    def scale(self) -> float:
        """What logits are multiplied by."""
        return (self.nope_dim + (self.rope.dim if self.rope else 0)) ** -0.5


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

    def __post_init__(self):
        _positive(self, "width")


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """Routed experts chosen by sigmoid scores plus a correction bias, and one shared expert."""

    experts: int = 4
    top_k: int = 1
    width: int = 128  # of one expert
    shared_width: int = 128
    normalize: bool = True  # the chosen scores sum to one
    scaling: float = 1.0

    def __post_init__(self):
        _positive(self, "experts", "top_k", "width", "shared_width", "scaling")
        if self.top_k > self.experts:
            raise UserError(f"top_k {self.top_k} exceeds experts {self.experts}")
        if self.normalize and self.top_k == 1:
            raise UserError("normalize with top_k 1 makes every weight 1: the router cannot learn")


@dataclass(frozen=True, kw_only=True)
class LayerConfig:
    """Pre-norm residual block: x += mixer(conv(norm(x))), x += ffn(norm(x))."""

    mixer: WindowConfig | MLAConfig | CompressedConfig
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

    def __post_init__(self):
        _positive(self, "vocab", "width", "norm_eps", "embed_std")

    @property
    def layers(self) -> tuple[LayerConfig, ...]:
        """Every layer in order, repeats written out."""
        return tuple(layer for g in self.groups for layer in g.layers * g.repeat)


def override(cfg, changes: dict[str, object]):
    """`override(cfg, {"groups.0.repeat": 4})`: a copy with nested fields replaced.

    A path names fields and, in tuples, indices. All changes of a dataclass are made at once, so
    its checks see the result alone. Unknown names raise UserError with the nearest.
    """
    tree: dict = {}
    for path, value in changes.items():
        *parents, last = path.split(".")
        node = tree
        for step in parents:
            node = node.setdefault(step, _Branch())
            if not isinstance(node, _Branch):
                raise UserError(f"{path!r} and a path above it are both given")
        if isinstance(node.get(last), _Branch):
            raise UserError(f"{path!r} and a path below it are both given")
        node[last] = value
    return _replace(cfg, tree, "")


class _Branch(dict):
    """Changes below a field; a plain dict would be a value."""


def _replace(node, changes: dict, where: str):
    if isinstance(node, tuple):
        for step in changes:
            if not step.isdigit() or int(step) >= len(node):
                raise UserError(f"{where}{step!r} is no index below {len(node)}")
        return tuple(_changed(x, str(i), changes, where) for i, x in enumerate(node))
    names = [f.name for f in fields(node)] if is_dataclass(node) else []
    for name in changes:
        if name not in names:
            raise UserError(f"{where}{name}: {_unknown(name, type(node).__name__, names)}")
    return dataclasses.replace(
        node, **{n: _changed(getattr(node, n), n, changes, where) for n in changes}
    )


def _changed(old, name: str, changes: dict, where: str):
    """The value of a field or item after the changes, itself where it has none."""
    if name not in changes:
        return old
    new = changes[name]
    return _replace(old, new, f"{where}{name}.") if isinstance(new, _Branch) else new


def _unknown(name: str, owner: str, names: list[str]) -> str:
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"it has {names}"
    return f"{owner} has no field {name!r}, {hint}"


def to_dict(cfg) -> dict:
    """Plain JSON values; every dataclass carries its type's name."""
    if is_dataclass(cfg):
        return {"type": type(cfg).__name__} | {
            f.name: to_dict(getattr(cfg, f.name)) for f in fields(cfg)
        }
    return [to_dict(x) for x in cfg] if isinstance(cfg, tuple) else cfg


def from_dict(data: object, kind: type = ModelConfig, where: str = "config"):
    """The inverse of `to_dict`. Anything unknown, missing or of a wrong type raises UserError."""
    options = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    if data is None and type(None) in options:
        return None
    if typing.get_origin(kind) is tuple:
        if not isinstance(data, list):
            raise UserError(f"{where} must be a list, got {data!r}")
        return tuple(
            from_dict(x, typing.get_args(kind)[0], f"{where}.{i}") for i, x in enumerate(data)
        )
    known = {o.__name__: o for o in options if is_dataclass(o)}
    if known:
        return _build(data, known, where)
    if float in options and isinstance(data, int) and not isinstance(data, bool):
        return float(data)
    if type(data) not in options:
        raise UserError(f"{where} must be of type {kind}, got {data!r}")
    return data


def _build(data: object, known: dict[str, type], where: str):
    got = data.get("type") if isinstance(data, dict) else data
    if not isinstance(got, str) or got not in known:
        raise UserError(f"{where}.type must be one of {sorted(known)}, got {got!r}")
    cls = known[data["type"]]
    names = {f.name: f for f in fields(cls)}
    for name in data:
        if name not in names and name != "type":
            raise UserError(f"{where}: {_unknown(name, cls.__name__, list(names))}")
    hints = typing.get_type_hints(cls)
    missing = [
        n for n, f in names.items()
        if n not in data and f.default is f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise UserError(f"{where} lacks {', '.join(missing)}")
    return cls(**{n: from_dict(data[n], hints[n], f"{where}.{n}") for n in names if n in data})
