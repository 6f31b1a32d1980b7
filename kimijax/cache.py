"""Caches and the tokens of one call, as values.

A row of the cache is a sequence of slots; a slot holds one token, its position and its segment are
data. Unwritten slots have position int32 max: they lie in the future and are never seen. A store
begins with `lead` slots of history, so that looking back never leaves the array. A cache may stand
on a frozen one (kimijax.fork).
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from kernels_pallas.int8 import WORD, narrow, widen
from kimijax.config import (
    CompressedConfig,
    KDAConfig,
    LayerConfig,
    MLAConfig,
    ModelConfig,
    WindowConfig,
)
from kimijax.errors import UserError
from kimijax.rows import LINE, PAGE, PAIRED, ROWS, SCALARS, SCALED_PAGE, Rows, write

FAR = jnp.iinfo(jnp.int32).max
LEAST_STRIPE = 64  # slots that lie together where a row is dealt over devices


class Watch(NamedTuple):
    """Queries on which the block index is trained: their place in the row and their weight."""

    at: jax.Array  # b m
    weight: jax.Array  # b m


@struct.dataclass
class Tokens:
    """What layers know of the tokens of a call besides hidden states.

    Array order is slot order within each of `runs` equal pieces.
    """

    pos: jax.Array  # b t
    seg: jax.Array  # b t   -1: padding
    past_pos: jax.Array  # b lead   of the slots before this call
    past_seg: jax.Array  # b lead
    count: jax.Array  # b     slots filled before this call
    used: jax.Array  # b     slots filled by it
    fresh: jax.Array | None = None  # b t   true: the token chooses blocks for itself
    watch: Watch | None = None
    previous: jax.Array | None = None  # b r   the run that ends where each run begins; -1: none
    # The call starts and ends at a multiple of `run`: query tiles are slices of the array.
    aligned: bool = struct.field(pytree_node=False, default=True)
    # The row is so many equal pieces, each contiguous in slots (see ops.runs).
    runs: int = struct.field(pytree_node=False, default=1)


@struct.dataclass
class Cache:
    """Slots of b rows and the state of every layer. `capacity` slots can be filled."""

    pos: jax.Array  # b lead+capacity+run
    seg: jax.Array  # b lead+capacity+run
    count: jax.Array  # b   slots filled, those of the frozen past included
    first: jax.Array  # b   the slot stored right behind the lead
    states: tuple[tuple[dict[str, jax.Array], ...], ...]  # per group and layer, stacked by repeat
    frozen: "Cache | None" = None
    lead: int = struct.field(pytree_node=False, default=0)
    run: int = struct.field(pytree_node=False, default=0)
    # Slots are dealt to `ways` devices in stripes, and a device's slots lie together.
    ways: int = struct.field(pytree_node=False, default=1)
    stripe: int = struct.field(pytree_node=False, default=1)
    latents: str | None = struct.field(pytree_node=False, default=None)  # one of LATENTS

    @property
    def capacity(self) -> int:
        """Slots of a row that can be filled."""
        return self.pos.shape[1] - self.lead - self.run

    def index(self, slot: jax.Array) -> jax.Array:
        """Where in the arrays a slot of the store lies (its lead included)."""
        if self.ways == 1:
            return slot
        nth, within = slot // self.stripe, slot % self.stripe
        owner = nth % self.ways
        return owner * (self.pos.shape[1] // self.ways) + nth // self.ways * self.stripe + within

    def places(self) -> jax.Array:
        """The slot of the store (its lead included) at each place of the arrays: `index` undone."""
        at = jnp.arange(self.pos.shape[1])
        if self.ways == 1:
            return at
        share = self.pos.shape[1] // self.ways
        nth = at % share // self.stripe * self.ways + at // share
        return nth * self.stripe + at % self.stripe

    def slots(self, x: jax.Array, start: jax.Array, length: int) -> jax.Array:
        """x[row, slot] for the slots start[row] .. start[row] + length: b length ..."""
        if self.ways == 1:
            return rows_slice(x, start, length)
        row = jnp.arange(x.shape[0])[:, None]
        return x[row, self.index(start[:, None] + jnp.arange(length))]


class Memory(NamedTuple):
    """What one layer sees of a cache: its own state, stacked over the repeats of its group."""

    cache: Cache  # without states
    state: dict[str, jax.Array]
    frozen: dict[str, jax.Array] | None  # its state in the frozen cache
    repeat: jax.Array  # int32: which slice of the stack is this layer's
    rows: Rows = ROWS

    def get(self, name: str) -> jax.Array:
        """This layer's slice. For small states: a slice of a large one is a copy."""
        return self.state[name][self.repeat]

    def put(self, **new: jax.Array) -> "Memory":
        """The same memory with this layer's slices replaced, in place where donated."""
        state = {n: self.state[n].at[self.repeat].set(x.astype(self.state[n].dtype))
                 for n, x in new.items()}
        return self._replace(state=self.state | state)

    def kept(self, latent: jax.Array) -> dict[str, jax.Array]:
        """Latents ... r as the states of this layer keep them, by the names of states."""
        if "latent_scale" not in self.state:
            return {"latent": latent}
        return dict(zip(LATENT, narrow(latent), strict=True))

    def latents_at(self, start: jax.Array, length: int, dtype: jnp.dtype) -> jax.Array:
        """Those of slots [start, start + length) as `numbers`: b length r."""
        kept = {n: self.window(n, start, length) for n in LATENT if n in self.state}
        return numbers(kept, dtype)

    def window(self, name: str, start: jax.Array, length: int) -> jax.Array:
        """Token rows [start, start + length) of a large state of this layer: b length ..."""
        stack = self.state[name]
        if self.cache.ways > 1 or name in (*PAIRED, *SCALARS):
            at = self.cache.index(start[:, None] + jnp.arange(length))
            return self.rows.read(name, stack, self.repeat, at)

        def row(b, at):
            starts = (self.repeat, b, at, *(0,) * (stack.ndim - 3))
            return jax.lax.dynamic_slice(stack, starts, (1, 1, length, *stack.shape[3:]))[0, 0]

        return jax.vmap(row)(jnp.arange(stack.shape[1]), start)

    def write(self, at: jax.Array, **new: jax.Array) -> "Memory":
        """Token rows b t ... into places `at` b t of this layer; places outside are dropped.

        Small states (positions, segments) lie on every device, large ones where `rows` has them.
        """
        state = {
            n: (self.rows.write if n in LARGE else write)(n, self.state[n], self.repeat, at, x)
            for n, x in new.items()
        }
        return self._replace(state=self.state | state)


