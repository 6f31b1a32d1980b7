"""What travels in attention: latents (MLA), or keys and values (grouped and multi-head)."""

import jax
from jax.sharding import PartitionSpec as P

from kernels_pallas.attention import BACKWARD, Keys, attention
from kernels_pallas.attention.vjp import Backward
from kernels_pallas.latent import BACKWARD as OF_LATENTS
from kernels_pallas.latent import Latents, latent_attention
from kimijax.errors import UserError
from kimijax.parallel.axes import Axes
from kimijax.parallel.device import Source


def _latents_of(kv: Latents, up, first, count: int, heads: int):
    """All latents; the projections of some heads."""
    del heads
    cut = lambda w: jax.lax.dynamic_slice_in_dim(w, first, count, 1)  # noqa: E731
    return kv, jax.tree.map(cut, up)


def _latent_specs(axes: Axes, kv: Latents, up):
    return jax.tree.map(lambda _: axes.keys(), kv), jax.tree.map(lambda _: P(None, axes.heads), up)


def _heads_of(kv: Keys, up, first, count: int, heads: int):
    """The key and value heads that some query heads read."""
    groups = kv.key.shape[2]
    readers = heads // groups  # of one key head
    if count % readers and readers % count:
        raise UserError(f"{groups} key heads cannot be dealt out with {count} of {heads} heads")
    share = max(1, count // readers)
    cut = lambda x: jax.lax.dynamic_slice_in_dim(x, first // readers, share, 2)  # noqa: E731
    return kv._replace(key=cut(kv.key), value=cut(kv.value)), up


def _head_specs(axes: Axes, kv: Keys, up):
    spec = Keys(axes.queries(), axes.queries(), axes.keys(), axes.keys(), axes.keys())
    return spec._replace(rope=None if kv.rope is None else spec.rope), up


def _attend_heads(q, kv: Keys, up: tuple[()], **how):
    return attention(q, kv, **how)


def _heads_backward(impl: str) -> Backward:
    """Nothing is projected: there are no weights, and none have gradients."""
    of = BACKWARD[impl]
    return Backward(
        of.ask, lambda asked, up: of.start(asked),
        lambda asked, sums, kv, up: of.add(asked, sums, kv),
        lambda asked, sums: (*of.finish(asked, sums), ()), of.skips,
    )


LATENTS = Source(
    latent_attention, OF_LATENTS.__getitem__, lambda kv, up: up[1].shape[-1], _latents_of,
    _latent_specs,
)
HEADS = Source(
    _attend_heads, _heads_backward, lambda kv, up: kv.value.shape[-1], _heads_of, _head_specs
)
