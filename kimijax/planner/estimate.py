"""The closed form of a job on a mesh of a pod: whether it fits, how long it takes at least, prices.

A time is the largest of three bounds: products at the peak of a chip, bytes at the bandwidth of its
memory, bytes over its links. Nothing waits for anything else in it, and no latency is counted.
"""

from dataclasses import dataclass, replace

from kimijax.parallel.cost import DEVICES
from kimijax.parallel.plan import Plan
from kimijax.planner import links, memory, work
from kimijax.planner.chips import Pod
from kimijax.planner.job import Job, abstract_mesh, layout

BOUNDS = ("matmul", "hbm", "links")


@dataclass(frozen=True)
class Estimate:
    """Of one device, but flops_per_token, which is of all; seconds of a call or a step."""

    job: Job
    pod: Pod
    mesh: dict[str, int]
    strategy: str
    exchanges: tuple[str, ...]  # of tokens for experts
    parts: dict[str, float]  # bytes
    flops_per_token: dict[str, float]
    flops: float
    hbm: dict[str, float]
    links: dict[str, float]
    seconds: dict[str, float]  # by bound

    @property
    def bytes(self) -> float:
        """That have to fit."""
        return sum(self.parts.values())

    @property
    def fits(self) -> bool:
        """In the memory that a program may use."""
        return self.bytes <= self.pod.chip.memory

    @property
    def bound(self) -> str:
        """What takes longest."""
        return max(self.seconds, key=self.seconds.get)

    @property
    def time(self) -> float:
        """Seconds of the call or step, at least."""
        return self.seconds[self.bound]

    def costs(self, dollars: float, watts: float) -> tuple[float, float]:
        """(dollars per million tokens, joules per token) at prices and watts of a chip."""
        each = self.pod.chips * self.time / self.job.tokens
        return each * dollars / 3600 * 1e6, each * watts


def plan_for(job: Job, pod: Pod, mesh: dict[str, int], strategy: str | None = None) -> Plan:
    """On the abstract mesh; strategy None: the cheapest by parallel/cost.py."""
    plan = layout(job, abstract_mesh(mesh, pod.kind))
    return replace(plan, strategy=strategy or work.strategy_of(job, plan, pod))


def estimate(
    job: Job, pod: Pod, mesh: dict[str, int], strategy: str | None = None
) -> Estimate:
    """The closed form. UserError: the mesh cannot hold the job, whatever its memory."""
    plan = plan_for(job, pod, mesh, strategy)
    parts = memory.bytes_per_device(job, plan)
    flops, hbm = work.device_flops(job, plan), work.hbm_bytes(job, plan)
    sends = links.link_bytes(job, plan)
    ring = sends.get("ring", 0.0)
    sending = ring / DEVICES[pod.name].link + (sum(sends.values()) - ring) / pod.links
    seconds = (flops / pod.flops, sum(hbm.values()) / pod.bandwidth, sending)
    return Estimate(
        job, pod, mesh, plan.strategy, links.exchanges(job, plan), parts,
        work.flops_per_token(job), flops, hbm, sends,
        dict(zip(BOUNDS, seconds, strict=True)),
    )