LATENT = ("latent", "latent_scale")  # states of a latent; the scale where it is int8
# States with numbers for every slot: dealt over devices.
LARGE = (*LATENT, "k_rope", "keys", "head_keys", "head_values")
LATENTS = ("int8",)  # how latents may be kept, other than in the dtype of the other states


def numbers(kept: dict[str, jax.Array], dtype: jnp.dtype) -> jax.Array:
    """Latents ... r of what `Memory.kept` gave; int8 widened to a dtype."""
    scale = kept.get("latent_scale")
    return kept["latent"] if scale is None else widen(kept["latent"], scale, dtype)


def lead_slots(cfg: ModelConfig) -> int:
    """Slots of history that the layers look back on."""
    return max((_lead(layer) for layer in cfg.layers), default=0)


def _lead(layer: LayerConfig) -> int:
    match layer.mixer:
        case WindowConfig(window=w):
            lead = w or 0
        case CompressedConfig(window=w, index=index, taps=taps):
            lead = max(w + index.group, taps - 1)
        case KDAConfig(conv=taps):
            lead = max(taps - 1, 1)  # even without a convolution it asks what lies before a token
        case _:
            lead = 0
    return max(lead, layer.conv - 1, 0)


def run_length(cfg: ModelConfig) -> int:
    """Calls that start and end at multiples of this are tiled; packed documents start at them."""
    run = 1
    for layer in cfg.layers:
        match layer.mixer:
            case WindowConfig(window=int(w)):
                run = math.lcm(run, tile_length(w))
            case CompressedConfig(index=index):
                run = math.lcm(run, index.group)
    return run


def tile_length(window: int) -> int:
    """Queries per tile of a window layer: a power of two that holds the window."""
    return max(64, 1 << (window - 1).bit_length())


