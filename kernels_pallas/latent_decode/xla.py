"""A row and a page at a time: what no query sees is not read, and nothing is kept.

The layer is sliced before the loops: one that reads a stack which the caller goes on to write has
XLA copy every layer's.
"""

import jax
import jax.numpy as jnp

from kernels_pallas.attention import overlap
from kernels_pallas.attention.xla import contract, visible
from kernels_pallas.latent_decode.ref import keys_of, places
from kernels_pallas.partial import Partial, empty, from_logits, merge


def one(row):
    """An array or a tree of them as a batch of one."""
    return jax.tree.map(lambda x: x[None], row)


def decode(q, pages, layer, table, *, scale: float) -> Partial:
    """The op's xla form. See the package docstring for the contract."""
    layered = {n: getattr(pages, n) for n in ("latent", "rope", "scale")}
    pages = pages._replace(**jax.tree.map(lambda x: x[layer][None], layered))
    q = q._replace(nope=q.nope * scale, rope=None if q.rope is None else q.rope * scale)

    def row(xs):
        q, table = one(xs[0]), xs[1]

        def step(acc, page):
            def use():
                return merge(acc, _attend(q, one(keys_of(pages, 0, page, q.nope.dtype))))

            return jax.lax.cond(overlap(q, one(places(pages, page))), use, lambda: acc), None

        start = empty(q.nope.shape[:3], q.nope.shape[3])
        return jax.tree.map(lambda x: x[0], jax.lax.scan(step, start, table)[0])

    return jax.lax.map(row, (q, table))


def _attend(q, kv) -> Partial:
    """Scaled queries to keys of one head."""
    latent = kv.key[:, :, 0]
    # What is large stands first: a product on a CPU would transpose the second.
    logits = contract("bsr,bthr->bsth", latent, q.nope)
    if q.rope is not None:
        logits += contract("bsp,bthp->bsth", kv.rope, q.rope)
    logits = jnp.moveaxis(logits, 1, -1)
    weigh = lambda w: contract("bths,bsr->bthr", w.astype(latent.dtype), latent)  # noqa: E731
    return from_logits(logits, visible(q, kv)[:, :, None], weigh)
