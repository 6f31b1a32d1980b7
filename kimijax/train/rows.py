"""Rows of a language model on their way from the data to the devices of a mesh."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from kimijax.cache import FAR
from kimijax.config import ModelConfig
from kimijax.errors import UserError
from kimijax.parallel.plan import Plan


class Rows(NamedTuple):
    """Tokens b t and what each of them should predict."""

    ids: jax.Array
    pos: jax.Array
    seg: jax.Array  # -1: padding
    targets: jax.Array
    weight: jax.Array  # of the prediction in the loss


def rows_of(ids: np.ndarray, pos: np.ndarray, seg: np.ndarray, weight: np.ndarray) -> Rows:
    """Rows b t in natural order: each token predicts the one behind it, `weight` as it says."""
    return Rows(ids, pos, seg, np.roll(ids, -1, 1), weight)


PADDING = Rows(ids=0, pos=FAR, seg=-1, targets=0, weight=0)


class LanguageRows:
    """Batches of documents (`kimijax.data.rows.batches`) as Rows; where they are is noted as there.

    prepare  such as `placed` with a plan
    """

    def __init__(self, batches, prepare: Callable[[Rows], Rows] = lambda rows: rows):
        self._batches, self._prepare = batches, prepare
        self.get_state, self.set_state = batches.get_state, batches.set_state

    def __next__(self) -> Rows:
        return self._prepare(rows_of(*next(self._batches)))


def share(plan: Plan, rows: int) -> tuple[int, int]:
    """(which, of how many) parts of a batch of `rows` lies on the devices of this process.

    What `kimijax.data.rows.batches` takes as host and hosts: processes that hold other tokens of
    the same rows read the same. UserError: the rows cannot be dealt over the mesh.
    """
    if rows % (data := plan.mesh.shape["data"]):
        raise UserError(
            f"{rows} rows are no multiple of the mesh axis data = {data}; choose another size"
        )
    held = _sharding(plan, rows, plan.ways).addressable_devices_indices_map((rows, plan.ways))
    spans = {index[0].indices(rows)[:2] for index in held.values()}
    first, last = min(a for a, _ in spans), max(b for _, b in spans)
    size = next(
        n for n in range(last - first, rows + 1)
        if rows % n == 0 and first // n == (last - 1) // n
    )
    return first // size, rows // size


def placed(plan: Plan, cfg: ModelConfig, total: int, rows: Rows) -> Rows:
    """This process's rows of a batch of `total`, in the order of the plan -> global arrays."""
    rows = arranged(plan, cfg, rows)
    where = _sharding(plan, total, rows.ids.shape[1])
    first = share(plan, total)[0] * rows.ids.shape[0]

    def piece(x, index):
        at, tokens = index
        start, stop, _ = at.indices(total)
        return x[start - first : stop - first, tokens]

    return Rows(*(
        jax.make_array_from_callback((total, x.shape[1]), where, partial(piece, x)) for x in rows
    ))


def arranged(plan: Plan, cfg: ModelConfig, rows: Rows) -> Rows:
    """Rows padded and in the order of a plan."""
    layout = plan.layout(cfg, rows.ids.shape[1])
    return Rows(*(layout.apply(x, fill) for x, fill in zip(rows, PADDING, strict=True)))


def _sharding(plan: Plan, rows: int, tokens: int) -> NamedSharding:
    return NamedSharding(plan.mesh, PartitionSpec(*plan.axes.place((rows, tokens))))
