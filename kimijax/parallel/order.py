"""Orders of a sequence over devices, as permutations of the input: positions say the rest.

With causal attention a device that holds the end of a row has most to do. Zigzag gives each device
a piece from the front and its mirror from the back; striped deals many small pieces. Whole runs
move, so that neighbours within a run stay neighbours (see kimijax.ops.runs).
"""

from typing import NamedTuple

import numpy as np

from kimijax.errors import UserError

ORDERS = ("contiguous", "zigzag", "striped")


class Order(NamedTuple):
    """`runs` equal pieces; place i of the array holds piece pieces[i] of the row."""

    pieces: np.ndarray
    length: int  # of a row in this order, padding included

    @property
    def runs(self) -> int:
        """How many pieces there are."""
        return len(self.pieces)

    @property
    def places(self) -> np.ndarray:
        """[length] the place in the row of each place of the array."""
        run = self.length // self.runs
        return (self.pieces[:, None] * run + np.arange(run)).reshape(-1)


def make_order(kind: str, tokens: int, devices: int, run: int, least: int = 1) -> Order:
    """The order of rows of `tokens`, padded to equal runs of a multiple of `run`.

    least  tokens a run has at least: layers look back so far
    """
    if kind not in ORDERS:
        raise UserError(f"order {kind!r:.40}: there are {', '.join(ORDERS)}")
    unit = -(-max(least, 1) // run) * run
    per_device = {"contiguous": 1, "zigzag": 2, "striped": max(1, tokens // (devices * unit))}[kind]
    runs = devices * per_device
    size = -(-tokens // (runs * unit)) * unit
    pieces = np.arange(runs)
    if kind == "zigzag":
        half = np.arange(devices)
        pieces = np.stack([half, 2 * devices - 1 - half], 1).reshape(-1)
    elif kind == "striped":
        pieces = pieces.reshape(per_device, devices).T.reshape(-1)
    return Order(pieces, runs * size)


def device_work(order: Order, devices: int) -> np.ndarray:
    """Causal query-key pairs of each device's tokens, for the balance busiest / mean."""
    return (order.places.reshape(devices, -1) + 1.0).sum(-1)
