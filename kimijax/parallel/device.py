"""Attention on one device of many: the keys that are there, and their share of the gradients."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas.attention import Queries
from kernels_pallas.attention.vjp import Backward, at_once
from kernels_pallas.partial import Partial
from kimijax.parallel.axes import Axes


class Source(NamedTuple):
    """What travels, and how to attend to it; kv is a NamedTuple with pos and seg, up are weights.

    attend    (q, kv, up, scale=, impl=) -> Partial
    backward  of an impl: the Backward for sets kv with weights up
    width     (kv, up) -> numbers of a value
    mine      (kv, up, first, count) -> the same of `count` heads from `first`, of `heads` in all
    specs     (axes, kv, up) -> PartitionSpecs of kv and of up
    """

    attend: Callable[..., Partial]
    backward: Callable[[str], Backward]
    width: Callable[[Any, Any], int]
    mine: Callable[[Any, Any, jax.Array, int, int], tuple[Any, Any]]
    specs: Callable[[Axes, Any, Any], tuple[Any, Any]]


class Local(NamedTuple):
    """What the strategies need to know on a device."""

    axes: Axes
    source: Source
    scale: float
    impl: str

    @property
    def names(self) -> tuple[str, ...]:
        return self.axes.tokens

    def over(self, names: tuple[str, ...]) -> "Local":
        """What meets on some of the token axes alone."""
        return self._replace(axes=self.axes.over(names))

    def keys_of(self, kv, up, q: Queries) -> Partial:
        return self.source.attend(q, kv, up, scale=self.scale, impl=self.impl)

    def grads_of(self, kv, up, q: Queries, lse, d_out, delta):
        """(d_q nope and rope, d_kv floats, d_up), float32, of the keys that lie here."""
        grads = at_once(self.source.backward(self.impl))
        return grads(q, kv, up, lse, d_out, delta, scale=self.scale)


def floats_of(kv):
    """kv without its positions and segments."""
    return kv._replace(pos=None, seg=None)


def join(kv, floats):
    """`floats` with the positions and segments of kv."""
    return floats._replace(pos=kv.pos, seg=kv.seg)


def zeros_like(tree):
    """float32 zeros in the shapes of a tree."""
    return jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), tree)


def add(a, b):
    """Sum of two trees."""
    return jax.tree.map(jnp.add, a, b)
