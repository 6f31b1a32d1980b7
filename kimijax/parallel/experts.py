"""Experts dealt over the expert axis, which holds tokens outside of them (exchange.py)."""

import functools
from collections.abc import Callable

import jax
from jax.sharding import PartitionSpec as P

from kimijax.errors import UserError
from kimijax.ops.moe import count
from kimijax.parallel.axes import Axes
from kimijax.parallel.exchange import EXCHANGES, Link, cheaper

AXIS = "expert"


def experts(
    axes: Axes, compute: Callable, exchange: str | None, x, ids, weight, gate, up, down, layer=None
):
    """The contract of kimijax.ops.moe.tiled_experts, which `compute` has too.

    exchange  one of EXCHANGES; None: the cheaper
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
    link = Link(AXIS, ways, own, axes.mesh.devices.flat[0].platform != "cpu")
    swap = EXCHANGES[exchange or cheaper(ways, ids.shape[-1])]
    lead = () if layer is None else (None,)
    whole = lambda w: jax.tree.map(lambda _: P(*lead, AXIS), w)  # noqa: E731
    of_weights = tuple(
        whole(w) if cut is None else P(*lead, *spec)
        for w, spec in zip(
            (gate, up, down), ((AXIS, None, cut), (AXIS, None, cut), (AXIS, cut)), strict=True
        )
    )

    @functools.partial(
        jax.shard_map, mesh=axes.mesh, check_vma=False, out_specs=token,
        in_specs=(token, token, token, *of_weights, P()),
    )
    def local(x, ids, weight, gate, up, down, layer):
        def said(x, ids, weight):
            ids = ids - jax.lax.axis_index(AXIS) * own
            y = compute(x, ids, weight, gate, up, down, layer)
            return y if cut is None else jax.lax.psum(y, axes.heads)

        if not dealt:  # every device has the tokens
            return jax.lax.psum(said(x, ids, weight), AXIS)
        return swap(link, said, x, ids, weight) if ways > 1 else said(x, ids, weight)

    return local(x, ids, weight, gate, up, down, layer)
