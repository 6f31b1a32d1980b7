"""Chips and their pods: figures of one chip, and which topologies there are.

Peak and HBM bandwidth are those of kernels_pallas.aot, links those of kimijax.parallel.cost; tori
and pods are from Google's page of each chip (cloud.google.com/tpu/docs/v5e, v5p, v6e, tpu7x).
"""

import difflib
import math
import re
from typing import NamedTuple

from kernels_pallas import aot
from kimijax.errors import UserError
from kimijax.parallel.cost import DEVICES, KINDS

GIB = 2**30


class Chip(NamedTuple):
    """Of one chip; a device of jax is `1 / devices` of it."""

    dims: int  # of its torus: two links each
    most: int  # chips of the largest job, or of a pod
    memory: float  # HBM bytes that a program may use on a device, as libtpu 0.0.52 says
    # Assumed, about what an hour on demand cost; cloud.google.com/tpu/pricing has those of today.
    dollars: float
    # Nobody publishes these: assumptions from the 170 W that a TPU v4 draws on average
    # (arXiv:2304.01433) and the peak of each chip.
    watts: float
    devices: int = 1  # that jax makes of a chip


CHIPS = {
    "v5e": Chip(2, 256, 15.75 * GIB, 1.20, 170),
    "v5p": Chip(3, 6144, 95.73 * GIB, 4.20, 450),
    "v6e": Chip(2, 256, 31.24 * GIB, 2.70, 300),
    "tpu7x": Chip(3, 9216, 94.74 * GIB, 12.00, 900, 2),
}


class Pod(NamedTuple):
    """A topology: rates are those of one device of it, in a second."""

    topology: str
    name: str  # of its chips
    chips: int

    @property
    def chip(self) -> Chip:
        return CHIPS[self.name]

    @property
    def devices(self) -> int:
        """That jax sees."""
        return self.chips * self.chip.devices

    @property
    def flops(self) -> float:
        """bfloat16."""
        return aot.CHIPS[self.name].peak / self.chip.devices

    @property
    def bandwidth(self) -> float:
        """HBM bytes."""
        return aot.CHIPS[self.name].bandwidth / self.chip.devices

    @property
    def links(self) -> float:
        """Bytes that a device sends over all of its links, which an all-to-all uses."""
        return DEVICES[self.name].link * 2 * self.chip.dims / self.chip.devices

    @property
    def kind(self) -> str:
        """The `device_kind` of its devices in jax."""
        return next(kind for kind, name in KINDS.items() if name == self.name)


def pod_of(topology: str) -> Pod:
    """The pod of a name such as "v5p:4x4x8". UserError: there is none, with near ones."""
    found = re.fullmatch(r"([a-z0-9]+):(\d{1,3}(?:x\d{1,3}){1,2})", topology)
    if found and found[1] in CHIPS:
        sizes = [int(size) for size in found[2].split("x")]
        if _stands(CHIPS[found[1]], sizes):
            return Pod(topology, found[1], math.prod(sizes))
    kind = topology.partition(":")[0]
    names = [p.topology for name in CHIPS for p in pods(name) if kind not in CHIPS or name == kind]
    near = difflib.get_close_matches(topology, names, 3, 0.0)
    raise UserError(f"topology {topology!r:.40} is none; near ones are {', '.join(near)}")


def _stands(chip: Chip, sizes: list[int]) -> bool:
    """Whether whole hosts, of 2 x 2 chips, make the torus; or a part of one host does."""
    if len(sizes) != chip.dims or not 0 < math.prod(sizes) <= chip.most:
        return False
    if chip.dims == 2 and max(sizes) > 16:
        return False
    return math.prod(sizes) in (1, 2) or all(size % 2 == 0 for size in sizes[:2])


def pods(name: str) -> list[Pod]:
    """The usual topologies of a chip, the smallest first. UserError: there is no such chip."""
    if name not in CHIPS:
        raise UserError(f"--chip {name!r:.40}: there are {', '.join(CHIPS)}")
    chip = CHIPS[name]
    sizes = [(2, 2, 1), *_doubled((2, 2, 2))] if chip.dims == 3 else [(1, 1), *_doubled((2, 2))]
    found = [(s, f"{name}:{'x'.join(map(str, s))}") for s in sizes if _stands(chip, list(s))]
    return [Pod(topology, name, math.prod(s)) for s, topology in found]


def _doubled(sizes: tuple[int, ...]):
    """Tori of which one side after the other, the last first, is twice as long."""
    while max(sizes) <= 32:
        yield sizes
        least = max(i for i, size in enumerate(sizes) if size == min(sizes))
        sizes = (*sizes[:least], 2 * sizes[least], *sizes[least + 1 :])
