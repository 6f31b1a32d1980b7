"""The monoid: identity, order, and gradients at the empty element."""

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.partial import Partial, empty, merge, sink
from tests.conftest import array, assert_close


def _partials(rng, n=3):
    shapes = (4, 2, 8), (4, 2), (4, 2)
    return [Partial(*(array(rng.normal(size=s)) for s in shapes))
            for _ in range(n)]


def test_merge_is_associative_and_commutative(rng):
    a, b, c = _partials(rng)
    assert_close(merge(merge(a, b), c), merge(a, merge(b, c)))
    assert_close(merge(a, b), merge(b, a))


def test_empty_is_the_identity(rng):
    (a,) = _partials(rng, 1)
    assert_close(merge(a, empty((4, 2), 8)), a)
    assert_close(merge(empty((4, 2), 8), a), a)


def test_two_empties_merge_without_nan_forward_and_backward():
    none = empty((3,), 4)

    def loss(a, b):
        p = merge(a, b)
        return p.out.sum() + jnp.where(jnp.isneginf(p.lse), 0.0, p.lse).sum()

    merged = merge(none, none)
    assert np.isneginf(merged.lse).all() and (merged.out == 0).all()
    grads = jax.grad(loss, argnums=(0, 1))(none, none)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


def test_a_sink_takes_mass_and_leaves_max_logit(rng):
    (a,) = _partials(rng, 1)
    p = merge(a, sink(jnp.array([0.0, 1.0]), a))
    share = jnp.exp(a.lse) / (jnp.exp(a.lse) + jnp.exp(jnp.array([0.0, 1.0])))
    assert_close(p.out, a.out * share[..., None])
    np.testing.assert_array_equal(p.max_logit, a.max_logit)
