"""What a dim of a weight is, and the mesh axes that hold it: one table for all models."""

import math

import flax.linen as nn
import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kimijax.errors import UserError

Rules = dict[str, tuple[str, ...]]

WHOLE = (  # dims that every device holds whole
    "q_rank", "latent", "head_dim", "norm", "layers", "tap", "gate_rank", "index", "index_keys",
    "block", "input_block", "kv_heads",  # few: they need not divide the axis of heads
    "routed_out",
)
DEALT = ("data", "seq")  # in training, weights and optimizer state lie in as many pieces
_COMMON: Rules = {
    "heads": ("tensor",), "ffn": ("tensor",), "vocab": ("tensor",),
    "expert": ("expert",), "routed": ("tensor",), **dict.fromkeys(WHOLE, ()),
}
# What routed experts bring back, e f d, is cut along f: pieces of d would be a last dim of a few
# numbers, which a TPU pads to 128.
TRAIN: Rules = _COMMON | {"embed": DEALT, "routed": ("tensor", *DEALT), "q_input": DEALT}
SERVE: Rules = _COMMON | {"embed": (), "q_input": ()}
MAY_LIE_WHOLE = ("q_input",)  # where axes do not divide them: of the rank of MLA's queries


def spec(names: tuple[str | None, ...], mesh: Mesh, rules: Rules, what: str) -> PartitionSpec:
    """The axes of a weight with named dims; UserError: a name without a rule, an axis used twice.

    what  the weight, for the message
    """
    used: dict[str, str] = {}
    entries = []
    for name in names:
        if name is not None and name not in rules:
            raise UserError(f"{what}: no rule says where its dim {name!r} lies; add one")
        axes = tuple(a for a in rules.get(name, ()) if mesh.shape[a] > 1)
        for axis in axes:
            if axis in used:
                raise UserError(
                    f"{what}: its dims {used[axis]!r} and {name!r} would both lie on the mesh axis "
                    f"{axis!r} (size {mesh.shape[axis]}); change the rule of one of them"
                )
            used[axis] = name
        entries.append(axes or None)
    return PartitionSpec(*entries)


def shardings(boxed, mesh: Mesh, rules: Rules):
    """Abstract boxed params (`kimijax.model.abstract_params`) -> the same tree of NamedSharding."""

    def one(path, leaf):
        what = ".".join(str(getattr(key, "key", key)) for key in path)
        names = leaf.names if isinstance(leaf, nn.Partitioned) else ()
        shape = leaf.value.shape if isinstance(leaf, nn.Partitioned) else leaf.shape
        names = tuple(
            None if name in MAY_LIE_WHOLE and size % math.prod(mesh.shape[a] for a in rules[name])
            else name for name, size in zip(names, shape, strict=False)
        )
        found = spec(names, mesh, rules, what)
        for name, size, axes in zip(names, shape, found, strict=False):
            axes = (axes,) if isinstance(axes, str) else axes
            if axes and size % (ways := math.prod(mesh.shape[a] for a in axes)):
                raise UserError(
                    f"{what}: its dim {name!r} of {size} is no multiple of {' x '.join(axes)} = "
                    f"{ways}; choose a smaller axis"
                )
        return NamedSharding(mesh, found)

    return jax.tree_util.tree_map_with_path(
        one, boxed, is_leaf=lambda x: isinstance(x, nn.Partitioned)
    )
