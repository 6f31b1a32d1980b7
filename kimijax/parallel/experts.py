"""Experts dealt over the expert axis, which holds tokens outside of them (exchange.py)."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from kimijax.errors import UserError
from kimijax.ops.moe import count
from kimijax.parallel.axes import Axes
from kimijax.parallel.exchange import AXIS, EXCHANGES, Link, chosen


def experts(
    axes: Axes, compute: Callable, exchange: str | None, dealt_over: tuple[str, ...],
    x, ids, weight, gate, up, down, layer=None,
):
    """The contract of kimijax.ops.moe.tiled_experts, which `compute` has too.

    exchange    one of EXCHANGES; None: the cheapest of those that the devices have
    dealt_over  the axes over which the training of floats deals their matrices as well: gate and
                up along d, down along f (rules.TRAIN)
    """
    rows, dealt = axes.place(x.shape[:2])
    ways, all_of = axes.mesh.shape[AXIS], count(gate, layer)
    if all_of % ways:
        raise UserError(
            f"{all_of} experts are no multiple of the mesh axis {AXIS} = {ways}; choose a divisor"
        )
    # Packed matrices have scales per block of channels: they are not cut along them.
    cut = axes.heads if isinstance(gate, jax.Array) else None
    token, own = P(rows, dealt), all_of // ways
    name = exchange or chosen(axes.mesh, ids.shape[-1])
    swap, link = EXCHANGES[name], Link(AXIS, ways, own, name == "ragged")
    lead = () if layer is None else (None,)
    pieces = dealt_over if cut and layer is None else ()
    of_weights = tuple(
        jax.tree.map(lambda _, spec=spec: P(*lead, AXIS, *spec), w)
        for w, spec in zip(
            (gate, up, down),
            ((pieces, cut), (pieces, cut), ((*(cut or ()), *pieces), None)), strict=True,
        )
    )

    @functools.partial(
        jax.shard_map, mesh=axes.mesh, check_vma=False, out_specs=token,
        in_specs=(token, token, token, *of_weights, P()),
    )
    def local(x, ids, weight, gate, up, down, layer):
        if pieces:
            gate, up, down = (gathered(pieces, x.dtype, w) for w in (gate, up, down))

        def said(x, ids, weight):
            ids = ids - jax.lax.axis_index(AXIS) * own
            y = compute(x, ids, weight, gate, up, down, layer)
            return y if cut is None else jax.lax.psum(y, axes.heads)

        if not dealt:  # every device has the tokens
            return jax.lax.psum(said(x, ids, weight), AXIS)
        return swap(link, said, x, ids, weight) if ways > 1 else said(x, ids, weight)

    return local(x, ids, weight, gate, up, down, layer)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def gathered(names: tuple[str, ...], dtype: jnp.dtype, w: jax.Array) -> jax.Array:
    """Pieces of the second dim of weights, cast where they lie, whole: half of float32 is sent.

    Gradients, in the dtype of the products as those of any projection, are summed over the devices
    in float32, and each keeps the piece that is its own.
    """
    return jax.lax.all_gather(w.astype(dtype), names, axis=1, tiled=True)


def _forward(names, dtype, w):
    return gathered(names, dtype, w), None


def _backward(names, dtype, _, d_w):
    d_w = d_w.astype(jnp.float32)
    return (jax.lax.psum_scatter(d_w, names, scatter_dimension=1, tiled=True),)


gathered.defvjp(_forward, _backward)
