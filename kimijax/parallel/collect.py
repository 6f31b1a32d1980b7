"""Weights of a layer that training deals over devices, brought together by as few gathers.

Each collective waits for links, and is a program that the compiler compiles. Weights of projections
lie in pieces of one dim (rules.TRAIN): pieces of as many rows are cast where they lie, put side by
side and sent as one array. Gradients go home one by one, each when it is there.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from kimijax.parallel.rules import DEALT

CAST = "w"  # the name of weights that layers cast to the dtype of activations: those of a Proj
LANES = 128  # of a TPU's tile: what begins elsewhere within a row is moved within tiles


class Pack(NamedTuple):
    """Weights that travel together."""

    dims: tuple[int, ...]  # of each, the one in pieces: as long for all
    places: tuple[NamedSharding, ...]  # of each; all lie over the same axes
    dtype: jnp.dtype


def collect(places, params, dtype: jnp.dtype):
    """Params of a layer, those of projections whole on all devices over which they were dealt.

    places  tree like params: the sharding of each
    """
    leaves, tree = jax.tree_util.tree_flatten_with_path(params)
    places, found = jax.tree.leaves(places), [x for _, x in leaves]
    packs: dict[tuple, list[int]] = {}
    for i, (path, x) in enumerate(leaves):
        dim = dealt(places[i])
        if dim is not None and path[-1].key == CAST:
            packs.setdefault((x.shape[dim], places[i].spec[dim]), []).append(i)
    for members in packs.values():
        members.sort(key=lambda i: found[i].size // found[i].shape[dealt(places[i])] % LANES > 0)
        at = tuple(places[i] for i in members)
        pack = Pack(tuple(map(dealt, at)), at, dtype)
        whole = together(pack, tuple(found[i] for i in members))
        for i, x in zip(members, whole, strict=True):
            found[i] = x
    return jax.tree.unflatten(tree, found)


def dealt(place: NamedSharding) -> int | None:
    """The dim that lies over axes of DEALT; None: no dim does, or another lies over axes too."""
    held = [i for i, axes in enumerate(place.spec) if axes]
    if len(held) != 1 or not set(np.atleast_1d(place.spec[held[0]])) <= set(DEALT):
        return None
    return held[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def together(pack: Pack, weights: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """Whole weights out of pieces, in the dtype of the pack."""
    moved = [jnp.moveaxis(x, dim, 0) for x, dim in zip(weights, pack.dims, strict=True)]
    rows = [x.reshape(x.shape[0], -1).astype(pack.dtype) for x in moved]
    mesh, axes = pack.places[0].mesh, pack.places[0].spec[pack.dims[0]]
    put = jax.lax.with_sharding_constraint
    side_by_side = put(jnp.concatenate(rows, 1), NamedSharding(mesh, PartitionSpec(axes)))
    # Behind the barrier nothing is taken apart before it is sent.
    whole = jax.lax.optimization_barrier(put(side_by_side, NamedSharding(mesh, PartitionSpec())))
    parts = jnp.split(whole, np.cumsum([x.shape[1] for x in rows])[:-1], 1)
    return tuple(
        jnp.moveaxis(part.reshape(x.shape), 0, dim)
        for part, x, dim in zip(parts, moved, pack.dims, strict=True)
    )


def _forward(pack, weights):
    return together(pack, weights), None


def _backward(pack, _, grads):
    # Summed where each lies: the whole of none is anywhere.
    home = jax.lax.with_sharding_constraint(grads, pack.places)
    return (tuple(d.astype(jnp.float32) for d in home),)


together.defvjp(_forward, _backward)
