"""Batches for training: the same global batch on any number of hosts, resumed in no time."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from kimijax.data.foreign import need
from kimijax.errors import UserError

THREADS, AHEAD = 2, 4  # that make batches, and batches made ahead of the step


class Batch(NamedTuple):
    """Rows as a model reads them, B L; of one row, L."""

    ids: np.ndarray  # int32, 0 where there is padding
    pos: np.ndarray  # int32, position in the document
    seg: np.ndarray  # int32, document within the row; -1: padding
    weight: np.ndarray  # float32, of predicting the next token


def grain():
    """The library of input pipelines; UserError: it is not installed."""
    return need("grain", "an input pipeline", "train")


def next_weights(seg: np.ndarray, learned: np.ndarray) -> np.ndarray:
    """float32 [L]: weight of predicting the next token, from the weight of learning each.

    0 where the next token is of another document, padding, or not there.
    """
    weight = np.zeros(len(seg), np.float32)
    same = (seg[1:] == seg[:-1]) & (seg[1:] >= 0)
    weight[:-1] = np.where(same, learned[1:], 0)
    return weight


def batches(rows: Any, batch: int, host: int = 0, hosts: int = 1) -> Any:
    """A grain iterator over Batch of `batch` rows, of which this host gets its share in order.

    rows  grain.MapDataset of rows (Batch of L)

    Host h of H gets rows h B/H to (h+1) B/H of every global batch. `get_state` is JSON values;
    `set_state` of a new iterator goes on at the same batch. Rows that fill no batch are left out.
    Batches are made in threads, ahead of the step.
    """
    if not 0 <= host < hosts:
        raise UserError(f"host {host} must be from 0 to {hosts - 1}")
    if batch < 1 or batch % hosts:
        raise UserError(f"a batch of {batch} rows cannot be dealt to {hosts} hosts: give a "
                        f"multiple of {hosts}")
    if (steps := len(rows) // batch) == 0:
        raise UserError(f"there are {len(rows)} rows, fewer than a batch of {batch}: give more "
                        "text, more epochs or a smaller batch")
    own = rows.batch(batch // hosts, drop_remainder=True, batch_fn=stack)
    own = own[host : steps * hosts : hosts]
    options = grain().ReadOptions(num_threads=THREADS, prefetch_buffer_size=AHEAD)
    return iter(own.to_iter_dataset(options))


def stack(rows: Sequence[Batch]) -> Batch:
    """Rows as one batch."""
    return Batch(*map(np.stack, zip(*rows, strict=True)))


def mixture(rows: Mapping[str, Any], weights: Mapping[str, float]) -> Any:
    """grain.MapDataset that takes rows of each name by weight, evenly and in a fixed order.

    Shares are exact to about a percent of the smallest. It ends where the first of them would have
    to begin anew; names without a weight are left out. UserError: a weight is no number from 0, all
    are 0, or a name is unknown.
    """
    names = ", ".join(map(repr, rows))
    if unknown := [name for name in weights if name not in rows]:
        raise UserError(f"a weight is given to {unknown[0]!r:.80}, but there are {names:.400}")
    for name, weight in weights.items():
        if isinstance(weight, bool) or not isinstance(weight, int | float) \
                or not 0 <= weight < math.inf:
            raise UserError(f"the weight of {name!r} is {weight!r:.40}: must be a number from 0")
    chosen = {name: weight for name, weight in weights.items() if weight}
    if not chosen:
        raise UserError(f"no weight is above 0: weigh some of {names:.400}")
    return grain().MapDataset.mix([rows[name] for name in chosen], list(chosen.values()))
