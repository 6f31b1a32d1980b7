"""The best mesh, the smallest topology that fits, the longest context that fits."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

from kimijax.config import CompressedConfig, MoEConfig
from kimijax.config_tree import expanded
from kimijax.errors import UserError
from kimijax.ops.rope import MAX_POSITION
from kimijax.parallel.mesh import AXES, named
from kimijax.planner.chips import GIB, Pod, pods
from kimijax.planner.estimate import Estimate, estimate
from kimijax.planner.job import Job

LEAST = 1024  # tokens of the shortest context that is looked for
FINE = 16  # a context is found to one part in so many
SAME = 1.05  # times of meshes that count as equal
MOST_TENSOR = 8  # heads are dealt over no more devices


def meshes(job: Job, pod: Pod) -> Iterator[dict[str, int]]:
    """Sizes by axis whose product is the pod, as far as rows, experts and heads can be dealt."""
    moe = [x.ffn for x in job.cfg.layers if isinstance(x.ffn, MoEConfig)]
    experts = math.gcd(*(m.experts for m in moe)) if moe else 1
    # Packed matrices are not cut along their channels. Every device of tensor reads chosen blocks
    # for all heads, which costs a decode step little, and a whole row what it would without tensor.
    chosen = any(isinstance(x.mixer, CompressedConfig) for x in job.cfg.layers)
    cut = job.cfg == expanded(job.cfg) and not (chosen and job.kind != "decode")
    most = MOST_TENSOR if cut else 1
    for data in _divisors(math.gcd(job.batch, pod.devices)):
        for expert in _divisors(math.gcd(experts, pod.devices // data)):
            rest = pod.devices // data // expert
            for tensor in (n for n in _divisors(rest) if n <= most):
                yield dict(zip(AXES, (data, rest // tensor, expert, tensor), strict=True))


def _divisors(n: int) -> list[int]:
    return [i for i in range(1, n + 1) if n % i == 0]


def candidates(
    job: Job, pod: Pod, which: Iterable[dict[str, int]], strategy: str | None = None
) -> list[Estimate]:
    """Of every mesh that can hold the job. UserError: none can; the last reason."""
    found, why = [], None
    for mesh in which:
        try:
            found.append(estimate(job, pod, mesh, strategy))
        except UserError as error:
            why = error
    if not found:
        raise UserError(f"no mesh of {pod.topology} can hold this job: {why}")
    return found


def best(
    job: Job, pod: Pod, mesh: dict[str, int] | None = None, strategy: str | None = None
) -> Estimate:
    """The fastest that fits, of `mesh` or of all; UserError: none does, with what is too large."""
    if mesh is not None:
        check_product(mesh, pod)
    return fastest(candidates(job, pod, meshes(job, pod) if mesh is None else [mesh], strategy))


def fastest(found: list[Estimate]) -> Estimate:
    """Of those that fit. UserError: none does.

    Times are bounds: of meshes as fast but for `SAME`, the one that needs least memory.
    """
    fitting = [e for e in found if e.fits]
    if not fitting:
        raise UserError(too_large(min(found, key=lambda e: e.bytes)))
    least = min(e.time for e in fitting)
    return min((e for e in fitting if e.time <= SAME * least), key=lambda e: (e.bytes, e.time))


def check_product(mesh: dict[str, int], pod: Pod) -> None:
    """UserError: the mesh is not all of the pod."""
    if (product := math.prod(mesh.values())) != pod.devices:
        raise UserError(
            f"mesh {named(mesh)} has {product} devices, {pod.topology} has {pod.devices}; choose "
            f"axes whose product is {pod.devices}"
        )


def too_large(e: Estimate) -> str:
    """One line: what breaks it, on the mesh that needs least."""
    part, size = max(e.parts.items(), key=lambda kv: kv[1])
    return (
        f"{e.job.kind} of {e.job.context} tokens does not fit {e.pod.topology}: on mesh "
        f"{named(e.mesh)} a device needs {e.bytes / GIB:.1f} GiB of "
        f"{e.pod.chip.memory / GIB:.2f}, {size / GIB:.1f} of them {part}; choose more chips, "
        "fewer tokens or narrower weights"
    )


def smallest(job: Job, chip: str, strategy: str | None = None) -> Estimate:
    """On the smallest topology of a chip that fits. UserError: not even the largest does."""
    why: UserError | None = None
    for pod in pods(chip):
        try:
            return best(job, pod, None, strategy)
        except UserError as error:
            why = error
    raise UserError(f"no topology of {chip} is large enough: {why}")


def longest(
    job: Job, pod: Pod, mesh: dict[str, int] | None = None, strategy: str | None = None
) -> Estimate:
    """With the longest context, from that of the job on. UserError: not even that fits."""
    best(job, pod, mesh, strategy)  # or says why not
    which = [mesh] if mesh else list(meshes(job, pod))

    def fitting(context: int) -> list[dict[str, int]]:
        try:
            found = candidates(replace(job, context=context), pod, which, strategy)
        except UserError:
            return []
        return [e.mesh for e in found if e.fits]

    context = _largest(job.context, fitting, lambda found: which.__setitem__(slice(None), found))
    return best(replace(job, context=context), pod, mesh, strategy)


def _largest(
    context: int, fitting: Callable[[int], list], keep: Callable[[list], None]
) -> int:
    """The largest context that some mesh fits: doubled, then in steps of a part of itself.

    keep  is told what fits: what does not will not fit more
    """
    while context < MAX_POSITION and (found := fitting(2 * context)):
        keep(found)
        context *= 2
    step, finest = context // 2, context // FINE
    while step >= finest and context < MAX_POSITION:
        if context + step <= MAX_POSITION and (found := fitting(context + step)):
            keep(found)
            context += step
        step //= 2
    return context
