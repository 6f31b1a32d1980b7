"""What lies on which mesh axes."""

import math
from dataclasses import dataclass

from jax.sharding import Mesh, PartitionSpec


@dataclass(frozen=True)
class Axes:
    """The mesh axes that hold rows, tokens and heads."""

    mesh: Mesh
    rows: tuple[str, ...] = ("data",)
    tokens: tuple[str, ...] = ("seq", "expert")
    heads: tuple[str, ...] = ("tensor",)

    @property
    def ways(self) -> int:
        """Devices over which the tokens of a row lie."""
        return math.prod(self.mesh.shape[a] for a in self.tokens)

    def place(self, shape: tuple[int, int]) -> tuple[tuple[str, ...] | None, ...]:
        """Axes of rows and of tokens b t: None where they cannot be dealt out, as one token."""
        rows = math.prod(self.mesh.shape[a] for a in self.rows)
        return (
            None if shape[0] % rows else self.rows,
            None if shape[1] % self.ways else self.tokens,
        )

    def queries(self) -> PartitionSpec:
        """Of b t h ..."""
        return PartitionSpec(self.rows, self.tokens, self.heads)

    def keys(self) -> PartitionSpec:
        """Of b t ..., every head's."""
        return PartitionSpec(self.rows, self.tokens)
