"""Muon for matrices, Adam for the rest, told apart by the names of a weight's dims."""

import flax.linen as nn
import jax
import optax
from optax.contrib import MuonDimensionNumbers, muon

BATCH = ("layers", "expert", "tap", "index_keys")  # each index is a matrix of its own


def dimension_numbers(names: tuple[str | None, ...]) -> MuonDimensionNumbers | None:
    """Which dims of a weight are contracted and which are output; None: not a matrix.

    A weight that ends in "embed" writes to the residual stream: all dims before it are its input.
    Otherwise its first dim is the input and the rest is the output.
    """
    dims = [i for i, name in enumerate(names) if name not in BATCH]
    if len(dims) < 2:
        return None
    if names[dims[-1]] == "embed":
        return MuonDimensionNumbers(tuple(dims[:-1]), (dims[-1],))
    return MuonDimensionNumbers((dims[0],), tuple(dims[1:]))


def build(boxed, learning_rate: optax.Schedule, clip: float = 1.0) -> optax.GradientTransformation:
    """The optimiser for parameters described by `boxed` (abstract, dims named, not yet unboxed)."""
    names = nn.get_partition_spec(boxed)
    numbers = jax.tree.map(dimension_numbers, names, is_leaf=lambda x: isinstance(x, tuple))
    return optax.chain(
        optax.clip_by_global_norm(clip),
        muon(learning_rate, adam_b2=0.95, muon_weight_dimension_numbers=lambda _: numbers),
    )
