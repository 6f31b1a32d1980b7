"""The callables that a model is handed: attention in the form and implementation of a plan."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas.attention import Keys, Queries, attention
from kernels_pallas.indexer import top_blocks
from kernels_pallas.kda import kda
from kernels_pallas.latent import IMPLS as FORMS
from kernels_pallas.latent import Latents, latent_attention
from kernels_pallas.latent_decode import Pages, latent_decode, unpair
from kernels_pallas.limits import KERNELS
from kernels_pallas.partial import Partial
from kernels_pallas.select import select
from kimijax.cache import Cache
from kimijax.config import CompressedConfig, ModelConfig
from kimijax.errors import UserError
from kimijax.ops.delta import delta_runs
from kimijax.ops.moe import grouped_experts, tiled_experts
from kimijax.rows import LINE, PAGE, ROWS, Rows


def attend(
    q: Queries,
    kv: Latents | Keys,
    up: tuple[jax.Array, ...],
    *,
    scale: float,
    impl: str,
    form: str | None = None,
) -> Partial:
    """MLA over latents: out b t h v. `up` is (w_uk r h n, w_uv r h v); for plain keys it is ().

    form "expanded" re-projects the latents to a key and a value per head; "absorbed" moves both
    projections to the query and the output and attends to the latents as they lie. None picks
    the one with fewer multiplications for these shapes. Same numbers up to rounding.
    """
    if isinstance(kv, Keys):
        return attention(q, kv, scale=scale, impl=impl)
    w_uk, w_uv = (w.astype(q.nope.dtype) for w in up)
    if form is None:
        form = _cheaper(q.pos.shape[1], kv.pos.shape[1], w_uk.shape, w_uv.shape[-1])
    if form == "expanded":
        return latent_attention(q, kv, (w_uk, w_uv), scale=scale, impl=impl)
    if form != "absorbed":
        raise ValueError(f"attend: unknown {form=}, there are 'expanded' and 'absorbed'")
    absorbed = q._replace(nope=absorb(q.nope, w_uk))
    one = kv.latent[:, :, None]
    p = attention(absorbed, Keys(one, one, kv.k_rope, kv.pos, kv.seg), scale=scale, impl=impl)
    return p._replace(out=values(p.out, w_uv))


class Stored(NamedTuple):
    """Latents of a cache as they lie: every layer's, which is sliced by what reads it if at all."""

    latent: jax.Array  # l b s r   or int32 l b s r/4 with `scale`: words of int8
    rope: jax.Array | None  # l b s/2 2p   as kernels_pallas.latent_decode.pair lays them
    layer: jax.Array  # int32: the slice that is meant
    pos: jax.Array  # b s
    seg: jax.Array  # b s
    scale: jax.Array | None = None  # l b s/128 128   float32


def recall(
    q: Queries, kv: Stored | Keys, up: tuple[jax.Array, ...], *, scale: float, impl: str
) -> Partial:
    """`attend` to what a cache holds. Absorbed, it is read page by page where it lies.

    int8 latents are widened to the dtype of q, a piece at a time, where they are multiplied.
    """
    if isinstance(kv, Keys):
        return attention(q, kv, scale=scale, impl=impl)
    up = w_uk, w_uv = tuple(w.astype(q.nope.dtype) for w in up)
    if _cheaper(q.nope.shape[1], kv.pos.shape[1], w_uk.shape, w_uv.shape[-1]) == "expanded":
        k_rope = None if kv.rope is None else unpair(kv.rope[kv.layer])
        own = None if kv.scale is None else kv.scale[kv.layer].reshape(kv.pos.shape)
        latents = Latents(kv.latent[kv.layer], k_rope, kv.pos, kv.seg, own)
        return latent_attention(q, latents, up, scale=scale, impl=impl)
    pages, table = _pages(kv)
    absorbed = q._replace(nope=absorb(q.nope, w_uk))
    p = latent_decode(absorbed, pages, kv.layer, table, scale=scale, impl=impl)
    return p._replace(out=values(p.out, w_uv))


