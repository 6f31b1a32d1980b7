"""Reading and writing token rows of stacked states l b s ... at places of their slots.

Rotary keys are 64 wide, and a TPU would pad or move an array so narrow: two of them share a row, as
kernels_pallas.latent_decode.pair lays them. Of numbers of which a token has one LINE share a row.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas.latent_decode import HALF

PAGE = 2 * HALF  # slots whose rotary keys lie in the same rows
PAIRED = ("k_rope",)
LINE = HALF
SCALED_PAGE = 8 * LINE  # slots whose scales fill a tile of a TPU; of others XLA copies the stack
SCALARS = ("latent_scale",)  # l b s/128 128


class Rows(NamedTuple):
    """How states are read and written; `name` says how their rows lie."""

    read: Callable[..., jax.Array]  # (name, stack, layer, at b n) -> b n ...
    write: Callable[..., jax.Array]  # (name, stack, layer, at b n, x b n ...) -> stack


def slots(name: str, stack: jax.Array) -> int:
    """Slots of a row of the stack."""
    if name in SCALARS:
        return stack.shape[2] * LINE
    return stack.shape[2] * (2 if name in PAIRED else 1)


def read(name: str, stack: jax.Array, layer: jax.Array, at: jax.Array) -> jax.Array:
    """Rows at the places; 0 outside."""
    row = jnp.arange(at.shape[0])[:, None]
    if name in SCALARS:
        return stack.at[layer, row, at // LINE, at % LINE].get(mode="fill", fill_value=0)
    if name not in PAIRED:
        return stack.at[layer, row, at].get(mode="fill", fill_value=0)
    both = stack.at[layer, row, _line(at)].get(mode="fill", fill_value=0)
    left, right = jnp.split(both, 2, -1)
    return jnp.where(_right(at)[..., None], right, left)


def write(
    name: str, stack: jax.Array, layer: jax.Array, at: jax.Array, x: jax.Array
) -> jax.Array:
    """The stack with rows x at the places; those outside are dropped."""
    if stack.dtype == jnp.int32 and x.dtype != jnp.int32:
        raise ValueError(f"{name}: {x.dtype} into words of int8; Memory.kept makes them")
    x, row = x.astype(stack.dtype), jnp.arange(at.shape[0])[:, None]
    if name in SCALARS:
        return stack.at[layer, row, at // LINE, at % LINE].set(x, mode="drop")
    if name not in PAIRED:
        return stack.at[layer, row, at].set(x, mode="drop")
    start = jnp.where(_right(at), x.shape[-1], 0)
    where = jnp.stack(jnp.broadcast_arrays(layer, row, _line(at), start), -1)
    numbers = jax.lax.ScatterDimensionNumbers(
        update_window_dims=(2,), inserted_window_dims=(0, 1, 2),
        scatter_dims_to_operand_dims=(0, 1, 2, 3),
    )
    return jax.lax.scatter(
        stack, where, x, numbers, mode=jax.lax.GatherScatterMode.FILL_OR_DROP
    )


def _line(at: jax.Array) -> jax.Array:
    return at // PAGE * HALF + at % HALF


def _right(at: jax.Array) -> jax.Array:
    return at % PAGE >= HALF


ROWS = Rows(read, write)  # of states that lie on one device
