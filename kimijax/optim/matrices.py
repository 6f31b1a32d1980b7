"""Which weights are matrices, told by the names of their dims."""

from kimijax.ops.matrices import Matrices

# Each index of these dims is a matrix of its own.
BATCH = ("layers", "expert", "tap", "index_keys")


def matrices_of(names: tuple[str | None, ...]) -> Matrices | None:
    """Which dims of a weight are contracted and which are output; None: not a matrix.

    A weight that ends in "embed" writes to the residual stream: all dims before it are its input.
    Otherwise its first dim is the input and the rest is the output. A head and its channels are
    one dim: what has no other is a vector.
    """
    dims = [i for i, name in enumerate(names) if name not in BATCH]
    kinds = {"heads" if names[i] == "head_dim" else names[i] for i in dims}
    if len(dims) < 2 or kinds == {"heads"}:
        return None
    if names[dims[-1]] == "embed":
        return Matrices(tuple(dims[:-1]), (dims[-1],))
    return Matrices((dims[0],), tuple(dims[1:]))
