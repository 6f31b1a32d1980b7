"""What lies on which mesh axes."""

import math
from dataclasses import dataclass, replace

from jax.sharding import Mesh, PartitionSpec

from kimijax.errors import UserError


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

    def over(self, tokens: tuple[str, ...]) -> "Axes":
        """Of the devices that differ in some of the token axes alone."""
        return replace(self, tokens=tokens)

    def grouped(self, size: int) -> "Axes":
        """The same devices in the same order; tokens lie on rings of groups of `size` neighbours.

        UserError: the devices are not so many whole groups.
        """
        if self.ways % size:
            raise UserError(
                f"{' x '.join(self.tokens)} = {self.ways} devices are no groups of {size}; choose "
                "a divisor"
            )
        names, held = self.mesh.axis_names, self.mesh.devices.shape
        first = names.index(self.tokens[0])
        last = first + len(self.tokens)
        devices = self.mesh.devices.reshape(
            *held[:first], self.ways // size, size, *held[last:]
        )
        mesh = Mesh(devices, (*names[:first], "ring", "group", *names[last:]))
        return replace(self, mesh=mesh, tokens=("ring", "group"))

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
