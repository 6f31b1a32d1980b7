"""Low-rank adapters (arXiv:2106.09685): W + (alpha / r) A B, of which A and B are trained."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from kimijax.ops.matrices import Matrices
from kimijax.optim.matrices import matrices_of

Adapters = dict[str, dict[str, jax.Array]]  # by the weight's path: "a" n rows r, "b" n r columns


def adapted(boxed) -> dict[str, Matrices]:
    """The weights that get adapters: matrices held as floats, but for embedding and head.

    boxed  `kimijax.model.abstract_params`; every expert is a matrix of its own
    """
    found = {}
    for path, leaf in _leaves(boxed, lambda x: isinstance(x, nn.Partitioned)):
        matrices = matrices_of(leaf.names)
        floats = jnp.issubdtype(leaf.value.dtype, jnp.floating)
        scale = path.endswith("_scale']")  # of a quantised matrix
        if matrices is not None and floats and not scale and "vocab" not in leaf.names:
            found[path] = matrices
    return found


def fresh_adapters(boxed, rank: int, seed: int) -> Adapters:
    """Adapters that change nothing yet: A normal with deviation rows^-1/2, B zero; float32."""
    shapes = dict(_leaves(nn.unbox(boxed), None))
    made, key = {}, jax.random.key(seed)
    for i, (path, matrices) in enumerate(sorted(adapted(boxed).items())):
        n, rows, columns = matrices.sizes(shapes[path].shape)
        a = jax.random.normal(jax.random.fold_in(key, i), (n, rows, rank)) * rows**-0.5
        made[path] = {"a": a, "b": jnp.zeros((n, rank, columns))}
    return made


def merged(params: Any, adapters: Adapters, boxed, alpha: float) -> Any:
    """The parameters with their adapters added in, each in the dtype of its weight."""
    how = adapted(boxed)

    def one(path, w):
        name = jax.tree_util.keystr(path)
        if name not in adapters:
            return w
        a, b = adapters[name]["a"], adapters[name]["b"]
        change = jnp.einsum("nir,nro->nio", a, b) * (alpha / a.shape[-1])
        return w + how[name].unstack(change, w.shape).astype(w.dtype)

    return jax.tree_util.tree_map_with_path(one, params)


def loss_of_adapters(loss: Callable, boxed, alpha: float) -> Callable:
    """loss(adapters, batch, base params) for `make_step`, whose step then takes the base as well.

    loss  (params, batch) -> (scalar, (metrics, aux))
    """
    return lambda adapters, batch, base: loss(merged(base, adapters, boxed, alpha), batch)


def _leaves(tree, is_leaf) -> list[tuple[str, Any]]:
    found = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf)
    return [(jax.tree_util.keystr(path), leaf) for path, leaf in found]
