"""Hub tensors and where their numbers lie in our parameters.

A hub matrix is [out, in]; ours is [in, out...]. Layers are stacked, so a hub tensor is one index of
one leaf, or of two where the hub fuses what we keep apart (the latent and the shared rotary key).
Experts that stay quantised lie as in the hub, other matrices that do as if they were floats.

The hub's rotary channels are interleaved pairs (2i, 2i+1); ours are halves (i, i + dim/2). They are
permuted here and nowhere else: scores are the same, and so is the way back.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from kimijax.config import (
    FP8_BLOCK,
    Fp8Config,
    Int4Config,
    KDAConfig,
    LayerConfig,
    MLAConfig,
    ModelConfig,
    MoEConfig,
    SwiGLUConfig,
)
from kimijax.convert.quant import FP8
from kimijax.errors import UserError


@dataclass(frozen=True)
class Part:
    """Where (a part of) a hub tensor goes: an index of the leading dims of a leaf."""

    leaf: str  # names joined by "."
    index: tuple[int, ...]


@dataclass(frozen=True)
class Rule:
    """One hub tensor: its name and shape, the parts it fills, and the way there and back.

    split  hub array -> one array per part; join is its exact inverse. Both only move numbers.
    """

    name: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    split: Callable[[np.ndarray], tuple[np.ndarray, ...]]
    join: Callable[..., np.ndarray]
    dtypes: tuple[str, ...] = ()  # safetensors dtypes it may have; none named: any form of floats
    memory: tuple[int, ...] = ()  # axes of the part as its numbers lie in the file; (): in order
    rows: int | None = None  # axis of the leaf along which the hub tensor's rows can be cut
    field: str = ""  # path in the config of what says how the matrix is held; "": always as floats


def rules(cfg: ModelConfig) -> Iterator[Rule]:
    """A rule for every tensor of a hub checkpoint of this model, in the order of layers."""
    linear = any(isinstance(layer.mixer, KDAConfig) for layer in cfg.layers)
    top = (cfg.vocab, cfg.width)
    yield replace(_as_is("model.embed_tokens.weight", top, Part("embed", ())), rows=0)
    for n, layer in enumerate(cfg.layers):
        group, repeat, at = cfg.place(n)
        yield from _layer(cfg, layer, f"model.layers.{n}.", f"group_{group}.layer_{at}.",
                          (repeat,), linear)
    yield _as_is("model.norm.weight", (cfg.width,), Part("norm.w", ()))
    head = _matrix("lm_head.weight", (cfg.width, cfg.vocab), (cfg.width,), Part("head", ()))
    yield replace(head, rows=1)


def _layer(cfg, layer: LayerConfig, hub: str, ours: str, index, linear) -> Iterator[Rule]:
    d = cfg.width
    yield _as_is(f"{hub}input_layernorm.weight", (d,), Part(f"{ours}norm.w", index))
    mixer = _mla if isinstance(layer.mixer, MLAConfig) else _kda
    yield from mixer(layer.mixer, d, f"{hub}self_attn.", f"{ours}mixer.", index)
    yield _as_is(f"{hub}post_attention_layernorm.weight", (d,), Part(f"{ours}ffn_norm.w", index))
    if isinstance(layer.ffn, SwiGLUConfig):
        yield from _swiglu(d, layer.ffn, f"{hub}mlp.", f"{ours}ffn.", index,
                           _field(f"{ours}ffn.", "weights"))
    else:
        yield from _moe(layer.ffn, d, hub, f"{ours}ffn.", index, linear)


def _mla(c: MLAConfig, d: int, hub: str, ours: str, index) -> Iterator[Rule]:
    turned = c.rope_dim if c.rope else 0  # without rotation there is nothing to permute
    head = c.nope_dim + c.rope_dim
    held = functools.partial(_held, c.weights, _field(ours, "weights"))
    if c.q_rank:
        yield from held(
            f"{hub}q_a_proj.weight", (d, c.q_rank), (d,), Part(f"{ours}q_down.w", index)
        )
        yield _as_is(f"{hub}q_a_layernorm.weight", (c.q_rank,), Part(f"{ours}q_norm.w", index))
    name, width = ("q_b_proj", c.q_rank) if c.q_rank else ("q_proj", d)
    yield from held(
        f"{hub}{name}.weight", (width, c.heads, head), (width,), Part(f"{ours}q.w", index),
        turned=turned,
    )
    latent = [Part(f"{ours}kv.w", index)]
    latent += [Part(f"{ours}k_rope.w", index)] if c.rope_dim else []
    yield from held(
        f"{hub}kv_a_proj_with_mqa.weight", (d, c.kv_rank + c.rope_dim), (d,), *latent,
        cut=c.kv_rank, turned=turned,
    )
    yield _as_is(f"{hub}kv_a_layernorm.weight", (c.kv_rank,), Part(f"{ours}kv_norm.w", index))
    yield from held(
        f"{hub}kv_b_proj.weight", (c.kv_rank, c.heads, c.nope_dim + c.v_dim), (c.kv_rank,),
        Part(f"{ours}w_uk", index), Part(f"{ours}w_uv", index), cut=c.nope_dim,
    )
    yield from held(
        f"{hub}o_proj.weight", (c.heads, c.v_dim, d), (c.heads, c.v_dim),
        Part(f"{ours}out.w", index),
    )


def _kda(c: KDAConfig, d: int, hub: str, ours: str, index) -> Iterator[Rule]:
    inner = (c.heads, c.head_dim)
    for n in "qkv":
        yield _matrix(f"{hub}{n}_proj.weight", (d, *inner), (d,), Part(f"{ours}{n}.w", index))
    for n in "qkv":
        yield _taps(f"{hub}{n}_conv1d.weight", c, Part(f"{ours}conv_{n}", index))
    for n in "fg":
        down, up = Part(f"{ours}{n}_down.w", index), Part(f"{ours}{n}_up.w", index)
        yield _matrix(f"{hub}{n}_a_proj.weight", (d, c.gate_rank), (d,), down)
        yield _matrix(f"{hub}{n}_b_proj.weight", (c.gate_rank, *inner), (c.gate_rank,), up)
    size = c.heads * c.head_dim
    yield _as_is(f"{hub}dt_bias", (size,), Part(f"{ours}dt_bias", index), inner)
    yield _as_is(f"{hub}A_log", (1, 1, c.heads, 1), Part(f"{ours}A_log", index), (c.heads,))
    yield _matrix(f"{hub}b_proj.weight", (d, c.heads), (d,), Part(f"{ours}beta.w", index))
    yield _as_is(f"{hub}o_norm.weight", (c.head_dim,), Part(f"{ours}o_norm", index))
    yield _matrix(f"{hub}o_proj.weight", (*inner, d), inner, Part(f"{ours}out.w", index))


def _swiglu(d: int, c: SwiGLUConfig, hub: str, ours: str, index, field: str) -> Iterator[Rule]:
    f, held = c.width, functools.partial(_held, c.weights, field)
    for name in ("gate", "up"):
        yield from held(f"{hub}{name}_proj.weight", (d, f), (d,), Part(f"{ours}{name}.w", index))
    yield from held(f"{hub}down_proj.weight", (f, d), (f,), Part(f"{ours}down.w", index))


def _moe(c: MoEConfig, d: int, hub: str, ours: str, index, linear: bool) -> Iterator[Rule]:
    hub += "block_sparse_moe." if linear else "mlp."
    names = ("w1", "w3", "w2") if linear else ("gate_proj", "up_proj", "down_proj")
    yield _matrix(f"{hub}gate.weight", (d, c.experts), (d,), Part(f"{ours}router", index))
    yield _as_is(
        f"{hub}gate.e_score_correction_bias", (c.experts,), Part(f"{ours}bias", index)
    )
    shared = SwiGLUConfig(width=c.shared_width, weights=c.shared_weights)
    yield from _swiglu(d, shared, f"{hub}shared_experts.", f"{ours}shared.", index,
                       _field(ours, "shared_weights"))
    field = _field(ours, "weights")
    for e in range(c.experts):
        for name, leaf in zip(names, ("gate", "up", "down"), strict=True):
            shape = (c.width, d) if leaf == "down" else (d, c.width)
            part = Part(f"{ours}{leaf}", (*index, e))
            yield from _expert(c, field, f"{hub}experts.{e}.{name}.weight", shape, part)


def _expert(
    c: MoEConfig, field: str, name: str, shape: tuple[int, int], part: Part
) -> Iterator[Rule]:
    """One matrix (in, out) of an expert: as floats, or the tensors of its packed form."""
    inputs, outputs = shape
    match c.weights:
        case None:
            yield replace(_matrix(name, shape, shape[:1], part), field=field)
        case Int4Config(group=g):
            packed, scale = _leaves(("packed", "scale"), part)
            yield _as_is(f"{name}_packed", (outputs, inputs // 8), *packed, dtypes=("I32",))
            yield _as_is(f"{name}_scale", (outputs, inputs // g), *scale, dtypes=("BF16",))
        case Fp8Config():
            codes, scale = _leaves(("codes", "scale"), part)
            yield _codes(_as_is(name, (outputs, inputs), *codes))
            blocks = (-(-outputs // FP8_BLOCK), -(-inputs // FP8_BLOCK))
            yield _as_is(f"{name}_scale_inv", blocks, *scale, dtypes=("F32",))


def _held(
    form: Fp8Config | None, field: str, name: str, ours: tuple[int, ...], inputs: tuple[int, ...],
    *parts: Part, cut: int = 0, turned: int = 0,
) -> Iterator[Rule]:
    """A matrix as `_matrix` has it: as floats, or the codes and the scales of a form."""
    if form is None:
        rule = _matrix(name, ours, inputs, *parts, cut=cut, turned=turned)
        yield replace(rule, field=field)
        return
    codes, scale = _leaves(("codes", "scale"), *parts)
    rule = _matrix(name, ours, inputs, *codes, cut=cut, turned=turned)
    yield _codes(rule)
    outputs, blocks = ours[len(inputs) :], (-(-rule.shape[1] // FP8_BLOCK),)
    name = f"{name}_scale_inv"
    yield _scale(_matrix(name, (*blocks, *outputs), blocks, *scale, cut=cut, turned=turned))


def _codes(rule: Rule) -> Rule:
    """The 8-bit floats of a matrix, which are bytes in ours."""
    return replace(
        rule, split=lambda x: rule.split(x.view(np.uint8)),
        join=lambda *arrays: rule.join(*arrays).view(FP8), dtypes=("F8_E4M3",),
    )


def _scale(wide: Rule) -> Rule:
    """The scales of square blocks, of which ours has one per output: `wide` moves those.

    Outputs are permuted and cut within a block, so each of them carries its block's scale.
    """
    rows, blocks = wide.shape

    def split(x):
        return wide.split(np.repeat(x, FP8_BLOCK, 0)[:rows])

    def join(*arrays):
        x = wide.join(*arrays)
        narrow = x[::FP8_BLOCK]
        if not np.array_equal(np.repeat(narrow, FP8_BLOCK, 0)[:rows], x):
            raise UserError(
                f"{wide.name}: scales differ within a block of {FP8_BLOCK} outputs, for which the "
                "hub has one; make them equal"
            )
        return narrow

    shape = (-(-rows // FP8_BLOCK), blocks)
    return replace(wide, shape=shape, split=split, join=join, dtypes=("F32",))


def _leaves(names: tuple[str, ...], *parts: Part) -> list[list[Part]]:
    """For each name the leaves of a packed form that lie where those of floats would."""
    return [[replace(part, leaf=f"{part.leaf}_{name}") for part in parts] for name in names]


def _field(ours: str, name: str) -> str:
    """Where the config of a module has a field: group_0.layer_1.ffn. is groups.0.layers.1.ffn."""
    return ours.replace("group_", "groups.").replace("layer_", "layers.") + name


def _as_is(
    name: str, shape, part: Part, ours: tuple[int, ...] | None = None, dtypes: tuple[str, ...] = ()
) -> Rule:
    """A tensor that is only reshaped."""
    ours = ours or shape
    return Rule(
        name, shape, (part,), lambda x: (x.reshape(-1, *ours[1:]),),
        lambda x: np.asarray(x).reshape(shape), dtypes,
    )


def _taps(name: str, c: KDAConfig, part: Part) -> Rule:
    """Depthwise convolution [channels, 1, taps]: the token's own tap is last, and first in ours."""
    shape = (c.heads * c.head_dim, 1, c.conv)

    def split(x):
        return (x[:, 0, ::-1].T.reshape(c.conv, c.heads, c.head_dim),)

    def join(x):
        return np.asarray(x).reshape(c.conv, -1).T[:, None, ::-1]

    return Rule(name, shape, (part,), split, join)