def empty_cache(
    cfg: ModelConfig,
    rows: int,
    capacity: int,
    dtype: jnp.dtype = jnp.float32,
    ways: int = 1,
    latents: str | None = None,
) -> Cache:
    """An empty cache of `rows` rows with at least `capacity` slots each, rounded up to a run.

    ways     devices over which the slots of a row are dealt, in stripes of at least 64
    latents  "int8": with a float32 scale for each token; None: in `dtype`, as all else

    UserError: there is no such form, or the model caches no latents.
    """
    if latents is not None:
        check_latents(cfg, latents)
    run = run_length(cfg)
    stripe = -(-LEAST_STRIPE // run) * run
    lead = -(-lead_slots(cfg) // run) * run
    page = PAGE if latents is None else SCALED_PAGE
    unit = math.lcm(page, run if ways == 1 else stripe) * ways
    # The last run is never filled: `fork` copies a whole one.
    size = -(-(lead + capacity + run) // unit) * unit
    return Cache(
        pos=jnp.full((rows, size), FAR, jnp.int32),
        seg=jnp.full((rows, size), -1, jnp.int32),
        count=jnp.zeros(rows, jnp.int32),
        first=jnp.zeros(rows, jnp.int32),
        states=tuple(
            tuple(
                _state(cfg.width, layer, g.repeat, rows, size, dtype, latents)
                for layer in g.layers
            )
            for g in cfg.groups
        ),
        lead=lead,
        run=run,
        ways=ways,
        stripe=stripe,
        latents=latents,
    )


def check_latents(cfg: ModelConfig, latents: str) -> None:
    """UserError: latents are not kept so, or the model caches none."""
    if latents not in LATENTS:
        raise UserError(f"cache {latents!r:.40}: there is {', '.join(LATENTS)}")
    found = {
        layer.mixer.kv_rank for layer in cfg.layers
        if isinstance(layer.mixer, MLAConfig | CompressedConfig)
    }
    if not found:
        raise UserError(f"cache {latents}: this model caches no latents; leave it out")
    if odd := [r for r in found if r % WORD]:
        raise UserError(f"cache {latents}: latents of {odd[0]} numbers are no multiple of {WORD}")


def _state(
    width: int, layer: LayerConfig, repeat: int, rows: int, size: int, dtype, latents
) -> dict:
    """The state of one layer of a group, for all its repeats."""

    def zeros(*shape, dtype=dtype):
        return jnp.zeros((repeat, rows, *shape), dtype)

    def latent(r):
        if latents is None:
            return {"latent": zeros(size, r)}
        return {
            "latent": zeros(size, r // WORD, dtype=jnp.int32),
            "latent_scale": zeros(size // LINE, LINE, dtype=jnp.float32),
        }

    state = {"conv": zeros(layer.conv - 1, width)} if layer.conv else {}
    match layer.mixer:
        case WindowConfig(kv_heads=g, head_dim=k, window=None):
            state |= {"head_keys": zeros(size, g, k), "head_values": zeros(size, g, k)}
        case WindowConfig(kv_heads=g, head_dim=k, window=w):
            state |= {"key": zeros(w, g, k), "value": zeros(w, g, k)}
        case MLAConfig(kv_rank=r, rope_dim=p):
            state |= latent(r) | ({"k_rope": zeros(size // 2, 2 * p)} if p else {})
        case KDAConfig(heads=h, head_dim=k, conv=taps):
            state |= {"delta": zeros(h, k, k, dtype=jnp.float32)}
            state |= {"past": zeros(taps - 1, 3, h, k)} if taps > 1 else {}
        case CompressedConfig(kv_rank=r, taps=taps, index=index):
            n = size // index.block
            state |= latent(r) | {
                "keys": zeros(n, index.keys, index.dim),
                "block_pos": jnp.full((repeat, rows, n), FAR, jnp.int32),
                "block_seg": jnp.full((repeat, rows, n), -1, jnp.int32),
                "choice": jnp.full((repeat, rows, index.top_k), -1, jnp.int32),
            }
            state |= {"past": zeros(taps - 1, width)} if taps > 1 else {}
    return state


def rows_slice(x: jax.Array, start: jax.Array, length: int) -> jax.Array:
    """x[row, start[row] : start[row] + length] for every row."""
    return jax.vmap(lambda row, at: jax.lax.dynamic_slice_in_dim(row, at, length))(x, start)


def place(cache: Cache, tokens: Tokens) -> jax.Array:
    """Where in the store each token of a call goes, b t; padding goes outside."""
    at = tokens.count[:, None] + jnp.arange(tokens.pos.shape[1]) - cache.first[:, None] + cache.lead
    return jnp.where(tokens.seg >= 0, cache.index(at), cache.pos.shape[1])


def keep_last(past: jax.Array, new: jax.Array, used: jax.Array) -> jax.Array:
    """The last tokens of (past b n ..., new b t ...) after `used` of the new: b n ..."""
    n = past.shape[1]
    at = used[:, None] + jnp.arange(n) - n  # in the new

    # Token by token: a slice of a row that is dealt over devices would bring all of it to each.
    def pick(x, at):
        at = jnp.clip(at, 0, x.shape[1] - 1).reshape(*at.shape, *(1,) * (x.ndim - 2))
        return jnp.take_along_axis(x, at, 1)

    here = (at >= 0).reshape(*at.shape, *(1,) * (past.ndim - 2))
    return jnp.where(here, pick(new, at).astype(past.dtype), pick(past, at + n))
