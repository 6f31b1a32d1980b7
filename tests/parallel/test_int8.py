"""A cache of int8 latents that is dealt over devices is that of one device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.int8 import narrow
from kimijax.cache import empty_cache
from kimijax.fork import fork
from kimijax.model import Model
from kimijax.ops.attend import local
from kimijax.parallel.mesh import make_mesh
from kimijax.parallel.plan import Plan
from tests.conftest import CONFIGS, assert_close, model_and_params
from tests.test_int8_cache import MARGIN, T, margin, tokens_of  # noqa: F401

NEW = 3


def continued(name, ops, params):
    """Hidden states of a document read in two chunks and of tokens behind a fork of it."""
    cfg, ids = CONFIGS[name](), tokens_of(name)
    model, cut = Model(cfg, ops), T[name] - NEW

    @functools.partial(jax.jit, static_argnames="aligned")
    def read(params, cache, piece, aligned):
        out = model.apply(params, piece, cache=cache, aligned=aligned)
        return ops.deal(out.cache), ops.whole(out.hidden)

    @jax.jit
    def extend(params, frozen, cache, piece):
        fresh = jnp.ones(piece.shape, bool)
        out = model.apply(params, piece, cache=cache.replace(frozen=frozen), fresh=fresh)
        return ops.deal(out.cache.replace(frozen=None)), ops.whole(out.hidden)

    empty = lambda: ops.deal(empty_cache(cfg, 1, T[name], ways=ops.ways, latents="int8"))  # noqa: E731
    half = T[name] // 2
    frozen, first = read(params, jax.jit(empty)(), ids[:, :half], True)
    frozen, second = read(params, frozen, ids[:, half:cut], False)
    found = [first, second]
    cache = jax.jit(lambda c: ops.deal(fork(cfg, c, 64, ops.rows).replace(frozen=None)))(frozen)
    for i in range(cut, cut + NEW):
        cache, hidden = extend(params, frozen, cache, ids[:, i : i + 1])
        found.append(hidden)
    return np.concatenate(found, 1)


@pytest.mark.parametrize(
    "name, sizes",
    [
        ("needle", {"seq": 8}),
        pytest.param("kimi", {"seq": 4, "expert": 2}, marks=pytest.mark.slow),
    ],
)
def test_a_dealt_cache_and_its_fork_are_local_ones(name, sizes, margin):  # noqa: F811
    plan, (_, params) = Plan(make_mesh(sizes)), model_and_params(name)
    want = continued(name, local(), params)
    assert margin() > MARGIN
    dealt = jax.device_put(params, plan.shardings(CONFIGS[name]()))
    assert_close(continued(name, plan.ops(), dealt), want)


@pytest.mark.parametrize("tiles", [8, 64], ids=["queries come", "blocks travel"])
def test_chosen_words_of_other_devices(tiles, rng):
    """Blocks stay where they lie or go around; their scales with them."""
    plan = Plan(make_mesh({"seq": 8}))
    q = jnp.asarray(rng.normal(size=(1, tiles, 4, 2, 8)), jnp.float32)
    blocks, scale = narrow(jnp.asarray(rng.normal(size=(2, 1, 64, 4, 8)), jnp.float32))
    ids = jnp.asarray(np.stack([rng.permutation(64)[:3] for _ in range(tiles)])[None], jnp.int32)
    how = {"scale": 0.4, "token_scale": scale}
    got, want = (
        jax.jit(lambda *args, ops=ops: ops.select(*args, **how))(q, blocks, jnp.int32(1), ids)
        for ops in (plan.ops(), local())
    )
    assert_close(got, want)
