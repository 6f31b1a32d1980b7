"""Meshes with the axes data, seq, expert and tensor, from devices that are there or only described.

data    rows of a batch
seq     the tokens of a row
expert  routed experts; outside of them it holds tokens, as seq does
tensor  heads and hidden channels
"""

import math
import re

import jax
import numpy as np
from jax.sharding import Mesh

from kimijax.errors import UserError

AXES = ("data", "seq", "expert", "tensor")


def parse_mesh(text: str) -> dict[str, int]:
    """Sizes by axis of "data=1,seq=8,expert=2"; axes that are not named have size 1."""
    sizes = dict.fromkeys(AXES, 1)
    seen = set()
    for part in text.split(","):
        found = re.fullmatch(r"\s*([a-z]+)\s*=\s*([0-9]{1,6})\s*", part)
        if not found or found[1] not in AXES or int(found[2]) < 1:
            raise UserError(
                f"mesh {text!r:.80}: {part!r:.40} is no axis; write it as seq=8,expert=2 with axes "
                f"of {', '.join(AXES)}"
            )
        if found[1] in seen:
            raise UserError(f"mesh {text!r:.80}: {found[1]} is there twice; name it once")
        seen.add(found[1])
        sizes[found[1]] = int(found[2])
    return sizes


def make_mesh(sizes: dict[str, int], devices: list | None = None) -> Mesh:
    """A mesh over the first devices of this job (all processes'), or of those given.

    sizes  by axis; axes that are left out have size 1. UserError: there are too few devices.
    """
    if unknown := sorted(set(sizes) - set(AXES)):
        raise UserError(f"mesh: there is no axis {unknown[0]!r}, there are {', '.join(AXES)}")
    shape = tuple(sizes.get(axis, 1) for axis in AXES)
    given, devices = devices, jax.devices() if devices is None else devices
    if (need := math.prod(shape)) > len(devices):
        kind = devices[0].platform
        more = f"; XLA_FLAGS=--xla_force_host_platform_device_count={need} makes as many"
        raise UserError(
            f"mesh {named(sizes)} needs {need} devices, there are {len(devices)} ({kind})"
            f"{more if kind == 'cpu' else '; choose smaller axes'}"
        )
    if given is None and devices[need - 1].process_index < jax.process_count() - 1:
        raise UserError(
            f"mesh {named(sizes)} takes the first {need} of {len(devices)} devices and none of "
            f"process {jax.process_count() - 1}; choose axes that use all of them, or start fewer "
            "processes"
        )
    return Mesh(np.array(devices[:need]).reshape(shape), AXES)


def topology_mesh(topology: str, sizes: dict[str, int]) -> Mesh:
    """A mesh of TPU chips that need not be there, such as "v5p:4x4x4", to compile for.

    Needs libtpu (the extra [aot]); UserError: it is missing, or knows no such topology.
    """
    from jax.experimental import topologies

    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    except Exception as error:  # libtpu raises several kinds
        why = " ".join(str(error).split())[:200]
        raise UserError(f"topology {topology!r:.40} cannot be planned for: {why}") from error
    return make_mesh(sizes, list(found.devices))


def named(sizes: dict[str, int]) -> str:
    """data=1,seq=8: the axes that were given."""
    return ",".join(f"{axis}={size}" for axis, size in sizes.items())
