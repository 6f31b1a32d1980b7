"""select and indexer: xla = ref; all blocks chosen = attention to all of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kernels_pallas.indexer.xla as indexer_xla
import kernels_pallas.select.xla as select_xla
from kernels_pallas.attention import Keys, Queries, attention
from kernels_pallas.indexer import top_blocks
from kernels_pallas.select import select
from tests.conftest import array, assert_close

FAR = np.iinfo(np.int32).max


def _chosen(rng, b=2, m=5, t=3, h=2, r=8, c=6, j=4, k=3):
    q = array(rng.normal(size=(b, m, t, h, r)))
    blocks = array(rng.normal(size=(2, b, c, j, r)))
    ids = np.stack([[rng.permutation(c)[:k] for _ in range(m)] for _ in range(b)])
    ids[0, 0], ids[1, 2, 1:] = -1, -1  # an empty row, and fewer blocks than k
    return q, blocks, array(ids, jnp.int32)


@pytest.mark.parametrize("piece", [128, 2], ids=["at once", "in pieces"])
def test_select_equals_reference_forward_and_gradient(piece, rng, monkeypatch):
    monkeypatch.setattr(select_xla, "PIECE", piece)
    q, blocks, ids = _chosen(rng)
    d_out = array(rng.normal(size=q.shape))
    d_lse = array(rng.normal(size=q.shape[:-1]))

    def loss(q, blocks, impl):
        p = select(q, blocks, jnp.int32(1), ids, scale=0.4, impl=impl)
        lse = jnp.where(jnp.isneginf(p.lse), 0.0, p.lse)
        return jnp.sum(p.out * d_out) + jnp.sum(lse * d_lse), p

    got, want = (
        jax.jit(lambda q, c, i=impl: jax.value_and_grad(loss, (0, 1), has_aux=True)(q, c, i))(
            q, blocks
        )
        for impl in ("xla", "ref")
    )
    assert_close(got, want)
    assert np.isneginf(want[0][1].lse[0, 0]).all()


def test_all_blocks_chosen_is_attention_to_all_of_them(rng):
    q, blocks, _ = _chosen(rng)
    b, m, t, h, r = q.shape
    ids = jnp.broadcast_to(jnp.arange(6), (b, m, 6))
    got = select(q, blocks, jnp.int32(0), ids, scale=0.4, impl="xla")
    one = blocks[0].reshape(b, -1, 1, r)
    zero = jnp.zeros((b, 24), jnp.int32)
    at = jnp.zeros((b, m * t), jnp.int32)
    want = attention(
        Queries(q.reshape(b, m * t, h, r), None, at, at, at), Keys(one, one, None, zero, zero),
        scale=0.4, impl="ref",
    )
    assert_close(jax.tree.map(lambda x: x.reshape(b, m * t, *x.shape[3:]), got), want)


def _index(rng, c, m=7, i=4, g=2, b=2):
    q = array(rng.normal(size=(b, m, i)))
    keys = array(rng.normal(size=(2, b, c, g, i)))
    pos = np.tile(np.arange(c) * 4, (b, 1))
    seg = np.tile((np.arange(c) >= c // 3).astype(np.int32), (b, 1))
    pos[0, -3:] = FAR
    before = rng.integers(0, 4 * c, (b, m))
    q_seg = rng.integers(-1, 2, (b, m))
    return q, keys, jnp.int32(1), *(array(x, jnp.int32) for x in (pos, seg, before, q_seg))


@pytest.mark.parametrize("tile, lane", [(64, 8), (24, 8), (8192, 64)])
@pytest.mark.parametrize("k", [3, 50])
def test_index_equals_reference(tile, lane, k, rng, monkeypatch):
    monkeypatch.setattr(indexer_xla, "TILE", tile)
    monkeypatch.setattr(indexer_xla, "LANE", lane)
    monkeypatch.setattr(indexer_xla, "SCORES", tile)
    args = _index(rng, c=100)
    got, want = (top_blocks(*args, k=k, impl=impl) for impl in ("xla", "ref"))
    np.testing.assert_array_equal(got[1], want[1])
    assert_close(got[0], want[0])


def test_ties_go_to_the_lower_block(rng, monkeypatch):
    monkeypatch.setattr(indexer_xla, "TILE", 32)
    monkeypatch.setattr(indexer_xla, "LANE", 4)
    monkeypatch.setattr(indexer_xla, "SCORES", 32)
    q, keys, layer, pos, seg, before, q_seg = _index(rng, c=100)
    keys = keys.at[..., 30:90, :, :].set(jnp.round(keys[..., :1, :, :]))
    args = (q, jnp.round(keys), layer, pos, seg, jnp.full_like(before, 400), jnp.ones_like(q_seg))
    got, want = (top_blocks(*args, k=9, impl=impl)[1] for impl in ("xla", "ref"))
    np.testing.assert_array_equal(got, want)
