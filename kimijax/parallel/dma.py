"""The ring of ring.py as one kernel: visitors come by remote DMA while the device attends."""

from kernels_pallas.partial import Partial
from kernels_pallas.ring import IMPLS, ring_attention, ring_attention_grads
from kimijax.parallel.axes import Axes
from kimijax.parallel.device import Local, Source
from kimijax.parallel.sources import LATENTS


def dma_forward(at: Local, q, kv, up) -> Partial:
    """All hops."""
    return ring_attention(q, kv, up, scale=at.scale, axes=at.names, impl=at.impl)


def dma_backward(at: Local, q, kv, up, lse, d_out, delta):
    """The mirror of dma_forward."""
    return ring_attention_grads(
        q, kv, up, lse, d_out, delta, scale=at.scale, axes=at.names, impl=at.impl
    )


def refused(axes: Axes, source: Source, impl: str) -> str | None:
    """Why it cannot be, or None."""
    platform = axes.mesh.devices.flat[0].platform
    if source is not LATENTS:
        return "strategy ring_dma sends latents, these layers send keys; name strategy ring"
    if impl not in IMPLS:
        return (
            f"strategy ring_dma is a kernel of TPUs, which impl {impl} is not; name impl pallas, "
            "or strategy ring"
        )
    if impl == "pallas" and platform != "tpu":
        return (
            f"strategy ring_dma with impl pallas needs TPUs, these devices are {platform}: they "
            "have no remote DMA; name strategy ring, or impl pallas_interpret to simulate it"
        )
    return None