def _matrix(
    name: str, ours: tuple[int, ...], inputs: tuple[int, ...], *parts: Part, cut: int = 0,
    turned: int = 0,
) -> Rule:
    """A matrix [out, in]: ours is (*inputs, *outputs).

    cut     the last dim is cut there into two parts
    turned  so many channels at the end of the last dim are rotary: pairs to halves
    """
    rows = int(np.prod(inputs))
    columns = int(np.prod(ours)) // rows
    order, back = _halves(ours[-1], turned) if turned else (None, None)

    def split(x):
        x = x.T.reshape(ours) if x.shape == (columns, rows) else x.T  # a cut along the rows
        x = x[..., order] if turned else x
        return (x[..., :cut], x[..., cut:]) if len(parts) == 2 else (x,)

    def join(*arrays):
        x = np.concatenate(arrays, -1) if len(arrays) == 2 else np.asarray(arrays[0])
        x = x[..., back] if turned else x
        return x.reshape(rows, columns).T

    memory = (*range(len(inputs), len(ours)), *range(len(inputs)))
    plain = len(parts) == 1 and not turned
    return Rule(name, (columns, rows), parts, split, join, memory=memory if plain else ())


@functools.cache
def _halves(channels: int, turned: int) -> tuple[np.ndarray, np.ndarray]:
    """The order of channels that puts the pairs of the last `turned` into halves; and back."""
    order = np.arange(channels)
    rotary = order[-turned:]
    order = np.concatenate([order[:-turned], rotary[0::2], rotary[1::2]])
    return order, np.argsort(order)
