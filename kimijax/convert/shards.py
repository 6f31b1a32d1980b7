"""A parameter that is filled part by part, each device holding no more than its own shard.

No part is ever gathered and no leaf is built on the host: a part is cut to the shard that holds
it and written there, in place. So a leaf may be larger than the memory of any host, and a process
of many needs only the parts that its own devices hold.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding

from kimijax.checkpoint.common import brief
from kimijax.config import ModelConfig
from kimijax.errors import UserError

# A configuration -> the layout of every parameter, by its name joined by ".".
Shardings = Callable[[ModelConfig], Mapping[str, Sharding]]
Box = tuple[tuple[int, int], ...]  # start and stop in every dim
SMALL = 2**20  # bytes of a shard that is put together on the host: programs cost more than copies
PIECE = 2**27  # bytes of a shard that are on the host at a time, unless one chunk is larger


class Shards:
    """The shards of one parameter on the devices of this process."""

    def __init__(
        self, name: str, shape: Sequence[int], dtype: np.dtype, sharding: Sharding | None = None
    ):
        """Where the parts will go; nothing is allocated.

        sharding  None: all of it on the default device. UserError: it does not fit the shape
        """
        self.shape, self.dtype, self._sharding = tuple(shape), np.dtype(dtype), sharding
        self._boxes: dict[Box, list[jax.Device | None]] = {}  # a box may be on many devices
        for device, box in _boxes(name, self.shape, sharding).items():
            self._boxes.setdefault(box, []).append(device)
        self._buffers: dict[jax.Device | None, jax.Array] = {}
        self._staged: dict[Box, np.ndarray] = {}

    def holds(self, index: Sequence[int]) -> bool:
        """Whether a shard of this process has numbers at an index of the leading dims."""
        return any(_inside(box, index) for box in self._boxes)

    def put(self, index: Sequence[int], part: np.ndarray) -> list[jax.Array]:
        """Write a part at an index of the leading dims; returns what is being written to.

        part  the remaining dims, whole; wait for the arrays before the next `put`, or parts
              that are on their way fill the host's memory
        """
        lead = len(index)
        touched = []
        for box in self._boxes:
            if _inside(box, index):
                inner = part[tuple(slice(*ends) for ends in box[lead:])]
                block = np.asarray(inner, self.dtype, order="C").reshape(*(1,) * lead, *inner.shape)
                start = [i - first for i, (first, _) in zip(index, box, strict=False)]
                touched += self._write(box, block, (*start, *(0,) * inner.ndim))
        return touched

    def fill(self, read: Callable[[tuple[slice, ...]], np.ndarray], chunk: Sequence[int]) -> None:
        """Write every shard from what can be read anywhere.

        read   an index of the whole parameter -> the numbers there
        chunk  size in every dim of what is read at once whatever one asks for
        """
        touched: list[jax.Array] = []
        for box in self._boxes:
            for piece in _pieces(box, chunk, self.dtype.itemsize):
                block = read(tuple(slice(*ends) for ends in piece))
                block = np.asarray(block, self.dtype, order="C")
                jax.block_until_ready(touched)
                start = tuple(a - b for (a, _), (b, _) in zip(piece, box, strict=True))
                touched = self._write(box, block, start)

    def array(self) -> jax.Array:
        """The parameter, once all its parts were written."""
        for box, staged in self._staged.items():
            for device in self._boxes[box]:
                self._buffers[device] = jax.device_put(staged, device)
        if self._sharding is None:
            return self._buffers[None]
        return jax.make_array_from_single_device_arrays(
            self.shape, self._sharding, list(self._buffers.values()), dtype=self.dtype
        )

    def _write(self, box: Box, block: np.ndarray, start: tuple[int, ...]) -> list[jax.Array]:
        """A block to a place in the shards that cover a box."""
        shape = tuple(stop - first for first, stop in box)
        if block.shape != shape and np.prod(shape) * self.dtype.itemsize <= SMALL:
            staged = self._staged.setdefault(box, np.zeros(shape, self.dtype))
            staged[tuple(slice(i, i + n) for i, n in zip(start, block.shape, strict=True))] = block
            return []
        devices = self._boxes[box]
        for device in devices:
            if block.shape == shape:
                self._buffers[device] = jax.device_put(block, device)
                continue
            moved, at = jax.device_put(block, device), np.asarray(start, np.int32)
            held = self._buffers.get(device)
            self._buffers[device] = (
                _begin(shape, moved, at) if held is None else _update(held, moved, at)
            )
        return [self._buffers[device] for device in devices]


@functools.partial(jax.jit, static_argnums=0)
def _begin(shape: tuple[int, ...], block: jax.Array, start: jax.Array) -> jax.Array:
    """A buffer with its first block, on the device where that is."""
    return _updated(jnp.zeros(shape, block.dtype), block, start)


@functools.partial(jax.jit, donate_argnums=0)
def _update(buffer: jax.Array, block: jax.Array, start: jax.Array) -> jax.Array:
    """The buffer itself with a block written into it."""
    return _updated(buffer, block, start)


def _updated(buffer, block, start):
    if buffer.dtype.itemsize >= 4 or not jnp.issubdtype(buffer.dtype, jnp.floating):
        return jax.lax.dynamic_update_slice(buffer, block, start)

    def in_words(buffer, block, start):
        # On a CPU XLA takes narrow floats through float32, all of the buffer at every update.
        word = jnp.dtype(f"uint{8 * buffer.dtype.itemsize}")
        words = (jax.lax.bitcast_convert_type(x, word) for x in (buffer, block))
        return jax.lax.bitcast_convert_type(
            jax.lax.dynamic_update_slice(*words, start), buffer.dtype
        )

    return jax.lax.platform_dependent(
        buffer, block, start, cpu=in_words, default=jax.lax.dynamic_update_slice
    )


def _boxes(
    name: str, shape: tuple[int, ...], sharding: Sharding | None
) -> dict[jax.Device | None, Box]:
    """What each device of this process holds of a shape; None stands for the default device."""
    if sharding is None:
        return {None: tuple((0, size) for size in shape)}
    try:
        sharding.shard_shape(shape)  # refuses what does not divide; the map below does not
        found = sharding.addressable_devices_indices_map(shape)
    except (ValueError, IndexError) as error:  # too many dims are an IndexError
        raise UserError(
            f"{name} {shape} cannot be laid out as {sharding}: {brief(error)}; shard other dims"
        ) from error
    return {
        device: tuple(cut.indices(n)[:2] for cut, n in zip(index, shape, strict=True))
        for device, index in found.items()
    }


def _inside(box: Box, index: Sequence[int]) -> bool:
    return all(first <= i < stop for i, (first, stop) in zip(index, box, strict=False))


def _pieces(box: Box, chunk: Sequence[int], itemsize: int, axis: int = 0) -> Iterator[Box]:
    """A box in pieces of at most PIECE bytes, cut only between chunks."""
    sizes = [stop - first for first, stop in box]
    size = int(np.prod(sizes, dtype=np.int64)) * itemsize
    if size <= PIECE or axis == len(box):
        yield box
        return
    (first, stop), width = box[axis], chunk[axis]
    step = max(1, PIECE // (size // sizes[axis]) // width) * width
    begin = first - first % width
    for at in range(begin, stop, step):
        ends = (max(at, first), min(at + step, stop))
        yield from _pieces((*box[:axis], ends, *box[axis + 1 :]), chunk, itemsize, axis + 1)
