"""Experts dealt over the expert axis, which holds tokens outside of them (exchange.py)."""

import functools
from collections.abc import Callable

import jax
from jax.sharding import PartitionSpec as P

from kimijax.errors import UserError
from kimijax.parallel.axes import Axes
from kimijax.parallel.exchange import EXCHANGES, Link, cheaper

AXIS = "expert"


def experts(
    axes: Axes, compute: Callable, exchange: str | None, x, ids, weight, gate, up, down
):
    """The contract of kimijax.ops.moe.tiled_experts, which `compute` has too.

    exchange  one of EXCHANGES; None: the cheaper
    """
    rows, dealt = axes.place(x.shape[:2])
    ways, count = axes.mesh.shape[AXIS], jax.tree.leaves(gate)[0].shape[0]
    if count % ways:
        raise UserError(
            f"{count} experts are no multiple of the mesh axis {AXIS} = {ways}; choose a divisor"
        )
    # Packed matrices have scales per block of channels: they are not cut along them.
    cut = axes.heads if isinstance(gate, jax.Array) else None
    token, own = P(rows, dealt), count // ways
    link = Link(AXIS, ways, own, axes.mesh.devices.flat[0].platform != "cpu")
    swap = EXCHANGES[exchange or cheaper(ways, ids.shape[-1])]
    whole = lambda w: jax.tree.map(lambda _: P(AXIS), w)  # noqa: E731
    of_weights = tuple(
        whole(w) if cut is None else spec
        for w, spec in zip(
            (gate, up, down),
            (P(AXIS, None, cut), P(AXIS, None, cut), P(AXIS, cut)), strict=True,
        )
    )

    @functools.partial(
        jax.shard_map, mesh=axes.mesh, check_vma=False, out_specs=token,
        in_specs=(token, token, token, *of_weights),
    )
    def local(x, ids, weight, gate, up, down):
        def said(x, ids, weight):
            ids = ids - jax.lax.axis_index(AXIS) * own
            y = compute(x, ids, weight, gate, up, down)
            return y if cut is None else jax.lax.psum(y, axes.heads)

        if not dealt:  # every device has the tokens
            return jax.lax.psum(said(x, ids, weight), AXIS)
        return swap(link, said, x, ids, weight) if ways > 1 else said(x, ids, weight)

    return local(x, ids, weight, gate, up, down)
