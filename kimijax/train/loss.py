"""The loss of a language model, its vocabulary looked at a piece of the tokens at a time."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from kimijax.cache import Watch
from kimijax.model import Model
from kimijax.train.rows import Rows

TOKENS = 2048  # of a device whose logits exist at one time
WATCHED = 32  # positions of a row on which a block index is trained


def language_model(
    model: Model, *, z: float = 0.0, index: float = 0.0, runs: int | None = None,
    tokens: int = TOKENS,
) -> Callable:
    """loss(params, rows) for `make_step`: the mean cross-entropy by weight, in nats.

    z       weight of the mean square of log Z (PaLM's z-loss, arXiv:2204.02311, section 5)
    index   weight of the loss that teaches a block index where exact attention looks
    runs    of the order of a plan's rows (`Plan.arrange`)
    tokens  of a device whose logits exist at one time, forward and backward
    """

    def loss(params, rows: Rows):
        watch = watched(rows) if index else None
        out = model.apply(params, rows.ids, rows.pos, rows.seg, runs=runs, watch=watch)
        head = lambda hidden: model.apply(params, hidden, method="head")  # noqa: E731
        sums = cross_entropy(head, out.hidden, rows.targets, rows.weight, model.ops.ways, tokens)
        weight = jnp.sum(rows.weight)
        text, square = (x / jnp.maximum(weight, 1e-9) for x in sums)
        taught = sum(_index_losses(out.aux), jnp.float32(0))
        metrics = {"loss": text, "weight": weight}
        metrics |= ({"log_z_square": square} if z else {}) | ({"index": taught} if index else {})
        return text + z * square + index * taught, (metrics, out.aux)

    return loss


def watched(rows: Rows) -> Watch:
    """The positions on which an index is trained: WATCHED of every row, evenly spaced."""
    b, t = rows.ids.shape
    at = jnp.linspace(0, t - 1, min(WATCHED, t)).astype(jnp.int32)
    return Watch(jnp.broadcast_to(at, (b, at.size)), jnp.take(rows.weight, at, axis=1))


def _index_losses(aux: tuple) -> list[jax.Array]:
    return [
        report["mixer"]["index_loss"].sum()
        for group in aux for report in group.values() if "index_loss" in report["mixer"]
    ]


def cross_entropy(
    head: Callable, hidden: jax.Array, targets: jax.Array, weight: jax.Array, ways: int, tokens: int
) -> tuple[jax.Array, jax.Array]:
    """Sums over b t by weight of -log p(target) and of (log Z)^2.

    Logits of all tokens at once would be the largest array of a training step: pieces of `tokens`
    are computed one after the other, and again in the backward pass.

    head    hidden ... d -> logits ... vocab, float32
    ways    devices over which t lies: a piece holds as many tokens of each
    """
    b, t = targets.shape
    length = t // ways
    # The largest divisor that is small enough: a remainder would be a program of its own.
    piece = next(n for n in range(min(max(tokens // b, 1), length), 0, -1) if length % n == 0)

    def pieces(x):  # (length / piece) b ways piece ...
        x = x.reshape(b, ways, length // piece, piece, *x.shape[2:])
        return jnp.moveaxis(x, 2, 0)

    @jax.checkpoint
    def one(hidden, targets, weight):
        logits = head(hidden)
        log_z = jax.nn.logsumexp(logits, -1)
        right = jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
        return jnp.sum((log_z - right) * weight), jnp.sum(log_z**2 * weight)

    def add(total, x):
        return jax.tree.map(jnp.add, total, one(*x)), None

    zero = jnp.float32(0)
    return jax.lax.scan(add, (zero, zero), tuple(map(pieces, (hidden, targets, weight))))[0]
