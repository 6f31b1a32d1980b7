"""A slice as Google Cloud names it: accelerator type, hosts, chips of a host.

Names and sizes are those of cloud.google.com/tpu/docs (v5e, v5p, v6e, tpu7x, runtimes) and of
GKE's "Plan TPUs": a chip counts as its TensorCores in the names of v5p and tpu7x.
"""

import difflib
from typing import NamedTuple

from kimijax.errors import UserError
from kimijax.planner.chips import Pod, pod_of, pods


class Names(NamedTuple):
    """Of a kind of chip."""

    prefix: str  # of accelerator types
    cores: int  # of a chip, in them
    gke: str  # what a pod of Kubernetes selects
    runtime: str | None  # software of TPU VMs; None: there are none, it is on GKE alone


NAMES = {
    "v5e": Names("v5litepod", 1, "tpu-v5-lite-podslice", "v2-alpha-tpuv5-lite"),
    "v5p": Names("v5p", 2, "tpu-v5p-slice", "v2-alpha-tpuv5"),
    "v6e": Names("v6e", 1, "tpu-v6e-slice", "v2-alpha-tpuv6e"),
    "tpu7x": Names("tpu7x", 2, "tpu7x", None),
}
HOST = 4  # chips of a host of many; of one alone, one more size


class Slice(NamedTuple):
    """Of one job."""

    pod: Pod

    @property
    def names(self) -> Names:
        return NAMES[self.pod.name]

    @property
    def sizes(self) -> str:
        """Such as 8x8x8."""
        return self.pod.topology.partition(":")[2]

    @property
    def hosts(self) -> int:
        return -(-self.pod.chips // self.per_host)

    @property
    def per_host(self) -> int:
        """Chips."""
        if self.pod.chip.dims == 2 and self.pod.chips == 8:
            return 8  # 2x4 is one host
        return min(HOST, self.pod.chips)

    @property
    def accelerator(self) -> str:
        """Such as v5p-1024, of 512 chips."""
        return f"{self.names.prefix}-{self.names.cores * self.pod.chips}"


def slice_of(topology: str) -> Slice:
    """Of a name such as "v5p:8x8x8". UserError, with near ones: there is none of this shape.

    Of two shapes with as many chips, an accelerator type means the usual one, and only that is
    taken: the most even, of which each side is a power of two.
    """
    pod = pod_of(topology)
    usual = [p.topology for p in pods(pod.name) if p.chips != 2]
    if topology not in usual:
        near = difflib.get_close_matches(topology, usual, 3, 0.0)
        raise UserError(f"--topology {topology}: {pod.name} is to be had as {', '.join(near)} and "
                        "other powers of two")
    return Slice(pod)
