"""MuonClip's optimiser: Muon for matrices, AdamW for the rest (arXiv:2502.16982, 2507.20534).

    M <- mu M + G,   U = M (Kimi K2) or G + mu M (Nesterov: Moonlight)
    W <- W - lr (0.2 sqrt(max(rows, columns)) NS5(U) + wd W)

The clip of attention logits comes after the step and is `kimijax.optim.qk_clip`.
optax.contrib.muon averages the momentum with a bias correction, which under Nesterov is another
optimiser in early steps; without Nesterov the two are the same.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding

from kimijax.ops.matrices import Matrices
from kimijax.optim.matrices import matrices_of
from kimijax.parallel.matrices import apply_dealt

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
STEPS = 5
RMS = 0.2  # of an update, that of AdamW
EPSILON = 1e-7
CHUNK_BYTES = 2**26  # of matrices that are orthogonalised together

# AdamW for these although they are matrices: embedding and head, and the gates of KDA.
ADAM_DIMS = {"vocab", "gate_rank"}
# No decay where it would pull towards a value that means something else than "none".
NO_DECAY = {"A_log", "dt_bias", "sink"}


class MuonState(NamedTuple):
    """The momentum of each matrix, float32."""

    momentum: Any


def muon(
    boxed,
    learning_rate: optax.ScalarOrSchedule,
    *,
    decay: float = 0.1,
    momentum: float = 0.95,
    nesterov: bool = False,
    adam_rate: optax.ScalarOrSchedule | None = None,
    clip: float | None = 1.0,
    dtype: jnp.dtype = jnp.float32,
    shardings=None,
) -> optax.GradientTransformation:
    """The optimiser for parameters described by `boxed` (`kimijax.model.abstract_params`).

    learning_rate  of both kinds: updates of matrices have the RMS of AdamW's
    adam_rate      of what AdamW updates, where it is to be another (in short runs matrices take
                   larger steps); None: the same
    decay          decoupled, times the learning rate
    clip           largest global norm of the gradients; None: any
    dtype          of the Newton-Schulz products (bfloat16 in the reference implementation)
    shardings      of the parameters on a mesh (`Plan.shardings`); None: on one device
    """
    names = nn.get_partition_spec(boxed)
    is_names = lambda x: isinstance(x, tuple)  # noqa: E731
    kinds = jax.tree_util.tree_map_with_path(_kind, names, is_leaf=is_names)
    shardings = jax.tree.map(lambda kind: None, kinds) if shardings is None else shardings
    matrices = jax.tree.map(
        lambda kind, x, where: (matrices_of(x), where) if kind == "muon" else optax.MaskedNode(),
        kinds, names, shardings,
    )
    decayed, rate = optax.add_decayed_weights(decay), optax.scale_by_learning_rate(learning_rate)
    adam = optax.scale_by_adam(0.9, 0.95, 1e-8)
    adam_rate = optax.scale_by_learning_rate(learning_rate if adam_rate is None else adam_rate)
    return optax.chain(
        optax.identity() if clip is None else optax.clip_by_global_norm(clip),
        optax.partition({
            "muon": optax.chain(scale_by_muon(matrices, momentum, nesterov, dtype), decayed, rate),
            "adam": optax.chain(adam, decayed, adam_rate),
            "adam without decay": optax.chain(adam, adam_rate),
            "moved by the load": optax.set_to_zero(),
        }, kinds),
    )


def adamw(
    boxed, learning_rate: optax.ScalarOrSchedule, *, decay: float = 0.1, clip: float | None = 1.0
) -> optax.GradientTransformation:
    """AdamW for every weight, to compare with: the same decay, betas 0.9 and 0.95."""
    names = nn.get_partition_spec(boxed)
    kinds = jax.tree_util.tree_map_with_path(_kind, names, is_leaf=lambda x: isinstance(x, tuple))
    kept = jax.tree.map(lambda kind: kind in ("muon", "adam"), kinds)
    moved = jax.tree.map(lambda kind: kind == "moved by the load", kinds)
    return optax.chain(
        optax.identity() if clip is None else optax.clip_by_global_norm(clip),
        optax.adamw(learning_rate, 0.9, 0.95, 1e-8, weight_decay=decay, mask=kept),
        optax.masked(optax.set_to_zero(), moved),
    )


def _kind(path, names: tuple[str | None, ...]) -> str:
    keys = [key.key for key in path]
    if keys[-2:] == ["ffn", "bias"]:
        return "moved by the load"
    if keys[-1] in NO_DECAY:
        return "adam without decay"
    outputs = {name for name in names if name is not None}
    gates = "heads" in outputs and "head_dim" not in outputs  # one number a head: KDA's beta
    if ADAM_DIMS & outputs or gates or matrices_of(names) is None:
        return "adam"
    return "muon"


def scale_by_muon(
    matrices, momentum: float, nesterov: bool, dtype: jnp.dtype
) -> optax.GradientTransformation:
    """Gradients of matrices -> orthogonal updates of RMS 0.2, by Muon's momentum.

    matrices  tree like the parameters: (Matrices, NamedSharding or None)
    """

    def init(params):
        return MuonState(jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), params))

    def update(grads, state, params=None):
        del params
        m = jax.tree.map(lambda m, g: momentum * m + g, state.momentum, grads)
        u = jax.tree.map(lambda m, g: g + momentum * m, m, grads) if nesterov else m
        updates = jax.tree.map(
            lambda u, g, how: orthogonal(u, *how, dtype).astype(g.dtype), u, grads, matrices
        )
        return updates, MuonState(m)

    return optax.GradientTransformation(init, update)


def orthogonal(
    x: jax.Array, matrices: Matrices, where: NamedSharding | None = None,
    dtype: jnp.dtype = jnp.float32,
) -> jax.Array:
    """0.2 sqrt(max(rows, columns)) NS5(x) of every matrix of a weight, float32."""
    _, rows, columns = matrices.sizes(x.shape)
    f = functools.partial(_in_chunks, dtype, rows > columns)
    if where is not None:
        y = apply_dealt(f, x, matrices, where)
    else:
        y = matrices.unstack(f(matrices.stack(x), lambda part: part), x.shape)
    return y * (RMS * max(rows, columns) ** 0.5)


def _in_chunks(dtype: jnp.dtype, tall: bool, x: jax.Array, total: Callable) -> jax.Array:
    """`newton_schulz` of n r c, of as many at a time as CHUNK_BYTES hold."""
    n, rows, columns = x.shape
    together = max(1, CHUNK_BYTES // (rows * columns * 4))
    if together >= n:
        return newton_schulz(x, total, dtype, tall)
    one = lambda m: newton_schulz(m[None], total, dtype, tall)[0]  # noqa: E731
    return jax.lax.map(one, x, batch_size=together)


def newton_schulz(
    x: jax.Array, total: Callable[[jax.Array], jax.Array], dtype: jnp.dtype = jnp.float32,
    tall: bool = False,
) -> jax.Array:
    """Towards the orthogonal factor of matrices n r c, by five quintic steps; float32.

    total  sums what products over the longer dim give here over the devices that hold its rest
    tall   that is r, not c. Such a matrix is not transposed: r may lie in pieces, and a piece
           would become a dim that is padded to a tile's
    """
    a, b, c = COEFFICIENTS
    exact = jax.lax.Precision.HIGHEST if jnp.dtype(dtype) == jnp.float32 else None
    dot = functools.partial(jnp.einsum, precision=exact)
    squared, through = "nrc,nsc->nrs", "nrs,nsc->nrc"
    if tall:
        squared, through = "nrc,nrd->ncd", "ndc,nrd->nrc"
    norm = jnp.sqrt(total(jnp.sum(x * x, (1, 2), keepdims=True)))

    def step(_, x):
        gram = total(dot(squared, x, x))
        return a * x + dot(through, b * gram + c * dot("nrs,nst->nrt", gram, gram), x)

    # A loop: written out, five times the code of every shape is compiled.
    x = (x / (norm + EPSILON)).astype(dtype)
    return jax.lax.fori_loop(0, STEPS, step, x).astype(jnp.float32)
