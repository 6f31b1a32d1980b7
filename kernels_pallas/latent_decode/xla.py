"""A few pages at a time: what no query sees is not read, and what is read is not kept."""

import jax
import jax.numpy as jnp

from kernels_pallas.attention import overlap
from kernels_pallas.attention.xla import contract, visible
from kernels_pallas.latent_decode.ref import gathered, places
from kernels_pallas.partial import Partial, empty, from_logits, merge

STEP = 2048  # tokens at a time


def decode(q, pages, layer, table, *, scale: float) -> Partial:
    """The op's xla form. See the package docstring for the contract."""
    (b, n), j = table.shape, pages.pos.shape[1]
    turn = max(1, min(n, STEP // j))
    table = jnp.pad(table, ((0, 0), (0, -n % turn)), constant_values=-1)
    q = q._replace(nope=q.nope * scale, rope=None if q.rope is None else q.rope * scale)

    def step(acc, own):
        def use():
            return merge(acc, _attend(q, gathered(pages, layer, own, q.nope.dtype)))

        return jax.lax.cond(overlap(q, places(pages, own)), use, lambda: acc), None

    start = empty(q.nope.shape[:3], q.nope.shape[3])
    return jax.lax.scan(step, start, table.reshape(b, -1, turn).swapaxes(0, 1))[0]


def _attend(q, kv) -> Partial:
    """Scaled queries to keys of one head."""
    latent = kv.key[:, :, 0]
    logits = contract("bthr,bsr->bths", q.nope, latent)
    if q.rope is not None:
        logits += contract("bthp,bsp->bths", q.rope, kv.rope)
    weigh = lambda w: contract("bths,bsr->bthr", w.astype(latent.dtype), latent)  # noqa: E731
    return from_logits(logits, visible(q, kv)[:, :, None], weigh)
