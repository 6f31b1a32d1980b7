"""Tokens to experts over the expert axis, none dropped.

Outside of experts the axis holds tokens. Here the tokens of its devices come together, each device
computes what its own experts add, and a reduction brings every token its sum. That moves E - 1
copies of a token where an all-to-all moves one per chosen expert elsewhere: the better trade while
the axis is not longer than the choices of a token.
"""

import functools
from collections.abc import Callable

import jax
from jax.sharding import PartitionSpec as P

from kimijax.errors import UserError
from kimijax.parallel.axes import Axes

AXIS = "expert"


def experts(axes: Axes, compute: Callable, x, ids, weight, gate, up, down):
    """The contract of kimijax.ops.moe.tiled_experts, which `compute` has too."""
    rows, dealt = axes.place(x.shape[:2])
    ways, count = axes.mesh.shape[AXIS], jax.tree.leaves(gate)[0].shape[0]
    if count % ways:
        raise UserError(
            f"{count} experts are no multiple of the mesh axis {AXIS} = {ways}; choose a divisor"
        )
    # Packed matrices have scales per block of channels: they are not cut along them.
    cut = axes.heads if isinstance(gate, jax.Array) else None
    token = P(rows, dealt)
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
        if dealt and ways > 1:
            x, ids, weight = (
                jax.lax.all_gather(a, AXIS, axis=1, tiled=True) for a in (x, ids, weight)
            )
        ids = ids - jax.lax.axis_index(AXIS) * (count // ways)
        y = compute(x, ids, weight, gate, up, down)
        if cut is not None:
            y = jax.lax.psum(y, axes.heads)
        if not dealt:
            return jax.lax.psum(y, AXIS)
        return jax.lax.psum_scatter(y, AXIS, scatter_dimension=1, tiled=True) if ways > 1 else y

    return local(x, ids, weight, gate, up, down)