def _pages(kv: Stored) -> tuple[Pages, jax.Array]:
    """A cache cut into pages, each row's one behind the other."""
    layers, b, s, r = kv.latent.shape
    j = PAGE if s % (2 * PAGE) else 2 * PAGE
    where = (x.reshape(-1, j) for x in (kv.pos, kv.seg))
    rope = kv.rope
    if rope is not None:
        rope = rope.reshape(layers, -1, j // 2, rope.shape[-1])
    scale = None if kv.scale is None else kv.scale.reshape(layers, -1, j // LINE, LINE)
    pages = Pages(kv.latent.reshape(layers, -1, j, r), rope, *where, scale)
    return pages, jnp.arange(b * s // j, dtype=jnp.int32).reshape(b, -1)


def absorb(q: jax.Array, w_uk: jax.Array) -> jax.Array:
    """Queries against latents: b t h n -> b t h r."""
    return jnp.einsum("bthn,rhn->bthr", q, w_uk.astype(q.dtype))


def values(out: jax.Array, w_uv: jax.Array) -> jax.Array:
    """Weighted latents -> weighted values, float32: ... h r -> ... h v."""
    return jnp.einsum("...hr,rhv->...hv", out, w_uv.astype(jnp.float32))


def _cheaper(t: int, s: int, uk_shape: tuple[int, ...], v: int) -> str:
    """The form with fewer multiplications for t queries and s keys."""
    r, _, n = uk_shape
    expanded = s * r * (n + v) + t * s * (n + v)
    absorbed = t * r * (n + v) + t * s * 2 * r
    return "expanded" if expanded < absorbed else "absorbed"


def tiled(q: Queries, kv: Keys, *, scale: float) -> Partial:
    """Attention of each tile of queries to its own keys; arrays are b r m ... (see ops.runs).

    Tiles are smaller than the blocks of a kernel: XLA multiplies them on any device.
    """
    lead = q.pos.shape[:3]
    flat = lambda a: a.reshape(-1, *a.shape[3:])  # noqa: E731
    p = attention(*jax.tree.map(flat, (q, kv)), scale=scale, impl="xla")
    return jax.tree.map(lambda a: a.reshape(*lead, *a.shape[1:]), p)


EXPERTS = ("tiled", "grouped")
KEPT = "attended"  # the name of what is kept of attention where layers are computed a second time


def experts_by(name: str | None, impl: str) -> Callable[..., jax.Array]:
    """Routed experts in a way of EXPERTS; None: the one that is fast where `impl` is."""
    if (name or ("grouped" if impl == "pallas" else "tiled")) == "tiled":
        return tiled_experts
    return partial(grouped_experts, impl=impl)


def known_impl(name: str) -> str:
    """The name, of which every op has an implementation. UserError: there is none."""
    if name not in FORMS:
        raise UserError(f"impl {name!r:.40}: there are {', '.join(FORMS)}")
    return name


@dataclass(frozen=True)
class Ops:
    """The operations a model calls, bound to an implementation. Same signatures for any plan."""

    attend: Callable[..., Partial]  # to the latents of the call
    recall: Callable[..., Partial]  # to the latents of a cache, chunk included
    tiled: Callable[..., Partial]
    select: Callable[..., Partial]
    top_blocks: Callable[..., tuple[jax.Array, jax.Array]]
    delta: Callable[..., tuple[jax.Array, jax.Array]]  # the delta rule over runs, from zero
    kda: Callable[..., tuple[jax.Array, jax.Array]]
    experts: Callable[..., jax.Array]
    rows: Rows = ROWS
    exact: bool = False  # compressed layers read all of the past instead of chosen blocks
    remat: bool = False  # gradients compute layers, but attention, a second time from their inputs
    # (config of a model, group, layer, its params, dtype): weights that lie in pieces come whole
    collect: Callable[..., Any] | None = None
    spread: Callable[[jax.Array], jax.Array] = lambda x: x  # activations b t ... to their place
    deal: Callable[[Cache], Cache] = lambda cache: cache  # a cache to its place
    whole: Callable[[Any], Any] = lambda tree: tree  # what the host reads, to every device
    runs: Callable[[int, int, int], int] = lambda t, run, least: 1  # pieces of a row of t tokens
    ways: int = 1  # devices over which the tokens of a row, or the slots of its cache, lie
    batch: int = 1  # devices over which rows lie: those of a call are a multiple of it
    compiler: tuple[tuple[str, str], ...] = ()  # options of XLA for programs that serve

    def jit(self, f: Callable, **how: Any) -> Callable:
        """jax.jit of a program that serves, with the options of its devices."""
        return jax.jit(f, compiler_options=dict(self.compiler) or None, **how)


def usual_impl() -> str:
    """Of the devices that jax runs on; a Plan knows its own."""
    return "pallas" if jax.default_backend() == "tpu" else "xla"


def check_kernels(cfg: ModelConfig, latents: str, impl: str) -> None:
    """UserError: an implementation of the ops does not read caches with such latents."""
    chosen = any(isinstance(layer.mixer, CompressedConfig) for layer in cfg.layers)
    if chosen and impl in KERNELS:
        raise UserError(
            f"cache {latents}: kernels of a TPU read no chosen blocks in it; leave it out"
        )


@functools.cache
def local(impl: str = "xla", exact: bool = False) -> Ops:
    """Operations on one device. The same arguments give the same object, so programs are shared.

    impl  of the ops: "ref", "xla", "pallas" (a TPU) or "pallas_interpret" (the same, slowly)
    """
    impl = known_impl(impl)
    return Ops(
        attend=partial(attend, impl=impl),
        recall=partial(recall, impl=impl),
        tiled=tiled,
        select=partial(select, impl=impl),
        top_blocks=partial(top_blocks, impl=impl),
        delta=partial(delta_runs, impl=impl),
        kda=partial(kda, impl=impl),
        experts=experts_by(None, impl),
        exact=exact,
    )
