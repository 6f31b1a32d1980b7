"""A row's pages copied one behind the other, then attention by tiles."""

from kernels_pallas.attention import xla as attention
from kernels_pallas.latent_decode.ref import gathered
from kernels_pallas.partial import Partial


def decode(q, pages, layer, table, *, scale: float) -> Partial:
    """The op's xla form. See the package docstring for the contract."""
    return attention.forward(q, gathered(pages, layer, table, q.nope.dtype), scale=scale)
