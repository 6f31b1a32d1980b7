"""The decoder: embedding, scanned groups of layers, norm, head. A function of values alone."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict

from kimijax.cache import FAR, Cache, Memory, Tokens, Watch, lead_slots, place, run_length
from kimijax.config import GroupConfig, ModelConfig, MoEConfig
from kimijax.errors import UserError
from kimijax.layers.base import RMSNorm, fan_in
from kimijax.layers.ffn import Held
from kimijax.layers.layer import Layer
from kimijax.ops.attend import KEPT, Ops, local
from kimijax.ops.runs import previous_runs


class Output(NamedTuple):
    """hidden b t d in the order of the input; head(hidden) gives logits."""

    hidden: jax.Array
    cache: Cache | None
    aux: tuple  # per group: {layer: {"mixer": ..., "ffn": ...}}, stacked over repeats


class Model(nn.Module):
    """`Model(cfg, ops).apply(params, token_ids, ...)`; see `Model.__call__`."""

    cfg: ModelConfig
    ops: Ops
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        c = self.cfg
        self.embed = self.param(
            "embed", nn.with_logical_partitioning(nn.initializers.normal(c.embed_std),
                                                  ("vocab", "embed")),
            (c.vocab, c.width), jnp.float32,
        )
        # Layers are computed again in the backward pass: what is kept of one is its input and what
        # attention gave, which takes longer than all else of a long row.
        keep = jax.checkpoint_policies.save_only_these_names(KEPT)
        group = nn.remat(Group, prevent_cse=False, policy=keep) if self.ops.remat else Group
        self.groups = [
            nn.scan(
                group,
                variable_axes={"params": 0, "intermediates": 0},
                split_rngs={"params": True},
                in_axes=nn.broadcast,
                length=g.repeat,
                metadata_params={nn.PARTITION_NAME: "layers"},
                check_constancy_invariants=False,  # the check traces every layer a second time
            )(g, c.norm_eps, self.ops, self._collected(f"group_{i}"), name=f"group_{i}")
            for i, g in enumerate(c.groups)
        ]
        self.norm = RMSNorm(c.norm_eps)
        self.unembed = self.param(
            "head", nn.with_logical_partitioning(fan_in(c.width), ("embed", "vocab")),
            (c.width, c.vocab), jnp.float32,
        )

    def __call__(
        self,
        ids: jax.Array,
        pos: jax.Array | None = None,
        seg: jax.Array | None = None,
        slots: jax.Array | None = None,
        cache: Cache | None = None,
        *,
        fresh: jax.Array | None = None,
        watch: Watch | None = None,
        aligned: bool | None = None,
        runs: int | None = None,
    ) -> Output:
        """Read tokens b t, after those in the cache if there is one.

        pos    b t  position in the document; None: the slot
        seg    b t  document; -1: padding; None: one document
        slots  b t  place in the row, any order, those of one call contiguous; None: array order
               behind the cache. Documents of a packed row start at multiples of `run_length`.
        fresh  b t  tokens that choose blocks for themselves
        aligned     the call starts at a slot that is a multiple of `run_length` (as slot 0 is), so
               that queries can be tiled; None: without a cache yes, with one no
        runs        the row is so many equal pieces, each contiguous in slots; without a cache they
                    may be in any order, as pos and seg say. None: as the ops prefer
        """
        b, t = ids.shape
        count = jnp.zeros(b, jnp.int32) if cache is None else cache.count
        if aligned is None:
            aligned = cache is None
        seg = jnp.zeros((b, t), jnp.int32) if seg is None else seg
        order = None if slots is None else slots - count[:, None]
        natural = count[:, None] + jnp.arange(t)
        pos = jnp.broadcast_to(natural, (b, t)) if pos is None and slots is None else pos
        pos = slots if pos is None else pos
        given = (ids, pos, seg, fresh)
        if order is not None:
            given = _sorted(given, jnp.where(seg >= 0, order, t), t)
            watch = watch and watch._replace(at=jnp.take_along_axis(order, watch.at, 1))
        runs = runs or self.ops.runs(t, run_length(self.cfg), lead_slots(self.cfg))
        tokens, cache = _tokens(given[1:], cache, count, watch, aligned and
                                t % run_length(self.cfg) == 0, runs)
        x = self.ops.spread(self.embed.astype(self.dtype)[given[0]])
        x, cache, aux = self._layers(x, tokens, cache)
        x = self.norm(x)
        if order is not None:
            x = jnp.take_along_axis(x, jnp.clip(order, 0, t - 1)[..., None], 1)
        return Output(x, cache, aux)

    def head(self, hidden: jax.Array) -> jax.Array:
        """Logits ... vocab, float32."""
        return jnp.einsum(
            "...d,dv->...v", hidden, self.unembed.astype(hidden.dtype),
            preferred_element_type=jnp.float32,
        )

    def logits(self, *args, **kwargs) -> jax.Array:
        """Logits b t vocab of `__call__` with the same arguments; also what init traces."""
        return self.head(self(*args, **kwargs).hidden)

    def _layers(self, x, tokens, cache):
        bare = None if cache is None else cache.replace(
            states=(), frozen=cache.frozen and cache.frozen.replace(states=())
        )
        states, reports = [], []
        for i, group in enumerate(self.groups):
            state = None if cache is None else cache.states[i]
            frozen = cache.frozen.states[i] if cache is not None and cache.frozen else None
            stacks = None if cache is None else self._experts(i)
            (x, _, state), report = group((x, jnp.int32(0), state), tokens, bare, frozen, stacks)
            states.append(state)
            reports.append(report)
        if cache is not None:
            cache = cache.replace(states=tuple(states), count=cache.count + tokens.used)
        return x, cache, tuple(reports)


    def _collected(self, group: str) -> Callable | None:
        """(name of a layer, its params) -> params, those whole that lie in pieces."""
        if self.ops.collect is None:
            return None
        return lambda layer, params: self.ops.collect(self.cfg, group, layer, params, self.dtype)

    def _experts(self, i: int) -> dict[str, dict[str, jax.Array]] | None:
        """The routed layers' parameters of a group, whole stacks, for calls with a cache.

        In training a gradient through them would be as large as the stack for every layer.
        """
        if self.is_initializing():
            return None
        layers = self.variables["params"][f"group_{i}"]
        return {
            f"layer_{j}": nn.unbox(layers[f"layer_{j}"]["ffn"])
            for j, layer in enumerate(self.cfg.groups[i].layers) if isinstance(layer.ffn, MoEConfig)
        }


class Group(nn.Module):
    """The layers of one repeat. The stacked state is carried, each layer writes its slice."""

    cfg: GroupConfig
    eps: float
    ops: Ops
    collected: Callable | None = None

    @nn.compact
    def __call__(self, carry, tokens, bare, frozen, stacks):
        x, repeat, states = carry
        reports, new = {}, []
        for i, layer in enumerate(self.cfg.layers):
            memory = None
            if bare is not None:
                memory = Memory(bare, states[i], frozen and frozen[i], repeat, self.ops.rows)
            name = f"layer_{i}"
            held = Held(stacks[name], repeat) if stacks and name in stacks else None
            x, memory, report = self._layer(name)(layer, self.eps, self.ops, name=name)(
                x, tokens, memory, held
            )
            x = self.ops.spread(x)
            reports[name] = report
            new.append(memory and memory.state)
        return (x, repeat + 1, None if bare is None else tuple(new)), reports

    def _layer(self, name: str) -> type[Layer]:
        """The module of a layer; where weights lie in pieces, one that has them whole."""
        if self.collected is None:
            return Layer
        return nn.map_variables(
            Layer, "params", lambda v: {"params": self.collected(name, v["params"])}
        )


def _sorted(given, order, t):
    """Arrays b t moved to slot order; what no token claims is padding."""
    row = jnp.arange(order.shape[0])[:, None]
    fills = (0, FAR, -1, False)
    return tuple(
        None if x is None else jnp.full_like(x, fill).at[row, order].set(x, mode="drop")
        for x, fill in zip(given, fills, strict=True)
    )


def _tokens(given, cache, count, watch, aligned, runs) -> tuple[Tokens, Cache | None]:
    """Tokens of the call, and the cache with their positions and segments written."""
    pos, seg, fresh = given
    b, t = pos.shape
    last = jnp.max(jnp.where(seg >= 0, jnp.arange(t) + 1, 0), 1)
    none = jnp.zeros((b, 0), jnp.int32)
    previous = None if runs == 1 else previous_runs(pos, seg, runs)
    tokens = Tokens(pos, seg, none, none, count, last, fresh, watch, previous, aligned, runs)
    if cache is None:
        return tokens, None
    at, row = place(cache, tokens), jnp.arange(b)[:, None]
    cache = cache.replace(
        pos=cache.pos.at[row, at].set(pos, mode="drop"),
        seg=cache.seg.at[row, at].set(seg, mode="drop"),
    )
    # Read after the write: reading the old arrays beside the new would keep both alive.
    start = count - cache.first
    tokens = tokens.replace(
        past_pos=cache.slots(cache.pos, start, cache.lead),
        past_seg=cache.slots(cache.seg, start, cache.lead),
    )
    return tokens, cache


def abstract_params(model: Model):
    """Shapes, dtypes and dim names of the parameters; nothing is allocated."""
    return jax.tree.map(lambda x: x, _traced(model.cfg))  # the dicts are the caller's own


@functools.lru_cache(maxsize=16)
def _traced(cfg: ModelConfig):
    model = Model(cfg, local())  # weights depend on no ops; one token cannot be dealt out
    ids = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    init = lambda key, ids: model.init(key, ids, method="logits")  # noqa: E731
    return jax.eval_shape(init, jax.random.key(0), ids)


@functools.lru_cache(maxsize=8)
def parameter_shapes(cfg: ModelConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """Name joined by "." -> shape and dtype of every parameter; nothing is allocated.

    UserError: no model can be built from the config, whose dims may come from a foreign file.
    """
    try:
        params = nn.unbox(abstract_params(Model(cfg, local())))["params"]
    except (ArithmeticError, ValueError, TypeError, MemoryError) as error:
        why = " ".join(str(error).split())[:200]
        raise UserError(f"no model can be built from this config: {why}") from error
    return flatten_dict(params, sep=".")
