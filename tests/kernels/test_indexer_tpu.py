"""Block choice on a TPU, interpreted: scores and ids = ref, ties included."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.indexer import top_blocks, tpu
from tests.conftest import assert_close
from tests.kernels.test_select import _index


def _both(args, k):
    return (
        jax.jit(functools.partial(top_blocks, k=k, impl=impl))(*args)
        for impl in ("pallas_interpret", "ref")
    )


@pytest.mark.parametrize("k, dims", [
    (3, {"c": 100, "m": 7}), (50, {"c": 300, "m": 130}), (9, {"c": 300, "m": 7, "g": 1}),
    (5, {"c": 3, "m": 1, "g": 3}),
], ids=["one tile", "more than candidates", "one key", "fewer blocks than k"])
def test_kernel_equals_the_reference(k, dims, rng, monkeypatch):
    monkeypatch.setattr(tpu, "TILE", 128)
    args = _index(rng, **dims)
    got, want = _both(args, k)
    np.testing.assert_array_equal(got[1], want[1])
    assert_close(got[0], want[0])
    assert (np.asarray(got[1]) >= 0).any() and (np.asarray(got[1]) == -1).any()


def test_bfloat16(rng, monkeypatch):
    monkeypatch.setattr(tpu, "TILE", 128)
    q, keys, *rest = _index(rng, c=300)
    # Whole numbers: products are exact, so ids are the reference's, and there are many ties.
    q, keys = (jnp.round(2 * x).astype(jnp.bfloat16) for x in (q, keys))
    got, want = _both((q, keys, *rest), 20)
    np.testing.assert_array_equal(got[0], want[0])
    np.testing.assert_array_equal(got[1], want[1])


def test_ties_go_to_the_lower_block(rng, monkeypatch):
    """Equal scores within a tile, and in different ones."""
    monkeypatch.setattr(tpu, "TILE", 128)
    q, keys, layer, pos, seg, before, q_seg = _index(rng, c=400)
    keys = keys.at[..., 30:330, :, :].set(jnp.round(keys[..., :1, :, :]))
    args = (q, jnp.round(keys), layer, pos, seg, jnp.full_like(before, 1600), jnp.ones_like(q_seg))
    got, want = _both(args, 19)
    np.testing.assert_array_equal(got[1], want[1])


def test_what_is_no_candidate_may_be_anything(rng, monkeypatch):
    """Unwritten blocks of a cache, in tiles with candidates and in tiles without."""
    monkeypatch.setattr(tpu, "TILE", 128)
    q, keys, layer, pos, seg, before, q_seg = _index(rng, c=512)
    pos, seg = pos.at[:, 100:].set(np.iinfo(np.int32).max), jnp.zeros_like(seg)
    args = (layer, pos, seg, jnp.full_like(before, 2000), jnp.zeros_like(q_seg))
    want = top_blocks(q, keys, *args, k=8, impl="ref")
    got = top_blocks(q, keys.at[:, :, 100:].set(jnp.nan), *args, k=8, impl="pallas_interpret")
    np.testing.assert_array_equal(got[1], want[1])
    assert_close(got[0], want[0])
